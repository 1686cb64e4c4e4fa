"""Layer indices, LiNeS and Layer Swapping: scales that depend on how deep a parameter lies."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from tests.tools.oracles.protocol import Merged, Tensors, stacked, task_vectors

LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layers?|blocks?|h|resblocks))\.(?P<index>\d+)(?:\.|$)")


def layer_of(name: str) -> tuple[str, int] | None:
    """Return the stack (such as model.layers or decoder.block) and the 0-based layer of a parameter, or None.

    The first number that follows a name of layers counts: never the number of an expert, of a part of a layer
    (`decoder.block.3.layer.1` is layer 3), or of a codebook. Encoder and decoder are stacks of their own.
    """
    match = LAYER.match(name)
    return (match["stack"], int(match["index"])) if match else None


def depths(names: Sequence[str]) -> Mapping[str, float | None]:
    """Return by name how deep it lies in its stack: 0 the first layer, 1 the last; a stack of one layer is 1 deep."""
    places = {name: layer_of(name) for name in names}
    last: dict[str, int] = {}
    for place in places.values():
        if place is not None:
            last[place[0]] = max(last.get(place[0], 0), place[1])
    return {
        name: None if place is None else (place[1] / last[place[0]] if last[place[0]] else 1.0)
        for name, place in places.items()
    }


def lines(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    beta: float,
    alpha: float | None = None,
    merged: Tensors | None = None,
) -> Merged:
    """LiNeS (Wang et al. 2025, arXiv:2410.17146): scale the merged delta by alpha + beta l / (L - 1) in layer l of L.

    `merged` is the delta of any method, by default the sum of the task vectors. Parameters outside the layers are
    scaled by alpha. alpha = |sum tau|_1 / |merged|_1 / N by default, sums of magnitudes over the whole model: 1/N for
    the sum; 0 where the merged delta is zero. For one model the paper takes beta = 1 - alpha.
    L = 1: the layer counts as the last, hence alpha + beta, as a gradient of one layer does in mergekit. The published
    code takes the smallest i whose ".i." is anywhere in the name, so an expert may pass for a layer.
    Products: `alpha`, `scales` by parameter.
    """
    deltas = task_vectors(base, models)
    total = {name: stacked(deltas, name).sum(0) for name in deltas[0]}
    inner = total if merged is None else merged
    if alpha is None:
        size = sum(float(np.abs(value).sum()) for value in inner.values())
        alpha = sum(float(np.abs(value).sum()) for value in total.values()) / size / len(deltas) if size else 0.0
    scales = {name: alpha + beta * (depth or 0.0) for name, depth in depths(list(inner)).items()}
    return Merged(
        {name: scales[name] * value for name, value in inner.items()}, base, {"scales": scales, "alpha": alpha}
    )


def layer_swapping(
    base: Tensors | None, models: Sequence[Tensors], *, bottom: int = 5, top: int = 2, transition: int = 1
) -> Merged:
    """Layer Swapping (Bandarkar et al. 2025, arXiv:2410.01335): the task expert between layers of the language expert.

    Two models: first the task expert, then the language expert. Of the L layers the `bottom` lowest and the `top`
    highest are the language expert's, and so is what lies outside the layers. The `transition` layers next to each of
    the two are the mean of both experts; the rest is the task expert's. Where the groups overlap, the language expert
    comes first, then the mean. Each stack counts its own layers. Products: `coefficients`, the language expert's share
    by parameter; the two shares add up to 1, so identical models give the model.
    """
    if len(models) != 2:
        raise ValueError(f"takes a task expert and a language expert, not {len(models)} models")
    task, language = task_vectors(base, models)
    places = {name: layer_of(name) for name in task}
    lengths: dict[str, int] = {}
    for place in places.values():
        if place is not None:
            lengths[place[0]] = max(lengths.get(place[0], 0), place[1] + 1)
    shares = {}
    for name, place in places.items():
        edge = -1 if place is None else min(place[1] - bottom, lengths[place[0]] - top - 1 - place[1])
        shares[name] = 1.0 if edge < 0 else 0.5 if edge < transition else 0.0
    merged = {name: shares[name] * language[name] + (1 - shares[name]) * task[name] for name in task}
    return Merged(merged, base, {"coefficients": shares})
