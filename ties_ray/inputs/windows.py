"""The checkpoints of a training run: the steps in the names of its folders, and the window that a recipe asks for."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from ties_ray.errors import InputError, Problem, printable
from ties_ray.recipe.recipe import STEP, ModelEntry
from ties_ray.stores import Stores, last_part

_NAMED = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt)s?[-_=]?(\d+)", re.IGNORECASE)
"""A number with a word before it which says that it is a step."""
_NUMBER = re.compile(r"\d+")
_UNFINISHED = (".", "tmp-", "tmp_")
"""How the names of folders begin that a trainer has not finished."""


class Step(NamedTuple):
    """A checkpoint of a run."""

    number: int
    uri: str
    pattern: str
    """The name of its folder, with `{step}` for the number."""


def steps_of(asked: ModelEntry, place: str, stores: Stores, notes: list[str]) -> list[Step]:
    """Return the run's checkpoints between `from` and `to`, in the order of their steps. It costs one listing.

    Raises `InputError` where folders have no step in their names, have steps in names of several patterns, or have
    the same step. The names of folders that are no checkpoints are added to `notes`.
    """
    run = (asked.run or "").rstrip("/")
    before, has_step, after = run.partition(STEP)
    above, _, start = before.rpartition("/") if has_step else (run, "", "")
    above = above or "."
    end, slash, inner = after.partition("/")
    folders = [uri for uri in stores.of(above).folders(above) if not _is_left_out(last_part(uri), asked.not_)]
    if has_step:
        steps = list(_matching(folders, start, end))
    else:
        steps = list(_by_word(folders)) or list(_by_only_number(folders))
    if not steps:
        raise InputError(_without_steps(run, above, folders, place))
    aside = sorted(set(map(last_part, folders)) - {last_part(step.uri) for step in steps})
    if aside:
        notes.append(f"{run}: no checkpoints of it: {_few(aside)}")
    problems = list(_ambiguous(steps, above, place))
    if problems:
        raise InputError(problems)
    steps.sort()
    within = [step for step in steps if (asked.from_ or 0) <= step.number <= (asked.to or step.number)]
    if not within:
        message = f"{run} has no checkpoint from {asked.from_ or 0} to {asked.to or 'the end'}; it has {_range(steps)}"
        raise InputError(Problem(place, message, "change `from` or `to`"))
    return [step._replace(uri=f"{step.uri}{slash}{inner}") for step in within]


def picked(asked: ModelEntry, place: str, count: int) -> list[int]:
    """Return which of so many checkpoints are in the window, in order. Raises `InputError` where they are too few."""
    numbers = list(range(count))[:: -(asked.every or 1)]
    if asked.last is not None and asked.last > len(numbers):
        every = f", of which `every: {asked.every}` leaves {len(numbers)}" if asked.every else ""
        message = f"{asked.run} has {count} checkpoints{every}; last is {asked.last}"
        raise InputError(Problem(place, message, f"`last: {len(numbers)}` takes all of them"))
    return numbers[: asked.last][::-1]


def _is_left_out(name: str, patterns: Sequence[str]) -> bool:
    return name.startswith(_UNFINISHED) or any(fnmatchcase(name, pattern) for pattern in patterns)


def _matching(folders: Sequence[str], start: str, end: str) -> Iterator[Step]:
    """Yield the folders whose names the recipe's pattern matches; `*` in it stands for any text."""
    quoted = [re.escape(part).replace(r"\*", ".*") for part in (start, end)]
    pattern = re.compile(rf"{quoted[0]}(\d+){quoted[1]}")
    for uri in folders:
        if match := pattern.fullmatch(last_part(uri)):
            yield Step(int(match[1]), uri, f"{start}{STEP}{end}")


def _by_word(folders: Sequence[str]) -> Iterator[Step]:
    for uri in folders:
        name = last_part(uri)
        if matches := list(_NAMED.finditer(name)):
            yield _step(uri, name, *matches[-1].span(1))


def _by_only_number(folders: Sequence[str]) -> Iterator[Step]:
    for uri in folders:
        name = last_part(uri)
        matches = list(_NUMBER.finditer(name))
        if len(matches) == 1:
            yield _step(uri, name, *matches[0].span())


def _step(uri: str, name: str, start: int, stop: int) -> Step:
    before, after = (_NUMBER.sub("*", part) for part in (name[:start], name[stop:]))
    return Step(int(name[start:stop]), uri, f"{before}{STEP}{after}")


def _without_steps(run: str, above: str, folders: Sequence[str], place: str) -> Problem:
    if not folders:
        return Problem(place, f"{above} holds no folder", "give the folder that holds the run's checkpoints")
    message = f"no folder in {above} has a step in its name, as {run} asks ({_few(sorted(map(last_part, folders)))})"
    return Problem(place, message, f"write {STEP} where the number stands, as in {above}/step-{STEP}")


def _ambiguous(steps: Sequence[Step], above: str, place: str) -> Iterator[Problem]:
    patterns = sorted({step.pattern for step in steps})
    if len(patterns) > 1:
        message = f"the folders in {above} have steps in {len(patterns)} kinds of names: {_few(patterns)}"
        yield Problem(place, message, f"choose one: `run: {above}/{patterns[0]}`")
        return
    first: dict[int, Step] = {}
    for step in steps:
        other = first.setdefault(step.number, step)
        if other is not step:
            message = f"{last_part(other.uri)} and {last_part(step.uri)} are both of step {step.number}"
            yield Problem(place, message, f"leave one out: `not: [{last_part(step.uri)}]`")


def _range(steps: Sequence[Step]) -> str:
    return f"steps {steps[0].number} to {steps[-1].number}"


def _few(texts: Sequence[str]) -> str:
    return ", ".join(map(printable, texts[:4])) + ", ..." * (len(texts) > 4)
