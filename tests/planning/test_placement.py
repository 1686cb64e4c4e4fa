import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tools.families import Family
from tests.tools.merging import recipe_of
from ties_ray.operations import merging
from ties_ray.planning import placement
from ties_ray.planning.placement import placed
from ties_ray.planning.plan import Plan


@pytest.fixture
def plan(family_of: Callable[..., Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    return merging.plan(recipe_of(family_of(), tmp_path / "out", "ties", run={}))


def with_run(plan: Plan, **settings: object) -> Plan:
    run = plan.recipe.run.model_copy(update=settings)
    return replace(plan, recipe=plan.recipe.model_copy(update={"run": run}))


def test_a_small_merge_of_local_files_runs_in_this_process(plan: Plan) -> None:
    place = placed(plan)
    assert (place.executor, place.chosen) == ("local", True)
    assert place.workers is not None
    assert 1 <= place.workers <= placement.MOST_WORKERS
    assert placed(with_run(plan, workers=7)).workers == 7


def test_the_recipe_s_executor_holds(plan: Plan) -> None:
    assert placed(with_run(plan, executor="ray")) == ("ray", None, False)
    assert placed(with_run(plan, executor="local", workers=3)) == ("local", 3, False)


@pytest.mark.parametrize("settings", [{"address": "auto"}, {"device": "cuda"}, {"pool_cache": "s3://b/cache"}])
def test_who_asks_for_a_cluster_a_gpu_or_a_bucket_gets_ray(plan: Plan, settings: dict[str, object]) -> None:
    assert placed(with_run(plan, **settings)).executor == "ray"


def test_an_address_in_the_environment_or_a_connection_means_ray(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "auto")
        assert placed(plan).executor == "ray"
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    assert placed(plan).executor == "ray"


def test_a_large_merge_and_one_in_a_bucket_run_on_ray(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert placed(replace(plan, output="s3://b/out")).executor == "ray"
    monkeypatch.setattr(placement, "SMALL", 1000)
    assert placed(plan).executor == "ray"
