"""What an input folder holds, before any recipe: format, tensors, files, and every reason to refuse it."""

import json
from concurrent.futures import Executor, ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict

from ties_ray import catalog
from ties_ray.catalog import README, licence_of
from ties_ray.errors import Problem
from ties_ray.expand import Entry, entries_of
from ties_ray.formats import Folder, Rules, Source, TensorRef
from ties_ray.recipe import ModelEntry
from ties_ray.report import elements_by_dtype
from ties_ray.stores import Pin, Stores
from ties_ray.tokenizers import SETTINGS, VOCABULARY

TOGETHER = 8
"""Folders looked at together; each has many requests of its own."""


class Finding(BaseModel):
    """One reason to refuse the folder as the base of a merge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: str
    what: str
    remedy: str


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
    problems: list[Finding] = []
    notes: list[str] = []


class Inspections(BaseModel):
    """Several input folders."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folders: list[Inspection]


def inspect(stores: Stores, path: str) -> list[Inspection]:
    """Return what a folder, or every folder that a glob means, holds; reads headers and small files only.

    Raises `InputError` where a glob means no folder.
    """
    requests, folders = ThreadPoolExecutor(catalog.THREADS), ThreadPoolExecutor(TOGETHER)
    try:
        notes: list[str] = []
        entries = list(entries_of(ModelEntry(path=path), path, stores, requests, notes))
        return list(folders.map(lambda entry: _inspect(stores, entry, requests, notes), entries))
    finally:
        folders.shutdown(cancel_futures=True)
        requests.shutdown(cancel_futures=True)


def _inspect(stores: Stores, entry: Entry, threads: Executor, notes: list[str]) -> Inspection:
    entry = Entry(place="input", uri=entry.uri, id="input")
    fetched, problems = catalog.fetch([entry], stores, threads)
    if entry.id not in fetched:
        return Inspection(uri=entry.uri, problems=_findings(problems[entry.id]), notes=notes)
    looked, folder = fetched[entry.id]
    found = looked.format.read(folder, None, Rules())
    sources = found.sources or _stored(folder)
    dtypes = elements_by_dtype(sources.values())
    pins = found.objects or tuple(pin for pin in folder.files if _name(pin) in folder.headers)
    return Inspection(
        uri=folder.uri,
        format=looked.format.name,
        architecture=_architecture(folder),
        tensors=sum(len(source.tensors) for source in sources.values()),
        parameters=sum(dtypes.values()),
        dtypes=dtypes,
        files=[_name(pin) for pin in pins],
        size=sum(pin.size for pin in pins),
        tokenizer=[name for name in looked.files if name in (*VOCABULARY, *SETTINGS)],
        licence=licence_of(folder.texts.get(README, b"")),
        problems=_findings(list(found.problems)),
        notes=[*notes, *found.notes],
    )


def _stored(folder: Folder) -> dict[str, Source]:
    """Return every tensor of every header: what there is to show of a folder that is refused."""
    return {
        f"{file}: {name}": Source((TensorRef(0, info.start, info.dtype, info.shape),))
        for file, header in folder.headers.items()
        for name, info in header.tensors.items()
    }


def _architecture(folder: Folder) -> str:
    try:
        config = json.loads(folder.texts.get("config.json", b"{}"))
    except (ValueError, RecursionError):
        return ""  # among the problems already
    names = config.get("architectures") if isinstance(config, dict) else None
    return ", ".join(map(str, names)) if isinstance(names, list) else ""


def _findings(problems: list[Problem]) -> list[Finding]:
    return [Finding(where=one.where, what=one.what, remedy=one.remedy) for one in problems]


def _name(pin: Pin) -> str:
    return pin.uri.rpartition("/")[2]
