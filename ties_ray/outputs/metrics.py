"""No weights: the result record alone, with what the merge does to some elements."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ties_ray.kernels import Kernels
from ties_ray.libraries.library import Library
from ties_ray.outputs import ElementwiseOutput, OutputFile, OutputTensor
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor

LIBRARY = Library("ties-ray", "metrics", opened_by="")
"""Nothing opens figures as a model."""


class Metrics(ElementwiseOutput):
    """The figures of a merge, without its weights.

    A method that merges element by element then reads only the elements that stand for all; see `reports/effects.py`.
    """

    kind: Literal["metrics"] = "metrics"
    writes = False
    reads_base = False

    def tensors(self, parameters: Sequence[Parameter]) -> tuple[OutputTensor, ...]:
        """Return no tensor."""
        return ()

    def values(self, base: "Tensor", merged: "Tensor", out: "Tensor", kernels: Kernels) -> int:
        """Raise, as no value is written."""
        raise NotImplementedError("figures hold no values")

    def library(self, inputs: Library) -> Library:
        """Return what opens a result record."""
        return LIBRARY

    def index(
        self, files: Sequence[OutputFile], parameters: Sequence[Parameter], facts: Mapping[str, str], library: Library
    ) -> None:
        """Return None: there is no weight file to find."""

    def rewrite(self, name: str, data: bytes, facts: Mapping[str, str]) -> bytes | None:
        """Leave out all small files: they belong to a whole model."""
        return None

    def entry_point_file(self, files: Sequence[OutputFile], library: Library) -> str:
        """Return no name: a folder of figures is no model."""
        return ""
