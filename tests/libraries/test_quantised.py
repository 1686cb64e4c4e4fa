import pytest

from ties_ray.libraries.quantised import announced, packed, refusals

F16, F32, I32, U8, I8 = (("F16", (8,)), ("F32", (8,)), ("I32", (8, 8)), ("U8", (8, 8)), ("I8", (8, 8)))
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def module(**tensors: tuple[str, tuple[int, ...]]) -> Tensors:
    """Return the tensors of one module, and a norm beside it; `__` stands for a point."""
    own = {f"layers.0.q_proj.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    return {"layers.0.norm.weight": F16, **own}


@pytest.mark.parametrize(
    ("method", "tensors"),
    [
        ("GPTQ", module(qweight=I32, qzeros=I32, scales=F16, g_idx=("I32", (64,)))),
        ("AWQ", module(qweight=I32, qzeros=I32, scales=F16)),
        ("FP-Quant", module(qweight=U8, scales=U8, forward_hadamard_matrix=F16)),
        ("Marlin", module(B=I32, s=F16)),
        ("bitsandbytes (4 bit)", module(weight=U8, weight__absmax=F32, weight__quant_map=F32)),
        ("bitsandbytes (4 bit)", module(weight=U8, weight__quant_state__bitsandbytes__nf4=U8)),
        ("bitsandbytes (8 bit)", module(weight=I8, SCB=F32, weight_format=("U8", ()))),
        ("HQQ or SINQ", module(W_q=U8, scale=F16, zero=F16)),
        ("AQLM", module(codes=("I16", (8, 8, 1)), codebooks=F16, scales=F16)),
        ("SpQR", module(dense_weights=("I64", (8, 8)), row_offsets=I32, col_vals=I32)),
        ("VPTQ", module(indices=I32, centroids__weight=F16)),
        ("Quanto", module(weight___data=I8, weight___scale=F16)),
        ("compressed-tensors", module(weight_packed=I32, weight_scale=F16, weight_shape=("I64", (2,)))),
        ("compressed-tensors (sparse)", module(compressed=F16, bitmask=U8, row_offsets=("I64", (8, 1)))),
        ("torchao", module(_weight_qdata=I8, _weight_scale=F32)),
        ("EXL2", module(q_weight=I32, q_scale=I32, q_invperm=("I16", (8,)))),
        ("EXL3", module(trellis=("I16", (8, 8)), suh=F16, svh=F16)),
        ("QuIP#", module(Qidxs=("I64", (8, 8)), SU=F16, SV=F16)),
        ("HIGGS", module(weight=("I16", (8, 8)), tables=F16, scales=F16)),
        ("NVFP4", module(weight=U8, weight_scale=("F8_E4M3", (8,)), weight_scale_2=("F32", ()))),
        ("MLX", module(weight=("U32", (8, 8)), scales=F16, biases=F16)),
        ("EETQ", module(weight=I8, weight_scales=F16)),
        ("BitNet", module(weight=U8, weight_scale=F32)),
        ("INT8 with scales", module(weight=I8, weight_scale=F32)),
        ("FP8 with scales", module(weight=("F8_E4M3", (8, 8)), weight_scale_inv=F32)),
        ("FP8 with scales", module(weight=("F8_E5M2", (8, 8)), weight_scale=F32, input_scale=F32)),
        ("", module(levels=U8, zero_points=F16)),
        ("", module(packed_weight=I32)),
        ("", module(weight=I8)),
        ("", module(weight=("F8_E4M3", (8, 8)), weight_zero_point=F16)),
    ],
)
def test_quantised_weights_are_known_by_what_a_module_stores(method: str, tensors: Tensors) -> None:
    found = packed(tensors)
    assert list(found) == [method]
    assert "layers.0.norm.weight" not in found[method]
    assert any(tensors[name][0] not in ("F16", "F32") for name in found[method])


def test_experts_that_are_parameters_of_their_own_are_known_too() -> None:
    experts = {f"mlp.experts.{name}": U8 for name in ("gate_up_proj_blocks", "gate_up_proj_scales")}
    assert packed({**experts, "mlp.experts.gate_up_proj_bias": F16}) == {"MXFP4": list(experts)}


@pytest.mark.parametrize(
    "tensors",
    [
        module(weight=F16, bias=F16, running_mean=F32, running_var=F32, num_batches_tracked=("I64", ())),
        module(bias=("U8", (1, 1, 8, 8)), masked_bias=("F32", ())),
        module(logit_scale=F32, relative_position_index=("I64", (4, 4)), relative_position_bias_table=F32),
        module(weight=F16, weight_scale=F32),
        module(word_embeddings__weight=F16, position_ids=("I64", (1, 512))),
        module(queue=F32, queue_ptr=("I64", (1,))),
        module(mask=("BOOL", (8, 8)), scale=F32),
    ],
)
def test_buffers_and_plain_weights_are_not_quantised(tensors: Tensors) -> None:
    assert packed(tensors) == {}


def test_what_the_recipe_excludes_whole_is_not_refused() -> None:
    tensors = module(qweight=I32, qzeros=I32, scales=F16)
    everything = {name for name in tensors if "q_proj" in name}
    assert list(refusals(tensors, everything)) == []
    ((what, names, known),) = refusals(tensors, everything - {"layers.0.q_proj.scales"})
    assert (what, names, known) == ("holds weights quantised by AWQ, 1 tensors", ["layers.0.q_proj.scales"], True)


def test_what_announces_quantised_weights_is_named() -> None:
    assert announced({"quantization_config": {"quant_method": "awq"}}, []) == (
        "config.json has a quantization_config (awq)"
    )
    assert announced({"quantization": {"bits": 4}}, ["quantize_config.json"]) == "config.json has a quantization"
    assert announced({}, ["quantize_config.json"]) == "quantize_config.json lies beside the weights"
    assert announced({"quantization_config": None}, ["config.json"]) == ""
