"""`ties-ray evaluate`: what people and machines see, and its exit codes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import ties_ray
from tests.tools import scored
from ties_ray.cli import commands
from ties_ray.plugins import PLUGIN_FOLDER
from ties_ray.reports import sweep as tables
from ties_ray.stores import Stores

ROWS = [{"text": "the cat sat on a mat"}, {"text": "one two three four five"}]

KILLER = """
import os, signal
from pathlib import Path
from typing import ClassVar, Literal
from ties_ray.evaluations import Better, Evaluation, Evaluator, Measured

class Killer(Evaluation):
    main: ClassVar[str] = "mark"
    name: Literal["killer"] = "killer"
    better: Better = "larger"
    mark: str

    def prepared(self, stores, seed):
        return Kills(self, seed)

class Kills(Evaluator):
    def measure(self, subject):
        if subject.id.endswith("0.9") and not Path(self.evaluation.mark).exists():
            Path(self.evaluation.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Measured(float(subject.id[-3:]), {})
"""
"""An evaluation whose process ends when it comes to the second setting for the first time."""


def run(*words: object) -> Result:
    return CliRunner().invoke(commands.commands, [str(word) for word in words])


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    recipe: dict[str, Any] = {**scored.tuned(tmp_path), "output": str(tmp_path / "sweep" / "{setting}")}
    ties_ray.sweep({**recipe, "grid": {"method.lambda": [0.3, 0.9]}})
    scored.lines(tmp_path / "dev.jsonl", ROWS)
    return tmp_path / "sweep"


def test_a_sweep_is_scored_shown_and_then_listed_by_results(sweep: Path, tmp_path: Path) -> None:
    done = run("evaluate", sweep, "--with", f"loss:{tmp_path}/dev.jsonl", "--with-base")
    assert done.exit_code == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0][:3] == ["scored:", "3", "models"]
    table = {words[0]: words[1] for words in lines if words and words[0] in ("lambda-0.3", "lambda-0.9", "base")}
    assert sum(value.endswith("*") for value in table.values()) <= 1
    listed = run("results", sweep).stdout
    assert table["lambda-0.3"].rstrip("*") in listed
    record = json.loads(run("evaluate", sweep, "--with", f"loss:{tmp_path}/dev.jsonl", "--json").stdout)
    assert [model["reused"] for model in record["models"]] == [1, 1]


def test_a_call_that_is_killed_goes_on_and_ends_with_the_same_table(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "plugins" / "evaluations").mkdir(parents=True)
    (tmp_path / "plugins" / "evaluations" / "killer.py").write_text(KILLER)
    words = [sys.executable, "-m", "ties_ray", "evaluate", str(sweep), "--with", f"killer:{tmp_path}/mark", "--json"]
    environment = dict(os.environ) | {PLUGIN_FOLDER: str(tmp_path / "plugins")}
    before = (sweep / "results.csv").read_text()
    first = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert first.returncode == -signal.SIGKILL
    assert (sweep / "results.csv").read_text() == before
    second = subprocess.run(words, env=environment, capture_output=True, check=True)
    assert [model["reused"] for model in json.loads(second.stdout)["models"]] == [1, 0]
    rows = tables.read(Stores({}), str(sweep)).rows
    assert {row.setting: row.scores for row in rows} == {"lambda-0.3": {"killer": 0.3}, "lambda-0.9": {"killer": 0.9}}


def test_a_bound_and_a_model_that_cant_be_scored_are_exit_code_3(sweep: Path, tmp_path: Path) -> None:
    loss = f"{{name: loss, data: {tmp_path}/dev.jsonl, at_most: 0.001}}"
    done = run("evaluate", tmp_path / "base", "--with", loss)
    assert done.exit_code == 3
    assert "base: loss is" in done.stderr
    assert "[not_approved]" in done.stderr
    done = run("evaluate", sweep.parent, "--with", f"loss:{tmp_path}/dev.jsonl")
    assert done.exit_code == 3
    assert "can't load it" in done.stderr
    assert done.stdout.startswith("scored: 0 of 1 models in")


def test_a_file_a_mapping_and_overrides_may_be_mixed(sweep: Path, tmp_path: Path) -> None:
    file = tmp_path / "evaluations.yaml"
    file.write_text(f"evaluate: {{name: loss, data: {tmp_path}/dev.jsonl}}\nrun: {{workers: 2, executor: local}}\n")
    other = f"{{name: loss, data: {tmp_path}/dev.jsonl, max_length: 4, label: short}}"
    done = run("evaluate", sweep, "--with", file, "--with", other, "--set", "seed=9", "--workers", 1, "--json")
    assert done.exit_code == 0, done.stderr
    scores = json.loads(done.stdout)["models"][0]["scores"]
    assert [(score["label"], score["seed"]) for score in scores] == [("loss", 9), ("short", 9)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no-such-file.yaml", "there is no such recipe"),
        ("lossy:dev.jsonl", "unknown evaluation 'lossy'; did you mean 'loss'?"),
        ("{name: loss}", "evaluate.0.data: Field required"),
    ],
)
def test_a_wrong_evaluation_is_exit_code_2_or_3(tmp_path: Path, text: str, message: str) -> None:
    done = run("evaluate", tmp_path, "--with", text)
    assert done.exit_code in (2, 3)
    assert message in done.stderr


def test_promote_takes_evaluations_files_of_them_and_commands(sweep: Path, tmp_path: Path) -> None:
    file, pointer, output = tmp_path / "evaluations.yaml", tmp_path / "current.json", sweep / "lambda-0.3"
    file.write_text(f"evaluate: {{name: loss, data: {tmp_path}/dev.jsonl, at_most: 0.01}}\n")
    assert run("promote", output, pointer, "--evaluate", file).exit_code == 3
    assert (
        run("promote", output, pointer, "--evaluate", f"loss:{tmp_path}/dev.jsonl", "--evaluate", "false").exit_code
        == 3
    )
    assert not pointer.exists()
    assert run("promote", output, pointer, "--no-worse").exit_code == 2
    assert run("promote", output, pointer, "--evaluate", "true", "--evaluate", "false").exit_code == 2
    done = run(
        "promote", output, pointer, "--evaluate", f"loss:{tmp_path}/dev.jsonl", "--evaluate", "true", "--no-worse"
    )
    assert done.exit_code == 0, done.stderr
