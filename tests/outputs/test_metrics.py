"""Figures alone: what a merge would do, without its weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.adapters import make_pool
from tests.tools.families import Family
from tests.tools.merging import merge, merge_and_die, recipe_of
from ties_ray.errors import RecipeError
from ties_ray.operations import merging, sweeping
from ties_ray.operations.verify import verify
from ties_ray.outputs.metrics import Metrics
from ties_ray.recipe.parse import validate
from ties_ray.recipe.settings import sweep_of
from ties_ray.stores import Stores
from ties_ray.testing import OutputContract

MakeFamily = Callable[..., Family]
METHODS: list[dict[str, Any]] = [
    {"name": "ties", "density": 0.3},
    {"name": "average"},
    {"name": "dare", "density": 0.5},
    {"name": "consensus"},
    {"name": "iso_c"},
    {"name": "model_stock"},
    {"name": "della"},
]


class TestMetrics(OutputContract):
    @pytest.fixture
    def output(self) -> Metrics:
        return Metrics(path="/out")


def figures(folder: Path) -> dict[str, str]:
    return {"path": str(folder), "kind": "metrics"}


@pytest.mark.parametrize("method", METHODS, ids=lambda each: each["name"])
def test_the_figures_are_those_of_the_merge(method: dict[str, Any], family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=4, hidden=48, dtype="F32", smooth=True)
    written = merge(family, tmp_path / "written", method)
    alone = merge(family, figures(tmp_path / "figures"), method)
    assert alone.effects is not None
    assert alone.effects == written.effects
    assert alone.trims == written.trims
    assert not alone.files
    assert not list((tmp_path / "figures").glob("*.safetensors"))
    assert alone.run_id != written.run_id


def test_the_figures_of_adapters_are_those_of_their_merge(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path / "pool"), num_adapters=5)
    results = [
        merging.merge(
            validate({
                "base": pool.base, "models": list(pool.adapters), "method": "ties", "run": {"executor": "local"},
                "output": {"path": str(tmp_path / kind), "kind": kind},
            })
        )
        for kind in ("checkpoint", "metrics")
    ]  # fmt: skip
    assert results[0].effects == results[1].effects is not None


def test_large_parameters_are_read_in_part(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=2, hidden=192)
    written = merge(family, tmp_path / "written", "average")
    alone = merge(family, figures(tmp_path / "figures"), "average")
    assert alone.bytes_read < written.bytes_read / 2
    assert alone.effects == written.effects


@pytest.mark.parametrize("uri", ["*/records/0/*", "*/records/2/*", "*/README.md"])
def test_it_continues_after_a_kill_and_is_recognised(
    uri: str, family_of: MakeFamily, tmp_path: Path, plugged: Path
) -> None:
    family = family_of(num_models=4, hidden=48, dtype="F32", smooth=True)
    point = {"when": "after", "what": "put", "uri": uri, "marker": str(tmp_path / "died")}
    output = {"path": f"frail://{tmp_path}/out", "kind": "metrics"}
    recipe = recipe_of(family, output, METHODS[0], storage={"frail": point})
    assert merge_and_die(recipe, plugged) == -9
    result = merging.merge(recipe)
    assert result.resumed
    assert result.effects == merge(family, figures(tmp_path / "other"), METHODS[0]).effects
    assert merging.merge(recipe).reused
    assert not verify(Stores({}), str(tmp_path / "out"), sample=1.0).problems


def test_a_sweep_of_figures_writes_no_weights(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=4, hidden=48)
    data: dict[str, Any] = {
        "base": family.base, "models": list(family.models), "method": METHODS[0], "run": {"executor": "local"},
        "grid": {"method.lambda": [0.3, 0.6, 1.0]},
    }  # fmt: skip
    rows = {}
    for kind in ("checkpoint", "metrics"):
        swept = sweeping.sweep(sweep_of({**data, "output": {"path": str(tmp_path / kind / "{setting}"), "kind": kind}}))
        rows[kind] = [(row.setting, row.norm, row.changed, row.conflict, row.cancellation) for row in swept.rows]
        assert bool(list((tmp_path / kind).glob("*/*.safetensors"))) == (kind == "checkpoint")
    assert rows["checkpoint"] == rows["metrics"]


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"method": "opcm"}, "what opcm adds is final once all of it is merged"),
        ({"output": {"state": True}}, "an output of kind metrics has no state"),
        ({"run": {"device": "cuda"}}, "figures are gathered on a CPU"),
    ],
)
def test_what_has_no_figures_is_refused(
    how: dict[str, Any], problem: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    output = {**figures(tmp_path / "out"), **how.pop("output", {})}
    recipe = recipe_of(family_of(num_models=2), output, how.pop("method", "ties"), **how)
    with pytest.raises(RecipeError, match=problem):
        merging.plan(recipe)
