"""LiNeS (Wang et al., ICLR 2025): scale the summed change more, the deeper a layer lies."""

import itertools
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

from pydantic import FiniteFloat

from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Key, Method, Result, Round

STACKS = frozenset({"layer", "layers", "block", "blocks", "h", "resblocks"})
"""Names of the modules that hold layers by number."""
LAYER = "layer "
"""Begin of the statistics that count the parameters of each layer."""


class Layer(NamedTuple):
    """Where a parameter lies."""

    stack: str
    """What holds the layer, such as `model.layers` or `decoder.block`."""
    number: int
    """0-based."""


class Lines(Method):
    """Scales the weighted sum of the task vectors by alpha + beta l / (L - 1) in layer l of L; two passes.

    What lies outside the layers is scaled by alpha, and a single layer counts as the last. Layers are counted among
    the parameters that are merged. Names without layers give alpha everywhere. Alpha scales a sum, as lambda does.
    """

    name: Literal["lines"] = "lines"
    beta: FiniteFloat | None = None
    """What the last layer gets on top of alpha; by default 1 - alpha, as the paper has it for one model: tune it."""
    alpha: FiniteFloat | None = None
    """Factor at the bottom; by default |sum of changes|_1 / |weighted sum|_1 / N, hence 1/N without weights."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = (
        "Wang et al. 2025, LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging"
        " (arXiv:2410.17146)"
    )

    def rounds(self) -> tuple[Round, ...]:
        """Return the count of layers, and the merge."""
        return Round("layers", self._layers, holds=lambda num_models: 12), Round("merge", self._merge)

    def _layers(self, deltas: Deltas, context: Context) -> Result:
        layer = layer_of(context.parameter.name)
        statistics = {f"{LAYER}{layer.stack} {layer.number}": 1} if layer and context.start == 0 else {}
        return Result(statistics=statistics, sums=self._sizes(deltas, context))

    def _sizes(self, deltas: Deltas, context: Context) -> dict[Key, int]:
        """Return the magnitudes of the sum and of the weighted sum, where alpha depends on them."""
        import torch

        from ties_ray.kernels.exact_sums import total

        if self.alpha is not None or all(weight == 1 for weight in context.weights):
            return {}
        plain = torch.zeros(context.stop - context.start, device=context.kernels.device)
        weighted = torch.zeros_like(plain)
        for model, delta in deltas:
            plain += delta
            weighted += delta * context.weights[model]
        return {
            Key("plain", whole=True): total(plain.nan_to_num_().abs_()),
            Key("weighted", whole=True): total(weighted.nan_to_num_().abs_()),
        }

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        terms = tuple(Term(weight) for weight in context.weights)
        alpha = self._alpha(context)
        beta = 1 - alpha if self.beta is None else self.beta
        scale = alpha + beta * depth_of(context.parameter.name, context.statistics)
        return Result(merged=deltas.fold(WeightedSum(terms))["sum"].mul_(scale))

    def _alpha(self, context: Context) -> float:
        if self.alpha is not None:
            return self.alpha
        weighted = context.sum("weighted", whole=True)
        ratio = context.sum("plain", whole=True) / weighted if weighted else 1.0
        return ratio / len(context.members)


def layer_of(name: str) -> Layer | None:
    """Return the layer of a parameter: the first number that follows a name of layers, never that of an expert."""
    parts = name.split(".")
    for place, (part, number) in enumerate(itertools.pairwise(parts)):
        if part in STACKS and number.isdecimal():
            return Layer(".".join(parts[: place + 1]), int(number))
    return None


def depth_of(name: str, statistics: Mapping[str, int]) -> float:
    """Return how deep a parameter lies in its stack: 1 in the last layer, 0 in the first and outside the layers."""
    layer = layer_of(name)
    if layer is None:
        return 0.0
    begin = f"{LAYER}{layer.stack} "
    last = max((int(key.removeprefix(begin)) for key in statistics if key.startswith(begin)), default=layer.number)
    return layer.number / last if last else 1.0
