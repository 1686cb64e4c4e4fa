"""What PEFT writes, for every tuner and every option of LoRA: merged as PEFT merges it, or refused with its reason."""

import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ties_ray
from ties_ray.errors import InputError, RecipeError
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own
    import peft
    import transformers
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.lora import config as options

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.arange(10)[None]
TARGETS = ["q_proj", "v_proj"]


def llama(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def trained(config: Any, base: Any, folder: Path) -> Any:
    """Return a PEFT model whose trainable numbers have moved; it is saved in the folder."""
    adapted = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = "tests/llama"
    adapted.save_pretrained(folder)
    return adapted


def merged(base: Path, model: Path, out: Path, **more: Any) -> Any:
    """Return the model that transformers loads from the merge of one adapter, or of one whole model."""
    data = {"base": str(base), "models": [str(model)], "method": "average", "output": str(out)}
    merging.merge(validate({**data, "run": {"executor": "local", "workers": 1}, **more}))
    return transformers.LlamaForCausalLM.from_pretrained(out)


def codes_of(base: Path, model: Path, out: Path, **more: Any) -> set[str]:
    """Return the reasons for which an adapter is refused; none where it is merged."""
    try:
        merged(base, model, out, **more)
    except InputError as error:
        return {problem.code for problem in error.problems}
    return set()


SAVED = {"allow": {"saved_modules": "merge"}}
TIED: dict[str, dict[str, Any]] = {
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "saved embedding, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "factors of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "factors of the head": {"target_modules": ["q_proj", "lm_head"]},
    "factors of both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "factors of both, kept tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("how", TIED)
def test_a_merged_model_of_a_tied_base_has_the_logits_of_pefts_adapter(how: str, tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **TIED[how]})
    wanted = logits(trained(config, llama(tied=True), tmp_path / "adapter"))
    found = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **SAVED)
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-4)
    assert (logits(llama(tied=True)) - wanted).abs().max() > 1e-2


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "r": ({"r": 3}, ""),
    "target_modules": ({"target_modules": "all-linear"}, ""),
    "exclude_modules": ({"target_modules": "all-linear", "exclude_modules": ["up_proj"]}, ""),
    "lora_alpha": ({"lora_alpha": 5}, ""),
    "lora_dropout": ({"lora_dropout": 0.1}, ""),
    "fan_in_fan_out": ({"fan_in_fan_out": False}, ""),
    "bias": ({"bias": "all"}, ""),
    "use_rslora": ({"use_rslora": True}, ""),
    "modules_to_save": ({"modules_to_save": ["lm_head", "norm"]}, ""),
    "layers_to_transform": ({"layers_to_transform": [1]}, ""),
    "layers_pattern": ({"layers_to_transform": [0], "layers_pattern": "layers"}, ""),
    "rank_pattern": ({"rank_pattern": {"layers.0.*q_proj": 7}}, ""),
    "alpha_pattern": ({"alpha_pattern": {"v_proj": 3}}, ""),
    "megatron_config": ({}, ""),  # needs Megatron: refused by its key, in the tests of the format
    "megatron_core": ({}, ""),
    "trainable_token_indices": ({"trainable_token_indices": [1, 5]}, "trainable_tokens"),
    "loftq_config": ({}, ""),
    "eva_config": ({"init_lora_weights": "eva"}, ""),
    "corda_config": ({}, ""),
    "lora_ga_config": ({"init_lora_weights": "lora_ga", "lora_ga_config": options.LoraGAConfig()}, "residual_base"),
    "use_dora": ({"use_dora": True}, ""),
    "velora_config": ({"velora_config": {"num_groups": 4}}, ""),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [1]}, "conditional"),
    "use_qalora": ({}, ""),  # needs a quantised base
    "qalora_group_size": ({}, ""),
    "monteclora_config": ({"monteclora_config": options.MontecloraConfig()}, ""),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "runtime_config": ({}, ""),
    "lora_bias": ({}, ""),  # needs a base with biases: in the tests of the format
    "target_parameters": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, ""),
    "use_bdlora": (
        {"use_bdlora": options.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)},
        "variant",
    ),
    "arrow_config": ({}, ""),  # needs trained adapters: refused by its key, in the tests of the format
    "kasa_config": ({"kasa_config": options.KasaConfig()}, "mutated_base"),
    "ensure_weight_tying": ({"ensure_weight_tying": True}, ""),
    "init_lora_weights": ({"init_lora_weights": "gaussian"}, ""),
    "init mica": ({"init_lora_weights": "mica"}, ""),
    "init orthogonal": ({"init_lora_weights": "orthogonal"}, ""),
    "init false": ({"init_lora_weights": False}, ""),
    "init pissa": ({"init_lora_weights": "pissa"}, "mutated_base"),
    "init pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, "mutated_base"),
    "init olora": ({"init_lora_weights": "olora"}, "mutated_base"),
}
"""For each option of LoRA what is set, and why it is refused; empty where it is merged."""
OF_ALL_TUNERS = {field.name for field in dataclasses.fields(peft.PeftConfig)}
WHOLE = {"mutated_base", "variant", "trainable_tokens", "target_parameters", "peft_type"}
"""Reasons whose remedy is the whole model that PEFT makes of the adapter."""


def test_every_option_of_lora_has_a_case() -> None:
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} - OF_ALL_TUNERS <= OPTIONS.keys()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_lora_is_merged_as_peft_does_or_refused_by_name(option: str, tmp_path: Path) -> None:
    settings, reason = OPTIONS[option]
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    )
    adapted = trained(config, llama(), tmp_path / "adapter")
    codes = codes_of(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **SAVED)
    assert reason in codes if reason else not codes
    if not reason:
        found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(logits(found), logits(adapted), rtol=1e-4, atol=1e-4)
    elif reason in WHOLE:
        check_the_whole_model_does(adapted, tmp_path)


def check_the_whole_model_does(adapted: Any, folder: Path) -> None:
    """Follow the remedy: PEFT loads the adapter on its base and merges it; the whole model is merged in its place."""
    loaded = peft.PeftModel.from_pretrained(llama(), folder / "adapter")
    loaded.merge_and_unload().save_pretrained(folder / "whole")
    found = merged(folder / "base", folder / "whole", folder / "instead")
    torch.testing.assert_close(logits(found), logits(adapted), rtol=1e-4, atol=1e-4)


def with_targets(kind: str) -> Any:
    """Return the config of a tuner with its defaults, and the targets where it knows any."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    names = {field.name for field in dataclasses.fields(cls)}
    more: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in names:
        more["target_modules"] = TARGETS
    if "num_virtual_tokens" in names:
        more["num_virtual_tokens"] = 4
    return cls(**{**more, **SPECIAL.get(kind, {})})


SPECIAL: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": "self_attn"},
    "IA3": {"feedforward_modules": []},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "TRAINABLE_TOKENS": {"token_indices": [1, 5], "target_modules": ["embed_tokens"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "FOURIERFT": {"n_frequency": 10},
    "OFT": {"oft_block_size": 8, "r": 0},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "VBLORA": {"vector_length": 8, "num_vectors": 8, "topk": 2},
    "UNILORA": {"theta_d_length": 16},
    "ROAD": {"group_size": 8},
    "XLORA": {"hidden_size": 32, "adapters": {}},
}
NEEDS_BIASES = {"BEFT"}
"""Tuners that PEFT merges into bases with biases only."""


@pytest.mark.parametrize("kind", sorted(str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_every_other_tuner_is_refused_by_name_and_its_remedy_works(kind: str, tmp_path: Path) -> None:
    if kind == "LORA":
        return
    llama().save_pretrained(tmp_path / "base")
    adapted = None
    try:
        adapted = trained(with_targets(kind), llama(), tmp_path / "adapter")
    except Exception:  # its config wants what this test does not know: the type alone must do
        (tmp_path / "adapter").mkdir(exist_ok=True)
        save_file({"base_model.model.x.weight": torch.zeros(2)}, tmp_path / "adapter" / "adapter_model.safetensors")
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    (reason,) = codes_of(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert reason in ("prompt", "peft_type")
    if adapted is not None and kind not in NEEDS_BIASES and reason == "peft_type":
        check_the_whole_model_does(adapted, tmp_path)


def plain(adapter: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return config, load_file(adapter / "adapter_model.safetensors")


WRITTEN = Path(__file__).with_name("peft")
"""Adapters of one small model as PEFT 0.6.2, 0.10.0, 0.13.2 and 0.18.0 wrote them, and what each version merged."""


@pytest.mark.parametrize("version", ["0.6.2", "0.10.0", "0.13.2", "0.18.0"])
def test_adapters_that_earlier_versions_of_peft_wrote_are_merged_as_they_merged_them(
    version: str, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    shutil.copy(WRITTEN / "base.safetensors", tmp_path / "base" / "model.safetensors")
    data = {"base": str(tmp_path / "base"), "models": [str(WRITTEN / version)], "method": "average", **SAVED}
    merging.merge(validate({**data, "output": str(tmp_path / "out"), "run": {"executor": "local"}}))
    base, merged_there = load_file(WRITTEN / "base.safetensors"), load_file(WRITTEN / "merged.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(found, merged_there, rtol=1e-6, atol=1e-6)
    assert sum(not torch.equal(base[name], tensor) for name, tensor in merged_there.items()) == 4


COMBINATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "svd": ({"name": "task_arithmetic"}, {}),
    "cat": ({"name": "task_arithmetic"}, {}),
    "ties_svd": ({"name": "ties", "profile": "peft", "density": 0.4}, {"density": 0.4}),
    "magnitude_prune_svd": ({"name": "breadcrumbs", "gamma": 0, "density": 0.4}, {"density": 0.4}),
}


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("vote", ["total", "frequency"])
def test_adapters_in_memory_merge_to_what_add_weighted_adapter_gives(combination: str, vote: str) -> None:
    method, more = COMBINATIONS[combination]
    if vote == "frequency":
        if combination != "ties_svd":
            pytest.skip("only an election has a vote")
        method, more = {**method, "vote": "count"}, {**more, "majority_sign_method": vote}
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=8, lora_alpha=4, target_modules=TARGETS), "math")
    model.add_adapter("code", peft.LoraConfig(r=4, use_rslora=True, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    weights, rank = {"math": 0.7, "code": 1.5}, 12
    adapters = {
        name: (peft.get_peft_model_state_dict(model, adapter_name=name), model.peft_config[name]) for name in weights
    }
    made = ties_ray.merge_adapters(adapters, method=method, weights=weights, output={"rank": rank})
    svd = {} if combination == "cat" else {"svd_rank": rank}
    model.add_weighted_adapter([*weights], [*weights.values()], "theirs", combination, **svd, **more)
    model.add_adapter("ours", peft.LoraConfig(**made.config))
    peft.set_peft_model_state_dict(model, made.state_dict, adapter_name="ours")
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "theirs" in module.lora_A:
            ours, theirs = module.get_delta_weight("ours"), module.get_delta_weight("theirs")
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5, name


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_tables_that_were_saved_whole_come_out_as_factors_that_peft_loads(modules: list[str], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules, task_type="CAUSAL_LM")
    wanted = logits(trained(config, llama(), tmp_path / "adapter"))
    data = {"base": str(tmp_path / "base"), "models": [str(tmp_path / "adapter")], "method": "average", **SAVED}
    output = {"path": str(tmp_path / "out"), "kind": "adapter", "rank": 32}
    merging.merge(validate({**data, "output": output, "run": {"executor": "local"}}))
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-4)


SMALL: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
WHOLE_MODELS: dict[str, Any] = {
    "llama": lambda: llama(),
    "tied llama": lambda: llama(tied=True),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **SMALL)),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SMALL)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, **SMALL
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=2, **SMALL,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE_MODELS)
def test_the_change_of_a_whole_model_comes_out_as_an_adapter_that_peft_loads(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = WHOLE_MODELS[kind]().eval()
    base.save_pretrained(tmp_path / "base")
    tuned = type(base).from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.dim() > 1 and not name.endswith(("embed_positions.weight", "gate.weight")):
                parameter += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "tuned")
    recipe = {"base": str(tmp_path / "base"), "models": [str(tmp_path / "tuned")], "method": "average"}
    output = {"path": str(tmp_path / "out"), "kind": "adapter", "rank": 64}
    recipe |= {"output": output, "run": {"executor": "local"}, "exclude": []}
    with pytest.raises(RecipeError, match="an adapter holds matrices of linear layers and embeddings") as refused:
        merging.merge(validate(recipe))
    (problem,) = refused.value.problems
    recipe["exclude"] = json.loads(re.search(r"exclude: (\[.*?\"\])", problem.remedy)[1])  # type: ignore[index]
    assert ("gate" in problem.remedy) == (kind == "mixtral")
    merging.merge(validate(recipe))
    adapted = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "out")
    torch.testing.assert_close(logits(adapted), logits(tuned), rtol=1e-4, atol=1e-4)
    assert (logits(base) - logits(tuned)).abs().max() > 1e-2


def classifiers(folder: Path, *, same: bool) -> list[Any]:
    """Return two adapters of one classifier, whose heads are the same or not; they and their base are saved."""
    made = []
    llama().save_pretrained(folder / "base")
    for seed in (1, 2):
        torch.manual_seed(0)
        model = transformers.LlamaForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, task_type="SEQ_CLS"))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name or (parameter.requires_grad and not same):
                    parameter += 0.1 * torch.randn_like(parameter)
        adapted.peft_config["default"].base_model_name_or_path = "tests/llama"
        adapted.save_pretrained(folder / f"adapter-{seed}")
        made.append(adapted)
    return made


@pytest.mark.parametrize("base", [True, False])
def test_a_head_that_all_adapters_share_comes_along_in_the_merged_one(base: bool, tmp_path: Path) -> None:
    adapters = classifiers(tmp_path, same=True)
    data: dict[str, Any] = {"models": [str(tmp_path / f"adapter-{seed}") for seed in (1, 2)], "method": "average"}
    data |= {"base": str(tmp_path / "base")} if base else {}
    output = {"path": str(tmp_path / "out"), "kind": "adapter", "rank": 8}
    merging.merge(validate({**data, "output": output, "run": {"executor": "local"}}))
    models = [adapter.merge_and_unload().state_dict() for adapter in adapters]
    wanted = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    plain = logits(wanted)
    wanted.load_state_dict({name: (models[0][name] + models[1][name]) / 2 for name in models[0]})
    empty = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    loaded = peft.PeftModel.from_pretrained(empty, tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(wanted), rtol=1e-4, atol=1e-4)
    assert (plain - logits(wanted)).abs().max() > 1e-2


def test_adapters_with_heads_of_their_own_are_not_merged_into_one_that_has_none(tmp_path: Path) -> None:
    classifiers(tmp_path, same=False)
    data = {"base": str(tmp_path / "base"), "models": [str(tmp_path / f"adapter-{seed}") for seed in (1, 2)]}
    output = {"path": str(tmp_path / "out"), "kind": "adapter", "rank": 8}
    with pytest.raises(InputError, match=r"has another head than .*adapter-1.*score\.weight"):
        merging.merge(validate({**data, "method": "average", "output": output, "run": {"executor": "local"}}))


def experts(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_experts_per_tok": 2, **SMALL}
    if kind == "gpt_oss":
        config = transformers.GptOssConfig(intermediate_size=24, num_local_experts=3, head_dim=8, **sizes)
        return transformers.GptOssForCausalLM(config)
    config = transformers.Qwen3MoeConfig(moe_intermediate_size=24, num_experts=3, head_dim=8, **sizes)
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("targets", ["experts", "all-linear"])
@pytest.mark.parametrize("output", ["checkpoint", "adapter"])
def test_factors_of_experts_are_merged_as_peft_merges_them(targets: str, output: str, tmp_path: Path) -> None:
    experts("qwen3_moe").save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM")
    if targets == "experts":
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(r=2, use_rslora=True, target_modules=["q_proj"], target_parameters=names)
    cls = transformers.Qwen3MoeForCausalLM
    wanted = logits(trained(config, cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter"))
    data = {"base": str(tmp_path / "base"), "models": [str(tmp_path / "adapter")], "method": "average"}
    written = {"path": str(tmp_path / "out"), "kind": output, **({"rank": 8} if output == "adapter" else {})}
    merging.merge(validate({**data, "output": written, "run": {"executor": "local"}}))
    if output == "adapter":
        loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "out")
    else:
        loaded = cls.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-4)
    assert (logits(cls.from_pretrained(tmp_path / "base")) - wanted).abs().max() > 1e-2


def test_factors_of_experts_that_the_base_stores_together_are_refused_and_the_remedy_works(tmp_path: Path) -> None:
    experts("gpt_oss").save_pretrained(tmp_path / "base")
    cls = transformers.GptOssForCausalLM
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    wanted = logits(trained(config, cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter"))
    assert codes_of(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == {"target_parameters"}
    whole = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    whole.merge_and_unload().save_pretrained(tmp_path / "whole")
    data = {"base": str(tmp_path / "base"), "models": [str(tmp_path / "whole")], "method": "average"}
    merging.merge(validate({**data, "output": str(tmp_path / "out"), "run": {"executor": "local"}}))
    torch.testing.assert_close(logits(cls.from_pretrained(tmp_path / "out")), wanted, rtol=1e-4, atol=1e-4)
