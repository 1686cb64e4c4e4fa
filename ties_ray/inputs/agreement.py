"""Agreement of one recipe's models: base, shapes, the kind of each matrix; and the models that are left out."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from glob import escape
from typing import NamedTuple

from ties_ray.errors import InputError, Problem, printable
from ties_ray.formats import Contents, Format
from ties_ray.inputs.expand import BASE, Entry
from ties_ray.inputs.spelling import Spelling, other_spellings
from ties_ray.recipe.recipe import Recipe
from ties_ray.tensors import Parameter

NAMES_PRINTED = 8
"""The most names of a base that a remedy lists; beyond, it takes any name."""
_ON_THE_HUB = re.compile(r"(?:https://huggingface\.co/)?([\w.-]+/[\w.-]+)")


class ReadModel(NamedTuple):
    """A model as its format reads it."""

    entry: Entry
    format: Format
    contents: Contents


class RefusedModel(NamedTuple):
    """A model that is left out because of its problems, as the recipe allows."""

    id: str
    uri: str
    problems: tuple[Problem, ...]


def named(recipe: Recipe, reads: Mapping[str, ReadModel]) -> dict[str, ReadModel]:
    """Return the models with one name for one base: by the recipe's table, and by slash and case."""
    table = recipe.allow.base_names if isinstance(recipe.allow.base_names, Mapping) else {}
    names = {
        id_: read.contents.facts["base_name"] for id_, read in reads.items() if read.contents.facts.get("base_name")
    }
    canonical = {
        name: next(
            (preferred for preferred, patterns in table.items() if name == preferred or _matches(name, patterns)), name
        )
        for name in names.values()
    }
    counts = Counter(canonical[name] for name in names.values())
    usual: dict[str, str] = {}
    for name in sorted(counts, key=lambda name: (-counts[name], name.endswith("/"), name)):
        usual.setdefault(_plain(name), name)

    def renamed(read: ReadModel, name: str) -> ReadModel:
        facts = {**read.contents.facts, "base_name": usual[_plain(canonical[name])]}
        return read._replace(contents=replace(read.contents, facts=facts))

    return {id_: renamed(read, names[id_]) if id_ in names else read for id_, read in reads.items()}


def _plain(name: str) -> str:
    """Return the common form of two spellings of one name; the hub does not tell upper from lower case."""
    name = name.strip().rstrip("/")
    match = _ON_THE_HUB.fullmatch(name)
    return match[1].lower() if match else name


def disagreements(recipe: Recipe, models: Sequence[ReadModel]) -> Iterator[tuple[str, Problem]]:
    """Yield (model id, problem) where a model does not belong with the others, or needs a base that is not named."""
    allowed = recipe.allow.base_names
    yield from _base_names(() if isinstance(allowed, Mapping) else allowed, models)
    if recipe.base is None and not recipe.first_is_base:
        yield from _needy(models)
        yield from _spellings(models)
        yield from _shapes(models)
    yield from _kinds(models)


def untie(base: Mapping[str, Parameter], models: dict[str, ReadModel]) -> dict[str, Parameter]:
    """Return the base's parameters, and those that the base ties to them and some model has of its own.

    models: all inputs by id, which are brought up to date. In the base, and in whole models that tie it too, such a
    parameter has the other's value. The base's fact `untied` names all of them.
    """
    untied = {name: kept for model in models.values() for name, kept in model.contents.untied.items() if kept in base}
    parameters = {**{name: base[kept]._replace(name=name) for name, kept in untied.items()}, **base}
    for id_, model in models.items() if untied else ():
        sources, facts = dict(model.contents.sources), dict(model.contents.facts)
        if model.format.whole:
            sources |= {name: sources[kept] for name, kept in untied.items() if kept in sources and name not in sources}
        if id_ == BASE:
            facts["untied"] = ", ".join(untied)
        models[id_] = model._replace(contents=replace(model.contents, sources=sources, facts=facts))
    return {name: parameters[name] for name in (*base, *untied)}


def unmerged(base: Mapping[str, Parameter], models: Sequence[ReadModel]) -> Iterator[tuple[str, Problem]]:
    """Yield (model id, problem) where nothing that a model stores would be merged."""
    for model in models:
        sources = model.contents.sources
        if not model.contents.problems and not any(base[name].merged if base else True for name in sources):
            message = f"nothing of it would be merged ({model.contents.account})"
            yield model.entry.id, Problem(model.entry.uri, message, "drop the model, or mend `exclude`", "nothing")


def drop(
    recipe: Recipe, entries: Sequence[Entry], problems: Mapping[str, Sequence[Problem]]
) -> tuple[list[Entry], tuple[RefusedModel, ...]]:
    """Return (the inputs without problems, the models with problems).

    Raises `InputError` with all problems where the recipe does not allow to drop models, the base has problems too, or
    no model would be left.
    """
    wrong = [entry for entry in entries if problems.get(entry.id)]
    left = [entry for entry in entries if not problems.get(entry.id)]
    allowed = recipe.allow.refused_model == "drop" and not problems.get(BASE)
    if wrong and not (allowed and any(entry.id != BASE for entry in left)):
        raise InputError(problem for entry in entries for problem in problems.get(entry.id, ()))
    return left, tuple(RefusedModel(entry.id, entry.uri, tuple(problems[entry.id])) for entry in wrong)


def parameters(base: Mapping[str, Parameter], models: Sequence[ReadModel]) -> tuple[Parameter, ...]:
    """Return the base's parameters; without a base all parameters that the models change, by name."""
    changed = {name for model in models for name in model.contents.sources}
    kinds = {name: kind for model in models for name, kind in model.contents.kinds.items()}
    by_name = base or {
        name: Parameter(name, model.format.shape(source), "F32", True)
        for model in models
        for name, source in sorted(model.contents.sources.items())
    }
    spelling = Spelling(
        {name: model.contents.called.get(name, name) for name in model.contents.sources}
        for model in models
        if not model.format.whole
    )
    names = list(base) or sorted(changed)

    def called(name: str) -> str:
        spelt = spelling(name)
        return "" if spelt == name else spelt

    return tuple(
        by_name[name]._replace(changed=name in changed, kind=kinds.get(name, "linear"), called=called(name))
        for name in names
    )


def _base_names(allowed: Sequence[str], models: Sequence[ReadModel]) -> Iterator[tuple[str, Problem]]:
    base_names = {model.entry.id: name for model in models if (name := model.contents.facts.get("base_name"))}
    counts = Counter(base_names.values())
    usual = min(counts, key=lambda name: (-counts[name], name), default="")
    names = [usual, *sorted(counts.keys() - {usual})]
    listed = ", ".join(json.dumps(escape(name)) for name in names) if len(names) <= NAMES_PRINTED else '"*"'
    for model in models:
        name = base_names.get(model.entry.id, usual)
        if _matches(name, allowed) or (not allowed and name == usual):
            continue
        others = f"is not among allow.base_names ({', '.join(allowed)})"
        if not allowed:
            others = f"{counts[usual]} of {len(models)} name {printable(usual)!r}"
        remedy = f"if these are names of one model: `allow: {{base_names: [{printable(listed)}]}}`, else leave it out"
        yield (
            model.entry.id,
            Problem(model.entry.uri, f"says that its base is {printable(name)!r}; {others}", remedy, "base_name"),
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _spellings(models: Sequence[ReadModel]) -> Iterator[tuple[str, Problem]]:
    """Yield the models whose names of modules differ from the others' by leading words alone."""
    others = other_spellings([model.contents.sources.keys() for model in models])
    for number, (name, usual) in sorted(others.items()):
        model = models[number]
        message = f"calls {printable(name)} what more of the others call {printable(usual)}"
        yield (
            model.entry.id,
            Problem(model.entry.uri, message, "name the `base`, which tells what is meant", "spelling"),
        )


def _needy(models: Sequence[ReadModel]) -> Iterator[tuple[str, Problem]]:
    for model in models:
        names = [name for name, source in model.contents.sources.items() if model.format.needs(source) != "nothing"]
        if names:
            message = f"has {len(names)} tensors whose change the base alone can tell: {printable(names[0])}"
            yield model.entry.id, Problem(model.entry.uri, message, "name the `base`", "needs_base")


def _shapes(models: Sequence[ReadModel]) -> Iterator[tuple[str, Problem]]:
    first: dict[str, tuple[tuple[int, ...], str]] = {}
    for model in models:
        for name, source in model.contents.sources.items():
            shape = model.format.shape(source)
            first_shape, whose = first.setdefault(name, (shape, model.entry.uri))
            if shape != first_shape:
                message = f"changes {printable(name)} as {list(shape)}, {whose} as {list(first_shape)}"
                yield model.entry.id, Problem(model.entry.uri, message, "are they of one base?", "shape")
                break


def _kinds(models: Sequence[ReadModel]) -> Iterator[tuple[str, Problem]]:
    first: dict[str, tuple[str, str]] = {}
    for model in models:
        factored = [name for name, source in model.contents.sources.items() if source.encoding == "factors"]
        for name in factored:
            kind = model.contents.kinds.get(name, "linear")
            first_kind, whose = first.setdefault(name, (kind, model.entry.uri))
            if kind != first_kind:
                message = f"takes {printable(name)} for {kind}, {whose} for {first_kind}"
                yield model.entry.id, Problem(model.entry.uri, message, "are they of one base?", "kind")
                break
