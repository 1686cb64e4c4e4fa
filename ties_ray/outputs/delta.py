"""The merged change itself, before the base is added."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ties_ray.kernels import Kernels
from ties_ray.libraries.library import LOAD_FILE, Library
from ties_ray.outputs import DTYPES, ElementwiseOutput, OutputFile, OutputTensor, weight_map
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor

LIBRARY = Library("safetensors", "delta", opened_by=LOAD_FILE.format(name="delta.safetensors"))
TILE = 65_536
"""Elements that are written at a time, so that the zeros stay in the CPU's cache."""


class Delta(ElementwiseOutput):
    """The merged change of every parameter that some model changes, under the parameter's name."""

    kind: Literal["delta"] = "delta"
    dtype: Literal["float64", "float32", "float16", "bfloat16"] = "float32"
    """The dtype of the tensors."""

    reads_base = False

    def tensors(self, parameters: Sequence[Parameter]) -> tuple[OutputTensor, ...]:
        """Return every parameter that is merged and changed."""
        return tuple(
            OutputTensor(parameter.name, DTYPES[self.dtype], parameter.shape, parameter.name)
            for parameter in changed(parameters)
        )

    def values(self, base: "Tensor", merged: "Tensor", out: "Tensor", kernels: Kernels) -> int:
        """Write the change, rounded once, as added to a base of zeros: no change is +0."""
        return write_change(merged, out, kernels)

    def library(self, inputs: Library) -> Library:
        """Return names that no loader takes for a model's."""
        return LIBRARY

    def index(
        self, files: Sequence[OutputFile], parameters: Sequence[Parameter], facts: Mapping[str, str], library: Library
    ) -> tuple[str, bytes]:
        """Return the map from tensor to file, also for a single file: loaders enter by it."""
        return library.index, weight_map(files)

    def rewrite(self, name: str, data: bytes, facts: Mapping[str, str]) -> bytes | None:
        """Leave out all small files: they belong to a whole model."""
        return None

    def entry_point_file(self, files: Sequence[OutputFile], library: Library) -> str:
        """Return the index."""
        return library.index


def changed(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Return every parameter that is merged and changed."""
    return [parameter for parameter in parameters if parameter.merged and parameter.changed]


def write_change(merged: "Tensor", out: "Tensor", kernels: Kernels) -> int:
    """Write a change (1-D fp32) into `out`, rounded once; return how many values overflow. No change is +0."""
    size = max(TILE, len(merged)) if merged.is_cuda else TILE  # a GPU gains by one launch and one copy
    zeros = merged.new_zeros(min(size, len(merged)))
    overflow = 0
    for start in range(0, len(merged), size):
        tile = merged[start : start + size]
        overflow += kernels.apply(zeros[: len(tile)], tile, out[start : start + size])
    return overflow
