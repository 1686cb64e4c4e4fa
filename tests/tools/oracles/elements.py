"""Methods that look at one element of all models and at nothing else: MagMax and NegMerge; and RAM, with its counts."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tests.tools.oracles.protocol import Merged, Tensors, scaled, stacked, task_vectors


def magmax(base: Tensors | None, models: Sequence[Tensors], *, lambda_: float = 1.0) -> Merged:
    """MagMax (Marczak et al. 2024, arXiv:2407.06322): the tau_i of the largest magnitude, element by element.

    Among equal magnitudes the later model wins, as in the published code (>=); so the order of the models matters
    where +x meets -x. N = 1 and identical models give the model times lambda.
    """
    deltas = task_vectors(base, models)
    merged = {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        last = len(stack) - 1 - np.abs(stack)[::-1].argmax(0)
        merged[name] = lambda_ * np.take_along_axis(stack, last[None], 0)[0]
    return Merged(merged, base)


def negmerge(base: Tensors | None, models: Sequence[Tensors], *, lambda_: float = 1.0) -> Merged:
    """NegMerge (Kim et al. 2025, arXiv:2410.05583): minus lambda times the mean, where all models have one sign.

    It forgets: a positive lambda moves away from the fine-tunes. A zero in any model breaks the consensus. N = 1
    gives -lambda tau. Products: `agrees`, flags by parameter.
    """
    deltas = task_vectors(base, models)
    merged, agrees = {}, {}
    for name in deltas[0]:
        stack = stacked(deltas, name)
        agrees[name] = np.abs(np.sign(stack).sum(0)) == len(stack)
        merged[name] = -lambda_ * np.where(agrees[name], stack.sum(0) / len(stack), 0.0)
    return Merged(merged, base, {"agrees": agrees})


def ram(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    epsilon: float = 1e-5,
    plus: bool = False,
    r: float = 0.1,
    alpha: float = 0.2,
    scope: Literal["model", "tensor"] = "tensor",
    lambda_: float = 1.0,
) -> Merged:
    """RAM and RAM+ (arXiv:2601.13572, as mergekit has them): average what several models change, keep what one does.

    A model changes an element where |tau| > epsilon; c counts the models that do. c = 1: that tau; c > 1: the sum of
    those tau over c. RAM+ multiplies what only model i changes by 1 + r min(rho_i, alpha), with rho_i the elements
    it shares over the elements it alone changes, in the tensor (mergekit's ramplus_tl) or in the whole model. Where it
    has none of its own, rho_i counts as alpha if it shares any, else as 0 (neither is used). N = 1 gives the deltas
    above epsilon; identical models likewise. Epsilon is absolute: the default drops updates below 1e-5.
    Products: `counts` by parameter; of RAM+ `factors` (model,) by parameter.
    """
    deltas = task_vectors(base, models)
    changes = {name: np.abs(stacked(deltas, name)) > epsilon for name in deltas[0]}
    counts = {name: flags.sum(0) for name, flags in changes.items()}
    tallies = {}
    for name, flags in changes.items():
        shared = (flags & (counts[name] > 1)).reshape(len(deltas), -1).sum(1)
        alone = (flags & (counts[name] == 1)).reshape(len(deltas), -1).sum(1)
        tallies[name] = np.stack([shared, alone])
    whole = np.sum(list(tallies.values()), axis=0)
    merged, scales = {}, {}
    for name, flags in changes.items():
        shared, alone = whole if scope == "model" else tallies[name]
        rho = np.where(alone > 0, shared / np.maximum(alone, 1), np.where(shared > 0, np.inf, 0.0))
        scales[name] = 1 + r * np.minimum(rho, alpha) if plus else np.ones(len(deltas))
        values = np.where(flags, stacked(deltas, name), 0.0)
        alone_part = np.where(counts[name] == 1, scaled(scales[name], values).sum(0), 0.0)
        shared_part = np.where(counts[name] > 1, values.sum(0) / np.maximum(counts[name], 1), 0.0)
        merged[name] = lambda_ * (alone_part + shared_part)
    return Merged(merged, base, {"counts": counts, "factors": scales})
