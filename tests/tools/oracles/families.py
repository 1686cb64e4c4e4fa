"""Small seeded families with the hazards that decide right or wrong, as numpy arrays.

All values are exact in fp32, and so are the deltas. Those of `checkpoints` lie on a grid: a step is 2**-10 of a base
that counts in 2**-6, so sums over models are exact in any order, equal magnitudes are common at every threshold, many
deltas are zero, and models cancel exactly. `smooth` gives generic deltas, for methods of angles and spectra.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.tools.oracles.protocol import Array, Tensors, is_matrix, task_vectors

COUNTS = (1, 2, 40, 300)
"""Numbers of models that every method must stand: alone, a pair, and more than the small matrices are wide."""


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes."""

    base: dict[str, Array]
    models: tuple[dict[str, Array], ...]

    @property
    def deltas(self) -> list[dict[str, Array]]:
        """Return the task vectors."""
        return task_vectors(self.base, self.models)


def shapes(layers: int = 2, hidden: int = 6) -> dict[str, tuple[int, ...]]:
    """Return names and shapes: layers, experts, matrices of both orientations, and the smallest tensors there are."""
    named: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (2 * hidden, hidden),
        "model.scale": (),
        "model.one": (1,),
        "model.narrow.weight": (hidden - 1, 1),
        "model.flat.weight": (1, hidden - 1),
        "model.frozen.weight": (hidden, hidden),
        "model.conv.weight": (3, 2, 2),
    }
    for layer in range(layers):
        named[f"model.layers.{layer}.self_attn.q_proj.weight"] = (hidden, hidden)
        named[f"model.layers.{layer}.mlp.up_proj.weight"] = (2 * hidden + 1, hidden)
        named[f"model.layers.{layer}.mlp.experts.{7 + layer}.down_proj.weight"] = (hidden, 2 * hidden + 1)
        named[f"model.layers.{layer}.norm.weight"] = (hidden,)
    return named


def checkpoints(seed: int, num_models: int, *, layers: int = 2, hidden: int = 6, zeros: float = 0.4) -> Family:
    """Return a family on a grid: ties, zeros, exact cancellation; `model.frozen.weight` never moves."""
    random = np.random.default_rng(seed)
    base = {name: random.integers(-64, 65, shape) / 64 for name, shape in shapes(layers, hidden).items()}
    models: tuple[dict[str, Array], ...] = tuple({} for _ in range(num_models))
    for name, value in base.items():
        steps = random.choice([1, 1, 1, 2, 2, 4, 5], (num_models, *value.shape)).astype(np.float64)
        steps *= random.choice([-1.0, 1.0], steps.shape) * (random.random(steps.shape) >= zeros)
        if num_models > 1:
            cancels = random.random(value.shape) < 0.2
            steps[1] = np.where(cancels, -steps[0], steps[1])
        for model, step in zip(models, steps, strict=True):
            model[name] = value + (0.0 if name == "model.frozen.weight" else step) / 1024
    return Family(base, models)


def smooth(
    seed: int, num_models: int, *, layers: int = 2, hidden: int = 6, rank: int | None = None, shared: float = 0.0
) -> Family:
    """Return a family of generic deltas around 1e-3 and of unlike sizes, or of matrices of low rank.

    `shared` times one delta is in all models alike; at 0 about half of all cosines are negative.
    """
    random = np.random.default_rng(seed)
    base, models = {}, tuple({} for _ in range(num_models))  # type: dict[str, Array], tuple[dict[str, Array], ...]
    for name, shape in shapes(layers, hidden).items():
        base[name] = np.zeros(shape)
        common = shared * random.standard_normal(shape) if shared else 0.0
        for model in models:
            delta = common + random.standard_normal(shape)
            if rank is not None and is_matrix(name, delta):
                low = min(rank, *shape)
                delta = random.standard_normal((shape[0], low)) @ random.standard_normal((low, shape[1]))
            size = 1e-3 * random.uniform(0.5, 2.0)
            exact = (size * np.asarray(delta)).astype(np.float32).astype(np.float64)
            model[name] = np.zeros(shape) if name == "model.frozen.weight" else exact
    return Family(base, models)


def duplicated(family: Family, times: int) -> Family:
    """Return the family with its first model `times` over."""
    return Family(family.base, (family.models[0],) * times)


def frozen_in(family: Family, model: int, *names: str) -> Family:
    """Return the family with one model left at the base, in the named parameters or in all."""
    own = {
        name: family.base[name] if not names or name in names else value for name, value in family.models[model].items()
    }
    return Family(family.base, (*family.models[:model], own, *family.models[model + 1 :]))


def adapters(
    seed: int, ranks: Sequence[int], *, layers: int = 2, hidden: int = 8, missing: bool = True
) -> list[dict[str, tuple[Array, Array]]]:
    """Return low-rank pairs (B, A) by module, scale folded in, one adapter a rank; every second lacks a module."""
    random = np.random.default_rng(seed)
    modules: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        modules[f"model.layers.{layer}.self_attn.q_proj"] = (hidden, hidden)
        modules[f"model.layers.{layer}.mlp.up_proj"] = (2 * hidden, hidden)
    made = []
    for number, rank in enumerate(ranks):
        own = {}
        for position, (name, (rows, columns)) in enumerate(modules.items()):
            b, a = random.standard_normal((rows, rank)), random.standard_normal((rank, columns))
            if not (missing and number % 2 and position == 1):
                own[name] = (0.02 * b, 0.1 * a)
        made.append(own)
    return made


def grams(seed: int, family: Family, *, samples: int = 40, reached: int | None = None) -> list[dict[str, Array]]:
    """Return X^T X / samples of random inputs for every matrix, a dict for each model; inputs reach `reached` axes."""
    random = np.random.default_rng(seed)
    made = []
    for _ in family.models:
        own = {}
        for name, value in family.base.items():
            if is_matrix(name, value):
                inputs = random.standard_normal((samples, value.shape[1])) * random.uniform(0.2, 3.0, value.shape[1])
                if reached is not None:
                    inputs[:, reached:] = 0.0
                own[name] = inputs.T @ inputs / samples
        made.append(own)
    return made


def importances(seed: int, family: Family) -> list[dict[str, Array]]:
    """Return Fisher-like values for every parameter, over many magnitudes and often zero, a dict for each model."""
    random = np.random.default_rng(seed)
    return [
        {
            name: 10.0 ** random.uniform(-9, -2, value.shape) * (random.random(value.shape) < 0.8)
            for name, value in family.base.items()
        }
        for _ in family.models
    ]


def draws(seed: int, family: Family) -> list[dict[str, Array]]:
    """Return uniforms in [0, 1) for every element, a dict for each model."""
    random = np.random.default_rng(seed)
    return [{name: random.random(value.shape) for name, value in family.base.items()} for _ in family.models]


@functools.cache
def hazards(num_models: int, seed: int = 0) -> dict[str, Family]:
    """Return the families that every oracle is tried on, by the name of what is hard about them."""
    grid = checkpoints(seed, num_models)
    return {
        "grid": grid,
        "smooth": smooth(seed, num_models),
        "low_rank": smooth(seed, num_models, rank=1),
        "duplicates": duplicated(grid, num_models),
        "frozen_model": frozen_in(grid, num_models - 1),
        "all_frozen": Family(grid.base, (grid.base,) * num_models),
        "one_layer": checkpoints(seed, num_models, layers=1, hidden=3),
        "narrow": smooth(seed, num_models, hidden=2),
    }


def permuted(models: Sequence[Tensors], seed: int) -> list[Tensors]:
    """Return the models in another order."""
    return [models[place] for place in np.random.default_rng(seed).permutation(len(models))]
