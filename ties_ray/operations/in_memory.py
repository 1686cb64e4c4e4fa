"""Adapters that are merged in memory: state dicts in, a state dict out, by the same road as files."""

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from ties_ray import safetensors
from ties_ray.errors import InputError, MergeError, Problem
from ties_ray.operations import merging
from ties_ray.outputs import DTYPES
from ties_ray.outputs.adapter import CONFIG, PEFT
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import MergeResult
from ties_ray.stores import Stores, WritableStore, join

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 2**40
"""Bytes of a file in memory, which no store of a process exceeds."""


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter in PEFT's layout, in memory."""

    state_dict: dict[str, "Tensor"]
    """Factors by name, as `peft.get_peft_model_state_dict` gives them."""
    config: dict[str, Any]
    """What adapter_config.json holds; `peft.LoraConfig(**config)` takes it."""
    result: MergeResult
    """The record of the merge, with the truncation error of each rank."""


def merge_adapters(
    adapters: Mapping[str, tuple[Mapping[str, "Tensor"], Any]],
    method: Mapping[str, object] | str,
    weights: Mapping[str, float],
    output: Mapping[str, object],
) -> MergedAdapter:
    """See `ties_ray.merge_adapters`."""
    if unknown := sorted(weights.keys() - adapters.keys()):
        raise InputError(Problem("weights", f"no adapter is called {unknown[0]!r}", "check the names of the adapters"))
    with _folder() as (store, folder):
        entries = []
        for number, (name, (state_dict, config)) in enumerate(adapters.items()):
            uri = f"{folder}/{number}"
            store.put(join(uri, f"{PEFT.stem}.safetensors"), _file(name, state_dict))
            store.put(join(uri, CONFIG), _config(config))
            entries.append({"path": uri, "id": name, "weight": weights.get(name, 1.0), "glob": False})
        recipe = {
            "models": entries,
            "method": method,
            "output": {"kind": "adapter", **output, "path": f"{folder}/merged"},
            "run": {"executor": "local"},
        }
        try:
            result = merging.merge(validate(recipe))
        except MergeError as error:
            problems = (Problem(*(_by_name(text, folder, adapters) for text in each)) for each in error.problems)
            raise type(error)(problems) from None
        _, weights_file = store.get(join(result.output, f"{PEFT.stem}.safetensors"), LARGEST)
        _, config_file = store.get(join(result.output, CONFIG), LARGEST)
        return MergedAdapter(_state_dict(weights_file), json.loads(config_file), result)


def _by_name(text: str, folder: str, names: Iterable[str]) -> str:
    """Return a message that names adapters instead of their folders."""
    for number, name in reversed(list(enumerate(names))):
        text = text.replace(f"{folder}/{number}", f"adapter {name}")
    return text


@contextmanager
def _folder() -> Iterator[tuple[WritableStore, str]]:
    """Yield a folder in the memory of this process, which is emptied at the end."""
    folder = f"memory://{secrets.token_hex(8)}"
    store = Stores({}).writer(folder)
    try:
        yield store, folder
    finally:
        left = [folder]
        while left:
            listing = store.list(left.pop())
            left += listing.folders
            for pin in listing.files:
                store.delete(pin.uri)


def _file(name: str, state_dict: Mapping[str, "Tensor"]) -> bytes:
    """Return a safetensors file. Raises `InputError` for tensors of other dtypes."""
    import torch

    names = {getattr(torch, dtype): short for dtype, short in DTYPES.items()}
    if wrong := [key for key, tensor in state_dict.items() if tensor.dtype not in names]:
        message = f"{wrong[0]} is of {state_dict[wrong[0]].dtype}, and adapters are of {', '.join(DTYPES)}"
        raise InputError(Problem(f"adapter {name}", message, "save it in one of these"))
    ordered = sorted(state_dict, key=lambda key: safetensors.canonical_order(names[state_dict[key].dtype], key))
    specs = [(key, names[state_dict[key].dtype], tuple(state_dict[key].shape)) for key in ordered]
    flat = (state_dict[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8) for key in ordered)
    return b"".join([safetensors.build(specs, {"format": "pt"}), *(part.numpy().tobytes() for part in flat)])


def _config(config: Any) -> bytes:
    """Return adapter_config.json of a mapping, or of PEFT's own config, whose sets and enums become lists and texts."""
    fields = config if isinstance(config, Mapping) else config.to_dict()

    def plain(value: object) -> object:
        return sorted(value) if isinstance(value, set) else value.value if isinstance(value, Enum) else str(value)

    return json.dumps(dict(fields), default=plain).encode()


def _state_dict(data: bytes) -> dict[str, "Tensor"]:
    import torch

    dtypes = {short: getattr(torch, dtype) for dtype, short in DTYPES.items()}
    header = safetensors.parse(data, len(data), "the merged adapter")
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return {
        name: whole[info.start : info.stop].view(dtypes[info.dtype]).reshape(info.shape).clone()
        for name, info in header.tensors.items()
    }
