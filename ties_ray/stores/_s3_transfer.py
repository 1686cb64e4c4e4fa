"""Bytes on their way from and to S3: received straight into the caller's memory, sent with a checksum."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ties_ray import runtime
from ties_ray.errors import Problem
from ties_ray.stores import Transient
from ties_ray.stores._s3_answers import bare, md5, object_of, proof_of, split
from ties_ray.stores._s3_errors import Unconditional, answer, refuses
from ties_ray.stores._s3_service import LEAST_RATE, Service

_CHUNK = 1 << 20
"""Bytes handed to a socket at a time."""
_BELIEVED = 3
"""A part is sent so often before an ETag that is not its MD5 is taken for the service's way."""


class Transfer:
    """Receives and sends bytes, and learns which ETags of a service are MD5."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._etags_are_md5: dict[tuple[str, bool], bool] = {}
        """Whether ETags are MD5, by bucket and whether a key encrypts; missing: not known yet."""
        self._under_key: dict[str, bool] = {}
        """Whether a bucket's objects are under the customer's key; missing: presumed."""

    def learn(self, uri: str, response: Mapping[str, Any], data: bytes | bytearray) -> None:
        """Note that ETags are MD5, if that of this whole object is; data: its bytes."""
        if bare(response.get("ETag")) == md5(data).hexdigest():
            self._etags_are_md5[_kind(uri, response)] = True

    def get(self, client: Any, uri: str, **arguments: Any) -> Any:
        """Return the answer of a GET, with the customer's key or without: a bucket may hold objects of either kind."""
        service, bucket = self._service, split(uri)[0]
        with_key = bool(service.customer) and self._under_key.get(bucket, True)
        self._service.meter.add(requests=1)
        asked = {**object_of(uri), **arguments, **service.payer}
        try:
            return client.get_object(**asked, **(service.customer if with_key else {}))
        except Exception as error:
            if not service.customer or answer(error)[0] != 400:
                raise
            self._service.meter.add(requests=1)
            response = client.get_object(**asked, **({} if with_key else service.customer))
            self._under_key[bucket] = not with_key
            return response

    def fill(self, body: Any, into: memoryview, late: float) -> None:
        """Receive a body, which was announced to be as long as `into`, straight into the caller's memory.

        `body` is urllib3's response. Its own `readinto` copies, and waits for all bytes however slowly they come. So
        the socket's file below it is read here, and http.client's count of bytes left is kept up to date.
        """
        response, filled = body._fp, 0
        try:
            while response.length and (count := response.fp.readinto1(into[filled:])):
                response.length -= count
                filled += count
                demand_time(late)
        finally:
            self._service.meter.add(bytes_read=filled)
        if filled < len(into):
            raise Transient(f"the answer ended after {filled:,} of {len(into):,} bytes")
        body.length_remaining = 0  # urllib3 counts what it has read itself, and would miss the rest
        body.read(1)  # nothing: so urllib3 notices the end, and keeps the connection for the next request

    def send(self, uri: str, doing: str, operation: str, data: memoryview, **arguments: Any) -> tuple[Any, str]:
        """Send bytes with the checksum that proves them; return the answer, and the checksum as a `Part` keeps it.

        Not every service compares, so its ETag is compared here. An ETag that is not the MD5 means damage, or is the
        service's way (KMS). If that is not known yet, an object is read back. A part, which can't be read, is sent
        `_BELIEVED` times. Workers know it, because they read the plan at the same place before they write.
        """
        service = self._service
        proofs: dict[bool, tuple[str, dict[str, str]]] = {}
        others = 0

        def attempt(client: Any, late: float) -> tuple[Any, str]:
            nonlocal others
            crc = bool(service.crc)
            checksum, proof = proofs[crc] if crc in proofs else proofs.setdefault(crc, proof_of(data, crc=crc))
            body = Body(data, late)
            with self.dialect(arguments):
                done = getattr(client, operation)(
                    Body=body, **object_of(uri), **arguments, **proof, **service.customer, **service.payer
                )
            self._service.meter.add(bytes_written=len(data))
            stored = done.get("ChecksumCRC32C", checksum) if crc else bare(done.get("ETag"))
            if stored == checksum:
                if not crc:
                    self._etags_are_md5[_kind(uri, done)] = True
                return done, checksum
            others += 1
            kind, is_part = _kind(uri, done), operation == "upload_part"
            unknown = not crc and kind not in self._etags_are_md5
            if unknown and (others == _BELIEVED if is_part else self._holds(client, uri, data, late)):
                self._etags_are_md5[kind] = False
            if crc or self._etags_are_md5.get(kind, True):
                raise Transient(f"other bytes arrived than were sent: {stored}, not {checksum}", attempts=4)
            return done, checksum

        return service.repeat(uri, doing, attempt, len(data))

    @contextmanager
    def dialect(self, asked: Mapping[str, Any]) -> Iterator[None]:
        """Turn to MD5 where the service refuses a request for its CRC32C, and have it sent again.

        A condition in `asked`, the arguments of the request, that is refused becomes `Unconditional`.
        """
        service = self._service
        try:
            yield
        except Exception as error:
            if service.crc and service.options.checksums is None and refuses(error, "checksum|crc32"):
                service.crc = False
                service.note("s3://: the service refuses CRC32C checksums; Content-MD5 proves what is written instead")
                raise Transient("the service refuses CRC32C checksums") from error
            if not asked.keys().isdisjoint(("IfMatch", "IfNoneMatch")) and refuses(
                error, "if-none-match|if-match|condition"
            ):
                message = "the service does not know conditional writes"
                raise Unconditional(Problem("", message, "use a service that does")) from error
            raise

    def _holds(self, client: Any, uri: str, data: memoryview, late: float) -> bool:
        """Return whether the object is these bytes."""
        response = self.get(client, uri)
        with response["Body"] as body:
            if response.get("ContentLength") != len(data):
                return False
            there = bytearray(len(data))
            self.fill(body, memoryview(there), late)
        return there == data


class Body:
    """A file for botocore that is the caller's memory, sent without a copy."""

    def __init__(self, data: memoryview, late: float) -> None:
        self._data = data
        self._late = late
        self._at = 0

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int = -1) -> memoryview:
        """Return the next bytes: more than asked for, since urllib3 sends 16 KiB at a time if it may."""
        demand_time(self._late)
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


def demand_time(late: float) -> None:
    """Raise if a transfer has gone on for too long, though it never fell silent."""
    if runtime.monotonic() > late:
        raise TimeoutError(f"fewer than {LEAST_RATE:,} bytes a second came through")


def _kind(uri: str, response: Mapping[str, Any]) -> tuple[str, bool]:
    """Return (bucket, whether KMS or a customer's key encrypts the object): they decide whether an ETag is an MD5."""
    by_key = "SSECustomerAlgorithm" in response or str(response.get("ServerSideEncryption", "")).startswith("aws:kms")
    return split(uri)[0], by_key
