"""A checkpoint with an adapter added: the merge is that of a checkpoint into which it was merged before."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.adapters import Module, Pool, adapter_files, make_pool
from tests.tools.families import file_bytes, write_checkpoint
from tests.tools.merging import digests, draw_sizes
from ties_ray.errors import InputError, Problem, RecipeError
from ties_ray.formats import Account, Contents, Rules
from ties_ray.formats.adapted import Adapted, combined
from ties_ray.formats.checkpoint import Checkpoint
from ties_ray.formats.lora import Lora
from ties_ray.kernels import Factors
from ties_ray.kernels.definition import product
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores
from ties_ray.tensors import Parameter
from ties_ray.testing import folder_of

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


MODEL = {
    "model.a.q_proj.weight": torch.randn(6, 4, dtype=torch.float64),
    "model.b.q_proj.weight": torch.randn(3, 4).bfloat16(),
    "model.norm.weight": torch.randn(4),
    "model.ids": torch.arange(3),
}
BASE = {
    name: Parameter(name, tuple(tensor.shape), "F32" if floats else "I64", floats)
    for name, tensor in MODEL.items()
    for floats in [tensor.is_floating_point()]
}
FACTORS = {
    "model.a.q_proj": (torch.randn(2, 4), torch.randn(6, 2), 4.0),
    "model.b.q_proj": (torch.randn(2, 4), torch.randn(3, 2), 4.0),
}


def both(modules: dict[str, Module]) -> tuple[list[bytes], Contents, Contents]:
    """Return the weight files of a model and of an adapter, and what their formats make of them."""
    model = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": file_bytes(MODEL)}
    adapter = adapter_files(modules)
    folder = folder_of(Checkpoint(), model)
    asked = Checkpoint().questions(folder, BASE, Rules())
    checkpoint = Checkpoint().read(replace(folder, answers=dict.fromkeys(asked, True)), BASE, Rules())
    lora = Lora().read(folder_of(Lora(), adapter), BASE, Rules())
    return [model["model.safetensors"], adapter["adapter_model.safetensors"]], checkpoint, lora


def test_each_slice_is_the_models_and_the_adapters_change_added_once() -> None:
    files, checkpoint, lora = both(FACTORS)
    form, found = Adapted(), combined(checkpoint, lora, "memory://adapter")
    assert found.problems == ()
    assert found.notes[-1] == "memory://adapter: this adapter is added to it"
    assert found.facts["adapter"] == "memory://adapter"
    for name, tensor in MODEL.items():
        source, whole = found.sources.get(name), tensor.flatten()
        if source is None:
            continue
        factors = lora.sources.get(name)
        if factors:
            right, left, alpha = FACTORS[name.removesuffix(".weight")]
            change = product(Factors(left, right, alpha / 2, 0), 0, len(whole))
            whole = change + whole if whole.dtype == torch.float64 else change + whole.float()
        assert form.decoded_bytes(source) == (Lora().decoded_bytes(factors) if factors else 0)
        assert form.widened(source) == (8 if factors else 0)
        for start, stop in ((0, len(whole)), (3, 4), (1, 3), (2, 2)):
            reads = form.reads(source, start, stop)
            assert {each.object for each in reads} <= ({0, 1} if factors else {0})
            buffers = [torch.frombuffer(bytearray(files[each.object]), dtype=torch.uint8) for each in reads]
            pieces = [data[each.start : each.stop] for data, each in zip(buffers, reads, strict=True)]
            assert torch.equal(form.encoded(source, start, stop, pieces).data, whole[start:stop]), (name, start)


def test_the_account_is_of_both_folders() -> None:
    _, checkpoint, lora = both(FACTORS)
    sums = combined(checkpoint, lora, "memory://adapter").account
    assert sums.stored == checkpoint.account.stored + lora.account.stored == (24 + 12 + 4 + 3) + (20 + 14)
    assert sums.merged == checkpoint.account.merged + lora.account.merged
    assert (sums.equal, sums.tied) == (3, 0)
    assert sums.adds_up
    tied = Account(5, 1, 1, 3)
    twice = combined(replace(checkpoint, account=tied), replace(lora, account=tied), "").account
    assert twice == Account(10, 2, 2, 6)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"model.c.q_proj": FACTORS["model.a.q_proj"]}, "model.c.q_proj"),
        ({"model.a.q_proj": FACTORS["model.b.q_proj"]}, "model.a.q_proj"),
    ],
)
def test_an_adapter_of_another_model_is_refused_once(modules: dict[str, Module], message: str) -> None:
    _, checkpoint, lora = both(modules)
    problems = combined(checkpoint, lora, "memory://adapter").problems
    assert lora.problems == problems, "no word of the sum beside the adapter's own"
    assert message in problems[0].what


def test_a_model_that_is_refused_is_not_refused_again_for_its_adapter() -> None:
    _, _, lora = both(FACTORS)
    refused = Contents(problems=(Problem("memory://model", "is torn", "fetch it again"),))
    assert combined(refused, lora, "memory://adapter").problems == refused.problems


def test_an_adapter_that_fits_the_base_and_not_its_model_is_refused() -> None:
    _, checkpoint, lora = both(FACTORS)
    name, shorter = "model.b.q_proj.weight", checkpoint.sources["model.norm.weight"]
    others = {each: source for each, source in checkpoint.sources.items() if each != name}
    for sources in (others, {**others, name: shorter}):
        (problem,) = combined(replace(checkpoint, sources=sources), lora, "memory://adapter").problems
        assert "changes tensors that its model lacks, or that have other rows there: model.b.q_proj" in problem.what


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
