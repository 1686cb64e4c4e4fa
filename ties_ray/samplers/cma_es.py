"""Covariance matrix adaptation (Hansen 2016, arXiv:1604.00772), by the library `cma`."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.samplers import Axis, Draw, Point, Sampler, worst

INSIDE = 1e-6
"""The least distance of the first mean from a bound."""


class CmaEsSampler(Sampler):
    """Moves a cloud of candidates towards the best ones, generation by generation. It suits 2 to 100 numbers.

    The first mean is the recipe as it stands. Choices are taken in their order, as steps of a number. A search that has
    converged begins again with twice the population.
    """

    name: Literal["cma_es"] = "cma_es"
    sigma: FiniteFloat = Field(default=0.2, gt=0, le=1)
    """First standard deviation, as a share of the range."""
    population: int | None = Field(default=None, ge=2, le=10_000)
    """Candidates of a generation. Default: 4 + 3 ln(number of axes), rounded down."""

    def begin(self, axes: Sequence[Axis], seed: int) -> Draw:
        """Return the evolution. It draws from a generator of its own, so that no seed means the clock."""
        return _CmaEsDraw(axes, seed, self.sigma, self.batch_of(axes, 0))

    def batch_of(self, axes: Sequence[Axis], budget: int) -> int:
        """Return the candidates of a generation."""
        import math

        return self.population or 4 + int(3 * math.log(len(axes)))

    def problems(self, axes: Sequence[Axis], budget: int) -> list[Problem]:
        """Refuse a single axis, for which the algorithm is not made."""
        if len(axes) > 1:
            return []
        message = "CMA-ES adapts how several numbers vary together, and the space has one"
        return [Problem("search.sampler", message, "take `grid`, `random` or `optuna`")]


class _CmaEsDraw(Draw):
    def __init__(self, axes: Sequence[Axis], seed: int, sigma: float, population: int) -> None:
        import numpy

        self._axes, self._sigma, self._population = axes, sigma, population
        generator = numpy.random.Generator(numpy.random.PCG64(seed))
        self._normal = lambda *shape: generator.standard_normal(shape)
        self._strategy = self._new()
        self._asked: list[Any] = []

    def ask(self, most: int) -> list[Point]:
        if self._strategy.stop():
            self._population *= 2
            self._strategy = self._new()
        self._asked = self._strategy.ask()
        return [
            tuple(_coordinate(axis, float(share)) for axis, share in zip(self._axes, each, strict=True))
            for each in self._asked
        ]

    def tell(self, points: Sequence[Point], losses: Sequence[float | None]) -> None:
        self._strategy.tell(self._asked, worst(losses))

    def _new(self) -> Any:
        import cma

        starts = [(axis.start + 0.5) / axis.choices if axis.choices else axis.start for axis in self._axes]
        mean = [min(max(start, INSIDE), 1 - INSIDE) for start in starts]
        options = {
            "bounds": [0, 1],
            "popsize": self._population,
            "randn": self._normal,
            "seed": float("nan"),  # else it seeds numpy's global generator, and 0 means the clock
            "verbose": -9,
        }
        return cma.CMAEvolutionStrategy(mean, self._sigma, options)


def _coordinate(axis: Axis, share: float) -> float:
    return min(int(share * axis.choices), axis.choices - 1) if axis.choices else share
