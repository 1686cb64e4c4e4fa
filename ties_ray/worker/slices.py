"""The models' slices of one block, as a merge method sees them (`Deltas`)."""

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from ties_ray.errors import InputError, Problem
from ties_ray.kernels import Election, Encoded, Factors, Kernels, Op, State, Stored
from ties_ray.methods import Companion, Factored, Slice, words_of
from ties_ray.rounds import Slices
from ties_ray.worker.held import Folds


class StoredSlices(Slices):
    """The deltas of one block. Values that are not finite are counted once a model, and taken as zero."""

    drains = True
    """Whether slices that the method does not ask for are taken nevertheless: the next block's come after them."""

    def __init__(
        self,
        kernels: Kernels,
        base: Tensor,
        offset: int,
        num_models: int,
        coming: Iterator[Stored | None],
        complete: Callable[[Stored | None], Stored | None] = lambda stored: stored,
        *,
        passes: int,
        resident: bool,
        per_pass: int,
        factor_room: int,
        companions: Sequence[Companion] = (),
        earlier: Stored | None = None,
        num_earlier: int = 0,
        keeps: bool = False,
        folds: Folds | None = None,
    ) -> None:
        """coming: the models' slices, each followed by its companions, `passes` times over.

        complete: gives a slice of a model all that its change needs. resident: whether slices are kept for further
        passes. offset: the first element of the block. per_pass: the most slices of one kernel call. factor_room: the
        most bytes of decoded factors in one kernel call. earlier: the state that earlier models have left here.
        num_earlier: their number, from which models are counted on. keeps: whether the method's sums are kept.
        folds: holds states for other merges of the same slices.
        """
        self.not_finite = [0] * num_models
        self._kernels, self._base, self._offset = kernels, base, offset
        self._num_models = num_models
        self._coming = coming
        self._passes = passes
        self._pass = self._taken = 0
        self._resident = resident
        self._per_pass = per_pass
        self._factor_room = factor_room
        self._held: list[Stored | None] = []
        self._complete = complete
        self._companions = companions
        self._earlier = earlier
        self._before = num_earlier
        self._keeps = keeps
        self._resumed = 0  # words of an element that the method has taken up
        self.kept: list[Tensor] = []
        self._folds = None if earlier or keeps else folds
        self._last = -1  # the model whose slice came last
        self._beside: list[list[Stored | None]] = []
        """The companions of each model whose slice has come, in the order of their names."""
        self.unfit: dict[tuple[int, str], int] = {}
        """Values of a companion that are not finite or negative, by model and name."""

    def __iter__(self) -> Iterator[Slice]:
        delta = torch.empty(len(self._base), dtype=torch.float32, device=self._base.device)
        for model, encoded in self.models():
            if encoded:
                self._note([(self._before + model, encoded)], [self._kernels.delta(encoded, self._base, delta)])
            else:
                delta.zero_()
            del encoded
            yield Slice(self._before + model, delta)

    def factored(self) -> Iterator[Factored]:
        """Yield each model's delta as it is stored. Factors that are not finite are multiplied, so that it is told."""
        for model, stored in self.models():
            if stored is None:
                yield Factored(model)
            elif isinstance(stored, Factors) and stored.magnitude is None and _is_finite(stored):
                yield Factored(model, stored)
            else:
                delta = torch.empty(len(self._base), dtype=torch.float32, device=self._base.device)
                self._note([(self._before + model, stored)], [self._kernels.delta(stored, self._base, delta)])
                yield Factored(model, delta=delta)

    def companion(self, name: str) -> Tensor | None:
        """Return a companion of the model whose slice came last (1-D fp32)."""
        number = [companion.name for companion in self._companions].index(name)
        stored = self._beside[self._last if self._resident else 0][number]
        if stored is None:
            return None
        assert isinstance(stored, Encoded), "a companion is stored whole"
        values = torch.empty(len(stored.data), device=self._base.device)
        bad = self._kernels.decode(stored.data, values)
        if bad:
            values.nan_to_num_(0, 0, 0)  # the block is refused once the method is done with it
        if not self._companions[number].negative and float(values.min()) < 0:
            bad += int((values < 0).sum())
        self.unfit[self._last, name] = bad
        return values

    def fold(self, op: Op) -> State:
        """Return the op's state over all models. A model that lacks the parameter adds nothing."""
        if self._folds:
            state = self._shared(self._folds, op, lambda: self._fold(op))
            return {name: values.clone() for name, values in state.items()}
        return self._fold(op)

    def elect(self, op: Op, election: Election) -> Tensor:
        """Return the merged delta. Where one group holds all models, no state is written to memory."""
        if self._folds:  # factor 1 is exact, and merges that differ in their factors alone share the rest
            unscaled = election._replace(factor=1.0)
            state = self._shared(self._folds, (op, unscaled), lambda: {"merged": self._elect(op, unscaled)})
            return self._folds.scaled(state["merged"], election.factor)
        return self._elect(op, election)

    def _fold(self, op: Op) -> State:
        models = self.models()
        return self._folded(op, models, *self._group(models))

    def _elect(self, op: Op, election: Election) -> Tensor:
        models = self.models()
        group, last = self._group(models)
        if not last or self._earlier or self._keeps:
            return self._kernels.elect(op, self._folded(op, models, group, last), *election)
        merged, counts = self._kernels.merge(op, self._base, group, self._offset, election)
        self._note(group, counts)
        return merged

    def _shared(self, folds: Folds, key: Hashable, make: Callable[[], State]) -> State:
        """Return what another merge has made of these slices, or make it. Nobody may write to it."""
        fold = folds.kept(key)
        if fold is None:
            counted, state = list(self.not_finite), make()
            counts = [after - before for after, before in zip(self.not_finite, counted, strict=True)]
            folds.keep(key, state, counts, self.watch.deltas if self.watch else None)
            return state
        if self.watch and fold.watched is not None:
            self.watch.deltas = fold.watched
        if self.watch and not self._pass and fold.watched is None:
            for _ in self.models():
                pass  # who watches looks at every slice
        else:
            self._pass += 1
        if self._pass == 1:
            self.not_finite = list(fold.not_finite)
        return fold.state

    def _folded(
        self, op: Op, models: Iterator[tuple[int, Stored | None]], group: list[tuple[int, Stored]], last: bool
    ) -> State:
        """Return the state of a first group and, if it is not the last, of the groups after it."""
        state = self._kernels.start(op, len(self._base))
        self.resume(*words_of(state))
        while group:
            self._note(group, self._kernels.fold(op, state, self._base, group, self._offset))
            group.clear()  # its memory is for the slices to come
            if not last:
                group, last = self._group(models)
        self.keep(*words_of(state))
        return state

    def resume(self, *sums: Tensor) -> None:
        """Write into zeros what an earlier merge has kept of these sums."""
        if self._earlier is None:
            return
        assert isinstance(self._earlier, Encoded), "a state is stored whole"
        words = self._earlier.data.view(len(self._base), -1)
        for total in sums:
            stop = self._resumed + _words_of(total, len(self._base))
            if stop > words.shape[1]:
                raise _misfit(f"holds {words.shape[1]} words of an element, and this version of ties_ray needs more")
            values = total.view(-1).view(torch.float32)
            values.copy_(words[:, self._resumed : stop].reshape(-1)[: len(values)])
            if total.is_floating_point() and not total.isfinite().all():
                raise _misfit("holds values that are NaN or Inf")
            self._resumed = stop

    def keep(self, *sums: Tensor) -> None:
        """Keep a copy of sums over all models."""
        for total in sums if self._keeps else ():
            words = torch.zeros(len(self._base), _words_of(total, len(self._base)), device=total.device)
            words.view(-1).view(total.dtype)[: total.numel()].copy_(total.reshape(-1))
            self.kept.append(words)

    def _group(
        self, models: Iterator[tuple[int, Stored | None]], most: int = 0
    ) -> tuple[list[tuple[int, Stored]], bool]:
        """Return the slices of the next models that change the parameter, and whether no model follows.

        They are as many as one kernel call takes, or fewer where their decoded factors fill the room. most: as many at
        most, if it is not 0.
        """
        group: list[tuple[int, Stored]] = []
        most, decoded = most or self._per_pass, 0
        for model, stored in models:
            if stored:
                group.append((self._before + model, stored))
                decoded += stored.left.nbytes + stored.right.nbytes if isinstance(stored, Factors) else 0
            if model < self._num_models - 1 and (len(group) == most or decoded > self._factor_room // 2):
                return group, False
        return group, True

    def groups(self) -> Iterator[list[tuple[int, Stored]]]:
        """See `rounds.Slices.groups`. A CPU gets one slice at a time, while it lies in its caches."""
        models, last = self.models(), False
        while not last:
            group, last = self._group(models, 0 if self._kernels.asynchronous else 1)
            if group:
                yield group
            del group

    def models(self) -> Iterator[tuple[int, Stored | None]]:
        """Yield (model, slice) in recipe order. A slice keeps its memory as long as something refers to it."""
        self._pass += 1
        if self._resident and self._pass > 1:
            for model, held in enumerate(self._held):
                self._last = model
                yield model, held
            return
        if self._pass > self._passes:
            raise RuntimeError("the method goes through its models more often than its round's `passes` says")
        self._skip_to((self._pass - 1) * self._num_models)
        for model in range(self._num_models):
            self._last = model
            if self._resident:
                self._held.append(self._next())
                yield model, self._held[-1]
            else:
                yield model, self._next()

    def close(self) -> None:
        """Drop all slices, and take those that the method has not asked for."""
        if self.drains:
            self._skip_to(self._passes * self._num_models)
        self._held.clear()
        self._beside.clear()

    def _skip_to(self, position: int) -> None:
        self._held.clear()
        self._beside.clear()
        for _ in range(position - self._taken):
            self._next()

    def _next(self) -> Stored | None:
        """Return the next model's slice; its companions come with it, and stay where slices do."""
        own = self._complete(next(self._coming))
        if not self._resident:
            self._beside.clear()
        self._beside.append([next(self._coming) for _ in self._companions])
        self._taken += 1
        if self.watch and own and self._pass == 1:
            self.watch.take(self._taken - 1, own)
        return own

    def _note(self, group: Sequence[tuple[int, Stored]], counts: Sequence[int]) -> None:
        if self._pass == 1:
            for (model, _), count in zip(group, counts, strict=True):
                self.not_finite[model - self._before] += count


def _words_of(total: Tensor, length: int) -> int:
    """Return how many fp32 words of a sum belong to each element; that of a whole parameter is filled up."""
    return -(-total.numel() // length) * (total.element_size() // 4)


def _misfit(problem: str) -> InputError:
    return InputError(Problem("continues", f"the state {problem}", "merge all models in one recipe"))


def _is_finite(factors: Factors) -> bool:
    return bool(factors.left.isfinite().all() & factors.right.isfinite().all())
