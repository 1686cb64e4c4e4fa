"""Windows: checkpoints of a run by the steps in the names of their folders, in numerical order, with a schedule."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bucket
from ties_ray.errors import InputError, MergeError, RecipeError
from ties_ray.inputs.expand import Expanded, expand
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.stores import Stores

HF = ["checkpoint-500", "checkpoint-1000", "checkpoint-10000", "checkpoint-1500"]


def recipe_of(run: str, **window: Any) -> Recipe:
    data = {"models": [{"run": run, **window}], "method": "average", "output": "/out", "run": {"executor": "local"}}
    return validate(data)


def written(folder: Path, names: Sequence[str]) -> str:
    for name in names:
        (folder / name).mkdir(parents=True)
    return str(folder)


def expanded(recipe: Recipe, stores: Stores | None = None) -> Expanded:
    with ThreadPoolExecutor(4) as threads:
        return expand(recipe, stores or Stores({}), threads)


def names_of(recipe: Recipe, stores: Stores | None = None) -> list[str]:
    """Return the paths of the models within the run."""
    above = (recipe.models[0].run or "").partition("{step}")[0].rpartition("/")[0] + "/"
    entries = expanded(recipe, stores).entries
    return [entry.uri.removeprefix(above).rpartition("run/")[2] for entry in entries if entry.id != "base"]


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (HF, ["checkpoint-500", "checkpoint-1000", "checkpoint-1500", "checkpoint-10000"]),
        (["step-9", "step-10"], ["step-9", "step-10"]),
        (["global_step100", "global_step20"], ["global_step20", "global_step100"]),
        (["iter_0000020", "iter_0000003"], ["iter_0000003", "iter_0000020"]),
        (["9", "10", "100"], ["9", "10", "100"]),
        (
            ["stage1-step9000-tokens19B", "stage1-step10000-tokens21B"],
            ["stage1-step9000-tokens19B", "stage1-step10000-tokens21B"],
        ),
        (["step=5", "step=40", "logs", "final", ".tmp-7", "tmp-step=99"], ["step=5", "step=40"]),
    ],
)
def test_checkpoints_are_in_the_order_of_their_steps(names: list[str], ordered: list[str], tmp_path: Path) -> None:
    assert names_of(recipe_of(written(tmp_path / "run", names))) == ordered


@pytest.mark.parametrize(
    ("window", "steps"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ({"last": 3}, [10, 11, 12]),
        ({"every": 5}, [2, 7, 12]),
        ({"last": 3, "every": 2}, [8, 10, 12]),
        ({"last": 6, "every": 2}, [2, 4, 6, 8, 10, 12]),
        ({"from": 4, "to": 9}, [4, 5, 6, 7, 8, 9]),
        ({"to": 9, "every": 3, "last": 2}, [6, 9]),
        ({"from": 12}, [12]),
        ({"not": ["step-11", "step-1"], "last": 2}, [10, 12]),
    ],
)
def test_a_window_is_counted_back_from_the_last_checkpoint(
    window: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    run = written(tmp_path / "run", [f"step-{number}" for number in range(1, 13)])
    assert names_of(recipe_of(run, **window)) == [f"step-{step}" for step in steps]


def test_a_pattern_says_where_the_step_stands_and_how_deep_the_model_lies(tmp_path: Path) -> None:
    names = ["step-9/hf", "step-10/hf", "checkpoint-4", "step-11-rank3/hf", "rank1-7/a/b", "rank2-6/a/b"]
    run = written(tmp_path / "run", names)
    assert names_of(recipe_of(f"{run}/step-{{step}}/hf/")) == ["step-9/hf", "step-10/hf"]
    assert names_of(recipe_of(f"{run}/rank*-{{step}}/a/b")) == ["rank2-6/a/b", "rank1-7/a/b"]
    assert names_of(recipe_of(f"{run}/step-{{step}}*", last=1)) == ["step-11-rank3"]
    notes = expanded(recipe_of(f"{run}/step-{{step}}/hf", last=1)).notes
    assert any("no checkpoints of it: checkpoint-4, rank1-7" in note for note in notes)


def test_steps_are_found_in_a_bucket(s3_bucket: Bucket) -> None:
    stores = Stores(s3_bucket.storage)
    store = stores.of(s3_bucket.uri)
    for number in (9, 10, 100):
        store.put(f"{s3_bucket.uri}/run/step-{number}/model.safetensors", b"x")
    assert names_of(recipe_of(f"{s3_bucket.uri}/run", last=2), stores) == ["step-10", "step-100"]


def refusal(recipe: Recipe) -> str:
    with pytest.raises(MergeError) as caught:
        expanded(recipe)
    assert isinstance(caught.value, InputError | RecipeError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "window", "message"),
    [
        (["final", "logs"], {}, "has a step in its name, as .* asks .final, logs.; write {step} where the number"),
        ([], {}, "holds no folder"),
        (HF, {"last": 5}, "has 4 checkpoints; last is 5; `last: 4` takes all of them"),
        (HF, {"last": 3, "every": 3}, "has 4 checkpoints, of which `every: 3` leaves 2; last is 3"),
        (HF, {"from": 11_000}, "has no checkpoint from 11000 to the end; it has steps 500 to 10000"),
        ([*HF, "step-7"], {}, "2 kinds of names: checkpoint-{step}, step-{step}; choose one: `run: .*/checkpoint-"),
        (["step-10", "step-010"], {}, "step-010 and step-10 are both of step 10; leave one out: `not: .step-10.`"),
        (HF, {"schedule": [1, 2]}, "has 2 coefficients, and the window 4 checkpoints; `last: 2` takes as many"),
        (HF, {"at_least": 5}, "yields 4 models, at_least is 5"),
    ],
)
def test_what_names_no_window_is_refused_with_a_remedy(
    names: list[str], window: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(MergeError, match=message):
        expanded(recipe_of(written(tmp_path / "run", names), **window))


def test_a_young_checkpoint_waits_and_the_window_ends_before_it(tmp_path: Path) -> None:
    run = written(tmp_path / "run", ["step-1", "step-2", "step-3"])
    for number in (1, 2):
        path = tmp_path / f"run/step-{number}/model.safetensors"
        path.write_bytes(b"x")
    result = expanded(recipe_of(run, last=2, settle=1e-9))
    assert [Path(entry.uri).name for entry in result.entries[1:]] == ["step-1", "step-2"]
    assert "step-3: it has no weights yet" in result.waiting[0]


@pytest.mark.parametrize("schedule", ["mean", "linear", "minus_sqrt", "cosine", {"ema": 0.8}, [1, 5, 2, 2]])
def test_a_schedule_becomes_weights_that_sum_to_the_weight_of_the_line(schedule: Any, tmp_path: Path) -> None:
    run = written(tmp_path / "run", HF)
    weights = [entry.weight for entry in expanded(recipe_of(run, schedule=schedule, weight=0.5)).entries[1:]]
    assert len(weights) == 4
    assert math.fsum(weights) == pytest.approx(0.5, rel=1e-14)
