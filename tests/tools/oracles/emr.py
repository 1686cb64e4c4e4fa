"""EMR-Merging (Huang et al. 2024, arXiv:2405.17461): elect one vector, keep a mask and a scale for each model."""

from collections.abc import Sequence

import numpy as np

from tests.tools.oracles.protocol import Merged, Tensors, stacked, task_vectors


def emr(base: Tensors | None, models: Sequence[Tensors]) -> Merged:
    """EMR-Merging: g = +1 where sum tau > 0, else -1; unified = g * the largest |tau_i| whose sign is g.

    The merged delta is the unified vector, 0 where no value has the sign g. mask_i = (tau_i g > 0);
    rescaler_i = sum over tensors of mean|tau_i| / sum over tensors of mean|mask_i unified|, so a small tensor weighs
    as much as a large one. A sum of 0 counts as negative. A model whose mask meets only zeros has the rescaler 0: its
    reconstruction is the base. N = 1 gives the model, with the rescaler 1. An element of the unified vector is never
    larger than the largest |tau_i|, and is one of the tau_i or 0.
    Products: `masks` (model, *shape) by parameter, `rescalers` (model,), `reconstructed` deltas
    rescaler_i mask_i unified, a dict for each model.
    """
    deltas = task_vectors(base, models)
    unified, masks = {}, {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        sign = np.where(stack.sum(0) > 0, 1.0, -1.0)
        masks[name] = stack * sign > 0
        unified[name] = sign * np.where(masks[name], np.abs(stack), 0.0).max(0)
    rescalers = np.zeros(len(deltas))
    for model, delta in enumerate(deltas):
        above = sum(float(np.abs(tau).mean()) for tau in delta.values() if tau.size)
        below = sum(float(np.abs(masks[name][model] * unified[name]).mean()) for name in unified if unified[name].size)
        rescalers[model] = above / below if below else 0.0
    own = [
        {name: rescalers[model] * masks[name][model] * value for name, value in unified.items()}
        for model in range(len(deltas))
    ]
    return Merged(unified, base, {"masks": masks, "rescalers": rescalers, "reconstructed": own})
