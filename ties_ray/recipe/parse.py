"""Reads a recipe: YAML within limits, overrides, and every problem with its place."""

import copy
import itertools
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, Event, ScalarEvent

from ties_ray import plugins
from ties_ray.errors import Problem, RecipeError, holds_secret, shown
from ties_ray.outputs import Output
from ties_ray.recipe.problems import located, problems_of
from ties_ray.recipe.recipe import Json, Recipe
from ties_ray.stores import absolute, hub_uri

MAX_CHARACTERS = 4 * 2**20
"""Characters of a recipe's text: room for 40,000 models, one a line. A table holds more."""
MAX_TEXT = 4096
"""Characters of one text: the longest path that Linux takes.

pydantic parses a size in time that grows with the square of its length.
"""
MAX_VALUES = 500_000
"""Values of a recipe, where an alias counts as all that it stands for."""
MAX_DEPTH = 32
"""Levels of nesting."""
MAX_UNFIT = 8
"""Unfit texts that an error lists."""
SWEEP_KEYS = ("settings", "grid", "controls")
"""The keys of a recipe that make it a sweep (`recipe.settings`)."""
SEARCH_KEY = "search"
"""The key of a recipe that makes it a search (`recipe.search`)."""
_UNFIT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and halves of characters, which JSON can't hold."""


def parse(text: str, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a YAML or JSON text; raise `RecipeError` with every problem and its place.

    overrides: `a.b=value` each, with values in YAML. They are applied to the text's fields first.
    """
    text = text.replace("\t", "  ") if text.lstrip().startswith("{") else text
    data = plain(text, source)
    if not isinstance(data, dict):
        raise RecipeError(Problem(source, "is not a mapping of keys", "start from the example in the README"))
    override(data, overrides)
    try:
        return validate(data)
    except RecipeError as error:
        raise RecipeError(located(problem, text, source, overrides) for problem in error.problems) from None


def override(data: Json, overrides: Sequence[str]) -> None:
    """Set fields of plain data: `a.b=value` each, values in YAML. Raises `RecipeError` where there is no such place."""
    for assignment in overrides:
        _assign(data, assignment)


def validate(data: Json) -> Recipe:
    """Return the recipe of plain data; raise `RecipeError` with every problem and its place (`models.3.weight`)."""
    problems = list(itertools.islice(unfit(data), MAX_UNFIT))
    if key := next((key for key in SWEEP_KEYS if key in data), None):
        problems.append(Problem(key, "makes the recipe a sweep of many merges", "`ties-ray sweep` does them all"))
    if SEARCH_KEY in data:
        problems.append(
            Problem(SEARCH_KEY, "makes the recipe a search for the best merge", "`ties-ray search` does it")
        )
    if problems:
        raise RecipeError(problems)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = problems_of(error.errors(include_url=False), data)
        raise RecipeError(problems + list(_missing_base(data, problems))) from None


def with_absolute_paths(asked: Json) -> Json:
    """Return a recipe in JSON that means the same in every working directory of this machine."""
    moved = copy.deepcopy(asked)
    if isinstance(moved.get("base"), str):
        moved["base"] = absolute(hub_uri(moved["base"]))
    keys = (
        ("base", "path"),
        ("output", "path"),
        ("run", "pool_cache"),
        ("run", "disk_folder"),
        ("coefficients", "file"),
    )
    places = [(moved.get(section), key) for section, key in keys]
    places += [(entry, key) for entry in moved["models"] for key in ("path", "table", "run", "adapter")]
    places += [(moved, "continues")]
    companions = [entry["with"] for entry in moved["models"] if isinstance(entry, dict) and entry.get("with")]
    places += [(beside, name) for beside in companions for name in beside if not beside[name].startswith("{")]
    for section, key in places:
        if isinstance(section, dict) and section.get(key):
            section[key] = absolute(hub_uri(section[key]))
    _move_references(moved)
    return moved


def _move_references(moved: Json) -> None:
    """Make the paths absolute by which a recipe names an input that it lists; an id stays as it is."""
    base = moved.get("base")
    listed = [base.get("path") if isinstance(base, dict) else base]
    listed += [entry.get("path") if isinstance(entry, dict) else absolute(entry) for entry in moved["models"]]
    vocabulary = moved.get("vocabulary")
    places = [(moved["output"], "files_from")]
    if isinstance(vocabulary, dict):
        places += [(vocabulary, "tokens"), *((row, "from") for row in (vocabulary.get("rows") or {}).values())]
    for section, key in places:
        path = absolute(hub_uri(str(section.get(key) or ""))).rstrip("/") if isinstance(section, dict) else ""
        if path in {str(uri).rstrip("/") for uri in listed if uri}:
            section[key] = path


def _missing_base(data: Json, problems: Sequence[Problem]) -> Iterator[Problem]:
    """Yield that the base is missing; pydantic checks it only where all fields are right."""
    output = data.get("output")
    kind = output.get("kind", "checkpoint") if isinstance(output, Mapping) else "checkpoint"
    if "base" in data or any("`base` is missing" in problem.what for problem in problems):
        return
    if kind not in plugins.names("outputs") or plugins.load("outputs", kind, Output).reads_base:
        yield Problem("base", "is missing", f"an output of kind {kind} holds it")


# -- text


def plain(text: str, source: str) -> Any:
    """Return the plain data of a YAML text; raise `RecipeError` for any text that is wrong or too large."""
    try:
        excess = f"has {len(text):,} characters" if len(text) > MAX_CHARACTERS else _excess(text)
        if excess is None:
            return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise RecipeError(_syntax(error, source)) from None
    except ValueError as error:  # such as the date 2026-13-01
        raise RecipeError(Problem(source, f"holds a value that can't be read: {error}", "put it in quotes")) from None
    limits = f"at most {MAX_CHARACTERS:,} characters ({MAX_TEXT:,} in one text), {MAX_VALUES:,} values,"
    limits += f" {MAX_DEPTH} levels, and no tags"
    raise RecipeError(Problem(source, excess, f"a recipe has {limits}; put a long list of models into a table"))


def _excess(text: str) -> str | None:
    """Return the first limit that a YAML text exceeds; None if it exceeds none."""
    meter = _Meter()
    return next(filter(None, map(meter.add, YAML(typ="safe", pure=True).parse(text))), None)


class _Meter:
    """Measures the data that the events of a YAML text would build, without building them."""

    def __init__(self) -> None:
        self._count = 0
        self._by_anchor: dict[str, int] = {}
        """Values that an alias of each anchor stands for."""
        self._open: list[tuple[str | None, int]] = []
        """The anchor of each collection that has not ended, and the count at its start."""

    def add(self, event: Event) -> str | None:
        """Count an event; return the limit that is exceeded by it, if any."""
        problem = None
        if isinstance(event, AliasEvent):
            self._count += self._by_anchor.get(event.anchor, 0)
        elif isinstance(event, ScalarEvent | CollectionStartEvent):
            problem = self._start(event)
        elif isinstance(event, CollectionEndEvent):
            self._end()
        if problem is None and self._count > MAX_VALUES:
            return f"stands for more than {MAX_VALUES:,} values"
        if problem is None and len(self._open) > MAX_DEPTH:
            return f"is nested more than {MAX_DEPTH} levels deep"
        return problem

    def _start(self, event: ScalarEvent | CollectionStartEvent) -> str | None:
        if isinstance(event, ScalarEvent) and len(event.value) > MAX_TEXT:
            return f"holds a text of {len(event.value):,} characters"
        if event.tag is not None:
            return f"holds the tag {event.tag[:80]}"
        if event.anchor in self._by_anchor:
            return f"has the anchor {event.anchor[:80]} twice"
        self._count += 1
        if event.anchor:  # a collection that holds an alias of itself exceeds every limit
            self._by_anchor[event.anchor] = 1 if isinstance(event, ScalarEvent) else MAX_VALUES
        if isinstance(event, CollectionStartEvent):
            self._open.append((event.anchor, self._count))
        return None

    def _end(self) -> None:
        anchor, count_at_start = self._open.pop()
        if anchor:
            self._by_anchor[anchor] = self._count - count_at_start + 1


def _syntax(error: YAMLError, source: str) -> Problem:
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return Problem(source, f"is neither YAML nor JSON: {error}")
    where = f"{source}, line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return Problem(where, " ".join(str(error.problem).split()), "mend the YAML")


def _assign(data: Json, assignment: str) -> None:
    """Set the field of plain data that `a.b=value` names."""
    path, separator, text = assignment.partition("=")
    if not separator or not path:
        raise RecipeError(
            Problem("--set", f"{shown(path)!r} is not of the form field=value", "as in method.density=0.3")
        )
    assign(data, path, plain(text, "--set"), "--set")


def assign(data: Json, path: str, value: Any, where: str) -> None:
    """Set the field of plain data that `a.b` names. Raises `RecipeError` where there is no such place.

    where: who asks for it, for the message.
    """
    *parents, last = path.split(".")
    target: Any = data
    try:
        for step in parents:
            key: Any = int(step) if isinstance(target, list) else step
            if isinstance(target, dict):
                target.setdefault(key, {})
            if isinstance(target[key], str):  # `method: ties` is short for `method: {name: ties}`
                target[key] = {{"method": "name"}.get(step, "path"): target[key]}
            target = target[key]
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value
    except (ValueError, IndexError, AttributeError, TypeError):
        raise RecipeError(Problem(where, f"the recipe has no place {path!r}, or its value can't be read")) from None


# -- values


def unfit(data: object) -> Iterator[Problem]:
    """Yield a problem for each text, keys included, that can't be a path or a name, or is a URL that holds a secret."""
    left: list[tuple[str, object]] = [("", data)]
    while left:
        place, value = left.pop()
        if isinstance(value, str):
            yield from _unfit_text(place, value)
        elif isinstance(value, Mapping):
            left += [(place, key) for key in value]
            left += [(f"{place}.{key}".removeprefix("."), item) for key, item in value.items() if isinstance(key, str)]
        elif isinstance(value, list | tuple):
            left += [(f"{place}.{number}", item) for number, item in enumerate(value)]


def _unfit_text(place: str, value: str) -> Iterator[Problem]:
    if len(value) > MAX_TEXT:
        yield Problem(place, f"has {len(value):,} characters", f"at most {MAX_TEXT:,} are a path or a name")
    elif _UNFIT.search(value):
        yield Problem(place, f"{reprlib.repr(value)} holds a control character or half a character")
    elif holds_secret(value):
        message = "is a URL with a password or a signature in it, which would be written into plan, result and card"
        yield Problem(place, message, "give the plain URL; credentials come from the environment, a profile or a role")
