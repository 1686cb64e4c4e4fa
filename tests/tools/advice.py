"""All remedies that the code can print, found in its text; `{}` stands for what is put in."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import ties_ray
from ties_ray.formats import lora
from ties_ray.inputs import other_tools, unrecognised
from ties_ray.libraries import downloads
from ties_ray.stores import _s3_errors

PACKAGE = Path(ties_ray.__file__).parent
NOT_PRINTED = PACKAGE / "testing"
"""What users of the package test with: no command prints it."""
ADVISING = frozenset({
    "_likely", "_one_sided", "refused_dtypes", "_check_base", "_check_layout", "_check_tables", "_check_numbers",
    "_check_shapes",
    "_quantised", "_refused", "_permission", "_lasting",
    "_of_client", "_s3_remedy", "mistaken", "_plain", "_wrong_address", "_environment", "exclusion",
})  # fmt: skip
"""Functions that return or yield a remedy, or (what, remedy), or add it to a list."""
SHORTEST = 8
"""Characters of a text that is advice and not a part of it."""

Known = Mapping[str, list[ast.expr]]


def printed() -> Iterator[str]:
    """Yield every remedy, some more than once."""
    tables = [remedy for _, remedy in lora.REASONS.values()]
    tables += [tool.remedy for tool in other_tools._TOOLS]
    tables += [remedy for _, remedy in (*unrecognised.OTHER_FORMATS.values(), *unrecognised.TRAINING_STATES.values())]
    tables += [remedy for _, _, remedy in (*downloads._POINTERS, *downloads._MAGIC)]
    yield from (*tables, *_s3_errors._REMEDIES.values())
    for path in sorted(PACKAGE.rglob("*.py")):
        if NOT_PRINTED not in path.parents:
            yield from (text for text in _of_file(ast.parse(path.read_text())) if len(text) >= SHORTEST)


def _of_file(tree: ast.Module) -> Iterator[str]:
    constants = _assigned(tree.body)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            known = {**constants, **_assigned(list(ast.walk(function)))}
            for node in ast.walk(function):
                for advice in _advice(node, advising=function.name in ADVISING):
                    yield from _texts(advice, dict(known))


def _assigned(nodes: "list[ast.AST] | list[ast.stmt]") -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets if isinstance(value, ast.expr) else []:
            if isinstance(target, ast.Name):
                found.setdefault(target.id, []).append(value)
    return found


def _advice(node: ast.AST, *, advising: bool) -> Iterator[ast.expr]:
    """Yield the expressions of a node that are a remedy."""
    match node:
        case ast.Call(func=ast.Name(id="Problem"), args=[_, what, remedy, *_]) if not isinstance(what, ast.Starred):
            yield remedy
        case ast.Return(value=ast.expr() as value) | ast.Yield(value=ast.expr() as value) if advising:
            yield value.elts[-1] if isinstance(value, ast.Tuple) else value
        case ast.Call(func=ast.Attribute(attr="append"), args=[ast.Tuple(elts=[_, remedy])]) if advising:
            yield remedy
        case ast.ListComp(elt=ast.Tuple(elts=[_, remedy])) if advising:
            yield remedy


def _texts(node: ast.expr, known: dict[str, list[ast.expr]]) -> Iterator[str]:
    """Yield every text that an expression may come to; known: what names stand for, each followed once."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=values):
            yield "".join(str(one.value) if isinstance(one, ast.Constant) else "{}" for one in values)
            for one in values:
                if isinstance(one, ast.FormattedValue):
                    yield from _texts(one.value, known)
        case ast.IfExp(body=one, orelse=other) | ast.BinOp(left=one, right=other):
            yield from _texts(one, known)
            yield from _texts(other, known)
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.BoolOp(values=elements):
            for one in elements:
                yield from _texts(one, known)
        case ast.Call(func=func, args=arguments):
            for one in (*([func.value] if isinstance(func, ast.Attribute) else []), *arguments):
                yield from _texts(one, known)
        case ast.Name(id=name):
            for value in known.pop(name, []):
                yield from _texts(value, known)
