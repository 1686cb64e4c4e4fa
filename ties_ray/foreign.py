"""Adapters of other tools, told by how they spell their keys, and refused with a clear word before any format reads."""

from collections.abc import Callable
from typing import NamedTuple

from ties_ray.candidates import STEMS, candidates
from ties_ray.errors import Problem, printable
from ties_ray.formats import Folder
from ties_ray.formats.lora import CONFIG, WEIGHTS


class _Tool(NamedTuple):
    code: str
    what: str
    remedy: str
    owns: Callable[[str, str], bool]
    """Whether (file name, key) is its spelling."""


_TOOLS = (
    _Tool(
        "mlx",
        "is an adapter of MLX, whose factors are stored transposed",
        "convert it to PEFT's layout, or fuse it with its base first (mlx_lm.fuse) and give the whole model",
        lambda file, key: key.endswith((".lora_a", ".lora_b")),
    ),
    _Tool(
        "kohya",
        "is an adapter of kohya's scripts, for image models",
        "convert it to PEFT's layout, or merge it into its base first",
        lambda file, key: key.startswith(("lora_unet_", "lora_te")) or ".lora_down." in key or ".lora_up." in key,
    ),
    _Tool(
        "diffusers",
        "is an adapter of diffusers, for image models",
        "save it with PEFT (save_pretrained of the adapted model), or merge it into its base first",
        lambda file, key: (
            file == "pytorch_lora_weights.safetensors" or (".lora_" in key and key.startswith(("unet.", "text_enc")))
        ),
    ),
)


def problem(folder: Folder) -> Problem | None:
    """Return why a folder can't be read as it is, with a code, else None.

    It is another tool's adapter (mlx, kohya, diffusers), or has names that mislead (candidates, file_name).

    From names alone, never from shapes: a square factor of MLX has the same shape as one of PEFT. `config_missing`:
    factors as PEFT names them, in a folder that is not an adapter's.
    """
    keys = [(file, key) for file, header in folder.headers.items() for key in header.tensors]
    for code, what, remedy, owns in _TOOLS:
        own = [key for file, key in keys if owns(file, key)]
        if 2 * len(own) > len(keys):  # a whole model may have a few modules of such names
            return Problem(folder.uri, f"{what} ({printable(own[0])})", remedy, code)
    names = {pin.uri.rpartition("/")[2] for pin in folder.files}
    whole = [one for one in candidates(names) if one.stem in STEMS]
    if WEIGHTS in names and whole:
        what = f"holds an adapter ({WEIGHTS}) and a whole model ({whole[0].name})"
        remedy = f"choose: `file: {WEIGHTS}` or `file: {whole[0].name}` beside its `path`"
        return Problem(folder.uri, what, remedy, "candidates")
    if keys and all(".lora_" in key for _, key in keys) and CONFIG in names and WEIGHTS not in names:
        return Problem(
            folder.uri, f"holds an adapter's factors in {keys[0][0]}", f"rename it to {WEIGHTS}", "file_name"
        )
    if keys and all(".lora_" in key for _, key in keys) and not names & {CONFIG, WEIGHTS}:
        what = f"holds nothing but factors of an adapter ({printable(keys[0][1])}), and no {CONFIG}"
        return Problem(folder.uri, what, f"save it with PEFT: {CONFIG} beside {WEIGHTS}", "config_missing")
    return None
