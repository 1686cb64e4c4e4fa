"""A Hugging Face checkpoint: base plus merged delta, with everything that `from_pretrained` needs."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from ties_ray.formats import Parameter
from ties_ray.kernels import Kernels
from ties_ray.outputs import DTYPES, Output, OutputFile, OutputTensor, weight_map

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"


class Checkpoint(Output):
    """All parameters of the base, merged or copied."""

    kind: Literal["checkpoint"] = "checkpoint"

    opened_by: ClassVar[str] = 'transformers: AutoModel.from_pretrained("{output}")'

    def tensors(self, parameters: Sequence[Parameter]) -> tuple[OutputTensor, ...]:
        """Return every base parameter; only merged ones change their dtype."""
        asked = DTYPES[self.dtype] if self.dtype else None
        return tuple(
            OutputTensor(
                name=parameter.name,
                dtype=(asked or parameter.dtype) if parameter.merged else parameter.dtype,
                shape=parameter.shape,
                parameter=parameter.name,
                origin="merged" if parameter.merged else "base",
            )
            for parameter in parameters
        )

    def values(self, base: "Tensor", merged: "Tensor", out: "Tensor", kernels: Kernels) -> int:
        """Write base + merged, rounded once."""
        return kernels.apply(base, merged, out)

    def file_name(self, number: int, count: int) -> str:
        """Return the name that transformers looks for."""
        return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"

    def index(
        self, files: Sequence[OutputFile], parameters: Sequence[Parameter], facts: Mapping[str, str]
    ) -> tuple[str, bytes] | None:
        """Return the map from tensor to file."""
        return None if len(files) == 1 else (INDEX, weight_map(files))

    def rewrite(self, name: str, data: bytes) -> bytes | None:
        """Return the file as it is, but for the dtype that config.json names."""
        if name != "config.json" or self.dtype is None:
            return data
        config = json.loads(data)
        # transformers writes `torch_dtype` up to version 4 and `dtype` since; both read either.
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
            config[key] = self.dtype
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

    def door(self, files: Sequence[OutputFile]) -> str:
        """Return the index, or the config where there is one weight file."""
        return "config.json" if len(files) == 1 else INDEX
