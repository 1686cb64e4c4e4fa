import numpy as np
import pytest

from ties_ray.measures.findings import NEAR, OPPOSITE, SAME, Finding, deviations, findings, mean_cosines


def pool(num_models: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return norms, cosines and shares of signs of a pool in which nothing stands out."""
    generator = np.random.default_rng(0)
    cosines = 0.01 * generator.standard_normal((num_models, num_models))
    cosines = (cosines + cosines.T) / 2
    np.fill_diagonal(cosines, 1.0)
    return 1 + 0.05 * generator.standard_normal(num_models), cosines, np.full(num_models, 0.45)


def test_nothing_stands_out_of_a_pool_of_equals() -> None:
    assert findings(*pool()) == []


def test_a_dead_model_is_in_no_other_finding() -> None:
    norms, cosines, against = pool()
    norms[3] = 0
    cosines[3] = cosines[:, 3] = 0
    assert findings(norms, cosines, against) == [Finding("dead", (3,), 0.0)]


def test_duplicates_come_in_groups_and_copies_of_another_size_are_near() -> None:
    norms, cosines, against = pool()
    norms[[1, 5, 8]] = 1.0
    for first, second in ((1, 5), (5, 8), (1, 8)):
        cosines[first, second] = cosines[second, first] = 1.0
    norms[2], norms[4] = 1.0, 1.2
    cosines[2, 4] = cosines[4, 2] = 1.0
    assert [each[:2] for each in findings(norms, cosines, against)] == [
        ("duplicate", (1, 5, 8)),
        ("near duplicate", (2, 4)),
    ]


def test_opposites_are_in_conflict_and_the_sharpest_comes_first() -> None:
    norms, cosines, against = pool()
    cosines[0, 7] = cosines[7, 0] = -0.5
    cosines[2, 3] = cosines[3, 2] = -0.9
    found = [each for each in findings(norms, cosines, against) if each.kind == "conflict"]
    assert found == [Finding("conflict", (2, 3), -0.9), Finding("conflict", (0, 7), -0.5)]


def test_a_small_pool_has_conflicts_and_duplicates_but_no_outliers() -> None:
    cosines = np.array([[1.0, -0.8, 1.0], [-0.8, 1.0, -0.8], [1.0, -0.8, 1.0]])
    found = findings(np.array([1.0, 50.0, 1.0]), cosines, np.zeros(3))
    assert [each.kind for each in found] == ["duplicate", "conflict", "conflict"]


def test_norms_signs_and_directions_unlike_the_others_stand_out() -> None:
    norms, cosines, against = pool()
    norms[4], norms[6] = 40.0, 0.01
    against[2] = 0.9
    cosines += 0.5
    cosines[9] = cosines[:, 9] = 0.0
    np.fill_diagonal(cosines, 1.0)
    kinds = [each[:2] for each in findings(norms, cosines, against)]
    assert kinds == [("outlier", (6,)), ("outlier", (4,)), ("against", (2,)), ("stranger", (9,))]


def test_values_are_ratios_to_the_median_of_the_models_that_live() -> None:
    norms, cosines, against = pool()
    norms *= 4
    norms[:7], norms[7] = 0, 1e-9
    found = findings(norms, cosines, against)
    assert [each.models for each in found if each.kind == "dead"] == [(number,) for number in range(8)]
    assert found[7].value == pytest.approx(1e-9 / 4, rel=0.1)
    assert findings(np.zeros(6), cosines[:6, :6], against[:6]) == [Finding("dead", (n,), 0.0) for n in range(6)]
    norms, cosines, against = pool()
    norms[4] = 40
    ((kind, models, value),) = findings(norms * 4, cosines, against)
    assert (kind, models, value) == ("outlier", (4,), pytest.approx(40, rel=0.1))


@pytest.mark.parametrize(("steps", "stands_out"), [(4, False), (7, True)])
def test_six_standard_deviations_stand_out(steps: float, stands_out: bool) -> None:
    norms, cosines, against = pool()
    cosines[:] = 0.5
    cosines[9] = cosines[:, 9] = 0.5 - 0.02 * steps
    np.fill_diagonal(cosines, 1.0)
    against[2] += 0.02 * steps
    kinds = [each[:2] for each in findings(norms, cosines, against)]
    assert kinds == ([("against", (2,)), ("stranger", (9,))] if stands_out else [])


@pytest.mark.parametrize("num_models", [4, 5])
def test_one_of_five_can_stand_out_and_one_of_four_can_not(num_models: int) -> None:
    norms, cosines, against = pool(num_models)
    norms[1], against[1] = 40, 0.9
    kinds = {each.kind for each in findings(norms, cosines, against)}
    assert kinds == ({"outlier", "against"} if num_models == 5 else set())


def test_deviations_of_normal_values_are_standard_deviations() -> None:
    values = 3 + 0.5 * np.random.default_rng(0).standard_normal(100_001)
    assert deviations(values, 0.01).std() == pytest.approx(1, abs=0.02)
    assert deviations(values, 5.0).std() == pytest.approx(0.1, abs=0.002)


def test_mean_cosines_are_those_with_the_others() -> None:
    cosines = np.array([[1, 0.5, 0.1], [0.5, 1, 0.3], [0.1, 0.3, 1]])
    assert mean_cosines(cosines) == pytest.approx([0.3, 0.4, 0.2])
    assert mean_cosines(cosines[:2, :2]) == pytest.approx([0.5, 0.5])
    assert mean_cosines(np.ones((1, 1))) == pytest.approx([0])


def test_a_cosine_at_its_limit_is_a_twin_and_no_conflict() -> None:
    norms, cosines, against = pool()
    norms[:] = 1
    for (first, second), value in {(0, 1): SAME, (2, 3): NEAR, (4, 5): OPPOSITE}.items():
        cosines[first, second] = cosines[second, first] = value
    assert [each[:2] for each in findings(norms, cosines, against)] == [
        ("duplicate", (0, 1)),
        ("near duplicate", (2, 3)),
    ]


def test_where_all_are_opposites_none_is_in_conflict_more_than_others() -> None:
    norms, cosines, against = pool()
    assert [each.kind for each in findings(norms, cosines - 0.5 + 0.5 * np.eye(12), against)] == []


def test_what_is_equally_striking_comes_in_the_order_of_the_models() -> None:
    norms, cosines, against = pool(80)
    pairs = [(number, number + 1) for number in range(0, 40, 2)]
    for first, second in pairs:
        cosines[first, second] = cosines[second, first] = -0.5
    norms[30:60], against[10:40] = 40, 0.9
    found = findings(norms, cosines, against)
    assert [each.models for each in found if each.kind == "conflict"] == pairs
    assert [each.models for each in found if each.kind == "outlier"] == [(number,) for number in range(30, 60)]
    assert [each.models for each in found if each.kind == "against"] == [(number,) for number in range(10, 40)]
