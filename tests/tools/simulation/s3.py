"""S3 as a client of botocore shows it: a server in memory, and a network that delays, loses and repeats.

A request and its answer travel by themselves. So a request may be carried out after its sender gave up, or has died.
"""

import base64
import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError

from tests.tools.simulation.world import Killed, Process, Thread, World
from ties_ray.stores import crc32c

SILENCE = 30.0
"""Seconds without a byte after which a client gives up, as `Service.silence`."""
NAMES = 1000
"""Rows of a page."""


def md5(data: bytes) -> str:
    """Return the MD5 in hex."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Object(NamedTuple):
    """An object of a bucket."""

    data: bytes
    etag: str


@dataclass
class Upload:
    """A multipart upload. It is kept when it has ended, as a late listing may show it."""

    key: str
    begun: float
    by: str
    """The process that has begun it."""
    asked: float
    """When that process sent its request."""
    is_known: bool = False
    """Whether the answer has reached that process."""
    ended: float | None = None
    parts: dict[int, Object] = field(default_factory=dict)


class Refusal(Exception):
    """The server refuses a request."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Dialect:
    """What a service does in its own way."""

    is_aws: bool = True
    """AWS proves bytes by CRC32C, else by MD5; and is known to keep conditions."""
    completes_twice: bool = False
    """Whether a completed upload may be completed again."""
    lag: float = 0.0
    """Seconds after which the listing of uploads shows a change, at most."""
    page: int = NAMES
    """Rows of a page of a listing."""
    conditional: bool = True
    """Whether it keeps the conditions of writes, else it takes every write."""


class Server:
    """Objects and uploads."""

    def __init__(self, world: World, dialect: Dialect) -> None:
        self.world, self.dialect = world, dialect
        self.objects: dict[str, Object] = {}
        self.uploads: dict[str, Upload] = {}
        self.watch: Callable[[str], None] = lambda key: None
        """Is called with a key that has become visible, or was changed."""
        self.looked: tuple[float, float] | None = None
        """When uploads were listed last, and of when that listing tells."""
        self._numbers = itertools.count(1)

    def open_uploads(self) -> dict[str, Upload]:
        """Return the uploads that are neither completed nor aborted."""
        return {name: upload for name, upload in self.uploads.items() if upload.ended is None}

    def handle(self, operation: str, asked: Mapping[str, Any], sender: str, sent: float) -> dict[str, Any]:
        """Carry out a request and return its answer. Raises `Refusal`. sent: when it was."""
        self._sender = sender, sent
        answer: dict[str, Any] = getattr(self, f"_{operation}")(**asked)
        status = answer.pop("status", 200)
        return {"ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}}, **answer}

    # -- objects

    def put(self, key: str, data: bytes) -> None:
        """Store an object."""
        self._keep(key, data, md5(data))

    def _keep(self, key: str, data: bytes, etag: str) -> None:
        self.objects[key] = Object(data, etag)
        self.watch(key)

    def _get_object(self, Key: str, Range: str = "", IfMatch: str = "", **_: Any) -> dict[str, Any]:
        there = self.objects.get(Key)
        if there is None:
            raise Refusal(404, "NoSuchKey")
        if IfMatch and IfMatch.strip('"') != there.etag:
            raise Refusal(412, "PreconditionFailed")
        data, answer = there.data, {"ETag": f'"{there.etag}"'}
        if Range:
            first, last = map(int, Range.removeprefix("bytes=").split("-"))
            if first >= len(data):
                raise Refusal(416, "InvalidRange")
            last = min(last, len(data) - 1)
            answer |= {"status": 206, "ContentRange": f"bytes {first}-{last}/{len(data)}"}  # type: ignore[dict-item]
            data = data[first : last + 1]
        return {**answer, "ContentLength": len(data), "data": data, "LastModified": datetime.now(UTC)}

    def _put_object(
        self,
        Key: str,
        Body: bytes,
        IfMatch: str = "",
        IfNoneMatch: str = "",
        **proof: Any,
    ) -> dict[str, Any]:
        there = self.objects.get(Key)
        if not self.dialect.conditional:
            IfMatch = IfNoneMatch = ""
        if IfMatch and there is None:
            raise Refusal(404, "NoSuchKey")
        if (IfMatch and there and IfMatch.strip('"') != there.etag) or (IfNoneMatch and there):
            raise Refusal(412, "PreconditionFailed")
        self._prove(Body, proof)
        self._keep(Key, Body, md5(Body))
        return {"ETag": f'"{md5(Body)}"', **_crc(proof)}

    def _delete_object(self, Key: str, **_: Any) -> dict[str, Any]:
        if self.objects.pop(Key, None):
            self.watch(Key)
        return {"status": 204}

    def _list_objects_v2(
        self,
        Prefix: str,
        Delimiter: str,
        ContinuationToken: str = "",
        **_: Any,
    ) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for key in sorted(self.objects):
            if key.startswith(Prefix) and key > ContinuationToken:
                folder, slash, _rest = key[len(Prefix) :].partition(Delimiter)
                name = f"{Prefix}{folder}{slash}"
                if not ContinuationToken.startswith(name):
                    rows[name] = None if slash else self.objects[key]
        page, more = list(rows)[: self.dialect.page], len(rows) > self.dialect.page
        files = [{"Key": key, "Size": len(rows[key].data), "ETag": f'"{rows[key].etag}"'} for key in page if rows[key]]
        folders = [{"Prefix": key} for key in page if not rows[key]]
        after = {"NextContinuationToken": page[-1]} if more else {}
        return {"Contents": files, "CommonPrefixes": folders, "IsTruncated": more, **after}

    # -- uploads

    def _create_multipart_upload(self, Key: str, **_: Any) -> dict[str, Any]:
        name = f"upload-{next(self._numbers)}"
        self.uploads[name] = Upload(Key, self.world.now, *self._sender)
        return {"UploadId": name}

    def _upload(self, Key: str, UploadId: str) -> Upload:
        upload = self.uploads.get(UploadId)
        if upload is None or upload.ended is not None or upload.key != Key:
            raise Refusal(404, "NoSuchUpload")
        return upload

    def _upload_part(
        self,
        Key: str,
        UploadId: str,
        PartNumber: int,
        Body: bytes,
        **proof: Any,
    ) -> dict[str, Any]:
        upload = self._upload(Key, UploadId)
        self._prove(Body, proof)
        upload.parts[PartNumber] = Object(Body, md5(Body))
        return {"ETag": f'"{md5(Body)}"', **_crc(proof)}

    def _prove(self, data: bytes, proof: Mapping[str, Any]) -> None:
        crc, digest = proof.get("ChecksumCRC32C"), proof.get("ContentMD5")
        if crc and base64.b64decode(crc).hex() != crc32c(memoryview(data)):
            raise Refusal(400, "BadDigest")
        if digest and base64.b64decode(digest).hex() != md5(data):
            raise Refusal(400, "BadDigest")

    def _list_parts(self, Key: str, UploadId: str, PartNumberMarker: int = 0, **_: Any) -> dict[str, Any]:
        parts = sorted(self._upload(Key, UploadId).parts.items())
        later = [
            {"PartNumber": n, "Size": len(p.data), "ETag": f'"{p.etag}"'} for n, p in parts if n > PartNumberMarker
        ]
        page = later[: self.dialect.page]
        after = {"NextPartNumberMarker": page[-1]["PartNumber"]} if len(later) > len(page) else {}
        return {"Parts": page, "IsTruncated": bool(after), **after}

    def _list_multipart_uploads(self, Prefix: str, **_: Any) -> dict[str, Any]:
        seen = self.world.now - self.world.draw.uniform(0, self.dialect.lag)
        return {
            "looked": (self.world.now, seen),
            "Uploads": [
                {"Key": upload.key, "UploadId": name}
                for name, upload in self.uploads.items()
                if upload.key.startswith(Prefix)
                and upload.begun <= seen
                and (upload.ended is None or upload.ended > seen)
            ],
            "IsTruncated": False,
        }

    def _complete_multipart_upload(
        self,
        Key: str,
        UploadId: str,
        MultipartUpload: Mapping[str, Any],
        **_: Any,
    ) -> dict[str, Any]:
        done = self.uploads.get(UploadId)
        if done and done.ended is not None and done.parts and self.dialect.completes_twice and Key in self.objects:
            return {"ETag": f'"{self.objects[Key].etag}"'}
        upload = self._upload(Key, UploadId)
        parts = []
        for entry in MultipartUpload["Parts"]:
            part = upload.parts.get(entry["PartNumber"])
            if part is None or part.etag != entry["ETag"].strip('"'):
                raise Refusal(400, "InvalidPart")
            parts.append(part)
        etag = f"{md5(b''.join(bytes.fromhex(part.etag) for part in parts))}-{len(parts)}"
        upload.ended = self.world.now
        self._keep(Key, b"".join(part.data for part in parts), etag)
        return {"ETag": f'"{etag}"'}

    def _abort_multipart_upload(self, Key: str, UploadId: str, **_: Any) -> dict[str, Any]:
        upload = self._upload(Key, UploadId)
        upload.ended, upload.parts = self.world.now, {}
        return {"status": 204}


def _crc(proof: Mapping[str, Any]) -> dict[str, str]:
    return {"ChecksumCRC32C": proof["ChecksumCRC32C"]} if "ChecksumCRC32C" in proof else {}


class Fate(NamedTuple):
    """What becomes of one request."""

    out: float = 0.01
    """Seconds until the server has it."""
    back: float = 0.01
    """Seconds until the answer is there."""
    loses: str = ""
    """`request` or `answer`: what is lost. The client then waits until it gives up."""
    closes: float | None = None
    """Seconds after which the connection is closed, whatever the server does."""
    refusal: str = ""
    """The code of an error that the server answers instead."""
    works: bool = True
    """Whether the server carries it out, even if it answers an error."""
    kills: str = ""
    """`before` or `after`: the sender is killed when the server gets it, or has carried it out."""
    freezes: float = 0.0
    """Seconds for which the sender is frozen before it sends."""
    short: bool = False
    """Whether the body of the answer ends early."""
    flips: bool = False
    """Whether a bit of what is sent turns."""


REFUSALS = {"SlowDown": 503, "InternalError": 500}


class Network:
    """Carries requests to the server. `fate` decides what becomes of each."""

    def __init__(self, world: World, server: Server, fate: Callable[[Process, str, str], Fate]) -> None:
        self.world, self.server, self.fate = world, server, fate
        self.num_requests = 0
        self.listen: Callable[[str, str, Mapping[str, Any]], None] = lambda sender, operation, asked: None
        """Is called with each request that is sent."""

    def ask(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer, as a client of botocore does."""
        world, thread = self.world, self.world.current
        assert thread is not None
        process = thread.process
        if not process.alive:
            raise Killed
        if "Body" in asked:
            asked["Body"] = bytes(asked["Body"].read())
        self.num_requests += 1
        key = asked.get("Key", asked.get("Prefix", ""))
        fate = self.fate(process, operation, key)
        if fate.flips and asked.get("Body"):
            asked["Body"] = bytes([asked["Body"][0] ^ 1]) + asked["Body"][1:]
        if fate.freezes:
            world.freeze(process)
            world.at(fate.freezes, lambda: world.wake(process))
            world.sleep(0)
        outcome: list[Any] = []
        sent = world.now
        self.listen(process.name, operation, asked)
        if fate.loses != "request":
            world.at(fate.out, lambda: self._deliver(operation, asked, key, thread, fate, outcome, sent))
        if fate.closes is not None:
            world.at(fate.closes, lambda: _end(world, thread, outcome, "closed"))
        late = world.now + SILENCE
        while not outcome and world.now < late:
            world.wait(late - world.now)
        _end(world, None, outcome, "silent")  # what comes later finds nobody
        return self._read(operation, key, outcome[0])

    def _deliver(
        self, operation: str, asked: dict[str, Any], key: str, thread: Thread, fate: Fate, outcome: list[Any],
        sent: float,
    ) -> None:  # fmt: skip
        world, process = self.world, thread.process
        if fate.kills == "before":
            world.kill(process)
        answer: Any
        try:
            if fate.refusal and not fate.works:
                raise Refusal(REFUSALS[fate.refusal], fate.refusal)
            answer = self.server.handle(operation, asked, process.name, sent)
            if fate.refusal:
                raise Refusal(REFUSALS[fate.refusal], fate.refusal)
        except Refusal as refusal:
            answer = refusal
        if fate.short and isinstance(answer, dict) and "data" in answer:
            answer["data"] = answer["data"][: len(answer["data"]) // 2]
        shown = answer.code if isinstance(answer, Refusal) else "ok"
        world.note(f"{operation} {key} by {process.name}: {shown}{f', lost the {fate.loses}' if fate.loses else ''}")
        if fate.kills == "after":
            world.kill(process)
        if not fate.loses:
            world.at(fate.back, lambda: _end(world, thread, outcome, answer))

    def _read(self, operation: str, key: str, outcome: Any) -> dict[str, Any]:
        url = f"https://simulated/{key}"
        if outcome == "silent":
            raise ReadTimeoutError(endpoint_url=url)
        if outcome == "closed":
            raise ConnectionClosedError(endpoint_url=url)
        if isinstance(outcome, Refusal):
            error = {"Code": outcome.code, "Message": outcome.code}
            metadata = {"HTTPStatusCode": outcome.status, "HTTPHeaders": {}}
            raise ClientError({"Error": error, "ResponseMetadata": metadata}, operation)
        answer: dict[str, Any] = outcome
        if "UploadId" in answer:
            self.server.uploads[answer["UploadId"]].is_known = True
        self.server.looked = answer.pop("looked", self.server.looked)
        if "data" in answer:
            answer["Body"] = _Body(answer.pop("data"), answer["ContentLength"])
        return answer


def _end(world: World, thread: Thread | None, outcome: list[Any], answer: Any) -> None:
    if not outcome:
        outcome.append(answer)
        if thread:
            world.go(thread)


class _Body:
    """The body of an answer, as far as `Transfer.fill` uses it: urllib3's response around that of http.client."""

    def __init__(self, data: bytes, length: int) -> None:
        self._fp = self
        self.fp = self
        self.length = length
        self.length_remaining = length
        self._data = memoryview(data)

    def readinto1(self, into: memoryview) -> int:
        """Give the next bytes."""
        count = min(len(into), len(self._data))
        into[:count] = self._data[:count]
        self._data = self._data[count:]
        return count

    def read(self, size: int) -> bytes:
        """Give nothing: all is read."""
        return b""

    def __enter__(self) -> "_Body":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Client:
    """The methods of botocore's client that `stores/s3.py` calls."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __getattr__(self, operation: str) -> Callable[..., dict[str, Any]]:
        return lambda **asked: self._network.ask(operation, asked)
