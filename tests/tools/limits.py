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
EXCEPTIONS = {
}
"""Classes and functions that are still too long, by file; each goes when it is mended, and none comes."""


def too_long(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Yield the name, lines and limit of each class and function that exceeds its limit."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
            if lines > limit:
                yield node.name, lines, limit


def complaints() -> Iterator[str]:
    """Yield a line for each class or function that is too long, and for each exception that is needed no more."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        if file.startswith("kernels/"):
            continue
        lengths = {name: (lines, limit) for name, lines, limit in too_long(ast.parse(path.read_text()))}
        exceptions = EXCEPTIONS.get(file, set())
        for name in sorted(lengths.keys() - exceptions):
            lines, limit = lengths[name]
            yield f"{file}: {name} has {lines} lines, more than {limit}"
        for name in sorted(exceptions - lengths.keys()):
            yield f"{file}: {name} is short enough; remove it from EXCEPTIONS in tests/tools/limits.py"
    for file in EXCEPTIONS:
        if not (PACKAGE / file).exists():
            yield f"{file} does not exist; remove it from EXCEPTIONS in tests/tools/limits.py"


if __name__ == "__main__":
    lines = list(complaints())
    print(*lines, sep="\n", end="\n" * bool(lines))
    sys.exit(bool(lines))
