"""The layer of a model in which a parameter lies, by its name."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

STACKS = frozenset({"layer", "layers", "block", "blocks", "h", "resblocks"})
"""Names of the modules that hold layers by number."""


class Layer(NamedTuple):
    """Where a parameter lies."""

    stack: str
    """What holds the layer, such as `model.layers` or `decoder.block`."""
    number: int
    """0-based."""


def layer_of(name: str) -> Layer | None:
    """Return the layer of a parameter: the first number that follows a name of layers, never that of an expert."""
    parts = name.split(".")
    for place, (part, number) in enumerate(itertools.pairwise(parts)):
        if part in STACKS and number.isdecimal():
            return Layer(".".join(parts[: place + 1]), int(number))
    return None


def depths(names: Iterable[str]) -> dict[str, float]:
    """Return how deep each parameter of a model lies in its stack of layers: 0 in the first one, 1 in the last.

    The layers are those of all names given; encoder and decoder are stacks of their own. A single layer counts as the
    last. Parameters outside the layers, such as embeddings and heads, are left out.
    """
    layers = {name: layer for name in names if (layer := layer_of(name))}
    last: dict[str, int] = {}
    for stack, number in layers.values():
        last[stack] = max(number, last.get(stack, 0))
    return {name: number / last[stack] if last[stack] else 1.0 for name, (stack, number) in layers.items()}
