"""Searches: the same table however many workers there are and whoever is killed, and a merge of the best."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ties_ray
from tests.tools.families import Family
from tests.tools.merging import read_tensors
from ties_ray.errors import InputError, RecipeError
from ties_ray.operations import merging
from ties_ray.recipe.parse import parse, validate
from ties_ray.recipe.search import search_of
from ties_ray.reports.search import SearchResult

MakeFamily = Callable[..., Family]
UNIT = {"low": 0, "high": 1}
SCORES = '''
import os, signal
from pathlib import Path
from safetensors.torch import load_file

HERE = Path(__file__).parent

def near(model, goal="goal"):
    """Return how near a model is to the goal; kill this process first where a file says so."""
    order = HERE / "kill-me"
    if order.exists() and model.id == order.read_text():
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    merged, goal = load_file(Path(model.path) / "model.safetensors"), load_file(HERE / f"{goal}.safetensors")
    return -sum(float((merged[name].double() - goal[name].double()).square().sum()) for name in goal)

def near_other(model):
    return near(model, "other")

def bad(model):
    return near(model) if int(model.id.split()[-1]) % 3 else float("nan")

def never(model):
    return float("nan")
'''


@pytest.fixture
def recipe(family_of: MakeFamily, tmp_path: Path) -> dict[str, Any]:
    """Return a search for the weights of a merge that comes near to one of the models."""
    family = family_of(num_models=3, dtype="F32", smooth=True)
    (tmp_path / "scores.py").write_text(SCORES)
    for name, model in (("goal", 1), ("other", 1)):
        (tmp_path / f"{name}.safetensors").write_bytes((Path(family.models[model]) / "model.safetensors").read_bytes())
    return {
        "base": family.base,
        "models": list(family.models),
        "method": {"name": "task_arithmetic", "lambda": 0.3},
        "output": str(tmp_path / "best"),
        "run": {"workers": 1},
        "search": {
            "space": {"models.weight": UNIT, "method.lambda": {"low": 0.1, "high": 2, "log": True}},
            "sampler": {"name": "cma_es", "population": 4},
            "budget": 8,
            "evaluate": {"name": "function", "function": f"{tmp_path}/scores.py:near", "label": "near"},
            "confirm": {"name": "function", "function": f"{tmp_path}/scores.py:near_other", "label": "near"},
            "best": 2,
        },
    }


def found(recipe: dict[str, Any], **changes: Any) -> tuple[SearchResult, bytes]:
    """Return the result of a search with some changes, and its table."""
    section = {**recipe["search"], **changes.pop("search", {})}
    result = ties_ray.search({**recipe, **changes, "search": section})
    return result, Path(result.table_uri).read_bytes()


def command(recipe: dict[str, Any], folder: Path) -> "subprocess.CompletedProcess[str]":
    (folder / "search.json").write_text(json.dumps(recipe))
    program = "from ties_ray.cli.commands import main; main()"
    words = [sys.executable, "-c", program, "search", str(folder / "search.json"), "--json"]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_any_number_of_workers_kills_and_resumptions_give_the_same_table_and_merge(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    result, table = found(recipe)
    assert len(table.splitlines()) == 1 + 1 + 8 + 3
    assert result.improvement
    assert result.improvement > 0
    merged = (tmp_path / "best/model.safetensors").read_bytes()
    (tmp_path / "kill-me").write_text("candidate 6")  # the worker is a thread of the process
    output = tmp_path / "killed"
    assert command({**recipe, "output": str(output)}, tmp_path).returncode == -signal.SIGKILL
    rows = len((output / ".ties-ray/search.jsonl").read_bytes().splitlines()) - 1
    assert 0 < rows < 7
    resumed, same = found(recipe, output=str(output))
    assert (resumed.evaluated, same) == (1 + 8 + 3 - rows, table)
    assert (output / "model.safetensors").read_bytes() == merged
    (tmp_path / "kill-me").write_text("candidate 3")
    for workers in (2, 3):
        output = tmp_path / str(workers)
        parallel, same = found(recipe, output=str(output), run={"workers": workers})
        assert (parallel.workers_lost, same) == (workers == 2, table)
        assert (output / "model.safetensors").read_bytes() == merged


def test_the_best_is_merged_with_its_provenance_and_a_finished_search_does_nothing(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    result, table = found(recipe)
    again, same = found(recipe)
    assert (again.evaluated, again.merge.reused, same) == (0, True, table)
    best = next(row for row in result.rows if row.number == result.chosen)
    confirmed = [row for row in result.rows if row.confirmed_merit is not None]
    assert len(confirmed) == 3  # the best two, and the recipe as it stands
    assert best.confirmed_merit == max(row.confirmed_merit or 0 for row in confirmed)
    record = json.loads((tmp_path / "best/ties-ray.result.json").read_text())["found_by"]
    assert (record["number"], record["table"]) == (result.chosen, result.table_uri)
    assert record["scores"] == best.scores
    assert record["untuned"] != record["scores"]
    assert "## Search" in (tmp_path / "best/README.md").read_text()
    stored = parse((tmp_path / "best/ties-ray.recipe.yaml").read_text())
    assert stored.found_by
    output = stored.output.model_copy(update={"path": str(tmp_path / "once-more")})
    merging.merge(stored.model_copy(update={"output": output}))
    assert read_tensors(tmp_path / "once-more").keys() == read_tensors(tmp_path / "best").keys()
    assert (tmp_path / "once-more/model.safetensors").read_bytes() == (tmp_path / "best/model.safetensors").read_bytes()
    larger, longer = found(recipe, search={"budget": 13})
    assert longer.splitlines()[:10] == table.splitlines()[:10]
    assert larger.evaluated >= 5
    assert larger.merge.found_by
    assert larger.merge.found_by.number == larger.chosen


def test_seed_0_is_a_seed_and_another_one_asks_for_other_candidates(recipe: dict[str, Any], tmp_path: Path) -> None:
    few = {"budget": 5, "best": 1, "sampler": "random"}
    first, _ = found(recipe, search={**few, "seed": 0})
    second, _ = found(recipe, search={**few, "seed": 0}, output=str(tmp_path / "second"))
    other, _ = found(recipe, search={**few, "seed": 1}, output=str(tmp_path / "other"))
    assert first.rows == second.rows
    assert first.rows != other.rows
    with pytest.raises(InputError, match="is the table of another search"):
        found(recipe, search={**few, "seed": 2})


def test_candidates_without_a_score_are_listed_and_a_search_without_any_ends(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    function = {"name": "function", "function": f"{tmp_path}/scores.py:bad"}
    result, _ = found(recipe, search={"evaluate": function, "confirm": None})
    failed = {row.number: row.failed for row in result.rows if row.merit is None}
    assert failed == dict.fromkeys((0, 3, 6), "function is no finite number")
    assert result.chosen not in failed
    assert result.improvement is None
    function = {"name": "function", "function": f"{tmp_path}/scores.py:never"}
    with pytest.raises(InputError, match="no candidate has a score: function is no finite number"):
        found(recipe, search={"evaluate": function, "confirm": None}, output=str(tmp_path / "never"))


def test_lorahub_the_score_pays_for_the_size_of_the_weights(recipe: dict[str, Any], tmp_path: Path) -> None:
    wide = {"space": {"models.weight": {"low": -1.5, "high": 1.5}}, "budget": 5, "confirm": None}
    free, _ = found(recipe, search=wide)
    paid, _ = found(recipe, search={**wide, "l1": 0.05}, output=str(tmp_path / "paid"))
    by_number = {row.number: row for row in free.rows}
    for row in paid.rows:
        if row.number and row.values == by_number[row.number].values:
            weights = row.values["models"]["weights"].values()
            cost = 0.05 * sum(map(abs, weights)) / len(weights)
            assert row.merit == pytest.approx((by_number[row.number].merit or 0) - cost)


@pytest.mark.parametrize(
    ("select", "kept"),
    [
        ({"by": "score"}, {1}),
        ({"by": "norm"}, set()),
        ({"by": "closeness", "like": "1"}, {1}),
        ({"by": "random"}, set()),
    ],
)
def test_a_search_may_begin_with_a_selection_of_the_models(
    select: dict[str, Any], kept: set[int], recipe: dict[str, Any]
) -> None:
    result, table = found(recipe, search={"select": {"k": 2, **select}, "sampler": "random", "budget": 3})
    only = {tuple(row.values["models"]["only"]) for row in result.rows if row.number}
    assert len(only) == 1
    assert len(next(iter(only))) == 2
    assert {str(number) for number in kept} <= set(next(iter(only)))
    assert sum(b'"select"' in line for line in table.splitlines()[1:]) == (3 if select["by"] == "score" else 0)


def test_data_that_are_searched_do_not_confirm(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_text('{"text": "a b"}\n')
    (tmp_path / "copy.jsonl").write_text('{"text": "a b"}\n')
    section = {"evaluate": f"loss:{tmp_path}/dev.jsonl", "confirm": f"loss:{tmp_path}/copy.jsonl"}
    with pytest.raises(InputError, match=r"copy.jsonl has the content of .*dev.jsonl"):
        found(recipe, search=section)
    with pytest.raises(InputError, match="holds an evaluation of `evaluate`"):
        found(recipe, search={"confirm": recipe["search"]["evaluate"]})


def test_what_cannot_be_searched_is_said_before_any_work(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="keeps 9 models of 3"):
        found(recipe, search={"select": {"k": 9, "by": "norm"}})
    with pytest.raises(RecipeError, match="the grid has 625 points, and the budget is 8"):
        found(recipe, search={"sampler": "grid"})
    with pytest.raises(RecipeError, match="the search keeps its table in the output"):
        found(recipe, output=str(tmp_path / "{run_id}"))
    assert validate({key: value for key, value in recipe.items() if key != "search"})
    assert search_of(recipe).search.budget == 8


def test_a_table_whose_candidates_the_sampler_does_not_ask_for_is_refused(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    few = {"budget": 4, "confirm": None, "sampler": "random"}
    result, table = found(recipe, search=few)
    lines = table.splitlines()
    row = json.loads(lines[2])
    row["values"]["method.lambda"] = 1e30
    Path(result.table_uri).write_bytes(b"\n".join((*lines[:2], json.dumps(row).encode(), *lines[3:])))
    with pytest.raises(InputError, match="candidate 1 of `search` is not the one that the sampler asks"):
        found(recipe, search=few)
    fresh = ties_ray.search({**recipe, "search": {**recipe["search"], **few}}, fresh=True)
    assert Path(fresh.table_uri).read_bytes() == table
