"""What the spherical methods share: exact dot products of vectors that may include the base, and weighted sums."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ties_ray.methods import Context, Deltas, Key, Result

if TYPE_CHECKING:
    from torch import Tensor


class Pair(NamedTuple):
    """Exact products of two vectors, in units of 1 / `ONE`."""

    square: int
    """The first one's squared length."""
    other: int
    """The second one's squared length."""
    dot: int


def pair_sums(deltas: Deltas, context: Context) -> Result:
    """Return the products of two models' vectors in a slice; with the base they are those of whole weights."""
    from ties_ray.kernels.exact_sums import dot

    first, second = (delta.clone() for _, delta in deltas)
    sums = {Key("norm2", (0,)): dot(first, first), Key("norm2", (1,)): dot(second, second)}
    sums[Key("dot")] = dot(first, second)
    if context.base is not None:
        base = context.base.float().nan_to_num()  # an exact sum takes finite fp32 numbers
        sums |= {Key("base"): dot(base, base), Key("base", (0,)): dot(base, first)}
        sums[Key("base", (1,))] = dot(base, second)
    return Result(sums=sums)


def pair_of(context: Context) -> Pair:
    """Return the products of two models' vectors of a parameter, from what `pair_sums` gave of its slices."""
    sums = context.sums
    base, first, second = (sums.get(Key("base", of), 0) for of in ((), (0,), (1,)))
    square, other = (sums.get(Key("norm2", (model,)), 0) + base for model in (0, 1))
    return Pair(square + 2 * first, other + 2 * second, sums.get(Key("dot"), 0) + first + second + base)


def weighted(deltas: Deltas, context: Context, factors: Sequence[float], of_base: float) -> "Tensor":
    """Return the sum of the deltas times their factors (fp64), in model order, and of the base where it counts."""
    import torch

    total = torch.zeros(context.stop - context.start, dtype=torch.float64, device=context.kernels.device)
    for model, delta in deltas:
        total += delta.double().mul_(factors[model])
    if context.base is not None and of_base:
        total += context.base.double() * of_base
    return total
