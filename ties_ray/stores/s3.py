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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from ties_ray.errors import InputError, MergeError, Problem, UnavailableError
from ties_ray.stores import (
    Brake,
    Listing,
    NoUpload,
    Part,
    Pin,
    Store,
    Transient,
    changed,
    crc32c,
    no_upload,
    persist,
    refuse_secrets,
    shown,
)

T = TypeVar("T")

_CHUNK = 1 << 20
"""Bytes handed to a socket at a time."""
_LEAST_RATE = 1 << 18
"""Bytes a second below which a transfer counts as hung, though it never falls silent..."""
_GRACE = 60.0
"""...after so many seconds."""
_DAMAGED = ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "IncompleteBody")
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")


class S3Options(BaseModel):
    """`storage.s3` of a recipe. Credentials are found as every AWS tool finds them: environment, profile, role."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)

    endpoint_url: str | None = None
    """Where the service listens, if it is not AWS."""
    region: str | None = None
    profile: str | None = None
    """A profile in the AWS configuration, which every worker must have."""
    ca: str | None = None
    """Path of a file with the certificates to trust, on every worker."""
    proxy: str | None = None
    """URL of an HTTP proxy."""
    requester_pays: bool = False
    kms_key_id: str | None = None
    """Encrypt what is written with this KMS key."""
    addressing: Literal["auto", "path", "virtual"] = "auto"
    """Whether the bucket stands in the path or in the host name."""
    checksums: Literal["when_required", "when_supported"] | None = None
    """What proves the bytes that are written: Content-MD5, or CRC32C, which some services other than AWS refuse; by
    default MD5 where `endpoint_url` is given, else CRC32C."""

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, given: object) -> object:
        return refuse_secrets(given)


class S3(Store):
    """`s3://bucket/key`. A request runs in the thread of its caller; all share one client and its connections."""

    options = S3Options
    pinned_by = "ETag, and version where the bucket keeps versions"
    writable = True
    patience: float = 120.0
    """Seconds that one call may go on repeating itself."""
    first_patience: float = 20.0
    """The same while nothing at the endpoint has ever answered, for it is likely a wrong address; and from when a call
    gave up until the next success, so that a run whose storage is down ends soon."""
    silence: float = 30.0
    """Seconds without a byte after which a connection counts as dead."""

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        assert isinstance(options, S3Options)
        if options.ca and not Path(options.ca).is_file():
            raise InputError(Problem("storage.s3.ca", f"there is no file {options.ca}", "every worker needs it"))
        self._crc = (
            options.checksums or ("when_required" if options.endpoint_url else "when_supported")
        ) != "when_required"
        self._payer = {"RequestPayer": "requester"} if options.requester_pays else {}
        self._sealed = (
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": options.kms_key_id} if options.kms_key_id else {}
        )
        self._answered = False
        self._given_up = False
        self._brake = Brake()
        self._etags_are_md5: dict[tuple[str, bool], bool] = {}
        """By bucket, and whether KMS encrypts; missing: not known yet."""
        self._options = options
        self._client: Any = None
        self._expired: Any = None
        """The client whose credentials have run out; at first the one that is not there yet."""
        self._connecting = threading.Lock()
        self._ask_version = True

    def _connected(self) -> Any:
        """Return the client; a new one, which looks for credentials anew, if those of the last have run out."""
        with self._connecting:
            if self._client is self._expired:
                self._client = _client(self._options, self.silence)
            return self._client

    def list(self, uri: str) -> Listing:
        """Return what lies directly in the folder, page by page of up to 1000 keys."""
        bucket, key = _split(uri)
        prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
        where = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
        files: list[Pin] = []
        folders: list[str] = []
        more = True
        while more:
            page = self._ask(uri, "listing it", "list_objects_v2", **where)
            files += [
                Pin(f"s3://{bucket}/{one['Key']}", one["Size"], _bare(one.get("ETag")))
                for one in page.get("Contents", ())
                if one["Key"] != prefix  # a marker that some tools leave for an empty folder
            ]
            folders += [f"s3://{bucket}/{one['Prefix'].rstrip('/')}" for one in page.get("CommonPrefixes", ())]
            more = page.get("IsTruncated", False)
            where["ContinuationToken"] = page.get("NextContinuationToken", "")
        return Listing(tuple(sorted(files, key=lambda pin: pin.uri.encode())), tuple(sorted(folders, key=str.encode)))

    def newest(self, uri: str) -> float | None:
        """Return the newest LastModified of a folder, whose first 1000 keys tell enough of a model."""
        bucket, key = _split(uri)
        page = self._ask(
            uri, "listing it", "list_objects_v2", Bucket=bucket, Prefix=f"{key.rstrip('/')}/", Delimiter="/"
        )
        return max((one["LastModified"].timestamp() for one in page.get("Contents", ())), default=None)

    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        """Return pin and first bytes by one GET of a range; an empty object, which has no range, costs a second."""
        wanted = max(nbytes, 1)

        def get(client: Any, late: float) -> tuple[Pin, bytes]:
            self.meter.add(requests=1)
            try:
                response = client.get_object(Range=f"bytes=0-{wanted - 1}", **_object(uri), **self._payer)
            except Exception as error:
                if _answer(error)[0] != 416:
                    raise
                self.meter.add(requests=1)
                response = client.get_object(**_object(uri), **self._payer)
            with response["Body"] as body:
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
        arguments = {"Range": f"bytes={start}-{start + len(into) - 1}", **_object(pin.uri), **self._payer}
        if pin.etag and not pin.etag.startswith("W/"):  # a weak ETag never satisfies If-Match
            arguments["IfMatch"] = f'"{pin.etag}"'

        def get(client: Any, late: float) -> None:
            version = {"VersionId": pin.version} if pin.version and self._ask_version else {}
            self.meter.add(requests=1)
            try:
                response = client.get_object(**arguments, **version)
            except Exception as error:
                status, code, _ = _answer(error)
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
        body.read(1)  # nothing: so urllib3 notices the end, and keeps the connection for the next request

    def put(self, uri: str, data: bytes) -> Pin:
        """Write an object by one request."""
        done, _ = self._send(uri, "writing it", "put_object", memoryview(data), **self._sealed)
        return _pin(uri, len(data), done)

    def swap(self, uri: str, data: bytes, etag: str) -> Pin | None:
        """Write with If-Match or If-None-Match; where the server ignores those, look before."""
        condition = {"IfMatch": f'"{etag}"'} if etag else {"IfNoneMatch": "*"}
        try:
            if self.head(uri, 0)[0].etag != etag:
                return None
        except FileNotFoundError:
            if etag:
                return None
        try:
            done, _ = self._send(uri, "writing it", "put_object", memoryview(data), **condition, **self._sealed)
        except (_Unmet, FileNotFoundError):  # 404 is what If-Match gives where the object has gone
            try:
                pin, there = self.head(uri, len(data) + 1)
            except FileNotFoundError:
                return None
            return pin if there == data else None  # ours, if only the answer to it was lost
        return _pin(uri, len(data), done)

    def delete(self, uri: str) -> None:
        """Remove the object."""
        self._ask(uri, "deleting it", "delete_object", **_object(uri))

    def begin_upload(self, uri: str, size: int) -> str:
        """Start a multipart upload."""
        algorithm = {"ChecksumAlgorithm": "CRC32C"} if self._crc else {}
        begun = self._ask(
            uri, "starting an upload", "create_multipart_upload", **_object(uri), **algorithm, **self._sealed
        )
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
        if self._crc:
            checksum = b64encode(bytes.fromhex(crc32c(data))).decode()
            proof = {"ChecksumCRC32C": checksum}
        else:
            checksum = _md5(data).hexdigest()
            proof = {"ContentMD5": b64encode(bytes.fromhex(checksum)).decode()}
        others = 0

        def send(client: Any, late: float) -> Any:
            nonlocal others
            body = _Body(data, late)
            answer = getattr(client, operation)(Body=body, **_object(uri), **arguments, **proof, **self._payer)
            self.meter.add(bytes_written=len(data))
            stored = answer.get("ChecksumCRC32C", checksum) if self._crc else _bare(answer.get("ETag"))
            if stored == checksum:
                if not self._crc:
                    self._etags_are_md5[_kind(uri, answer)] = True
                return answer
            others += 1
            kind, is_part = _kind(uri, answer), operation == "upload_part"
            unknown = not self._crc and kind not in self._etags_are_md5
            if unknown and (others == 3 if is_part else self._holds(client, uri, data, late)):
                self._etags_are_md5[kind] = False
            if self._crc or self._etags_are_md5.get(kind, True):
                raise Transient(f"other bytes arrived than were sent: {stored}, not {checksum}", attempts=4)
            return answer

        return self._repeat(uri, doing, send, len(data)), checksum

    def _holds(self, client: Any, uri: str, data: memoryview, late: float) -> bool:
        """Return whether the object is these bytes."""
        self.meter.add(requests=1)
        response = client.get_object(**_object(uri), **self._payer)
        with response["Body"] as body:
            if response.get("ContentLength") != len(data):
                return False
            found = bytearray(len(data))
            self._fill(body, memoryview(found), late)
        return found == data

    def list_parts(self, uri: str, upload: str) -> tuple[Part, ...] | None:
        """Return the parts which the service has, page by page of up to 1000."""
        parts: list[Part] = []
        marker, more = 0, True
        while more:
            page = self._ask_upload(uri, "listing parts", "list_parts", upload, PartNumberMarker=marker)
            if page is None:
                return None
            parts += [
                Part(one["PartNumber"], one["Size"], _bare(one["ETag"]), one.get("ChecksumCRC32C", ""))
                for one in page.get("Parts", ())
            ]
            more, marker = page.get("IsTruncated", False), page.get("NextPartNumberMarker", 0)
        return tuple(sorted(parts))

    def list_uploads(self, folder: str) -> tuple[tuple[str, str], ...]:
        """Return the multipart uploads under the prefix, page by page of up to 1000."""
        bucket, key = _split(folder)
        prefix = f"{key.rstrip('/')}/" if key else ""
        found: list[tuple[str, str]] = []
        marker: dict[str, str] = {}
        while True:
            page = self._ask(
                folder, "listing uploads", "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker
            )
            found += [
                (f"s3://{bucket}/{one['Key']}", one["UploadId"])
                for one in page.get("Uploads", ())
                if "/" not in one["Key"][len(prefix) :]
            ]
            if not page.get("IsTruncated"):
                return tuple(sorted(found))
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def complete_upload(self, uri: str, upload: str, parts: Sequence[Part]) -> Pin:
        """Join the parts, and look whether the object is what they must give.

        Its size always; its ETag where the parts' ETags are the MD5 of what was sent (not with KMS). With CRC32C the
        service itself compares. Where the upload is gone, an object that is what the parts give is its work.
        """
        parts = sorted(parts)
        entries: list[dict[str, int | str]] = [{"PartNumber": one.number, "ETag": f'"{one.etag}"'} for one in parts]
        if self._crc:
            for entry, part in zip(entries, parts, strict=True):
                entry["ChecksumCRC32C"] = part.checksum
        done = None
        if self.list_parts(uri, upload) is not None:  # some services answer 500 about an upload they don't know
            done = self._ask_upload(
                uri, "completing an upload", "complete_multipart_upload", upload, MultipartUpload={"Parts": entries}
            )
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
        """Return the answer of one request without a body either way."""

        def ask(client: Any, late: float) -> Any:
            return getattr(client, operation)(**arguments, **self._payer)

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
        client = None
        try:
            client = self._connected()
            result = request(client, time.monotonic() + _GRACE + nbytes / _LEAST_RATE)
        except (MergeError, Transient):
            self._answered = True
            raise
        except Exception as error:
            status, code, _ = _answer(error)
            self._answered = self._answered or status > 0
            if code in _EXPIRED:
                self._expired = client
            raise _explained(error, uri, doing) from error
        self._answered = True
        return result


def _client(options: S3Options, silence: float) -> Any:
    """Return a client of botocore, of a session of its own."""
    import botocore.session  # slow, and checking a recipe should not pay for it
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=silence,  # which urllib3 also gives each chunk that is sent
        read_timeout=silence,
        max_pool_connections=64,
        tcp_keepalive=True,
        s3={"addressing_style": options.addressing},
        request_checksum_calculation="when_required",  # write_part and put send their own
        response_checksum_validation="when_required",  # some send the whole object's checksum with a range
        proxies={"http": options.proxy, "https": options.proxy} if options.proxy else None,
    )
    session = botocore.session.Session(profile=options.profile)
    place = {"region_name": options.region, "endpoint_url": options.endpoint_url}
    return session.create_client("s3", **place, verify=options.ca, config=config)


class _Unmet(InputError):
    """The condition of a write does not hold."""


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
    """Return what decides whether an ETag is an MD5: the bucket, and whether KMS encrypted the object."""
    return _split(uri)[0], str(response.get("ServerSideEncryption", "")).startswith("aws:kms")


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


def _answer(error: Exception) -> tuple[int, str, str]:
    """Return HTTP status, code and message of an error that the service sent; (0, "", "") if it sent none."""
    response = getattr(error, "response", None)
    if not isinstance(response, Mapping):
        return 0, "", ""
    told = response.get("Error", {})
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status, str(told.get("Code", status)), str(told.get("Message", ""))


def _explained(error: Exception, uri: str, doing: str) -> Exception:
    """Return what to raise for an error of the service or of the client; the error itself if it is a defect of ours."""
    status, code, message = _answer(error)
    told = f"{code}: {shown(message)}" if message else code
    if not status:
        return _explained_client(error, uri, doing)
    if (status >= 500 and status != 501) or status in (408, 409, 429) or code in ("RequestTimeout", "SlowDown"):
        return Transient(f"{status} {told}", throttled=status in (429, 503) or code == "SlowDown")
    if code in _DAMAGED:
        return Transient(f"{status} {told}", attempts=4)
    if code in _EXPIRED:
        return Transient(f"{status} {told}, and so again after the credentials were looked up anew", attempts=4)
    if code == "NoSuchBucket":
        return InputError(Problem(uri, "there is no such bucket", "check the name, storage.s3.endpoint_url and region"))
    if code == "NoSuchUpload":
        return no_upload(uri, doing)
    if status == 404:
        return FileNotFoundError(uri)
    if status == 412:
        return _Unmet(Problem(uri, f"{doing}: another writer was there first", "run again"))
    if status in (401, 403):
        remedy = "check the credentials and their permissions; a missing object looks so too without s3:ListBucket"
        return InputError(Problem(uri, f"{doing} was refused ({told})", remedy))
    return InputError(Problem(uri, f"{doing} failed ({status} {told})", "check storage.s3, its region above all"))


def _explained_client(error: Exception, uri: str, doing: str) -> Exception:
    """Return what to raise for an error that happened on our side of the wire."""
    import urllib3
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    what = f"{doing} failed: {shown(error)}"
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.ProfileNotFound):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, storage.s3.profile, or a role, on every node"
        return InputError(Problem(uri, what, remedy))
    if isinstance(error, boto.SSLError) and "CERTIFICATE" in str(error).upper():
        return InputError(Problem(uri, what, "set storage.s3.ca to the certificates to trust"))
    if isinstance(error, boto.UnauthorizedSSOTokenError | boto.SSOTokenLoadError | boto.TokenRetrievalError):
        return UnavailableError(Problem(uri, what, "log in again, and run the same command again"))
    passing = (
        boto.HTTPClientError,
        boto.ConnectionError,
        boto.CredentialRetrievalError,
        boto.IncompleteReadError,
        boto.ResponseStreamingError,
        urllib3.exceptions.HTTPError,
        ResponseParserError,
        OSError,
    )
    if isinstance(error, passing):
        return Transient(error)
    if isinstance(error, boto.BotoCoreError | ValueError):
        return InputError(Problem(uri, what, "check the URI and storage.s3"))
    return error
