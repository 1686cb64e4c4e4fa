"""LoRA on parameters instead of modules (`target_parameters`): factors for all experts of a layer in two tensors.

A is (experts * r, in) with the rows of one expert together. B is (out, r * experts), where an expert has every column
that is its number modulo the experts.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ties_ray.libraries.naming import Shape
from ties_ray.safetensors import DTYPE_BITS
from ties_ray.tensors import Source, TensorRef

EXPERT = "expert"
"""The number of a source that says which expert's columns of B count."""

_NESTED = re.compile(r"(?:\.base_layer)+\Z")
"""What PEFT adds to a module's path for each further parameter of it."""
_GATED = frozenset({"gate_up_proj", "down_proj"})
"""The parameters of experts whose first one has twice as many rows as the second has columns."""

Factors = Mapping[str, tuple[TensorRef, TensorRef]]
"""A and B by the path of their module."""


class Experts(NamedTuple):
    """The factors of all experts for one parameter."""

    name: str
    """The model's name of the parameter, which holds all experts."""
    num_experts: int
    rank: int
    a: TensorRef
    b: TensorRef

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the parameter's shape (experts, out, in)."""
        return self.num_experts, self.b.shape[0], self.a.shape[1]

    def part(self, start: int, shape: Shape, scale: float) -> Source | None:
        """Return the change of a run of the parameter's elements; None where it is not some rows of one expert."""
        _, height, width = self.shape
        expert, offset = divmod(start, height * width)
        first, beside = divmod(offset, width)
        if beside or len(shape) != 2 or shape[1] != width or first + shape[0] > height:
            return None
        a = rows_of(self.a, expert * self.rank, (expert + 1) * self.rank)
        numbers = (("scale", scale), (EXPERT, float(expert)))
        return Source((a, rows_of(self.b, first, first + shape[0])), numbers, "factors")


def rows_of(ref: TensorRef, first: int, last: int) -> TensorRef:
    """Return the place of the rows [first, last) of a matrix."""
    columns = ref.shape[1]
    return ref._replace(start=ref.start + first * columns * DTYPE_BITS[ref.dtype] // 8, shape=(last - first, columns))


def parameters_of(factors: Factors, targets: Sequence[str]) -> dict[str, str]:
    """Return the parameter that each module's factors change, by the module's path, where a target names it.

    targets: `target_parameters` of the config.
    """
    names: dict[str, str] = {}
    stacked = {target.rpartition(".")[2] for target in targets if not target.endswith("weight")}
    layers: defaultdict[str, list[str]] = defaultdict(list)
    for path in factors:
        module = _NESTED.sub("", path)
        weight = f"{module}.weight"
        if any(weight == target or weight.endswith(f".{target}") for target in targets):
            names[path] = weight
        elif module.rpartition(".")[2] == "experts":
            layers[module].append(path)
    for module, paths in layers.items():
        ordered = _ordered([factors[path] for path in paths], stacked)
        names |= {paths[number]: f"{module}.{name}" for number, name in ordered.items()}
    return names


def _ordered(factors: Sequence[tuple[TensorRef, TensorRef]], stacked: set[str]) -> dict[int, str]:
    """Return the parameter of each module's factors, by their number; nothing where that is unclear."""
    if len(factors) == len(stacked) == 1:
        return dict(enumerate(stacked))
    if len(factors) == 2 and stacked == _GATED:
        for number in (0, 1):
            (a, b), (other_a, other_b) = factors[number], factors[1 - number]
            if a.shape[1] == other_b.shape[0] and b.shape[0] == 2 * other_a.shape[1]:
                return {number: "gate_up_proj", 1 - number: "down_proj"}
    return {}


def experts_of(factors: Factors, names: Mapping[str, str], ranks: Mapping[str, int], rank: int) -> dict[str, Experts]:
    """Return the factors of experts by their path; ranks: those of parameters that have one of their own."""
    experts = {}
    for path, name in names.items():
        (a, b), own = factors[path], ranks.get(name, rank)
        if not name.endswith(".weight") and a.shape[0] == b.shape[1] and a.shape[0] % own == 0:
            experts[path] = Experts(name, a.shape[0] // own, own, a, b)
    return experts
