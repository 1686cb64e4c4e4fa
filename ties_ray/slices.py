"""The models' slices of one block: what a merge method sees of them (the contract `Deltas`)."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ties_ray.kernels import Kernels, Op, State
from ties_ray.methods import Deltas, Slice
from ties_ray.transfer import Fetched, ReadAhead


class Slices(Deltas):
    """The deltas of one block. What is not finite is counted once a model and taken as zero."""

    def __init__(
        self,
        kernels: Kernels,
        reads: ReadAhead,
        base: Tensor,
        offset: int,
        num_models: int,
        coming: Iterator[Fetched | None],
        *,
        passes: int,
        resident: bool,
        together: int,
    ) -> None:
        """`coming` yields the models' slices, `passes` times over; resident: keep them for further passes."""
        self.not_finite = [0] * num_models
        self._kernels = kernels
        self._reads = reads
        self._base = base
        self._offset = offset
        self._num_models = num_models
        self._coming = coming
        self._passes = passes
        self._pass = 0
        self._taken = 0
        self._resident = resident
        self._together = together
        self._held: list[Fetched | None] = []

    def __iter__(self) -> Iterator[Slice]:
        delta = torch.empty(len(self._base), dtype=torch.float32)
        for model, fetched in self.models():
            if fetched:
                self._note(model, self._kernels.delta(fetched.encoded, self._base, delta))
            else:
                delta.zero_()
            yield Slice(model, delta)

    def fold(self, op: Op) -> State:
        """Return the op's state over all models; a model that lacks the parameter adds nothing."""
        state = self._kernels.start(op, len(self._base))
        models = self.models(hold=self._together)
        while group := list(itertools.islice(models, self._together)):
            encoded = [(model, fetched.encoded) for model, fetched in group if fetched]
            counts = self._kernels.fold(op, state, self._base, encoded, self._offset)
            for (model, _), count in zip(encoded, counts, strict=True):
                self._note(model, count)
        return state

    def models(self, hold: int = 1) -> Iterator[tuple[int, Fetched | None]]:
        """Yield (model, slice) in recipe order; a slice is valid until `hold` later ones were taken or the pass after
        it begins; always, if all are resident."""
        self._pass += 1
        if self._resident and self._pass > 1:
            yield from enumerate(self._held)
            return
        if self._pass > self._passes:
            raise RuntimeError("the method goes through its models more often than its round's `passes` says")
        self._skip_to((self._pass - 1) * self._num_models)
        for model in range(self._num_models):
            if not self._resident and len(self._held) == hold:
                self._release()
            self._held.append(next(self._coming))
            self._taken += 1
            yield model, self._held[-1]

    def close(self) -> None:
        """Give all buffers back, and those of slices that the method did not ask for."""
        self._skip_to(self._passes * self._num_models)

    def _skip_to(self, position: int) -> None:
        self._release()
        for fetched in itertools.islice(self._coming, position - self._taken):
            self._reads.release(fetched)
        self._taken = position

    def _note(self, model: int, count: int) -> None:
        if self._pass == 1:
            self.not_finite[model] += count

    def _release(self) -> None:
        for fetched in self._held:
            self._reads.release(fetched)
        self._held.clear()
