"""Protections of the store to switch off in a process, one at a time, to show that the chaos campaign notices."""

import hashlib
from typing import Any

from ties_ray.stores import Part, Pin, _s3_transfer, s3
from ties_ray.stores._s3_answers import bare, object_of
from ties_ray.stores._s3_transfer import Transfer
from ties_ray.stores.s3 import S3


def ifmatch() -> None:
    """Read whatever lies there now: no If-Match, and no ETag compared."""
    read, demand = S3.read, s3.demand

    def read_any(self: S3, pin: Pin, start: int, into: memoryview) -> None:
        read(self, pin._replace(etag=""), start, into)

    def demand_less(response: Any, wanted: str, count: int, pin: Pin) -> None:
        demand(response, wanted, count, pin._replace(etag=bare(response.get("ETag"))))

    S3.read, s3.demand = read_any, demand_less  # type: ignore[method-assign]


def partcheck() -> None:
    """Send bytes without a checksum, and believe whatever ETag comes back."""

    def send(
        self: Transfer, uri: str, doing: str, operation: str, data: memoryview, **arguments: Any
    ) -> tuple[Any, str]:
        def ask(client: Any, late: float) -> Any:
            body = _s3_transfer.Body(data, late)
            return getattr(client, operation)(Body=body, **object_of(uri), **arguments)

        return self._service.repeat(uri, doing, ask, len(data)), "unchecked"

    Transfer.send = send  # type: ignore[method-assign]


def recordorder() -> None:
    """Say that a part is written when it is not; send it after the record that lists it."""
    write_part, put = S3.write_part, S3.put
    held: list[tuple[S3, str, str, int, int, memoryview]] = []

    def hold(self: S3, uri: str, upload: str, number: int, offset: int, data: memoryview) -> Part:
        held.append((self, uri, upload, number, offset, memoryview(bytes(data))))
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return Part(number, len(data), digest, digest)

    def put_first(self: S3, uri: str, data: bytes) -> Pin:
        pin = put(self, uri, data)
        while "/records/" in uri and held:
            write_part(*held.pop())
        return pin

    S3.write_part, S3.put = hold, put_first  # type: ignore[method-assign]


PROTECTIONS = {switch.__name__: switch for switch in (ifmatch, partcheck, recordorder)}
