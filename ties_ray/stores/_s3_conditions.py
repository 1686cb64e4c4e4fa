"""Conditional writes to S3, and a substitute for services that have none."""

from typing import Any, Protocol

from ties_ray import runtime
from ties_ray.stores import Pin
from ties_ray.stores._s3_answers import pin_of, split
from ties_ray.stores._s3_errors import Unconditional, Unmet
from ties_ray.stores._s3_service import Service


class _Objects(Protocol):
    """The requests by which a write is made, and looked at."""

    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        """Return the object's pin and its first bytes."""

    def put(self, uri: str, data: bytes) -> Pin:
        """Write an object."""

    def put_if(self, uri: str, data: bytes, condition: dict[str, str]) -> Any:
        """Write an object under a condition; return the answer."""


class ConditionalWrites:
    """Swaps objects, and learns which conditions a service keeps."""

    def __init__(self, service: Service, objects: _Objects) -> None:
        self._service = service
        self._objects = objects
        self._kept: dict[tuple[str, str], bool] = {}
        """Whether the service keeps a condition, by bucket and condition; missing: not known yet."""

    def swap(self, uri: str, data: bytes, etag: str, settle: float) -> Pin | None:
        """Write with If-Match or If-None-Match; where the service lacks those, write, wait, and look who has won.

        This is Fischer's algorithm: among writers who saw the same state and wrote within the wait, the last one wins.
        settle: the least wait, in seconds.
        """
        condition = {"IfMatch": f'"{etag}"'} if etag else {"IfNoneMatch": "*"}
        kind = (split(uri)[0], "IfMatch" if etag else "IfNoneMatch")
        began = runtime.monotonic()
        if not self._shows(uri, etag):
            return None
        if self._kept.get(kind, True):
            try:
                answer = self._objects.put_if(uri, data, condition)
                if kind in self._kept or self._keeps(uri, data, kind):
                    return pin_of(uri, len(data), answer)
            except Unconditional:
                self._kept[kind] = False
                self._objects.put(uri, data)
            except (Unmet, FileNotFoundError):  # 404 is what If-Match gives where the object has gone
                return self._if_holds(uri, data)  # ours, if only the answer to it was lost
        else:
            self._objects.put(uri, data)
        self._service.note(
            f"s3://{kind[0]}: the service keeps no {'If-Match' if etag else 'If-None-Match'} on writes; who writes the"
            f" lease or a pointer waits {settle:g} s and looks whether another did too"
        )
        runtime.sleep(max(settle, 2 * (runtime.monotonic() - began)))
        return self._if_holds(uri, data)

    def _shows(self, uri: str, etag: str) -> bool:
        """Return whether the object has this ETag; an empty one: whether there is no object."""
        try:
            return self._objects.head(uri, 0)[0].etag == etag
        except FileNotFoundError:
            return not etag

    def _if_holds(self, uri: str, data: bytes) -> Pin | None:
        """Return the pin of the object if it is these bytes."""
        try:
            pin, there = self._objects.head(uri, len(data) + 1)
        except FileNotFoundError:
            return None
        return pin if there == data else None

    def _keeps(self, uri: str, data: bytes, kind: tuple[str, str]) -> bool:
        """Return whether the service keeps a condition, once it has taken a write under it: some take every write.

        The same bytes are written again under a condition that does not hold. AWS is known to keep conditions.
        """
        if not self._service.connected(uri).is_aws:
            wrong = {"IfMatch": f'"{"0" * 32}"'} if kind[1] == "IfMatch" else {"IfNoneMatch": "*"}
            try:
                self._objects.put_if(uri, data, wrong)
                self._kept[kind] = False
            except (Unmet, FileNotFoundError):
                self._kept[kind] = True
        return self._kept.get(kind, True)
