"""Parameter values of a mergekit configuration: numbers, gradients and filters, looked up scope by scope.

A value is a scalar, a list of scalars that is spread over the layers of its slice, or a list of `{filter, value}`. Of
these the first counts whose filter is a part of the tensor's name. Where none does, the next wider scope is asked.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ties_ray.errors import Problem, RecipeError
from ties_ray.recipe.parse import plain
from ties_ray.recipe.problems import located

Path = tuple[str | int, ...]
"""The keys and positions that lead to a value."""
Value = float | list[float]
"""A number, or a gradient over the layers."""
Coefficient = Value | dict[str, Value]
"""What a recipe takes for a number that may differ by parameter."""
_ARCHITECTURE = ("names of tensors decide in ties_ray", "leave it out")
MOST_KEYS = 12
"""Keys that a message lists."""


class Case(NamedTuple):
    """A value for the tensors whose names hold a text."""

    filter: str
    """Empty for all tensors."""
    value: tuple[float, ...]


class Block(NamedTuple):
    """Layers [start, stop) of the output, with what `slices` says of them; `models` make one block of all layers."""

    path: Path
    start: int
    stop: int | None
    """None where the block has all layers of the models."""


class Document:
    """The data of a configuration, with the places of its values, and what is wrong with it."""

    def __init__(self, text: str, source: str) -> None:
        data = plain(text, source)
        self.data: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
        self._text = text
        self._source = source
        self.problems: list[Problem] = []
        """Problems whose `where` is a place in the data."""

    def at(self, path: Path) -> Any:
        """Return the value at a path, None where there is none."""
        value: Any = self.data
        for step in path:
            if isinstance(value, Mapping):
                value = value.get(step)
            elif isinstance(value, list) and isinstance(step, int):
                value = value[step]
            else:
                return None
        return value

    def wrong(self, path: Path, message: str, remedy: str = "") -> None:
        """Note a problem."""
        self.problems.append(Problem(".".join(map(str, path)), message, remedy))

    def raise_problems(self) -> None:
        """Raise `RecipeError` with all problems, if there are any."""
        if self.problems:
            raise RecipeError(located(problem, self._text, self._source, ()) for problem in self.problems)

    def check_keys(
        self, path: Path, allowed: Sequence[str], others: Mapping[str, tuple[str, str]] | None = None
    ) -> None:
        """Note each key that is not known. others: what is wrong with some of them, and the remedy.

        mergekit ignores all other keys without a word.
        """
        value = self.at(path)
        if not isinstance(value, Mapping):
            if value is not None:
                self.wrong(path, "is not a mapping of keys", "mend the YAML")
            return
        for key in value:
            if key not in allowed:
                remedy = f"known here: {', '.join(sorted(allowed)[:MOST_KEYS])}"
                self.wrong((*path, key), *(others or {}).get(str(key), ("mergekit ignores this key", remedy)))


class Reference(NamedTuple):
    """A model as mergekit names it: `path@revision+adapter`."""

    path: str
    adapter: str | None

    @classmethod
    def of(cls, document: Document, place: Path, value: Any) -> "Reference":
        """Return the model of a text or a mapping."""
        if isinstance(value, Mapping):
            document.check_keys(place, ("model", "lora"), {"override_architecture": _ARCHITECTURE})
            parts = [_path_of(value.get(key)) for key in ("model", "lora")]
        else:
            parts = [*str(value).split("+"), None][:2] if str(value).count("+") < 2 else [None, None]
        if not parts[0] or (parts[0] or "").count("@") > 1:
            document.wrong(place, f"{value!r} names no model", "write PATH, PATH@REVISION or PATH+ADAPTER")
        return cls(parts[0] or "", parts[1])


def _path_of(value: Any) -> str | None:
    if isinstance(value, Mapping):
        revision = value.get("revision")
        return f"{value.get('path', '')}" + (f"@{revision}" if revision else "")
    return None if value is None else str(value)


class Settings:
    """Looks up parameters: first where a source of a block says them, then its block, then the whole document."""

    def __init__(self, document: Document, blocks: Sequence[Block], stack: str, before: Sequence[str]) -> None:
        """stack: name of the module that holds the layers. before: patterns of parameters before the first one."""
        self._document = document
        self._blocks = blocks
        self._stack = stack
        self._before = before

    def coefficient(self, name: str, sources: Sequence[Path] | None, default: float | None) -> Coefficient:
        """Return a number by parameter. sources: of each block, where the model in question stands in it.

        default: None where mergekit demands the parameter.
        """
        by_block = []
        for number, block in enumerate(self._blocks):
            cases = list(self._cases(name, block, sources[number] if sources else None))
            if not cases or cases[-1].filter:
                if default is None:
                    place = sources[number] if sources else ()
                    self._document.wrong(place, f"has no {name} for some tensors", f"add a {name} for all of them")
                cases.append(Case("", (1.0 if default is None else float(default),)))
            by_block.append(cases)
        if all(cases == by_block[0] for cases in by_block) and (
            len(by_block) == 1 or all(len(case.value) == 1 for case in by_block[0])
        ):
            return _coefficient((pattern_of(filter_), _value(value)) for filter_, value in by_block[0])
        return _coefficient(self._by_layer(name, by_block))

    def flag(self, name: str, default: bool) -> bool:
        """Return a shared switch, which must be the same everywhere."""
        value = self.constant(name, None, float(default))
        if value not in (0.0, 1.0):
            self._document.wrong(("parameters", name), f"is {value:g}, not true or false", "write true or false")
        return value == 1.0

    def constant(self, name: str, sources: Sequence[Sequence[Path]] | None, default: float) -> float:
        """Return a number that may differ neither by tensor nor by model. sources: those of each model."""
        each_model: Sequence[Sequence[Path] | None] = sources or [None]
        values = [self.coefficient(name, places, default) for places in each_model]
        if any(not isinstance(value, float) or value != values[0] for value in values):
            message = "differs by layer, tensor or model, and ties_ray takes one number for all"
            self._document.wrong(self._place(name, sources), f"{name} {message}", f"give one {name}")
            return default
        assert isinstance(values[0], float)
        return values[0]

    def _place(self, name: str, sources: Sequence[Sequence[Path]] | None) -> Path:
        places: list[Path] = [("parameters", name)]
        places += [(*source, "parameters", name) for each in sources or () for source in each]
        return next((place for place in places if self._document.at(place) is not None), ("parameters",))

    def _cases(self, name: str, block: Block, source: Path | None) -> Iterator[Case]:
        """Yield the cases of all scopes in order, up to the first that is for all tensors."""
        scopes = [source] if source is not None else []
        for scope in dict.fromkeys((*scopes, block.path, ())):
            path = (*scope, "parameters", name)
            setting = self._document.at(path)
            for case in self._of_setting(path, setting) if setting is not None else ():
                yield case
                if not case.filter:
                    return

    def _of_setting(self, path: Path, setting: Any) -> Iterator[Case]:
        document = self._document
        conditional = [setting] if isinstance(setting, Mapping) else setting
        if not isinstance(conditional, list) or not any(isinstance(item, Mapping) for item in conditional):
            yield Case("", self._numbers(path, setting))
            return
        for number, item in enumerate(conditional):
            place = path if isinstance(setting, Mapping) else (*path, number)
            if not isinstance(item, Mapping) or "value" not in item:
                document.wrong(place, "is not of the form {filter: TEXT, value: NUMBER}", "mend this entry")
                continue
            document.check_keys(place, ("filter", "value"))
            filter_ = item.get("filter")
            text = "" if filter_ in (None, "*") else str(filter_)
            yield Case(text, self._numbers((*place, "value"), item["value"]))

    def _numbers(self, path: Path, value: Any) -> tuple[float, ...]:
        """Return a scalar or a gradient as numbers; texts such as 1e-3, which YAML 1.1 takes for no number, count."""
        numbers = []
        for item in value if isinstance(value, list) else [value]:
            try:
                numbers.append(float(item))
            except (TypeError, ValueError):
                numbers.append(math.nan)
        if not numbers or not all(map(math.isfinite, numbers)):
            self._document.wrong(path, "is neither a number nor a list of numbers", "give a number")
            return (1.0,)
        return tuple(numbers) if len(set(numbers)) > 1 else (numbers[0],)

    def _by_layer(self, name: str, by_block: Sequence[Sequence[Case]]) -> Iterator[tuple[str, Value]]:
        """Yield patterns and numbers, layer by layer, then for what lies before and after the layers."""
        for block, cases in zip(self._blocks, by_block, strict=True):
            assert block.stop is not None
            for layer in range(block.start, block.stop):
                last = block.stop - block.start - 1
                depth = (layer - block.start) / last if last else 1.0
                for filter_, value in cases:
                    if any(char in "0123456789." for char in filter_):
                        message = f"the filter {filter_!r} of {name} names layers, and so do the slices"
                        self._document.wrong(block.path, message, "leave one of them out")
                    yield f"*{self._stack}.{layer}.{pattern_of(filter_)}", at_depth(value, depth)
        before, after = ([(pattern_of(filter_), value[0]) for filter_, value in by_block[at]] for at in (0, -1))
        if before != after and len(before) + len(after) > 2:
            message = f"{name} has filters, and differs between the first slice and the last"
            self._document.wrong(("slices",), message, f"give both slices the same filters of {name}")
        if before != after:
            yield from ((pattern, before[0][1]) for pattern in self._before)
        yield from after


def at_depth(values: Sequence[float], depth: float) -> float:
    """Return the number of a gradient at a depth from 0 to 1."""
    place = depth * (len(values) - 1)
    first = int(place)
    share = place - first
    return (1 - share) * values[first] + share * values[min(first + 1, len(values) - 1)]


def pattern_of(filter_: str) -> str:
    """Return the pattern that matches the names which hold a text."""
    quoted = "".join(f"[{char}]" if char in "*?[" else char for char in filter_)
    return f"*{quoted}*" if quoted else "*"


def _value(numbers: Sequence[float]) -> Value:
    return numbers[0] if len(numbers) == 1 else list(numbers)


def _coefficient(lines: Iterable[tuple[str, Value]]) -> Coefficient:
    """Return the shortest form of a table whose first match counts; its last line is for all."""
    table: dict[str, Value] = {}
    for pattern, value in lines:
        table.setdefault(pattern, value)
        if pattern == "*":
            break
    return table["*"] if len(table) == 1 else table
