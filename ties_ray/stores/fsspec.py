"""The schemes of `stores.REMOTE`, through fsspec: gs, az, hf (with @revision), http, github, ...; read only."""

import posixpath
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import fsspec
from fsspec.registry import known_implementations
from pydantic import BaseModel, ConfigDict, model_validator

from ties_ray.errors import InputError, MergeError, Problem, RecipeError
from ties_ray.stores import (
    Listing,
    Pin,
    Store,
    Transient,
    causes_of,
    changed,
    entry_uri,
    persist,
    refuse_secrets,
    scheme_of,
    shown,
)

T = TypeVar("T")

_NO_RANGES = "copy the files to a store that sends parts of a file (HTTP ranges)"
_WHOLE_BYTES = 16 << 20
"""The most bytes that a server without ranges may send whole for a part."""
_MARKS = (
    *("ETag", "etag", "sha256", "sha", "blob_id", "generation", "version", "version_id", "versionId"),
    *("md5Hash", "content_md5", "Content-MD5", "crc32c", "checksum"),
    *("mtime", "Last-Modified", "last_modified", "LastModified", "updated", "modified", "created"),
)
"""Marks of a file that change with its content, the best first."""


class FsspecOptions(BaseModel):
    """`storage.<scheme>` of a recipe: handed to the file system of that scheme; never a secret."""

    model_config = ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, options: object) -> object:
        if isinstance(options, Mapping) and "protocol" in options:
            raise ValueError("`protocol` would lead from this scheme to another one: leave it out")
        return refuse_secrets(options)


class Fsspec(Store):
    """Reads ranges by `cat_file`, and looks at the file again after each read.

    Few file systems can be asked for a certain content, so a read costs one small request more. A pin whose `etag` is
    empty holds the size alone.
    """

    options = FsspecOptions
    pinned_by = (
        "what the scheme shows of a file, looked at after each read: ETag or checksum, else time, else size alone"
    )
    patience: float = 60.0
    """Seconds that one call may go on repeating itself."""

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        self._given = options.model_dump()

    def list(self, uri: str) -> Listing:
        """Return what lies directly in the folder."""

        def listed() -> Listing:
            files, path = self._at(uri)
            files.invalidate_cache()
            entries = files.ls(path, detail=True)
            inside = {name: entry for entry in entries if (name := _name_in(path, entry["name"]))}
            pins = [_pin(entry_uri(uri, name), entry) for name, entry in inside.items() if entry["type"] == "file"]
            folders = [entry_uri(uri, name) for name, entry in inside.items() if entry["type"] == "directory"]
            return Listing(tuple(sorted(pins)), tuple(sorted(folders)))

        try:
            return self._repeat(uri, "listing it", listed)
        except FileNotFoundError:
            return Listing((), ())

    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        """Return pin and first bytes; one request for each."""

        def get() -> tuple[Pin, bytes]:
            pin = self._look(uri)
            return pin, self._bytes(pin, 0, min(nbytes, pin.size))

        return self._repeat(uri, f"reading its first {nbytes:,} bytes", get)

    def read(self, pin: Pin, start: int, into: memoryview) -> None:
        """Read a range, then look whether the file is still the pinned one."""
        into = into.cast("B")

        def get() -> None:
            into[:] = self._bytes(pin, start, start + len(into))
            now = self._look(pin.uri)
            if now != pin:
                raise changed(pin, f"{pin.size:,} bytes with {pin.etag}, now {now.size:,} with {now.etag}")

        try:
            self._repeat(pin.uri, f"reading bytes {start:,} to {start + len(into):,}", get)
        except FileNotFoundError:
            raise changed(pin, "the file is gone") from None

    def _bytes(self, pin: Pin, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        files, path = self._at(pin.uri)
        self.meter.add(requests=1)
        data: bytes = files.cat_file(path, start=start, end=stop)
        self.meter.add(bytes_read=len(data))
        if len(data) != stop - start:
            message = f"asked for {stop - start:,} bytes, {len(data):,} came"
            raise Transient(message, attempts=4, remedy=_NO_RANGES if len(data) == pin.size else None)
        return data

    def _look(self, uri: str) -> Pin:
        files, path = self._at(uri)
        files.invalidate_cache(path)
        entry = files.info(path)
        if entry["type"] != "file":
            raise FileNotFoundError(shown(uri))
        if not isinstance(entry.get("size"), int):
            raise InputError(Problem(shown(uri), "the server does not tell its size", "copy it to another store"))
        if entry.get("partial") is False and entry["size"] > _WHOLE_BYTES:
            raise InputError(Problem(shown(uri), "the server says that it sends no ranges", _NO_RANGES))
        return _pin(uri, entry)

    def _at(self, uri: str) -> tuple[Any, str]:
        """Return the file system that serves `uri`, which fsspec keeps for the next call, and the path in it."""
        scheme = scheme_of(uri)
        try:
            files, path = fsspec.core.url_to_fs(uri, **self._given)
        except ImportError as error:
            package = (error.name or known_implementations[scheme]["class"].partition(".")[0]).replace("_", "-")
            remedy = f"run `pip install {package}` on every node"
            raise InputError(Problem(shown(uri), f"reading {scheme}:// needs another package", remedy)) from error
        except ValueError as error:
            if scheme in fsspec.available_protocols():
                raise
            message, remedy = f"no package is installed that serves {scheme}://", "install one for fsspec on every node"
            raise InputError(Problem(shown(uri), message, remedy)) from error
        except TypeError as error:
            raise RecipeError(Problem(f"storage.{scheme}", shown(error), "see fsspec's documentation")) from error
        return files, path

    def _repeat(self, uri: str, doing: str, attempt: Callable[[], T]) -> T:
        """Return `attempt()`; the errors of any file system become ours."""

        def once() -> T:
            try:
                return attempt()
            except (MergeError, Transient):
                raise
            except Exception as raised:
                error = _behind(raised)
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(shown(uri)) from None
                status = _status(error)
                if isinstance(error, PermissionError) or status in (401, 403):
                    remedy = f"check the credentials that {scheme_of(uri)}:// finds, and their permissions"
                    raise InputError(Problem(shown(uri), f"{doing} was refused ({shown(error)})", remedy)) from error
                if 400 <= status < 500 and status not in (408, 429):
                    message = f"{doing} failed ({shown(error)})"
                    raise InputError(Problem(shown(uri), message, "check the URI and its storage options")) from error
                advice, attempts = _lasting(error, scheme_of(uri))
                raise Transient(f"{type(error).__name__}: {error}", attempts=attempts, remedy=advice) from error

        return persist(once, meter=self.meter, uri=uri, doing=doing, seconds=lambda: self.patience)


def _name_in(path: str, name: str) -> str:
    """Return the last part of an entry's name; empty for what does not lie directly in the folder `path`."""
    inside = name.rstrip("/").removeprefix(path.rstrip("/")).strip("/")
    last = "" if "/" in inside and name.startswith(path) else posixpath.basename(inside)
    return "" if last in (".", "..") else last


def _pin(uri: str, entry: Mapping[str, Any]) -> Pin:
    lfs = entry.get("lfs")  # Hugging Face: of a large file, the SHA-256
    marks = {**entry, **({"sha256": lfs["sha256"]} if isinstance(lfs, Mapping) and "sha256" in lfs else {})}
    mark = next((name for name in _MARKS if marks.get(name)), "")
    return Pin(uri, entry["size"] or 0, f"{mark} {marks[mark]}" if mark else "")


def _behind(error: BaseException) -> BaseException:
    """Return the cause of an error that calls a file missing: fsspec's HTTP calls every failure so."""
    if isinstance(error, FileNotFoundError):
        for cause in causes_of(error):
            status = _status(cause)
            if status in (404, 410):
                return error
            if status or isinstance(cause, ConnectionError | TimeoutError | ssl.SSLError | socket.gaierror):
                return cause
    return error


def _lasting(error: BaseException, scheme: str) -> tuple[str | None, int | None]:
    """Return (remedy, attempts) of an error that another try can't mend; (None, None) for any other error.

    Client libraries share no base class, so that an unknown error counts as one that passes.
    """
    causes = list(causes_of(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return "let this machine trust the certificate: SSL_CERT_FILE, or its own list", 1
    if any(isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME for cause in causes):
        return "check the host in the URI: its name is not known", 4
    if any("Credential" in type(cause).__name__ for cause in causes) and not getattr(error, "retryable", False):
        return f"give the credentials that {scheme}:// looks for, on every node", 1
    if isinstance(error, NotImplementedError | TypeError | AttributeError | KeyError):
        return f"copy the files to another store: what serves {scheme}:// can't do this", 1
    return None, None


def _status(error: BaseException) -> int:
    """Return the HTTP status that an error of some client library carries; 0 without."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int | str) and str(value).isdigit():
                return int(value)
    return 0
