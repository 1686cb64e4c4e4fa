"""Merges of families from storage to storage by our methods, beside what the oracles say."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tests.tools.adapters import make_pool
from tests.tools.families import Family
from tests.tools.merging import LOCAL, merge, read_tensors
from tests.tools.oracles.adapters import Adapter
from tests.tools.oracles.protocol import Merged, Tensors
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores


def check(
    family: Family,
    folder: Path,
    method: Mapping[str, object],
    oracle: Callable[[Tensors, Sequence[Tensors]], Merged],
    *,
    weights: Sequence[float] | None = None,
) -> None:
    """Merge a family, and compare each floating-point tensor with what the oracle makes of the stored values."""
    merge(family, folder / "out", method, weights=weights)
    written = read_tensors(folder / "out")
    base, *models = (_float64(tensors) for tensors in (family.base_tensors, *family.model_tensors))
    deltas = [{name: _in_fp32(value - base[name]) for name, value in model.items()} for model in models]
    zeros = {name: np.zeros_like(value) for name, value in base.items()}
    visible = 0
    for name, delta in oracle(zeros, deltas).delta.items():
        step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(written[name].dtype, 2**-20)
        ours = written[name].double().numpy()
        np.testing.assert_allclose(ours, base[name] + delta, rtol=2 * step, atol=1e-6, err_msg=name)
        visible += int((np.abs(delta) > 10 * (2 * step * np.abs(base[name] + delta) + 1e-6)).sum())
    assert visible, "the change is smaller than the tolerance, so any merge would pass"


def check_adapters(
    folder: Path,
    method: Mapping[str, object],
    oracle: Callable[[Sequence[Adapter]], Merged],
    *,
    share: Callable[[float], float] = lambda scale: scale,
    within: float = 2e-6,
    **pool: Any,
) -> None:
    """Merge a pool of adapters into a delta, and compare it with what the oracle makes of their factors.

    share: what B gets of each scale; A gets the rest. pool: what `make_pool` takes.
    """
    made = make_pool(Stores({}).of("/"), str(folder), **pool)
    output = {"path": str(folder / "out"), "kind": "delta"}
    merging.merge(
        validate({"base": made.base, "models": list(made.adapters), "method": method, "output": output, "run": LOCAL})
    )
    with safe_open(folder / "out/delta.safetensors", framework="np") as file:
        written = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
    wanted = oracle([pairs_of(uri, share) for uri in made.adapters]).delta
    assert written.keys() == wanted.keys()
    size = max(float(np.abs(value).max()) for value in wanted.values())
    for name, value in wanted.items():
        np.testing.assert_allclose(written[name], value, rtol=0, atol=within * size, err_msg=name)


def pairs_of(folder: str, share: Callable[[float], float]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (B, A) of an adapter of `make_pool` by parameter, in float64."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    pairs = {}
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            if ".lora_B." in name:
                left = file.get_tensor(name).astype(np.float64)
                right = file.get_tensor(name.replace("lora_B", "lora_A")).astype(np.float64)
                path = name.removeprefix("base_model.model.").replace(".lora_B", "")
                pairs[path] = (left * share(scale), right * (scale / share(scale)))
    return pairs


def _float64(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the floating-point tensors that have elements."""
    merged = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    return {name: tensor.double().numpy() for name, tensor in merged.items()}


def _in_fp32(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32).astype(np.float64)
