"""Models that are stored otherwise than their base: the same merge, by the plan's bytes and requests."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.promises.test_same_bytes import assert_as_planned, reads_counted
from tests.tools.families import Family, write_checkpoint
from tests.tools.merging import digests, draw_sizes, merge, read_tensors, same_bits
from ties_ray.layout.sizes import SIZES
from ties_ray.stores import Stores

Tensors = dict[str, torch.Tensor]
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32,
    "tie_word_embeddings": False,
}
TIED = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
EXPERTS, WIDTH, INNER = 4, 24, 20
METHODS: list[dict[str, Any]] = [{"name": "ties", "density": 0.3}, {"name": "average"}]


def apart(seed: int, scale: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    layer = "model.layers.0.block_sparse_moe"
    shapes = {
        **dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (32, WIDTH)),
        f"{layer}.gate.weight": (EXPERTS, WIDTH),
        **{f"{layer}.experts.{expert}.w1.weight": (INNER, WIDTH) for expert in range(EXPERTS)},
        **{f"{layer}.experts.{expert}.w2.weight": (WIDTH, INNER) for expert in range(EXPERTS)},
        **{f"{layer}.experts.{expert}.w3.weight": (INNER, WIDTH) for expert in range(EXPERTS)},
    }  # fmt: skip
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fused(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the same tensors as transformers holds them in memory."""
    layer = "model.layers.0.block_sparse_moe"

    def weight(expert: int, part: str) -> torch.Tensor:
        return tensors[f"{layer}.experts.{expert}.{part}.weight"]

    both = [torch.cat([weight(expert, "w1"), weight(expert, "w3")]) for expert in range(EXPERTS)]
    return {
        **{name: tensor for name, tensor in tensors.items() if ".block_sparse_moe." not in name},
        "model.layers.0.mlp.gate.weight": tensors[f"{layer}.gate.weight"],
        "model.layers.0.mlp.experts.gate_up_proj": torch.stack(both),
        "model.layers.0.mlp.experts.down_proj": torch.stack([weight(expert, "w2") for expert in range(EXPERTS)]),
    }


def family_of(folder: Path, base: Tensors, *models: Tensors, config: Mapping[str, object] = CONFIG) -> Family:
    store = Stores({}).of(str(folder))
    names = ["base", *(f"model-{number}" for number in range(len(models)))]
    for name, tensors in zip(names, (base, *models), strict=True):
        write_checkpoint(store, str(folder / name), tensors, config=config)
    uris = [str(folder / name) for name in names]
    return Family(uris[0], tuple(uris[1:]), base, models)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method["name"]))
@pytest.mark.parametrize("cuts", ["whole", "small"])
def test_experts_apart_and_fused_give_the_same_bytes_as_planned(
    method: dict[str, Any], cuts: str, tmp_path: Path
) -> None:
    sizes = draw_sizes(random.Random(3)) if cuts == "small" else SIZES
    base = apart(0)
    models = [{name: base[name] + 0.1 * other for name, other in apart(seed).items()} for seed in (1, 2, 3)]
    alike = merge(family_of(tmp_path / "alike", base, *models), tmp_path / "out", method, sizes=sizes)
    all_apart = read_tensors(tmp_path / "out")
    assert alike.status == "done"
    for name, kept, others in (
        ("apart", base, [models[0], fused(models[1]), models[2]]),
        ("fused", fused(base), [models[0], fused(models[1]), models[2]]),
    ):
        family = family_of(tmp_path / name, kept, *others)
        with reads_counted() as counted:
            result = merge(family, tmp_path / f"out-{name}", method, sizes=sizes)
        assert_as_planned(result, counted, family)
        got = read_tensors(tmp_path / f"out-{name}")
        expected = all_apart if name == "apart" else fused(all_apart)
        assert got.keys() == expected.keys()
        assert all(same_bits(got[key], expected[key]) for key in expected)
    assert digests(tmp_path / "out-apart") == digests(tmp_path / "out")


def test_a_head_of_its_own_is_merged_into_a_tied_base_and_the_config_says_so(tmp_path: Path) -> None:
    base = {"model.embed_tokens.weight": torch.randn(8, 4), "model.norm.weight": torch.randn(4)}
    models = [{name: tensor + 0.1 for name, tensor in base.items()} for _ in range(2)]
    models[1] = {**models[1], "lm_head.weight": base["model.embed_tokens.weight"] + 0.3}
    family = family_of(tmp_path, base, *models, config=TIED)
    with reads_counted(planning=True) as counted:
        result = merge(family, tmp_path / "out", "average")
    compared = [read for read in counted if "model-1" in read[0] and read[2] == 8 * 4 * 4]
    assert len(compared) == 2, "head and embedding are compared once, while planning; the merge reads them together"
    got = read_tensors(tmp_path / "out")
    torch.testing.assert_close(got["lm_head.weight"], base["model.embed_tokens.weight"] + 0.2)
    torch.testing.assert_close(got["model.embed_tokens.weight"], base["model.embed_tokens.weight"] + 0.1)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("lm_head.weight differs from model.embed_tokens.weight" in note for note in result.notes)


def test_a_tied_model_of_an_untied_base_brings_its_embedding_as_its_head(tmp_path: Path) -> None:
    base = {"model.embed_tokens.weight": torch.randn(8, 4), "lm_head.weight": torch.randn(8, 4)}
    model = {"model.embed_tokens.weight": torch.randn(8, 4)}
    family = family_of(tmp_path, base, model, config=TIED)
    merge(family, tmp_path / "out", "average")
    got = read_tensors(tmp_path / "out")
    torch.testing.assert_close(got["lm_head.weight"], model["model.embed_tokens.weight"])
    torch.testing.assert_close(got["model.embed_tokens.weight"], model["model.embed_tokens.weight"])
