"""Merges of the oracles' families by our methods, in memory and from files, beside what the oracles say."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tools import families as stored
from tests.tools import merging
from tests.tools.oracles import families
from tests.tools.oracles.families import Family
from tests.tools.oracles.protocol import Array, Merged, Tensors
from ties_ray.kernels.randomness import key, philox
from ties_ray.methods import Method
from ties_ray.stores import Stores
from ties_ray.testing import merge_held


def in_fp32(family: Family) -> Family:
    """Return a family whose task vectors are fp32 numbers, on a base of zeros."""
    zero = {name: np.zeros_like(value, dtype=np.float64) for name, value in (family.base or family.models[0]).items()}
    models = [
        {name: (value - (0.0 if family.base is None else family.base[name])).astype(np.float32).astype(np.float64)
         for name, value in model.items()}
        for model in family.models
    ]  # fmt: skip
    return Family(zero, tuple(models))


def merged(method: Method, family: Family, **more: int) -> dict[str, Array]:
    """Return the merged deltas of a family on a base of zeros, in float64."""
    deltas = {
        name: [torch.from_numpy(np.asarray(model[name], np.float32)) for model in family.models]
        for name in family.models[0]
    }
    return {name: value.double().numpy() for name, value in merge_held(method, deltas, **more).items()}


def uniforms(seed: int, id: str, like: Tensors) -> dict[str, Array]:
    """Return the draws of one model: word e % 4 of block e // 4 for element e."""
    drawn = {}
    for name, value in like.items():
        blocks = range(-(-value.size // 4))
        words = [word for block in blocks for word in philox((block, 0, 0, 0), key(seed, id, name))]
        drawn[name] = np.array(words[: value.size]).reshape(value.shape) / 2**32
    return drawn


def differences(ours: Mapping[str, Array], oracle: Merged) -> dict[str, float]:
    """Return the largest difference of each parameter, relative to the oracle's largest value anywhere."""
    size = max((float(np.abs(value).max(initial=0.0)) for value in oracle.delta.values()), default=0.0) or 1.0
    return {name: float(np.abs(ours[name] - oracle.delta[name]).max(initial=0.0)) / size for name in ours}


def check(
    method: Method,
    oracle: Callable[[Family], Merged],
    *,
    counts: tuple[int, ...] = (1, 2, 5, 40),
    names: Collection[str] = (),
    within: float = 2e-6,
) -> None:
    """Compare a method with its oracle on families with the hazards of these names, or with all."""
    for count in counts:
        hazards = families.hazards(count, seed=count)
        for name, family in ((name, hazards[name]) for name in names or hazards):
            exact = in_fp32(family)
            found = differences(merged(method, exact), oracle(exact))
            wrong = {key: value for key, value in found.items() if value > within}
            assert not wrong, (count, name, wrong)


def check_stored(
    method: Mapping[str, Any] | str,
    oracle: Callable[[Family], Merged],
    folder: Path,
    *,
    count: int = 5,
    weights: Sequence[float] | None = None,
    within: float = 2e-6,
) -> None:
    """Compare a merge of F64 checkpoints, from a recipe to files, with the oracle on a few families."""
    store = Stores({}).of("/")
    for name in ("grid", "smooth", "frozen_model", "one_layer"):
        family = families.hazards(count, seed=count)[name]
        place = folder / name
        uris = [str(place / part) for part in ("base", *map(str, range(count)))]
        for uri, tensors in zip(uris, (family.base, *family.models), strict=True):
            arrays = {key: torch.from_numpy(np.array(value, np.float64)) for key, value in tensors.items()}
            stored.write_checkpoint(store, uri, arrays, config={"model_type": "llama"})
        merging.merge(stored.Family(uris[0], tuple(uris[1:]), {}, ()), place / "out", method, weights=weights)
        written = merging.read_tensors(place / "out")
        ours = {key: value.numpy() - family.base[key] for key, value in written.items()}
        found = differences(ours, oracle(family))
        wrong = {key: value for key, value in found.items() if value > within}
        assert not wrong, (count, name, wrong)


def of_weights(oracle: Callable[[Family], Merged]) -> Callable[[Family], Merged]:
    """Return an oracle of changes from one that merges whole weights."""

    def change(family: Family) -> Merged:
        return Merged({name: value - family.base[name] for name, value in oracle(family).delta.items()})

    return change
