"""Protections to switch off, one at a time, to show that the simulation misses them."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from tests.tools import unprotected
from tests.tools.simulation.scenario import outcomes
from ties_ray.driver import publish, result
from ties_ray.driver.run import MergeRun
from ties_ray.driver.uploads import Uploads
from ties_ray.state.lease import Lease
from ties_ray.stores import _s3_transfer, s3
from ties_ray.stores.s3 import S3


@contextmanager
def _of_store(switch: Callable[[], None]) -> Iterator[None]:
    """Switch off a protection of `tests.tools.unprotected`, for a while."""
    with contextlib.ExitStack() as stack:
        for owner, name in ((S3, "read"), (S3, "write_part"), (S3, "put"), (_s3_transfer.Transfer, "send")):
            stack.enter_context(mock.patch.object(owner, name, getattr(owner, name)))
        stack.enter_context(mock.patch.object(s3, "demand", vars(s3)["demand"]))
        switch()
        yield


def _nothing(self: object) -> None:
    pass


def fencing() -> AbstractContextManager[Any]:
    """Go on whoever holds the lease."""
    return mock.patch.object(Lease, "check", _nothing)


def leftovers() -> AbstractContextManager[Any]:
    """Leave uploads alone that nobody knows."""
    return mock.patch.object(Uploads, "abort_others", _nothing)


def order() -> AbstractContextManager[Any]:
    """Write the file first by which a loader finds the weights."""
    read = publish.read_documents

    def last_first(*arguments: Any, **more: Any) -> dict[str, bytes]:
        return dict(reversed(read(*arguments, **more).items()))

    return mock.patch.object(result, "read_documents", last_first)


def overlaps() -> AbstractContextManager[Any]:
    """Take each record that an interrupted run has left, even those of the same shards."""
    accepted = MergeRun._accepted

    def take(self: MergeRun, index: int, kind: Any) -> Any:
        return accepted(self, index, kind) if kind.writes else self._left_records(index)

    return mock.patch.object(MergeRun, "_accepted", take)


def unconditional() -> AbstractContextManager[Any]:
    """Write the lease whatever lies there."""
    return mock.patch.object(S3, "swap", lambda self, uri, data, etag: self.put(uri, data))


PROTECTIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    **{switch.__name__: lambda switch=switch: _of_store(switch) for switch in unprotected.PROTECTIONS.values()},  # type: ignore[misc]
    **{switch.__name__: switch for switch in (fencing, leftovers, order, overlaps, unconditional)},
}
ENOUGH = 200
"""Seeds within which each is missed."""


def proof(name: str) -> int:
    """Return the first seed that misses a protection which is off, 0 where none does; print it."""
    for seed, outcome in outcomes(range(1, ENOUGH + 1), PROTECTIONS[name]):
        if outcome.problems:
            print(f"{name} off, seed {seed}: {outcome.problems[0].strip().splitlines()[-1]}", flush=True)
            return seed
    return 0
