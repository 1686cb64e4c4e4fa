"""Counts launches, copies and waits of the kernels of a GPU in Triton's interpreter."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ties_ray.kernels import cuda
from ties_ray.worker.worker import Worker

ASKS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
"""Operations that wait for a GPU, since the host needs a number of it."""


class Traffic:
    """The counts of each round, by its index in the plan."""

    def __init__(self) -> None:
        self.launches, self.copies, self.waits, self.arrivals = (Counter[int]() for _ in range(4))
        self.round = 0


class _Waits(TorchDispatchMode):
    """Counts the waits of the thread that computes."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._traffic.waits[self._traffic.round] += func in ASKS
        return func(*args, **(kwargs or {}))


@contextmanager
def traffic_counted(patch: pytest.MonkeyPatch) -> Iterator[Traffic]:
    """Yield the counts of all workers of this process; see `interpreter.interpret`.

    The interpreter's memory is the host's. So a copy is what the kernels call one. A wait is whatever would wait for a
    GPU on the thread that computes, and an arrival is one of the threads that read.
    """
    traffic = Traffic()
    launch, there, answered, leave = cuda._launch, cuda.Cuda.there, Worker.answered, cuda._Arrival.__exit__

    def launched(*args: Any, **kwargs: Any) -> None:
        traffic.launches[traffic.round] += 1
        with _disable_current_modes():
            launch(*args, **kwargs)

    def copied(self: cuda.Cuda, tensor: torch.Tensor) -> torch.Tensor:
        traffic.copies[traffic.round] += 1
        return there(self, tensor)

    def arrived(self: cuda._Arrival, *error: Any) -> None:
        traffic.arrivals[traffic.round] += 1
        leave(self, *error)

    def watched(self: Worker, order: Any, handle: Any) -> str:
        traffic.round = order.round
        with _Waits(traffic):
            return answered(self, order, handle)

    def waiting(ask: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        def told(tensor: torch.Tensor) -> Any:
            traffic.waits[traffic.round] += 1
            return ask(tensor)

        return told

    with patch.context() as inner:
        inner.setattr(cuda, "_launch", launched)
        inner.setattr(cuda.Cuda, "there", copied)
        inner.setattr(cuda._Arrival, "__exit__", arrived)
        inner.setattr(Worker, "answered", watched)
        inner.setattr(torch.Tensor, "tolist", waiting(torch.Tensor.tolist))
        inner.setattr(torch.Tensor, "cpu", waiting(torch.Tensor.cpu))
        yield traffic
