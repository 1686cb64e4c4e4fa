import numpy as np

from ties_ray.measures.findings import Finding, findings


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
