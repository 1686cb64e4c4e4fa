"""NearSwap (alchemonaut; as mergekit has it): move towards another model only where it is near."""

from collections.abc import Sequence

import numpy as np

from tests.tools.oracles.protocol import Merged, Tensors, task_vectors


def nearswap(base: Tensors | None, models: Sequence[Tensors], *, t: float) -> Merged:
    """NearSwap: w tau with w = clip(t / |tau|, 0, 1), which is sign(tau) min(|tau|, t).

    One model beside the base. t <= 0 gives the base. A zero delta stays zero. mergekit clamps |tau| at 1e-6 before
    the division, so for t < 1e-6 it moves deltas below 1e-6 less than this.
    """
    if len(models) != 1:
        raise ValueError(f"takes one model beside the base, not {len(models)}")
    (delta,) = task_vectors(base, models)
    return Merged({name: np.sign(tau) * np.minimum(np.abs(tau), max(t, 0.0)) for name, tau in delta.items()}, base)
