"""Merges, sweeps and folders are scored, and their scores stored beside them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ties_ray
from tests.tools import scored
from tests.tools.scored import Folder
from ties_ray.errors import InputError, RecipeError
from ties_ray.evaluations.loss import Loss
from ties_ray.reports import scores as records
from ties_ray.reports import sweep as tables
from ties_ray.reports.scores import Scores
from ties_ray.stores import Stores

STORES = Stores({})
ROWS = [{"text": "the cat sat on a mat"}, {"prompt": "one two", "completion": " three four five"}]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return scored.lines(tmp_path / "dev.jsonl", ROWS)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return scored.tuned(tmp_path)


def swept(recipe: Mapping[str, Any], tmp_path: Path, **more: Any) -> Any:
    grid = {"method.lambda": [0.3, 0.9]}
    return ties_ray.sweep({**recipe, "output": str(tmp_path / "sweep" / "{setting}"), "grid": grid, **more})


def by_hand(folder: Path | str, data: str) -> float:
    return Loss(data=data).prepared(STORES, 0).score(Folder(folder)).value


def values(scores: Scores, label: str = "loss") -> dict[str, float]:
    return {model.model: score.value for model in scores.models for score in model.scores if score.label == label}


def test_a_merge_is_scored_and_its_score_lies_beside_it(recipe: dict[str, Any], tmp_path: Path, data: str) -> None:
    merged = ties_ray.merge({**recipe, "output": str(tmp_path / "merged")})
    scores = ties_ray.evaluate(merged.output, {"name": "loss", "data": data}, with_base=True)
    assert values(scores) == {name: by_hand(tmp_path / name, data) for name in ("merged", "base")}
    stored = json.loads((tmp_path / "merged" / "ties-ray.scores.json").read_text())
    assert stored["run_id"] == merged.run_id
    (score,) = stored["scores"]
    assert (score["value"], score["label"], score["better"]) == (values(scores)["merged"], "loss", "smaller")
    assert score["evaluation"] == {"name": "loss", "data": data}
    assert score["pins"][0]["uri"] == data
    assert not (tmp_path / "base" / "ties-ray.scores.json").exists()
    assert not ties_ray.verify(merged.output).problems


def test_a_stored_score_is_used_again_while_nothing_differs(recipe: dict[str, Any], tmp_path: Path, data: str) -> None:
    output = ties_ray.merge({**recipe, "output": str(tmp_path / "merged")}).output

    def reused(evaluation: Mapping[str, Any], **more: Any) -> int:
        return sum(model.reused for model in ties_ray.evaluate(output, evaluation, **more).models)

    own = {"name": "loss", "data": data}
    assert reused(own) == 0
    assert reused(own) == 1
    assert reused({**own, "at_most": 1e9}) == 1, "bounds change no score"
    assert reused(own, fresh=True) == 0
    assert reused({**own, "max_length": 5}) == 0
    assert reused(own, seed=1) == 0
    Path(data).write_text(Path(data).read_text() * 2)
    assert reused(own, seed=1) == 0
    assert reused(own, seed=1) == 1
    assert reused({**own, "label": "other"}, seed=1) == 0
    stored = records.read(STORES, output, ties_ray.status(output).result.run_id)  # type: ignore[union-attr]
    assert [score.label for score in stored] == ["loss", "other"]
    assert records.read(STORES, output, "another merge") == []


@pytest.mark.parametrize("content", ["{", '{"run_id": "x", "scores": [{"value": 1}]}', "[" * 9999, "0," * 9_000_000])
def test_stored_scores_that_are_none_are_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "ties-ray.scores.json").write_text(content)
    with pytest.raises(InputError, match=r"ties-ray\.scores\.json: this ties_ray can't read it as scores"):
        records.read(STORES, str(tmp_path), "x")


def test_all_settings_of_a_sweep_are_scored_into_its_table(recipe: dict[str, Any], tmp_path: Path, data: str) -> None:
    swept(recipe, tmp_path)
    folder = str(tmp_path / "sweep")
    scores = ties_ray.evaluate([folder, str(tmp_path / "base")], [f"loss:{data}"])
    names = ["lambda-0.3", "lambda-0.9"]
    assert values(scores) == {
        **{name: by_hand(tmp_path / "sweep" / name, data) for name in names},
        "base": by_hand(tmp_path / "base", data),
    }
    best = scores.best("loss")
    assert best is not None
    assert best.model == min(values(scores), key=values(scores).__getitem__)
    table = tables.read(STORES, folder)
    assert [row.scores for row in table.rows] == [{"loss": values(scores)[name]} for name in names]
    assert "loss" in (tmp_path / "sweep" / "results.csv").read_text().splitlines()[0].split(",")
    import pandas

    frame = pandas.read_parquet(tmp_path / "sweep" / "results.parquet")
    assert frame["loss"].tolist() == [values(scores)[name] for name in names]
    again = swept(recipe, tmp_path)
    assert [row.scores for row in again.rows] == [row.scores for row in table.rows], "sweeping again keeps them"


def test_a_table_can_not_lead_outside_of_its_folder(recipe: dict[str, Any], tmp_path: Path, data: str) -> None:
    swept(recipe, tmp_path)
    other = ties_ray.merge({**recipe, "output": str(tmp_path / "other")})
    table = tmp_path / "sweep" / "results.json"
    table.write_text(table.read_text().replace(str(tmp_path / "sweep" / "lambda-0.3"), other.output))
    with pytest.raises(InputError, match=r"its table names .*other, which lies outside of it"):
        ties_ray.evaluate(tmp_path / "sweep", f"loss:{data}")
    assert not (tmp_path / "other" / "ties-ray.scores.json").exists()


def test_a_sweep_that_is_interrupted_goes_on_with_what_is_stored(
    recipe: dict[str, Any], tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept(recipe, tmp_path)
    add = records.add

    def killed(stores: Stores, output: str, run_id: str, scores: Sequence[Any]) -> str:
        add(stores, output, run_id, scores)
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        ties_ray.evaluate(tmp_path / "sweep", f"loss:{data}")
    monkeypatch.setattr(records, "add", add)
    scores = ties_ray.evaluate(tmp_path / "sweep", f"loss:{data}")
    assert sorted(model.reused for model in scores.models) == [0, 1], "workers score in no order"
    assert [len(row.scores) for row in tables.read(STORES, str(tmp_path / "sweep")).rows] == [1, 1]


def test_several_evaluations_and_bounds_are_told_apart(recipe: dict[str, Any], tmp_path: Path, data: str) -> None:
    (tmp_path / "own.py").write_text("def size(model): return sum(p.numel() for p in model.model().parameters())\n")
    file = tmp_path / "evaluations.yaml"
    file.write_text(f"""
seed: 4
evaluate:
  - {{name: loss, data: {data}, at_most: 0.1}}
  - {{name: function, function: "{tmp_path}/own.py:size", label: size, at_least: 10}}
""")
    scores = ties_ray.evaluate(tmp_path / "base", file)
    assert [score.label for score in scores.models[0].scores] == ["loss", "size"]
    assert scores.models[0].scores[0].seed == 4
    (rejected,) = scores.rejected
    assert rejected.startswith("base: loss is ")
    assert rejected.endswith("and at_most 0.1 is asked for")


def test_a_model_that_cant_be_scored_has_problems_and_others_have_scores(
    recipe: dict[str, Any], tmp_path: Path, data: str
) -> None:
    (tmp_path / "empty").mkdir()
    scores = ties_ray.evaluate([tmp_path / "empty", tmp_path / "base"], f"loss:{data}")
    assert list(values(scores)) == ["base"]
    assert "AutoModelForCausalLM can't load it" in scores.models[0].problems[0].what


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's use of it
def test_a_merged_adapter_is_scored_on_the_base_that_its_merge_names(tmp_path: Path, data: str) -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    for number in range(2):
        base = scored.causal(tmp_path / "base")
        torch.manual_seed(number)
        peft.get_peft_model(base, config).save_pretrained(tmp_path / f"adapter-{number}")
    models = [str(tmp_path / f"adapter-{number}") for number in range(2)]
    recipe = {"base": str(tmp_path / "base"), "models": models, "method": "average", "run": {"executor": "local"}}
    whole = ties_ray.merge({**recipe, "output": str(tmp_path / "whole")}).output
    adapter = ties_ray.merge({**recipe, "output": {"path": str(tmp_path / "adapter"), "kind": "adapter"}}).output
    scores = values(ties_ray.evaluate([whole, adapter], f"loss:{data}", with_base=True))
    assert scores["adapter"] == pytest.approx(scores["whole"], rel=1e-5)
    assert abs(scores["adapter"] - scores["base"]) > 1e-4


def test_workers_score_in_parallel_and_give_the_same_values(recipe: dict[str, Any], tmp_path: Path, data: str) -> None:
    swept(recipe, tmp_path)
    one = ties_ray.evaluate(tmp_path / "sweep", f"loss:{data}")
    two = ties_ray.evaluate(tmp_path / "sweep", f"loss:{data}", fresh=True, run={"workers": 2, "executor": "local"})
    assert values(one) == values(two)
    assert sum(model.reused for model in two.models) == 0


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"name": "loss", "datta": "x"}, r"evaluate\.0\.datta: unknown key; did you mean 'data'"),
        ({"name": "loss"}, r"evaluate\.0\.data: Field required"),
        ({"name": "los"}, "unknown evaluation 'los'; did you mean 'loss'"),
        ({"name": "loss", "data": "x", "batch_size": 0}, r"evaluate\.0\.batch_size: .*greater than or equal to 1"),
    ],
)
def test_a_wrong_evaluation_is_told_with_its_place(tmp_path: Path, evaluation: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ties_ray.evaluate(tmp_path, evaluation)


def test_a_base_that_no_merge_names_is_refused(tmp_path: Path, data: str) -> None:
    with pytest.raises(InputError, match="no merge among these names its base"):
        ties_ray.evaluate(tmp_path, f"loss:{data}", with_base=True)


def test_a_promotion_asks_for_bounds_and_for_scores_no_worse_than_the_current_ones(
    recipe: dict[str, Any], tmp_path: Path, data: str
) -> None:
    swept(recipe, tmp_path)
    loss, pointer = {"name": "loss", "data": data}, tmp_path / "current.json"
    scores = values(ties_ray.evaluate(tmp_path / "sweep", loss))
    better, worse = (str(tmp_path / "sweep" / name) for name in sorted(scores, key=scores.__getitem__))
    with pytest.raises(InputError, match=r"loss is .*, and at_most 0\.1 is asked for \[not_approved\]; the pointer is"):
        ties_ray.promote(better, pointer, evaluations={**loss, "at_most": 0.1})
    assert not pointer.exists()
    assert ties_ray.promote(better, pointer, evaluations={**loss, "at_most": 1e3}, no_worse=True).changed
    with pytest.raises(InputError, match=rf"{worse}: loss is .*, and .* in {better} \[not_approved\]"):
        ties_ray.promote(worse, pointer, evaluations=loss, no_worse=True)
    assert ties_ray.promote(worse, pointer, evaluations=loss).changed
    assert ties_ray.promote(better, pointer, evaluations=loss, no_worse=True).changed


def test_a_report_shows_the_scores_that_lie_beside_the_merge(recipe: dict[str, Any], tmp_path: Path, data: str) -> None:
    output = ties_ray.merge({**recipe, "output": str(tmp_path / "merged")}).output
    scores = ties_ray.evaluate(output, {"name": "loss", "data": data, "label": "<i>held out</i>"})
    report = ties_ray.report(output)
    assert [score.value for score in report.scores] == list(values(scores, "<i>held out</i>").values())
    page = report.html()
    assert "&lt;i&gt;held out&lt;/i&gt;" in page
    assert "<i>held" not in page


def test_on_ray_each_model_is_a_task_and_the_scores_are_those_of_this_process(
    ray_cluster: None, recipe: dict[str, Any], tmp_path: Path, data: str
) -> None:
    swept(recipe, tmp_path)
    here = values(ties_ray.evaluate(tmp_path / "sweep", f"loss:{data}", run={"executor": "local"}))
    run = {"executor": "ray", "workers": 2}
    assert values(ties_ray.evaluate(tmp_path / "sweep", f"loss:{data}", fresh=True, run=run)) == pytest.approx(here)
