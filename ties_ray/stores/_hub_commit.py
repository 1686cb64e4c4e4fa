"""Commits of many files to a repository of the Hugging Face hub, read from other stores as they are sent."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ties_ray.errors import InputError, Problem
from ties_ray.stores import Pin, Store, crc32c, crc32c_joined, shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PIECE = 8 * 2**20
"""Bytes of one read."""


class StoredFile(NamedTuple):
    """A file that is to be committed."""

    store: Store
    pin: Pin
    crc32c: str
    """That of the whole file."""


class _Reading(io.RawIOBase):
    """A stored file as Python reads files. A first reading from the beginning to the end checks its CRC32C."""

    def __init__(self, file: StoredFile) -> None:
        self._store, self._pin, self._crc = file
        self._at = 0
        self._sums: list[tuple[str, int]] = []
        """CRC32C and size of the pieces that were read, one after the other."""

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, and return the position."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._pin.size}[whence]
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readinto(self, buffer: object) -> int:
        """Read what fits; raise `InputError` where the object is not the one that a merge has written."""
        into = memoryview(buffer).cast("B")[: max(0, self._pin.size - self._at)]  # type: ignore[arg-type]
        if not into:
            return 0
        self._store.read(self._pin, self._at, into)
        if self._at == sum(size for _, size in self._sums):
            self._sums.append((crc32c(into), len(into)))
            if self._at + len(into) == self._pin.size and crc32c_joined(self._sums) != self._crc:
                message = f"its CRC32C is {crc32c_joined(self._sums)}, and the merge has written {self._crc}"
                raise InputError(Problem(shown(self._pin.uri), message, "merge again with --fresh"))
        self._at += len(into)
        return len(into)


def commit(
    api: "HfApi", repo: str, branch: str, files: Mapping[str, StoredFile], removed: Sequence[str], message: str
) -> str:
    """Commit files to a branch, all at once, and remove others; return the id of the commit.

    Nothing is committed where the branch moves meanwhile.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationDelete(name) for name in removed),
        *(CommitOperationAdd(name, io.BufferedReader(_Reading(file), PIECE)) for name, file in files.items()),
    ]
    parent = api.model_info(repo, revision=branch).sha
    return api.create_commit(
        repo, operations, commit_message=message, revision=branch, parent_commit=parent, num_threads=1
    ).oid
