"""What `status` says of a run that is dead, finished, or broken."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.state.test_manifest import TIES, Stop, stop_at
from tests.tools.families import Family
from tests.tools.merging import recipe_of
from ties_ray.operations import merging
from ties_ray.operations.status import status
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]


@pytest.mark.parametrize(("stage", "merged"), [("merge", False), ("publish", True)])
def test_a_dead_run_shows_how_far_it_came(stage: str, merged: bool, family_of: MakeFamily, tmp_path: Path) -> None:
    recipe = recipe_of(family_of(num_models=3), tmp_path / "out", TIES)
    with pytest.raises(Stop):
        merging.merge(recipe, watch=stop_at(stage))
    state = status(Stores({}), str(tmp_path / "out"))
    assert (state.result, state.holder) == (None, None)
    (run,) = state.runs
    plan = merging.plan(recipe)
    assert (run.run_id, run.generation, run.problem) == (plan.run_id, 1, "")
    assert run.uploads == ["model.safetensors"]
    *counting, last = run.rounds
    assert [round_.name for round_ in run.rounds] == [round_.name for round_ in plan.merges[0].rounds]
    assert all(round_.done == round_.shards for round_ in counting)
    assert counting[0].shards == plan.merges[0].rounds[0].num_shards > 0
    assert (last.done, last.shards) == (last.shards if merged else 0, plan.merges[0].rounds[-1].num_shards)
    merging.merge(recipe)
    state = status(Stores({}), str(tmp_path / "out"))
    assert state.result
    assert state.result.run_id == plan.run_id


@pytest.mark.parametrize("name", ["plan.json.gz", "uploads.json", "records/0"])
def test_what_can_not_be_read_is_the_problem_of_its_run(name: str, family_of: MakeFamily, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        merging.merge(recipe_of(family_of(num_models=2), tmp_path / "out", "average"), watch=stop_at("publish"))
    (generation,) = tmp_path.glob("out/.ties-ray/*/1")
    path = generation / name
    (next(path.iterdir()) if path.is_dir() else path).write_bytes(b"no document")
    (run,) = status(Stores({}), str(tmp_path / "out")).runs
    assert "this ties_ray can't read" in run.problem
