"""The limits of the house: no class above 300 lines, no function above 50, but for the kernels.

`python -m tests.tools.limits` prints what exceeds them and exits with 1; ruff holds the complexity (C901).
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import ties_ray

PACKAGE = Path(ties_ray.__file__).parent
CLASS_LINES = 300
FUNCTION_LINES = 50


def too_long(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Yield the name, lines and limit of each class and function that exceeds its limit."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
            if lines > limit:
                yield node.name, lines, limit


def complaints() -> Iterator[str]:
    """Yield a line for each class or function that is too long."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        if not file.startswith("kernels/"):
            for name, lines, limit in too_long(ast.parse(path.read_text())):
                yield f"{file}: {name} has {lines} lines, more than {limit}"


if __name__ == "__main__":
    lines = list(complaints())
    print(*lines, sep="\n", end="\n" * bool(lines))
    sys.exit(bool(lines))
