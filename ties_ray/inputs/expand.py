"""The folders that a recipe means: globs, tables, runs and plain paths become a list of models, in recipe order."""

import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError

from ties_ray.errors import InputError, Problem, RecipeError, printable
from ties_ray.inputs.tables import Table, read_table
from ties_ray.inputs.windows import picked, steps_of
from ties_ray.recipe.coefficients import Rules, number_of, place_of, rules_of
from ties_ray.recipe.recipe import ModelEntry, Recipe
from ties_ray.recipe.schedules import weights_of
from ties_ray.stores import Stores, leads_from, scheme_of, shown

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
"""Endings of files that hold weights, also in formats that are refused later."""
MODELS = Table(("path", "weight", "density", "file", "variant"), ("path",), "model")
"""A table of models."""
BASE = "base"
"""The base's id."""


@dataclass(frozen=True)
class Entry:
    """One model of the expanded list, or the base."""

    place: str
    """Its place in the recipe, for messages: `models.3`."""
    uri: str
    id: str = ""
    """The recipe's id; the complete list has one for every entry."""
    weight: float = 1.0
    density: float | None = None
    weights: Rules = ()
    """Weights by parameter; `weight` holds where no line matches."""
    densities: Rules = ()
    """Densities by parameter; `density` holds where no line matches."""
    companions: Mapping[str, str] = field(default_factory=dict)
    """Folders of further tensors by name."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    version_id: Mapping[str, str] = field(default_factory=dict)
    settle: float = 0.0
    """The least age of its newest file, in seconds."""
    file: str | None = None
    variant: str | None = None
    """The variant of several models in the folder, as the recipe names it."""
    adapter: str = ""
    """URI of an adapter that is added to it."""
    of_glob: bool = False
    """Whether a glob found it."""

    @property
    def of_adapter(self) -> "Entry":
        """Return the adapter as an input of its own, whose id no recipe can give."""
        return Entry(f"{self.place}.adapter", self.adapter, f"{self.id}\0adapter")


class Expanded(NamedTuple):
    """The inputs that a recipe means."""

    entries: tuple[Entry, ...]
    """The base, if there is one, then the models, each with an id."""
    notes: tuple[str, ...]
    waiting: tuple[str, ...]
    """Folders that wait for a later merge, each with the reason."""


def expand(recipe: Recipe, stores: Stores, threads: Executor, first: int = 0) -> Expanded:
    """Return the inputs of a recipe; a glob costs a listing a folder, `settle` two more a model.

    first: the id of the first model if it has none of its own.
    Raises `RecipeError` for what the recipe contradicts, `InputError` for what is not there, with every problem.
    """
    entries: list[Entry] = []
    notes: list[str] = []
    wrong: list[Problem] = []
    missing: list[Problem] = []
    waiting: list[str] = []
    for number, asked in enumerate(recipe.models):
        place = f"models.{number}"
        try:
            models = _settled(list(entries_of(asked, place, stores, threads, notes)), stores, threads, waiting)
            models = models if asked.run is None else _window(asked, place, models, notes)
        except RecipeError as error:
            wrong += error.problems
        except InputError as error:
            missing += error.problems
        else:
            entries += models
            if len(models) < (asked.at_least or 0):
                path = asked.path or asked.table or asked.run
                message = f"{path} yields {len(models)} models, at_least is {asked.at_least}"
                missing.append(Problem(place, message, "look for models that were not written"))
    base = []
    if recipe.base:
        uri = recipe.base.path.rstrip("/") or "/"
        base.append(Entry(BASE, uri, BASE, file=recipe.base.file, variant=recipe.base.variant))
    elif recipe.first_is_base and entries:
        model = entries[0]
        base.append(Entry(BASE, model.uri, BASE, file=model.file, variant=model.variant))
        notes.append(f"no base is named, and none is needed: {model.uri} takes its place, and is merged too")
    everything = [*([] if recipe.first_is_base else base), *entries]
    wrong += [*_repeated(everything), *overlapping(recipe.output.path, everything)]
    named = [*base, *(replace(entry, id=entry.id or str(position)) for position, entry in enumerate(entries, first))]
    wrong += [
        Problem("models", f"{count} models have the id {name!r}", "give each its own; by default it is the position")
        for name, count in Counter(entry.id for entry in named).items()
        if count > 1
    ]
    if wrong:
        raise RecipeError(wrong + missing)
    if missing:
        raise InputError(missing)
    return Expanded(tuple(named), tuple(notes), tuple(waiting))


def overlaps(folder: str, other: str) -> bool:
    """Return whether two folders are the same or one lies in the other (links of a local path followed)."""
    first, second = _real(folder) + "/", _real(other) + "/"
    return first.startswith(second) or second.startswith(first)


def _real(uri: str) -> str:
    if scheme_of(uri) == "local":
        return os.path.realpath(uri.removeprefix("file://")).rstrip("/")
    return uri.rstrip("/")


def entries_of(asked: ModelEntry, place: str, stores: Stores, threads: Executor, notes: list[str]) -> Iterator[Entry]:
    """Yield the models that one line of `models` means; remarks for the reader are added to `notes`.

    Of a run these are all checkpoints between `from` and `to`.
    """
    if asked.run is not None:
        steps = steps_of(asked, place, stores, notes)
        uris = [step.uri for step in steps if asked.links or not _is_link(step.uri)]
        yield from (replace(_with_numbers(asked, place, uri), settle=asked.settle) for uri in uris)
        return
    if asked.table is not None:
        rows = _table(asked, place, stores)
        gone = _left_out([entry.uri for entry in rows], asked.not_)
        yield from (entry for entry in rows if entry.uri not in gone)
        return
    path = asked.path or ""
    model = _with_numbers(asked, place, path.rstrip("/") or "/")
    if not asked.is_glob or _exists(path, stores):
        model = replace(model, adapter=(asked.adapter or "").rstrip("/"), settle=asked.settle)
        yield replace(model, id=asked.id or "", sha256=asked.sha256, version_id=asked.version_id)
        return
    matched, checkpoints = _match(path, place, stores, threads)
    if checkpoints:
        notes.append(
            f"{path}: {len(checkpoints)} checkpoint-* folders are not taken as models unless the glob names them"
        )
    links = [uri for uri in matched if _is_link(uri)]
    gone = _left_out(matched, asked.not_) | (set() if asked.links else set(links))
    folders = [uri for uri in matched if uri not in gone]
    if not folders:
        message = f"no folder matches {path}"
        if matched:
            message = f"`not` and `links` leave out all {len(matched)} matches of {path}"
        hint = f"name them: {path.rstrip('/')}/checkpoint-*" if checkpoints else "check the path and its permissions"
        if "[" in path and not matched:
            hint += "; `[` begins a set of characters: `glob: false` or `[[]` takes it as it is"
        raise InputError(Problem(place, message, hint))
    if followed := [f"{_last(uri)} to {_real(uri)}" for uri in folders if uri in links]:
        notes.append(f"{path}: {len(followed)} folders are links ({_few(followed)}); `links: false` leaves them out")
    for uri in folders:
        yield replace(model, uri=uri, settle=asked.settle, of_glob=True)


def _window(asked: ModelEntry, place: str, models: Sequence[Entry], notes: list[str]) -> list[Entry]:
    """Return the checkpoints of a run that the recipe asks for, in the order of their steps."""
    window = [models[number] for number in picked(asked, place, len(models))]
    notes.append(f"{asked.run}: {len(window)} checkpoints are merged, from {window[0].uri} to {window[-1].uri}")
    if asked.schedule is None:
        return window
    if isinstance(asked.schedule, tuple) and len(asked.schedule) != len(window):
        message = f"`schedule` has {len(asked.schedule)} coefficients, and the window {len(window)} checkpoints"
        raise RecipeError(Problem(place, message, f"`last: {len(asked.schedule)}` takes as many, or add coefficients"))
    shares = weights_of(asked.schedule, len(window))
    return [replace(entry, weight=entry.weight * share) for entry, share in zip(window, shares, strict=True)]


def _with_numbers(asked: ModelEntry, place: str, uri: str) -> Entry:
    return replace(_numbers(Entry(place, uri), asked), file=asked.file, variant=asked.variant)


def _numbers(entry: Entry, asked: ModelEntry) -> Entry:
    """Return an entry with the weight, the density and the companions that the recipe asks for."""
    weight, density = number_of(asked.weight), number_of(asked.density)
    entry = replace(entry, weight=1.0 if weight is None else weight, density=density, companions=asked.with_)
    return replace(entry, weights=rules_of(asked.weight), densities=rules_of(asked.density))


def numbered(entries: Sequence[Entry], recipe: Recipe) -> list[Entry]:
    """Return the entries with the weights and densities of those lines of a recipe that name them by id."""
    lines = {asked.id: asked for asked in recipe.models if asked.id and asked.path and not asked.is_glob}
    return [_numbers(entry, lines[entry.id]) if entry.id in lines else entry for entry in entries]


def _few(texts: Sequence[str]) -> str:
    return ", ".join(map(printable, texts[:4])) + ", ..." * (len(texts) > 4)


def _exists(path: str, stores: Stores) -> bool:
    """Return whether there is a folder of exactly that path, whatever its characters mean in a pattern."""
    try:
        listing = stores.of(path).list(path.rstrip("/") or "/")
    except InputError:  # a local file, or a folder whose links lead out: reading it says so
        return scheme_of(path) == "local"
    return bool(listing.files or listing.folders)


def _is_link(uri: str) -> bool:
    return scheme_of(uri) == "local" and os.path.islink(uri.removeprefix("file://"))


def _settled(entries: Sequence[Entry], stores: Stores, threads: Executor, waiting: list[str]) -> list[Entry]:
    """Return the entries whose folders hold weights and are old enough; add the others to `waiting`."""

    def look(entry: Entry) -> str:
        if not entry.settle:
            return ""
        store = stores.of(entry.uri)
        if not any(pin.uri.endswith(WEIGHTS) for pin in store.list(entry.uri).files):
            return "it has no weights yet"
        newest = store.newest(entry.uri)
        age = math.inf if newest is None else time.time() - newest
        return f"its newest file is {age:.0f} s old, settle is {entry.settle:g} s" if age < entry.settle else ""

    why = list(threads.map(look, entries))
    waiting += [f"{entry.uri}: {reason}" for entry, reason in zip(entries, why, strict=True) if reason]
    left = [entry for entry, reason in zip(entries, why, strict=True) if not reason]
    if entries and not left:
        raise InputError(Problem(entries[0].place, f"all {len(entries)} models wait: {waiting[-1]}", "merge later"))
    return left


def _is_glob(path: str) -> bool:
    return any(char in path for char in "*?[")


def _match(path: str, place: str, stores: Stores, threads: Executor) -> tuple[list[str], list[str]]:
    """Return (the folders that match, sorted by the bytes of their URIs, the `checkpoint-*` folders among them)."""
    scheme, separator, rest = path.partition("://") if "://" in path else ("", "", path)
    segments = rest.rstrip("/").split("/")
    first = next(index for index, segment in enumerate(segments) if _is_glob(segment))
    if "**" in segments:
        raise RecipeError(Problem(place, f"`**` in {path} is not supported", "write one `*` for each level of folders"))
    if separator and scheme != "file" and first == 0:
        raise RecipeError(Problem(place, f"{path} has a glob for the bucket", "name the bucket"))
    level = [scheme + separator + "/".join(segments[:first]) or ("/" if path.startswith("/") else ".")]
    passed_over: list[str] = []
    for segment in segments[first:]:
        below = [uri for folders in threads.map(lambda uri: stores.of(uri).folders(uri), level) for uri in folders]
        matched = [uri for uri in below if fnmatchcase(_last(uri), segment)]
        matched = [uri for uri in matched if segment.startswith(".") or not _last(uri).startswith(".")]
        # A trainer leaves its intermediate states beside the model, in folders that look like models.
        states = [uri for uri in matched if _last(uri).startswith("checkpoint-") and "checkpoint" not in segment]
        passed_over += states
        level = [uri for uri in matched if uri not in states]
    return sorted(level), passed_over  # code points sort as their UTF-8 bytes do


def _left_out(uris: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Return the paths that a pattern matches, as a whole or by their last segments.

    A pattern that equals a path, or its last segments, means that path alone.
    """
    gone: set[str] = set()
    for pattern in (pattern.rstrip("/") for pattern in patterns):
        ends = {uri: "/".join(uri.split("/")[-pattern.count("/") - 1 :]) for uri in uris}
        exact = {uri for uri, end in ends.items() if pattern in (uri, end)}
        gone |= exact or {uri for uri, end in ends.items() if fnmatchcase(uri, pattern) or fnmatchcase(end, pattern)}
    return gone


def _plain(path: str, stores: Stores) -> str | None:
    """Return the folder that a path with `*`, `?` or `[` means, literally or by quotes; None for a pattern."""
    quoted = re.sub(r"\[([][*?])\]", r"\1", path)
    rest = re.sub(r"\[[][*?]\]", "", path)
    return path if _exists(path, stores) else None if any(char in rest for char in "*?[") else quoted


def _table(asked: ModelEntry, place: str, stores: Stores) -> list[Entry]:
    """Return the models of a table; raise `InputError` with all that is wrong with its rows."""

    def entry(row: str, cells: Mapping[str, str]) -> Entry:
        return _entry_of_row(asked, row, cells, stores)

    return read_table(asked.table or "", place, MODELS, stores, entry)


def _entry_of_row(asked: ModelEntry, place: str, cells: Mapping[str, str], stores: Stores) -> Entry:
    """Return the model of one row; raise `InputError` where the row is wrong."""
    shared = {"weight": asked.weight, "density": asked.density, "file": asked.file, "variant": asked.variant}
    try:
        model = ModelEntry.model_validate({**shared, **cells})
    except ValidationError as error:
        raise InputError(Problem(place, _message(item)) for item in error.errors(include_url=False)) from None
    path = (model.path or "").rstrip("/") or "/"
    if not leads_from(asked.table or "", path):
        scheme = scheme_of(asked.table or "")
        message = f"names {shown(path)}, and a table of {scheme}:// may only name what lies there too"
        raise InputError(Problem(place, message, "write that model into the recipe"))
    folder = _plain(path, stores) if model.is_glob else path
    if folder is None:
        raise InputError(Problem(place, "has a glob as its path", "write one folder a row; `[[]` stands for `[`"))
    entry = _numbers(Entry(place, folder, settle=asked.settle), model)
    return replace(entry, file=model.file, variant=model.variant)


def _repeated(entries: Sequence[Entry]) -> Iterator[Problem]:
    first: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        other = first.setdefault((_real(entry.uri), _real(entry.adapter) if entry.adapter else ""), entry)
        if other is not entry and not (entry.id and other.id):
            remedy = "give each an `id` if this is meant" if other.id != BASE else "leave it out: its change is zero"
            if not entry.id and other.place == entry.place:  # of one glob: one is a link to the other
                remedy = f"leave one out: `links: false`, or `not: [{_last(entry.uri)}]`"
            yield Problem(entry.place, f"{entry.uri} stands in the recipe twice, first as {other.place}", remedy)


def overlapping(output: str, entries: Sequence[Entry]) -> Iterator[Problem]:
    """Yield a problem for each input that the folder of an output lies in, or that lies in it."""
    for entry in entries:
        if overlaps(output, entry.uri):
            message = f"{output} and the input {entry.uri} ({entry.place}) lie in each other"
            yield Problem("output.path", message, "write to a folder of its own")


def _message(item: "ErrorDetails") -> str:
    return ": ".join([*place_of(item["loc"]), item["msg"].removeprefix("Value error, ")])


def _last(uri: str) -> str:
    return uri.rpartition("/")[2]
