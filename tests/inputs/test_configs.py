import json
from typing import Any

import pytest

from ties_ray.inputs.configs import notes, rows

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "vocab_size": 48,
}  # fmt: skip
LINEAR = {"type": "linear", "factor": 8.0}


def differs(base: dict[str, Any], model: dict[str, Any]) -> list[str]:
    return notes(json.dumps(base).encode(), [("1", json.dumps(model).encode())], "the base's")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rope_theta": 1e6}, "rope_theta 1000000.0 where the base has 10000.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta 1000000.0"),
        ({"rope_scaling": LINEAR}, "rope_factor 8.0 where the base has 1.0"),
        ({"rope_scaling": LINEAR}, 'rope_type "linear" where the base has "default"'),
        ({"partial_rotary_factor": 0.5}, "rope_partial_rotary_factor 0.5 where the base has 1.0"),
        ({"num_attention_heads": 8}, "num_attention_heads 8 where the base has 4, head_dim 8 where the base has 16"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 where the base has 2"),
        ({"head_dim": 32}, "head_dim 32 where the base has 16"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" where the base has "silu"'),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 where the base has 1e-06"),
        ({"max_position_embeddings": 4096}, "max_position_embeddings 4096 where the base has 2048"),
        ({"sliding_window": 128}, "sliding_window 128 where the base has null"),
        ({"attention_bias": True}, "attention_bias true where the base has false"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 where the base has null"),
        ({"logit_scale": 0.0625}, "logit_scale 0.0625 where the base has 1.0"),
        ({"model_type": "mistral"}, 'model_type "mistral" where the base has "llama"'),
    ],
)
def test_what_changes_the_function_is_noted(change: dict[str, Any], told: str) -> None:
    (note,) = differs(LLAMA, {**LLAMA, **change})
    assert note.startswith("model 1: config.json disagrees with the base's (")
    assert told in note
    assert note.endswith("; the output has the base's")


@pytest.mark.parametrize(
    "key", ["layer_types", "num_experts_per_tok", "tie_word_embeddings", "an_unknown_multiplier", "is_causal", "eps"]
)
def test_a_key_that_both_give_is_compared_whatever_it_means(key: str) -> None:
    (note,) = differs({**LLAMA, key: [1, 2]}, {**LLAMA, key: [1, 3]})
    assert f"{key} [1, 3] where the base has [1, 2]" in note


@pytest.mark.parametrize(
    ("base", "model"),
    [
        ({"torch_dtype": "float32"}, {"dtype": "bfloat16", "transformers_version": "5.0.0"}),
        ({}, {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": False, "sliding_window": None}),
        ({"rope_theta": 10000.0, "rope_scaling": None}, {}),
        ({"rope_theta": 10000}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        (
            {"rope_theta": 5e5, "rope_scaling": LINEAR},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 8}},
        ),
        ({"rope_scaling": {"type": "su", "factor": 4}}, {"rope_scaling": {"rope_type": "longrope", "factor": 4}}),
        (
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
        ),
        ({"rotary_pct": 0.25}, {"rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 1e4}}),
        ({"layer_norm_eps": 1e-5}, {"layer_norm_eps": 9.999999747378752e-06}),
        ({"quantization_config": {"quant_method": "gptq"}, "use_cache": True}, {"use_cache": False}),
        ({"attention_dropout": 0.1, "architectures": ["A"]}, {"attention_dropout": 0.0, "id2label": {"0": "x"}}),
        ({"eos_token_id": 2, "max_length": 20}, {"eos_token_id": [2, 3], "max_length": 30, "do_sample": True}),
        ({"some_new_key_of_a_version": 7}, {}),
    ],
)
def test_spellings_and_training_are_no_difference(base: dict[str, Any], model: dict[str, Any]) -> None:
    assert differs({**LLAMA, **base}, {**LLAMA, **model}) == []
    assert differs({**LLAMA, **model}, {**LLAMA, **base}) == []


def test_heads_that_follow_from_others_may_be_left_out() -> None:
    plain = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert differs(plain, {**plain, "num_key_value_heads": 4, "head_dim": 16}) == []


def test_the_text_part_of_a_multimodal_config_stands_for_the_whole_and_other_parts_are_compared_by_name() -> None:
    nested = {"model_type": "vlm", "text_config": LLAMA, "vision_config": {"patch_size": 14}}
    assert differs(LLAMA, nested) == []
    (note,) = differs(nested, {**nested, "vision_config": {"patch_size": 16}})
    assert "vision_config.patch_size 16 where the base has 14" in note


def test_many_models_with_one_difference_share_a_note() -> None:
    text = json.dumps({**LLAMA, "rope_theta": 1e6}).encode()
    (note,) = notes(json.dumps(LLAMA).encode(), [(str(n), text) for n in range(20)], "that of model 3")
    assert note.startswith("models 0, 1, 2, 3, 4, 5, 6, 7 and 12 more: config.json disagrees")
    assert note.endswith("the output has that of model 3")


def test_a_config_that_is_none_is_no_difference() -> None:
    assert notes(json.dumps(LLAMA).encode(), [("1", b"{"), ("2", b"[]"), ("3", b"[" * 100_000)], "the base's") == []


def test_the_embedding_rows_are_those_of_the_text_part() -> None:
    assert rows(b'{"vocab_size": 5}') == 5
    assert rows(b'{"vocab_size": 5, "text_config": {"vocab_size": 7}}') == 7
    assert rows(b'{"vocab_size": "x"}') is None
    assert rows(b"[") is None
