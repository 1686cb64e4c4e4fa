"""Methods of elements and of coefficients, by hand."""

import numpy as np
import pytest

from tests.tools.oracles import families
from tests.tools.oracles.coefficients import metagpt, nan
from tests.tools.oracles.consensus import consensus
from tests.tools.oracles.electing import ties
from tests.tools.oracles.elements import magmax, negmerge, ram
from tests.tools.oracles.emr import emr
from tests.tools.oracles.layers import depths, layer_of, layer_swapping, lines
from tests.tools.oracles.pcb import pcb
from tests.tools.oracles.protocol import Array, Tensors, flat


def one(*values: float) -> Tensors:
    return {"w": np.array(values)}


MODELS = [one(1.0, -2.0, 3.0, 0.0), one(2.0, 1.0, -3.0, 0.0), one(4.0, 0.5, 1.0, 0.0)]


def test_emr_by_hand() -> None:
    found = emr(None, MODELS)
    np.testing.assert_array_equal(found.delta["w"], [4, -2, 3, 0])
    masks = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0]]
    np.testing.assert_array_equal(found.products["masks"]["w"], np.array(masks, dtype=bool))
    np.testing.assert_allclose(found.products["rescalers"], [6 / 9, 6 / 4, 5.5 / 7])
    np.testing.assert_allclose(found.products["reconstructed"][1]["w"], [6, 0, 0, 0])


def test_emr_rescales_by_means_of_tensors_not_by_sums_over_elements() -> None:
    models = [{"a": np.array([1.0]), "b": np.full(99, 2.0)}, {"a": np.array([3.0]), "b": np.full(99, 2.0)}]
    np.testing.assert_allclose(emr(None, models).products["rescalers"], [3 / 5, 1])


def test_emr_counts_a_zero_sum_as_negative_and_bears_an_empty_mask() -> None:
    found = emr(None, [one(1.0), one(-1.0)])
    assert found.delta["w"] == [-1]
    np.testing.assert_array_equal(found.products["rescalers"], [0, 1])


@pytest.mark.parametrize("count", [1, 2, 40])
def test_emr_elects_a_value_of_a_model_and_none_larger(count: int) -> None:
    family = families.checkpoints(1, count)
    found = emr(family.base, family.models)
    for name, value in found.delta.items():
        stack = np.stack([delta[name] for delta in family.deltas])
        assert (np.abs(value) <= np.abs(stack).max(0)).all()
        assert ((stack == value).any(0) | (value == 0)).all()
    for own, delta in zip(found.products["reconstructed"], family.deltas, strict=True):
        assert all((own[name] * delta[name] >= 0).all() for name in own)


def test_consensus_by_hand() -> None:
    # T = (7, -.5, 1, 0)
    found = consensus(None, MODELS, bound=0.4)
    masks = [[0, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0]]
    np.testing.assert_array_equal(found.products["masks"]["w"], np.array(masks, dtype=bool))
    np.testing.assert_array_equal(found.delta["w"], [0, -0.5, 1, 0])
    np.testing.assert_array_equal(found.products["reconstructed"][2]["w"], [7, -0.5, 1, 0])
    np.testing.assert_array_equal(consensus(None, MODELS, agree=0).delta["w"], [7, -0.5, 1, 0])


def test_consensus_takes_a_bound_for_each_model_and_another_total() -> None:
    found = consensus(None, MODELS, bound=[0.0, 9.0, 0.0], total=one(2.0, 2.0, 2.0, 2.0), agree=2)
    masks = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    np.testing.assert_array_equal(found.products["masks"]["w"], np.array(masks, dtype=bool))


@pytest.mark.parametrize(("count", "claimed"), [(2, True), (3, True), (4, False), (40, False)])
def test_tall_masks_of_identical_models_are_empty_from_a_number_on(count: int, claimed: bool) -> None:
    """|tau| > bound (N - 1) |tau| needs N < 1 + 1/bound: 3.5 models at .4."""
    found = consensus(None, [one(1.0, -2.0)] * count, bound=0.4)
    assert bool(found.products["masks"]["w"].all()) == claimed
    assert bool(found.products["masks"]["w"].any()) == claimed


def test_consensus_of_the_total_of_ties() -> None:
    family = families.checkpoints(3, 4)
    total = ties(family.base, family.models, merge="sum").delta
    found = consensus(family.base, family.models, total=total, agree=1)
    for name, value in found.delta.items():
        assert ((value == total[name]) | (value == 0)).all()


def direct(stack: Array, ratio: float) -> Array:
    """PCB as its code has it, in plain exponentials."""
    count, size = stack.shape
    above, below = 0.0, 0.0
    for tau in stack:
        ordered = np.sort(np.abs(tau))
        low, high = ordered[int(size * 1e-4)], ordered[int(size * (1 - 1e-4) - 1)]
        clipped = np.clip(np.abs(tau), low, high)
        score = np.exp(count * ((clipped - low) / (high - low)) ** 2) * np.tanh(tau * stack.sum(0))
        least = np.sort(score)[int(size * (1 - ratio))]
        share = (np.clip(score, least, score.max()) - least) / (score.max() - least)
        above, below = above + share * np.sign(tau) * clipped, below + share
    return above / np.maximum(below, 1e-12)


@pytest.mark.parametrize("count", [1, 2, 8, 300])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.6])
def test_pcb_in_logarithms_is_pcb_in_exponentials(count: int, ratio: float) -> None:
    family = families.smooth(5, count)
    stack = np.stack([flat(delta) for delta in family.deltas])
    found = flat(pcb(family.base, family.models, ratio=ratio).delta)
    np.testing.assert_allclose(found, direct(stack, ratio), rtol=1e-9, atol=1e-12)


def test_pcb_stands_more_models_than_an_exponential_does() -> None:
    models = [{"w": np.random.default_rng(seed).standard_normal(60)} for seed in range(900)]
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(direct(np.stack([model["w"] for model in models]), 0.1)).all()
    found = pcb(None, models)
    assert np.isfinite(found.delta["w"]).all()
    assert found.delta["w"].any()
    assert (found.products["shares"] >= 0).all()
    assert (found.products["shares"] <= 1).all()
    assert (found.products["shares"].max(1) == 1).all()


def test_pcb_of_one_element() -> None:
    assert pcb(None, [one(2.0), one(4.0)]).delta["w"] == [3]
    assert pcb(None, [one(2.0), one(-4.0)]).delta["w"] == [-4]


def test_magmax_takes_the_largest_and_the_later_of_equals() -> None:
    np.testing.assert_array_equal(magmax(None, MODELS).delta["w"], [4, -2, -3, 0])


def test_negmerge_by_hand() -> None:
    models = [one(1.0, 1.0, -1.0, 0.0), one(3.0, -1.0, -5.0, 1.0)]
    np.testing.assert_array_equal(negmerge(None, models, lambda_=2.0).delta["w"], [-4, 0, 6, 0])


def test_ram_by_hand() -> None:
    models = [one(1.0, 0.0, 1e-6, 2.0), one(3.0, 5.0, 2.0, 4.0), one(0.0, 0.0, 0.0, 6.0)]
    np.testing.assert_array_equal(ram(None, models).delta["w"], [2, 5, 2, 4])
    # The second model shares two elements and has two of its own: 1 + .1 min(1, .2)
    plus = ram(None, models, plus=True)
    np.testing.assert_allclose(plus.delta["w"], [2, 5 * 1.02, 2 * 1.02, 4])
    np.testing.assert_allclose(plus.products["factors"]["w"], [1.02, 1.02, 1.02])


def test_ram_plus_counts_by_tensor_or_in_the_whole_model() -> None:
    models = [{"a": np.array([1.0, 1.0]), "b": np.ones(20)}, {"a": np.array([1.0, 0.0]), "b": np.zeros(20)}]
    tensor = ram(None, models, plus=True, alpha=9.0).products["factors"]
    whole = ram(None, models, plus=True, alpha=9.0, scope="model").products["factors"]
    np.testing.assert_allclose([tensor["a"][0], tensor["b"][0]], [1 + 0.1 * 1, 1])
    np.testing.assert_allclose([whole["a"][0], whole["b"][0]], [1 + 0.1 / 21] * 2)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3)),
        ("model.layers.3.block_sparse_moe.experts.5.w1.weight", ("model.layers", 3)),
        ("transformer.h.11.attn.c_attn.weight", ("transformer.h", 11)),
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", ("encoder.block", 2)),
        ("decoder.block.7.layer.0.SelfAttention.q.weight", ("decoder.block", 7)),
        ("vision_model.encoder.layers.4.mlp.fc1.weight", ("vision_model.encoder.layers", 4)),
        ("visual.transformer.resblocks.9.ln_1.bias", ("visual.transformer.resblocks", 9)),
        ("bert.encoder.layer.10.output.dense.weight", ("bert.encoder.layer", 10)),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("experts.4.down_proj.weight", None),
        ("model.layers_norm.2.weight", None),
    ],
)  # fmt: skip
def test_the_layer_of_a_parameter(name: str, place: tuple[str, int] | None) -> None:
    assert layer_of(name) == place


def test_each_stack_is_as_deep_as_itself() -> None:
    names = ["encoder.block.0.w", "encoder.block.4.w", "decoder.block.1.w", "decoder.block.2.w", "shared.w"]
    assert list(depths(names).values()) == [0.0, 1.0, 0.5, 1.0, None]
    assert depths(["model.layers.0.w"]) == {"model.layers.0.w": 1.0}


def test_lines_by_hand() -> None:
    models = [{f"h.{layer}.w": np.array([2.0]) for layer in range(3)} | {"head": np.array([2.0])}] * 2
    found = lines(None, models, beta=0.5)
    assert found.products["alpha"] == pytest.approx(0.5)
    assert [float(value[0]) for value in found.delta.values()] == pytest.approx([2, 3, 4, 2])


def test_lines_scales_any_merge_to_the_size_of_the_mean() -> None:
    family = families.smooth(6, 4)
    inner = ties(family.base, family.models).delta
    found = lines(family.base, family.models, beta=0.0, merged=inner)
    mean = sum(flat(delta) for delta in family.deltas) / 4
    np.testing.assert_allclose(np.abs(flat(found.delta)).sum(), np.abs(mean).sum())


def test_layer_swapping_by_hand() -> None:
    names = ["embed", *(f"model.layers.{layer}.w" for layer in range(10)), "head"]
    task, language = ({name: np.array([value]) for name in names} for value in (0.0, 1.0))
    found = layer_swapping(None, [task, language], bottom=2, top=1, transition=1)
    assert [float(value[0]) for value in found.delta.values()] == [1, 1, 1, 0.5, 0, 0, 0, 0, 0, 0.5, 1, 1]


def test_layer_swapping_of_32_layers_as_the_paper_has_it() -> None:
    names = [f"model.layers.{layer}.w" for layer in range(32)]
    task, language = ({name: np.array([value]) for name in names} for value in (0.0, 1.0))
    found = [float(value[0]) for value in layer_swapping(None, [task, language]).delta.values()]
    assert found == [1.0] * 5 + [0.5] + [0.0] * 23 + [0.5] + [1.0] * 2


def test_layer_swapping_of_few_layers_and_of_one_model() -> None:
    names = [f"model.layers.{layer}.w" for layer in range(3)]
    task, language = ({name: np.array([value]) for name in names} for value in (0.0, 1.0))
    assert [float(v[0]) for v in layer_swapping(None, [task, language], bottom=1, top=1).delta.values()] == [1, 0.5, 1]
    with pytest.raises(ValueError, match="language expert"):
        layer_swapping(None, [task])


def test_metagpt_weighs_by_the_square_of_the_norm() -> None:
    found = metagpt(None, [one(3.0, 0.0), one(0.0, 4.0)])
    np.testing.assert_allclose(found.products["weights"], [9 / 25, 16 / 25])
    np.testing.assert_allclose(found.delta["w"], [27 / 25, 64 / 25])


def test_nan_makes_all_models_equally_long() -> None:
    family = families.smooth(7, 4)
    for scope in ("tensor", "model"):
        weights = nan(family.base, family.models, scope=scope).products["weights"]
        sizes = np.array([np.linalg.norm(flat(delta)) for delta in family.deltas])
        for name, own in weights.items():
            each = np.array([np.linalg.norm(delta[name]) for delta in family.deltas])
            if not each.any() and scope == "tensor":
                assert not own.any()
                continue
            assert own.sum() == pytest.approx(1)
            assert np.ptp(own * (each if scope == "tensor" else sizes)) < 1e-15
