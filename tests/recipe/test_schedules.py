"""Schedules: weights by the formulas of their papers, from exact or independent arithmetic."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from ties_ray.errors import RecipeError
from ties_ray.recipe.parse import validate
from ties_ray.recipe.schedules import weights_of

DECAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "minus_sqrt": lambda place: 1 - np.sqrt(place),
    "cosine": lambda place: (1 + np.cos(np.pi * place)) / 2,
    "mean": lambda place: 1 - place,
}


@pytest.mark.parametrize("count", [1, 2, 7, 20])
@pytest.mark.parametrize("name", DECAYS)
def test_weights_give_the_checkpoint_that_a_decay_of_the_learning_rate_gives(name: str, count: int) -> None:
    """WSM, its definition: the update between checkpoints i - 1 and i is scaled by f(i/N); a linear decay is a mean."""
    draw = np.random.default_rng(count)
    updates = draw.normal(size=(count, 50))  # the first row is the first checkpoint itself
    checkpoints = np.cumsum(updates, axis=0)
    scales = DECAYS[name](np.arange(count) / count)
    decayed = (scales[:, None] * updates).sum(axis=0)
    merged = np.array(weights_of(name, count)) @ checkpoints  # type: ignore[arg-type]
    np.testing.assert_allclose(merged, decayed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_ema_is_the_recurrence_from_the_first_checkpoint(count: int) -> None:
    checkpoints = np.random.default_rng(1).normal(size=(count, 50))
    average = checkpoints[0]
    for checkpoint in checkpoints[1:]:
        average = 0.8 * average + 0.2 * checkpoint
    np.testing.assert_allclose(np.array(weights_of({"ema": 0.8}, count)) @ checkpoints, average, rtol=1e-12)


def test_linear_rises_with_the_order_and_own_coefficients_are_divided_by_their_sum() -> None:
    assert weights_of("linear", 4) == tuple(float(Fraction(place, 10)) for place in (1, 2, 3, 4))
    assert weights_of((1.0, -1.0, 4.0), 3) == (0.25, -0.25, 1.0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "m", "schedule": "mean"}, "belong to a `run`"),
        ({"path": "m/*", "last": 3}, "belong to a `run`"),
        ({"run": "m", "path": "n"}, "give either `path` or `table` or `run`"),
        ({"run": "m", "id": "a"}, "name one model"),
        ({"run": "m", "from": 3, "to": 2}, "`from` is above `to`"),
        ({"run": "m/{step}/{step}"}, "holds {step} twice"),
        ({"run": "m", "schedule": [1, -1]}, "sum to more than 0"),
        ({"run": "m", "schedule": "mean", "weight": {"*": 1}}, "one number"),
        ({"run": "m", "schedule": {"ema": 1}}, "less than 1"),
        ({"run": "m", "schedule": "sqrt"}, "'mean', 'linear', 'minus_sqrt' or 'cosine'"),
    ],
)
def test_what_is_no_window_is_refused(entry: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validate({"base": "b", "models": [entry], "method": "average", "output": "o"})
    (problem,) = caught.value.problems
    assert message in problem.what
    assert problem.where in ("models.0", "models.0.schedule", "models.0.schedule.ema")
