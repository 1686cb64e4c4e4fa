"""SLERP, NuSLERP, multi-SLERP and the Karcher mean: interpolation on a sphere, one tensor (or row) at a time.

With a base they interpolate the task vectors, without one the whole weights. Norms, dots and angles are those of fp64
unit vectors, with no epsilon: the angle of two unit vectors is 2 atan2(|u - v|, |u + v|), exact at both ends. A vector
of zeros has no direction: where one is involved in SLERP or NuSLERP, the interpolation is linear. (mergekit gives it
a right angle, hence .707 of the other model at t = .5.)
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from tests.tools.oracles.protocol import Array, Merged, Tensors, Weights, factors, stacked, task_vectors


def slerp(base: Tensors | None, models: Sequence[Tensors], *, t: float, threshold: float = 0.9995) -> Merged:
    """SLERP (Shoemake 1985, as mergekit applies it): sin((1-t) a)/sin(a) x + sin(t a)/sin(a) y, by tensor.

    Two models exactly. Linear where |cos| > threshold (equal, nearly equal or opposite directions) and where a tensor
    is zero. t = 0 gives the first model, t = 1 the second; norms follow no rule in between: the vectors themselves
    are combined, not their units.
    """
    return _pair(base, models, lambda x, y, _: _arc(x, y, t, lambda angle: abs(np.cos(angle)) > threshold))


def nuslerp(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    weights: Weights = None,
    unit: Literal["tensor", "row", "column"] = "tensor",
) -> Merged:
    """NuSLERP (mergekit): SLERP at t = w_2 / (w_1 + w_2), t = .5 where |w_1 + w_2| < 1e-6.

    Two models exactly. Linear where sin(angle) <= 1e-8. `unit`: the whole tensor (mergekit's nuslerp_flatten), rows
    along the last axis, or columns along the first (mergekit's nuslerp_row_wise, despite its name). A tensor of one
    axis is one row, and each of its elements is a column of its own.
    """

    def by_unit(x: Array, y: Array, name: str) -> Array:
        first, second = factors(weights, 2, name)
        t = 0.5 if abs(first + second) < 1e-6 else float(second / (first + second))

        def arc(x: Array, y: Array) -> Array:
            return _arc(x, y, t, lambda angle: np.sin(angle) <= 1e-8)

        if unit == "tensor" or x.ndim == 0:
            return arc(x, y)
        axis = -1 if unit == "row" else 0
        left, right = np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)
        lines = [
            arc(one, other)
            for one, other in zip(left.reshape(-1, left.shape[-1]), right.reshape(-1, left.shape[-1]), strict=True)
        ]
        return np.moveaxis(np.stack(lines).reshape(left.shape), -1, axis)

    return _pair(base, models, by_unit)


def multislerp(
    base: Tensors | None, models: Sequence[Tensors], *, weights: Weights = None, normalize: bool = True
) -> Merged:
    """Multi-SLERP (mergekit): one step of the barycentre on the sphere from the weighted Euclidean mean, by tensor.

    With units u_i and weights w_i (divided by their sum): m = unit(sum w_i u_i); g = sum w_i (u_i - <u_i, m> m);
    the result is (cos|g| m + sin|g| g/|g|) * sum w_i |x_i|. A zero tensor has the unit 0 and the norm 0 and keeps its
    weight. N = 1 gives the model. Where |sum w_i u_i| < 1e-8 (all frozen, or directions that cancel) the result is
    sum w_i x_i for any N; mergekit does so for N = 2 and raises for more. Weights that sum to 0 are refused.

    m is the direction of sum w_i u_i, so g is always 0: the result is unit(sum w_i u_i) * sum w_i |x_i|.
    """
    deltas = task_vectors(base, models)

    def merge(stack: Array, name: str) -> Array:
        own = factors(weights, len(stack), name)
        if normalize:
            if abs(own.sum()) < 1e-12:
                raise ValueError("the weights sum to zero")
            own = own / own.sum()
        if len(stack) == 1:
            return stack[0]
        units, sizes = _units(stack)
        mean = own @ units
        length = np.linalg.norm(mean)
        if length < 1e-8:
            return np.tensordot(own, stack, 1)
        mean = mean / length
        tangent = own @ (units - (units @ mean)[:, None] * mean)
        return _exponential(mean, tangent).reshape(stack.shape[1:]) * (own @ sizes)

    return Merged({name: merge(stacked(deltas, name), name) for name in deltas[0]}, base)


def karcher(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    weights: Weights = None,
    max_iter: int = 10,
    tolerance: float = 1e-5,
) -> Merged:
    """Karcher mean (mergekit, arXiv:2603.04972): the point of the sphere with no pull left, by tensor.

    Over the models that are not zero, with weights a_i divided by their sum there: start from unit(sum a_i u_i), or
    from the first unit where that sum is shorter than `tolerance`. Then at most `max_iter` times
    g = sum a_i (theta_i / sin theta_i)(u_i - cos theta_i m), stop if |g| < tolerance, m = cos|g| m + sin|g| g/|g|.
    The result is m * sum b_i |x_i| with b the weights divided by their sum over *all* models, so that a frozen model
    shortens the mean. N = 1 gives the model; all zero gives zero. An opposite unit (theta = pi) has no direction to
    pull in and adds nothing.
    """
    deltas = task_vectors(base, models)

    def merge(stack: Array, name: str) -> Array:
        shares = factors(weights, len(stack), name)
        shares = shares / shares.sum()
        units, sizes = _units(stack)
        moved = sizes > 0
        if len(stack) == 1 or not moved.any():
            return stack[0]
        pulls, units = shares[moved] / shares[moved].sum(), units[moved]
        mean = pulls @ units
        length = np.linalg.norm(mean)
        mean = units[0] if length < tolerance else mean / length
        for _ in range(max_iter):
            away = units - (units @ mean)[:, None] * mean
            lengths = np.linalg.norm(away, axis=1)
            angles = 2 * np.arctan2(np.linalg.norm(units - mean, axis=1), np.linalg.norm(units + mean, axis=1))
            there = lengths > 1e-12
            tangent = (pulls * np.where(there, angles / np.where(there, lengths, 1.0), 0.0)) @ away
            if np.linalg.norm(tangent) < tolerance:
                break
            mean = _exponential(mean, tangent)
            mean = mean / np.linalg.norm(mean)
        return mean.reshape(stack.shape[1:]) * (shares @ sizes)

    return Merged({name: merge(stacked(deltas, name), name) for name in deltas[0]}, base)


def _pair(base: Tensors | None, models: Sequence[Tensors], merge: Callable[[Array, Array, str], Array]) -> Merged:
    if len(models) != 2:
        raise ValueError(f"takes two models, not {len(models)}")
    first, second = task_vectors(base, models)
    return Merged({name: merge(first[name], second[name], name) for name in first}, base)


def _arc(x: Array, y: Array, t: float, straight: Callable[[float], bool]) -> Array:
    sizes = np.linalg.norm(x), np.linalg.norm(y)
    if not all(sizes):
        return (1 - t) * x + t * y
    angle = _angle(x / sizes[0], y / sizes[1])
    if straight(angle):
        return (1 - t) * x + t * y
    return (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)


def _angle(u: Array, v: Array) -> float:
    return float(2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))


def _units(stack: Array) -> tuple[Array, Array]:
    rows = stack.reshape(len(stack), -1)
    sizes = np.linalg.norm(rows, axis=1)
    return rows / np.where(sizes > 0, sizes, 1.0)[:, None], sizes


def _exponential(point: Array, tangent: Array) -> Array:
    size = np.linalg.norm(tangent)
    return np.cos(size) * point + np.sinc(size / np.pi) * tangent
