"""A Hugging Face checkpoint: base plus merged delta, with everything that `from_pretrained` needs."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ties_ray.kernels import Kernels
from ties_ray.libraries import bounded
from ties_ray.libraries.library import Library
from ties_ray.libraries.ties import ties_only_the_head
from ties_ray.outputs import DTYPES, ElementwiseOutput, OutputFile, OutputTensor, weight_map
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoint(ElementwiseOutput):
    """All parameters of the base, merged or copied."""

    kind: Literal["checkpoint"] = "checkpoint"

    def tensors(self, parameters: Sequence[Parameter]) -> tuple[OutputTensor, ...]:
        """Return every base parameter; only merged ones change their dtype, where it can hold their values."""
        asked = DTYPES[self.dtype] if self.dtype else None
        return tuple(
            OutputTensor(
                name=parameter.name,
                dtype=asked if asked and parameter.merged and not parameter.keeps_dtype else parameter.dtype,
                shape=parameter.shape,
                parameter=parameter.name,
                origin="merged" if parameter.merged else "base",
            )
            for parameter in parameters
        )

    def values(self, base: "Tensor", merged: "Tensor", out: "Tensor", kernels: Kernels) -> int:
        """Write base + merged, rounded once."""
        return kernels.apply(base, merged, out)

    def library(self, inputs: Library) -> Library:
        """Return the inputs' own."""
        return inputs

    def index(
        self, files: Sequence[OutputFile], parameters: Sequence[Parameter], facts: Mapping[str, str], library: Library
    ) -> tuple[str, bytes] | None:
        """Return the map from tensor to file."""
        return None if len(files) == 1 else (library.index, weight_map(files))

    def rewrite(self, name: str, data: bytes, facts: Mapping[str, str]) -> bytes | None:
        """Return the file unchanged, but for the dtype and the tie of embeddings in config.json."""
        unties = bool(facts.get("untied"))
        if name != "config.json" or (self.dtype is None and not unties):
            return data
        config = bounded.loads(data)
        # transformers writes `torch_dtype` up to version 4 and `dtype` since; both read either.
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"] if self.dtype else ():
            config[key] = self.dtype
        if unties and ties_only_the_head(config):
            for part in (config, config.get("text_config")):
                if isinstance(part, dict):
                    part["tie_word_embeddings"] = False
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

    def entry_point_file(self, files: Sequence[OutputFile], library: Library) -> str:
        """Return the index, or the config where there is one weight file."""
        return library.config if len(files) == 1 else library.index
