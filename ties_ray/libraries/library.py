"""The library that opens a folder of weights, and the file names that it looks for."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

CONFIG = "config.json"
MODEL_INDEX = "model_index.json"
"""The file at the root of a diffusers pipeline."""
CONFIGS = (CONFIG, "open_clip_config.json", "params.json")
"""Files that describe a model's architecture; a library opens no weights without its own."""


@dataclass(frozen=True)
class Library:
    """A library's way to store a model."""

    name: str = "transformers"
    """The hub's `library_name` of it."""
    stem: str = "model"
    """Its weights are in `<stem>.safetensors`, or in shards `<stem>-00001-of-00002.safetensors` under an index."""
    config: str = CONFIG
    """The config without which it opens nothing."""
    opened_by: str = 'from transformers import AutoModel; model = AutoModel.from_pretrained("{output}")'
    """A line of Python that opens a folder, or a command. `{output}` stands for the folder."""
    shards: bool = True
    """Whether it opens shards; if not, there is one file of any size."""

    def file_name(self, number: int, count: int) -> str:
        """Return the name of weight file `number` (from 1) of `count`."""
        return f"{self.stem}.safetensors" if count == 1 else f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"

    @property
    def index(self) -> str:
        """Return the name of the index of several weight files."""
        return f"{self.stem}.safetensors.index.json"


TRANSFORMERS = Library()
LOAD_FILE = 'from safetensors.torch import load_file; tensors = load_file("{{output}}/{name}")'
"""The line that opens a file of tensors; `{name}` stands for its name."""
TENSORS = Library("safetensors", opened_by=LOAD_FILE.format(name="model.safetensors"))
"""Weights without a config that would describe their architecture."""


def library_of(names: Collection[str], weights: Sequence[str], config: Mapping[str, object]) -> Library:
    """Return the library that opens a folder.

    names: its files. weights: the files of the model's weights. config: the content of config.json.
    """
    stem = weights[0].partition(".")[0].partition("-0")[0] if weights else "model"
    kind = config.get("_class_name")
    if isinstance(kind, str) and kind.isidentifier() and "_diffusers_version" in config:
        line = f'from diffusers import {kind}; model = {kind}.from_pretrained("{{output}}")'
        return Library("diffusers", "diffusion_pytorch_model", CONFIG, line)
    if stem in ("open_clip_model", "open_clip_pytorch_model"):
        line = 'import open_clip; model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{output}")'
        return Library("open_clip", "open_clip_model", "open_clip_config.json", line, shards=False)
    if stem == "consolidated":
        single = len(weights) == 1  # which Mistral's own library wants
        line = (
            'from mistral_inference.transformer import Transformer; model = Transformer.from_folder("{output}")'
            if single
            else 'vllm serve "{output}" --load-format mistral'
        )
        return Library("mistral-common", "consolidated", "params.json", line, shards=not single)
    if CONFIG not in names:
        return TENSORS
    if "pretrained_cfg" in config or ("architecture" in config and "num_classes" in config):
        line = 'import timm; model = timm.create_model("local-dir:{output}", pretrained=True)'
        return Library("timm", "model", CONFIG, line, shards=False)
    if "modules.json" in names:
        line = 'from sentence_transformers import SentenceTransformer; model = SentenceTransformer("{output}")'
        return Library("sentence-transformers", opened_by=line)
    return TRANSFORMERS
