import math
import re
from collections.abc import Mapping

import pytest

from ties_ray.libraries.conversions import kinds_of
from ties_ray.libraries.naming import Match, Shape, matched
from ties_ray.libraries.ties import Tie, ties_of

Shapes = Mapping[str, Shape]
MIXTRAL = kinds_of({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"})
LLAMA = {"model.embed_tokens.weight": (8, 2), "model.layers.0.up.weight": (4, 2), "lm_head.weight": (8, 2)}
BERT = {"bert.embeddings.LayerNorm.weight": (2,), "bert.embeddings.LayerNorm.bias": (2,), "cls.bias": (8,)}
EXPERTS = {
    f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight": (2, 5) if part == "w2" else (5, 2)
    for expert in range(11)
    for part in ("w1", "w2", "w3")
} | {"model.layers.0.block_sparse_moe.gate.weight": (11, 2)}
FUSED: Shapes = {
    "model.layers.0.mlp.experts.gate_up_proj": (11, 10, 2),
    "model.layers.0.mlp.experts.down_proj": (11, 2, 5),
    "model.layers.0.mlp.gate.weight": (11, 2),
}


def renamed(shapes: Shapes, pattern: str, text: str) -> dict[str, Shape]:
    return {re.sub(pattern, text, name): shape for name, shape in shapes.items()}


def one_to_one(match: Match) -> dict[str, str]:
    assert match.problems == ()
    assert all(len(pieces) == 1 and pieces[0].start == 0 for pieces in match.pieces.values())
    return {name: pieces[0].name for name, pieces in match.pieces.items()}


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("^", "_orig_mod."),
        ("^", "module."),
        ("^", "module._orig_mod."),
        ("^", "base_model.model."),
        ("^", "anything."),
        (r"layers\.0\.", "layers.0._orig_mod."),
        (r"layers\.0\.", "layers.0._checkpoint_wrapped_module."),
        (r"^model\.", ""),
        (r"^model\.", "model.language_model."),
        (r"^model\.", "language_model.model."),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_prefixes_of_wrappers_and_containers_are_seen_through(pattern: str, text: str, swapped: bool) -> None:
    other = renamed(LLAMA, pattern, text)
    assert other != LLAMA
    pairs = dict(zip(LLAMA, other, strict=True))
    if swapped:
        assert one_to_one(matched(LLAMA, other)) == {value: key for key, value in pairs.items()}
    else:
        assert one_to_one(matched(other, LLAMA)) == pairs


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (r"LayerNorm\.weight", "LayerNorm.gamma"),
        (r"LayerNorm\.bias", "LayerNorm.beta"),
    ],
)
def test_renamed_parts_are_matched(new: str, old: str) -> None:
    other = renamed(BERT, new, old)
    assert one_to_one(matched(other, BERT)) == dict(zip(BERT, other, strict=True))
    assert one_to_one(matched(BERT, other)) == dict(zip(other, BERT, strict=True))


def test_a_weight_norm_is_matched_under_both_spellings() -> None:
    old = {"conv.weight_g": (1, 1, 4), "conv.weight_v": (3, 2, 4), "conv.bias": (3,)}
    new = {
        "conv.parametrizations.weight.original0": (1, 1, 4), "conv.parametrizations.weight.original1": (3, 2, 4),
        "conv.bias": (3,),
    }  # fmt: skip
    assert one_to_one(matched(old, new)) == dict(zip(new, old, strict=True))


def test_prefix_and_renamed_parts_together() -> None:
    other = renamed(renamed(BERT, r"LayerNorm\.weight", "LayerNorm.gamma"), r"^bert\.", "")
    assert one_to_one(matched(other, BERT)) == dict(zip(BERT, other, strict=True))


def test_what_only_one_side_has_is_left() -> None:
    base = {"h.0.attn.weight": (2, 2), "h.0.attn.bias": (1, 1), "wte.weight": (8, 2)}
    mine = {"transformer.h.0.attn.weight": (2, 2), "transformer.wte.weight": (8, 2), "lm_head.weight": (8, 2)}
    match = matched(mine, base)
    assert one_to_one(match) == {
        "h.0.attn.weight": "transformer.h.0.attn.weight", "wte.weight": "transformer.wte.weight"
    }  # fmt: skip
    assert match.left == {"lm_head.weight": "lm_head.weight"}
    assert matched({"module.extra": (1,), "module.a": (2,)}, {"a": (2,)}).left == {"module.extra": "extra"}


def test_a_prefix_that_could_be_either_is_a_problem() -> None:
    base = {"block.0.weight": (2, 2), "block.1.weight": (2, 2)}
    mine = {f"{stack}.{name}": shape for stack in ("encoder", "decoder") for name, shape in base.items()}
    match = matched(mine, base)
    assert not match.pieces
    assert len(match.left) == 4
    assert "'encoder.' and 'decoder.' would fit" in match.problems[0]


def test_two_names_of_one_parameter_are_a_problem() -> None:
    match = matched({"module.a": (2,), "a": (2,), "module.b": (2,)}, {"a": (2,), "b": (2,)})
    assert not match.pieces
    assert "module.a and a" in match.problems[0] or "a and module.a" in match.problems[0]


def test_a_head_is_never_taken_for_a_body() -> None:
    base = {"bert.dense.weight": (2, 2), "bert.other.weight": (3, 3), "bert.norm.weight": (2,)}
    mine = {"classifier.dense.weight": (2, 2), "pooled.x": (3, 3), "more.y": (2,)}
    assert not matched(mine, base).pieces
    assert not matched({"classifier.weight": (2, 2)}, {"weight": (3, 4), "b": (1,)}).pieces


def test_fused_experts_are_cut_and_experts_apart_are_put_together() -> None:
    match = matched(FUSED, EXPERTS, MIXTRAL)
    assert match.left == {}
    assert match.pieces.keys() == EXPERTS.keys()
    start = 10 * (10 * 2) + 5 * 2
    assert match.pieces["model.layers.0.block_sparse_moe.experts.10.w3.weight"] == (
        ("model.layers.0.mlp.experts.gate_up_proj", start, (5, 2)),
    )
    match = matched(EXPERTS, FUSED, MIXTRAL)
    assert match.pieces.keys() == FUSED.keys()
    names = [piece.name.partition("experts.")[2] for piece in match.pieces["model.layers.0.mlp.experts.gate_up_proj"]]
    assert names == [f"{expert}.{part}.weight" for expert in range(11) for part in ("w1", "w3")]
    for name, pieces in match.pieces.items():
        assert sum(math.prod(piece.shape) for piece in pieces) == math.prod(FUSED[name])


def test_experts_that_do_not_fit_the_fused_shape_are_a_problem() -> None:
    transposed = {name: (*shape[:-2], shape[-1], shape[-2]) for name, shape in FUSED.items()}
    match = matched(transposed, EXPERTS, MIXTRAL)
    assert any("fused, but it has the shape [11, 2, 10] where [11, 10, 2]" in one for one in match.problems)
    lacking = {name: shape for name, shape in EXPERTS.items() if "experts.3.w1" not in name}
    assert any("fused, but it has the shape" in one for one in matched(FUSED, lacking, MIXTRAL).problems)


def test_fused_projections_are_cut() -> None:
    kinds = kinds_of({"architectures": ["NomicBertModel"], "model_type": "nomic_bert"})
    apart = {f"layers.0.self_attn.{part}_proj.weight": (4, 4) for part in "qkv"}
    match = matched({"encoder.layers.0.attn.Wqkv.weight": (12, 4)}, apart, kinds)
    assert [piece.start for pieces in match.pieces.values() for piece in pieces] == [0, 16, 32]


@pytest.mark.parametrize(
    ("alias", "kept"),
    [
        ("lm_head.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "wte.weight"),
        ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
        ("proj_out.weight", "model.decoder.embed_tokens.weight"),
        ("decoder.weight", "model.embeddings.tok_embeddings.weight"),
        ("lm_loss.weight", "transformer.word_embedding.weight"),
        ("lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("bbox_embed.3.layers.0.weight", "bbox_embed.0.layers.0.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
    ],
)
def test_tied_names_of_many_architectures_are_known(alias: str, kept: str) -> None:
    assert ties_of(["other.weight", alias, kept]) == [Tie(alias, kept)]


def test_all_aliases_of_one_tensor_name_the_same() -> None:
    names = ["lm_head.weight", "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    assert ties_of(names) == [Tie(name, "shared.weight") for name in names if name != "shared.weight"]


def test_kinds_are_the_class_and_all_model_types() -> None:
    config = {"architectures": ["A"], "model_type": "a", "text_config": {"model_type": "b"}, "x": {"y": 1}}
    assert kinds_of(config) == ("A", "a", "b")
    assert kinds_of({"architectures": "A", "model_type": 3}) == ()


def test_names_that_shift_by_one_are_renamed_only_where_the_first_is_stored() -> None:
    kinds = ("Kimi_K25ForConditionalGeneration", "kimi_k25")
    block = "vision_tower.encoder.blocks.0."
    old = {f"{block}norm{n}.weight": (4,) for n in (0, 1)} | {f"{block}mlp.fc{n}.bias": (4,) for n in (0, 1)}
    new = {f"{block}norm{n}.weight": (4,) for n in (1, 2)} | {f"{block}mlp.fc{n}.bias": (4,) for n in (1, 2)}
    assert one_to_one(matched(old, new, kinds)) == dict(zip(new, old, strict=True))
    assert one_to_one(matched(new, old, kinds)) == dict(zip(old, new, strict=True))


def test_projections_whose_rows_move_are_never_taken_for_their_converted_form() -> None:
    kinds = ("MistralLarge4ForConditionalGeneration", "mistral_large4", "mistral_large4_text")
    old = {"vision_encoder.layers.0.attention.wq.weight": (4, 4), "output.weight": (8, 4)}
    new = {"model.vision_tower.layers.0.attention.q_proj.weight": (4, 4), "lm_head.weight": (8, 4)}
    for mine, base in ((old, new), (new, old)):
        assert len(matched(mine, base, kinds).pieces) == 1


def test_a_known_class_ties_only_what_it_ties() -> None:
    stacks = ["model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight"]
    assert ties_of(stacks, ("T5GemmaForConditionalGeneration", "t5gemma")) == []
    assert ties_of(stacks) == []
    assert ties_of(stacks, ("FSMTModel", "fsmt")) == [Tie(stacks[1], stacks[0])]
    head = "lm_head.out_proj.weight"
    assert ties_of([*stacks, head], ("T5GemmaForConditionalGeneration", "t5gemma")) == [Tie(head, stacks[0])]


def test_models_of_one_layout_are_matched_once() -> None:
    base: dict[str, Shape] = {"layers.0.q.weight": (4, 4), "layers.1.q.weight": (4, 4)}
    model: dict[str, Shape] = {f"model.{name}": shape for name, shape in base.items()}
    assert matched(dict(model), base) is matched(model, dict(base))
