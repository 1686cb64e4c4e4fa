"""Objects of S3 and of what speaks its protocol, through botocore, but with a strict reader of our own.

botocore brings sessions, credentials, signatures and a pool of connections; its retries are off, and its responses are
not trusted: asked for 1 MiB, clients returned half of it, or the whole object, without a word. Here a response is
checked for status, Content-Range, length and ETag, and its body is received straight into the caller's memory.
"""

import hashlib
import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from ties_ray.errors import InputError, MergeError, Problem, UnavailableError
from ties_ray.stores import (
    Brake,
    Listing,
    NoUpload,
    Part,
    Pin,
    Transient,
    WritableStore,
    changed,
    crc32c,
    no_upload,
    persist,
)
from ties_ray.stores._s3_client import Connection, S3Options, connect
from ties_ray.stores._s3_errors import EXPIRED, Unconditional, Unmet, answer, explained, refuses

T = TypeVar("T")

_CHUNK = 1 << 20
"""Bytes handed to a socket at a time."""
_LEAST_RATE = 1 << 18
"""Bytes a second below which a transfer counts as hung, though it never falls silent..."""
_GRACE = 60.0
"""...after so many seconds."""
_MOST_NAMES = 200_000
"""What may lie directly in a folder, so that a listing without an end has one."""
_MOST_IDLE_PAGES = 20
"""Pages in a row that may bring nothing new; a service skips what was deleted by an empty page."""
_CRC_LETTERS = 8
"""Of a CRC32C in base64; an MD5 has 32, in hex."""
_STATIC = ("env", "shared-credentials-file", "config-file")
"""Where botocore finds credentials that do not renew themselves."""


class S3(WritableStore):
    """`s3://bucket/key`. A request runs in the thread of its caller; all share one client and its connections."""

    options = S3Options
    pinned_by = "ETag, and version where the bucket keeps versions"
    patience: float = 120.0
    """Seconds that one call may go on repeating itself."""
    first_patience: float = 20.0
    """The same while nothing at the endpoint has ever answered, for it is likely a wrong address; and from when a call
    gave up until the next success, so that a run whose storage is down ends soon."""
    silence: float = 30.0
    """Seconds without a byte after which a connection counts as dead."""

    settle: float = 2.0
    """Seconds between a write and the look at it that tells who won, at a service without conditional writes."""

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        assert isinstance(options, S3Options)
        if options.ca and not Path(options.ca).is_file():
            raise InputError(Problem("storage.s3.ca", f"there is no file {options.ca}", "every worker needs it"))
        self._payer = {"RequestPayer": "requester"} if options.requester_pays else {}
        self._sealed = options.sealed()
        self._customer = options.customer()
        self._answered = False
        self._given_up = False
        self._brake = Brake()
        self._etags_are_md5: dict[tuple[str, bool], bool] = {}
        """By bucket, and whether a key encrypts; missing: not known yet."""
        self._options = options
        self._connections: dict[bool, Connection] = {}
        """By whether requests go unsigned."""
        self._connecting = threading.Lock()
        self._ask_version = True
        self._crc: bool | None = None
        """Whether CRC32C proves what is written, else MD5; None before the first connection."""
        self._lists_v2 = True
        self._conditions: dict[tuple[str, str], bool] = {}
        """By bucket and condition, whether the service keeps it; missing: not known yet."""
        self._under_key: dict[str, bool] = {}
        """By bucket, whether its objects are under the customer's key; missing: taken for granted."""

    def _connected(self, uri: str) -> Connection:
        """Return the connection for a bucket."""
        unsigned = self._options.unsigned(_split(uri)[0])
        with self._connecting:
            if unsigned not in self._connections:
                made = connect(self._options, self.silence, unsigned=unsigned)
                if self._crc is None:
                    self._crc = made.checksums == "when_supported" or (made.is_aws and not made.checksums)
                self._connections[unsigned] = made
            return self._connections[unsigned]

    def _disconnect(self, expired: Connection) -> None:
        """Have credentials looked up anew by the next request, unless they have been already."""
        with self._connecting:
            self._connections = {kind: one for kind, one in self._connections.items() if one is not expired}

    def _note(self, what: str) -> None:
        """Say once, in the result, what the service lacks and what is done instead."""
        if what not in self.notes:
            self.notes.append(what)

    def list(self, uri: str) -> Listing:
        """Return what lies directly in the folder, page by page of up to 1000 keys.

        Markers are left out: keys that end with a slash, and Hadoop's `name_$folder$`.
        """
        bucket, prefix = _prefix(uri)
        files: dict[str, Pin] = {}
        folders: set[str] = set()
        idle = 0
        for page in self._pages(uri):
            before = len(files) + len(folders)
            for one in _rows(page, "Contents", "Key", "Size"):
                name, slash, _ = one["Key"].removeprefix(prefix).partition("/")
                if slash and name:
                    folders.add(name)
                elif name and not name.endswith("_$folder$"):
                    files[name] = Pin(f"s3://{bucket}/{prefix}{name}", one["Size"], _bare(one.get("ETag")))
            names = (
                one["Prefix"].removeprefix(prefix).partition("/")[0] for one in _rows(page, "CommonPrefixes", "Prefix")
            )
            folders.update(name for name in names if name)
            count = len(files) + len(folders)
            idle = 0 if count > before else idle + 1
            if idle > _MOST_IDLE_PAGES or count > _MOST_NAMES:
                told = f"{idle} pages in a row brought nothing new" if idle else f"more than {_MOST_NAMES:,} names"
                what = f"its listing has no end: {told}, and the service says that more follows"
                raise InputError(Problem(uri, what, "check storage.s3.endpoint_url, or name a smaller folder"))
        return Listing(
            tuple(sorted(files.values(), key=lambda pin: pin.uri.encode())),
            tuple(sorted((f"s3://{bucket}/{prefix}{name}" for name in folders), key=str.encode)),
        )

    def _pages(self, uri: str) -> Iterator[Mapping[str, Any]]:
        """Yield the pages of a folder's listing, by version 1 of the operation where a service knows no other."""
        bucket, prefix = _prefix(uri)
        where = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
        after: dict[str, str] = {}
        marker = ""

        def ask(client: Any, late: float) -> Any:
            if self._lists_v2:
                try:
                    return client.list_objects_v2(**where, **after, **self._payer)
                except Exception as error:
                    if not refuses(error, "list-type|ListObjectsV2"):
                        raise
            self._lists_v2 = False
            return client.list_objects(**where, Marker=marker, **self._payer)

        while True:
            page = self._repeat(uri, "listing it", ask, 0)
            yield page
            if not page.get("IsTruncated"):
                return
            if self._lists_v2 and "NextContinuationToken" not in page:
                self._lists_v2 = False  # version 1 was answered, though 2 was asked for: begin anew, by that
                continue
            after = {"ContinuationToken": page.get("NextContinuationToken", "")}
            last = [one["Key"] for one in _rows(page, "Contents", "Key")]
            last += [one["Prefix"] for one in _rows(page, "CommonPrefixes", "Prefix")]
            marker = page.get("NextMarker") or max([marker, *last], key=str.encode)

    def newest(self, uri: str) -> float | None:
        """Return the newest LastModified of a folder, whose first 1000 keys tell enough of a model."""
        page = next(self._pages(uri))
        return max((one["LastModified"].timestamp() for one in _rows(page, "Contents", "LastModified")), default=None)

    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        """Return pin and first bytes by one GET of a range; an empty object, which has no range, costs a second."""
        wanted = max(nbytes, 1)

        def get(client: Any, late: float) -> tuple[Pin, bytes]:
            try:
                response = self._get(client, uri, Range=f"bytes=0-{wanted - 1}")
            except Exception as error:
                if answer(error)[0] != 416:
                    raise
                response = self._get(client, uri)
            with response["Body"] as body:
                _demand_plain(response, uri)
                size = _whole_size(response, wanted)
                data = bytearray(min(wanted, size))
                self._fill(body, memoryview(data), late)
            if size == len(data) and _bare(response.get("ETag")) == _md5(data).hexdigest():
                self._etags_are_md5[_kind(uri, response)] = True
            return _pin(uri, size, response), bytes(data[:nbytes])

        return self._repeat(uri, f"reading its first {wanted:,} bytes", get, wanted)

    def read(self, pin: Pin, start: int, into: memoryview) -> None:
        """Read a range of the pinned object: If-Match is always sent, and the answer's ETag compared as well."""
        into = into.cast("B")
        if not into:
            return
        wanted = f"bytes {start}-{start + len(into) - 1}/{pin.size}"
        arguments = {"Range": f"bytes={start}-{start + len(into) - 1}"}
        if pin.etag and not pin.etag.startswith("W/"):  # a weak ETag never satisfies If-Match
            arguments["IfMatch"] = f'"{pin.etag}"'

        def get(client: Any, late: float) -> None:
            version = {"VersionId": pin.version} if pin.version and self._ask_version else {}
            try:
                response = self._get(client, pin.uri, **arguments, **version)
            except Exception as error:
                status, code, _ = answer(error)
                if status in (404, 412, 416) and code != "NoSuchBucket":
                    raise changed(pin, f"the store says {code}") from error
                if version and status == 403:  # a role may read objects, but no versions by id: the ETag pins as well
                    self._ask_version = False
                    raise Transient("no permission to read a version by its id") from error
                raise
            with response["Body"] as body:
                _demand(response, wanted, len(into), pin)
                self._fill(body, into, late)

        self._repeat(pin.uri, f"reading bytes {start:,} to {start + len(into):,}", get, len(into))

    def _get(self, client: Any, uri: str, **arguments: Any) -> Any:
        """Return the answer of a GET, with the customer's key or without: a bucket may hold objects of either kind."""
        bucket = _split(uri)[0]
        with_key = bool(self._customer) and self._under_key.get(bucket, True)
        self.meter.add(requests=1)
        asked = {**_object(uri), **arguments, **self._payer}
        try:
            return client.get_object(**asked, **(self._customer if with_key else {}))
        except Exception as error:
            if not self._customer or answer(error)[0] != 400:
                raise
            self.meter.add(requests=1)
            response = client.get_object(**asked, **({} if with_key else self._customer))
            self._under_key[bucket] = not with_key
            return response

    def _fill(self, body: Any, into: memoryview, late: float) -> None:
        """Receive a body, which was announced to be as long as `into`, straight into the caller's memory.

        `body` is urllib3's response. Its own `readinto` reads, copies, and waits for all that was asked for, however
        slowly it comes; so the socket's file below it is read here, and http.client's count of what is left is kept.
        """
        answer, filled = body._fp, 0
        try:
            while answer.length and (count := answer.fp.readinto1(into[filled:])):
                answer.length -= count
                filled += count
                _demand_time(late)
        finally:
            self.meter.add(bytes_read=filled)
        if filled < len(into):
            raise Transient(f"the answer ended after {filled:,} of {len(into):,} bytes")
        body.length_remaining = 0  # urllib3 counts what it has read itself, and would miss the rest
        body.read(1)  # nothing: so urllib3 notices the end, and keeps the connection for the next request

    def put(self, uri: str, data: bytes) -> Pin:
        """Write an object by one request."""
        try:
            done, _ = self._send(uri, "writing it", "put_object", memoryview(data), **self._sealed)
        except FileNotFoundError:
            what = "writing it failed (404)"
            remedy = "check storage.s3.endpoint_url and the bucket: nothing there answers as S3 does"
            raise InputError(Problem(uri, what, remedy)) from None
        return _pin(uri, len(data), done)

    def swap(self, uri: str, data: bytes, etag: str) -> Pin | None:
        """Write with If-Match or If-None-Match; where the service lacks those, write, wait, and look who has won.

        So does Fischer's algorithm: of writers who saw the same state and wrote within the wait, the last one wins.
        """
        condition = {"IfMatch": f'"{etag}"'} if etag else {"IfNoneMatch": "*"}
        kind = (_split(uri)[0], "IfMatch" if etag else "IfNoneMatch")
        began = time.monotonic()
        if not self._shows(uri, etag):
            return None
        if self._conditions.get(kind, True):
            try:
                done, _ = self._send(uri, "writing it", "put_object", memoryview(data), **condition, **self._sealed)
                if kind in self._conditions or self._keeps_conditions(uri, data, kind):
                    return _pin(uri, len(data), done)
            except Unconditional:
                self._conditions[kind] = False
                self.put(uri, data)
            except (Unmet, FileNotFoundError):  # 404 is what If-Match gives where the object has gone
                return self._if_holds(uri, data)  # ours, if only the answer to it was lost
        else:
            self.put(uri, data)
        self._note(
            f"s3://{kind[0]}: the service keeps no {'If-Match' if etag else 'If-None-Match'} on writes; who writes the"
            f" lease or a pointer waits {self.settle:g} s and looks whether another did too"
        )
        time.sleep(max(self.settle, 2 * (time.monotonic() - began)))
        return self._if_holds(uri, data)

    def _shows(self, uri: str, etag: str) -> bool:
        """Return whether the object has this ETag; "": whether there is none."""
        try:
            return self.head(uri, 0)[0].etag == etag
        except FileNotFoundError:
            return not etag

    def _if_holds(self, uri: str, data: bytes) -> Pin | None:
        """Return the pin of the object if it is these bytes."""
        try:
            pin, there = self.head(uri, len(data) + 1)
        except FileNotFoundError:
            return None
        return pin if there == data else None

    def _keeps_conditions(self, uri: str, data: bytes, kind: tuple[str, str]) -> bool:
        """Return whether the service keeps a condition, once it has taken a write under it: some take all.

        Asked by writing the same bytes again under a condition that does not hold. AWS is known to keep it.
        """
        if not self._connected(uri).is_aws:
            wrong = {"IfMatch": f'"{"0" * 32}"'} if kind[1] == "IfMatch" else {"IfNoneMatch": "*"}
            try:
                self._send(uri, "writing it", "put_object", memoryview(data), **wrong, **self._sealed)
                self._conditions[kind] = False
            except (Unmet, FileNotFoundError):
                self._conditions[kind] = True
        return self._conditions.get(kind, True)

    def delete(self, uri: str) -> None:
        """Remove the object."""
        self._ask(uri, "deleting it", "delete_object", **_object(uri))

    def begin_upload(self, uri: str, size: int) -> str:
        """Start a multipart upload."""

        def begin(client: Any, late: float) -> Any:
            algorithm = {"ChecksumAlgorithm": "CRC32C"} if self._crc else {}
            with self._dialect(algorithm):
                return client.create_multipart_upload(
                    **_object(uri), **algorithm, **self._sealed, **self._customer, **self._payer
                )

        begun = self._repeat(uri, "starting an upload", begin, 0)
        return str(begun["UploadId"])

    def write_part(self, uri: str, upload: str, number: int, offset: int, data: memoryview) -> Part:
        """Send one part, with the checksum by which the service proves what it got."""
        data = data.cast("B")
        done, checksum = self._send(
            uri, f"writing part {number}", "upload_part", data, UploadId=upload, PartNumber=number
        )
        return Part(number, len(data), _bare(done.get("ETag")), checksum)

    def _send(self, uri: str, doing: str, operation: str, data: memoryview, **arguments: Any) -> tuple[Any, str]:
        """Send bytes with the checksum that proves them; return the answer, and the checksum as a `Part` keeps it.

        Not every service compares; so its ETag is compared here. One that is not the MD5 may be damage, or the way of
        this service (KMS). Where neither has shown yet, an object is read back, and a part, which can't be, is sent
        three times before its ETag is believed. A worker knows: it reads the plan, which was written to the same
        place, before it writes.
        """
        proofs: dict[bool, tuple[str, dict[str, str]]] = {}
        others = 0

        def send(client: Any, late: float) -> tuple[Any, str]:
            nonlocal others
            crc = bool(self._crc)
            checksum, proof = proofs[crc] if crc in proofs else proofs.setdefault(crc, _proof(data, crc=crc))
            body = _Body(data, late)
            with self._dialect(arguments):
                done = getattr(client, operation)(
                    Body=body, **_object(uri), **arguments, **proof, **self._customer, **self._payer
                )
            self.meter.add(bytes_written=len(data))
            stored = done.get("ChecksumCRC32C", checksum) if crc else _bare(done.get("ETag"))
            if stored == checksum:
                if not crc:
                    self._etags_are_md5[_kind(uri, done)] = True
                return done, checksum
            others += 1
            kind, is_part = _kind(uri, done), operation == "upload_part"
            unknown = not crc and kind not in self._etags_are_md5
            if unknown and (others == 3 if is_part else self._holds(client, uri, data, late)):
                self._etags_are_md5[kind] = False
            if crc or self._etags_are_md5.get(kind, True):
                raise Transient(f"other bytes arrived than were sent: {stored}, not {checksum}", attempts=4)
            return done, checksum

        return self._repeat(uri, doing, send, len(data))

    @contextmanager
    def _dialect(self, asked: Mapping[str, Any]) -> Iterator[None]:
        """Turn to MD5 where the service refuses a request for its CRC32C, and have it sent again.

        A condition in `asked`, the arguments of the request, that is refused becomes `Unconditional`.
        """
        try:
            yield
        except Exception as error:
            if self._crc and self._options.checksums is None and refuses(error, "checksum|crc32"):
                self._crc = False
                self._note("s3://: the service refuses CRC32C checksums; Content-MD5 proves what is written instead")
                raise Transient("the service refuses CRC32C checksums") from error
            if not asked.keys().isdisjoint(("IfMatch", "IfNoneMatch")) and refuses(
                error, "if-none-match|if-match|condition"
            ):
                found = "the service does not know conditional writes"
                raise Unconditional(Problem("", found, "use a service that does")) from error
            raise

    def _holds(self, client: Any, uri: str, data: memoryview, late: float) -> bool:
        """Return whether the object is these bytes."""
        response = self._get(client, uri)
        with response["Body"] as body:
            if response.get("ContentLength") != len(data):
                return False
            found = bytearray(len(data))
            self._fill(body, memoryview(found), late)
        return found == data

    def list_parts(self, uri: str, upload: str) -> tuple[Part, ...] | None:
        """Return the parts which the service has, page by page of up to 1000; () where it can't list them."""
        parts: list[Part] = []
        marker = 0
        while True:
            page = self._ask_upload(uri, "listing parts", "list_parts", upload, PartNumberMarker=marker)
            if page is None:
                return None
            parts += [
                Part(one["PartNumber"], one["Size"], _bare(one["ETag"]), one.get("ChecksumCRC32C", ""))
                for one in _rows(page, "Parts", "PartNumber", "Size", "ETag")
            ]
            if not page.get("IsTruncated"):
                return tuple(sorted(parts))
            before, marker = marker, int(page.get("NextPartNumberMarker", 0))
            if marker <= before:
                raise _endless(uri, "the list of parts")

    def list_uploads(self, folder: str) -> tuple[tuple[str, str], ...]:
        """Return the multipart uploads under the prefix, page by page of up to 1000; () where it can't list them."""
        bucket, key = _split(folder)
        prefix = f"{key.rstrip('/')}/" if key else ""
        found: set[tuple[str, str]] = set()
        marker: dict[str, str] = {}
        while True:
            page = self._ask(
                folder, "listing uploads", "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker
            )
            uploads = {
                (f"s3://{bucket}/{one['Key']}", str(one["UploadId"]))
                for one in _rows(page, "Uploads", "Key", "UploadId")
            }
            more = page.get("IsTruncated")
            if more and (uploads <= found or "NextKeyMarker" not in page):
                raise _endless(folder, "the list of uploads")
            found |= uploads
            if not more:
                return tuple(sorted(one for one in found if "/" not in one[0].removeprefix(f"s3://{bucket}/{prefix}")))
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}

    def complete_upload(self, uri: str, upload: str, parts: Sequence[Part]) -> Pin:
        """Join the parts, and look whether the object is what they must give.

        Its size always; its ETag where the parts' ETags are the MD5 of what was sent (not with KMS). With CRC32C the
        service itself compares. Where the upload is gone, an object that is what the parts give is its work.
        """
        parts = sorted(parts)
        entries: list[dict[str, int | str]] = [{"PartNumber": one.number, "ETag": f'"{one.etag}"'} for one in parts]
        for entry, part in zip(entries, parts, strict=True):
            if len(part.checksum) == _CRC_LETTERS:  # else it is an MD5
                entry["ChecksumCRC32C"] = part.checksum
        done = None
        if self.list_parts(uri, upload) is not None:  # some services answer 500 about an upload they don't know
            arguments = {"MultipartUpload": {"Parts": entries}, **self._customer}
            done = self._ask_upload(uri, "completing an upload", "complete_multipart_upload", upload, **arguments)
        try:
            pin, _ = self.head(uri, 0)
        except FileNotFoundError:
            raise no_upload(uri, "completing an upload") from None
        is_md5 = all(part.etag == part.checksum for part in parts)
        etag = _joined(parts)
        likely = pin.etag == etag or (not is_md5 and (done is not None or pin.etag.endswith(f"-{len(parts)}")))
        if likely and pin.size == sum(part.size for part in parts):
            return pin
        if done is None:
            found = "the store does not know the upload, and the object is another"
            raise InputError(Problem(uri, found, "run the merge with --fresh"))
        what = f"the completed object has {pin.size:,} bytes and ETag {pin.etag}, but its parts give {etag}"
        raise UnavailableError(Problem(uri, what, "delete it, and run the merge with --fresh"))

    def abort_upload(self, uri: str, upload: str) -> None:
        """Forget the upload."""
        self._ask_upload(uri, "aborting an upload", "abort_multipart_upload", upload)

    def _ask_upload(self, uri: str, doing: str, operation: str, upload: str, **arguments: Any) -> Any:
        """Return the answer of a request about an upload; None if the service does not know it."""
        try:
            return self._ask(uri, doing, operation, **_object(uri), UploadId=upload, **arguments)
        except NoUpload:
            return None

    def _ask(self, uri: str, doing: str, operation: str, **arguments: Any) -> Any:
        """Return the answer of one request without a body either way; {} where the service has no such list."""

        def ask(client: Any, late: float) -> Any:
            try:
                return getattr(client, operation)(**arguments, **self._payer)
            except Exception as error:
                if not (operation.startswith("list_") and refuses(error, operation)):
                    raise
                self._note(f"s3://: the service can't do {operation}; uploads that a kill leaves behind stay there")
                return {}

        return self._repeat(uri, doing, ask, 0)

    def _repeat(self, uri: str, doing: str, request: Callable[[Any, float], T], nbytes: int) -> T:
        """Return what a request gives, which takes the client and the time when it is late."""

        def attempt() -> T:
            return self._once(uri, doing, request, nbytes)

        def seconds() -> float:
            return self.patience if self._answered and not self._given_up else self.first_patience

        try:
            result = persist(attempt, meter=self.meter, uri=uri, doing=doing, seconds=seconds, brake=self._brake)
        except UnavailableError:
            self._given_up = True
            raise
        self._given_up = False
        return result

    def _once(self, uri: str, doing: str, request: Callable[[Any, float], T], nbytes: int) -> T:
        connection = None
        try:
            connection = self._connected(uri)
            result = request(connection.client, time.monotonic() + _GRACE + nbytes / _LEAST_RATE)
        except (MergeError, Transient):
            self._answered = True
            raise
        except Exception as error:
            status, code, _ = answer(error)
            reached, self._answered = self._answered, self._answered or status > 0
            if connection and code in EXPIRED:
                self._disconnect(connection)
                raise self._expired(error, uri, connection) from error
            raise explained(
                error, uri, doing, reached=reached, unsigned=self._options.unsigned(_split(uri)[0])
            ) from error
        self._answered = True
        return result

    def _expired(self, error: Exception, uri: str, connection: Connection) -> Transient:
        """Return what to raise for credentials that have run out, after which they are looked up anew."""
        status, code, message = answer(error)
        what = f"{status} {code}: {message}, and so again after the credentials were looked up anew"
        static = connection.credentials[0] in _STATIC
        remedy = "get new credentials, and run the same command: what is done is kept"
        return Transient(what, attempts=4, remedy=remedy if static else None)


class _Body:
    """What botocore takes for a file: the caller's memory, sent without a copy."""

    def __init__(self, data: memoryview, late: float) -> None:
        self._data = data
        self._late = late
        self._at = 0

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int = -1) -> memoryview:
        """Return the next bytes: more than asked for, since urllib3 sends 16 KiB at a time if it may."""
        _demand_time(self._late)
        start = self._at
        self._at = len(self._data) if size < 0 else min(start + max(size, _CHUNK), len(self._data))
        return self._data[start : self._at]

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place, as a file does."""
        self._at = offset + (0, self._at, len(self._data))[whence]
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at


def _demand_time(late: float) -> None:
    """Raise if a transfer has gone on for too long, though it never fell silent."""
    if time.monotonic() > late:
        raise TimeoutError(f"fewer than {_LEAST_RATE:,} bytes a second came through")


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _prefix(uri: str) -> tuple[str, str]:
    """Return bucket and prefix of what lies in a folder."""
    bucket, key = _split(uri)
    return bucket, f"{key.rstrip('/')}/" if key.strip("/") else ""


def _object(uri: str) -> dict[str, Any]:
    bucket, key = _split(uri)
    if not bucket or not key:
        raise InputError(Problem(uri, "names no object", "write s3://bucket/key"))
    return {"Bucket": bucket, "Key": key}


def _bare(etag: str | None) -> str:
    """Return an ETag without its quotes."""
    return (etag or "").strip('"')


def _md5(data: bytes | bytearray | memoryview) -> "hashlib._Hash":
    return hashlib.md5(data, usedforsecurity=False)


def _kind(uri: str, response: Mapping[str, Any]) -> tuple[str, bool]:
    """Return what decides whether an ETag is an MD5: the bucket, and whether KMS or a customer's key encrypted it."""
    by_key = "SSECustomerAlgorithm" in response or str(response.get("ServerSideEncryption", "")).startswith("aws:kms")
    return _split(uri)[0], by_key


def _proof(data: memoryview, *, crc: bool) -> tuple[str, dict[str, str]]:
    """Return the checksum of a part, and the argument of a request by which the service checks it."""
    if crc:
        checksum = b64encode(bytes.fromhex(crc32c(data))).decode()
        return checksum, {"ChecksumCRC32C": checksum}
    checksum = _md5(data).hexdigest()
    return checksum, {"ContentMD5": b64encode(bytes.fromhex(checksum)).decode()}


def _rows(page: Mapping[str, Any], kind: str, *names: str) -> Sequence[Mapping[str, Any]]:
    """Return what a page lists of a kind; raise `InputError` where one lacks what it must have."""
    rows: Sequence[Mapping[str, Any]] = page.get(kind, ())
    missing = [name for name in names if any(name not in one for one in rows)]
    if missing:
        what = f"a service lists {kind} without their {', '.join(missing)}"
        raise InputError(Problem("storage.s3", what, "check endpoint_url: S3 answers otherwise"))
    return rows


def _endless(uri: str, what: str) -> InputError:
    found = f"{what} has no end: the service says that more follows, and sends nothing new"
    return InputError(Problem(uri, found, "check storage.s3.endpoint_url: S3 answers otherwise"))


def _pin(uri: str, size: int, response: Mapping[str, Any]) -> Pin:
    version = response.get("VersionId", "")
    return Pin(uri, size, _bare(response.get("ETag")), "" if version == "null" else version)


def _joined(parts: Sequence[Part]) -> str:
    """Return the ETag of an object joined from parts whose ETags are their MD5; empty if they can't be."""
    if not all(re.fullmatch("[0-9a-f]{32}", part.etag) for part in parts):
        return ""
    return f"{_md5(b''.join(bytes.fromhex(part.etag) for part in parts)).hexdigest()}-{len(parts)}"


def _status(response: Mapping[str, Any]) -> int:
    return int(response["ResponseMetadata"]["HTTPStatusCode"])


def _demand_plain(response: Mapping[str, Any], uri: str) -> None:
    """Raise unless the bytes of an object are those of the file: some uploads compress it, and say so beside it."""
    headers = response["ResponseMetadata"].get("HTTPHeaders", {})  # Google shows there what it has unpacked
    encodings = f"{response.get('ContentEncoding') or ''},{headers.get('x-goog-stored-content-encoding') or ''}".lower()
    found = {one.strip() for one in encodings.split(",")} - {"", "identity", "none", "aws-chunked"}
    if found:
        what = (
            f"is stored with Content-Encoding {', '.join(sorted(found))}: its bytes are compressed, and not the file's"
        )
        raise InputError(Problem(uri, what, "unpack it (gzip -d), and upload it again without that header"))


def _whole_size(response: Mapping[str, Any], wanted: int) -> int:
    """Return the size of the object whose first `wanted` bytes were asked for, if the answer is a sound one."""
    status, found, length = _status(response), response.get("ContentRange"), response.get("ContentLength")
    if status == 200 and found is None and length is not None and length <= wanted:
        return int(length)
    ranged = re.fullmatch(r"bytes 0-(\d+)/(\d+)", found or "")
    if status == 206 and ranged and int(ranged[1]) + 1 == min(wanted, int(ranged[2])) and length == int(ranged[1]) + 1:
        return int(ranged[2])
    raise Transient(f"asked for bytes 0-{wanted - 1}, {_told(response)}", attempts=4)


def _demand(response: Mapping[str, Any], wanted: str, count: int, pin: Pin) -> None:
    """Raise unless the answer announces just the range that was asked for, of the pinned object."""
    etag, found = _bare(response.get("ETag")), response.get("ContentRange")
    if etag != pin.etag:
        raise changed(pin, f"ETag {pin.etag or 'none'}, now {etag or 'none'}")
    whole = _status(response) == 200 and found is None and count == pin.size
    ranged = _status(response) == 206 and found == wanted
    if not (whole or ranged) or response.get("ContentLength") != count:
        raise Transient(f"asked for {wanted}, {_told(response)}", attempts=4)


def _told(response: Mapping[str, Any]) -> str:
    found = response.get("ContentRange", "no Content-Range")
    return f"got status {_status(response)} with {found} and {response.get('ContentLength')} bytes"
