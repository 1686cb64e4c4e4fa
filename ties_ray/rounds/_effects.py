"""Looks at some elements of the blocks that a worker merges, and adds up what the merge does to them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ties_ray.kernels import Encoded, Factors, Kernels, Stored
from ties_ray.measures import positions
from ties_ray.measures.effects import NOTHING, Effects, ModelSums, ParameterSums, added, sums_of
from ties_ray.measures.positions import ranges_in, share_of
from ties_ray.methods import Context
from ties_ray.rounds import Block

if TYPE_CHECKING:
    from torch import Tensor


class Observer:
    """Watches the blocks of one shard."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._parameters: list[ParameterSums] = []
        self._models: tuple[ModelSums, ...] = ()

    def watch(self, block: Block, numel: int, num_models: int) -> "Watched | None":
        """Return what watches the slices of a block; None where none of its elements is looked at.

        numel: elements of the block's parameter.
        """
        ranges = ranges_in(block.start, block.stop, numel, num_models)
        return Watched(self._kernels, block, ranges, num_models) if ranges else None

    def add(self, watched: "Watched", merged: "Tensor", context: Context) -> None:
        """Add up what the merged delta of a block makes of its elements."""
        watched.block.slices.watch = None  # a cycle of references would keep the memory of all slices
        num_models = len(context.members)
        of_parameter, models = sums_of(
            watched.block.parameter,
            watched.deltas,
            watched.cut(merged),
            thresholds=context.thresholds,
            weights=context.weights,
            present=context.present,
            share=share_of(context.parameter.numel, num_models),
        )
        self._parameters.append(of_parameter)
        if num_models <= positions.MOST_MODELS:
            self._models = tuple(map(added, self._models or (NOTHING,) * num_models, models))

    def effects(self, shard: int) -> tuple[Effects, ...]:
        """Return what the shard has done; nothing where nothing was looked at."""
        return (Effects(shard, tuple(self._parameters), self._models),) if self._parameters else ()


class Watched:
    """The deltas of all models in some elements of a block."""

    def __init__(self, kernels: Kernels, block: Block, ranges: Sequence[tuple[int, int]], num_models: int) -> None:
        import torch

        self.block = block
        self.deltas = torch.zeros(num_models, sum(stop - start for start, stop in ranges))
        self._kernels = kernels
        self._ranges = ranges
        block.slices.watch = self

    def cut(self, values: "Tensor") -> "Tensor":
        """Return the elements that are looked at."""
        import torch

        return torch.cat([values[start:stop] for start, stop in self._ranges])

    def take(self, model: int, stored: Stored) -> None:
        """Keep the deltas of a model."""
        at = 0
        for start, stop in self._ranges:
            out = self.deltas[model, at : at + stop - start]
            self._kernels.delta(part_of(stored, start, stop), self.block.base[start:stop], out)
            at += stop - start


def part_of(stored: Stored, start: int, stop: int) -> Stored:
    """Return elements [start, stop) of a slice, as views."""
    if isinstance(stored, Encoded):
        return stored._replace(data=stored.data[start:stop])
    assert isinstance(stored, Factors)
    columns = stored.right.shape[1]
    first, last = (stored.start + start) // columns, (stored.start + stop - 1) // columns + 1
    return stored._replace(
        left=stored.left[first:last],
        start=(stored.start + start) % columns,
        magnitude=None if stored.magnitude is None else stored.magnitude[first:last],
        scales=None if stored.scales is None else stored.scales[first:last],
    )
