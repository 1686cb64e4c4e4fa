"""TIES and DARE under all profiles: by hand, and against the dense oracle of today's methods."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.tools import oracle
from tests.tools.oracle import Change, Rules
from tests.tools.oracles import families
from tests.tools.oracles.electing import dare, ties
from tests.tools.oracles.protocol import Array, Tensors


def one(*values: float) -> Tensors:
    return {"w": np.array(values)}


def merged(models: list[Tensors], **how: Any) -> Array:
    return ties(None, models, **how).delta["w"]


def test_exact_keeps_as_many_as_the_density_says_and_the_lower_index_of_equals() -> None:
    tau = one(3.0, -3.0, 1.0, 3.0)
    np.testing.assert_array_equal(merged([tau], density=0.5, at_threshold="exact"), [3, -3, 0, 0])
    np.testing.assert_array_equal(merged([tau], density=0.5, at_threshold="keep"), [3, -3, 0, 3])
    np.testing.assert_array_equal(merged([tau], density=0.5, at_threshold="drop"), [0, 0, 0, 0])


def test_exact_counts_through_the_whole_vector_in_the_order_of_names() -> None:
    model = {"b": np.array([2.0, 2.0]), "a": np.array([1.0, 2.0])}
    delta = ties(None, [model], density=0.5, at_threshold="exact").delta
    np.testing.assert_array_equal(delta["a"], [0, 2])
    np.testing.assert_array_equal(delta["b"], [2, 0])


@pytest.mark.parametrize("profile", ["paper", "mergekit", "peft"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.37, 0.9])
def test_exact_keeps_exactly_k_values(profile: Any, density: float) -> None:
    family = families.checkpoints(7, 3, zeros=0.0)
    kept = ties(family.base, family.models, density=density, profile=profile, at_threshold="exact").products["kept"]
    sizes = [value.size for value in family.base.values()]
    wanted = max(1, int(density * sum(sizes)))
    if profile != "paper":
        wanted = sum(max(1 if profile == "mergekit" else 0, int(density * size)) for size in sizes)
    assert kept.sum(1).tolist() == [wanted] * 3


def test_the_authors_keep_one_more() -> None:
    tau = one(5.0, 4.0, 3.0, 2.0, 1.0)
    np.testing.assert_array_equal(merged([tau], density=0.4, profile="official"), [5, 4, 3, 0, 0])
    np.testing.assert_array_equal(merged([tau], density=0.4), [5, 4, 0, 0, 0])


def test_zero_sums() -> None:
    models = [one(1.0, 2.0, -1.0), one(-1.0, 2.0, -1.0)]
    for zero_sum, wanted in (("none", [0, 2, -1]), ("positive", [1, 2, -1]), ("majority", [-1, 2, -1])):
        np.testing.assert_array_equal(merged(models, density=1.0, zero_sum=zero_sum), wanted)
    np.testing.assert_array_equal(merged(models, density=1.0, zero_sum="majority", merge="max"), [0, 2, -1])


def test_mergekit_lets_negative_weights_vote_and_divide() -> None:
    # t = (1, .5), both positive, and their weights add up to 1 - .5
    np.testing.assert_array_equal(
        merged([one(1.0), one(-1.0)], weights=[1, -0.5], density=1.0, profile="mergekit"), [3]
    )


def test_mergekit_divides_by_the_weights_of_those_that_agree() -> None:
    models, weights = [one(1.0, 1.0), one(4.0, -5.0)], [3.0, 1.0]
    np.testing.assert_array_equal(merged(models, weights=weights, density=1.0, profile="mergekit"), [7 / 4, -5])
    found = merged(models, weights=weights, density=1.0, profile="mergekit", normalize=False, lambda_=2.0)
    np.testing.assert_array_equal(found, [14, -10])


def test_mergekit_rescales_each_tensor_to_the_norm_it_had() -> None:
    found = merged([one(4.0, 3.0, 2.0, 1.0)], density=0.5, profile="mergekit", rescale=True)
    np.testing.assert_allclose(found, [4 * 10 / 7, 3 * 10 / 7, 0, 0])


def test_mergekit_keeps_one_value_of_a_tensor_where_peft_keeps_none() -> None:
    assert merged([one(2.0)], density=0.2, profile="mergekit") == [2]
    assert merged([one(2.0)], density=0.2, profile="peft") == [0]
    assert merged([one(2.0)], density=0.0, profile="mergekit") == [0]


def test_peft_elects_without_weights_and_divides_by_the_count() -> None:
    models, weights = [one(1.0, 2.0), one(-3.0, 4.0)], [10.0, 1.0]
    np.testing.assert_array_equal(merged(models, weights=weights, density=1.0, profile="peft"), [-3, 12])
    frequent = [one(1.0), one(1.0), one(-3.0)]
    np.testing.assert_array_equal(merged(frequent, density=1.0, profile="peft"), [-3])
    np.testing.assert_array_equal(merged(frequent, density=1.0, profile="peft", elect="frequency"), [1])


RULES: dict[str, tuple[dict[str, Any], Rules]] = {
    "paper": ({}, Rules("ties", 0.2)),
    "official": ({"profile": "official"}, Rules("ties", 0.2, zero_sum="majority", one_more=True)),
    "drop": ({"at_threshold": "drop", "trim": "tensor"}, Rules("ties", 0.2, strict=True, tensor=True)),
    "max": ({"merge": "max", "zero_sum": "majority"}, Rules("ties", 0.2, merge="max", zero_sum="majority")),
    "sum": (
        {"merge": "sum", "zero_sum": "positive", "lambda_": 0.5},
        Rules("ties", 0.2, merge="sum", zero_sum="positive", lambda_=0.5),
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_ties_is_what_the_dense_oracle_of_the_methods_says(name: str, count: int) -> None:
    how, rules = RULES[name]
    family = families.checkpoints(count, count)
    changes = [
        Change({name: torch.from_numpy(np.ravel(tau).copy()) for name, tau in delta.items()}) for delta in family.deltas
    ]
    answer = oracle.merge_changes(changes, rules)
    delta = ties(family.base, family.models, **how).delta
    for parameter, value in delta.items():
        np.testing.assert_allclose(value.ravel(), answer.ideal(parameter).numpy(), rtol=1e-15, atol=0)


def test_dare_by_hand() -> None:
    models = [one(1.0, 2.0, 3.0), one(1.0, -2.0, 1.0)]
    kept = [{"w": np.array([True, True, False])}, {"w": np.array([True, False, True])}]
    run = lambda **how: dare(None, models, kept=kept, density=0.5, **how).delta["w"]  # noqa: E731
    np.testing.assert_array_equal(run(), [4, 4, 2])
    np.testing.assert_array_equal(run(combine="ties"), [2, 4, 2])
    np.testing.assert_array_equal(run(profile="peft", combine="ties", weights=[2.0, 1.0]), [3, 8, 2])
    # L1: 6 of 3 left, and 4 of 2 left
    np.testing.assert_array_equal(run(profile="mergekit"), [4, 4, 2])
    np.testing.assert_array_equal(run(profile="mergekit", normalize=True), [2, 2, 1])
    np.testing.assert_array_equal(run(profile="mergekit", combine="ties"), [4, 4, 2])
    np.testing.assert_array_equal(run(profile="mergekit", combine="ties", normalize=True), [2, 4, 2])
