"""The orientation of matrices by their names."""

import pytest

from ties_ray.inputs.orientation import kind_of
from ties_ray.tensors import Kind


@pytest.mark.parametrize(
    ("name", "kinds", "wanted"),
    [
        ("model.embed_tokens.weight", (), "embedding"),
        ("embed_tokens.3.weight", ("musicgen_decoder",), "embedding"),
        ("transformer.h.0.attn.c_attn.weight", ("GPT2LMHeadModel", "gpt2"), "transposed"),
        ("transformer.h.0.attn.c_attn.weight", ("GPTBigCodeForCausalLM", "gpt_bigcode"), "linear"),
        ("model.layers.0.mlp.gate.weight", ("Qwen3MoeForCausalLM", "qwen3_moe"), "other"),
        ("model.decoder.embed_positions.weight", ("OPTForCausalLM", "opt"), "other"),
        ("lm_head.weight", ("gpt2",), "linear"),
    ],
)
def test_matrices_that_are_no_linear_layers_are_known_by_their_names(
    name: str, kinds: tuple[str, ...], wanted: Kind
) -> None:
    assert kind_of(name, kinds) == wanted
