"""Candidates: merged models in memory with the bytes of a merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Qwen3MoeConfig

import ties_ray
from tests.tools.adapters import make_pool
from tests.tools.families import Family
from tests.tools.merging import read_tensors
from ties_ray.errors import InputError, RecipeError
from ties_ray.operations import candidates, merging
from ties_ray.operations.candidates import Candidate
from ties_ray.stores import Stores
from ties_ray.stores.local import Local

MakeFamily = Callable[..., Family]
VALUES: list[dict[str, Any]] = [
    {},
    {"method.lambda": 0.4},
    {"method.density": 0.05},
    {"method.density": 0.05, "method.lambda": 0.7},
    {"method.zero_sum": "majority"},
    {"models": {"not": ["1"], "weights": {"0": 0.3}}},
    {"models": {"weights": {"0": 0.3, "2": 0}, "densities": {"1": 0.9}}},
    {"models": {"weights": {"3": 0.3}}, "method.lambda": {"*mlp*": 0.5}},
    {"models": {"weights": {"1": 2.0}}},
    {"method": {"name": "dare", "density": 0.5}},
    {"method": {"name": "task_arithmetic", "lambda": 0.3}},
    {"method": "iso_c"},
    {"method": "model_stock"},
    {"method.lambda": 0.4},
]


def recipe_of(family: Family, **more: Any) -> dict[str, Any]:
    return {
        "base": family.base,
        "models": list(family.models),
        "method": {"name": "ties", "density": 0.2},
        "run": {"executor": "local"},
        **more,
    }


def demand_merge(candidate: Candidate, folder: Path) -> None:
    """Demand the bytes of a merge of the candidate's recipe."""
    result = candidate.save(str(folder))
    merged, tensors = read_tensors(result.output), candidate.state_dict()
    assert merged.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == merged[name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), merged[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_candidates_have_the_bytes_of_merges_in_any_order(dtype: str, family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=4, hidden=48, dtype=dtype, smooth=dtype == "F32")
    with ties_ray.candidates(recipe_of(family)) as pool:
        for number, values in enumerate(VALUES):
            demand_merge(pool.merge(values), tmp_path / str(number))


def test_candidates_of_adapters_merge_into_their_base_and_into_deltas(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path / "pool"), num_adapters=4, dense=False)
    recipe = {"base": pool.base, "models": list(pool.adapters), "method": {"name": "ties"}}
    with ties_ray.candidates(recipe) as candidates:
        for number, values in enumerate(VALUES[:6]):
            demand_merge(candidates.merge(values), tmp_path / str(number))


def test_a_second_candidate_reads_nothing(family_of: MakeFamily) -> None:
    family = family_of(num_models=4, hidden=48, dtype="F32", smooth=True)
    with ties_ray.candidates(recipe_of(family)) as pool:
        pool.merge().state_dict()
        reads = pool._tools.reads
        before = reads.bytes_read
        for values in ({"method.lambda": 0.5}, {"models": {"not": ["2"]}}, {"method.density": 0.6}):
            pool.merge(values).state_dict()
        assert reads.bytes_read == before > 0


def test_other_numbers_of_the_models_read_no_header_again(
    family_of: MakeFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(num_models=4)
    readings: list[object] = []
    with ties_ray.candidates(recipe_of(family)) as pool:
        pool.merge({"models": {"weights": {"0": 0.5}}})
        monkeypatch.setattr(candidates, "read_inputs", lambda *inputs: readings.append(inputs))
        for values in ({"models": {"weights": {"1": 0.3}}}, {"models": {"densities": {"0": 0.7}}}):
            assert pool.merge(values).recipe.models
        assert not readings


def test_other_models_of_the_pool_list_no_folder_again(family_of: MakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of(num_models=4)
    listed: list[str] = []
    with ties_ray.candidates(recipe_of(family)) as pool:
        monkeypatch.setattr(Local, "list", lambda store, uri: listed.append(uri))
        for values in ({"models": {"not": ["1"]}}, {"models": {"only": ["2", "3"]}}):
            pool.merge(values)
    assert not listed


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
CONFIGS = [LlamaConfig(**SMALL), LlamaConfig(**SMALL, tie_word_embeddings=True), Qwen3MoeConfig(**SMALL, **EXPERTS)]


@pytest.mark.parametrize("config", CONFIGS, ids=["llama", "tied", "experts"])
def test_a_candidate_loads_into_a_model_of_transformers(config: PreTrainedConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    for number in range(2):
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        base.save_pretrained(tmp_path / f"model-{number}")
    recipe = {
        "base": str(tmp_path / "base"),
        "models": [str(tmp_path / "model-0"), str(tmp_path / "model-1")],
        "method": "task_arithmetic",
    }
    with ties_ray.candidates(recipe) as pool:
        candidate = pool.merge({"method.lambda": 0.5})
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        candidate.load_into(model)
        candidate.save(str(tmp_path / "merged"))
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        ids = torch.arange(12)[None]
        assert torch.equal(model(ids).logits, expected(ids).logits)
        named = candidate.state_dict(model)
        assert named.keys() <= model.state_dict().keys()
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in named.items())
        with pytest.raises(InputError, match="Linear and the merge differ in"):
            candidate.load_into(torch.nn.Linear(2, 2))
        with pytest.raises(InputError, match="LlamaForCausalLM and the merge differ in"):
            candidate.load_into(LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1})))


def test_what_cannot_be_is_said(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    with pytest.raises(InputError, match="are allowed; allow more"):
        ties_ray.candidates(recipe_of(family), memory=1000)
    with pytest.raises(RecipeError, match="candidates are merged from their models alone"):
        ties_ray.candidates({**recipe_of(family), "continues": str(tmp_path / "earlier")})
    with ties_ray.candidates(recipe_of(family)) as pool:
        with pytest.raises(RecipeError, match=r"method\.densty"):
            pool.merge({"method.densty": 1})
        with pytest.raises(RecipeError, match="no model has an id"):
            pool.merge({"models": {"only": ["nobody"]}})
    assert merging.plan(ties_ray.candidates(recipe_of(family)).merge().recipe)
