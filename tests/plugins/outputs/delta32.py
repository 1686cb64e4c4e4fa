"""The merged task vector itself, in fp32, under an index of its own."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ties_ray.kernels import Kernels
from ties_ray.libraries.library import Library
from ties_ray.outputs import ElementwiseOutput, OutputFile, OutputTensor
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Delta32(ElementwiseOutput):
    """What is merged and nothing else, before the base is added."""

    kind: Literal["delta32"] = "delta32"
    prefix: str = "delta."
    """Before every name."""

    def tensors(self, parameters: Sequence[Parameter]) -> tuple[OutputTensor, ...]:
        return tuple(
            OutputTensor(self.prefix + parameter.name, "F32", parameter.shape, parameter.name)
            for parameter in parameters
            if parameter.merged
        )

    def values(self, base: "Tensor", merged: "Tensor", out: "Tensor", kernels: Kernels) -> int:
        out.copy_(merged)
        return int((merged.isfinite() & ~out.isfinite()).sum())

    def library(self, inputs: Library) -> Library:
        return Library("safetensors", "delta")

    def index(
        self, files: Sequence[OutputFile], parameters: Sequence[Parameter], facts: Mapping[str, str], library: Library
    ) -> tuple[str, bytes]:
        weight_map = {placed.tensor.name: file.name for file in files for placed in file.tensors}
        return "delta.json", json.dumps({"weight_map": weight_map}).encode()

    def rewrite(self, name: str, data: bytes, facts: Mapping[str, str]) -> bytes | None:
        return None

    def entry_point_file(self, files: Sequence[OutputFile], library: Library) -> str:
        return "delta.json"
