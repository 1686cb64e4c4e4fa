"""What every integration keeps to, of its own engine in an environment of its own, which calls the real command line.

An engine's tests inherit `Conformance` and name the engine; `drive_ENGINE.py` runs a list of cases in it.
"""

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from tests.conftest import tool
from tests.tools.adapters import make_pool
from ties_ray.operations.promote import Pointer
from ties_ray.stores import Stores

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "tests" / "plugins"
Json = dict[str, Any]
HOUR = 3600


class Conformance:
    """The step contract of one engine."""

    engine: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp(cls.engine)

    @pytest.fixture(scope="class")
    @classmethod
    def told(cls, folder: Path) -> Json:
        """Run all cases but cancellation in one process of the engine, for engines take long to start."""
        adapters, wrong = folder / "pool", recipe(folder, "wrong") | {"densty": 0.3}
        make_pool(Stores({}).of("/"), str(adapters), num_adapters=4)
        grow_old(adapters, [0, 1, 2])
        night = {"nightly": True, "retries": 1}
        grown = ["touch", "-d", "2 hours ago", *map(str, (adapters / "adapter-0003").iterdir())]
        return drive(
            cls.engine,
            folder,
            [
                case(folder, "success", recipe(folder, "done")),
                case(folder, "reuse", recipe(folder, "done")),
                case(folder, "typo", wrong),
                case(folder, "killed", killed_at_the_end(folder, "killed")),
                night | {"id": "first_night"},
                night | {"id": "nothing_new"},
                night | {"id": "rejected", "before": ["sh", "-c", f"{shlex.join(grown)}; touch {folder / 'reject'}"]},
            ],
            nightly_environment(folder),
        )

    def test_a_merge_that_succeeds_hands_its_record_on(self, told: Json, folder: Path) -> None:
        assert told["success"]["state"] == "success"
        assert told["success"]["record"]["status"] == "done"
        assert told["success"]["record"]["output"] == str(folder / "done")
        assert not told["success"]["record"]["reused"]
        assert (folder / "done" / "adapter_model.safetensors").exists()
        assert calls(folder, "success") == 1

    def test_the_same_merge_again_is_reused(self, told: Json, folder: Path) -> None:
        assert told["reuse"]["state"] == "success"
        assert told["reuse"]["record"]["reused"]
        assert calls(folder, "reuse") == 1

    def test_a_recipe_with_a_typo_fails_once_and_is_not_tried_again(self, told: Json, folder: Path) -> None:
        assert told["typo"]["state"] == "failed"
        assert calls(folder, "typo") == 1

    def test_a_merge_that_is_killed_is_tried_again_and_ends_with_the_same_bytes(self, told: Json, folder: Path) -> None:
        assert told["killed"]["state"] == "success"
        assert told["killed"]["record"]["resumed"]
        assert calls(folder, "killed") == 2
        assert contents(folder / "killed") == contents(folder / "done")

    def test_a_night_merges_what_has_settled_and_promotes_it(self, told: Json, folder: Path) -> None:
        night = told["first_night"]
        assert (night["state"], night["promoted"]) == ("success", "success")
        (waits,) = night["record"]["waiting"]
        assert "adapter-0003" in waits
        assert night["record"]["output"] == str(folder / "nightly" / night["record"]["run_id"])
        assert pointer(folder).current.output == night["record"]["output"]

    def test_a_night_with_nothing_new_evaluates_nothing(self, told: Json, folder: Path) -> None:
        assert (told["nothing_new"]["state"], told["nothing_new"]["promoted"]) == ("success", "skipped")
        assert told["nothing_new"]["record"]["reused"]
        evaluated = (folder / "evaluated").read_text().splitlines()
        assert evaluated == [told["first_night"]["record"]["output"], told["rejected"]["record"]["output"]]

    def test_a_merge_that_the_evaluation_rejects_is_not_promoted(self, told: Json, folder: Path) -> None:
        assert (told["rejected"]["state"], told["rejected"]["promoted"]) == ("success", "failed")
        assert told["rejected"]["record"]["output"] != told["first_night"]["record"]["output"]
        assert pointer(folder).current.output == told["first_night"]["record"]["output"]
        assert pointer(folder).previous is None

    def test_a_step_that_is_cancelled_ends_its_merge_in_time_and_can_be_continued(
        self, told: Json, folder: Path
    ) -> None:
        hanging = case(folder, "cancel", hanging_once(folder, "cancelled"))
        with engine_running(self.engine, folder, [hanging], {}) as process:
            marker = folder / "cancelled.trouble" / "0"
            wait_for(marker.exists, (folder / "log").read_text, process)
            merge = psutil.Process(int(marker.read_text()))
            self.cancel(process)
            began = time.monotonic()
            merge.wait(10)
            assert time.monotonic() - began < 3.5
            process.wait(60)
        assert not (folder / "cancelled" / "ties-ray.result.json").exists()
        assert calls(folder, "cancel") == 1
        again = subprocess.run(
            [hanging["program"], "merge", "-", "--json"],
            input=json.dumps(hanging["recipe"]),
            env=os.environ | hanging["env"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        assert json.loads(again.stdout)["resumed"]
        assert contents(folder / "cancelled") == contents(folder / "done")

    def cancel(self, process: subprocess.Popen[bytes]) -> None:
        """Cancel as the engine is cancelled: by a signal to the process that runs the step."""
        process.send_signal(signal.SIGTERM)

    def test_reading_the_definitions_imports_nothing_heavy(self) -> None:
        code = "import sys, importlib, importlib.util; [importlib.import_module(name) for name in sys.argv[1:]]; "
        code += "heavy = ('ties_ray', 'torch', 'ray'); print([name for name in heavy if name in sys.modules]); "
        code += "sys.path.remove(''); print([name for name in heavy if importlib.util.find_spec(name)])"
        modules = (f"ties_ray_{self.engine}", f"ties_ray_{self.engine}.nightly")
        printed = subprocess.check_output([python(self.engine), "-c", code, *modules], cwd=ROOT, text=True)
        assert printed.splitlines()[-2:] == ["[]", "[]"], "imported; installed"


# -- recipes


def recipe(folder: Path, output: str, **more: Any) -> Json:
    """Return the recipe of the three oldest adapters of the pool."""
    pool = folder / "pool"
    return {
        "base": str(pool / "base"),
        "models": [str(pool / f"adapter-{number:04}") for number in range(3)],
        "method": {"name": "ties", "density": 0.3},
        "output": {"path": str(folder / output), "kind": "adapter", "rank": 16},
        "run": {"executor": "local"},
    } | more


def killed_at_the_end(folder: Path, output: str) -> Json:
    """Return the recipe of a merge whose process is killed once, before its weight file becomes visible."""
    point = {"when": "before", "what": "complete_upload", "marker": str(folder / f"{output}.marker")}
    made = recipe(folder, output, storage={"frail": point})
    return made | {"output": made["output"] | {"path": f"frail://{folder / output}"}}


def hanging_once(folder: Path, output: str, **more: Any) -> Json:
    """Return the recipe of a merge that hangs in the midst of its work, the first time."""
    trouble = folder / f"{output}.trouble"
    trouble.mkdir(exist_ok=True)
    parameter = "model.layers.1.self_attn.q_proj.weight"
    method = {"name": "troubled", "density": 0.3, "folder": str(trouble), "trouble": "hang", "parameter": parameter}
    return recipe(folder, output, method=method, **more)


def grow_old(pool: Path, numbers: Sequence[int]) -> None:
    """Let these adapters have lain there for an hour."""
    for number in numbers:
        for file in (pool / f"adapter-{number:04}").iterdir():
            os.utime(file, (time.time() - HOUR,) * 2)


def nightly_environment(folder: Path) -> dict[str, str]:
    """Return what tells the shipped nightly definition what to merge."""
    pool, text = folder / "pool", folder / "nightly.json"
    models = [{"path": f"{pool}/adapter-*/", "settle": 600}]
    output = {"path": f"{folder}/nightly/{{run_id}}", "kind": "adapter", "rank": 16}
    text.write_text(json.dumps(recipe(folder, "") | {"models": models, "output": output}))
    evaluate = folder / "evaluate"
    evaluate.write_text(f'#!/bin/sh\necho "$TIES_RAY_OUTPUT" >> {folder}/evaluated\ntest ! -e {folder}/reject\n')
    evaluate.chmod(0o755)
    return {
        "TIES_RAY_PROGRAM": tool("ties-ray"),
        "TIES_RAY_RECIPE": str(text),
        "TIES_RAY_POINTER": str(folder / "current.json"),
        "TIES_RAY_EVALUATE": str(evaluate),
    }


def pointer(folder: Path) -> Pointer:
    return Pointer.model_validate_json((folder / "current.json").read_bytes())


def contents(folder: Path) -> bytes:
    """Return the bytes of a merged adapter."""
    return (folder / "adapter_model.safetensors").read_bytes()


# -- engines


def python(engine: str) -> str:
    """Return the interpreter of an engine's environment."""
    found = Path(os.environ.get("TIES_RAY_ENGINES", ROOT / ".venv-pipelines")) / engine / "bin" / "python"
    if not found.exists():
        pytest.skip(f"{engine} is not installed: `make pipelines` does")
    return str(found)


def case(folder: Path, name: str, recipe: Json, **more: Any) -> Json:
    """Return a case that runs on this machine; each call of the command line leaves a line in NAME.calls."""
    program = folder / f"{name}.sh"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/{name}.calls\nexec {tool("ties-ray")} "$@"\n')
    program.chmod(0o755)
    plugins = {"TIES_RAY_PLUGINS": str(PLUGINS)}
    return {"id": name, "recipe": recipe, "program": str(program), "env": plugins, "retries": 2} | more


def calls(folder: Path, name: str) -> int:
    return len((folder / f"{name}.calls").read_text().splitlines())


def drive(engine: str, folder: Path, cases: Sequence[Json], environment: Mapping[str, str]) -> Json:
    """Run cases in an engine, and return what it tells of each: state, record, and whether it was promoted."""
    with engine_running(engine, folder, cases, environment) as process:
        process.wait(280)
    told = folder / "told.json"
    assert told.exists(), (folder / "log").read_text()[-5000:]
    found: Json = json.loads(told.read_text())
    return found


class engine_running:
    """A process of an engine at work on cases; it is gone at the end."""

    def __init__(self, engine: str, folder: Path, cases: Sequence[Json], environment: Mapping[str, str]) -> None:
        home, self._log = folder / "home", (folder / "log").open("ab")
        (folder / "told.json").unlink(missing_ok=True)
        (folder / "cases.json").write_text(json.dumps(cases))
        own = {"CASES": str(folder / "cases.json"), "HOME": str(home)}
        own |= {"AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "PREFECT_HOME": str(home)}
        home.mkdir(parents=True, exist_ok=True)
        self._environment = os.environ | own | {"PYTHONWARNINGS": "ignore"} | environment
        self._command = [python(engine), str(Path(__file__).with_name(f"drive_{engine}.py")), str(folder / "told.json")]

    def __enter__(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            self._command, cwd="/", env=self._environment, stdout=self._log, stderr=self._log, start_new_session=True
        )
        return self._process

    def __exit__(self, *_: object) -> None:
        self._log.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def wait_for(
    met: Callable[[], bool],
    told: Callable[[], str],
    process: "subprocess.Popen[bytes] | None" = None,
    seconds: float = 240,
) -> None:
    """Wait until a condition is met, as long as the process runs; `told` explains it if that fails."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, told()[-5000:]
        assert process is None or process.poll() is None, told()[-5000:]
        time.sleep(0.05)
