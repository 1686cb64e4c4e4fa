"""Points that fill the space evenly: the Halton sequence."""

from collections.abc import Sequence
from typing import Literal

from ties_ray.samplers import Axis, Draw, Point, Sampler

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


class Halton(Sampler):
    """Fills up to eight axes evenly. The seed says where the sequence begins."""

    name: Literal["halton"] = "halton"

    def begin(self, axes: Sequence[Axis], seed: int) -> Draw:
        return _Sequence(axes, seed)


class _Sequence(Draw):
    def __init__(self, axes: Sequence[Axis], seed: int) -> None:
        self._axes, self._next = axes, seed + 1

    def ask(self, most: int) -> list[Point]:
        numbers = range(self._next, self._next + most)
        self._next += most
        return [tuple(map(_coordinate, self._axes, PRIMES, (number,) * len(self._axes))) for number in numbers]

    def tell(self, points: Sequence[Point], losses: Sequence[float | None]) -> None:
        pass


def _coordinate(axis: Axis, prime: int, number: int) -> float:
    share, step = 0.0, 1.0
    while number:
        step /= prime
        share += step * (number % prime)
        number //= prime
    return int(share * axis.choices) if axis.choices else share
