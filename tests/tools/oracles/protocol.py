"""What every oracle of this folder takes and gives: dense float64 maths of one method, written from its definition.

An oracle is a function `method(base, models, *, parameters) -> Merged`. `base` maps names to arrays. With `base=None`
the models are taken as they are: either task vectors, or, for the spherical methods, whole weights. The oracles use
real arithmetic: they round nothing to fp32 unless they say so. A caller compares with a tolerance, and compares
choices (masks, signs, kept counts) exactly on families whose sums are exact.

Rules that all oracles share:

* **Matrix**: a parameter of two axes that are both longer than 1 (`is_matrix`). All others follow the method's rule for
  vectors. Upstream code takes every 2-D tensor for a matrix; a matrix of one row or column is a vector here.
* **Order of magnitudes**: descending, the lower index first among equals (`descending`). "The k largest" are the first
  k of that order. An ascending rank is the reverse of it.
* **Counts**: `int(share * n)` of the binary product, as the published codes have it.
* **Missing parameter**: a model that lacks a parameter has a delta of zero there.
* **Whole vector**: parameters sorted by name, each row-major.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Tensors = Mapping[str, Array]
Weights = Sequence[float] | Mapping[str, Sequence[float]] | None
"""One number for each model, for all parameters or by parameter; 1 where nothing is said."""


@dataclass(frozen=True)
class Merged:
    """What a merge gives."""

    delta: dict[str, Array]
    """What is added to the base, lambda applied; of a merge without a base the merged tensors."""
    base: Tensors | None = None
    products: dict[str, Any] = field(default_factory=dict)
    """What the method gives beside the merged tensors, such as masks or weights."""

    @property
    def weights(self) -> dict[str, Array]:
        """Return base + delta."""
        return {name: value + (0.0 if self.base is None else self.base[name]) for name, value in self.delta.items()}


def task_vectors(base: Tensors | None, models: Sequence[Tensors]) -> list[dict[str, Array]]:
    """Return each model's delta in float64, for every parameter that the base or any model has."""
    if not models:
        raise ValueError("a merge needs a model")
    shapes = {name: np.shape(value) for one in (*models, base or {}) for name, value in one.items()}
    deltas = []
    for model in models:
        delta = {}
        for name, shape in shapes.items():
            if name in model:
                start = 0.0 if base is None else np.asarray(base[name], dtype=np.float64)
                delta[name] = np.asarray(model[name], dtype=np.float64) - start
            else:
                delta[name] = np.zeros(shape)
        deltas.append(delta)
    return deltas


def stacked(deltas: Sequence[Tensors], name: str) -> Array:
    """Return all models' deltas of one parameter, models first."""
    return np.stack([delta[name] for delta in deltas])


def factors(weights: Weights, count: int, name: str) -> Array:
    """Return all models' weights for one parameter as float64, ones by default."""
    own = weights.get(name) if isinstance(weights, Mapping) else weights
    return np.ones(count) if own is None else np.asarray(own, dtype=np.float64)


def scaled(weights: Array, stack: Array) -> Array:
    """Return every model's tensor times its weight."""
    return weights.reshape(-1, *[1] * (stack.ndim - 1)) * stack


def flat(tensors: Tensors) -> Array:
    """Return the whole vector: parameters sorted by name."""
    return np.concatenate([np.ravel(tensors[name]) for name in sorted(tensors)])


def split(vector: Array, like: Tensors) -> dict[str, Array]:
    """Return the parameters of a whole vector, in the order and the shapes of `like`."""
    parts, start = {}, 0
    for name in sorted(like):
        size = np.size(like[name])
        parts[name] = vector[start : start + size].reshape(np.shape(like[name]))
        start += size
    return {name: parts[name] for name in like}


def norm(tensors: Tensors) -> float:
    """Return the Euclidean norm of the whole model."""
    return float(np.sqrt(sum(float(np.vdot(value, value)) for value in tensors.values())))


def is_matrix(name: str, value: Array) -> bool:
    """Return whether the matrix methods treat a parameter as a matrix."""
    return value.ndim == 2 and min(value.shape) > 1


def descending(values: Array) -> NDArray[np.intp]:
    """Return the indices of a 1-D array by falling value, the lower index first among equals."""
    return np.argsort(-values, kind="stable")


def largest(magnitudes: Array, count: int) -> Flags:
    """Return where the `count` largest of an array are, the lower index first among equals."""
    kept = np.zeros(magnitudes.size, dtype=np.bool_)
    kept[descending(magnitudes.ravel())[:count]] = True
    return kept.reshape(magnitudes.shape)


def rows_of(value: Array) -> Array:
    """Return a tensor as rows along its last axis; a vector is one row, and so is a scalar."""
    return value.reshape(-1, value.shape[-1]) if value.ndim > 1 else value.reshape(1, -1)
