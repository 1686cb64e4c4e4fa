"""The catalog: every tensor of every input, with dtype, shape, file and byte range, from headers and configs alone."""

import fnmatch
import itertools
import json
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple

from pydantic import SerializerFunctionWrapHandler, ValidatorFunctionWrapHandler, WrapSerializer, WrapValidator

from ties_ray import runtime
from ties_ray.errors import InputError, Problem, RecipeError
from ties_ray.formats import Account, Folder, Format, Rules
from ties_ray.formats._checkpoint_names import tied
from ties_ray.formats.adapted import Adapted, combined
from ties_ray.formats.checkpoint import Checkpoint
from ties_ray.formats.companion import Companion
from ties_ray.inputs import (
    agreement,
    coefficients,
    companions,
    configs,
    heads,
    orientation,
    small_files,
    tokenizers,
    vocabulary,
)
from ties_ray.inputs.agreement import ReadModel, RefusedModel
from ties_ray.inputs.constants import keep_dtypes
from ties_ray.inputs.expand import BASE, Entry, expand, numbered
from ties_ray.inputs.fetch import README, EarlierInputs, FetchedInput, ListedInput, Problems, fetch, read_folders
from ties_ray.inputs.licence import licence_of
from ties_ray.inputs.names import model_names
from ties_ray.inputs.pins import verify_pins, weak_pins
from ties_ray.inputs.small_files import SmallFile, Taken
from ties_ray.inputs.vocabulary import Aligned
from ties_ray.libraries.conversions import kinds_of
from ties_ray.libraries.library import TRANSFORMERS, Library
from ties_ray.methods import Member
from ties_ray.outputs import CHAT_TEMPLATE, DTYPES, CondensingOutput
from ties_ray.recipe.coefficients import Rules as Lines
from ties_ray.recipe.recipe import Recipe
from ties_ray.safetensors import MERGEABLE
from ties_ray.stores import Listing, Pin, Stores, absolute, hub_name
from ties_ray.tensors import Parameter, Source

COMPARED_BYTES = 16 * 2**20
"""Weights may be compared while planning; a note says how much was read, if it is more than this."""
THREADS = 32
"""Requests in flight; planning waits for the storage's latency, and not for bytes."""


@dataclass(frozen=True)
class Model:
    """One input, pinned."""

    uri: str
    id: str
    """The entry's `id`, else its 0-based position in the expanded list; "base" for the base."""
    format: str
    objects: tuple[Pin, ...]
    sources: dict[str, Source]
    """The sources by base parameter. A missing parameter has delta zero, as the recipe allows.

    Models with the same format and layout, as fine-tunes of one base have, share one dictionary, in memory and in
    JSON."""
    weight: float = 1.0
    density: float | None = None
    licence: str = ""
    """The licence in the front matter of its README; empty where there is none."""
    facts: dict[str, str] = field(default_factory=dict)
    """Facts from its format: `base_name`, `task_type`, `rank`, ..."""
    account: Account = field(default_factory=Account)
    """The fate of every element that it stores."""
    weights: Lines = ()
    """Weights by parameter; `weight` holds where no line matches."""
    densities: Lines = ()
    """Densities by parameter; `density` holds where no line matches."""
    ranks: Lines = ()
    """Weights of the rank components of its factors, by parameter; its sources hold them too."""
    companions: "dict[str, Model]" = field(default_factory=dict)
    """Further tensors of this model by name; their sources go by base parameter too."""

    @property
    def inputs(self) -> "tuple[Model, ...]":
        """Return it and its companions: all that is read for it."""
        return (self, *self.companions.values())

    @property
    def pins(self) -> tuple[Pin, ...]:
        """Return all files that are read for it."""
        return tuple(pin for each in self.inputs for pin in each.objects)

    @property
    def is_idle(self) -> bool:
        """Whether its weight is 0 everywhere."""
        return self.weight == 0 and all(not any(rule.values) for rule in self.weights)


def _write_models(models: Sequence[Model], write: SerializerFunctionWrapHandler) -> list[dict[str, object]]:
    """Return the JSON form of models; a model with the sources of an earlier one holds that model's number."""
    first: dict[int, int] = {}
    same = [first.setdefault(id(model.sources), number) for number, model in enumerate(models)]
    plain = write(tuple(model if same[n] == n else replace(model, sources={}) for n, model in enumerate(models)))
    return [form if same[n] == n else {**form, "sources": same[n]} for n, form in enumerate(plain)]


def _read_models(plain: Any, read: ValidatorFunctionWrapHandler) -> tuple[Model, ...]:
    """Return the models of a JSON form by `_write_models`; raise `ValueError` for any other form."""
    if not (isinstance(plain, Sequence) and all(isinstance(form, Mapping) for form in plain)):
        return tuple(read(plain))
    same = [form["sources"] if type(form.get("sources")) is int else n for n, form in enumerate(plain)]
    if any(first not in range(n + 1) or same[first] != first for n, first in enumerate(same)):
        raise ValueError("the sources of a model are said to be those of another that has none")
    models = read([form if same[n] == n else {**form, "sources": {}} for n, form in enumerate(plain)])
    return tuple(replace(model, sources=models[same[n]].sources) for n, model in enumerate(models))


@dataclass(frozen=True)
class Earlier:
    """The merge that is continued."""

    output: str
    run_id: str
    members: tuple[Member, ...]
    """The models that are merged there, in order."""
    listed: int
    """How many models its recipe and those before it list, whatever their weight."""
    state: Model
    """What is left of them. Its sources hold fp32 words of each element, by `<name of a state>:<parameter>`."""
    sums: dict[int, Pin]
    """The places of exact sums of single models, by the position of the method's round that gathered them."""
    lapack: str = ""
    """How LAPACK must compute, where that decided the state."""
    inputs: dict[str, tuple[Pin, ...]] = field(default_factory=dict)
    """All files that were read of each of these models, by its id."""

    @property
    def pins(self) -> tuple[Pin, ...]:
        """Return all that is read of it."""
        return (*self.state.objects, *self.sums.values())

    def source(self, state: str, parameter: str) -> Source | None:
        """Return where a round's state of a parameter lies; None where no earlier model changes the parameter."""
        return self.state.sources.get(f"{state}:{parameter}") if state else None


@dataclass(frozen=True)
class Catalog:
    """All inputs of a merge, checked against each other."""

    base: Model
    """The base; it has no files and no tensors where the recipe names none."""
    models: Annotated[tuple[Model, ...], WrapSerializer(_write_models), WrapValidator(_read_models)]
    parameters: tuple[Parameter, ...]
    """The base's parameters in the order of its files and offsets, without tied aliases."""
    small_files: tuple[SmallFile, ...]
    """The files that the output takes over from the input that `output.files_from` names."""
    notes: tuple[str, ...]
    """Notes for readers of plan and result: differing tokenizers, ties, tensors left aside, weak pins."""
    refused: tuple[RefusedModel, ...] = ()
    """Models that are left out although the recipe names them."""
    waiting: tuple[str, ...] = ()
    """Folders that wait for a later merge, each with the reason."""
    library: Library = TRANSFORMERS
    """The library of the input that `output.files_from` names; it decides the names of a whole model's files."""
    earlier: Earlier | None = None
    """The merge that is continued, if there is one."""
    lambdas: Lines = ()
    """The method's lambda by parameter; its own holds where no line matches."""

    @property
    def facts(self) -> dict[str, str]:
        """Return the facts that all models share, with `base`, the base's URI, and `untied`, its untied parameters.

        An output that asks for the chat template which most inputs have finds it as `chat_template`.
        """
        first, *others = (model.facts for model in self.models)
        shared = {key: value for key, value in first.items() if all(facts.get(key) == value for facts in others)}
        own = {key: value for key, value in self.base.facts.items() if key in ("untied", CHAT_TEMPLATE)}
        return {**shared, "base": hub_name(self.base.uri), **own} if self.base.uri else shared


class Inputs(NamedTuple):
    """The inputs of recipes that differ in the numbers of their models, their coefficients and their methods."""

    catalog: Catalog
    """It holds no coefficients and no companions."""
    entries: tuple[Entry, ...]
    """The base, if there is one, and the models that are not left out."""


def read_catalog(recipe: Recipe, stores: Stores, *, first: int = 0) -> Catalog:
    """Return all inputs of a recipe with its numbers, pinned and checked against each other; see `read_inputs`."""
    return with_numbers(recipe, read_inputs(recipe, stores, first=first), stores)


def with_numbers(recipe: Recipe, inputs: Inputs, stores: Stores) -> Catalog:
    """Return the catalog of a recipe whose inputs are read: with its weights, densities, coefficients and companions.

    A line of `models` that names a model by id and path gives it its numbers. Files of coefficients and the headers of
    companions are read. Raises `InputError` and `RecipeError`.
    """
    entries = numbered(inputs.entries, recipe)
    by_id = {entry.id: entry for entry in entries}
    models = tuple(
        replace(model, weight=own.weight, density=own.density, weights=own.weights, densities=own.densities)
        for model in inputs.catalog.models
        for own in (by_id[model.id],)
    )
    catalog = _with_coefficients(recipe, replace(inputs.catalog, models=models), stores)
    if not recipe.method.companions:
        return catalog
    with _threads() as threads:
        return _with_companions(recipe, catalog, entries, stores, threads)


def read_inputs(recipe: Recipe, stores: Stores, *, first: int = 0, earlier: EarlierInputs | None = None) -> Inputs:
    """Return all inputs of a recipe, pinned and checked against each other; no weight is read.

    first: the number of the first model, from which those count that have no id. earlier: the inputs that earlier calls
    have fetched; see `fetch.fetch`.
    It costs a listing a folder, and a request for each weight file, index, config and README. A header above
    `fetch.HEAD_BYTES` takes a second request, and tokenizer files are read where their pins differ. Only a file that
    the recipe pins by `sha256` is read whole.
    Raises `InputError` with everything that is wrong with the inputs, `RecipeError` for what the recipe contradicts.
    """
    with _threads() as threads:
        return _read_inputs(recipe, stores, threads, first, earlier)


@contextmanager
def _threads() -> Iterator[Executor]:
    threads = runtime.pool(THREADS)
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # after an error or a signal nobody waits for the rest


class _Checked(NamedTuple):
    """The inputs that are merged, checked against each other."""

    entries: list[Entry]
    """The base, if there is one, and the models that are not left out."""
    inputs: dict[str, ReadModel]
    """All inputs by id."""
    models: list[ReadModel]
    parameters: tuple[Parameter, ...]
    refused: tuple[RefusedModel, ...]
    num_compared: int
    """Bytes of weights that were read to answer the formats."""
    aligned: Aligned | None = None
    """The vocabularies, where the recipe brings them together."""

    @property
    def names(self) -> dict[str, str]:
        """Return what notes call each input, by id."""
        return {BASE: BASE, **model_names([model.entry for model in self.models])}


def _read_inputs(
    recipe: Recipe, stores: Stores, threads: Executor, first: int, earlier: EarlierInputs | None
) -> Inputs:
    expanded = expand(recipe, stores, threads, first)
    adapters = [entry.of_adapter for entry in expanded.entries if entry.adapter]
    fetched, problems = fetch([*expanded.entries, *adapters], stores, threads, earlier=earlier)
    checked = _check(recipe, expanded.entries, fetched, problems, stores, threads)
    pin_notes = _verify(checked, fetched, stores, threads)
    files_from = _files_from(recipe, checked) if recipe.output.reads_base else ""
    small, small_notes = _small_files(checked, fetched, files_from, stores, threads) if files_from else ((), ())
    template, template_notes = _chat_template(recipe, checked.entries, fetched, stores, threads)
    needed = recipe.output.required_files if template or not recipe.output.most_frequent_template else ()
    if missing := [name for name in needed if name not in {file.name for file in small}]:
        message = f"needs {missing[0]}, which {checked.inputs[files_from].entry.uri} has not"
        raise RecipeError(Problem("output", message, "name the model that has it in output.files_from"))
    parameters, dtype_notes = checked.parameters, list[str]()
    if recipe.output.reads_base and recipe.output.dtype:
        base, asked = checked.inputs[BASE], DTYPES[recipe.output.dtype]
        parameters, dtype_notes = keep_dtypes(parameters, base.contents, base.format, asked, stores, threads)
    library = checked.inputs[files_from].contents.library if files_from else TRANSFORMERS
    shared: dict[Hashable, dict[str, Source]] = {}
    inputs = [_model(fetched[entry.id], checked.inputs[entry.id], shared) for entry in checked.entries]
    notes = (
        *expanded.notes,
        *(note for entry in checked.entries for note in _choice(fetched[entry.id].listed)),
        *(f"left out, as allowed: {problem}" for model in checked.refused for problem in model.problems),
        *_notes_of_formats([checked.inputs[entry.id] for entry in checked.entries], checked.names),
        *_idle_patterns(recipe.exclude, parameters, checked.models),
        *(_config_notes(fetched, checked.names, files_from) if BASE in fetched else ()),
        *dtype_notes,
        *(checked.aligned.notes if checked.aligned else ()),
        *weak_pins(pin for model in inputs for pin in model.objects),
        *pin_notes,
        *_comparing(checked.num_compared),
        *(_tokenizer_notes(fetched, checked.names, stores, threads) if BASE in fetched else ()),
        *small_notes,
        *template_notes,
        *(_unopened(fetched[files_from].listed, library) if files_from and recipe.output.kind == "checkpoint" else ()),
    )
    base_model, models = (inputs[0], inputs[1:]) if BASE in fetched else (Model("", BASE, "", (), {}), inputs)
    base_model.facts.update(template)
    waiting = expanded.waiting
    catalog = Catalog(base_model, tuple(models), parameters, small, notes, checked.refused, waiting, library)
    return Inputs(_with_heads(catalog, checked.models), tuple(checked.entries))


def _with_companions(
    recipe: Recipe, catalog: Catalog, entries: Sequence[Entry], stores: Stores, threads: Executor
) -> Catalog:
    """Return the catalog with what the method needs beside the weights; raise `InputError` where that is amiss."""
    asked = [
        Entry(f"{entry.place}.with.{name}", companions.folder_of(entry.uri, uri), f"{entry.id}: {name}")
        for entry in entries
        for name, uri in entry.companions.items()
    ]
    fetched, problems = fetch(asked, stores, threads, [Companion()])
    base = {parameter.name: parameter for parameter in catalog.parameters}
    reads = {
        id_: ReadModel(
            each.listed.entry, each.listed.format, each.listed.format.read(each.folder, base, _rules(recipe))
        )
        for id_, each in fetched.items()
    }
    wrong = itertools.chain(*problems.values(), *(each.contents.problems for each in reads.values()))
    if every := list(wrong):
        raise InputError(every)
    read = {id_: _model(fetched[id_], each, {}) for id_, each in reads.items()}
    models = tuple(
        replace(model, companions={each.name: read[f"{model.id}: {each.name}"] for each in recipe.method.companions})
        for model in catalog.models
    )
    if misfits := list(companions.misfits(recipe.method.companions, models, catalog.parameters)):
        raise InputError(misfits)
    return replace(catalog, models=models)


def _with_coefficients(recipe: Recipe, catalog: Catalog, stores: Stores) -> Catalog:
    """Return the catalog with all numbers that differ by parameter; raise `RecipeError` for those of no parameter."""
    lines = coefficients.read_file(recipe, stores)
    models = coefficients.with_rules(recipe, lines, catalog.models)
    lambdas = coefficients.lambdas(recipe, lines)
    if problems := list(coefficients.problems(models, lambdas, catalog.parameters)):
        raise RecipeError(problems)
    models = coefficients.without_idle_sources(coefficients.weighed_by_rank(models), catalog.parameters)
    if not lambdas and all(model is before for model, before in zip(models, catalog.models, strict=True)):
        return catalog
    changed = {name for model in models for name in model.sources}
    parameters = (each._replace(changed=each.changed and each.name in changed) for each in catalog.parameters)
    return replace(catalog, models=tuple(models), parameters=tuple(parameters), lambdas=lambdas)


def _check(
    recipe: Recipe,
    entries: Sequence[Entry],
    fetched: Mapping[str, FetchedInput],
    problems: Problems,
    stores: Stores,
    threads: Executor,
) -> _Checked:
    """Read all inputs, the base first, and return those that belong together; raise `InputError` for the others.

    Models are left out instead where the recipe allows it.
    """
    rules = _rules(recipe)
    inputs: dict[str, ReadModel] = {}
    base: dict[str, Parameter] = {}
    of_base = fetched.get(BASE)
    num_compared = 0
    if of_base and not problems[BASE]:
        contents, num_compared = read_folders({BASE: of_base}, of_base, None, rules, stores, threads)
        inputs[BASE] = ReadModel(of_base.listed.entry, of_base.listed.format, contents[BASE])
        problems[BASE] += [*contents[BASE].problems, *_not_whole(of_base.listed)]
        if not problems[BASE]:
            base = _parameters(contents[BASE].sources, of_base.listed.format, rules)
            rules = _with_names(rules, of_base.folder, base)
            if recipe.vocabulary:
                text = of_base.folder.texts.get(configs.CONFIG, b"")
                rules = rules._replace(by_token=vocabulary.by_token(base, text, rules.tied))
    if not problems[BASE]:
        of_models = {id_: each for id_, each in fetched.items() if id_ != BASE}
        contents, num_bytes = read_folders(of_models, of_base, base if of_base else None, rules, stores, threads)
        num_compared += num_bytes
        for id_, each in contents.items():
            inputs[id_] = ReadModel(fetched[id_].listed.entry, fetched[id_].listed.format, each)
            problems[id_] += each.problems
    _add_adapters(entries, inputs, problems)
    base = agreement.untie(base, inputs)
    inputs = agreement.named(recipe, inputs)
    aligned = None
    if recipe.vocabulary and base:
        sound = {id_: each for id_, each in inputs.items() if not problems[id_]}
        files = {id_: fetched[id_].listed.tokenizer for id_ in sound}
        aligned = vocabulary.align(recipe.vocabulary, base, sound, entries, files, rules, stores, threads)
        base, inputs = aligned.base, {**inputs, **aligned.inputs}
    models = [each for each in inputs.values() if each.entry.id != BASE]
    of_rows = aligned.problems if aligned else []
    for id_, problem in (*of_rows, *_disagreements(recipe, base, models, stores, threads)):
        problems[id_].append(problem)
    left, refused = agreement.drop(recipe, entries, problems)
    models = [inputs[entry.id] for entry in left if entry.id != BASE]
    return _Checked(left, inputs, models, _with_places(recipe, base, models, rules), refused, num_compared, aligned)


def _with_places(
    recipe: Recipe, base: Mapping[str, Parameter], models: Sequence[ReadModel], rules: Rules
) -> tuple[Parameter, ...]:
    """Return the parameters, with orientation and ties where the output holds factors of their modules."""
    parameters = agreement.parameters(base, models)
    if not isinstance(recipe.output, CondensingOutput):
        return parameters
    sources = [source for model in models for source in model.contents.sources.items()]
    factored = {name for name, source in sources if source.encoding == "factors"}  # its models tell the orientation
    names = {each.name for each in parameters}
    kinds = orientation.kinds_by_name(names - factored, rules.kinds)
    ties = [tie for tie in rules.tied if tie.alias not in names]
    return tuple(
        each._replace(
            kind=kinds.get(each.name, each.kind), tied=tuple(tie.alias for tie in ties if tie.kept == each.name)
        )
        for each in parameters
    )


def _disagreements(
    recipe: Recipe, base: Mapping[str, Parameter], models: Sequence[ReadModel], stores: Stores, threads: Executor
) -> Iterator[tuple[str, Problem]]:
    """Yield (model id, problem) where models do not belong together, or have nothing to merge."""
    yield from agreement.disagreements(recipe, models)
    yield from agreement.unmerged(base, models)
    yield from heads.disagreements([each for each in models if not each.contents.problems], stores, threads)


def _with_heads(catalog: Catalog, models: Sequence[ReadModel]) -> Catalog:
    """Return the catalog where the base has the heads that all models share: the first model's places."""
    if not models or not models[0].contents.heads:
        return catalog
    base, contents = catalog.base, models[0].contents
    added = {name: ref._replace(object=ref.object + len(base.objects)) for name, ref in contents.heads.items()}
    base = replace(
        base,
        format=base.format or Checkpoint.name,
        objects=base.objects + contents.objects,
        sources={**base.sources, **{name: Source((ref,)) for name, ref in added.items()}},
    )
    more = (Parameter(name, ref.shape, ref.dtype, False, False, carried=True) for name, ref in sorted(added.items()))
    return replace(catalog, base=base, parameters=(*catalog.parameters, *more))


def _add_adapters(entries: Sequence[Entry], inputs: dict[str, ReadModel], problems: Problems) -> None:
    """Make one input of each model and the adapter that is added to it; the adapter's problems become the model's."""
    for entry in entries:
        if not entry.adapter:
            continue
        own = entry.of_adapter
        adapter, model = inputs.pop(own.id, None), inputs.get(entry.id)
        problems[entry.id] += problems.pop(own.id, [])
        if adapter and (adapter.format.whole or (model and not model.format.whole)):
            message = "`path` takes a whole model and `adapter` an adapter, and one of them is of the other kind"
            problems[entry.id].append(Problem(own.uri, message, "swap them, or drop the model"))
        elif adapter and model:
            contents = combined(model.contents, adapter.contents, adapter.entry.uri)
            problems[entry.id] += () if problems[entry.id] else contents.problems
            inputs[entry.id] = ReadModel(model.entry, Adapted(), contents)


def _not_whole(listed: ListedInput) -> Iterator[Problem]:
    if not listed.format.whole:
        message = f"is no whole model: its format is {listed.format.name}"
        yield Problem(f"base: {listed.entry.uri}", message, "name the model that the adapters were made for")


def _verify(checked: _Checked, fetched: Mapping[str, FetchedInput], stores: Stores, threads: Executor) -> list[str]:
    """Verify tokens and pins; return notes, or raise `InputError`."""
    rows = {parameter.name: parameter.shape[0] for parameter in checked.parameters if parameter.shape}

    def common_ids(model: ReadModel) -> list[Problem]:
        base, own = fetched[BASE].listed.tokenizer, fetched[model.entry.id].listed.tokenizer
        most = max(rows[name] for name in model.contents.extra_rows)
        return tokenizers.check_common_ids(base, own, most, stores)

    resized = [model for model in checked.models if BASE in fetched and model.contents.extra_rows]
    problems = [problem for many in threads.map(common_ids, resized) for problem in many]
    weight_files = {id_: each.contents.objects for id_, each in checked.inputs.items()}
    notes, of_pins = verify_pins(checked.entries, weight_files, stores, threads)
    if problems or of_pins:
        raise InputError(problems + of_pins)
    return notes


def _rules(recipe: Recipe) -> Rules:
    allow = recipe.allow
    return Rules(
        exclude=recipe.exclude,
        missing=allow.missing == "zero",
        extra_rows=allow.extra_rows == "drop",
        saved_modules=allow.saved_modules == "merge",
        heads=recipe.output.carries_heads,
    )


def _with_names(rules: Rules, folder: Folder, base: Collection[str]) -> Rules:
    """Return the rules with what the base's config tells of names; its format has refused what is no object."""
    config = json.loads(folder.texts.get("config.json", b"{}"))
    return rules._replace(kinds=kinds_of(config), tied=tuple(tied(base, config)))


def _parameters(sources: Mapping[str, Source], form: Format, rules: Rules) -> dict[str, Parameter]:
    dtypes = {name: source.tensors[0].dtype for name, source in sources.items()}
    return {
        name: Parameter(name, form.shape(sources[name]), dtype, dtype in MERGEABLE and not rules.excludes(name))
        for name, dtype in dtypes.items()
    }


def _model(fetched: FetchedInput, read: ReadModel, shared: dict[Hashable, dict[str, Source]]) -> Model:
    """Return an input as the catalog has it; shared: the sources of all models so far, by format and layout."""
    entry, form, contents = fetched.listed.entry, read.format, read.contents
    return Model(
        uri=entry.uri,
        id=entry.id,
        format=form.name,
        objects=contents.objects,
        sources=shared.setdefault((form.name, *contents.sources.items()), dict(contents.sources)),
        weight=entry.weight,
        density=entry.density,
        weights=entry.weights,
        densities=entry.densities,
        licence=licence_of(fetched.folder.texts.get(README, b"")),
        facts=dict(contents.facts),
        account=contents.account,
    )


def _files_from(recipe: Recipe, checked: _Checked) -> str:
    """Return the id of the input that `output.files_from` names by id or path."""
    asked = recipe.output.files_from
    path = absolute(asked).rstrip("/")
    for entry in checked.entries:
        if asked == entry.id or path == absolute(entry.uri):
            return entry.id
    for model in checked.refused:
        if asked == model.id or path == absolute(model.uri):
            message = f"{asked!r} is left out of the merge: {model.problems[0].what}"
            raise RecipeError(Problem("output.files_from", message, "write `base`, or a model that is merged"))
    message = f"{asked!r} is neither the id nor the path of an input"
    raise RecipeError(Problem("output.files_from", message, "write `base`, or a model's id, position or path"))


def _small_files(
    checked: _Checked, fetched: Mapping[str, FetchedInput], files_from: str, stores: Stores, threads: Executor
) -> tuple[tuple[SmallFile, ...], tuple[str, ...]]:
    """Return what the output takes over from an input beside its weights, and notes on it."""
    base_config, config = (fetched[id_].folder.texts.get(configs.CONFIG, b"") for id_ in (BASE, files_from))
    aligned = checked.aligned
    if not aligned:
        rows = {each.shape[0] for each in checked.parameters if len(each.shape) == 2}
        _check_rows(files_from, base_config, config, rows)
    carried = _taken(fetched[files_from], stores, threads)
    if aligned:
        owner = fetched[aligned.owner]
        texts = [json.loads(text or b"{}") for text in (config, owner.folder.texts.get(configs.CONFIG, b""))]
        carried = vocabulary.with_tokenizer(aligned, carried, _taken(owner, stores, threads), *texts)
    whole = [model.entry for model in checked.models if model.entry.id != files_from and model.format.whole]
    others = {checked.names[entry.id]: entry.uri for entry in whole}
    differing = small_files.differing_modules(carried.files, others, stores, threads)
    leftovers = checked.inputs[files_from].contents.leftovers
    files = (replace(file, without=leftovers) if file.name == configs.CONFIG else file for file in carried.files)
    return tuple(files), (*carried.notes, *differing)


def _chat_template(
    recipe: Recipe, entries: Sequence[Entry], fetched: Mapping[str, FetchedInput], stores: Stores, threads: Executor
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return (the chat template that most inputs have, as a fact, and a note on it) where the output asks for it."""
    if not recipe.output.most_frequent_template:
        return {}, ()
    inputs = {entry.uri: fetched[entry.id].listed.tokenizer for entry in reversed(entries)}  # the base stays, if twice
    first = list(reversed(inputs.values()))
    templates = tokenizers.templates(first, stores, threads)
    if not any(templates):
        return {}, ("chat template: no input has one",)
    ((template, count),) = Counter(filter(None, templates)).most_common(1)
    whose = first[templates.index(template)].uri
    return {CHAT_TEMPLATE: template}, (f"chat template: that of {whose}, which {count} of {len(first)} inputs have",)


def _taken(fetched: FetchedInput, stores: Stores, threads: Executor) -> Taken:
    listed = fetched.listed
    listing = Listing(tuple(listed.files.values()), listed.listing.folders)
    return small_files.take(listed.entry.uri, listing, stores, threads)


def _check_rows(files_from: str, base: bytes, chosen: bytes, rows: Collection[int]) -> None:
    """Refuse small files whose config implies another number of embedding rows than the output, the base's, has.

    rows: those of the base's matrices; where its config is wrong, another input's may be right.
    """
    ours, theirs = configs.rows(base), configs.rows(chosen)
    if None not in (ours, theirs) and ours != theirs and theirs not in rows:
        message = (
            f"the config.json of {files_from!r} says vocab_size {theirs}, and the output has the base's {ours} rows"
        )
        remedy = "write `files_from: base`: tokens beyond the base's rows have no embedding in the output"
        raise RecipeError(Problem("output.files_from", message, remedy))


# -- notes


def _choice(listed: ListedInput) -> list[str]:
    """Return a note on the model of a folder that the recipe chooses."""
    if not listed.chosen:
        return []
    aside = f"; left aside: {', '.join(sorted(listed.others))}" if listed.others else ""
    return [f"{listed.entry.uri}: the recipe chooses {listed.chosen}{aside}"]


def _notes_of_formats(inputs: Sequence[ReadModel], names: Mapping[str, str]) -> list[str]:
    """Return what formats note of their folders; inputs with the same note share it."""
    who: dict[str, list[Entry]] = {}
    for each in inputs:
        for note in each.contents.notes:
            who.setdefault(note.removeprefix(f"{each.entry.uri}: "), []).append(each.entry)
    return [
        f"{configs.named([names[entry.id] for entry in entries]) if len(entries) > 1 else entries[0].uri}: {note}"
        for note, entries in who.items()
    ]


def _idle_patterns(patterns: Sequence[str], parameters: Sequence[Parameter], models: Sequence[ReadModel]) -> list[str]:
    names = [parameter.name for parameter in parameters]
    names += [name for model in models for name in model.contents.excluded]
    idle = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    return [f"no tensor of base or models is called {pattern!r} (exclude)" for pattern in idle]


def _config_notes(fetched: Mapping[str, FetchedInput], names: Mapping[str, str], files_from: str) -> list[str]:
    texts = {name: fetched[id_].folder.texts.get(configs.CONFIG, b"") for id_, name in names.items()}
    whose = "the base's" if files_from in ("", BASE) else f"that of model {names[files_from]}"
    base = texts.pop(BASE)
    return configs.notes(base, [(name, text) for name, text in texts.items() if text], whose) if base else []


def _tokenizer_notes(
    fetched: Mapping[str, FetchedInput], names: Mapping[str, str], stores: Stores, threads: Executor
) -> list[str]:
    named = {id_: fetched[id_].listed.tokenizer._replace(id=name) for id_, name in names.items()}
    return tokenizers.notes(named.pop(BASE), list(named.values()), stores, threads)


def _comparing(num_bytes: int) -> list[str]:
    if num_bytes <= COMPARED_BYTES:
        return []
    return [f"{num_bytes:,} bytes of weights were read while planning, to tell equal tensors from different ones"]


def _unopened(listed: ListedInput, library: Library) -> list[str]:
    """Return a note where the output will lack what a library needs beside the weights."""
    if library.config in listed.files:
        return []
    message = f"{listed.entry.uri} has no {library.config}, so the output has none and no library can open it"
    return [f"{message}; output.files_from may name a model that has it"]
