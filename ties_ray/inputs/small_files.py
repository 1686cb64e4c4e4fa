"""The small files that an output takes over from an input, pinned, and the files that it leaves, with reasons."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ties_ray.errors import InputError, Problem, printable
from ties_ray.libraries.downloads import SNIFFED, mistaken, pointer
from ties_ray.libraries.loaders import MODULES, is_loaded, module_folders, role
from ties_ray.stores import Listing, Pin, Stores, within

LIMIT = 256 * 2**20
"""The largest file that is taken over, in bytes; tokenizers of large vocabularies come near 40 MB."""
MOST_FILES = 2000
"""The most files that are taken over from one folder, with all folders in it."""
MOST_BYTES = 2**30
"""The most bytes of all files that are taken over: they are in memory together when they are published."""
MOST_FOLDERS, DEEPEST = 200, 4
"""The most folders that are listed, and the levels below the input's folder."""
MOST_NAMED = 100
"""The most names in one note; more are counted."""
TEXT_BYTES = 2**20
"""The largest `modules.json` that is read."""
COMPARED_BYTES = 64 * 2**20
"""The largest file that is compared byte by byte."""


@dataclass(frozen=True)
class SmallFile:
    """A file that the output takes over (config, tokenizer, chat template, licence, a small module's weights)."""

    name: str
    """The name relative to the model's folder: `1_Pooling/config.json`."""
    pin: Pin
    without: tuple[str, ...] = ()
    """Keys of a JSON object that the output's file lacks; keys of its parts are written `part.key`."""
    amended: dict[str, Any] = field(default_factory=dict)
    """Values that the output's JSON object gets. They replace its own, but lists grow, and parts are merged."""


class Taken(NamedTuple):
    """The files that an output takes over from an input."""

    files: tuple[SmallFile, ...]
    """Sorted by name."""
    notes: tuple[str, ...]


class _Tree(NamedTuple):
    """The files of a folder and of the folders in it, by relative name, and the folders that were not listed."""

    files: dict[str, Pin]
    left: list[str]


def take(uri: str, listing: Listing, stores: Stores, threads: Executor) -> Taken:
    """Return the small files of an input folder, pinned, and notes on the files that are left.

    Weights, a training's files and hidden files are left. A folder that holds weights is another model's and is left,
    unless `modules.json` names it. It costs a listing a folder and a request a file. Raises `InputError` where a file
    is not the one that its listing shows.
    """
    modules = _modules(uri, listing, stores)
    tree = _tree(uri, listing, stores, threads)
    other_models = {_folder(name) for name in tree.files if role(name) == "weights"} - {""}
    other_models = {folder for folder in other_models if not any(_is_in(folder, module) for module in modules)}
    kept: dict[str, Pin] = {}
    left = list(tree.left)
    for name, pin in sorted(tree.files.items()):
        of_module = any(_is_in(_folder(name), module) for module in modules)
        kind = "small" if of_module and role(name) == "weights" else role(name)
        elsewhere = [folder for folder in other_models if _is_in(_folder(name), folder)]
        if elsewhere:
            left.append(f"{min(elsewhere)}/")
        elif kind == "small" and pin.size <= LIMIT and _is_plain(name):
            kept[name] = pin
        elif kind not in ("hidden", "own") and not _is_expected(name):
            left.append(name)
    size = sum(pin.size for pin in kept.values())
    if len(kept) > MOST_FILES or size > MOST_BYTES:
        message = f"holds {len(kept):,} files of {size:,} bytes beside its weights, and at most {MOST_FILES:,} of"
        message += f" {MOST_BYTES:,} are taken over"
        raise InputError(Problem(uri, message, "move those aside that are not the model's"))
    heads = list(threads.map(lambda pin: stores.of(pin.uri).head_listed(pin, SNIFFED), kept.values()))
    problems = [
        Problem(within(uri, name), *other, "download")
        for name, (pin, head) in zip(kept, heads, strict=True)
        if (other := _mistaken(name, head, pin.size))
    ]
    if problems:
        raise InputError(problems)
    files = tuple(SmallFile(name, pin) for name, (pin, _) in zip(kept, heads, strict=True))
    return Taken(files, tuple(_notes(uri, [file.name for file in files], list(dict.fromkeys(left)))))


def differing_modules(
    files: Sequence[SmallFile], others: Mapping[str, str], stores: Stores, threads: Executor
) -> list[str]:
    """Return a note for each file of a sentence-transformers module that differs between models.

    others: the URI of each model by its id. The files of a module are not merged: the output has those of the input
    that gives the small files.
    """
    text = next((stores.of(file.pin.uri).get_pinned(file.pin) for file in files if file.name == MODULES), b"[]")
    ours = {
        file.name: file.pin for file in files if any(_is_in(_folder(file.name), each) for each in module_folders(text))
    }
    folders = sorted({_folder(name) for name in ours})

    def of(uri: str) -> list[str]:
        theirs = {}
        for folder in folders:
            for pin in stores.of(uri).list_below(uri, folder).files:
                theirs[f"{folder}/{_last(pin.uri)}"] = pin
        return [name for name, pin in ours.items() if name in theirs and not _same(pin, theirs[name], stores)]

    who: dict[str, list[str]] = {}
    for id_, names in zip(others, threads.map(of, others.values()), strict=True):
        for name in names:
            who.setdefault(name, []).append(id_)
    return [
        f"model{'s' * (len(ids) > 1)} {', '.join(ids)}: {name} differs, and is not merged: the output has the one of"
        " `output.files_from`"
        for name, ids in sorted(who.items())
    ]


def _mistaken(name: str, head: bytes, size: int) -> tuple[str, str] | None:
    """Return (problem, remedy) of a file that is a pointer, or a page in place of a JSON text that is loaded."""
    if pointer(head):
        return mistaken(head, size)
    return mistaken(head, size, text=True) if name.endswith(".json") and is_loaded(name) else None


def _modules(uri: str, listing: Listing, stores: Stores) -> tuple[str, ...]:
    """Return the folders that `modules.json` names."""
    for pin in listing.files:
        if _last(pin.uri) == MODULES:
            full, data = stores.of(uri).head_listed(pin, TEXT_BYTES)
            if full.size <= TEXT_BYTES:
                return module_folders(data)
    return ()


def _tree(uri: str, listing: Listing, stores: Stores, threads: Executor) -> _Tree:
    """Return all files below a folder, level by level, and the names of folders that no output takes."""
    files = {_last(pin.uri): pin for pin in listing.files}
    left: list[str] = []
    level = [_last(folder) for folder in listing.folders]
    num_listed = 0
    for _ in range(DEEPEST):
        entered = [name for name in level if role(name) == "small" and _is_plain(name)][: MOST_FOLDERS - num_listed]
        left += [f"{name}/" for name in level if name not in entered and role(name) != "hidden"]
        num_listed += len(entered)
        level = []
        for name, inside in zip(entered, threads.map(lambda each: _below(uri, each, stores), entered), strict=True):
            files |= {f"{name}/{_last(pin.uri)}": pin for pin in inside.files}
            level += [f"{name}/{_last(folder)}" for folder in inside.folders]
    return _Tree(files, [*left, *(f"{name}/" for name in level)])


def _below(uri: str, name: str, stores: Stores) -> Listing:
    within(uri, name)
    return stores.of(uri).list_below(uri, name)


def _notes(uri: str, names: Sequence[str], left: Sequence[str]) -> Iterator[str]:
    if left:
        more = f" and {len(left) - MOST_NAMED} more" if len(left) > MOST_NAMED else ""
        yield f"not taken over from {uri}: {printable(', '.join(left[:MOST_NAMED]))}{more}"
    code = [name for name in names if name.endswith(".py")]
    if code:
        yield (
            f"code of {uri} comes along and was not run: {printable(', '.join(code))}; a loader runs it where it is"
            " told to trust the model"
        )


def _same(pin: Pin, other: Pin, stores: Stores) -> bool:
    """Return whether two files hold the same bytes, as far as it is cheap to tell."""
    if pin.size != other.size:
        return False
    if pin.etag and pin.etag == other.etag:
        return True
    if pin.size > COMPARED_BYTES:
        return False
    return stores.of(pin.uri).get_pinned(pin) == stores.of(other.uri).head_listed(other, other.size)[1]


def _is_plain(name: str) -> bool:
    """Return whether any file system can have a file of this name, and any terminal show it."""
    return name.isprintable() and "\\" not in name


def _is_expected(name: str) -> bool:
    """Return whether a file needs no note because it is left: it holds the weights that are merged."""
    return "/" not in name and (name.endswith(".safetensors") or name.endswith(".safetensors.index.json"))


def _is_in(folder: str, other: str) -> bool:
    return folder == other or folder.startswith(f"{other}/")


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _last(uri: str) -> str:
    return uri.rpartition("/")[2]
