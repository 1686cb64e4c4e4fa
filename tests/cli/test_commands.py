import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import ties_ray
from tests.conftest import Bucket, tool
from tests.tools.adapters import write_adapter
from tests.tools.families import Family, make_family, write_checkpoint
from tests.tools.merging import LOCAL, digests, merge, recipe_of
from ties_ray.cli import commands
from ties_ray.reports.records import RESULT_NAME, MergeResult
from ties_ray.stores import Stores

TIES: dict[str, object] = {"name": "ties", "density": 0.3}
SLOW = '''
import os, time
from typing import ClassVar, Literal
from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Method, Result, Round

class Slow(Method):
    """Looks at the models once, then adds them up, and sleeps as long as a certain file is there."""

    name: Literal["slow"] = "slow"
    fails: bool = False
    """Whether planning trips over itself."""
    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "none"

    def problems(self, members):
        return ["not a problem at all"[100]] if self.fails else []

    def rounds(self):
        return (Round("look", self._look), Round("merge", self._merge))

    def _look(self, deltas, context):
        return Result(statistics={"seen": sum(one.delta.numel() for one in deltas)})

    def _merge(self, deltas, context):
        while os.path.exists(os.environ["SLOW_WHILE"]):
            time.sleep(0.1)
        return Result(merged=deltas.fold(WeightedSum(tuple(Term(1.0) for _ in context.members)))["sum"])
'''


def run(*words: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(commands.commands, [str(word) for word in words], input=stdin)


def start(*words: object, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [tool("ties-ray"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def written(family: Family, folder: Path, method: object = TIES, **more: Any) -> Path:
    """Write a recipe that merges a family into `folder`/out; return the file."""
    recipe = recipe_of(family, folder / "out", method, **more)
    path = folder / "recipe.json"
    path.write_text(recipe.model_dump_json(exclude_unset=True))
    return path


@pytest.fixture
def recipe(family_of: Callable[..., Family], tmp_path: Path) -> Path:
    return written(family_of(num_models=3), tmp_path)


# -- what it costs to ask


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["--version"]])
def test_help_takes_neither_torch_nor_ray_nor_pydantic(words: list[str]) -> None:
    code = "import sys; from ties_ray.cli import commands; commands.commands(sys.argv[1:], standalone_mode=False);"
    code += "sys.exit(bool({'torch', 'ray', 'pydantic', 'numpy', 'rich'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_takes_less_than_300_ms_of_a_cpu() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([tool("ties-ray"), "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3


def test_every_command_explains_itself_with_an_example() -> None:
    for name in ("plan", "merge", "status", "verify", "clean", "inspect", "methods", "schema"):
        assert f"ties-ray {name}" in run(name, "--help").stdout
    assert "_TIES_RAY_COMPLETE" in run("--help").stdout


def test_python_runs_the_package_as_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "ties_ray", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ties-ray, version {ties_ray.__version__}\n"


# -- the road


def test_plan_says_the_same_to_machines_as_the_plan_itself(recipe: Path) -> None:
    done = run("plan", recipe, "--json")
    printed = json.loads(done.stdout)
    planned = ties_ray.plan(recipe)
    assert done.exit_code == 0
    assert printed["run_id"] == planned.run_id
    assert printed["bytes_read"] == planned.bytes_read == sum(each["bytes_read"] for each in printed["rounds"])
    assert printed["bytes_written"] == planned.bytes_written == sum(each["size"] for each in printed["files"])
    assert printed["memory"] == planned.memory
    assert [model["id"] for model in printed["models"]] == ["0", "1", "2"]
    assert "sources" not in done.stdout
    assert len(json.loads(run("plan", recipe, "--json", "--full").stdout)["catalog"]["models"]) == 3


def test_plan_tells_people_inputs_method_rounds_output_and_memory(recipe: Path) -> None:
    printed = run("plan", recipe).stdout
    planned = ties_ray.plan(recipe)
    for word in ("models (3)", "density 0.3", "threshold, high bits", planned.output, "beyond its imports", "BF16"):
        assert word in printed
    assert not Path(planned.output).exists()


def test_plan_says_what_a_worker_takes_of_a_gpu_and_how_many_share_it(recipe: Path) -> None:
    assert "share one" not in run("plan", recipe, "--no-rates").stdout
    assert "a worker; at most 4 share one" in run("plan", recipe, "--set", "run.device=cuda").stdout


def test_a_merge_is_done_then_recognised_then_verified(recipe: Path, tmp_path: Path) -> None:
    first = run("merge", recipe)
    assert first.exit_code == 0
    assert f"done: {tmp_path / 'out'}" in first.stdout
    assert "merge: " in first.stderr  # progress, a line a stage
    before = digests(tmp_path / "out")

    again = run("merge", recipe, "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["reused"] is True
    assert digests(tmp_path / "out") == before

    for folder in (tmp_path / "out", recipe):
        assert "finished" in run("status", folder).stdout
        assert run("verify", folder).exit_code == 0


def test_a_summary_names_thresholds_shares_and_what_to_try_next(recipe: Path) -> None:
    printed = run("merge", recipe).stdout
    for word in ("threshold", "kept", "ties-ray verify", "from_pretrained", "--set method.density=0.2"):
        assert word in printed


def test_quiet_says_nothing_and_json_only_json(recipe: Path, tmp_path: Path) -> None:
    quiet = run("merge", recipe, "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    printed = run("merge", recipe, "--json", "--fresh", "--result", tmp_path / "record.json")
    record = MergeResult.model_validate_json(printed.stdout)
    assert record.status == "done"
    assert not record.reused
    assert (tmp_path / "record.json").read_text() == printed.stdout
    assert (tmp_path / "out" / RESULT_NAME).read_text() == printed.stdout


def test_a_recipe_comes_from_standard_input_and_set_overrides_it(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    words = ("merge", "-", "--json", "--set", f"output.path={other}", "--set", "method.density=1")
    printed = json.loads(run(*words, stdin=recipe.read_text()).stdout)
    assert printed["output"] == str(other)
    assert printed["trims"] == []  # density 1 trims nothing


def test_a_recipe_and_its_results_lie_in_a_bucket(s3_bucket: Bucket) -> None:
    stores = Stores(s3_bucket.storage)
    store, endpoint = stores.of(s3_bucket.uri), str(s3_bucket.storage["s3"]["endpoint_url"])
    family = make_family(store, s3_bucket.uri, num_models=2)
    recipe = recipe_of(family, f"{s3_bucket.uri}/out-{{run_id}}", TIES, storage=s3_bucket.storage)
    result_uri, storage = f"{s3_bucket.uri}/record.json", ("--set", f"storage.s3.endpoint_url={endpoint}")
    printed = run("merge", "-", "--json", "--result", result_uri, stdin=recipe.model_dump_json(exclude_unset=True))
    assert printed.exit_code == 0, printed.stderr
    assert store.get(result_uri, 2**20)[1].decode() == printed.stdout
    output = json.loads(printed.stdout)["output"]
    assert output == f"{s3_bucket.uri}/out-{json.loads(printed.stdout)['run_id']}"

    checked = json.loads(run("verify", output, "--json", *storage).stdout)
    assert (checked["problems"], checked["notes"]) == ([], [])
    assert checked["files"][0]["parts_proved"] == checked["files"][0]["parts"] == 1
    assert "finished" in run("status", output, *storage).stdout
    inspected = json.loads(run("inspect", f"{s3_bucket.uri}/model-*", "--json", *storage).stdout)
    assert [folder["format"] for folder in inspected["folders"]] == ["checkpoint", "checkpoint"]


def test_ray_starts_by_itself_and_writes_the_bytes_of_the_local_executor(recipe: Path, tmp_path: Path) -> None:
    ray = start("merge", recipe, "--json", "--set", "run.executor=ray", "--set", "run.workers=2",
                "--set", f"output.path={tmp_path / 'by-ray'}")  # fmt: skip
    printed, errors = ray.communicate(timeout=200)
    assert ray.returncode == 0, errors
    assert json.loads(printed)["status"] == "done"
    assert run("merge", recipe).exit_code == 0
    assert digests(tmp_path / "by-ray") == digests(tmp_path / "out")


# -- what goes wrong


def test_a_wrong_recipe_is_refused_with_every_problem_on_a_line_of_its_own(recipe: Path) -> None:
    done = run("merge", recipe, "--set", "method.densty=0.3", "--set", "models.1.weight=heavy")
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert "method.densty: unknown key; did you mean 'density'?" in done.stderr
    assert "models.1.weight" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_failure_leaves_a_result_record_too(recipe: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    words = ("--json", "--result", tmp_path / "record.json", "--set", f"models.0.path={missing}")
    done = run("merge", recipe, *words)
    assert done.exit_code == 3
    record = MergeResult.model_validate_json((tmp_path / "record.json").read_text())
    assert record == MergeResult.model_validate_json(done.stdout)
    assert record.status == "failed"
    assert record.error
    assert (record.error.kind, record.error.retryable) == ("input", False)
    assert str(missing) in record.error.message
    assert str(missing) in done.stderr


def test_a_failure_past_the_plan_names_the_run(recipe: Path, tmp_path: Path) -> None:
    assert run("merge", recipe, "--quiet").exit_code == 0
    done = run("merge", recipe, "--json", "--set", "method.density=0.4")
    record = MergeResult.model_validate_json(done.stdout)
    assert done.exit_code == 3
    assert record.run_id == ties_ray.plan(ties_ray.load_recipe(recipe, ["method.density=0.4"])).run_id
    assert record.output == str(tmp_path / "out")
    assert "holds the result of another merge" in done.stderr


def test_a_problem_of_an_input_tells_the_line_of_the_recipe(recipe: Path, tmp_path: Path) -> None:
    base = json.loads(recipe.read_text())["base"]
    path = tmp_path / "lines.yaml"
    path.write_text(f"base: {base}\nmodels:\n  - {base}-not-there\nmethod: average\noutput: {tmp_path}/o\n")
    done = run("plan", path)
    assert done.exit_code == 3
    assert f"error: {path}, line 3: models.0: {base}-not-there: there is nothing" in done.stderr


def test_options_for_what_is_typed_most_are_overrides(recipe: Path, tmp_path: Path) -> None:
    done = run("merge", recipe, "-o", tmp_path / "of mine", "--workers", 1, "--executor", "local", "--json", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "of mine")
    assert "--workers" in run("merge", recipe, "--worker", 3).stderr
    wrong = run("merge", recipe, "--executor", "slurm")
    assert wrong.exit_code == 2
    assert "unknown executor 'slurm'" in wrong.stderr


def test_a_result_that_can_not_be_written_fails_the_command(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("merge", recipe, "--quiet", "--result", tmp_path / "file" / "record.json")
    assert done.exit_code == 3
    assert "record.json" in done.stderr


@pytest.mark.parametrize("words", [["plan"], ["status"], ["verify"], ["inspect"]])
def test_errors_are_json_where_json_is_asked_for(words: list[str], tmp_path: Path) -> None:
    done = run(*words, tmp_path / "none.yaml", "--json")
    printed = json.loads(done.stdout)
    assert done.exit_code == 3
    problem = printed["folders"][0]["problems"][0]["what"] if words == ["inspect"] else printed["error"]["message"]
    assert "there is no" in problem


def test_an_unknown_method_is_named_with_the_likely_one() -> None:
    done = run("methods", "tie")
    assert done.exit_code == 2
    assert "did you mean 'ties'?" in done.stderr


def test_without_a_recipe_only_storage_can_be_set(tmp_path: Path) -> None:
    done = run("status", tmp_path, "--set", "method.density=1")
    assert done.exit_code == 2
    assert "only `storage`" in done.stderr
    secret = run("status", "s3://bucket/x", "--set", "storage.s3.secret_access_key=very-secret")
    assert secret.exit_code == 2
    assert "very-secret" not in secret.stderr


def test_a_folder_without_a_merge_says_so(tmp_path: Path) -> None:
    assert "holds no merge" in run("status", tmp_path).stdout
    verified = run("verify", tmp_path)
    assert verified.exit_code == 3
    assert "no finished merge" in verified.stderr


def test_verify_ends_with_3_and_names_what_is_damaged(recipe: Path, tmp_path: Path) -> None:
    assert run("merge", recipe, "--quiet").exit_code == 0
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = run("verify", tmp_path / "out")
    assert done.exit_code == 3
    assert "error: model.safetensors: the bytes [0, " in done.stderr


def test_verify_merges_a_sample_again_and_writes_sums_when_asked(recipe: Path, tmp_path: Path) -> None:
    assert run("merge", recipe, "--quiet").exit_code == 0
    done = run("verify", tmp_path / "out", "--sample", "0.5", "--seed", "3", "--sha256")
    assert done.exit_code == 0, done.stderr
    assert "merged again: " in done.stdout
    assert "sample: " in done.stderr
    assert "model.safetensors" in (tmp_path / "out" / "SHA256SUMS").read_text()
    assert run("verify", tmp_path / "out", "--sample", "1.5").exit_code == 2

    model = Path(json.loads((tmp_path / "out" / RESULT_NAME).read_text())["provenance"]["models"][0]["objects"][0][0])
    aside = model.rename(model.with_name("aside"))
    done = run("verify", tmp_path / "out", "--sample", "0.5")
    aside.rename(model)
    assert done.exit_code == 3
    assert "can't be merged again: changed since the plan was made: the file is gone" in done.stderr


def test_inspect_ends_with_3_where_a_folder_could_not_be_merged(tmp_path: Path) -> None:
    write_checkpoint(Stores({}).of("/"), str(tmp_path / "good"), {})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "pytorch_model.bin").write_bytes(b"")
    done = run("inspect", tmp_path / "*")
    assert done.exit_code == 3
    assert "pickles" in done.stderr
    assert str(tmp_path / "good") in done.stdout


# -- signals and defects, in processes of their own


@pytest.fixture
def slow(family_of: Callable[..., Family], tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Return a recipe whose merge takes as long as a file is there, and the environment it needs."""
    plugins = tmp_path / "plugins" / "methods"
    plugins.mkdir(parents=True)
    (plugins / "slow.py").write_text(SLOW)
    family = family_of(num_models=3)
    recipe = {
        "base": family.base, "models": family.models, "method": "slow",
        "output": str(tmp_path / "out"), "run": {"executor": "local"},
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "sleep").touch()
    return tmp_path / "recipe.json", {
        "TIES_RAY_PLUGINS": str(tmp_path / "plugins"),
        "SLOW_WHILE": str(tmp_path / "sleep"),
    }


def within() -> float:
    """Return the seconds in which a signal ends a command: 3, and more where processes wait for a core."""
    return 3 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.mark.parametrize(
    ("number", "executor"), [(signal.SIGTERM, "local"), (signal.SIGINT, "local"), (signal.SIGTERM, "ray")]
)
def test_a_signal_ends_a_busy_merge_within_seconds_and_the_same_command_continues(
    slow: tuple[Path, dict[str, str]], tmp_path: Path, number: signal.Signals, executor: str
) -> None:
    recipe, environment = slow
    words = ("merge", recipe, "--json", "--result", tmp_path / "record.json",
             "--set", f"run.executor={executor}", "--set", "run.workers=1")  # fmt: skip
    process = start(*words, **environment)
    assert process.stderr
    lines = _read_until(process.stderr, "merge: ")
    process.send_signal(number)
    began = time.monotonic()
    printed, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < within(), lines
    assert process.returncode == 128 + number

    record = MergeResult.model_validate_json(printed)
    assert record == MergeResult.model_validate_json((tmp_path / "record.json").read_text())
    assert record.error
    assert (record.error.kind, record.error.retryable) == ("cancelled", True)
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == []
    printed = run("status", tmp_path / "out").stdout  # by a process that lacks the plugin
    assert "unfinished" in printed
    assert "can't read the stored plan" in printed

    (tmp_path / "sleep").unlink()
    again = start(*words, **environment)
    printed, errors = again.communicate(timeout=100)
    assert again.returncode == 0, errors
    record = MergeResult.model_validate_json(printed)
    assert record.resumed
    assert record.shards_done_before == 1  # what the first round found was kept
    assert run("verify", tmp_path / "out").exit_code == 0


PHASES = [
    ("plan", "list", "*/base"),  # which folders and files there are
    ("inspect", "list", "*/base"),
    ("plan", "head", "*.safetensors"),  # headers
    ("plan", "head", "*/config.json"),
    ("plan", "read", "*.safetensors"),  # rates
    ("merge", "put", "*/plan*"),  # the stored plan
    ("merge", "read", "*.safetensors"),  # rounds
    ("merge", "write_part", "*"),
    ("merge", "put", "*/records/*"),
    ("merge", "complete_upload", "*"),  # publication
    ("merge", "put", "*/README.md"),
    ("merge", "put", "*/ties-ray.result.json"),
    ("verify", "read", "*.safetensors"),
    ("status", "head", "*.json"),
]


@pytest.mark.parametrize(("command", "action", "uri"), PHASES)
def test_a_signal_ends_every_phase_within_seconds_also_inside_a_library(
    family_of: Callable[..., Family], tmp_path: Path, command: str, action: str, uri: str
) -> None:
    family = family_of(num_models=2)
    if command in ("verify", "status"):
        merge(family, tmp_path / "out", TIES)
    point = {"what": action, "uri": uri, "marker": str(tmp_path / "marker"), "how": "hang"}
    data = {
        "base": f"frail://{family.base}", "models": [f"frail://{uri}" for uri in family.models], "method": TIES,
        "output": f"frail://{tmp_path}/out", "run": LOCAL, "storage": {"frail": point},
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    storage = ["--set", f"storage.frail={json.dumps(point)}"]
    words = [f"frail://{family.base}", *storage] if command == "inspect" else [tmp_path / "recipe.json"]
    process = start(command, *words, TIES_RAY_PLUGINS=str(Path(__file__).parents[1] / "plugins"))
    try:
        while process.poll() is None and not (tmp_path / "marker").exists():
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, errors = process.communicate(timeout=30)
        assert time.monotonic() - began < within()
        assert process.returncode == 143, errors
        assert (tmp_path / "marker").exists()
    finally:
        process.kill()


def test_a_signal_while_the_heavy_imports_run_ends_the_command_as_well(slow: tuple[Path, dict[str, str]]) -> None:
    recipe, environment = slow
    process = start("merge", recipe, "--quiet", **environment)
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - began < within()
    assert process.returncode == 143, errors


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_signal_ends_a_merge_within_seconds_while_linear_algebra_runs(tmp_path: Path, executor: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for number in range(2):  # small files, whose product is a matrix that takes LAPACK ten seconds and more
        a, b = torch.randn(4, 14336, generator=generator), torch.randn(4096, 4, generator=generator)
        folder = str(tmp_path / f"adapter-{number}")
        write_adapter(Stores({}).of(folder), folder, {"model.layers.0.mlp.down_proj": (a, b, 4.0)})
    recipe = tmp_path / "recipe.json"
    data = {
        "models": [str(tmp_path / "adapter-*")],
        "method": {"name": "ties", "density": 1},
        "output": {"path": str(tmp_path / "out"), "kind": "adapter", "rank": 512},
        "run": {"executor": executor, "workers": 1, "memory": "2GB"},
    }
    recipe.write_text(json.dumps(data))
    process = start("merge", recipe)
    assert process.stderr
    lines = _read_until(process.stderr, "merge: ")
    time.sleep(4)  # the matrix is merged in one
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=30)
    assert time.monotonic() - began < within(), lines
    assert process.returncode == 143
    assert not list((tmp_path / "out").glob(".ties-ray/*/1/scratch/*")), "it was past the linear algebra already"


def test_a_defect_is_one_line_and_debug_shows_where(slow: tuple[Path, dict[str, str]]) -> None:
    recipe, environment = slow
    words = ("plan", recipe, "--set", "method.fails=true")
    plain, debug = start(*words, **environment), start(*words, "--debug", **environment)
    _, errors = plain.communicate(timeout=100)
    assert plain.returncode == 1
    assert errors.splitlines() == [
        "error: IndexError: string index out of range; "
        "a defect of ties_ray: run again with --debug, and please report it"
    ]
    assert "in problems" in debug.communicate(timeout=100)[1]


def _read_until(stream: Iterable[str], beginning: str) -> Sequence[str]:
    lines: list[str] = []
    for line in stream:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError(f"no line begins with {beginning!r}: {lines}")
