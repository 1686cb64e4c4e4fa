"""The search section, and the space of a search."""

import copy
import random
from typing import Any

import pytest

from ties_ray.errors import RecipeError
from ties_ray.recipe.search import search_of
from ties_ray.recipe.space import SearchedModel, Space, coordinates_of, shares_of

MODELS = ("a", "b", "[x]", "d")
UNIT = {"low": 0, "high": 1}
DATA: dict[str, Any] = {
    "base": "base",
    "models": [f"pool/{name}" for name in MODELS],
    "method": {"name": "ties", "lambda": 0.4},
    "output": "out",
    "search": {"space": {"method.lambda": UNIT}, "evaluate": "function:math:isnan"},
}


def space_of(space: dict[str, Any], **more: Any) -> Space:
    data = copy.deepcopy(DATA) | more
    data["search"]["space"] = space
    asked = search_of(data)
    names = [SearchedModel(name, f"pool/{name}") for name in MODELS]
    return Space(asked.search, asked.recipe(), asked.common, names)


def test_a_point_sets_numbers_choices_gradients_and_tables_by_place() -> None:
    space = space_of({
        "method.lambda": {"low": 0.1, "high": 10, "log": True},
        "method.density": {"*.mlp.*": UNIT | {"low": 0.2}, "*": {"low": 0.1, "high": 0.9, "layers": 2}},
        "method.zero_sum": {"choices": ["none", "positive"]},
        "models.weights": {"a": {"*.attn.*": UNIT, "*": [UNIT, {"low": 0, "high": 3}]}, "*": {"low": 1, "high": 2}},
        "models.only": {"choose": 2},
    })  # fmt: skip
    values = space.values((0.5, 0, 0.25, 1, 1, 0.1, 0.2, 1 / 3, 0.5, 4))
    assert values == {
        "method.lambda": 1.0,
        "method.density": {"*.mlp.*": 0.2, "*": [0.3, 0.9]},
        "method.zero_sum": "positive",
        "models": {"only": ["b", "d"], "weights": {"a": {"*.attn.*": 0.1, "*": [0.2, 1.0]}, "*": 1.5}},
    }
    assert space.names[1:3] == ("method.density.*.mlp.*", "method.density.*.0")
    assert not space.shares
    start = [axis.start for axis in space.axes]
    assert start[0] == pytest.approx(0.30103)
    assert start[1:6] == pytest.approx([0, 0.125, 0.125, 0, 1.0])


def test_weights_of_a_method_that_divides_by_them_are_searched_as_shares() -> None:
    space = space_of({"models.weight": UNIT})
    assert space.shares
    assert space.names == ("share of a", "share of b", "share of [x]")
    assert space.values((0.0, 1.0, 0.3)) == {"models": {"weights": {"a": 0.0, "b": 1.0, "[[]x]": 0.0, "d": 0.0}}}
    start = space.values(tuple(axis.start for axis in space.axes))
    assert start["models"]["weights"] == dict.fromkeys(("a", "b", "[[]x]", "d"), 0.25)


@pytest.mark.parametrize(
    ("space", "method"),
    [
        ({"models.weight": UNIT}, {"name": "task_arithmetic"}),
        ({"models.weight": UNIT}, {"name": "ties", "merge": "sum"}),
        ({"models.weight": {"low": 0.1, "high": 1}}, {"name": "average"}),
        ({"models.weight": UNIT | {"layers": 2}}, {"name": "average"}),
        ({"models.weights": {"a": UNIT, "b": UNIT}}, {"name": "average"}),
        ({"models.weight": UNIT, "method.merge": {"choices": ["mean", "sum"]}}, {"name": "ties"}),
        ({"models.weight": UNIT, "method": {"choices": ["ties", "task_arithmetic"]}}, {"name": "ties"}),
    ],
)
def test_other_weights_are_searched_as_they_are(space: dict[str, Any], method: dict[str, Any]) -> None:
    assert not space_of(space, method=method).shares


def test_shares_are_spread_evenly_over_the_simplex_and_have_an_inverse() -> None:
    """Of shares that are spread evenly, each has the mean 1/n and the variance (n - 1) / (n^2 (n + 1))."""
    draw, number = random.Random(0), 4
    rows = [shares_of([draw.random() for _ in range(number - 1)]) for _ in range(20_000)]
    for index in range(number):
        column = [row[index] for row in rows]
        mean = sum(column) / len(column)
        assert mean == pytest.approx(1 / number, rel=0.02)
        variance = sum((each - mean) ** 2 for each in column) / len(column)
        assert variance == pytest.approx((number - 1) / (number**2 * (number + 1)), rel=0.05)
    for row in [*rows[:50], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.25] * 4]:
        assert sum(row) == pytest.approx(1)
        assert shares_of(coordinates_of([3 * each for each in row])) == pytest.approx(row, abs=1e-6)


def test_a_large_choice_of_models_has_a_coordinate_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ties_ray.recipe.space.MAX_CHOICES", 5)
    space = space_of({"models.only": {"choose": 2}})
    assert len(space.axes) == 4
    assert space.values((0.2, 0.9, 0.1, 0.5)) == {"models": {"only": ["b", "d"]}}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"method.densty": UNIT}, "method.densty: unknown key; did you mean 'density'"),
        ({"method.density": UNIT}, "method.density: should be greater than 0"),
        ({"method.zero_sum": {"choices": ["none", "never"]}}, "method.zero_sum: should be"),
        ({"models.0.weight": UNIT}, "write one of models.densities, models.density, models.only"),
        ({"models.weights": UNIT}, "write `models.weight` for a number of each model"),
        ({"models.only": {"choose": 9}}, "chooses 9 models of 4"),
        ({"models.only": UNIT}, "`choose` and `models.only` go together"),
        ({"method.lambda": {"choose": 2}}, "`choose` and `models.only` go together"),
        ({"method.lambda": {"*": {"x": UNIT}}}, "is a table inside a table"),
        ({"method.lambda": {"low": 3}}, "high: Field required"),
        ({"method.lambda": {"low": 3, "high": 1}}, "`low` is not below `high`"),
        ({"method.lambda": {"low": 0, "high": 1, "log": True}}, "`log` needs a `low` above 0"),
        ({"method.lambda": 3}, "write {low: 0, high: 1} or {choices"),
        ({"run.workers": UNIT}, "is the same for all candidates"),
        ({}, "at least 1 item"),
    ],
)
def test_a_space_that_cannot_be_is_said_with_its_place(space: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=r"search\.space") as error:
        space_of(space)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sampler": "tpe"}, "unknown sampler 'tpe'"),
        ({"sampler": {"name": "grid", "levels": 1}}, "greater than or equal to 2"),
        ({"budget": 0}, "budget"),
        ({"shares": [1, 2]}, "`shares` needs a number for each evaluation"),
        ({"confirm": ["function:math:isnan", "function:math:isinf"]}, "`confirm` needs as many evaluations"),
        ({"select": {"k": 2, "by": "closeness"}}, "`like` names the model"),
        ({"evaluate": "los:dev.jsonl"}, "evaluate"),
        ({"bugdet": 3}, "bugdet"),
    ],
)
def test_a_search_section_that_cannot_be_is_said_with_its_place(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match="search") as error:
        search_of({**DATA, "search": DATA["search"] | section})
    assert message in str(error.value)


def test_a_recipe_is_one_of_merge_sweep_and_search() -> None:
    from ties_ray.recipe.parse import validate

    with pytest.raises(RecipeError, match="`ties-ray search` does it"):
        validate(DATA)
    with pytest.raises(RecipeError, match="leave either of them out"):
        search_of(DATA | {"grid": {"method.lambda": [1]}})
