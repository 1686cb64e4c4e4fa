"""What input folders hold, before any recipe: format, tensors, files, every reason to refuse them, and a whole pool."""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict

from ties_ray import bounded
from ties_ray.errors import Problem
from ties_ray.formats import Contents, Folder, Format, Rules
from ties_ray.inputs.catalog import THREADS
from ties_ray.inputs.expand import Entry, entries_of
from ties_ray.inputs.fetch import README, fetch, read_folders
from ties_ray.inputs.licence import licence_of
from ties_ray.inputs.tokenizers import SETTINGS, VOCABULARY
from ties_ray.recipe.recipe import ModelEntry
from ties_ray.stores import Pin, Stores
from ties_ray.tensors import Source, TensorRef, elements_by_dtype

_MD5 = re.compile("[0-9a-f]{32}")
"""An ETag that may be the content's MD5."""
TOGETHER = 8
"""Folders looked at together; each has many requests of its own."""


class Finding(BaseModel):
    """One reason to refuse the folder as the base of a merge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: str
    what: str
    remedy: str
    code: str = ""
    """A short name of the reason."""


class Inspection(BaseModel):
    """One input folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    format: str = ""
    """Empty where it is none that we know, or could not be read."""
    architecture: str = ""
    """As config.json names it."""
    tensors: int = 0
    parameters: int = 0
    """Elements of all tensors."""
    dtypes: dict[str, int] = {}
    """Elements by dtype, as safetensors names it."""
    files: list[str] = []
    """Weight files."""
    size: int = 0
    """Their bytes."""
    tokenizer: list[str] = []
    """Files of a tokenizer."""
    licence: str = ""
    facts: dict[str, str] = {}
    """Of an adapter: `base_name`, `rank`, `scale`, `modules`, `targets`, ..."""
    norm: float | None = None
    """Frobenius norm of an adapter's low-rank changes, where asked for."""
    content: str = ""
    """What two folders with the same weights have in common: SHA-256 where norms were asked for, else a store's ETag
    that is one of the content; empty where neither is known."""
    problems: list[Finding] = []
    notes: list[str] = []


class Pool(BaseModel):
    """Several adapters, as one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapters: int
    usable: int
    refused: dict[str, int]
    """Folders by the code of a reason to refuse them; one may have several."""
    ranks: dict[str, int]
    """Adapters by rank, and so on."""
    scales: dict[str, int]
    targets: dict[str, int]
    base_names: dict[str, int]
    parameters: int
    """Elements of all factors."""
    size: int
    """Bytes of all weight files."""
    norms: list[float]
    """Smallest, median and largest norm; empty where norms were not asked for."""
    duplicates: list[list[str]]
    """URIs of folders with the same weights."""


class Inspections(BaseModel):
    """Several input folders."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folders: list[Inspection]
    pool: Pool | None = None
    """Where there are several folders and an adapter among them."""


def pool(folders: Sequence[Inspection]) -> Pool | None:
    """Return what several folders are as a pool of adapters; None where they are none."""
    if len(folders) < 2 or not any(one.format == "lora" for one in folders):
        return None
    adapters = [one for one in folders if one.format in ("lora", "")]  # what can't be read may have been one
    usable = [one for one in adapters if not one.problems]
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for one in adapters:
        if one.content:
            alike[one.content].append(one.uri)
    norms = sorted(one.norm for one in usable if one.norm is not None)

    def count(fact: str) -> dict[str, int]:
        return dict(Counter(one.facts[fact] for one in usable if one.facts.get(fact)).most_common())

    return Pool(
        adapters=len(adapters),
        usable=len(usable),
        refused=dict(Counter(code for one in folders for code in {known.code for known in one.problems}).most_common()),
        ranks=count("rank"),
        scales=count("scale"),
        targets=count("targets"),
        base_names=count("base_name"),
        parameters=sum(one.parameters for one in usable),
        size=sum(one.size for one in adapters),
        norms=[norms[0], norms[len(norms) // 2], norms[-1]] if norms else [],
        duplicates=[uris for uris in alike.values() if len(uris) > 1],
    )


def inspect(stores: Stores, path: str, *, norms: bool = False) -> list[Inspection]:
    """Return what a folder, or every folder that a glob means, holds; reads headers and small files only.

    norms: read all factors of adapters too, for their norms, and for what only bytes show: values that are not finite,
    and weights that are those of another folder. Raises `InputError` where a glob means no folder.
    """
    requests, folders = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(TOGETHER)
    try:
        notes: list[str] = []
        entries = list(entries_of(ModelEntry(path=path), path, stores, requests, notes))
        return list(folders.map(lambda entry: _inspect(stores, entry, requests, notes, norms=norms), entries))
    finally:
        folders.shutdown(cancel_futures=True)
        requests.shutdown(cancel_futures=True)


def _inspect(stores: Stores, entry: Entry, threads: Executor, notes: list[str], *, norms: bool) -> Inspection:
    entry = Entry(place="input", uri=entry.uri, id="input")
    fetched, problems = fetch([entry], stores, threads)
    if entry.id not in fetched:
        return Inspection(uri=entry.uri, problems=_findings(problems[entry.id]), notes=notes)
    listed, folder = fetched[entry.id]
    rules = Rules(saved_modules=True)
    found = read_folders(fetched, None, None, rules, stores, threads)[0][entry.id]
    sources = found.sources or _stored(folder)
    dtypes = elements_by_dtype(sources.values())
    strict = () if found.problems else listed.format.read(folder, None, Rules()).problems
    wrong = [*found.problems, *strict]
    norm, content = None, "".join(pin.etag for pin in found.objects if _MD5.fullmatch(pin.etag))
    if norms and found.facts:
        norm, content = _read_factors(stores, listed.format, found, wrong, folder.uri)
    pins = found.objects or tuple(pin for pin in folder.files if _name(pin) in folder.headers)
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
        facts=dict(found.facts),
        norm=norm,
        content=content,
        problems=_findings(wrong),
        notes=[*notes, *found.notes],
    )


def _read_factors(
    stores: Stores, form: Format, found: Contents, problems: list[Problem], uri: str
) -> tuple[float | None, str]:
    """Return an adapter's norm, and the SHA-256 of all that it stores; note factors that are not finite."""
    import torch  # here, so that looking at headers does not wait for it

    from ties_ray.kernels import Factors
    from ties_ray.kernels.lowrank import norm2_of

    digest, norm2, not_finite = hashlib.sha256(), 0.0, 0
    for name, source in sorted(found.sources.items()):
        numel = math.prod(form.shape(source))
        views = []
        for read in form.reads(source, 0, numel):
            views.append(torch.empty(read.stop - read.start, dtype=torch.uint8))
            pin = found.objects[read.object]
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
    """Return every tensor of every header: what there is to show of a folder that is refused."""
    return {
        f"{file}: {name}": Source((TensorRef(0, info.start, info.dtype, info.shape),))
        for file, header in folder.headers.items()
        for name, info in header.tensors.items()
    }


def _architecture(folder: Folder) -> str:
    try:
        config = bounded.loads(folder.texts.get("config.json", b"{}"))
    except (ValueError, RecursionError):
        return ""  # among the problems already
    names = config.get("architectures") if isinstance(config, dict) else None
    return ", ".join(map(str, names)) if isinstance(names, list) else ""


def _findings(problems: list[Problem]) -> list[Finding]:
    return [Finding(where=one.where, what=one.what, remedy=one.remedy, code=one.code) for one in problems]


def _name(pin: Pin) -> str:
    return pin.uri.rpartition("/")[2]
