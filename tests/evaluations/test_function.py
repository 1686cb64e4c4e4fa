"""`function` and the contract that all kinds share."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tests.tools.scored import Folder
from ties_ray.errors import InputError, RecipeError
from ties_ray.evaluations import AnyEvaluation, Evaluation, Evaluations, Score
from ties_ray.evaluations.function import Function, ScoredModel
from ties_ray.stores import Stores


class Holder(BaseModel):
    evaluation: AnyEvaluation


def of(value: object) -> Evaluation:
    return Holder.model_validate({"evaluation": value}).evaluation


def scored(folder: Path, text: str, **settings: Any) -> Score:
    file = folder / "own.py"
    file.write_text(f"def score(model):\n    return {text}\n")
    evaluation = of({"name": "function", "function": f"{file}:score"} | settings)
    return evaluation.prepared(Stores({}), seed=7).score(Folder(str(folder), run_id="abc"))


def test_a_function_gives_a_number_or_a_mapping_with_one_that_counts(tmp_path: Path) -> None:
    assert scored(tmp_path, "0.5").value == 0.5
    assert scored(tmp_path, "{'value': 2, 'other': 3}").metrics == {"value": 2.0, "other": 3.0}
    assert scored(tmp_path, "{'f1': 0.25}").value == 0.25
    score = scored(tmp_path, "{'f1': 0.25, 'loss': 2, 'language': 'en'}", metric="loss", better="smaller")
    assert (score.value, score.better, score.merit) == (2.0, "smaller", -2.0)
    assert score.metrics == {"f1": 0.25, "loss": 2.0}
    with pytest.raises(InputError, match="gives no number 'value'; write `metric` with one of these: a, b"):
        scored(tmp_path, "{'a': 1, 'b': 2}")
    with pytest.raises(InputError, match="gives 'high', which holds no number"):
        scored(tmp_path, "'high'")


def test_a_function_sees_the_path_the_record_and_the_seed(tmp_path: Path) -> None:
    text = "{'value': len(model.path), 'seed': model.seed, 'run': model.record['run_id'] == 'abc' and 1.0}"
    score = scored(tmp_path, text)
    assert score.metrics == {"value": len(str(tmp_path)), "seed": 7.0, "run": 1.0}
    assert score.seed == 7
    assert score.versions.keys() == {"python", "ties-ray", "torch", "transformers"}


def test_a_score_that_is_no_number_survives_json_and_has_the_least_merit(tmp_path: Path) -> None:
    score = scored(tmp_path, "float('nan')")
    assert math.isnan(score.value)
    assert score.merit == -math.inf
    again = Score.model_validate_json(json.dumps(json.loads(score.model_dump_json()), allow_nan=False))
    assert math.isnan(again.value)
    assert not of("function:own:score").approves(score)


def test_bounds_approve_a_score(tmp_path: Path) -> None:
    score = scored(tmp_path, "0.5")
    bounded = [of({"name": "function", "function": "own:score", **bounds}) for bounds in (
        {"at_least": 0.5}, {"at_least": 0.51}, {"at_most": 0.5}, {"at_most": 0.49})]  # fmt: skip
    assert [each.approves(score) for each in bounded] == [True, False, True, False]


def test_a_module_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_scores_here.py").write_text("def score(model): return 3\n")
    monkeypatch.chdir(tmp_path)
    evaluation = of("function:own_scores_here:score")
    assert isinstance(evaluation, Function)
    assert evaluation.prepared(Stores({}), 0).score(Folder(str(tmp_path))).value == 3


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no_such_module:score", "can't be imported: ModuleNotFoundError"),
        ("json:no_such_function", "json has no function no_such_function"),
        ("nowhere/file.py:score", "can't be imported: FileNotFoundError"),
    ],
)
def test_a_function_that_is_not_there_is_refused_before_any_work(place: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        of({"name": "function", "function": place}).prepared(Stores({}), 0)


def test_evaluations_are_named_and_labelled() -> None:
    with pytest.raises(ValidationError, match="unknown evaluation 'functon'; did you mean 'function'"):
        of({"name": "functon"})
    with pytest.raises(ValidationError, match="needs `name`: one of"):
        of({"function": "a:b"})
    with pytest.raises(ValidationError, match="two evaluations are labelled 'function'"):
        Evaluations.model_validate({"evaluate": ["function:a:b", "function:a:c"]})
    both = Evaluations.model_validate(
        {"evaluate": ["function:a:b", {"name": "function", "function": "a:c", "label": "c"}]}
    )
    assert [each.shown() for each in both.evaluate] == [
        {"name": "function", "function": "a:b"},
        {"name": "function", "function": "a:c", "label": "c"},
    ]
    assert Evaluations.model_validate_json(both.model_dump_json()) == both


def test_a_scored_model_refuses_a_class_that_transformers_lacks(tmp_path: Path) -> None:
    from ties_ray.evaluations._models import Loader

    with pytest.raises(InputError, match="AutoModelForNothing: is no class of transformers"):
        ScoredModel(Folder(str(tmp_path)), Loader(Function(function="a:b")), 0).model("AutoModelForNothing")


def test_what_a_function_raises_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"own\.py:score: ZeroDivisionError: division by zero \(line 2 of .*own\.py\)"):
        scored(tmp_path, "1 / 0")
