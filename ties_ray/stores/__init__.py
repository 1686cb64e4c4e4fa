"""The contract of a storage backend: one file here a URI scheme, `fsspec.py` for every scheme without one.

A store is built in the process that uses it and is never pickled. Nothing above this folder knows fsspec, boto or
paths of a disk. URIs are plain strings: `s3://bucket/key`, `/folder/file` or `file:///folder/file`, `memory://x/y`.
"""

import functools
import os
import random
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple, NoReturn, TypeVar

import tenacity
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from ties_ray import plugins
from ties_ray.errors import (
    FRESH_THEN,
    USER_IN_URL,
    InputError,
    InterruptedMerge,
    Problem,
    RecipeError,
    UnavailableError,
    holds_secret,
)
from ties_ray.errors import shown as shown  # for all who import it from here

__path__ = plugins.search_path("stores", list(__path__))

T = TypeVar("T")


class Pin(NamedTuple):
    """One object as it was when it was first seen; later reads demand that it still is."""

    uri: str
    size: int
    """In bytes."""
    etag: str = ""
    """What identifies the content: an S3 ETag without its quotes; for a local file `mtime_ns-inode`; empty where the
    scheme has none, so that only the size is pinned: whoever plans must say so."""
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
    """As the store named it, empty where it has none (local)."""
    checksum: str = ""
    """What was sent along to prove the bytes, in the store's own form; to be handed back at completion."""


class Space(NamedTuple):
    """The room that a folder's disk has."""

    free: int
    """Bytes that this process may still fill."""
    held: int
    """Bytes that unfinished uploads of objects directly in the folder have taken already."""


KEEP = "keep inputs unchanged while they are planned and merged, and run it again"

CAN_ONLY_BE_READ = "can only be read"
WRITE_ELSEWHERE = "write to a local folder or an s3:// bucket"

_METER = threading.Lock()
"""One for all meters, so that a meter stays a plain value that can be copied and sent."""


@dataclass
class Meter:
    """What a store did, for the result and for tests that hold the plan to its word."""

    requests: int = 0
    """Requests sent for reads of data (`read` and `head`), retries included."""
    bytes_read: int = 0
    bytes_written: int = 0
    retries: int = 0

    def add(self, *, requests: int = 0, bytes_read: int = 0, bytes_written: int = 0, retries: int = 0) -> None:
        """Count; from any thread."""
        with _METER:
            self.requests += requests
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written
            self.retries += retries


class NoOptions(BaseModel):
    """The options of a store that has none."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Store(ABC):
    """Lists folders and reads ranges.

    Errors are those of `ties_ray.errors`: `InputError` for what is missing, forbidden or changed (message: the URI,
    what was asked, what came), `UnavailableError` when the one retry budget is spent. Methods may be called from
    several threads at once.
    """

    options: ClassVar[type[BaseModel]] = NoOptions
    """The pydantic model of `storage.<scheme>` in a recipe; never holds a secret."""
    pinned_by: ClassVar[str] = "ETag"
    """How well a read is tied to the planned content, for the plan's text."""
    exact_listing: ClassVar[bool] = False
    """Whether a listing's pins are those that `head` gives, so that a file which changed in between shows."""

    def __init__(self, options: BaseModel) -> None:
        self.meter = Meter()
        self.notes: list[str] = []
        """What the reader of a result should know: where the service lacks something, and what was done instead."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("a store holds connections and credentials: build it in the process that uses it")

    def resolve(self, uri: str) -> str:
        """Return the URI by which any process finds the same folder: absolute, and of a commit where there are some."""
        return absolute(uri)

    @abstractmethod
    def list(self, uri: str) -> Listing:
        """Return what lies directly in the folder `uri` (empty where there is nothing)."""

    def folders(self, uri: str) -> tuple[str, ...]:
        """Return the folders in a folder, as `list` does, whatever its files are."""
        return self.list(uri).folders

    def list_below(self, root: str, name: str) -> Listing:
        """Return what lies directly in the folder `name` (relative, `a/b`) of the folder `root`.

        A store that knows links raises `InputError` where one leads out of `root`.
        """
        return self.list(within(root, name))

    def newest(self, uri: str) -> float | None:
        """Return when the newest file directly in the folder was written (seconds since 1970, by the store's clock).

        None where there is none, or the store does not tell.
        """
        return None

    @abstractmethod
    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        """Return the object's pin and its first `nbytes` bytes (fewer if it is shorter), in one request.

        Raises `FileNotFoundError` where there is no such object.
        """

    def head_listed(self, listed: Pin, nbytes: int) -> tuple[Pin, bytes]:
        """Return what `head` returns of a file that a listing has shown.

        Raises `InputError` where it is gone, or where the listing's pin shows that it is another file by now.
        """
        try:
            pin, data = self.head(listed.uri, nbytes)
        except FileNotFoundError:
            raise InputError(Problem(shown(listed.uri), "is gone although it was listed", KEEP)) from None
        if self.exact_listing and pin != listed:
            raise InputError(Problem(shown(listed.uri), "changed while the plan was made", KEEP))
        return pin, data

    def get_pinned(self, pin: Pin) -> bytes:
        """Return a small object whole, as pinned; raise `InputError` where it is another by now."""
        data = bytearray(pin.size)
        self.read(pin, 0, memoryview(data))
        return bytes(data)

    @abstractmethod
    def read(self, pin: Pin, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes [start, start + len(into)) of the object as pinned; exactly, or raise.

        Raises `InputError` if the object is gone or no longer the pinned one; nothing is returned from another content.
        """

    def at_hand(self, pin: Pin, position: int) -> bool:
        """Return whether the byte at `position` is in this machine's memory, so that a read would copy and not wait."""
        return False

    def get(self, uri: str, limit: int) -> tuple[Pin, bytes]:
        """Return a small object whole, in one request; raise `InputError` if it has more than `limit` bytes.

        Raises `FileNotFoundError` where there is no such object.
        """
        pin, data = self.head(uri, limit)
        if pin.size > limit:
            found = f"has {pin.size:,} bytes, and at most {limit:,} were expected"
            raise InputError(Problem(shown(uri), found, "check that this is the right file"))
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
        """Return the parts that are there, by number; None where the upload is not known (any more).

        A store that can't list single parts (a local file) returns () for a known upload.
        """

    @abstractmethod
    def list_uploads(self, folder: str) -> tuple[tuple[str, str], ...]:
        """Return (object's URI, upload id) of the unfinished uploads of objects directly in a folder, sorted."""

    @abstractmethod
    def complete_upload(self, uri: str, upload: str, parts: Sequence[Part]) -> Pin:
        """Make the object visible, whole; does nothing more if just this upload was completed before."""

    @abstractmethod
    def abort_upload(self, uri: str, upload: str) -> None:
        """Forget an upload and its parts; nothing happens where there is none."""

    def space(self, folder: str) -> "Space | None":
        """Return how much room there is for files in a folder; None where the store has no limit that it tells."""
        return None


REMOTE = frozenset({
    "abfs", "abfss", "adl", "arrow_hdfs", "az", "box", "dbfs", "dropbox", "ftp", "gcs", "gdrive", "gist", "github",
    "gs", "hdfs", "hf", "http", "https", "lakefs", "oci", "ocilake", "oss", "s3a", "sftp", "ssh", "tos", "tosfs",
    "webdav", "webhdfs",
})  # fmt: skip
"""Schemes that `fsspec.py` serves: each names files of one remote store, and nothing else.

fsspec knows others, which lead from a URI to other URIs, to local files or to code: `reference`, `filecache`, `zip`,
`local`, `memory`, `git`, `jupyter`, ... No URI gets there; a store of one's own is a plugin.
"""
_FAMILIES = (("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss", "adl"), ("http", "https"))
"""Schemes that are spellings of one service."""


def unserved(uri: str) -> str:
    """Return why no store serves a URI, for a message; empty where one does."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        return ""
    if scheme in REMOTE and "::" in uri:
        return "is a chain of URIs (::), which could lead anywhere: give the plain URI of one folder or file"
    own = set(plugins.names("stores")) - {"fsspec", "local"}
    if scheme in own | REMOTE:
        return ""
    return plugins.unknown(scheme, sorted(own | {"file"} | REMOTE), "scheme")


def _served(uri: str) -> str:
    wrong = unserved(uri)
    if wrong:
        raise ValueError(wrong)
    return uri


Uri = Annotated[str, AfterValidator(_served)]
"""A path or URI in a recipe, which some store serves."""


def leads_from(table: str, uri: str) -> bool:
    """Return whether a table may name a URI: a local one any, another one only what its own service holds."""
    ours, theirs = scheme_of(table), scheme_of(uri)
    return ours in ("local", theirs) or any({ours, theirs} <= set(family) for family in _FAMILIES)


def scheme_of(uri: str) -> str:
    """Return the scheme of a URI; `local` for a path and for `file://`."""
    scheme, separator, _ = uri.partition("://")
    return "local" if not separator or scheme == "file" else scheme


def absolute(uri: str) -> str:
    """Return the URI as any process of this machine understands it: a local path made absolute, `~` expanded."""
    return os.path.abspath(os.path.expanduser(uri)) if scheme_of(uri) == "local" and "://" not in uri else uri


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?:@[\w./-]+)?")


def hub_uri(uri: str) -> str:
    """Return `hf://org/name` for a bare `org/name` that is no path of this machine; any other URI as it is."""
    organisation = os.path.expanduser(uri).partition("/")[0]
    if _HUB_NAME.fullmatch(uri) and not os.path.exists(organisation):
        return f"hf://{uri}"
    return uri


def hub_name(uri: str) -> str:
    """Return `org/name` of a URI of the hub, which is what its libraries take; any other URI as it is."""
    found = re.match(r"hf://([^/@]+/[^/@]+)", uri)
    return found[1] if found else uri


def join(folder: str, name: str) -> str:
    """Return the URI of `name`, a single file or folder name, directly inside `folder`.

    Others may have written the document that gives the name, and here no name leaves its folder. Raises `InputError`
    for a name that is empty, `.` or `..`, or holds a slash, a backslash or a NUL.
    """
    if name in ("", ".", "..") or _NO_NAME.search(name):
        what = f"{name!r} is not the name of a file in this folder"
        remedy = "rename the file, or remove the document that names it; for an output, merge again with --fresh"
        raise InputError(Problem(shown(folder), what, remedy))
    return entry_uri(folder, name)


def entry_uri(folder: str, name: str) -> str:
    """Return the URI of an entry that the store itself lists in `folder`: disks and buckets allow odd names."""
    return f"{folder.rstrip('/')}/{name}"


def last_part(uri: str) -> str:
    """Return the name of a file or folder in its own folder."""
    return uri.rpartition("/")[2]


def within(folder: str, name: str) -> str:
    """Return the URI of a relative name of one or more components (`1_Pooling/config.json`) inside a folder.

    Raises `InputError` for a name that could lead anywhere else: each component is checked as by `join`.
    """
    for part in name.split("/"):
        folder = join(folder, part)
    return folder


_NO_NAME = re.compile(r"[/\\\0]")


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
            what = "is a URL with a password or a signature in it"
            remedy = "give the plain URL; credentials come from the environment, a profile or a role"
            raise InputError(Problem(shown(uri), what, remedy))
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
    generic = scheme in REMOTE and scheme not in plugins.names("stores")
    return plugins.load("stores", "fsspec" if generic else scheme, Store)


def options_of(scheme: str, given: Mapping[str, object]) -> BaseModel:
    """Return the checked options of a scheme; raise `RecipeError` with all that is wrong, and no value in it."""
    try:
        return store_class(scheme).options.model_validate(dict(given))
    except ValidationError as error:
        raise RecipeError(
            Problem(".".join(map(str, ("storage", scheme, *one["loc"]))), one["msg"].removeprefix("Value error, "))
            for one in error.errors(include_input=False, include_url=False)
        ) from None


_SECRET = re.compile(
    r"secret|token|passw|passphrase|credential|signature|authorization|cookie|connection_?string"
    r"|(api|access|account|private|sas|shared)_?key|^(key|auth|sas|user|username)$"
)


def refuse_secrets(given: object) -> object:
    """Return `given`, the options of a store, unless a key or a URL in it looks like a credential: then ValueError.

    What stands in a recipe ends up in plans, logs and Ray's arguments.
    """
    if isinstance(given, Mapping):
        for key, value in given.items():
            if value is not None and not isinstance(value, bool) and _SECRET.search(str(key).lower()):
                raise ValueError(
                    f"{key!r} looks like a secret, and a recipe never holds one: credentials come from the environment,"
                    " a profile or a role"
                )
            refuse_secrets(value)
    elif isinstance(given, list | tuple):
        for value in given:
            refuse_secrets(value)
    elif isinstance(given, str) and USER_IN_URL.match(given):
        raise ValueError("a URL with a user or password in it is a secret, and a recipe never holds one")
    return given


class Transient(Exception):
    """A request failed in a way that a repetition may mend; a store raises it inside `persist`."""

    def __init__(
        self, cause: object, attempts: int | None = None, throttled: bool = False, remedy: str | None = None
    ) -> None:
        super().__init__(shown(cause) or type(cause).__name__)
        self.attempts = attempts
        """Give up after so many; None: when the time is spent."""
        self.throttled = throttled
        """The store asks for fewer requests."""
        self.remedy = remedy
        """What to do once it is given up, where another try later can't help: it is then an `InputError`."""


class Brake:
    """Slows down all requests of a store, whatever the number of threads, after it said that they are too many.

    While it is on, requests start one by one with a gap between them; a refusal doubles the gap, up to `largest`
    seconds, and a success halves it, until the brake is off. So a worker sends a store that only refuses no more than
    about one request in `largest` seconds.
    """

    smallest: ClassVar[float] = 0.1
    largest: ClassVar[float] = 2.0

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._gap = 0.0
        self._next = 0.0
        self._doubled = 0.0
        self.cause = ""
        """What the last refusal said."""

    def wait(self, seconds: float) -> bool:
        """Wait until a request may start, at most so long; return whether it may."""
        late = time.monotonic() + seconds
        with self._turn:
            while self._gap and (now := time.monotonic()) < self._next:
                if now >= late:
                    return False
                self._turn.wait(min(self._next, late) - now)
            self._next = time.monotonic() + self._gap * random.uniform(0.5, 1.5)  # so that workers drift apart
        return True

    def refused(self, sent: float, cause: str) -> None:
        """Note a refusal of a request that was sent at `sent`, by the monotonic clock."""
        with self._turn:
            self.cause = cause
            if sent >= self._doubled:  # else it was on its way before the last refusal was heard
                self._doubled = time.monotonic()
                self._gap = min(max(2 * self._gap, self.smallest), self.largest)
                self._next = self._doubled + self._gap

    def served(self) -> None:
        """Note a success."""
        if self._gap:
            with self._turn:
                self._gap = self._gap / 2 if self._gap > self.smallest else 0.0
                self._next = min(self._next, time.monotonic() + self._gap)
                self._turn.notify_all()


def persist(
    attempt: Callable[[], T],
    *,
    meter: Meter,
    uri: str,
    doing: str,
    seconds: Callable[[], float],
    brake: Brake | None = None,
) -> T:
    """Return `attempt()`, repeated after `Transient` with growing, random pauses: the one retry layer.

    Raises `UnavailableError` when `seconds()` have passed, or `InputError` where the last `Transient` has a remedy.
    `seconds` is asked anew each time, since a store that has answered before deserves more patience. `doing` says what
    was asked, for the message. `brake` is shared by all requests that should slow down together.
    """
    brake = brake or Brake()
    started = time.monotonic()

    def once() -> T:
        if not brake.wait(started + seconds() - time.monotonic()):
            raise Transient(f"{brake.cause}; after that its turn did not come in time", attempts=0)
        sent = time.monotonic()
        try:
            result = attempt()
        except Transient as cause:
            if cause.throttled:
                brake.refused(sent, str(cause))
            raise
        brake.served()
        return result

    def spent(state: tenacity.RetryCallState) -> bool:
        cause = state.outcome.exception() if state.outcome else None
        limit = cause.attempts if isinstance(cause, Transient) else None
        late = (state.seconds_since_start or 0.0) + state.upcoming_sleep > seconds()
        return late or (limit is not None and state.attempt_number >= limit)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Transient),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=15),
        stop=spent,
        before_sleep=lambda _: meter.add(retries=1),
        reraise=True,
    )
    try:
        return retrying(once)
    except Transient as error:
        count, passed = retrying.statistics["attempt_number"], time.monotonic() - started
        what = f"{doing} failed {count} times in {passed:.0f} s, last: {error}"
        if error.remedy is not None:
            raise InputError(Problem(shown(uri), what, error.remedy)) from None
        raise UnavailableError(Problem(shown(uri), what, "run the same command again later")) from None


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it; botocore keeps them as `kwargs["error"]`, urllib3 as `reason`."""
    seen: set[int] = set()
    left = [error]
    while left:
        one = left.pop()
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            kept = getattr(one, "kwargs", None)
            inner = kept.get("error") if isinstance(kept, Mapping) else None
            left += [one.__cause__, one.__context__, getattr(one, "reason", None), inner]


class NoUpload(InterruptedMerge):
    """The store does not know an upload (any more): the same command begins another, and does its shards again."""


def no_upload(uri: str, doing: str) -> NoUpload:
    """Return the error of a part or a completion whose upload was forgotten, as a lifecycle rule does."""
    what = f"{doing}: the store does not know the upload (any more)"
    return NoUpload(Problem(shown(uri), what, "run the same command again: it begins another upload"))


def changed(pin: Pin, found: str) -> InputError:
    """Return the error of a read that met another content than the pinned one."""
    what = f"changed since the plan was made: {found}"
    return InputError(Problem(shown(pin.uri), what, f"keep inputs unchanged during a merge; {FRESH_THEN}"))


def crc32c(data: memoryview) -> str:
    """Return the CRC32C of the bytes, 8 hex digits; 16 GB/s on one core with SSE 4.2."""
    # both imported here: the command line reads this file to check a recipe, and takes neither for it
    import google_crc32c
    import numpy as np

    return f"{google_crc32c.value(np.frombuffer(data, np.uint8)):08x}"  # it takes an array in place, a memoryview not


def crc32c_joined(runs: Iterable[tuple[str, int]]) -> str:
    """Return the CRC32C of runs of bytes joined, each given as (its CRC32C, its size).

    Bytes are a polynomial over GF(2), and a CRC is the rest after a division: to append bytes multiplies what was there
    by x^8 for each, and adds them.
    """
    total = 0
    for crc, size in runs:
        total = _times(total, _x_to_the(8 * size)) ^ int(crc, 16)
    return f"{total:08x}"


_CASTAGNOLI = 0x82F63B78
"""CRC32C's polynomial without its x^32; as everywhere here, the highest bit is the coefficient of x^0."""


def _times(first: int, second: int) -> int:
    """Return the product of two polynomials, modulo CRC32C's."""
    product = 0
    while first:
        if first & 0x8000_0000:
            product ^= second
        first = first << 1 & 0xFFFF_FFFF
        second = second >> 1 ^ (_CASTAGNOLI if second & 1 else 0)
    return product


@functools.lru_cache
def _x_to_the(power: int) -> int:
    """Return x^power modulo CRC32C's polynomial; a file's parts have two sizes."""
    result, square = 1 << 31, 1 << 30
    while power:
        if power & 1:
            result = _times(result, square)
        square, power = _times(square, square), power >> 1
    return result
