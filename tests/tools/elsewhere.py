"""A device that is not there: its tensors lie in the host's memory, and meet tensors of the host only where they may.

So whole merges show without a GPU whether methods and rounds keep to the device of their kernels. torch calls the
device `meta`, since any other one needs its driver.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ties_ray import kernels
from ties_ray.kernels import Agreement, Arrival, Factors, Kernels, Op, State, Stored
from ties_ray.worker.worker import Worker

DEVICE = torch.device("meta")
ATEN = torch.ops.aten
MIXING = {ATEN.copy_.default, ATEN._to_copy.default, ATEN.index.Tensor, ATEN.index_put_.default}
"""Operations that take tensors of both: copies, and indices."""


class There(Tensor):
    """A tensor of the device."""

    own: Tensor
    """The same tensor in the host's memory."""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: "type[There]", own: Tensor) -> "There":
        layout = {"strides": own.stride(), "storage_offset": own.storage_offset(), "dtype": own.dtype}
        there = torch.Tensor._make_wrapper_subclass(cls, own.size(), device=DEVICE, **layout)  # type: ignore[attr-defined]
        there.own = own
        return there  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.own.data_ptr()

    def tolist(self) -> Any:
        return self.own.tolist()

    def new_tensor(self, data: Any) -> Tensor:  # type: ignore[override]
        return There(self.own.new_tensor(data))


class Elsewhere(TorchDispatchMode):
    """Makes tensors of the device where torch is asked for them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return what an operation of torch gives. A tensor of the host is refused beside one of the device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    assert all(isinstance(each, There) or each.device != DEVICE for each in tensors), "one was made past `Elsewhere`"
    there = any(isinstance(each, There) for each in tensors)
    if there and func not in MIXING:
        mixed = [tuple(each.shape) for each in tensors if each.dim() and not isinstance(each, There)]
        assert not mixed, f"{func} gets tensors of the host, {mixed}"
    host = dict(kwargs)
    if "device" in host:
        there = host["device"] == DEVICE if host["device"] is not None else there
        host["device"] = torch.device("cpu")
    if func is ATEN._linalg_svd.default and there:
        assert host.pop("driver", None) in ("gesvda", "gesvd"), "the default of a GPU is slow"
    outcome = func(*host_of(args), **host_of(host))
    if func._schema.is_mutable:
        return args[0]
    return there_of(outcome) if there else outcome


def host_of(values: Any) -> Any:
    """Return values with the host's tensors in place of the device's."""
    return tree_map(lambda each: each.own if isinstance(each, There) else each, values)


def there_of(values: Any) -> Any:
    """Return values with tensors of the device in place of the host's."""
    return tree_map(lambda each: There(each) if isinstance(each, Tensor) else each, values)


class _ThereArrival(Arrival):
    def __enter__(self) -> Self:
        self._mode = Elsewhere()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def bytes(self, data: Tensor) -> Tensor:
        return data if isinstance(data, There) else There(data.clone())

    def slice(self, source: Stored) -> Stored:
        return type(source)(*(self.bytes(each) if isinstance(each, Tensor) else each for each in source))


class ElsewhereKernels(Kernels):
    """Kernels of the device, which compute as others do in the host's memory."""

    asynchronous = True

    def __init__(self, own: Kernels) -> None:
        self._own = own

    @property
    def device(self) -> torch.device:
        return DEVICE

    def arrival(self) -> Arrival:
        return _ThereArrival()

    def _do(self, name: str, *arguments: Any, out: Tensor | None = None) -> Any:
        """Return what the other kernels give. All tensors but `out` lie on the device."""
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        assert all(isinstance(each, There) for each in tensors), f"{name} of the host's tensors"
        beside = () if out is None else (host_of(out),)
        return there_of(getattr(self._own, name)(*host_of(arguments), *beside))

    def _op(self, op: Op) -> Op:
        return replace(op, total=host_of(op.total)) if isinstance(op, Agreement) else op

    def decode(self, stored: Tensor, out: Tensor) -> int:
        return int(self._do("decode", stored, out))

    def delta(self, source: Stored, base: Tensor, out: Tensor) -> int:
        return int(self._do("delta", source, base, out))

    def row_scales(self, source: Factors, rows: Tensor) -> Tensor:
        scales: Tensor = self._do("row_scales", source, rows)
        return scales

    def start(self, op: Op, length: int) -> State:
        state: State = self._do("start", self._op(op), length)
        return state

    def fold(self, op: Op, state: State, base: Tensor, group: Sequence[tuple[int, Stored]], offset: int) -> list[int]:
        counts: list[int] = self._do("fold", self._op(op), state, base, group, offset)
        return counts

    def count_high(self, source: Stored, base: Tensor, table: Tensor) -> int:
        return int(self._do("count_high", source, base, table))

    def count_low(self, source: Stored, base: Tensor, high: int, table: Tensor) -> int:
        return int(self._do("count_low", source, base, high, table))

    def elect(self, op: Op, state: State, *election: Any) -> Tensor:
        merged: Tensor = self._do("elect", self._op(op), state, *election)
        return merged

    def apply(self, base: Tensor, merged: Tensor, out: Tensor) -> int:
        return int(self._do("apply", base, merged, out=out))


def compute_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """Have all workers of this process that ask for a GPU compute on the device, until `patch` is undone."""
    load, answered = kernels.load, Worker.answered

    def instead(name: Any, arithmetic: Any = "exact") -> Kernels:
        return ElsewhereKernels(load("cpu")) if name == "cuda" else load(name, arithmetic)

    def watched(self: Worker, order: Any, handle: Callable[[], Any]) -> str:
        with Elsewhere():
            return answered(self, order, handle)

    patch.setattr(kernels, "load", instead)
    patch.setattr(Worker, "answered", watched)
