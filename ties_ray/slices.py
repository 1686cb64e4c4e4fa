"""The models' slices of one block: what a merge method sees of them (the contract `Deltas`)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ties_ray.kernels import Factors, Kernels, Op, State, Stored
from ties_ray.methods import Deltas, Slice
from ties_ray.sources import FACTOR_ROOM


class Slices(Deltas):
    """The deltas of one block. What is not finite is counted once a model and taken as zero."""

    def __init__(
        self,
        kernels: Kernels,
        base: Tensor,
        offset: int,
        num_models: int,
        coming: Iterator[Stored | None],
        *,
        passes: int,
        resident: bool,
        together: int,
    ) -> None:
        """`coming` yields the models' slices, `passes` times over; resident: keep them for further passes."""
        self.not_finite = [0] * num_models
        self._kernels = kernels
        self._base = base
        self._offset = offset
        self._num_models = num_models
        self._coming = coming
        self._passes = passes
        self._pass = 0
        self._taken = 0
        self._resident = resident
        self._together = together
        self._held: list[Stored | None] = []

    def __iter__(self) -> Iterator[Slice]:
        delta = torch.empty(len(self._base), dtype=torch.float32, device=self._base.device)
        for model, encoded in self.models():
            if encoded:
                self._note(model, self._kernels.delta(encoded, self._base, delta))
            else:
                delta.zero_()
            del encoded
            yield Slice(model, delta)

    def fold(self, op: Op) -> State:
        """Return the op's state over all models; a model that lacks the parameter adds nothing."""
        state = self._kernels.start(op, len(self._base))
        models = self.models()
        while group := self._group(models):
            members = [model for model, _ in group]
            counts = self._kernels.fold(op, state, self._base, group, self._offset)
            del group  # its memory is for the slices to come
            for model, count in zip(members, counts, strict=True):
                self._note(model, count)
        return state

    def _group(self, models: Iterator[tuple[int, Stored | None]]) -> list[tuple[int, Stored]]:
        """Take the next models that change the parameter: as many as are merged together, or as many factors as fit."""
        group: list[tuple[int, Stored]] = []
        decoded = 0
        for model, one in models:
            if one:
                group.append((model, one))
                decoded += one.left.nbytes + one.right.nbytes if isinstance(one, Factors) else 0
            if len(group) == self._together or decoded > FACTOR_ROOM // 2:
                break
        return group

    def models(self) -> Iterator[tuple[int, Stored | None]]:
        """Yield (model, slice) in recipe order; who holds on to slices holds their memory."""
        self._pass += 1
        if self._resident and self._pass > 1:
            yield from enumerate(self._held)
            return
        if self._pass > self._passes:
            raise RuntimeError("the method goes through its models more often than its round's `passes` says")
        self._skip_to((self._pass - 1) * self._num_models)
        for model in range(self._num_models):
            self._taken += 1
            if self._resident:
                self._held.append(next(self._coming))
                yield model, self._held[-1]
            else:
                yield model, next(self._coming)

    def close(self) -> None:
        """Let go of all slices, and take those that the method did not ask for."""
        self._skip_to(self._passes * self._num_models)

    def _skip_to(self, position: int) -> None:
        self._held.clear()
        for _ in range(position - self._taken):
            next(self._coming)
        self._taken = position

    def _note(self, model: int, count: int) -> None:
        if self._pass == 1:
            self.not_finite[model] += count
