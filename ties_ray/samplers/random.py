"""Points drawn by chance, each alike and without regard to the others."""

import random
from collections.abc import Sequence
from typing import Literal

from ties_ray.samplers import Axis, Draw, Point, Sampler


class RandomSampler(Sampler):
    """Draws each coordinate by chance. It is hard to beat with few candidates, and any number can run at a time."""

    name: Literal["random"] = "random"

    def begin(self, axes: Sequence[Axis], seed: int) -> Draw:
        """Return the draw."""
        return _RandomDraw(axes, seed)


class _RandomDraw(Draw):
    def __init__(self, axes: Sequence[Axis], seed: int) -> None:
        self._axes = axes
        self._generator = random.Random(seed)

    def ask(self, most: int) -> list[Point]:
        return [tuple(self._coordinate(axis) for axis in self._axes) for _ in range(most)]

    def tell(self, points: Sequence[Point], losses: Sequence[float | None]) -> None:
        """Learn nothing."""

    def _coordinate(self, axis: Axis) -> float:
        share = self._generator.random()
        return int(share * axis.choices) if axis.choices else share
