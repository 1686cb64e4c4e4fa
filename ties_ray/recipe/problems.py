"""The problems of a recipe in our words: pydantic's errors, the likely key, and the line of the file."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from ties_ray import plugins
from ties_ray.errors import Problem, shown
from ties_ray.methods import Method
from ties_ray.outputs import Output
from ties_ray.recipe.recipe import Allow, Base, Bounds, Coefficients, Json, ModelEntry, Recipe, Run
from ties_ray.recipe.vocabulary import TokenRow, Vocabulary
from ties_ray.stores import store_class

MAX_SHOWN = 200
"""Characters of a wrong value that a message repeats."""
SECTIONS: dict[str, type[BaseModel]] = {
    "base": Base,
    "models": ModelEntry,
    "coefficients": Coefficients,
    "allow": Allow,
    "bounds": Bounds,
    "run": Run,
    "vocabulary": Vocabulary,
}
"""The sections of a recipe whose keys do not depend on a name in it."""
_SYNONYMS = {
    "base_model": "base",
    "merge_method": "method",
    "model": "path",
    "adapters": "models",
    "adapter": "path",
    "out": "output",
    "output_path": "output",
    "out_dtype": "output.dtype",
    "tokenizer_source": "output.files_from",
    "endpoint": "storage.s3.endpoint_url",
    "parameters": "method",
}
"""Keys that other tools use for a key of a recipe."""
_MESSAGES = {
    "too_short": "needs at least {min_length} item",
    "tuple_type": "should be a list, one item a line after `- `",
    "model_type": "should be a mapping of keys",
    "dict_type": "should be a mapping of keys",
    "string_type": "should be a text",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "byte_size": "should be a number of bytes, as 512MiB",
    "byte_size_unit": "should be a number of bytes, as 512MiB",
    "finite_number": "should be a finite number",
}
"""Our words for types of errors whose words in pydantic are those of Python."""


def problems_of(details: Sequence[Any], data: Json) -> list[Problem]:
    """Return pydantic's details of a wrong recipe as problems, one a place.

    data: the recipe as plain data. `where` of a problem is the place in it, as `models.3.weight`.
    """
    problems: dict[str, Problem] = {}
    for detail in details:
        if detail["type"] == "too_short" and detail["input"]:
            continue  # pydantic counts an entry that is wrong as missing too
        problem = _problem(detail, _place(detail, data), data)
        before = problems.get(problem.where)
        if before is None:
            problems[problem.where] = problem
        elif before.what != problem.what:  # a field of several types
            problems[problem.where] = before._replace(what=f"{before.what}; or {problem.what}")
    return list(problems.values())


def located(problem: Problem, text: str, source: str, overrides: Sequence[str]) -> Problem:
    """Return a problem whose `where` begins with the override, or with file and line.

    text: the file's text. source: its name. overrides: `a.b=value` each.
    """
    for override in reversed(overrides):
        key = override.partition("=")[0]
        if problem.where == key or problem.where.startswith(f"{key}."):
            return problem._replace(where=f"--set: {problem.where}".removesuffix(": "))
    line = _line(YAML(typ="safe", pure=True).compose(text), problem.where.split("."))
    place = f"{source}, line {line}" if line else source
    return problem._replace(where=f"{place}: {problem.where}".removesuffix(": "))


def located_input(problem: Problem, text: str, source: str, overrides: Sequence[str]) -> Problem:
    """Return a problem of an input, whose `where` may begin with a place of the recipe, with file and line before it.

    text, source, overrides: as in `located`.
    """
    place, colon, rest = problem.where.partition(":")
    moved = located(problem._replace(where=place), text, source, overrides).where
    is_known = moved.startswith("--set: ") or moved.startswith(f"{source}, line ")
    return problem._replace(where=f"{moved}{colon}{rest}") if is_known else problem


def _line(node: Node | None, steps: Sequence[str]) -> int | None:
    """Return the line, from 1, of the deepest of these keys that the text holds; None where it holds none."""
    line = None
    for step in steps:
        child = None
        if isinstance(node, MappingNode):
            child = next(((key, value) for key, value in node.value if key.value == step), None)
        elif isinstance(node, SequenceNode) and step.isdigit() and int(step) < len(node.value):
            child = node.value[int(step)], node.value[int(step)]
        if child is None:
            break
        line, node = child[0].start_mark.line + 1, child[1]
    return line


def _place(detail: Any, data: Json) -> tuple[int | str, ...]:
    """Return the place of an error, without the steps that name a type that a field may have."""
    place: list[int | str] = []
    value: Any = data
    missing = detail["type"] in ("missing", "extra_forbidden")
    for number, step in enumerate(detail["loc"]):
        inside = (isinstance(value, Mapping) and step in value) or (
            isinstance(value, list | tuple) and isinstance(step, int) and step < len(value)
        )
        last = number + 1 == len(detail["loc"])
        if not inside and not (missing and last) and isinstance(value, str | int | float | list | Mapping) and place:
            continue
        place.append(step)
        value = value[step] if inside else None
    return tuple(place)


def _problem(detail: Any, place: tuple[int | str, ...], data: Json) -> Problem:
    """Return a detail of pydantic's error in our words."""
    where = ".".join(str(step) for step in place)
    if detail["type"] == "extra_forbidden":
        return Problem(where, "unknown key", _likely(place, data))
    if detail["type"] == "missing":
        return Problem(where, "is missing")
    ours = _MESSAGES.get(detail["type"])
    message = ours.format(**detail.get("ctx", {})) if ours else detail["msg"]
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    silent = "Value error" in detail["msg"] or place[:1] == ("storage",)  # a value of `storage` may be a secret
    value = "" if silent else _not_this(detail.get("input"))
    return Problem(where, f"{message[0].lower()}{message[1:]}{value}")


def _not_this(value: object) -> str:
    """Return a wrong value as the end of a message; nothing where it is no scalar."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print a very long one
        return f", not a number of {value.bit_length()} bits"
    if value is None:
        return ", not empty"
    if not isinstance(value, str | int | float):
        return ""
    text = shown(json.dumps(value))
    return f", not {text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + '...'}"


def _likely(place: tuple[int | str, ...], data: Json) -> str:
    """Return a hint at the key that was meant: a synonym, a like one, or one of that name in another section."""
    key, keys = str(place[-1]), _keys_at(place[:-1], data)
    synonym = _SYNONYMS.get(key, "")
    elsewhere = [f"{'.'.join(section)}.{key}" for section in _sections(data) if key in _keys_at(section, data)]
    if synonym.rpartition(".")[2] in keys or "." in synonym:
        close = [synonym.rpartition(".")[2] if synonym.rpartition(".")[2] in keys else synonym]
    else:
        swapped = [other for other in keys if sorted(other) == sorted(key)]
        close = elsewhere[:1] or swapped or difflib.get_close_matches(key, keys, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(keys)}"


def _sections(data: Json) -> Iterator[tuple[str, ...]]:
    """Yield the sections in which a key may belong, those that are used most first."""
    method, output = data.get("method"), data.get("output")
    if isinstance(method, str) or (isinstance(method, Mapping) and method.get("name") in plugins.names("methods")):
        yield ("method",)
    if isinstance(output, str | Mapping):
        yield ("output",)
    yield from (("run",), ("allow",), ("bounds",), ("storage", "s3"))


def _keys_at(place: tuple[int | str, ...], data: Json) -> list[str]:
    """Return the keys that may stand at a place of the recipe."""
    if not place:
        section: type[BaseModel] = Recipe
    elif place[0] == "method":
        section = _section("methods", "name", data["method"], "", Method)
    elif place[0] == "output":
        section = _section("outputs", "kind", data["output"], "checkpoint", Output)
    elif place[0] == "storage":
        section = store_class(str(place[1])).options
    else:
        section = TokenRow if place[:2] == ("vocabulary", "rows") else SECTIONS[str(place[0])]
    return sorted(field.alias or name for name, field in section.model_fields.items())


def _section(folder: str, key: str, value: object, default: str, contract: type[BaseModel]) -> type[BaseModel]:
    """Return the class of a section that names it."""
    name = str(value.get(key, default)) if isinstance(value, Mapping) else default or str(value)
    return plugins.load(folder, name, contract) if name in plugins.names(folder) else contract
