"""Settings of a sweep: their names, their recipes, and what is refused."""

from typing import Any

import pytest

from ties_ray.errors import RecipeError
from ties_ray.recipe.parse import validate
from ties_ray.recipe.settings import Sweep, sweep_of


def sweep(**more: Any) -> Sweep:
    common = {"base": "b", "models": ["m", "n"], "method": "ties", "output": {"path": "out/{setting}"}}
    return sweep_of(common | more)


def test_a_combination_is_named_by_its_values() -> None:
    grid = {"method.lambda": [-0.5, 0.5], "method.density": [0.1], "output.dtype": ["float32"]}
    names = [setting.name for setting in sweep(grid=grid).named()]
    assert names == ["lambda--0.5_density-0.1_dtype-float32", "lambda-0.5_density-0.1_dtype-float32"]
    same = {"models.0.weight": [1, 2], "models.1.weight": [3]}
    assert [each.name for each in sweep(grid=same).named()] == [
        "models.0.weight-1_models.1.weight-3",
        "models.0.weight-2_models.1.weight-3",
    ]


def test_a_setting_is_the_common_recipe_with_its_values() -> None:
    values = {"method": {"name": "task_arithmetic", "lambda": 0.5}, "exclude": ["*.bias"]}
    made = sweep(settings=[{"name": "sum", "set": values}])
    (setting,) = made.named()
    assert made.recipe(setting) == validate(
        {"base": "b", "models": ["m", "n"], "method": values["method"], "exclude": ["*.bias"], "output": "out/sum"}
    )
    assert made.common["method"] == "ties"


def test_controls_alone_come_beside_all_models() -> None:
    made = sweep(controls={"leave_one_out": True, "subsets": {"k": 1, "n": 2, "seed": 0}})
    assert [setting.name for setting in made.all(["a/b", "c"])] == [
        "all", "without-a-b", "without-c", "subset-0", "subset-1",
    ]  # fmt: skip


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no setting": ({"grid": {"method.lambda": []}}, "name no setting"),
    "one name twice": ({"settings": [{"name": "a"}, {"name": "a"}]}, "two settings have the name 'a'"),
    "a name that leads out": ({"settings": [{"name": "../a"}]}, "pattern"),
    "one folder": ({"settings": [{"name": "a"}], "output": "out"}, "add the setting's name: out/{setting}"),
    "too many": ({"grid": {"method.lambda": list(range(1001))}}, "more than 1,000"),
    "an unknown key": ({"controls": {"leave_two_out": True}}, "leave_two_out"),
    "a secret": ({"settings": [{"name": "a", "set": {"base": "http://u:p@h/x"}}]}, "password"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_sweep_can_be_is_refused(name: str) -> None:
    more, message = WRONG[name]
    with pytest.raises(RecipeError) as caught:
        sweep(**more)
    assert message in str(caught.value)


def test_a_place_that_all_settings_share_stays_outside_of_them() -> None:
    made = sweep(settings=[{"name": "a", "set": {"run.workers": 3}}])
    with pytest.raises(RecipeError, match=r"settings\.a: sets `run`.*move `run` out of the settings"):
        made.recipe(made.named()[0])


def test_more_models_in_a_subset_than_there_are_is_refused() -> None:
    made = sweep(controls={"subsets": {"k": 3, "n": 1}})
    with pytest.raises(RecipeError, match="k is 3, and there are 2 models"):
        made.all(["a", "b"])
