"""What exists: every tensor of every input, with dtype, shape, file and byte range, from headers and configs alone."""

import fnmatch
import hashlib
import json
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import SerializerFunctionWrapHandler, ValidatorFunctionWrapHandler, WrapSerializer, WrapValidator

from ties_ray import plugins
from ties_ray.account import Account
from ties_ray.errors import InputError, Problem, RecipeError, printable
from ties_ray.formats import Folder, Format, Found, Rules
from ties_ray.formats.checkpoint import tied
from ties_ray.formats.lora import CONFIG as ADAPTER_CONFIG
from ties_ray.inputs import agreement, answers, configs, small_files, tokenizers
from ties_ray.inputs.constants import keep_dtypes
from ties_ray.inputs.expand import BASE, Entry, expand
from ties_ray.inputs.other_tools import problem as foreign_problem
from ties_ray.inputs.small_files import SmallFile
from ties_ray.inputs.tokenizers import Tokenizer, check_common_ids
from ties_ray.libraries import naming
from ties_ray.libraries.downloads import SNIFFED, UNFINISHED, mistaken, unfinished
from ties_ray.libraries.library import MODEL_INDEX, TRANSFORMERS, Library
from ties_ray.libraries.loaders import CARD_NAME, role
from ties_ray.libraries.weight_files import Candidate, candidates, choose, is_weights, listed, others
from ties_ray.outputs import DTYPES
from ties_ray.recipe.recipe import Recipe
from ties_ray.safetensors import MERGEABLE, Header, header_bytes, parse
from ties_ray.stores import Listing, Pin, Store, Stores, hub_name, hub_uri, scheme_of, shown
from ties_ray.tensors import Parameter, Source

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Model:
    """One input, pinned."""

    uri: str
    id: str
    """The entry's `id`, else its 0-based position in the expanded list; "base" for the base."""
    format: str
    objects: tuple[Pin, ...]
    sources: dict[str, Source]
    """By base parameter; a parameter that is missing here has delta zero (the recipe allowed it). Models that store
    theirs alike in one format, as fine-tunes of one base do, share one dictionary, in memory and in JSON."""
    weight: float = 1.0
    density: float | None = None
    licence: str = ""
    """From the front matter of its README; empty where it says none."""
    facts: dict[str, str] = field(default_factory=dict)
    """What its format tells of it: `base_name`, `task_type`, `rank`, ..."""
    account: Account = field(default_factory=Account)
    """What becomes of every element that it stores."""


def _write_models(models: Sequence[Model], write: SerializerFunctionWrapHandler) -> list[dict[str, object]]:
    """Return the JSON form of models; instead of sources written before it has the number of that model."""
    first: dict[int, int] = {}
    same = [first.setdefault(id(model.sources), number) for number, model in enumerate(models)]
    plain = write(tuple(model if same[n] == n else replace(model, sources={}) for n, model in enumerate(models)))
    return [one if same[n] == n else {**one, "sources": same[n]} for n, one in enumerate(plain)]


def _read_models(plain: Any, read: ValidatorFunctionWrapHandler) -> tuple[Model, ...]:
    """Return the models of a JSON form that `_write_models` has made; raise `ValueError` where it has not."""
    if not (isinstance(plain, Sequence) and all(isinstance(one, Mapping) for one in plain)):
        return tuple(read(plain))
    same = [one["sources"] if type(one.get("sources")) is int else n for n, one in enumerate(plain)]
    if any(first not in range(n + 1) or same[first] != first for n, first in enumerate(same)):
        raise ValueError("the sources of a model are said to be those of another that has none")
    models = read([one if same[n] == n else {**one, "sources": {}} for n, one in enumerate(plain)])
    return tuple(replace(model, sources=models[same[n]].sources) for n, model in enumerate(models))


@dataclass(frozen=True)
class Catalog:
    """All inputs of a merge, checked against each other."""

    base: Model
    """Without files or tensors where the recipe names none."""
    models: Annotated[tuple[Model, ...], WrapSerializer(_write_models), WrapValidator(_read_models)]
    parameters: tuple[Parameter, ...]
    """Of the base, in the order of its files and offsets; a tied alias of another parameter is not among them."""
    small_files: tuple[SmallFile, ...]
    """From the input that `output.files_from` names."""
    notes: tuple[str, ...]
    """What a reader of plan and result should know: differing tokenizers, ties, tensors left aside, weak pins."""
    refused: tuple[agreement.Refused, ...] = ()
    """Models that are left out although the recipe names them."""
    waiting: tuple[str, ...] = ()
    """Folders that are left for a later merge, and why."""
    library: Library = TRANSFORMERS
    """What opens the input that `output.files_from` names; a whole model is written under the names it looks for."""

    @property
    def facts(self) -> dict[str, str]:
        """Return what all models agree on; `base`, the base's URI if there is one, and `untied`, if its format says."""
        first, *others = (model.facts for model in self.models)
        shared = {key: value for key, value in first.items() if all(one.get(key) == value for one in others)}
        untied = {key: value for key, value in self.base.facts.items() if key == "untied"}
        return {**shared, "base": hub_name(self.base.uri), **untied} if self.base.uri else shared


HEAD_BYTES = 256 * 2**10
"""Fetched of a weight file at first; the header of 1000 tensors has about 100 KB."""
LARGE_HEADER = 8 * 2**20
"""Of headers above this one is read and parsed at a time: 32 of the largest would take gigabytes."""
_LARGE = threading.Lock()
TEXT_BYTES = 16 * 2**20
"""Largest config or index that is read."""
COMPARED_BYTES = 16 * 2**20
"""Read to compare tensors without a note that says so."""
README_BYTES = 64 * 2**10
"""Fetched of a README, for its front matter."""
HASH_BYTES = 16 * 2**20
"""Read at a time where a SHA-256 is verified."""
THREADS = 32
"""Requests in flight; what is waited for is the storage's latency."""

README = CARD_NAME

_PICKLES = ("holds its weights as pickles, which can run code when opened", "save it as safetensors (save_pretrained)")
_FOREIGN = {
    "*.gguf": ("holds GGUF files, which are made for inference", "give the original safetensors checkpoint"),
    **dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.ckpt"), _PICKLES),
}
"""What is wrong with a folder of no known format, and the remedy, by the first pattern that a file of it matches."""
_TRAINED = {
    "pytorch_model_fsdp_*": (
        "holds the sharded state of a training with FSDP",
        "`accelerate merge-weights FOLDER OUTPUT` makes safetensors of it",
    ),
    "*.distcp": (
        "holds the sharded state of a distributed training",
        "`accelerate merge-weights FOLDER OUTPUT` makes safetensors of it",
    ),
    "global_step*": (
        "holds the state of a training with DeepSpeed",
        "`python zero_to_fp32.py . OUTPUT --safe_serialization` in it makes safetensors of it",
    ),
}
"""The same for what is no model yet, by file or folder."""


def read_catalog(recipe: Recipe, stores: Stores) -> Catalog:
    """Return all inputs of a recipe, pinned and checked against each other; no weight is read.

    One listing a folder, one request a weight file (a second for a header above `HEAD_BYTES`), index, config and
    README; tokenizer files where their pins differ. Only a file that the recipe pins by `sha256` is read whole.
    Raises `InputError` with everything that is wrong with the inputs, `RecipeError` for what the recipe contradicts.
    """
    threads = ThreadPoolExecutor(THREADS)
    try:
        return _read_catalog(recipe, stores, threads)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # after an error or a signal nobody waits for the rest


def _read_catalog(recipe: Recipe, stores: Stores, threads: Executor) -> Catalog:
    everything, noted, waiting = expand(recipe, stores, threads)
    rules = _rules(recipe)
    folders, problems = fetch(everything, stores, threads)
    read: dict[str, agreement.Read] = {}
    base: dict[str, Parameter] = {}
    num_compared = 0
    of_base = {BASE: folders[BASE]} if BASE in folders else {}
    of_models = {name: one for name, one in folders.items() if name != BASE}
    for some in (of_base, of_models):  # the base comes first: the models are checked against it
        if problems[BASE]:
            break
        known = base if recipe.base and some is of_models else None
        made, num_bytes = read_folders(some, of_base.get(BASE), known, rules, stores, threads)
        num_compared += num_bytes
        for name, found in made.items():
            looked = some[name][0]
            read[name] = agreement.Read(looked.entry, looked.format, found)
            problems[name] += found.problems
        if BASE in made and not looked.format.whole:
            what = f"is no whole model: its format is {looked.format.name}"
            problems[BASE].append(
                Problem(f"base: {looked.entry.uri}", what, "name the model that the adapters were made for")
            )
        if BASE in made and not problems[BASE]:
            base = {name: _parameter(name, source, rules) for name, source in made[BASE].sources.items()}
            rules = _named(rules, some[BASE][1], base)
    base = agreement.untie(base, read)
    read = agreement.named(recipe, read)
    others = [one for one in read.values() if one.entry.id != BASE]
    for name, problem in (*agreement.disagreements(recipe, others), *agreement.unmerged(base, others)):
        problems[name].append(problem)
    entries, refused = agreement.drop(recipe, everything, problems)
    models = [read[entry.id] for entry in entries if entry.id != BASE]
    parameters = agreement.parameters(base, models)

    tokenizer = folders[BASE][0].tokenizer if BASE in folders else None
    theirs = [folders[one.entry.id][0].tokenizer for one in models]
    checks = [
        (tokenizer, other, _rows(base, one.found.extra_rows), stores)
        for one, other in zip(models, theirs, strict=True)
        if tokenizer and one.found.extra_rows
    ]
    wrong = [problem for many in threads.map(lambda check: check_common_ids(*check), checks) for problem in many]
    pinned, pins_wrong = _pins_by_hand(entries, read, stores, threads)
    if wrong or pins_wrong:
        raise InputError(wrong + pins_wrong)

    files_from = _files_from(recipe, entries, refused) if recipe.output.reads_base else ""
    if files_from:
        own, chosen = (folders[id_][1].texts.get(configs.CONFIG, b"") for id_ in (BASE, files_from))
        _check_rows(files_from, own, chosen, {one.shape[0] for one in parameters if len(one.shape) == 2})
    taken, aside = _small_files(folders, files_from, models, stores, threads) if files_from else ((), ())
    leftovers = read[files_from].found.leftovers if files_from else ()
    taken = tuple(replace(one, without=leftovers) if one.name == configs.CONFIG else one for one in taken)
    kept: list[str] = []
    if recipe.output.reads_base and recipe.output.dtype:
        asked = DTYPES[recipe.output.dtype]
        parameters, kept = keep_dtypes(parameters, read[BASE].found, read[BASE].format, asked, stores, threads)
    same: dict[Hashable, dict[str, Source]] = {}
    inputs = [_model(*folders[entry.id], read[entry.id].found, same) for entry in entries]
    notes = [
        *noted,
        *(f"{one.entry.uri}: {note}" for entry in entries for one in [folders[entry.id][0]] for note in _choice(one)),
        *(f"left out, as allowed: {problem}" for one in refused for problem in one.problems),
        *_own_notes([read[entry.id] for entry in entries]),
        *_idle(recipe.exclude, parameters, [one.found for one in models]),
        *(_config_notes(folders, [one.entry.id for one in models], files_from) if BASE in folders else ()),
        *kept,
        *_weak_pins(inputs),
        *pinned,
        *_compared(num_compared),
        *(tokenizers.notes(tokenizer, theirs, stores, threads) if tokenizer else ()),
        *aside,
    ]
    if recipe.base is None:
        inputs.insert(0, Model("", BASE, "", (), {}))
    library = read[files_from].found.library if files_from else TRANSFORMERS
    if files_from and recipe.output.kind == "checkpoint":
        notes += _unopened(folders[files_from][0], library)
    return Catalog(inputs[0], tuple(inputs[1:]), parameters, taken, tuple(notes), refused, waiting, library)


def _unopened(looked: "Looked", library: Library) -> list[str]:
    """Return a note where the output will lack what a library needs beside the weights."""
    if library.config in looked.files:
        return []
    what = f"{looked.entry.uri} has no {library.config}, so the output has none and no library can open it"
    return [f"{what}; output.files_from may name a model that has it"]


def _choice(looked: "Looked") -> list[str]:
    """Return a note on the model of a folder that the recipe chooses."""
    if not looked.chosen:
        return []
    aside = f"; left aside: {', '.join(sorted(looked.others))}" if looked.others else ""
    return [f"the recipe chooses {looked.chosen}{aside}"]


def _rules(recipe: Recipe) -> Rules:
    allow = recipe.allow
    return Rules(
        exclude=recipe.exclude,
        missing=allow.missing == "zero",
        extra_rows=allow.extra_rows == "drop",
        saved_modules=allow.saved_modules == "merge",
    )


def _named(rules: Rules, folder: Folder, base: Collection[str]) -> Rules:
    """Return the rules with what the base's config tells of names; its format has refused what is no object."""
    config = json.loads(folder.texts.get("config.json", b"{}"))
    return rules._replace(kinds=naming.kinds_of(config), tied=tuple(tied(base, config)))


class Looked(NamedTuple):
    """An input whose folder was listed."""

    entry: Entry
    listing: Listing
    format: Format
    chosen: str = ""
    """The candidate that the recipe chooses."""
    others: frozenset[str] = frozenset()
    """Files of the candidates that it does not choose."""
    nested: tuple[str, ...] = ()
    """Of an adapter: the folders in it that hold adapters too, as PEFT saves several of one model."""

    @property
    def files(self) -> dict[str, Pin]:
        """Return the pins by file name, without what belongs to a model of the folder that was not chosen."""
        return {name: pin for pin in self.listing.files if (name := _name(pin.uri)) not in self.others}

    @property
    def tokenizer(self) -> Tokenizer:
        """Return what is needed to compare its tokens."""
        return Tokenizer(self.entry.id, self.entry.uri, self.files)


def fetch(
    entries: Sequence[Entry], stores: Stores, threads: Executor
) -> tuple[dict[str, tuple[Looked, Folder]], defaultdict[str, list[Problem]]]:
    """Return, by id, every input whose headers and texts could be fetched, and what is wrong with the others."""
    formats = [plugins.load("formats", name, Format)() for name in plugins.names("formats")]
    problems: defaultdict[str, list[Problem]] = defaultdict(list)
    tried = [(entry.id, entry) for entry in entries]
    looked = list(_gather(lambda entry: _look(entry, formats, stores), tried, threads, problems).values())
    jobs: list[tuple[str, tuple[Pin, Callable[[Store, Pin], tuple[Pin, Header | bytes]]]]] = []
    for one in looked:
        weights, texts = one.format.wanted(list(one.files))
        for name in weights:
            if half := unfinished(name, one.files):
                what = f"is not downloaded to its end: {half} lies beside it"
                problems[one.entry.id].append(Problem(one.files[name].uri, what, "complete the download", "download"))
        front = [README] if README in one.files else []
        for fetched, names in ((_header, weights), (_text, texts), (_front, front)):
            jobs += [(one.entry.id, (one.files[name], fetched)) for name in names]
    got = _gather(lambda job: job[1](stores.of(job[0].uri), job[0]), jobs, threads, problems)
    contents: dict[str, dict[str, tuple[Pin, Header | bytes]]] = {one.entry.id: {} for one in looked}
    for number, content in got.items():
        owner, (pin, _) = jobs[number]
        contents[owner][_name(pin.uri)] = content
    sound = [one for one in looked if not problems[one.entry.id]]
    return {one.entry.id: (one, _folder(one, contents[one.entry.id])) for one in sound}, problems


def read_folders(
    folders: Mapping[str, tuple[Looked, Folder]],
    of_base: tuple[Looked, Folder] | None,
    base: Mapping[str, Parameter] | None,
    rules: Rules,
    stores: Stores,
    threads: Executor,
) -> tuple[dict[str, Found], int]:
    """Return, by id, what each folder's format made of it, and how many bytes were read to answer the formats.

    of_base: the base's folder, where a question may be about its tensors. base: as `Format.read` has it.
    """
    foreign = {name: problem for name, (_, folder) in folders.items() if (problem := foreign_problem(folder))}
    asked: list[answers.Inquiry] = []
    for name, (looked, folder) in folders.items():
        questions = () if name in foreign else looked.format.questions(folder, base, rules)
        if questions:
            theirs = answers.stored(of_base[1], of_base[0].format) if of_base else {}
            asked += answers.inquiries(name, questions, answers.stored(folder, looked.format), theirs)
    told = answers.answer(asked, stores, threads)
    made: dict[str, Found] = {}
    for name, (looked, folder) in folders.items():
        wrong = told.problems.get(name) or ([foreign[name]] if name in foreign else [])
        answered = replace(folder, answers=told.same.get(name, {}))
        made[name] = Found(problems=tuple(wrong)) if wrong else looked.format.read(answered, base, rules)
    return made, told.num_bytes


def _folder(looked: Looked, fetched: Mapping[str, tuple[Pin, Header | bytes]]) -> Folder:
    return Folder(
        uri=looked.entry.uri,
        files=tuple(fetched[name][0] if name in fetched else pin for name, pin in looked.files.items()),
        headers={name: content for name, (_, content) in fetched.items() if isinstance(content, Header)},
        texts={name: content for name, (_, content) in fetched.items() if isinstance(content, bytes)},
        chosen=looked.chosen,
        nested=looked.nested,
    )


def _gather(
    function: Callable[[T], R],
    jobs: Sequence[tuple[str, T]],
    threads: Executor,
    problems: defaultdict[str, list[Problem]],
) -> dict[int, R]:
    """Return, by its number, what `function` makes of each (id, job), many at a time; what is wrong, by its id."""

    def attempt(job: tuple[str, T]) -> R | InputError:
        try:
            return function(job[1])
        except InputError as error:
            return error

    made = {}
    for number, ((owner, _), result) in enumerate(zip(jobs, threads.map(attempt, jobs), strict=True)):
        if isinstance(result, InputError):
            problems[owner] += result.problems
        else:
            made[number] = result
    return made


def _look(entry: Entry, formats: Sequence[Format], stores: Stores) -> Looked:
    """List a folder and find its format; raise `InputError` with advice where there is none."""
    uri = hub_uri(entry.uri)
    store = stores.of(uri)
    found = replace(entry, uri=store.resolve(uri))  # workers have other working directories, and branches move
    try:
        listing = store.list(found.uri)
    except InputError:
        if _is_file(entry.uri, store):
            raise InputError(_unrecognised(entry, Listing((), ()), store)) from None
        raise
    names = [_name(pin.uri) for pin in listing.files]
    every = candidates(names)
    kept = choose(every, entry.file, entry.variant) if entry.file or entry.variant else None
    if kept is None and (entry.file or entry.variant):
        raise InputError(_no_candidate(entry, every))
    aside = others(every, kept) if kept else frozenset[str]()
    left = [name for name in names if name not in aside]
    pipeline = MODEL_INDEX in names and not kept
    for known in formats:
        if not pipeline and known.recognises(left):
            nested = () if known.whole else tuple(_adapters_in(listing, store))
            return Looked(found, listing, known, kept.name if kept else "", aside, nested)
    raise InputError(_unrecognised(entry, listing, store))


def _adapters_in(listing: Listing, store: Store) -> Iterator[str]:
    """Yield the folders of a listing that hold an adapter of their own; those of a training's states are not listed."""
    for uri in listing.folders:
        own = not _name(uri).startswith((".", "checkpoint-"))
        if own and any(_name(pin.uri) == ADAPTER_CONFIG for pin in store.list(uri).files):
            yield uri


def _no_candidate(entry: Entry, every: Sequence[Candidate]) -> Problem:
    """Say that the recipe chooses a model which the folder does not have."""
    asked = ", ".join(f"{key} {value!r}" for key, value in (("file", entry.file), ("variant", entry.variant)) if value)
    remedy = f"it has {listed(every)}" if every else "it holds no safetensors file"
    return Problem(f"{entry.place}: {entry.uri}", f"has no model, or several, of the {asked}", remedy, "candidates")


def _unrecognised(entry: Entry, listing: Listing, store: Store) -> Problem:
    """Say why a folder is no model, and what to do."""
    names = [_name(pin.uri) for pin in listing.files]
    folders = [_name(uri) for uri in listing.folders if not _name(uri).startswith(".")]
    where = f"{entry.place}: {entry.uri}"
    if MODEL_INDEX in names:
        return _pipeline(where, entry.uri, listing, store)
    for pattern, (what, remedy) in _FOREIGN.items():
        if own := [name for name in fnmatch.filter(names, pattern) if role(name) != "training"]:
            return Problem(where, f"{what} ({_few(own)})", remedy)
    for pattern, (what, remedy) in _TRAINED.items():
        if own := fnmatch.filter([*names, *folders], pattern):
            return Problem(where, f"{what} ({_few(own)})", remedy)
    adapters = list(_adapters_in(listing, store))
    if adapters and not any(map(is_weights, names)):
        what = f"holds no adapter itself, but {len(adapters)} in its folders ({_few([_name(uri) for uri in adapters])})"
        return Problem(where, what, f"write {adapters[0]} for one of them, or {entry.uri}/* for all", "nested")
    if folders and not names:
        return Problem(where, f"holds only folders ({_few(folders)})", "name one of them")
    if names:
        remedy = "give the folder with the model's weights"
        if folders:
            remedy += f"; it may be one of those inside ({_few(folders)})"
        if half := [name for name in names if name.endswith(UNFINISHED)]:
            remedy = f"complete the download: {_few(half)} is not finished"
        return Problem(where, f"holds no safetensors file ({_few(names)})", remedy)
    if _is_file(entry.uri, store):
        folder, _, name = entry.uri.rpartition("/")
        which = f": {{path: {folder or '.'}, file: {name}}}" if is_weights(name) else ""
        return Problem(where, "is a file", f"give the folder that holds it{which}")
    remedy = (
        f"check the path, and that it may be listed; an empty folder that a glob found: `not: [{_name(entry.uri)}]`"
    )
    return Problem(where, "there is nothing", remedy)


def _pipeline(where: str, uri: str, listing: Listing, store: Store) -> Problem:
    """Say that a folder is a pipeline of several models, and which of its folders are models."""
    parts = [_name(uri) for uri in listing.folders if any(is_weights(_name(pin.uri)) for pin in store.list(uri).files)]
    single = candidates([_name(pin.uri) for pin in listing.files])
    what = f"is a pipeline of diffusers; its models are {', '.join(parts) or 'not stored as safetensors'}"
    remedy = f"merge one of them, as in {uri}/{parts[0]}, for base and models" if parts else "save it as safetensors"
    if single:
        remedy += f"; or a single file beside them: {listed(single)}"
    return Problem(where, what, remedy, "pipeline")


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:4])) + ", ..." * (len(names) > 4)


def _is_file(uri: str, store: Store) -> bool:
    try:
        store.head(uri, 1)
    except (FileNotFoundError, InputError):
        return False
    return True


def _header(store: Store, listed: Pin) -> tuple[Pin, Header]:
    """Return a weight file's full pin and header."""
    pin, head = store.head_listed(listed, HEAD_BYTES)
    where = shown(pin.uri)
    if head[8:9] != b"{" and (other := mistaken(head[:SNIFFED], pin.size)):
        raise InputError(Problem(where, *other, "download"))
    size = header_bytes(head, pin.size, where)
    with _LARGE if size > LARGE_HEADER else nullcontext():
        if size > len(head):
            whole = bytearray(size)
            whole[: len(head)] = head
            store.read(pin, len(head), memoryview(whole)[len(head) :])
            head = bytes(whole)
        return pin, parse(head, pin.size, where)


def _text(store: Store, listed: Pin) -> tuple[Pin, bytes]:
    pin, data = store.head_listed(listed, TEXT_BYTES)
    if pin.size > TEXT_BYTES:
        what = f"has {pin.size:,} bytes, and at most {TEXT_BYTES:,} were expected"
        raise InputError(Problem(shown(pin.uri), what, "check that this is the right file"))
    if other := mistaken(data[:SNIFFED], pin.size, text=True):
        raise InputError(Problem(shown(pin.uri), *other, "download"))
    return pin, data


def _front(store: Store, listed: Pin) -> tuple[Pin, bytes]:
    return store.head_listed(listed, README_BYTES)


def _parameter(name: str, source: Source, rules: Rules) -> Parameter:
    tensor = source.tensors[0]
    return Parameter(name, tensor.shape, tensor.dtype, tensor.dtype in MERGEABLE and not rules.excludes(name))


def _model(looked: Looked, folder: Folder, found: Found, known: dict[Hashable, dict[str, Source]]) -> Model:
    entry = looked.entry
    return Model(
        uri=entry.uri,
        id=entry.id,
        format=looked.format.name,
        objects=found.objects,
        sources=known.setdefault((looked.format.name, *found.sources.items()), dict(found.sources)),
        weight=entry.weight,
        density=entry.density,
        licence=licence_of(folder.texts.get(README, b"")),
        facts=dict(found.facts),
        account=found.account,
    )


def licence_of(readme: bytes) -> str:
    """Return the licence that the front matter of a model card names, with its own name and link if it has them."""
    front = re.match(r"---[^\S\n]*\n(.*?)\n---", readme.decode(errors="replace").replace("\r\n", "\n"), re.DOTALL)
    if not front:
        return ""
    given: dict[str, str] = {}
    # A plain scalar or a list; a YAML parser takes 10 ms for the widgets of one card.
    for key, scalar, items in re.findall(r"^(license\w*):[ \t]*(.*)((?:\n[ \t]*- .*)*)", front[1], re.MULTILINE):
        values = [scalar, *(item.strip().removeprefix("- ") for item in items.split("\n"))]
        given[key] = ", ".join(value.strip(" '\"[]") for value in values if value.strip())
    return " ".join(given[key] for key in ("license", "license_name", "license_link") if given.get(key))


def _rows(parameters: Mapping[str, Parameter], names: Sequence[str]) -> int:
    return max(parameters[name].shape[0] for name in names)


def _pins_by_hand(
    entries: Sequence[Entry], read: Mapping[str, agreement.Read], stores: Stores, threads: Executor
) -> tuple[list[str], list[Problem]]:
    """Verify the versions and hashes that the recipe gives; return notes and problems."""
    notes: list[str] = []
    problems: defaultdict[str, list[Problem]] = defaultdict(list)
    jobs: list[tuple[str, tuple[Pin, str]]] = []
    for entry in entries:
        pins = {_name(pin.uri): pin for pin in read[entry.id].found.objects}
        strange = sorted({*entry.sha256, *entry.version_id} - pins.keys())
        if strange:
            what = f"pins {', '.join(strange)}, its weight files are {', '.join(pins)}"
            problems[entry.id].append(Problem(entry.place, what))
        for name, version in entry.version_id.items():
            if name in pins and pins[name].version != version:
                what = f"is at version {pins[name].version or 'none'}, the recipe pins {version}"
                remedy = "restore that version, or pin the current one"
                problems[entry.id].append(Problem(shown(pins[name].uri), what, remedy))
        jobs += [(entry.id, (pins[name], wanted)) for name, wanted in entry.sha256.items() if name in pins]
    if jobs:
        size = sum(pin.size for _, (pin, _) in jobs)
        notes.append(f"{len(jobs)} files pinned by sha256 were read whole while planning: {size:,} bytes")
    _gather(lambda job: _verify(stores.of(job[0].uri), *job), jobs, threads, problems)
    return notes, [problem for many in problems.values() for problem in many]


def _verify(store: Store, pin: Pin, wanted: str) -> None:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(HASH_BYTES, pin.size)))
    for start in range(0, pin.size, HASH_BYTES):
        piece = buffer[: min(HASH_BYTES, pin.size - start)]
        store.read(pin, start, piece)
        digest.update(piece)
    if digest.hexdigest() != wanted.lower():
        what = f"has the SHA-256 {digest.hexdigest()}, the recipe pins {wanted}"
        raise InputError(Problem(shown(pin.uri), what, "use the file that was pinned, or pin this one"))


def _files_from(recipe: Recipe, entries: Sequence[Entry], refused: Sequence[agreement.Refused]) -> str:
    """Return the id of the input that `output.files_from` names by id or path."""
    wanted = recipe.output.files_from
    for entry in entries:
        if wanted == entry.id or wanted.rstrip("/") == entry.uri:
            return entry.id
    for model in refused:
        if wanted == model.id or wanted.rstrip("/") == model.uri:
            what = f"{wanted!r} is left out of the merge: {model.problems[0].what}"
            raise RecipeError(Problem("output.files_from", what, "write `base`, or a model that is merged"))
    what = f"{wanted!r} is neither the id nor the path of an input"
    raise RecipeError(Problem("output.files_from", what, "write `base`, or a model's id, position or path"))


def _small_files(
    folders: Mapping[str, tuple[Looked, Folder]],
    files_from: str,
    models: Sequence[agreement.Read],
    stores: Stores,
    threads: Executor,
) -> tuple[tuple[SmallFile, ...], tuple[str, ...]]:
    """Return what the output takes over from an input beside its weights, and what a reader should know of it."""
    looked = folders[files_from][0]
    listing = Listing(tuple(looked.files.values()), looked.listing.folders)
    taken = small_files.take(looked.entry.uri, listing, stores, threads)
    others = {one.entry.id: one.entry.uri for one in models if one.entry.id != files_from and one.format.whole}
    differing = small_files.differing_modules(taken.files, others, stores, threads)
    return taken.files, (*taken.notes, *differing)


def _own_notes(inputs: Sequence[agreement.Read]) -> list[str]:
    """Return what formats note of their folders; what they note of several alike, once."""
    who: dict[str, list[agreement.Read]] = {}
    for one in inputs:
        for note in one.found.notes:
            who.setdefault(note.removeprefix(f"{one.entry.uri}: "), []).append(one)
    return [
        f"{configs.named([one.entry.id for one in alike])}: {note}"
        if len(alike) > 1
        else f"{alike[0].entry.uri}: {note}"
        for note, alike in who.items()
    ]


def _config_notes(folders: Mapping[str, tuple[Looked, Folder]], models: Sequence[str], files_from: str) -> list[str]:
    texts = {id_: folders[id_][1].texts.get(configs.CONFIG, b"") for id_ in (BASE, *models)}
    whose = "the base's" if files_from in ("", BASE) else f"that of model {files_from}"
    return configs.notes(texts[BASE], [(id_, texts[id_]) for id_ in models if texts[id_]], whose) if texts[BASE] else []


def _check_rows(files_from: str, base: bytes, chosen: bytes, rows: Collection[int]) -> None:
    """Refuse small files whose config implies another number of embedding rows than the output, the base's, has.

    rows: of the base's matrices; where its config is wrong, another input's may be right.
    """
    ours, theirs = configs.rows(base), configs.rows(chosen)
    if None not in (ours, theirs) and ours != theirs and theirs not in rows:
        what = f"the config.json of {files_from!r} says vocab_size {theirs}, and the output has the base's {ours} rows"
        remedy = "write `files_from: base`: tokens beyond the base's rows have no embedding in the output"
        raise RecipeError(Problem("output.files_from", what, remedy))


def _idle(patterns: Sequence[str], parameters: Sequence[Parameter], models: Sequence[Found]) -> list[str]:
    names = [parameter.name for parameter in parameters] + [name for one in models for name in one.excluded]
    idle = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    return [f"no tensor of base or models is called {pattern!r} (exclude)" for pattern in idle]


def _compared(num_bytes: int) -> list[str]:
    if num_bytes <= COMPARED_BYTES:
        return []
    return [f"{num_bytes:,} bytes of weights were read while planning, to tell equal tensors from different ones"]


def _weak_pins(models: Sequence[Model]) -> list[str]:
    """Say where a read can't be tied to the planned content."""
    weak = Counter(scheme_of(pin.uri) for model in models for pin in model.objects if not pin.etag)
    return [
        f"{count} files under {scheme}:// are pinned by their size alone: a change that keeps it goes unseen"
        for scheme, count in sorted(weak.items())
    ]


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]
