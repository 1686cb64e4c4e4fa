"""`lm_eval`: tasks of lm-evaluation-harness, where it is installed."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.tools import scored
from tests.tools.scored import Folder
from ties_ray.errors import InputError
from ties_ray.evaluations.accuracy import Accuracy
from ties_ray.evaluations.lm_eval import LmEval, _Runs
from ties_ray.stores import Stores

TASK = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean}}, {{metric: acc_bytes, aggregation: mean}}]
"""
IS_THERE = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(IS_THERE, reason="the harness is installed")
def test_without_the_harness_the_remedy_installs_it() -> None:
    with pytest.raises(InputError, match=r"lm_eval: needs lm-evaluation-harness .*; pip install 'ties-ray\[lm-eval\]'"):
        LmEval.model_validate({"tasks": "hellaswag"}).prepared(Stores({}), 0)


def test_the_metric_that_counts_is_the_mean_over_tasks() -> None:
    runs = _Runs(LmEval.model_validate({"tasks": "a, b"}), 0, None)
    results: dict[str, dict[str, Any]] = {
        "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25},
        "b": {"acc,none": 1.0},
    }
    measured = runs._measured(results)
    assert measured.value == 0.75
    assert measured.metrics == {"a/acc": 0.5, "a/acc_norm": 0.25, "b/acc": 1.0}
    with pytest.raises(InputError, match="task b: gives no 'acc,none'; write `metric` with one of these: f1,none"):
        runs._measured(results | {"b": {"f1,none": 1.0}})


@pytest.mark.skipif(not IS_THERE, reason="lm-evaluation-harness is not installed")
@pytest.mark.filterwarnings("default")
def test_the_harness_answers_as_accuracy_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    words = scored.WORDS
    choices = [" cat", " happy and sad", " river"]
    rows = [{"prompt": " ".join(words[at : at + 2]), "choices": choices, "answer": at % 3} for at in range(20)]
    data = scored.lines(tmp_path / "test.jsonl", rows)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.format(data=data))
    scored.causal(tmp_path / "model", seed=5)
    harness = LmEval.model_validate({"tasks": "own_choice", "include_path": str(tmp_path / "tasks")})
    theirs = harness.prepared(Stores({}), 0).score(Folder(tmp_path / "model"))
    ours = Accuracy(data=data).prepared(Stores({}), 0).score(Folder(tmp_path / "model"))
    assert theirs.value == ours.value
    assert theirs.metrics["own_choice/acc_bytes"] == ours.metrics["accuracy_by_byte"]
