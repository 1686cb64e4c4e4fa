"""Lists input folders, finds the format of each, and fetches its headers and small texts; no weight is read."""

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import NamedTuple, TypeVar

from ties_ray import plugins
from ties_ray.errors import InputError, Problem, RecipeError
from ties_ray.formats import Contents, Folder, Format, Rules
from ties_ray.inputs import answers
from ties_ray.inputs.expand import Entry
from ties_ray.inputs.other_tools import problem as problem_of_another_tool
from ties_ray.inputs.tokenizers import Tokenizer
from ties_ray.inputs.unrecognised import adapters_in, is_file, no_candidate, unrecognised
from ties_ray.libraries.downloads import SNIFFED, mistaken, unfinished
from ties_ray.libraries.library import MODEL_INDEX
from ties_ray.libraries.loaders import CARD_NAME
from ties_ray.libraries.weight_files import candidates, choose, others
from ties_ray.safetensors import Header, header_bytes, parse
from ties_ray.stores import Listing, Pin, Store, Stores, hub_uri, last_part, scheme_of, shown
from ties_ray.tensors import Parameter

T = TypeVar("T")
R = TypeVar("R")

HEAD_BYTES = 256 * 2**10
"""The first request of a weight file asks for so many bytes; the header of 1000 tensors has about 100 KB."""
LARGE_HEADER = 8 * 2**20
"""Headers with more bytes than this are read and parsed one at a time: 32 of the largest would take gigabytes."""
_LARGE = threading.Lock()
TEXT_BYTES = 16 * 2**20
"""The most bytes of a config or an index that is read."""
README_BYTES = 64 * 2**10
"""The first bytes of a README, which hold its front matter."""
README = CARD_NAME

Problems = defaultdict[str, list[Problem]]
"""Problems by the id of the input."""


class ListedInput(NamedTuple):
    """An input whose folder is listed."""

    entry: Entry
    listing: Listing
    format: Format
    chosen: str = ""
    """The candidate that the recipe chooses."""
    others: frozenset[str] = frozenset()
    """Files of the candidates that it does not choose."""
    nested: tuple[str, ...] = ()
    """The folders inside an adapter that hold adapters too, as PEFT saves several of one model."""

    @property
    def files(self) -> dict[str, Pin]:
        """Return the pins by file name, without those of candidates that the recipe does not choose."""
        return {name: pin for pin in self.listing.files if (name := last_part(pin.uri)) not in self.others}

    @property
    def tokenizer(self) -> Tokenizer:
        """Return what is needed to compare its tokens."""
        return Tokenizer(self.entry.id, self.entry.uri, self.files)


class FetchedInput(NamedTuple):
    """An input whose headers and texts are here."""

    listed: ListedInput
    folder: Folder


EarlierInputs = dict[Hashable, FetchedInput]
"""Inputs that are fetched, whatever their ids and numbers: further recipes take them as they were then."""


def fetch(
    entries: Sequence[Entry],
    stores: Stores,
    threads: Executor,
    formats: Sequence[Format] = (),
    earlier: EarlierInputs | None = None,
) -> tuple[dict[str, FetchedInput], Problems]:
    """Return, by id, every input whose headers and texts could be fetched, and the problems of the others.

    formats: those that a folder may have; by default those of models. earlier: what calls before this one have fetched
    is taken from there, and what this one fetches is added.
    """
    formats, earlier = formats or _formats_of_models(), {} if earlier is None else earlier
    problems: Problems = defaultdict(list)
    again = {entry.id: _renamed(earlier[_place(entry)], entry) for entry in entries if _place(entry) in earlier}
    asked = [(entry.id, entry) for entry in entries if entry.id not in again]
    listings = _listed_together([entry.uri for _, entry in asked], stores)
    inputs = list(gather(lambda entry: _list(entry, formats, stores, listings), asked, threads, problems).values())
    jobs: list[tuple[str, tuple[Pin, Callable[[Store, Pin], tuple[Pin, Header | bytes]]]]] = []
    for each in inputs:
        weights, texts = each.format.wanted(list(each.files))
        for name in weights:
            if half := unfinished(name, each.files):
                message = f"is not downloaded to its end: {half} lies beside it"
                problems[each.entry.id].append(
                    Problem(each.files[name].uri, message, "complete the download", "download")
                )
        front = [README] if README in each.files else []
        for function, names in ((_header, weights), (_text, texts), (_front, front)):
            jobs += [(each.entry.id, (each.files[name], function)) for name in names]
    fetched = gather(lambda job: job[1](stores.of(job[0].uri), job[0]), jobs, threads, problems)
    contents: dict[str, dict[str, tuple[Pin, Header | bytes]]] = {each.entry.id: {} for each in inputs}
    for number, content in fetched.items():
        owner, (pin, _) = jobs[number]
        contents[owner][last_part(pin.uri)] = content
    sound = [each for each in inputs if not problems[each.entry.id]]
    made = {each.entry.id: FetchedInput(each, _folder(each, contents[each.entry.id])) for each in sound}
    earlier |= {_place(entry): made[entry.id] for entry in entries if entry.id in made}
    every = {**again, **made}
    return {entry.id: every[entry.id] for entry in entries if entry.id in every}, problems


def _place(entry: Entry) -> Hashable:
    return entry.uri, entry.file, entry.variant


def _renamed(fetched: FetchedInput, entry: Entry) -> FetchedInput:
    """Return what is fetched of an input for another entry of the same place."""
    entry = replace(entry, uri=fetched.listed.entry.uri)
    return fetched._replace(listed=fetched.listed._replace(entry=entry))


def _formats_of_models() -> list[Format]:
    formats = [plugins.load("formats", name, Format)() for name in plugins.names("formats")]
    return [form for form in formats if form.is_model]


def read_folders(
    inputs: Mapping[str, FetchedInput],
    of_base: FetchedInput | None,
    base: Mapping[str, Parameter] | None,
    rules: Rules,
    stores: Stores,
    threads: Executor,
) -> tuple[dict[str, Contents], int]:
    """Return, by id, what each input's format makes of its folder, and how many bytes the formats' questions cost.

    of_base: the base, where a question may be about its tensors. base: its parameters, as `Format.read` takes them.
    """
    refused = {id_: problem for id_, (_, folder) in inputs.items() if (problem := problem_of_another_tool(folder))}
    asked: list[answers.Inquiry] = []
    base_tensors = answers.stored(of_base.folder, of_base.listed.format) if of_base else {}
    for id_, (listed, folder) in inputs.items():
        questions = () if id_ in refused else listed.format.questions(folder, base, rules)
        if questions:
            asked += answers.inquiries(id_, questions, answers.stored(folder, listed.format), base_tensors)
    answered = answers.answer(asked, stores, threads)
    contents: dict[str, Contents] = {}
    for id_, (listed, folder) in inputs.items():
        problems = answered.problems.get(id_) or ([refused[id_]] if id_ in refused else [])
        with_answers = replace(folder, answers=answered.same.get(id_, {}))
        contents[id_] = (
            Contents(problems=tuple(problems)) if problems else listed.format.read(with_answers, base, rules)
        )
    return contents, answered.num_bytes


def gather(
    function: Callable[[T], R], jobs: Sequence[tuple[str, T]], threads: Executor, problems: Problems
) -> dict[int, R]:
    """Run `function` on every (id, job), many at a time; return the results by the job's number.

    An `InputError` of a job adds its problems under the job's id, and the job has no result.
    """

    def attempt(job: tuple[str, T]) -> R | InputError:
        try:
            return function(job[1])
        except InputError as error:
            return error

    results = {}
    for number, ((owner, _), result) in enumerate(zip(jobs, threads.map(attempt, jobs), strict=True)):
        if isinstance(result, InputError):
            problems[owner] += result.problems
        else:
            results[number] = result
    return results


def _listed_together(uris: Sequence[str], stores: Stores) -> dict[str, Listing]:
    """Return the listings of those folders that are listed by fewer requests than one each, by URI."""
    by_scheme: defaultdict[str, list[str]] = defaultdict(list)
    for uri in uris:
        by_scheme[scheme_of(uri)].append(uri)
    listings: dict[str, Listing] = {}
    for alike in by_scheme.values():
        with suppress(InputError, RecipeError):  # the folder around them may be forbidden; each folder tells its own
            listings |= stores.of(alike[0]).list_each(alike)
    return listings


def _list(entry: Entry, formats: Sequence[Format], stores: Stores, listings: Mapping[str, Listing]) -> ListedInput:
    """List a folder and find its format; raise `InputError` with advice where there is none.

    listings: those that are there already, by URI.
    """
    uri = hub_uri(entry.uri)
    store = stores.of(uri)
    resolved = replace(entry, uri=store.resolve(uri))  # workers have other working directories, and branches move
    try:
        listing = listings.get(entry.uri) or store.list(resolved.uri)
    except InputError:
        if is_file(entry.uri, store):
            raise InputError(unrecognised(entry, Listing((), ()), store)) from None
        raise
    names = [last_part(pin.uri) for pin in listing.files]
    models = candidates(names)
    kept = choose(models, entry.file, entry.variant) if entry.file or entry.variant else None
    if kept is None and (entry.file or entry.variant):
        raise InputError(no_candidate(entry, models))
    aside = others(models, kept) if kept else frozenset[str]()
    left = [name for name in names if name not in aside]
    if MODEL_INDEX not in names or kept:  # else it is a pipeline of several models
        for form in formats:
            if form.recognises(left):
                nested = () if form.whole else tuple(adapters_in(listing, store))
                return ListedInput(resolved, listing, form, kept.name if kept else "", aside, nested)
    raise InputError(unrecognised(entry, listing, store))


def _folder(listed: ListedInput, fetched: Mapping[str, tuple[Pin, Header | bytes]]) -> Folder:
    return Folder(
        uri=listed.entry.uri,
        files=tuple(fetched[name][0] if name in fetched else pin for name, pin in listed.files.items()),
        headers={name: content for name, (_, content) in fetched.items() if isinstance(content, Header)},
        texts={name: content for name, (_, content) in fetched.items() if isinstance(content, bytes)},
        chosen=listed.chosen,
        nested=listed.nested,
    )


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
        message = f"has {pin.size:,} bytes, and at most {TEXT_BYTES:,} were expected"
        raise InputError(Problem(shown(pin.uri), message, "check that this is the right file"))
    if other := mistaken(data[:SNIFFED], pin.size, text=True):
        raise InputError(Problem(shown(pin.uri), *other, "download"))
    return pin, data


def _front(store: Store, listed: Pin) -> tuple[Pin, bytes]:
    return store.head_listed(listed, README_BYTES)
