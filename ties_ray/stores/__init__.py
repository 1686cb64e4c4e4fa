"""The contract of a storage backend: one file here a URI scheme, `fsspec.py` for every scheme without one.

A store is built in the process that uses it and is never pickled. Nothing above this folder knows fsspec, boto or
paths of a disk. URIs are plain strings: `s3://bucket/key`, `/folder/file` or `file:///folder/file`, `memory://x/y`.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from ties_ray import plugins
from ties_ray.errors import FRESH_THEN, InputError, InterruptedMerge, Problem, RecipeError, holds_secret
from ties_ray.errors import shown as shown
from ties_ray.stores._checksums import crc32c as crc32c
from ties_ray.stores._checksums import crc32c_joined as crc32c_joined
from ties_ray.stores._retry import Meter as Meter
from ties_ray.stores._retry import Throttle as Throttle
from ties_ray.stores._retry import Transient as Transient
from ties_ray.stores._retry import causes_of as causes_of
from ties_ray.stores._retry import persist as persist
from ties_ray.stores._secrets import refuse_secrets as refuse_secrets
from ties_ray.stores._uris import REMOTE as REMOTE
from ties_ray.stores._uris import Uri as Uri
from ties_ray.stores._uris import absolute as absolute
from ties_ray.stores._uris import entry_uri as entry_uri
from ties_ray.stores._uris import hub_name as hub_name
from ties_ray.stores._uris import hub_uri as hub_uri
from ties_ray.stores._uris import is_generic as is_generic
from ties_ray.stores._uris import join as join
from ties_ray.stores._uris import last_part as last_part
from ties_ray.stores._uris import leads_from as leads_from
from ties_ray.stores._uris import scheme_of as scheme_of
from ties_ray.stores._uris import unserved as unserved
from ties_ray.stores._uris import within as within

__path__ = plugins.search_path("stores", list(__path__))


class Pin(NamedTuple):
    """One object at the time of planning; later reads demand that it is unchanged."""

    uri: str
    size: int
    """The number of bytes."""
    etag: str = ""
    """The mark of the content: an S3 ETag without its quotes, `mtime_ns-ctime_ns-inode` of a local file.

    It is empty where the scheme has none. Only the size is then pinned, and the plan must say so."""
    version: str = ""
    """The version id, where the store keeps versions."""


class Listing(NamedTuple):
    """The content of a folder."""

    files: tuple[Pin, ...]
    """Objects, sorted by the UTF-8 bytes of their URI. Their pins may lack what only a request an object would show."""
    folders: tuple[str, ...]
    """URIs of the folders in it, without a trailing slash, sorted likewise."""


class Part(NamedTuple):
    """One written part of an upload."""

    number: int
    """The part's number, counted from 1."""
    size: int
    etag: str
    """The store's ETag of the part; empty where it has none (local)."""
    checksum: str = ""
    """The checksum that was sent with the bytes, in the store's own form; completion takes it back."""


class Space(NamedTuple):
    """The room that a folder's disk has."""

    free: int
    """Bytes that this process may still fill."""
    held: int
    """Bytes that unfinished uploads of objects directly in the folder have taken."""


KEEP = "keep inputs unchanged while they are planned and merged, and run it again"

CAN_ONLY_BE_READ = "can only be read"
WRITE_ELSEWHERE = (
    "write to a local folder, s3://, gs:// or az://; `ties-ray push` publishes a finished merge on the hub"
)


class NoOptions(BaseModel):
    """The options of a store that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Store(ABC):
    """Lists folders and reads ranges.

    Errors are those of `ties_ray.errors`. `InputError` means that an object is missing, forbidden or changed; its
    message shows the URI, the request and the answer. `UnavailableError` means that the one retry budget is spent.
    Methods may be called from several threads at once.
    """

    options: ClassVar[type[BaseModel]] = NoOptions
    """The pydantic model of `storage.<scheme>` in a recipe; never holds a secret."""
    pinned_by: ClassVar[str] = "ETag"
    """The mark that ties a read to the planned content, for the plan's text."""
    exact_listing: ClassVar[bool] = False
    """Whether a listing gives the same pins as `head`, so that a file which changes in between shows."""

    def __init__(self, options: BaseModel) -> None:
        self.meter = Meter()
        self.notes: list[str] = []
        """Notes for the reader of a result: features that the service lacks, and their substitutes."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("a store holds connections and credentials: build it in the process that uses it")

    def resolve(self, uri: str) -> str:
        """Return the URI by which any process finds the same folder: absolute, and at a commit if there are any."""
        return absolute(uri)

    @abstractmethod
    def list(self, uri: str) -> Listing:
        """Return the content of the folder `uri`; it is empty where there is nothing."""

    def list_each(self, uris: Sequence[str]) -> dict[str, Listing]:
        """Return the content of those of some folders that fewer requests than one each can list, by URI as given."""
        return {}

    def folders(self, uri: str) -> tuple[str, ...]:
        """Return the folders in a folder, as `list` does, without a look at its files."""
        return self.list(uri).folders

    def list_below(self, root: str, name: str) -> Listing:
        """Return the content of the folder `name` (relative, `a/b`) inside the folder `root`.

        A store that knows links raises `InputError` where one leads out of `root`.
        """
        return self.list(within(root, name))

    def download_command(self, uri: str, folder: str) -> str:
        """Return a shell command that copies the output at `uri` to a local folder; empty where there is none."""
        return ""

    def newest(self, uri: str) -> float | None:
        """Return the time of the newest file directly in the folder (seconds since 1970, by the store's clock).

        It is None where there is no file, or the store does not tell.
        """
        return None

    @abstractmethod
    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        """Return the object's pin and its first `nbytes` bytes (fewer if it is shorter), in one request.

        Raises `FileNotFoundError` where there is no such object.
        """

    def head_listed(self, listed: Pin, nbytes: int) -> tuple[Pin, bytes]:
        """Return the pin and first bytes of a listed file, as `head` does.

        Raises `InputError` where the file is gone, or its pin is not the listing's.
        """
        try:
            pin, data = self.head(listed.uri, nbytes)
        except FileNotFoundError:
            raise InputError(Problem(shown(listed.uri), "is gone although it was listed", KEEP)) from None
        if self.exact_listing and pin != listed:
            raise InputError(Problem(shown(listed.uri), "changed while the plan was made", KEEP))
        return pin, data

    def get_pinned(self, pin: Pin) -> bytes:
        """Return a small object whole; raise `InputError` where it is not the pinned one."""
        data = bytearray(pin.size)
        self.read(pin, 0, memoryview(data))
        return bytes(data)

    @abstractmethod
    def read(self, pin: Pin, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes [start, start + len(into)) of the object as pinned; exactly, or raise.

        Raises `InputError` if the object is gone or no longer the pinned one; nothing is returned from another content.
        """

    def is_in_page_cache(self, pin: Pin, position: int) -> bool:
        """Return whether the byte at `position` is in this machine's memory, so that a read does not wait."""
        return False

    def get(self, uri: str, limit: int) -> tuple[Pin, bytes]:
        """Return a small object whole, by one request; raise `InputError` if it has more than `limit` bytes.

        Raises `FileNotFoundError` where there is no such object.
        """
        pin, data = self.head(uri, limit)
        if pin.size > limit:
            message = f"has {pin.size:,} bytes, and at most {limit:,} were expected"
            raise InputError(Problem(shown(uri), message, "check that this is the right file"))
        return pin, data


class WritableStore(Store):
    """A store that also writes: small objects at once, large ones in parts, from many processes."""

    @abstractmethod
    def put(self, uri: str, data: bytes) -> Pin:
        """Write a small object whole and atomically, replacing what is there."""

    def swap(self, uri: str, data: bytes, etag: str) -> Pin | None:
        """Write a small object if the one there still has this ETag ("": if there is none); None if not.

        This one is best effort: another writer may come between look and write. Stores that can do better override it.
        """
        try:
            now = self.head(uri, 0)[0].etag
        except FileNotFoundError:
            now = ""
        return self.put(uri, data) if now == etag else None

    @abstractmethod
    def delete(self, uri: str) -> None:
        """Remove an object; nothing happens where there is none."""

    def delete_folder(self, uri: str) -> None:
        """Remove all that lies in a folder, at any depth; nothing happens where there is none."""
        listing = self.list(uri)
        for folder in listing.folders:
            self.delete_folder(folder)
        for pin in listing.files:
            self.delete(pin.uri)

    @abstractmethod
    def begin_upload(self, uri: str, size: int) -> str:
        """Start an object of `size` bytes, invisible until completed; return the upload's id."""

    @abstractmethod
    def write_part(self, uri: str, upload: str, number: int, offset: int, data: memoryview) -> Part:
        """Write one part, durably; writing a part again replaces it. Any process may call this."""

    @abstractmethod
    def list_parts(self, uri: str, upload: str) -> tuple[Part, ...] | None:
        """Return the written parts, by number; None where the store does not know the upload.

        A store that can't list single parts (a local file) returns () for a known upload.
        """

    @abstractmethod
    def list_uploads(self, folder: str) -> tuple[tuple[str, str], ...]:
        """Return (object's URI, upload id) of the unfinished uploads of objects directly in a folder, sorted."""

    @abstractmethod
    def complete_upload(self, uri: str, upload: str, parts: Sequence[Part]) -> Pin:
        """Make the object visible, whole; nothing happens if this upload is complete already."""

    @abstractmethod
    def abort_upload(self, uri: str, upload: str) -> None:
        """Forget an upload and its parts; nothing happens where there is none."""

    def space(self, folder: str) -> "Space | None":
        """Return the room for files in a folder; None where the store tells no limit."""
        return None


class Stores:
    """The stores of one process, opened when first used, one a scheme."""

    def __init__(self, options: Mapping[str, Mapping[str, object]]) -> None:
        """`options` is the recipe's `storage` section as JSON."""
        self.options = options
        self._open: dict[str, Store] = {}
        self._opening = threading.Lock()

    def of(self, uri: str) -> Store:
        """Return the store that serves `uri`; raise `InputError` for a URI that would carry a secret into messages."""
        if holds_secret(uri):
            message = "is a URL with a password or a signature in it"
            remedy = "give the plain URL; credentials come from the environment, a profile or a role"
            raise InputError(Problem(shown(uri), message, remedy))
        scheme = scheme_of(uri)
        wrong = unserved(uri) if scheme not in self._open or "::" in uri else ""
        if wrong:
            raise RecipeError(Problem(shown(uri), wrong, "check the URI"))
        with self._opening:
            if scheme not in self._open:
                options = options_of(scheme, self.options.get(scheme, {}))
                self._open[scheme] = store_class(scheme)(options)
            return self._open[scheme]

    def writer(self, uri: str) -> WritableStore:
        """Return the store that serves `uri`; raise `InputError` where it can only be read."""
        store = self.of(uri)
        if not isinstance(store, WritableStore):
            raise InputError(Problem(shown(uri), CAN_ONLY_BE_READ, WRITE_ELSEWHERE))
        return store

    def opened(self) -> tuple[Store, ...]:
        """Return the stores used so far."""
        return tuple(self._open.values())


def store_class(scheme: str) -> type[Store]:
    """Return the class that serves a scheme: its own file, or the generic one. Raises `RecipeError` if none does."""
    return plugins.load("stores", "fsspec" if is_generic(scheme) else scheme, Store)


def options_of(scheme: str, options: Mapping[str, object]) -> BaseModel:
    """Return the checked options of a scheme; raise `RecipeError` with all that is wrong, and no value in it."""
    try:
        return store_class(scheme).options.model_validate(dict(options))
    except ValidationError as error:
        raise RecipeError(
            Problem(
                ".".join(map(str, ("storage", scheme, *detail["loc"]))), detail["msg"].removeprefix("Value error, ")
            )
            for detail in error.errors(include_input=False, include_url=False)
        ) from None


class NoUpload(InterruptedMerge):
    """The store does not know an upload: the same command begins another, and does its shards again."""


def no_upload(uri: str, doing: str) -> NoUpload:
    """Return the error of a part or a completion whose upload was forgotten, as a lifecycle rule does."""
    message = f"{doing}: the store does not know the upload (any more)"
    return NoUpload(Problem(shown(uri), message, "run the same command again: it begins another upload"))


def changed(pin: Pin, difference: str) -> InputError:
    """Return the error of a read that met another content than the pinned one."""
    message = f"changed since the plan was made: {difference}"
    return InputError(Problem(shown(pin.uri), message, f"keep inputs unchanged during a merge; {FRESH_THEN}"))
