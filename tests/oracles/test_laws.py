"""What holds for every oracle, on every family that is hard."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.tools.oracles import families
from tests.tools.oracles.breadcrumbs import breadcrumbs
from tests.tools.oracles.cabs import cabs
from tests.tools.oracles.consensus import consensus
from tests.tools.oracles.della import della
from tests.tools.oracles.electing import ties
from tests.tools.oracles.families import COUNTS, Family
from tests.tools.oracles.fisher import fisher
from tests.tools.oracles.protocol import Merged, Tensors, Weights
from tests.tools.oracles.registry import ORACLES
from tests.tools.oracles.regmean import regmean
from tests.tools.oracles.spherical import karcher, multislerp
from tests.tools.oracles.star import star

HAZARDS = tuple(families.hazards(1))
FEWER = {40: ("low_rank", "one_layer", "narrow"), 300: ("one_layer", "narrow")}
"""What is tried of many models, for time."""


def close(one: Tensors, other: Tensors, scale: float = 1.0, tolerance: float = 3e-9) -> None:
    """Assert that two dicts of arrays agree, relative to the largest element of each."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        size = max(float(np.abs(value).max()), float(np.abs(other[name]).max()), 1e-12)
        np.testing.assert_allclose(value, other[name] * scale, rtol=0, atol=tolerance * size, err_msg=name)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("method", ORACLES)
def test_every_hazard_gives_finite_tensors_of_the_right_shape(method: str, count: int) -> None:
    for hazard, family in families.hazards(count).items():
        if hazard not in FEWER.get(count, HAZARDS):
            continue
        merged = ORACLES[method].run(family)
        assert merged.weights.keys() == family.base.keys(), hazard
        for name, value in merged.weights.items():
            assert value.shape == family.base[name].shape, (hazard, name)
            assert np.isfinite(value).all(), (hazard, name)


@pytest.mark.parametrize("method", ORACLES)
def test_models_that_never_moved_give_the_base(method: str) -> None:
    family = families.hazards(3)["all_frozen"]
    assert not any(value.any() for value in ORACLES[method].run(family).delta.values())


@pytest.mark.parametrize("method", ORACLES)
def test_a_parameter_frozen_in_all_models_stays_at_the_base(method: str) -> None:
    family = families.checkpoints(1, 4)
    merged = ORACLES[method].run(family)
    assert not merged.delta["model.frozen.weight"].any()
    np.testing.assert_array_equal(merged.weights["model.frozen.weight"], family.base["model.frozen.weight"])


@pytest.mark.parametrize("hazard", ["grid", "smooth", "low_rank", "one_layer"])
@pytest.mark.parametrize("method", [name for name, entry in ORACLES.items() if entry.alone])
def test_one_model_gives_that_model(method: str, hazard: str) -> None:
    family = families.hazards(1)[hazard]
    # What fp32 adds to a matrix of rank 1 lies past its numerical rank.
    tolerance = 1e-6 if hazard == "low_rank" else 3e-9
    close(ORACLES[method].run(family).delta, family.deltas[0], tolerance=tolerance)


@pytest.mark.parametrize("times", [2, 3, 40])
@pytest.mark.parametrize("method", [name for name, entry in ORACLES.items() if entry.same])
def test_identical_models_give_that_model(method: str, times: int) -> None:
    for family in (families.checkpoints(2, 1), families.smooth(2, 1)):
        close(ORACLES[method].run(families.duplicated(family, times)).delta, family.deltas[0])


@pytest.mark.parametrize("method", [name for name, entry in ORACLES.items() if entry.permutes])
def test_the_order_of_the_models_does_not_matter(method: str) -> None:
    for family in (families.checkpoints(3, 5), families.smooth(3, 5)):
        other = Family(family.base, tuple(dict(model) for model in families.permuted(family.models, 1)))
        close(ORACLES[method].run(family).delta, ORACLES[method].run(other).delta)


@pytest.mark.parametrize("method", [name for name, entry in ORACLES.items() if entry.scales])
def test_deltas_of_another_size_give_a_merged_delta_of_that_size(method: str) -> None:
    for family in (families.checkpoints(4, 3), families.smooth(4, 3)):
        larger = Family(
            family.base,
            tuple({name: family.base[name] + 4 * tau for name, tau in delta.items()} for delta in family.deltas),
        )
        close(ORACLES[method].run(larger).delta, ORACLES[method].run(family).delta, 4.0)


@pytest.mark.parametrize("method", ORACLES)
def test_a_model_that_lacks_a_parameter_counts_as_frozen_there(method: str) -> None:
    family = families.checkpoints(5, 3)
    name = "model.layers.0.self_attn.q_proj.weight"
    frozen = families.frozen_in(family, 1, name)
    lacking = Family(
        family.base,
        tuple(
            {own: value for own, value in model.items() if own != name or i != 1}
            for i, model in enumerate(family.models)
        ),
    )
    close(ORACLES[method].run(lacking).delta, ORACLES[method].run(frozen).delta)


@pytest.mark.parametrize("hazard", HAZARDS)
def test_the_families_are_exact_in_fp32(hazard: str) -> None:
    family = families.hazards(3)[hazard]
    for tensors in (family.base, *family.models, *family.deltas):
        for name, value in tensors.items():
            np.testing.assert_array_equal(value, value.astype(np.float32), err_msg=name)


def test_the_grid_has_ties_zeros_and_cancellation() -> None:
    family = families.checkpoints(0, 4)
    stack = np.stack([delta["model.embed_tokens.weight"] for delta in family.deltas])
    assert (stack == 0).mean() > 0.2
    assert len(np.unique(np.abs(stack))) <= 5
    assert ((stack[0] == -stack[1]) & (stack[0] != 0)).any()
    assert ((stack.sum(0) == 0) & stack.any(0)).any()


WEIGHTED: dict[str, Callable[[Family, Weights], Merged]] = {
    "multislerp": lambda f, w: multislerp(f.base, f.models, weights=w),
    "karcher": lambda f, w: karcher(f.base, f.models, weights=w),
    "ties": lambda f, w: ties(f.base, f.models, weights=w, density=0.4),
    "ties_mergekit": lambda f, w: ties(f.base, f.models, weights=w, density=0.4, profile="mergekit"),
    "breadcrumbs": lambda f, w: breadcrumbs(f.base, f.models, weights=w, density=0.4),
    "della": lambda f, w: della(f.base, f.models, weights=w, draws=families.draws(1, f), density=0.5, epsilon=0.2),
    "cabs": lambda f, w: cabs(f.base, f.models, weights=w, n=1, m=4),
    "consensus": lambda f, w: consensus(f.base, f.models, weights=w, agree=1),
    "star": lambda f, w: star(f.base, f.models, weights=w),
    "fisher": lambda f, w: fisher(f.base, f.models, weights=w, importances=families.importances(1, f)),
    "regmean": lambda f, w: regmean(f.base, f.models, weights=w, grams=families.grams(1, f)),
}


@pytest.mark.parametrize("method", WEIGHTED)
def test_weights_by_parameter_are_the_weights_of_that_parameter(method: str) -> None:
    family = families.smooth(6, 3)
    table = {name: [1.0, 2.0, number % 4] for number, name in enumerate(family.base)}
    found = WEIGHTED[method](family, table).delta
    for own in ([1.0, 2.0, 0.0], [1.0, 2.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 3.0]):
        whole = WEIGHTED[method](family, own).delta
        names = [name for name, weights in table.items() if weights == own]
        close({name: found[name] for name in names}, {name: whole[name] for name in names})
    assert any(np.abs(found[name] - value).max() > 1e-6 for name, value in WEIGHTED[method](family, None).delta.items())
