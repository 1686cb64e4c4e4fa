"""What the models of one recipe must agree on: base, shapes, the kind of each matrix; and which are left out."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from ties_ray.errors import InputError, Problem, printable
from ties_ray.expand import BASE, Entry
from ties_ray.formats import Format, Found, Parameter
from ties_ray.recipe import Recipe


class Read(NamedTuple):
    """A model as its format read it."""

    entry: Entry
    format: Format
    found: Found


class Refused(NamedTuple):
    """A model that is left out, because it would be refused and the recipe allows to drop such models."""

    id: str
    uri: str
    problems: tuple[Problem, ...]


def disagreements(recipe: Recipe, models: Sequence[Read]) -> Iterator[tuple[str, Problem]]:
    """Yield (model id, problem) where a model does not belong with the others, or needs a base that is not named."""
    yield from _base_names(recipe.allow.base_names, models)
    if recipe.base is None:
        yield from _needy(models)
        yield from _shapes(models)
    yield from _kinds(models)


def drop(
    recipe: Recipe, entries: Sequence[Entry], problems: Mapping[str, Sequence[Problem]]
) -> tuple[list[Entry], tuple[Refused, ...]]:
    """Return what is left without the models that have problems, and those; raise `InputError` with all problems where
    the recipe does not allow that, the base has some too, or nothing would be left."""
    wrong = [entry for entry in entries if problems.get(entry.id)]
    left = [entry for entry in entries if not problems.get(entry.id)]
    allowed = recipe.allow.refused_model == "drop" and not problems.get(BASE)
    if wrong and not (allowed and any(entry.id != BASE for entry in left)):
        raise InputError(problem for entry in entries for problem in problems.get(entry.id, ()))
    return left, tuple(Refused(entry.id, entry.uri, tuple(problems[entry.id])) for entry in wrong)


def parameters(base: Mapping[str, Parameter], models: Sequence[Read]) -> tuple[Parameter, ...]:
    """Return the base's parameters, or, where there is no base, all that the models change, by name."""
    changed = {name for model in models for name in model.found.sources}
    kinds = {name: kind for model in models for name, kind in model.found.kinds.items()}
    known = base or {
        name: Parameter(name, model.format.shape(source), "F32", True)
        for model in models
        for name, source in sorted(model.found.sources.items())
    }
    called = {name: told for model in models for name, told in model.found.called.items()}
    names = list(base) or sorted(changed)
    return tuple(
        known[name]._replace(changed=name in changed, kind=kinds.get(name, "linear"), called=called.get(name, ""))
        for name in names
    )


def _base_names(allowed: Sequence[str], models: Sequence[Read]) -> Iterator[tuple[str, Problem]]:
    said = {model.entry.id: name for model in models if (name := model.found.facts.get("base_name"))}
    counts = Counter(said.values())
    usual = min(counts, key=lambda name: (-counts[name], name), default="")
    for model in models:
        name = said.get(model.entry.id, usual)
        if any(fnmatchcase(name, pattern) for pattern in allowed) or (not allowed and name == usual):
            continue
        others = f"is not among allow.base_names ({', '.join(allowed)})"
        if not allowed:
            others = f"{counts[usual]} of {len(models)} name {printable(usual)!r}"
        remedy = "if they are one model under several names: allow: {base_names: [...]}, else leave it out"
        yield (
            model.entry.id,
            Problem(model.entry.uri, f"says that its base is {printable(name)!r}; {others}", remedy, "base_name"),
        )


def _needy(models: Sequence[Read]) -> Iterator[tuple[str, Problem]]:
    for model in models:
        names = [name for name, source in model.found.sources.items() if model.format.needs(source) != "nothing"]
        if names:
            what = f"has {len(names)} tensors whose change the base alone can tell: {printable(names[0])}"
            yield model.entry.id, Problem(model.entry.uri, what, "name the `base`", "needs_base")


def _shapes(models: Sequence[Read]) -> Iterator[tuple[str, Problem]]:
    first: dict[str, tuple[tuple[int, ...], str]] = {}
    for model in models:
        for name, source in model.found.sources.items():
            shape = model.format.shape(source)
            known, whose = first.setdefault(name, (shape, model.entry.uri))
            if shape != known:
                what = f"changes {printable(name)} as {list(shape)}, {whose} as {list(known)}"
                yield model.entry.id, Problem(model.entry.uri, what, "are they of one base?", "shape")
                break


def _kinds(models: Sequence[Read]) -> Iterator[tuple[str, Problem]]:
    first: dict[str, tuple[str, str]] = {}
    for model in models:
        factored = [name for name, source in model.found.sources.items() if model.format.held(source)]
        for name in factored:
            kind = model.found.kinds.get(name, "linear")
            known, whose = first.setdefault(name, (kind, model.entry.uri))
            if kind != known:
                what = f"takes {printable(name)} for {kind}, {whose} for {known}"
                yield model.entry.id, Problem(model.entry.uri, what, "are they of one base?", "kind")
                break
