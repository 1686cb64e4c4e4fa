"""Schedules: the weights of a run's checkpoints, in the order of their steps. Pure; the weights sum to 1.

WSM (Tian et al. 2025, arXiv:2507.17634) shows that an average of checkpoints stands for a decay of the learning rate. A
decay scales the updates between N checkpoints by f(1/N), f(2/N), ... with f falling from 1 to 0. Then the weight of
checkpoint j of N, counted from 0, is f(j/N) - f((j + 1)/N).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, FiniteFloat, Tag

DIGITS = 15
"""Decimals of a cosine: libraries of other machines differ in the last bit."""


def _form(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a decay"
    return "a list" if isinstance(value, Sequence) and not isinstance(value, str | bytes) else "a name"


def _has_a_sum(values: tuple[float, ...]) -> tuple[float, ...]:
    if not math.fsum(values) > 0:
        raise ValueError("the coefficients of a schedule must sum to more than 0, since their sum divides them")
    return values


Name = Literal["mean", "linear", "minus_sqrt", "cosine"]
Decay = Annotated[FiniteFloat, Field(gt=0, lt=1)]
Schedule = Annotated[
    Annotated[Name, Tag("a name")]
    | Annotated[dict[Literal["ema"], Decay], Tag("a decay"), Field(min_length=1)]
    | Annotated[tuple[FiniteFloat, ...], AfterValidator(_has_a_sum), Tag("a list")],
    Discriminator(_form),
]
"""A name, `{ema: decay}` with a decay between 0 and 1, or a coefficient for each checkpoint."""


def weights_of(schedule: Schedule, count: int) -> tuple[float, ...]:
    """Return the weights of `count` checkpoints, the first step first. A list must have so many coefficients."""
    if isinstance(schedule, Mapping):
        decay = schedule["ema"]
        return (decay ** (count - 1), *((1 - decay) * decay ** (count - 1 - place) for place in range(1, count)))
    if schedule == "minus_sqrt":
        return _of_decay([1 - math.sqrt(place / count) for place in range(count + 1)])
    if schedule == "cosine":
        return _of_decay([round((1 + math.cos(math.pi * place / count)) / 2, DIGITS) for place in range(count + 1)])
    if schedule == "mean":
        own: Sequence[float] = (1.0,) * count
    else:
        own = range(1, count + 1) if schedule == "linear" else [float(value) for value in schedule]
    total = math.fsum(own)
    return tuple(value / total for value in own)


def _of_decay(scales: Sequence[float]) -> tuple[float, ...]:
    """Return the weights that stand for a decay. scales: f(0) = 1, f(1/N), ..., f(1) = 0."""
    return tuple(before - after for before, after in itertools.pairwise(scales))
