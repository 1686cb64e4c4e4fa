"""A Hugging Face checkpoint: base plus merged delta, with everything that `from_pretrained` needs."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from ties_ray.kernels import Kernels
from ties_ray.libraries import bounded
from ties_ray.libraries.chat_templates import TEMPLATES
from ties_ray.libraries.library import Library
from ties_ray.libraries.ties import ties_only_the_head
from ties_ray.outputs import CHAT_TEMPLATE, DTYPES, ElementwiseOutput, OutputFile, OutputTensor, weight_map
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor


TOKENIZER = "tokenizer_config.json"
AUTO = "auto"
"""Stands for the chat template that most inputs have."""


class Checkpoint(ElementwiseOutput):
    """All parameters of the base, merged or copied."""

    kind: Literal["checkpoint"] = "checkpoint"
    chat_template: str | None = None
    """`auto`, the name of a template, or a template in Jinja. None: the one of `files_from`.

    `auto`: the template that most inputs have, of equally many the first input's. Names: `alpaca`, `chatml`, `exaone`,
    `llama3`, `mistral`.
    """

    @field_validator("chat_template")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None and value not in (AUTO, *TEMPLATES) and "{" not in value:
            raise ValueError(f"give `auto`, one of {', '.join(TEMPLATES)}, or a template in Jinja")
        return value

    @property
    def required_files(self) -> tuple[str, ...]:
        """Return the tokenizer's config where it gets a chat template."""
        return (TOKENIZER,) if self.chat_template else ()

    @property
    def most_frequent_template(self) -> bool:
        """Return whether the recipe asks for the template that most inputs have."""
        return self.chat_template == AUTO

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
        """Return the file unchanged, but for dtype and ties in config.json, and the chat template."""
        template = facts.get(CHAT_TEMPLATE) if self.chat_template == AUTO else self.chat_template
        if template and (name == TOKENIZER or name.startswith("chat_template.")):
            return _with_template(name, data, TEMPLATES.get(template, template))
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


def _with_template(name: str, data: bytes, template: str) -> bytes:
    """Return a file of the tokenizer with a chat template."""
    if name.endswith(".jinja"):
        return template.encode()
    content = {**bounded.loads(data), "chat_template": template}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
