"""All combinations of some numbers and all choices."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ties_ray.errors import Problem
from ties_ray.samplers import Axis, Draw, Point, Sampler

BATCH = 1000
"""Points that are asked for at a time."""


class GridSampler(Sampler):
    """Tries all combinations: the last axis goes fastest. It suits one or two numbers, or choices."""

    name: Literal["grid"] = "grid"
    levels: int = Field(default=5, ge=2, le=1000)
    """Numbers of each axis, from its lower to its upper bound with equal steps. Choices are all tried."""

    def begin(self, axes: Sequence[Axis], seed: int) -> Draw:
        """Return the grid; it has no use for a seed."""
        return _GridDraw([self._coordinates(axis) for axis in axes])

    def problems(self, axes: Sequence[Axis], budget: int) -> list[Problem]:
        """Refuse a grid that the budget cuts off, since what is left of it is one-sided."""
        size = math.prod(axis.choices or self.levels for axis in axes)
        if size <= budget:
            return []
        message = f"the grid has {size:,} points, and the budget is {budget:,}"
        return [Problem("search.budget", message, "raise the budget, lower `levels`, or take another sampler")]

    def _coordinates(self, axis: Axis) -> list[float]:
        if axis.choices:
            return list(range(axis.choices))
        return [level / (self.levels - 1) for level in range(self.levels)]


class _GridDraw(Draw):
    def __init__(self, coordinates: Sequence[Sequence[float]]) -> None:
        self._points = itertools.product(*coordinates)

    def ask(self, most: int) -> list[Point]:
        return list(itertools.islice(self._points, min(most, BATCH)))

    def tell(self, points: Sequence[Point], losses: Sequence[float | None]) -> None:
        """Learn nothing."""
