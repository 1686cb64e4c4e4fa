"""The contract of merge methods, and a merge of task vectors in memory."""

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from ties_ray.kernels import Kernels, load
from ties_ray.kernels.definition import Definition
from ties_ray.layers import depths
from ties_ray.layout.budget import STATE_BYTES
from ties_ray.methods import Companion, Computed, Context, Key, Member, Method, Result, Round, Slice, Stack, Threshold
from ties_ray.rounds._kth_largest import kept_count
from ties_ray.tensors import Parameter
from ties_ray.testing.kernels import same_bits


class MethodContract:
    """Every merge method gives the same bits however slices are cut and whoever computes, and nothing from nothing.

    A subclass provides the fixture `method`, which can merge members of weight 1.
    """

    SHAPES: tuple[tuple[int, ...], ...] = ((1,), (0,), (2_000,), (777,), (40, 24), (6, 50))
    """Shapes of the parameters that are merged."""
    MODELS: int = 5
    """How many models are merged, from 1 to 5."""

    @pytest.fixture
    def method(self) -> Method:
        """Return the method under test."""
        raise NotImplementedError

    @pytest.fixture
    def deltas(self) -> dict[str, list[torch.Tensor]]:
        """Return task vectors of the models by parameter, with ties, zeros and exact cancellation."""
        generator = torch.Generator().manual_seed(7)
        made = {}
        for number, shape in enumerate(self.SHAPES):
            length = math.prod(shape)
            steps = torch.randint(-3, 4, (5, length), generator=generator).float() * 2.0**-10
            steps[0] *= torch.rand(length, generator=generator) + 0.5
            steps[2, ::3] = -steps[1, ::3]
            if len(shape) > 1:  # something that all models share
                steps += torch.randn(length, generator=generator) * 2.0**-8
            made[f"layers.{number}.weight"] = [each.view(shape) for each in steps[: self.MODELS]]
        return made

    def test_the_method_survives_json_and_can_not_be_changed(self, method: Method) -> None:
        assert type(method).model_validate_json(method.model_dump_json()) == method
        with pytest.raises(ValidationError, match="frozen"):
            method.name = "another"
        with pytest.raises(ValidationError, match="Extra inputs"):
            type(method).model_validate({**method.model_dump(), "no_such_parameter": 1})

    def test_what_lambda_scales_and_the_paper_are_told(self, method: Method) -> None:
        assert method.scales in ("sum", "mean")
        assert method.paper

    def test_the_last_round_gives_a_finite_delta_that_is_not_zero(
        self, method: Method, deltas: dict[str, list[torch.Tensor]]
    ) -> None:
        merged = merge_held(method, deltas)
        assert merged.keys() == deltas.keys()
        assert all(bool(value.isfinite().all()) for value in merged.values())
        assert any(bool(value.any()) for value in merged.values())

    def test_cuts_change_no_bit(self, method: Method, deltas: dict[str, list[torch.Tensor]]) -> None:
        whole = merge_held(method, deltas)
        for step in (1_999, 300, 64):
            cut = merge_held(method, deltas, step=step)
            assert all(same_bits(whole[name], cut[name]) for name in whole), step

    def test_the_compiled_kernels_and_the_definition_agree(
        self, method: Method, deltas: dict[str, list[torch.Tensor]]
    ) -> None:
        compiled, defined = merge_held(method, deltas), merge_held(method, deltas, kernels=Definition())
        assert all(same_bits(compiled[name], defined[name]) for name in deltas)

    def test_where_no_model_moves_nothing_merges(self, method: Method, deltas: dict[str, list[torch.Tensor]]) -> None:
        still = {name: [torch.zeros_like(delta) for delta in of_models] for name, of_models in deltas.items()}
        assert not any(bool(value.any()) for value in merge_held(method, still).values())

    def test_the_models_are_left_as_they_are(self, method: Method, deltas: dict[str, list[torch.Tensor]]) -> None:
        before = {name: [delta.clone() for delta in of_models] for name, of_models in deltas.items()}
        merge_held(method, deltas)
        for name, many in deltas.items():
            assert all(same_bits(old, new) for old, new in zip(before[name], many, strict=True))

    def test_no_round_holds_more_than_it_says(self, method: Method) -> None:
        generator = torch.Generator().manual_seed(3)
        shared, own = torch.randn(1, 240, 250, generator=generator), torch.randn(5, 240, 250, generator=generator)
        tensors = list((shared + own / 4)[: self.MODELS] * 2.0**-8)
        held = _Held(method, {"layers.0.weight": tensors}, load("cpu"))
        for round_ in method.rounds():
            held.watched = memory = _Memory()
            held.gather(round_, list(held.results(round_, "layers.0.weight", 10**9)))
            parameter = Parameter("layers.0.weight", (240, 250), "F32", True)
            stack = Stack(len(tensors), parameter, num_whole=len(tensors))
            limit = COUNTED_BYTES + round_.holds(stack)
            assert memory.peak <= limit * tensors[0].numel() + SMALL_BYTES, f"round {round_.name}"

    def test_the_coefficients_are_those_of_the_weighted_sum(
        self, method: Method, deltas: dict[str, list[torch.Tensor]]
    ) -> None:
        factors = method.coefficients(held_members(self.MODELS), [True] * self.MODELS)
        if factors is None:
            return
        for name, merged in merge_held(method, deltas).items():
            expected = sum(factor * delta.double() for factor, delta in zip(factors, deltas[name], strict=True))
            torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-8)


COUNTED_BYTES = 4 + 8 + STATE_BYTES
"""Bytes that the plan counts for each element: the slice at hand, the base, and what every method may hold."""
SMALL_BYTES = 2**16
"""Bytes that a round may hold whatever the size of its slice."""


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of tensors that are made while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        """The most bytes that were alive at a time."""
        self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        outcome = func(*args, **(kwargs or {}))
        for tensor in outcome if isinstance(outcome, tuple | list) else (outcome,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return outcome

    def _note(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address and address not in self._known:
            self._known.add(address)
            self._alive += storage.nbytes()
            self.peak = max(self.peak, self._alive)
            weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address: int, nbytes: int) -> None:
        self._known.discard(address)
        self._alive -= nbytes


class Held(Computed):
    """Deltas in memory, which may be read as often as the round's `passes` says."""

    def __init__(
        self,
        deltas: Sequence[torch.Tensor],
        kernels: Kernels,
        start: int,
        passes: int,
        companions: Sequence[Mapping[str, torch.Tensor]] = (),
    ) -> None:
        """companions: of each model, by name (1-D)."""
        super().__init__(kernels, start, len(deltas[0]), self._pass)
        self._deltas = deltas
        self._left = passes
        self._companions = companions
        self._last = -1

    def companion(self, name: str) -> torch.Tensor | None:
        """Return a companion of the model whose delta came last."""
        values = self._companions[self._last].get(name)
        return None if values is None else values.clone()

    def _pass(self) -> Iterator[Slice]:
        assert self._left > 0, "the method goes through its models more often than its round's `passes` says"
        self._left -= 1
        for model, delta in enumerate(self._deltas):
            self._last = model
            yield Slice(model, delta.clone())


def held_members(count: int) -> tuple[Member, ...]:
    """Return `count` members of weight 1, without a density of their own."""
    return tuple(Member(str(number), 1.0, None) for number in range(count))


def merge_held(
    method: Method, deltas: Mapping[str, Sequence[torch.Tensor]], *, step: int = 10**9, kernels: Kernels | None = None
) -> dict[str, torch.Tensor]:
    """Return the merge of task vectors in memory (fp32, by parameter, of the deltas' shapes).

    step: elements of a slice at most, unless the method needs more in one piece.
    """
    held = _Held(method, deltas, kernels or load("cpu"))
    *before, last = method.rounds()
    for round_ in before:
        held.gather(round_, [result for name in deltas for result in held.results(round_, name, step)])
    merged = {}
    for name, of_models in deltas.items():
        slices = []
        for start, stop, result in held.results(last, name, step):
            assert result.merged is not None, "the last round owes the merged delta"
            assert (result.merged.dtype, result.merged.shape) == (torch.float32, (stop - start,))
            slices.append(result.merged)
        merged[name] = torch.cat([torch.empty(0), *slices]).view(of_models[0].shape)
    held.gather(last, [])
    return {name: held.finished(last, name, value) for name, value in merged.items()}


class _Held:
    """A merge of task vectors in memory, as far as it is."""

    def __init__(self, method: Method, deltas: Mapping[str, Sequence[torch.Tensor]], kernels: Kernels) -> None:
        self._deltas = deltas
        self._kernels = kernels
        self._members = held_members(len(next(iter(deltas.values()))))
        self._need = method.needs(self._members)
        self._companions = method.companions
        self._statistics: Counter[str] = Counter()
        self._sums: Counter[tuple[str, Key]] = Counter()
        """Exact sums by (parameter or nothing, key)."""
        self._ranks: dict[tuple[str, Key], tuple[float, ...]] = {}
        """Values by rank, by (parameter or nothing, key)."""
        self.watched: AbstractContextManager[Any] = nullcontext()
        """Entered while a round of the method runs."""
        self._pending: Counter[tuple[str, Key]] = Counter()
        self._ranked: dict[tuple[str, Key], list[torch.Tensor]] = {}
        self._name = ""

    def results(self, round_: Round, name: str, step: int) -> Iterator[tuple[int, int, Result]]:
        """Yield (start, stop, result) of the slices of a parameter."""
        self._name = name
        tensors = self._deltas[name]
        parameter = Parameter(name, tuple(tensors[0].shape), "F32", True)
        width = {"element": 1, "row": (parameter.shape or (1,))[-1], "matrix": parameter.numel}[round_.unit(parameter)]
        step = max(step - step % max(1, width), width, 1)
        for start in range(0, parameter.numel, step):
            stop = min(start + step, parameter.numel)
            slices = [delta.reshape(-1)[start:stop] for delta in tensors]
            context = self._context(parameter, start, stop, needs_base=round_.needs_base)
            yield start, stop, self._run(round_, slices, context)

    def _run(self, round_: Round, slices: list[torch.Tensor], context: Context) -> Result:
        beside = [
            {
                each.name: _companion(each, context, model)
                for each in self._companions
                if each.shape == "same" or context.parameter.is_matrix
            }
            for model in range(len(slices))
        ]
        deltas = Held(slices, self._kernels, context.start, round_.passes, beside)
        with self.watched:
            result = round_.run(deltas, context)
        for key, value in result.sums.items():
            self._pending[self._name * (not key.whole), key] += value
        for key, values in result.ranked.items():
            self._ranked.setdefault((self._name * (not key.whole), key), []).append(values)
        return result

    def finished(self, round_: Round, name: str, merged: torch.Tensor) -> torch.Tensor:
        """Return the change of a parameter as the last round's `finish` leaves it."""
        if round_.finish is None:
            return merged
        parameter = Parameter(name, tuple(merged.shape), "F32", True)
        context = self._context(parameter, 0, parameter.numel, needs_base=round_.needs_base)
        return round_.finish(merged.reshape(-1), context).view(merged.shape)

    def gather(self, round_: Round, results: Sequence[tuple[int, int, Result]]) -> None:
        """Let later rounds know what a round has found."""
        for (name, key), tensors in self._ranked.items():
            ordered = torch.cat(tensors).sort().values
            ranks = round_.ranks(key, len(ordered)) if round_.ranks else ()
            self._ranks[name, key] = tuple(ordered[rank].item() for rank in ranks)
        self._ranked = {}
        for _, _, result in results:
            self._statistics.update(result.statistics)
        self._sums.update(self._pending)
        self._pending = Counter()

    def _context(self, parameter: Parameter, start: int, stop: int, *, needs_base: bool) -> Context:
        name = parameter.name
        generator = torch.Generator().manual_seed(len(name) + parameter.numel)
        base = torch.randn(parameter.numel, generator=generator)[start:stop] if needs_base else None
        return Context(
            parameter=parameter,
            start=start,
            stop=stop,
            members=self._members,
            present=(True,) * len(self._members),
            thresholds=_sorted_thresholds(self._need, self._deltas, name),
            statistics=dict(self._statistics),
            kernels=self._kernels,
            sums={key: value for (of, key), value in self._sums.items() if of in ("", name)},
            ranks={key: values for (of, key), values in self._ranks.items() if of in ("", name)},
            base=base,
            tie_ends=_tie_ends(self._need, self._deltas, name),
            depth=depths(self._deltas).get(name, 0.0),
        )


def _companion(companion: Companion, context: Context, model: int) -> torch.Tensor:
    """Return a companion of random values: squares of normal ones, or the Gram matrix of twice as many rows."""
    parameter = context.parameter
    generator = torch.Generator().manual_seed(parameter.numel + 7919 * model)
    if companion.shape == "same":
        return torch.randn(parameter.numel, generator=generator).square()[context.start : context.stop]
    inputs = torch.randn(2 * parameter.columns, parameter.columns, generator=generator)
    return (inputs.T @ inputs).div_(len(inputs)).reshape(-1)


def _sorted_thresholds(
    need: Threshold | None, deltas: Mapping[str, Sequence[torch.Tensor]], name: str
) -> tuple[int, ...]:
    """Return each model's threshold as magnitude bits; sort the values to find it."""
    bits = []
    for model in range(len(deltas[name])):
        by_tensor = need is not None and need.scope == "tensor"
        parts = [deltas[name][model]] if by_tensor else [of_models[model] for of_models in deltas.values()]
        ordered = torch.cat([part.reshape(-1) for part in parts]).abs().sort(descending=True).values
        if need is None or need.densities[model] == 1 or not len(ordered):
            bits.append(0)
        else:
            kept = kept_count(need, model, len(ordered))
            bits.append(int(ordered[kept - 1].view(torch.int32)))
    return tuple(bits)


def _tie_ends(need: Threshold | None, deltas: Mapping[str, Sequence[torch.Tensor]], name: str) -> tuple[int, ...]:
    """Return where each model's ties are no longer kept in a parameter, nothing where all are."""
    if need is None or not need.exact:
        return ()
    ends = []
    for model, bits in enumerate(_sorted_thresholds(need, deltas, name)):
        names = [name] if need.scope == "tensor" else sorted(deltas)
        sizes = [deltas[each][model].reshape(-1).abs().view(torch.int32) for each in names]
        spare = kept_count(need, model, sum(map(len, sizes))) - sum(int((size > bits).sum()) for size in sizes)
        for each, size in zip(names, sizes, strict=True):
            equal = (size == bits).nonzero()[:, 0]
            if each == name:
                kept = max(0, spare) if bits and need.densities[model] < 1 else len(equal)
                ends.append(len(size) if kept >= len(equal) else int(equal[kept - 1]) + 1 if kept else 0)
            spare -= len(equal)
    return tuple(ends)
