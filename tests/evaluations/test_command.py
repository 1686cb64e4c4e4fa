"""`command`: the last line that a program prints is the score."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tools.scored import Folder
from ties_ray.errors import InputError
from ties_ray.evaluations import Score
from ties_ray.evaluations.command import Command
from ties_ray.stores import Stores


def run(tmp_path: Path, text: str, *words: str, **settings: Any) -> Score:
    (tmp_path / "own.py").write_text(text)
    command = Command(command=(sys.executable, str(tmp_path / "own.py"), *words), **settings)
    return command.prepared(Stores({}), 11).score(Folder(tmp_path, run_id="abc"))


def test_the_last_line_is_a_number_or_a_mapping(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "print('loading'); print(0.5); print()").value == 0.5
    assert "loading" in capfd.readouterr().err
    score = run(tmp_path, """print('{"f1": 0.25, "loss": 2}')""", metric="loss", better="smaller")
    assert (score.value, score.better, score.metrics) == (2.0, "smaller", {"f1": 0.25, "loss": 2.0})


def test_a_command_gets_the_folder_the_record_and_the_seed(tmp_path: Path) -> None:
    text = """
import json, os
record = json.load(open(os.environ["TIES_RAY_RESULT"]))
numbers = {"value": 1, "run": record["run_id"] == "abc" or 0.5, "seed": int(os.environ["TIES_RAY_SEED"])}
print(json.dumps(numbers | {"own": len(os.environ["TIES_RAY_OUTPUT"])}))
"""
    assert run(tmp_path, text).metrics == {"value": 1.0, "seed": 11.0, "own": float(len(str(tmp_path)))}


def test_a_line_is_split_into_words_and_no_shell_runs_it(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import sys; print(len(sys.argv))")
    command = Command.model_validate({"command": f"{sys.executable} '{file}' $HOME;ls 'two words'"})
    assert command.prepared(Stores({}), 0).score(Folder(tmp_path)).value == 3


def test_secrets_stand_neither_in_the_record_nor_in_what_is_passed_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "import sys\nprint('token=hunter2')\nprint('s3://me:hunter2@b', file=sys.stderr)\nprint(1)"
    score = run(tmp_path, text, "--api-key", "hunter2")
    printed = capfd.readouterr()
    assert "hunter2" not in score.model_dump_json() + printed.out + printed.err
    assert "token=..." in printed.err
    assert score.evaluation == {"name": "command", "command": [sys.executable, "..."]}


def test_failures_say_what_happened_without_the_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"python\S* ended with 3 \[not_scored\]; see what it printed") as caught:
        run(tmp_path, "raise SystemExit(3)", "--password", "hunter2")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(InputError, match="gives None, which holds no number"):
        run(tmp_path, "print('token=hunter2')")
    with pytest.raises(InputError, match="took longer than its timeout"):
        run(tmp_path, "import time; time.sleep(60)", timeout=0.5)
    with pytest.raises(InputError, match="no-such-program: No such file or directory"):
        Command(command=("no-such-program",)).prepared(Stores({}), 0).score(Folder(tmp_path))


def test_a_flood_of_output_without_lines_takes_no_memory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    score = run(tmp_path, "import sys\nsys.stdout.write('x' * 2**23)\nprint()\nprint(2)")
    assert score.value == 2
    assert len(capfd.readouterr().err) < 2**21
