"""Inspection of input folders before any recipe: formats, tensors, files, reasons to refuse them, and pools."""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

from ties_ray.errors import Problem
from ties_ray.formats import Contents, Folder, Format, Rules
from ties_ray.inputs.catalog import THREADS
from ties_ray.inputs.expand import Entry, entries_of
from ties_ray.inputs.fetch import README, fetch, read_folders
from ties_ray.inputs.licence import licence_of
from ties_ray.inputs.tokenizers import SETTINGS, VOCABULARY
from ties_ray.libraries import bounded
from ties_ray.recipe.recipe import ModelEntry
from ties_ray.reports.pool import PoolComparison
from ties_ray.reports.records import Report, ReportedProblem
from ties_ray.stores import Pin, Stores
from ties_ray.tensors import Source, TensorRef, elements_by_dtype

_MD5 = re.compile("[0-9a-f]{32}")
"""An ETag that may be the content's MD5."""
FOLDERS_AT_ONCE = 8
"""Folders that are inspected at the same time; each sends many requests."""


class Inspection(Report):
    """The content of an input folder."""

    uri: str
    format: str = ""
    """Name of the format; empty where no format recognises the folder, or where it can't be read."""
    architecture: str = ""
    """Architecture that config.json names."""
    tensors: int = 0
    parameters: int = 0
    """Elements of all tensors."""
    dtypes: dict[str, int] = {}
    """Elements by dtype, as safetensors names it."""
    files: list[str] = []
    """Weight files."""
    size: int = 0
    """Bytes of the weight files."""
    tokenizer: list[str] = []
    """Files of a tokenizer."""
    licence: str = ""
    facts: dict[str, str] = {}
    """Facts of an adapter, such as `base_name`, `rank`, `scale`, `modules` and `targets`."""
    norm: float | None = None
    """Frobenius norm of an adapter's low-rank changes; None where norms were not asked for."""
    content: str = ""
    """Digest that two folders with the same weights share: SHA-256 where norms were asked for, else the store's MD5.

    Empty where there is neither.
    """
    problems: list[ReportedProblem] = []
    notes: list[str] = []


class Pool(Report):
    """The counts of several adapters."""

    adapters: int
    usable: int
    refused: dict[str, int]
    """Folders by the code of a reason to refuse them; a folder may have several."""
    ranks: dict[str, int]
    """Adapters by rank."""
    scales: dict[str, int]
    """Adapters by scale."""
    targets: dict[str, int]
    """Adapters by target modules."""
    base_names: dict[str, int]
    """Adapters by the name of their base."""
    parameters: int
    """Elements of all factors."""
    size: int
    """Bytes of all weight files."""
    norms: list[float]
    """Smallest, median and largest norm; empty where norms were not asked for."""
    duplicates: list[list[str]]
    """URIs of folders with the same weights, in groups."""


class Inspections(Report):
    """The contents of several input folders."""

    folders: list[Inspection]
    pool: Pool | None = None
    """The pool that the folders form, if there are several and an adapter among them."""
    comparison: PoolComparison | None = None
    """How they relate; None where that was not asked for."""


def pool(folders: Sequence[Inspection]) -> Pool | None:
    """Return several folders as a pool of adapters; None where there are fewer than two, or no adapter."""
    if len(folders) < 2 or not any(folder.format == "lora" for folder in folders):
        return None
    adapters = [folder for folder in folders if folder.format in ("lora", "")]  # an unreadable one may be an adapter
    usable = [adapter for adapter in adapters if not adapter.problems]
    by_content: defaultdict[str, list[str]] = defaultdict(list)
    for adapter in adapters:
        if adapter.content:
            by_content[adapter.content].append(adapter.uri)
    norms = sorted(adapter.norm for adapter in usable if adapter.norm is not None)

    def count(fact: str) -> dict[str, int]:
        return dict(Counter(adapter.facts[fact] for adapter in usable if adapter.facts.get(fact)).most_common())

    codes = Counter(code for folder in folders for code in {problem.code for problem in folder.problems})

    return Pool(
        adapters=len(adapters),
        usable=len(usable),
        refused=dict(codes.most_common()),
        ranks=count("rank"),
        scales=count("scale"),
        targets=count("targets"),
        base_names=count("base_name"),
        parameters=sum(adapter.parameters for adapter in usable),
        size=sum(adapter.size for adapter in adapters),
        norms=[norms[0], norms[len(norms) // 2], norms[-1]] if norms else [],
        duplicates=[uris for uris in by_content.values() if len(uris) > 1],
    )


def inspect(
    stores: Stores, path: str, *, norms: bool = False, file: str | None = None, variant: str | None = None
) -> list[Inspection]:
    """Return the content of a folder, or of every folder that a glob means; read headers and small files only.

    norms: read all factors of adapters too. They give norms, values that are not finite, and duplicates.
    file, variant: the model of a folder that holds several, as a recipe chooses it.
    Raises `InputError` where a glob means no folder.
    """
    requests, folders = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(FOLDERS_AT_ONCE)
    try:
        notes: list[str] = []
        entries = list(entries_of(ModelEntry(path=path, file=file, variant=variant), path, stores, requests, notes))
        return list(folders.map(lambda entry: _inspect(stores, entry, requests, notes, norms=norms), entries))
    finally:
        folders.shutdown(cancel_futures=True)
        requests.shutdown(cancel_futures=True)


def _inspect(stores: Stores, entry: Entry, threads: Executor, notes: list[str], *, norms: bool) -> Inspection:
    entry = replace(entry, place="input", id="input")
    fetched, problems = fetch([entry], stores, threads)
    if entry.id not in fetched:
        return Inspection(uri=entry.uri, problems=list(map(ReportedProblem.of, problems[entry.id])), notes=notes)
    listed, folder = fetched[entry.id]
    rules = Rules(saved_modules=True)
    contents = read_folders(fetched, None, None, rules, stores, threads)[0][entry.id]
    sources = contents.sources or _stored(folder)
    dtypes = elements_by_dtype(sources.values())
    strict = () if contents.problems else listed.format.read(folder, None, Rules()).problems
    wrong = [*contents.problems, *strict]
    norm, content = None, "".join(pin.etag for pin in contents.objects if _MD5.fullmatch(pin.etag))
    if norms and contents.facts:
        norm, content = _read_factors(stores, listed.format, contents, wrong, folder.uri)
    pins = contents.objects or tuple(pin for pin in folder.files if _name(pin) in folder.headers)
    return Inspection(
        uri=folder.uri,
        format=listed.format.name,
        architecture=_architecture(folder),
        tensors=sum(len(source.tensors) for source in sources.values()),
        parameters=sum(dtypes.values()),
        dtypes=dtypes,
        files=[_name(pin) for pin in pins],
        size=sum(pin.size for pin in pins),
        tokenizer=[name for name in listed.files if name in (*VOCABULARY, *SETTINGS)],
        licence=licence_of(folder.texts.get(README, b"")),
        facts=dict(contents.facts),
        norm=norm,
        content=content,
        problems=list(map(ReportedProblem.of, wrong)),
        notes=[*notes, *contents.notes],
    )


def _read_factors(
    stores: Stores, form: Format, contents: Contents, problems: list[Problem], uri: str
) -> tuple[float | None, str]:
    """Return an adapter's norm, and the SHA-256 of all its factors; add a problem if they are not finite."""
    import torch  # here, since an inspection of headers does not need it

    from ties_ray.kernels import Factors
    from ties_ray.kernels.lowrank import norm2_of

    digest, norm2, not_finite = hashlib.sha256(), 0.0, 0
    for name, source in sorted(contents.sources.items()):
        numel = math.prod(form.shape(source))
        views = []
        for read in form.reads(source, 0, numel):
            views.append(torch.empty(read.stop - read.start, dtype=torch.uint8))
            pin = contents.objects[read.object]
            stores.of(pin.uri).read(pin, read.start, views[-1].numpy().data)
            digest.update(views[-1].numpy().data)
        digest.update(json.dumps([name, source.numbers]).encode())
        stored = form.encoded(source, 0, numel, views)
        if isinstance(stored, Factors):
            norm2 += norm2_of(stored)
            not_finite += int((~stored.left.isfinite()).sum()) + int((~stored.right.isfinite()).sum())
    if not_finite:
        problems.append(
            Problem(uri, f"{not_finite:,} values of its factors are NaN or Inf", "repair or drop it", "nan")
        )
    return (None if not_finite else math.sqrt(norm2)), digest.hexdigest()


def _stored(folder: Folder) -> dict[str, Source]:
    """Return every tensor of every header, for a folder that is refused."""
    return {
        f"{file}: {name}": Source((TensorRef(0, info.start, info.dtype, info.shape),))
        for file, header in folder.headers.items()
        for name, info in header.tensors.items()
    }


def _architecture(folder: Folder) -> str:
    try:
        config = bounded.loads(folder.texts.get("config.json", b"{}"))
    except (ValueError, RecursionError):
        return ""  # the format reports it as a problem
    names = config.get("architectures") if isinstance(config, dict) else None
    return ", ".join(map(str, names)) if isinstance(names, list) else ""


def _name(pin: Pin) -> str:
    return pin.uri.rpartition("/")[2]
