"""A checkpoint with an adapter added: the merge is that of a checkpoint into which it was merged before."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.adapters import Pool, make_pool
from tests.tools.families import write_checkpoint
from tests.tools.merging import digests, draw_sizes
from ties_ray.errors import InputError, RecipeError
from ties_ray.kernels import Factors
from ties_ray.kernels.definition import product
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores

STORE = Stores({}).of("/")
CONFIG = {"model_type": "llama", "vocab_size": 48}


def tuned(pool: Pool, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Write a fine-tune of the pool's base; return its tensors."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: (value + 0.01 * torch.randn(value.shape, generator=generator)).to(dtype)
        for name, value in pool.base_tensors.items()
    }
    write_checkpoint(STORE, str(folder), tensors, config=CONFIG, shards=2)
    return tensors


def with_adapter(tensors: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """Return a model in fp32, to which the first adapter of a pool is added by the canonical product."""
    import json

    from safetensors.torch import load_file

    factors, config = (
        load_file(adapter / "adapter_model.safetensors"),
        json.loads((adapter / "adapter_config.json").read_text()),
    )
    scale, added = config["lora_alpha"] / config["r"], dict(tensors)
    for key, left in factors.items():
        if ".lora_B." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_B", "")
            right = factors[key.replace(".lora_B.", ".lora_A.")]
            whole = Factors(left.float(), right.float(), scale, 0)
            added[name] = tensors[name].float() + product(whole, 0, tensors[name].numel()).view(tensors[name].shape)
    return added


def merged(base: str, models: list[Any], out: Path, method: Any, **more: Any) -> dict[str, str]:
    data = {"base": base, "models": models, "method": method, "output": str(out), "run": {"executor": "local"}}
    merging.merge(validate(data), **more)
    return digests(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [{"name": "ties", "density": 0.3, "trim": "tensor"}, "tsv"], ids=str)
def test_the_bytes_are_those_of_a_model_that_holds_the_adapter(dtype: torch.dtype, method: Any, tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path / "pool"))
    tensors = tuned(pool, tmp_path / "tuned", dtype)
    added = with_adapter(tensors, Path(pool.adapters[0]))
    write_checkpoint(STORE, str(tmp_path / "added"), added, config=CONFIG)
    others = [pool.adapters[1], {"path": str(tmp_path / "tuned"), "weight": 0.5}]
    expected = merged(pool.base, [str(tmp_path / "added"), *others], tmp_path / "expected", method)
    entry = {"path": str(tmp_path / "tuned"), "adapter": pool.adapters[0]}
    for seed in range(2):
        sizes = {"sizes": draw_sizes(random.Random(seed))} if seed else {}
        assert merged(pool.base, [entry, *others], tmp_path / f"out-{seed}", method, **sizes) == expected


@pytest.mark.parametrize(
    ("variants", "entry", "message"),
    [
        (("dora",), {}, "is DoRA, which scales the rows of its model: .*; merge it into its model first"),
        (("plain",), {"path": "{pool}/adapter-0001"}, "swap them, or drop the model"),
        (("plain",), {"adapter": "{pool}/base"}, "swap them, or drop the model"),
        (("plain",), {"adapter": "{pool}/nothing"}, "nothing"),
    ],
)
def test_what_can_not_be_added_is_refused(
    variants: tuple[str, ...], entry: dict[str, str], message: str, tmp_path: Path
) -> None:
    pool = make_pool(STORE, str(tmp_path), variants=variants)
    tuned(pool, tmp_path / "tuned", torch.float32)
    asked = {"path": str(tmp_path / "tuned"), "adapter": pool.adapters[0]}
    asked |= {key: value.replace("{pool}", str(tmp_path)) for key, value in entry.items()}
    with pytest.raises(InputError, match=message):
        merged(pool.base, [asked], tmp_path / "out", "average")


def test_two_adapters_of_one_model_are_two_models_and_a_glob_has_none(tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path))
    entries = [{"path": pool.base, "adapter": adapter, "id": Path(adapter).name} for adapter in pool.adapters[:2]]
    ours = merged(pool.base, entries, tmp_path / "out", {"name": "task_arithmetic"})
    assert ours.keys() == merged(pool.base, list(pool.adapters[:2]), tmp_path / "plain", "task_arithmetic").keys()
    with pytest.raises(RecipeError, match="`id`, `adapter`, `sha256` and `version_id` name one model"):
        validate({"base": "b", "models": [{"path": "m-*", "adapter": "a"}], "method": "average", "output": "o"})
