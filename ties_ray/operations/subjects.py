"""What is scored: finished outputs and other folders of any store, and candidates in memory."""

import os
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ties_ray.errors import InputError, Problem
from ties_ray.evaluations import Json
from ties_ray.evaluations._models import named_base
from ties_ray.libraries.loaders import role
from ties_ray.operations.scratch import ScratchFolder
from ties_ray.reports.records import MergeResult, WrittenFile, find_result
from ties_ray.stores import Pin, Stores, absolute, crc32c, crc32c_joined, hub_uri, scheme_of, shown

if TYPE_CHECKING:
    import torch

    from ties_ray.operations.candidates import Candidate

PIECE = 2**25
"""Bytes of a request to a store."""
DEEPEST = 3
"""Folders in a model's folder that are looked into."""
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a new folder in it is made for each candidate
"""Folder in memory, where candidates are written that libraries load from files."""


class FolderSubject:
    """A finished output, or any other folder of a model. Remote files are fetched once, and removed by `close`."""

    kin = ""

    def __init__(self, stores: Stores, uri: str, base: str = "") -> None:
        """base: URI of the base that an adapter changes. Default: the one that its merge or its config names."""
        self._stores, self._uri, self._base_uri = stores, absolute(hub_uri(uri)).rstrip("/"), base
        self.id = shown(self._uri)
        """The folder's URI."""
        self._fetched: ScratchFolder | None = None
        self._base: FolderSubject | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was fetched."""
        if self._fetched:
            self._fetched.remove()
            self._fetched = None
        if self._base:
            self._base.close()

    @cached_property
    def result(self) -> MergeResult | None:
        """The result record of the merge that made the folder; None where none did."""
        return find_result(self._stores, self._uri)

    def record(self) -> Json:
        """Return the result record as JSON; empty where no merge made the folder."""
        return self.result.model_dump(mode="json") if self.result else {}

    def folder(self) -> str:
        """Return the folder itself, or a local copy of it. Raises `InputError` where it is empty or has changed."""
        if scheme_of(self._uri) == "local":
            if not Path(self._uri).is_dir():
                raise InputError(Problem(self.id, "there is no such folder", "give the folder of a model"))
            return self._uri
        if self._fetched is None:
            self._fetched = ScratchFolder(tempfile.gettempdir())
            try:
                self._fetch(Path(self._fetched.path))
            except BaseException:
                self.close()
                raise
        return self._fetched.path

    def base_folder(self) -> str:
        """Return the local folder of the base that this adapter changes."""
        if self._base is None:
            made = self.result
            merged_from = made.provenance.base.uri if made and made.provenance else ""
            uri = self._base_uri or merged_from or named_base(self.folder())
            if not uri:
                raise InputError(Problem(self.id, "is an adapter, and its base is not named", "name it: `--base`"))
            self._base = FolderSubject(self._stores, uri)
        return self._base.folder()

    def load_into(self, model: "torch.nn.Module") -> None:
        """Raise `InputError`: a folder is loaded from its files."""
        raise InputError(Problem(self.id, "is loaded from its files"))

    def _fetch(self, target: Path) -> None:
        """Copy the files of the model."""
        result = self.result
        written = {file.name: file for file in (*result.files, *result.documents)} if result else {}
        pins = dict(self._files(self._uri, ""))
        if not pins:
            raise InputError(Problem(self.id, "there is no such folder, or it is empty", "give the folder of a model"))
        for name, pin in pins.items():
            if name in written or (not written and _is_of_the_model(name)):
                self._copy(pin, target / name, written.get(name))

    def _files(self, uri: str, inside: str) -> Iterator[tuple[str, Pin]]:
        """Yield the files of a folder by their relative names."""
        listing = self._stores.of(uri).list(uri)
        for pin in listing.files:
            yield inside + pin.uri.rpartition("/")[2], pin
        for folder in listing.folders if inside.count("/") < DEEPEST else ():
            name = f"{inside}{folder.rpartition('/')[2]}/"
            if role(name) not in ("hidden", "training"):
                yield from self._files(folder, name)

    def _copy(self, listed: Pin, target: Path, written: WrittenFile | None) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        store, runs = self._stores.of(listed.uri), list[tuple[str, int]]()
        pin, _ = store.head_listed(listed, 0)
        buffer = memoryview(bytearray(min(PIECE, pin.size)))
        with target.open("wb") as file:
            for start in range(0, pin.size, PIECE):
                piece = buffer[: min(PIECE, pin.size - start)]
                store.read(pin, start, piece)
                runs.append((crc32c(piece), len(piece)))
                file.write(piece)
        if written and (pin.size, crc32c_joined(runs)) != (written.size, written.crc32c):
            message = "is not what the merge wrote there"
            raise InputError(Problem(shown(listed.uri), message, "see what `ties-ray verify` says"))


class CandidateSubject:
    """A candidate in memory. Its folder is written into shared memory where a library needs files."""

    def __init__(self, candidate: "Candidate", name: str, kin: str) -> None:
        """name: its name in tables. kin: key of the pool whose candidates have the same tensors."""
        self.id, self.kin = name, kin
        self._candidate = candidate
        self._written: ScratchFolder | None = None
        self._record: Json = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder."""
        if self._written:
            self._written.remove()
            self._written = None

    def folder(self) -> str:
        """Return the folder of a merge of this candidate; it is made on the first call."""
        if self._written is None:
            place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else tempfile.gettempdir()
            self._written = ScratchFolder(place)
            self._record = self._candidate.save(self._written.path).model_dump(mode="json")
        return self._written.path

    def base_folder(self) -> str:
        """Return the local folder of the base that an adapter changes."""
        base = self._candidate.recipe.base
        if base is None or scheme_of(base.path) != "local":
            raise InputError(Problem(self.id, "is an adapter, and its base is no local folder", "copy the base here"))
        return absolute(base.path)

    def load_into(self, model: "torch.nn.Module") -> None:
        """Copy the tensors into a model that has them by name."""
        self._candidate.load_into(model)

    def record(self) -> Json:
        """Return the result record as JSON; empty until the folder was made."""
        return self._record


def _is_of_the_model(name: str) -> bool:
    """Return whether a library may need a file that no merge has listed; pickles are never fetched."""
    kind = role(name)
    return name.endswith((".safetensors", ".safetensors.index.json")) or kind in ("small", "adapter", "quantized")
