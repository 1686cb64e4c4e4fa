"""TIES and DARE with every rule that a profile may set, and the election that DELLA shares with them."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from tests.tools.oracles.protocol import (
    Array,
    Flags,
    Merged,
    Tensors,
    Weights,
    factors,
    flat,
    largest,
    scaled,
    split,
    stacked,
    task_vectors,
)

Profile = Literal["paper", "official", "mergekit", "peft"]
ZeroSum = Literal["none", "majority", "positive"]


def ties(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    density: float | Sequence[float] = 0.2,
    weights: Weights = None,
    lambda_: float = 1.0,
    profile: Profile = "paper",
    trim: Literal["global", "tensor"] = "global",
    at_threshold: Literal["keep", "drop", "exact"] = "keep",
    zero_sum: ZeroSum = "none",
    merge: Literal["mean", "sum", "max"] = "mean",
    elect: Literal["total", "frequency"] = "total",
    normalize: bool = True,
    rescale: bool = False,
) -> Merged:
    """TIES-Merging (Yadav et al. 2023, arXiv:2306.01708): trim, elect a sign, merge what agrees.

    Trim: of the n elements of the whole vector, or of a tensor, k are the largest.
      k = max(1, int(density n)); `official` min(n, that + 1); `peft` int(density n), which may be 0.
      A density of 1 trims nothing. A density of 0 keeps nothing under `mergekit`.
      at_threshold: `keep` all values as large as the k-th, `drop` all of them (unless that is 0), or `exact`: k values,
      the lower index first among equals, in the whole vector (parameters sorted by name) or in the tensor.
    Elect: the sign of the sum over models of the trimmed values times their weights. A sum of 0 follows `zero_sum`:
      none (delta 0), positive, or the majority of all elected signs; a majority of 0 elects the negative values, or,
      for `max`, none.
    Merge: mean (divided by the weights of those that agree), sum, or the largest magnitude. A mean of none is 0.

    Profiles set rules and overrule the parameters:
      official: global, keep, k + 1, majority; no weights.
      mergekit: tensor, exact, zero sum positive, mean over the weights of the agreeing (their sum 0 counts as 1;
        `normalize=False` leaves the sum); `rescale` multiplies each trimmed tensor by the ratio of L1 norms before and
        after, unless one is below 1e-7. Weights take part in the election and may be negative.
      peft: tensor, exact, zero sum positive; the election ignores the weights (`frequency` adds signs, not values);
        the mean divides by the number of agreeing models. On adapters peft applies it to A and to B separately:
        give it these as parameters.
    Products: `kept` (models, whole vector) flags in sorted order, `elected` signs by parameter.
    """
    deltas = task_vectors(base, models)
    densities = np.broadcast_to(np.asarray(density, dtype=np.float64), (len(deltas),))
    if profile == "official":
        trim, at_threshold, zero_sum = "global", "keep", "majority"
    elif profile in ("mergekit", "peft"):
        trim, at_threshold, zero_sum, merge = "tensor", "exact", "positive", "mean"
    kept = [
        _trimmed(delta, float(share), profile, trim, at_threshold)
        for delta, share in zip(deltas, densities, strict=True)
    ]
    terms = [
        {name: np.where(flags[name], delta[name], 0.0) for name in delta}
        for delta, flags in zip(deltas, kept, strict=True)
    ]
    if rescale:
        terms = [_rescaled(delta, term) for delta, term in zip(deltas, terms, strict=True)]
    merged, signs = elected(
        terms, weights, profile=profile, zero_sum=zero_sum, merge=merge, elect=elect, normalize=normalize
    )
    products = {
        "kept": np.stack([np.concatenate([one[name].ravel() for name in sorted(one)]) for one in kept]),
        "elected": signs,
    }
    return Merged({name: lambda_ * value for name, value in merged.items()}, base, products)


def dare(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    kept: Sequence[Mapping[str, Flags]],
    density: float | Sequence[float],
    weights: Weights = None,
    lambda_: float = 1.0,
    profile: Profile = "paper",
    combine: Literal["linear", "ties"] = "linear",
    zero_sum: ZeroSum = "none",
    elect: Literal["total", "frequency"] = "total",
    normalize: bool = False,
) -> Merged:
    """DARE (Yu et al. 2024, arXiv:2311.03099): drop at random, rescale what is left, then sum or elect.

    `kept` says for each model and parameter which values stay; the oracle draws nothing.
      paper, peft: values are divided by the density.
      mergekit: each tensor is multiplied by the ratio of its L1 norms before and after the drop, unless one is below
        1e-7; a density of 1 drops nothing. `normalize` divides by the sum of the weights (`ties`: of the agreeing).
    linear: the sum of w tau. ties: the election of `ties` under the same profile, mean of the agreeing; mergekit
    leaves their sum unless `normalize`.
    """
    deltas = task_vectors(base, models)
    densities = np.broadcast_to(np.asarray(density, dtype=np.float64), (len(deltas),))
    terms = []
    for delta, flags, share in zip(deltas, kept, densities, strict=True):
        if share >= 1:
            terms.append(dict(delta))
            continue
        term = {name: np.where(flags[name], tau, 0.0) for name, tau in delta.items()}
        if profile == "mergekit":
            terms.append(_rescaled(delta, term))
        else:
            terms.append({name: tau / share for name, tau in term.items()})
    if combine == "linear":
        total = {}
        for name in deltas[0]:
            own = factors(weights, len(deltas), name)
            divisor = own.sum() if profile == "mergekit" and normalize and abs(own.sum()) >= 1e-8 else 1.0
            total[name] = lambda_ * scaled(own, stacked(terms, name)).sum(0) / divisor
        return Merged(total, base)
    zero = "positive" if profile in ("mergekit", "peft") else zero_sum
    divides = normalize if profile == "mergekit" else True
    merged, _ = elected(terms, weights, profile=profile, zero_sum=zero, merge="mean", elect=elect, normalize=divides)
    return Merged({name: lambda_ * value for name, value in merged.items()}, base)


def elected(
    terms: Sequence[Tensors],
    weights: Weights,
    *,
    profile: Profile = "paper",
    zero_sum: ZeroSum = "none",
    merge: Literal["mean", "sum", "max"] = "mean",
    elect: Literal["total", "frequency"] = "total",
    normalize: bool = True,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return what the terms merge to by election, and the elected signs, by parameter; rules as in `ties`."""
    peft = profile == "peft"
    signs = {}
    for name in terms[0]:
        stack = stacked(terms, name)
        votes = stack if peft else scaled(factors(weights, len(terms), name), stack)
        signs[name] = np.sign((np.sign(votes) if elect == "frequency" else votes).sum(0))
    if zero_sum != "none":
        balance = sum(float(sign.sum()) for sign in signs.values())
        majority = np.sign(balance) or (0.0 if merge == "max" else -1.0)
        fill = 1.0 if zero_sum == "positive" else majority
        signs = {name: np.where(sign == 0, fill, sign) for name, sign in signs.items()}
    merged = {}
    for name, sign in signs.items():
        stack = stacked(terms, name)
        own = factors(weights, len(terms), name)
        weighted = scaled(own, stack)
        agrees = (np.sign(stack if peft else weighted) == sign) & (sign != 0)
        if merge == "max":
            merged[name] = sign * np.where(agrees, np.abs(weighted), 0.0).max(0)
            continue
        total = np.where(agrees, weighted, 0.0).sum(0)
        divisor = agrees.sum(0) if peft else scaled(own, agrees.astype(np.float64)).sum(0)
        merged[name] = total / np.where(divisor == 0, 1.0, divisor) if merge == "mean" and normalize else total
    return merged, signs


def _trimmed(delta: Tensors, density: float, profile: Profile, trim: str, at_threshold: str) -> dict[str, Flags]:
    if trim == "global":
        whole = flat(delta)
        kept = split(_kept(whole, density, profile, at_threshold).astype(np.float64), delta)
        return {name: flags.astype(np.bool_) for name, flags in kept.items()}
    return {name: _kept(tau.ravel(), density, profile, at_threshold).reshape(tau.shape) for name, tau in delta.items()}


def _kept(values: Array, density: float, profile: Profile, at_threshold: str) -> Flags:
    size = values.size
    if density >= 1:
        return np.ones(size, dtype=np.bool_)
    if density <= 0 or size == 0:
        return np.zeros(size, dtype=np.bool_)
    count = int(density * size)
    if profile != "peft":
        count = max(1, count)
    if profile == "official":
        count = min(size, count + 1)
    magnitudes = np.abs(values)
    if at_threshold == "exact" or count == 0:
        return largest(magnitudes, count)
    threshold = np.sort(magnitudes)[::-1][count - 1]
    return magnitudes > threshold if at_threshold == "drop" and threshold > 0 else magnitudes >= threshold


def _rescaled(delta: Tensors, term: Tensors) -> dict[str, Array]:
    """Return each tensor with the L1 norm it had."""
    rescaled = {}
    for name, tau in term.items():
        before, after = np.abs(delta[name]).sum(), np.abs(tau).sum()
        rescaled[name] = tau if before < 1e-7 or after < 1e-7 else tau * (before / after)
    return rescaled
