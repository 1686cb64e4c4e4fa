"""LoRA-LEGO (Zhao et al. 2025, arXiv:2409.16167): ranks of adapters as units, clustered, one centroid a cluster."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.tools.oracles.adapters import Adapter
from tests.tools.oracles.protocol import Array, Merged


def lora_lego(
    adapters: Sequence[Adapter],
    *,
    clusters: int,
    starts: Mapping[str, Sequence[int]] | None = None,
    balance: bool = False,
    order: float = 2,
    pooled: bool = False,
    iterations: int = 100,
) -> Merged:
    """LoRA-LEGO, by module: k-means of all units (row j of A beside column j of B), one rank of the output a cluster.

    Units are in order of adapters, then ranks, B and A with the square root of the scale folded into both. `starts`
    are the units that are the first centroids, the first `clusters` by default. Lloyd: each unit to the nearest
    centroid (the lowest of equals), each centroid to the mean of its units (an empty one stays); until no unit
    moves, at most `iterations` times. Then each centroid is scaled to the mean norm of its units, of that `order` (one
    reimplementation takes the largest element, order inf), and the output by sqrt(r / clusters), r the mean rank of
    the adapters, or, `pooled`, the number of all units. `balance` first gives both halves of a unit the same norm.
    As many clusters as units: each unit is its own centroid; for N = 1 that is the model. N identical adapters and
    clusters = r give the adapter if each start is another rank. More clusters than units are refused.
    Products: `factors` (B, A) by module, `labels` of the units.
    """
    modules = dict.fromkeys(name for adapter in adapters for name in adapter)
    merged, pairs, labels = {}, {}, {}
    for name in modules:
        own = [adapter[name] for adapter in adapters if name in adapter]
        left = np.concatenate([b.T for b, _ in own])
        right = np.concatenate([a for _, a in own])
        if balance:
            left, right = _balanced(left, right)
        units = np.concatenate([left, right], 1)
        if clusters > len(units):
            raise ValueError(f"{name}: {clusters} clusters of {len(units)} units")
        first = list(range(clusters)) if starts is None else list(starts[name])
        labels[name], centres = _clustered(units, first, iterations)
        for cluster in range(clusters):
            sizes = np.linalg.norm(units[labels[name] == cluster], order, axis=1)
            length = np.linalg.norm(centres[cluster], order)
            if len(sizes) and length:
                centres[cluster] *= sizes.mean() / length
        ranks = [a.shape[0] for _, a in own]
        scale = np.sqrt((np.sum(ranks) if pooled else np.mean(ranks)) / clusters)
        b, a = centres[:, : left.shape[1]].T, centres[:, left.shape[1] :]
        pairs[name] = (np.sqrt(scale) * b, np.sqrt(scale) * a)
        merged[name] = pairs[name][0] @ pairs[name][1]
    return Merged(merged, None, {"factors": pairs, "labels": labels})


def _balanced(left: Array, right: Array) -> tuple[Array, Array]:
    sizes = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    there = (sizes[0] > 0) & (sizes[1] > 0)
    ratio = np.sqrt(np.where(there, sizes[1], 1.0) / np.where(there, sizes[0], 1.0))[:, None]
    return left * ratio, right / ratio


def _clustered(units: Array, first: Sequence[int], iterations: int) -> tuple[NDArray[np.intp], Array]:
    centres = units[list(first)].copy()
    labels = np.full(len(units), -1)
    for _ in range(iterations):
        distances = ((units[:, None] - centres[None]) ** 2).sum(2)
        nearest = distances.argmin(1)
        if np.array_equal(nearest, labels):
            break
        labels = nearest
        for cluster in range(len(centres)):
            members = units[labels == cluster]
            if len(members):
                centres[cluster] = members.mean(0)
    return labels, centres
