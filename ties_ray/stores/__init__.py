"""The contract of a storage backend: one file here a URI scheme, `fsspec.py` for every scheme without one.

A store is built in the process that uses it and is never pickled. Nothing above this folder knows fsspec, boto or
paths of a disk. URIs are plain strings: `s3://bucket/key`, `/folder/file` or `file:///folder/file`, `memory://x/y`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from ties_ray import plugins

__path__ = plugins.search_path("stores", list(__path__))


class Pin(NamedTuple):
    """One object as it was when it was first seen; later reads demand that it still is."""

    uri: str
    size: int
    """In bytes."""
    etag: str = ""
    """What identifies the content: an S3 ETag; for a local file `mtime_ns-inode`; empty where the scheme has none."""
    version: str = ""
    """The version id, where the store keeps versions."""


class Listing(NamedTuple):
    """What lies directly in a folder."""

    files: tuple[Pin, ...]
    """Objects, sorted by the UTF-8 bytes of their URI. Their pins may lack what only a request an object would show."""
    folders: tuple[str, ...]
    """URIs of the folders in it, without a trailing slash, sorted likewise."""


class Part(NamedTuple):
    """One written part of an upload."""

    number: int
    """From 1."""
    size: int
    etag: str
    """As the store named it (S3), or the CRC32C of the bytes in hex (local)."""


@dataclass
class Meter:
    """What a store did, for the result and for tests that hold the plan to its word."""

    requests: int = 0
    """Requests sent for reads of data (`read` and `head`), retries included."""
    bytes_read: int = 0
    bytes_written: int = 0
    retries: int = 0


class NoOptions(BaseModel):
    """The options of a store that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Store(ABC):
    """Reads ranges, and writes one object from many processes.

    Errors are those of `ties_ray.errors`: `InputError` for what is missing, forbidden or changed (message: the URI, what
    was asked, what came), `UnavailableError` when the one retry budget is spent. Methods may be called from several
    threads at once.
    """

    options: ClassVar[type[BaseModel]] = NoOptions
    """The pydantic model of `storage.<scheme>` in a recipe; never holds a secret."""
    pinned_by: ClassVar[str] = "ETag"
    """How well a read is tied to the planned content, for the plan's text."""
    writable: ClassVar[bool] = False

    def __init__(self, options: BaseModel) -> None:
        self.meter = Meter()

    @abstractmethod
    def list(self, uri: str) -> Listing:
        """Return what lies directly in the folder `uri` (empty where there is nothing)."""

    @abstractmethod
    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        """Return the object's pin and its first `nbytes` bytes (fewer if it is shorter), in one request.

        Raises `FileNotFoundError` where there is no such object.
        """

    @abstractmethod
    def read(self, pin: Pin, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes [start, start + len(into)) of the object as pinned; exactly, or raise.

        Raises `InputError` if the object is gone or no longer the pinned one; nothing is returned from another content.
        """

    def put(self, uri: str, data: bytes) -> Pin:
        """Write a small object whole and atomically, replacing what is there."""
        raise NotImplementedError

    def delete(self, uri: str) -> None:
        """Remove an object; nothing happens where there is none."""
        raise NotImplementedError

    def begin_upload(self, uri: str, size: int) -> str:
        """Start an object of `size` bytes, invisible until completed; return the upload's id."""
        raise NotImplementedError

    def write_part(self, uri: str, upload: str, number: int, offset: int, data: memoryview) -> Part:
        """Write one part, durably; writing a part again replaces it. Any process may call this."""
        raise NotImplementedError

    def list_parts(self, uri: str, upload: str) -> tuple[Part, ...] | None:
        """Return the parts that are there, by number; None where the upload is not known (any more).

        A store that can't list single parts (a local file) returns () for a known upload.
        """
        raise NotImplementedError

    def complete_upload(self, uri: str, upload: str, parts: Sequence[Part]) -> Pin:
        """Make the object visible, whole; does nothing more if just this upload was completed before."""
        raise NotImplementedError

    def abort_upload(self, uri: str, upload: str) -> None:
        """Forget an upload and its parts; nothing happens where there is none."""
        raise NotImplementedError


def scheme_of(uri: str) -> str:
    """Return the scheme of a URI; `local` for a path and for `file://`."""
    scheme, separator, _ = uri.partition("://")
    return "local" if not separator or scheme == "file" else scheme


def join(folder: str, name: str) -> str:
    """Return the URI of `name` inside `folder`."""
    return f"{folder.rstrip('/')}/{name}"


class Stores:
    """The stores of one process, opened when first used, one a scheme."""

    def __init__(self, options: Mapping[str, Mapping[str, object]]) -> None:
        """`options` is the recipe's `storage` section as JSON."""
        self._options = options
        self._open: dict[str, Store] = {}

    def of(self, uri: str) -> Store:
        """Return the store that serves `uri`."""
        scheme = scheme_of(uri)
        if scheme not in self._open:
            kind = store_class(scheme)
            self._open[scheme] = kind(kind.options.model_validate(self._options.get(scheme, {})))
        return self._open[scheme]

    def opened(self) -> tuple[Store, ...]:
        """Return the stores used so far."""
        return tuple(self._open.values())


def store_class(scheme: str) -> type[Store]:
    """Return the class that serves a scheme: its own file, or the generic one."""
    return plugins.load("stores", scheme if scheme in plugins.names("stores") else "fsspec", Store)
