"""Adapters of other tools, recognised by the spelling of their keys and refused before any format reads them."""

import re
from collections.abc import Collection
from typing import NamedTuple

from ties_ray.errors import Problem, printable
from ties_ray.formats import Folder
from ties_ray.formats.lora import CONFIG, WEIGHTS
from ties_ray.libraries.weight_files import STEMS, candidates

_FUSE = "merge it into its base with the tool that made it, and give the whole model"
_DIFFUSERS = (
    "put it on its pipeline with diffusers (load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained), and"
    " give the folder of the component that it changes"
)


class _Tool(NamedTuple):
    code: str
    what: str
    remedy: str
    keys: re.Pattern[str]
    """A part of its keys that no other tool and no PEFT adapter writes."""
    files: Collection[str] = ()
    """Names of files that only this tool writes."""


_TOOLS = (
    _Tool(
        "mlx",
        "is an adapter of MLX, whose factors are stored transposed",
        "fuse it with its base (`mlx_lm.fuse --model BASE --adapter-path FOLDER --save-path WHOLE`), and give WHOLE",
        re.compile(r"\.lora_[ab]\Z"),
    ),
    _Tool(
        "torchtune",
        "is an adapter of torchtune under its own names",
        "let torchtune save it for PEFT (its checkpointer writes adapter_model.safetensors beside)",
        re.compile(r"\.lora_[ab]\.weight\Z"),
    ),
    _Tool(
        "xlora",
        "is an X-LoRA, which mixes adapters by a router and has no one change",
        "give the adapters that it mixes",
        re.compile(r"(?:\A|\.)(?:internal_)?xlora_|\Alora_[AB]\.\d|\.lora_[AB]\.adapter_\d+\."),
    ),
    _Tool(
        "lycoris",
        "is an adapter of LyCORIS (LoHa, LoKr and the like), whose change is no product of two factors",
        _FUSE,
        re.compile(
            r"\Alycoris_|\.(?:hada_[wt]\d|lokr_[wt]\d|oft_blocks|oft_diag|dora_scale|glora_|a[12]\.weight\Z|on_input\Z)"
        ),
    ),
    _Tool(
        "kohya",
        "is an adapter of kohya's scripts, for image models",
        _DIFFUSERS,
        re.compile(r"\Alora_(?:unet|te\d?|transformer|prior|dit|llm)_|\.lora_(?:down|up|mid)\."),
    ),
    _Tool(
        "adapterhub",
        "is an adapter of AdapterHub's library",
        "merge it into its base with that library (merge_adapter), and give the whole model",
        re.compile(r"\.loras\.|\.adapters\.[^.]+\.adapter_(?:down|up)"),
    ),
    _Tool(
        "loralib",
        "holds factors without `.weight`, as loralib and LitGPT name them",
        "merge it into its base with the tool that made it, and give the whole model",
        re.compile(r"\.lora_[AB]\Z"),
    ),
    _Tool(
        "comfyui",
        "is an adapter in the layout of ComfyUI or of a model's own code, for image models",
        _DIFFUSERS,
        re.compile(
            r"\A(?:model\.)?diffusion_model\..*\.(?:lora_|lora\.|diff\Z|diff_b\Z|set_weight)"
            r"|\A(?:text_encoders|clip_[lg])\..*lora|\A(?:single|double)_blocks\..*\.lora"
        ),
    ),
    _Tool(
        "diffusers",
        "is an adapter of diffusers, for image models",
        _DIFFUSERS,
        re.compile(
            r"\A(?:unet|transformer(?:_2)?\.(?:single_)?(?:transformer_)?blocks|text_encoder(?:_[23])?|prior|controlnet|denoiser)\..*(?:\.lora_|\.lora\.|_lora\.)"
            r"|\.lora_linear_layer\.|\.processor\..*_lora\."
        ),
        ("pytorch_lora_weights.safetensors",),
    ),
    _Tool(
        "nemo",
        "is an adapter of NeMo or Megatron under their own names",
        "export it for PEFT with the tool that made it",
        re.compile(r"\.adapter_layer\.|\.lora_\w+_adapter\.|\.adapter\.linear_(?:in|out)\."),
    ),
)


def problem(folder: Folder) -> Problem | None:
    """Return why a folder can't be read as it is, with a code, or None.

    It is another tool's adapter (mlx, kohya, diffusers, ...), or its names mislead (candidates, file_name,
    config_missing). Names decide, and never shapes: a square factor of MLX has the same shape as one of PEFT.
    """
    keys = [(file, key) for file, header in folder.headers.items() for key in header.tensors]
    names = {pin.uri.rpartition("/")[2] for pin in folder.files}
    whole = "config.json" in names and not names & {CONFIG, WEIGHTS}
    for tool in _TOOLS:
        own = [key for file, key in keys if file in tool.files or _owns(tool, key)]
        if 2 * len(own) > len(keys) or (own and not whole):  # a whole model may have a few modules of such names
            return Problem(folder.uri, f"{tool.what} ({printable(own[0])})", tool.remedy, tool.code)
    models = [each for each in candidates(names) if each.stem in STEMS]
    if WEIGHTS in names and models:
        message = f"holds an adapter ({WEIGHTS}) and a whole model ({models[0].name})"
        remedy = f"choose: `file: {WEIGHTS}` or `file: {models[0].name}` beside its `path`"
        return Problem(folder.uri, message, remedy, "candidates")
    factors_alone = bool(keys) and all(".lora_" in key for _, key in keys)
    if factors_alone and CONFIG in names and WEIGHTS not in names:
        message = f"holds an adapter's factors in {keys[0][0]}"
        return Problem(folder.uri, message, f"rename it to {WEIGHTS}", "file_name")
    if factors_alone and not names & {CONFIG, WEIGHTS}:
        message = f"holds nothing but factors of an adapter ({printable(keys[0][1])}), and no {CONFIG}"
        return Problem(folder.uri, message, f"save it with PEFT: {CONFIG} beside {WEIGHTS}", "config_missing")
    return None


def _owns(tool: _Tool, key: str) -> bool:
    return not key.startswith("base_model.") and tool.keys.search(key) is not None
