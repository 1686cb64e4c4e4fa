"""Mutants of a module, by the operators of cosmic-ray; for `mutate`. Runs in an environment of its own.

python mutants.py MODULE.py MOST SEED: a JSON line for each mutant; a random sample where there are more than MOST.
"""

import ast
import contextlib
import difflib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator

SWAPS = {
    "Eq": ["NotEq"], "NotEq": ["Eq"], "Lt": ["LtE", "GtE"], "LtE": ["Lt", "Gt"], "Gt": ["GtE", "LtE"],
    "GtE": ["Gt", "Lt"],
}  # fmt: skip
ARITHMETIC = {
    "Add": "Sub", "Sub": "Add", "Mul": "FloorDiv", "Div": "Mul", "FloorDiv": "Mul", "Mod": "Add", "Pow": "Mul",
    "BitOr": "BitAnd", "BitAnd": "BitOr", "BitXor": "BitOr", "LShift": "RShift", "RShift": "LShift",
}  # fmt: skip
PLAIN = (
    "AddNot", "ExceptionReplacer", "NumberReplacer", "RemoveDecorator", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue",
    "ZeroIterationForLoop", "ReplaceUnaryOperator_USub_UAdd", "ReplaceUnaryOperator_Delete_Not",
)  # fmt: skip


class DropStatement(Operator):
    """Replaces a call or an assignment whose value something else may miss by `pass`."""

    def mutation_positions(self, node: Any) -> list[tuple[Any, Any]]:
        dropped = node.type == "simple_stmt" and self._is_dropped(node.children[0])
        return [(node.start_pos, node.end_pos)] if dropped else []

    def _is_dropped(self, node: Any) -> bool:
        if node.type != "expr_stmt":
            return node.type in ("power", "atom_expr", "raise_stmt")
        target, sign = node.children[:2]
        changes = target.type in ("power", "atom_expr") or getattr(sign, "value", "=") != "="
        return changes and ASTQuery(node).get_definition_name() != "__init__"

    def mutate(self, node: Any, index: int) -> Any:
        first = node.get_first_leaf()
        while node.children[1:]:
            node.children.pop(0)
        node.children[0].prefix = f"{first.prefix}pass"
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class DropArgument(Operator):
    """Leaves out an argument that is given by name."""

    def mutation_positions(self, node: Any) -> list[tuple[Any, Any]]:
        return [(node.children[place].start_pos, node.children[place].end_pos) for place in self._places(node)]

    def _places(self, node: Any) -> list[int]:
        children = node.children if node.type == "arglist" else []
        return [n for n, each in enumerate(children) if each.type == "argument" and each.children[0].type == "name"]

    def mutate(self, node: Any, index: int) -> Any:
        place = self._places(node)[index]
        del node.children[max(0, place - 1) : place + 1 + (place == 0)]
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


def operators() -> Iterator[tuple[str, Operator]]:
    """Yield the operators and their names."""
    names = [f"ReplaceComparisonOperator_{old}_{new}" for old, swaps in SWAPS.items() for new in swaps]
    names += [f"ReplaceBinaryOperator_{old}_{new}" for old, new in ARITHMETIC.items()]
    for name in (*PLAIN, *names):
        yield name, plugins.get_operator(f"core/{name}")()
    yield "DropStatement", DropStatement()
    yield "DropArgument", DropArgument()


def ranges_left_out(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what holds no behaviour of its own: annotations, constants of the module, and numbers that index."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant | ast.UnaryOp):
            yield node.slice
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns:
            yield node.returns
    yield from (node for node in tree.body if isinstance(node, ast.Assign))


def mutants(source: str) -> Iterator[dict[str, Any]]:
    """Yield operator, place and definition of each mutant."""
    left_out = [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))  # type: ignore[attr-defined]
        for node in ranges_left_out(ast.parse(source))
    ]
    tree = get_ast(source)
    for name, operator in operators():
        places = ((node, start) for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node))
        for occurrence, (node, start) in enumerate(places):
            if not any(first <= start < last for first, last in left_out):
                definition = ASTQuery(node).get_definition_name() or ""
                yield {"operator": name, "occurrence": occurrence, "line": start[0], "definition": definition}


def change(before: str, after: str) -> str:
    """Return what differs, as `old -> new`."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0))[2:]
    old, new = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return f"{old} -> {new}"


def main() -> None:
    path, most, seed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    source, by_name = path.read_text(), dict(operators())
    every = list(mutants(source))
    drawn = random.Random(f"{seed} {path.name}").sample(every, min(most, len(every)))
    for each in sorted(drawn, key=lambda mutant: mutant["line"]):
        with contextlib.suppress(SyntaxError, AttributeError):  # `*` alone, and names with dots after `except`
            mutated = mutate_code(source, by_name[each["operator"]], each["occurrence"])
            ast.parse(mutated)
            print(json.dumps({**each, "of": len(every), "source": mutated, "change": change(source, mutated)}))


if __name__ == "__main__":
    main()
