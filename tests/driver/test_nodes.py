"""Promise 6 under attack: workers, drivers and nodes that die, hang, fall asleep, or can't do a shard.

Every trouble strikes at an exact place (`plugins/methods/troubled.py`, `plugins/stores/frail.py`). There a worker can
also wait until another process has been killed. Every merge is compared with an undisturbed one, byte by byte.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import tool
from tests.tools.families import Family
from tests.tools.merging import LOCAL, carried_out, digests, merge, recipe_of
from ties_ray.driver import dispatch
from ties_ray.errors import InterruptedMerge, MergeError, UnavailableError
from ties_ray.operations import merging
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import RESULT_NAME, MergeResult, Progress

MakeFamily = Callable[..., Family]
OUTPUT = {"file_size": "15MB", "part_size": "5MiB"}


@pytest.fixture(scope="session")
def family(family_of: MakeFamily) -> Family:
    """Return three fine-tunes of 21 MB: 11 shards a round, 5 in the merge."""
    return family_of(hidden=1024, shards=3)


@pytest.fixture(scope="session")
def undisturbed(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what an undisturbed merge writes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    merge(family, {"path": str(folder), **OUTPUT}, {"name": "ties", "profile": "official"})
    return digests(folder)


@pytest.fixture
def trouble(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of the method's troubles; at the end what hangs there is let go."""
    folder = tmp_path / "trouble"
    folder.mkdir()
    yield folder
    (folder / "release").touch()


def troubled(family: Family, folder: Path, trouble: str, *, run: dict[str, Any], **more: Any) -> Recipe:
    """Return the recipe of a merge whose workers are troubled; `folder` holds the troubles, beside it the output."""
    method = {"name": "troubled", "profile": "official", "folder": str(folder), "trouble": trouble, **more}
    return recipe_of(family, {"path": str(folder.parent / "out"), **OUTPUT}, method, run=run)


def struck(folder: Path) -> list[int]:
    """Return the processes that were troubled, in order."""
    return [int((folder / name).read_text()) for name in sorted(p.name for p in folder.iterdir() if p.name.isdigit())]


def is_gone(pid: int, seconds: float = 30) -> bool:
    """Whether a process has ended, or does soon."""
    try:
        psutil.Process(pid).wait(seconds)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


# Threads of one process.


def local(workers: int = 2, **more: Any) -> dict[str, Any]:
    return {**LOCAL, "workers": workers, **more}


def files_of(folder: Path) -> dict[str, int]:
    """Return what lies in a folder itself, hidden or not, with the time of its last change."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def wake(trouble: Path) -> None:
    """Let the hanging threads go on, and wait until they are done."""
    sleepers = [thread for thread in threading.enumerate() if thread.name.startswith("ties-ray-")]
    assert sleepers
    (trouble / "release").touch()
    for thread in sleepers:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("round_", ["majority", "merge"])
def test_a_worker_that_hangs_is_replaced_and_does_no_harm_when_it_wakes_up(
    round_: str, family: Family, undisturbed: dict[str, str], trouble: Path, plugged: Path
) -> None:
    recipe = troubled(family, trouble, "hang", run=local(patience=2), round=round_)
    result, out = merging.merge(recipe), trouble.parent / "out"
    assert len(struck(trouble)) == 1
    assert result.workers_lost >= 1
    assert result.shards_again >= 1
    assert digests(out) == undisturbed
    before = files_of(out)
    wake(trouble)
    assert files_of(out) == before
    assert digests(out) == undisturbed
    assert merging.merge(recipe).reused


def test_a_hanging_worker_is_named_with_the_setting_that_gave_it_up(
    family: Family, trouble: Path, plugged: Path
) -> None:
    recipe = troubled(family, trouble, "hang", run=local(workers=1, patience=0.5), times=3)
    with pytest.raises(InterruptedMerge, match=r"3 workers were lost .*no answer within 0\.5 s \(run\.patience\)") as e:
        merging.merge(recipe)
    assert e.value.shard is not None
    assert len(struck(trouble)) == 3


@pytest.mark.parametrize("shard", [0, 1])
def test_an_idle_worker_overtakes_one_that_is_slow_and_the_run_does_not_wait_for_it(
    shard: int,
    family: Family,
    undisturbed: dict[str, str],
    trouble: Path,
    plugged: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "SLOW_SECONDS", 0.1)
    # At its second shard the slow worker holds its first: done, but in no record yet.
    parameter = ("lm_head.weight", "model.layers.0.self_attn.o_proj.weight")[shard]
    result = merging.merge(troubled(family, trouble, "hang", run=local(), parameter=parameter))
    out = trouble.parent / "out"
    assert len(struck(trouble)) == 1
    assert result.workers_lost == 0
    assert digests(out) == undisturbed
    before = files_of(out)
    wake(trouble)
    assert files_of(out) == before
    assert digests(out) == undisturbed


@pytest.mark.parametrize(
    ("kind", "error", "code", "message"),
    [
        ("raise", MergeError, 1, r"merge, shard \d+: ValueError: this shard is not to its method's taste"),
        ("unavailable", UnavailableError, 5, r"somewhere: does not answer"),
    ],
)
def test_a_shard_that_always_fails_ends_the_run_and_the_mended_run_continues(
    kind: str,
    error: type[MergeError],
    code: int,
    message: str,
    family: Family,
    undisturbed: dict[str, str],
    trouble: Path,
    plugged: Path,
) -> None:
    recipe = troubled(family, trouble, kind, run=local(), times=1000)
    with pytest.raises(error, match=message) as raised:
        merging.merge(recipe)
    assert raised.value.exit_code == code
    assert len(struck(trouble)) == 3
    (trouble / "mended").touch()
    assert_continues(recipe, undisturbed)


def assert_continues(recipe: Recipe, undisturbed: dict[str, str]) -> None:
    """Merge again after a failure in the last round: nothing of the rounds before is done again."""
    result = merging.merge(recipe)
    rounds = carried_out(result).merges[0].rounds
    assert result.resumed
    assert result.shards_done_before >= sum(round_.num_shards for round_ in rounds[:-1])
    assert result.bytes_read <= rounds[-1].bytes_read
    assert digests(recipe.output.path) == undisturbed


@pytest.mark.parametrize("kind", ["raise", "unavailable", "memory"])
def test_a_shard_that_fails_once_is_done_by_another_worker(
    kind: str, family: Family, undisturbed: dict[str, str], trouble: Path, plugged: Path
) -> None:
    result = merging.merge(troubled(family, trouble, kind, run=local()))
    assert len(struck(trouble)) == 1
    assert (result.workers_lost, result.shards_again) == (0, 1)
    assert digests(trouble.parent / "out") == undisturbed


# Processes: workers on Ray.


def on_ray(workers: int = 2, **more: Any) -> dict[str, Any]:
    return {"workers": workers, **more}


@pytest.mark.parametrize("round_", ["majority", "merge"])
def test_a_killed_process_is_replaced(
    round_: str, family: Family, undisturbed: dict[str, str], trouble: Path, plugged: Path, ray_cluster: None
) -> None:
    result = merging.merge(troubled(family, trouble, "kill", run=on_ray(), round=round_))
    assert len(struck(trouble)) == 1
    assert (result.workers_lost, result.resumed) == (1, False)
    assert result.shards_again >= 1
    assert digests(trouble.parent / "out") == undisturbed


@pytest.mark.usefixtures("plugged")
def test_what_ray_prints_about_a_lost_worker_is_not_in_the_record_on_standard_output(
    family: Family, trouble: Path, tmp_path: Path, ray_cluster: None
) -> None:
    import ray

    run = on_ray(address=ray.get_runtime_context().gcs_address)
    recipe = troubled(family, trouble, "kill", run=run, round="merge")
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json(exclude_unset=True, by_alias=True))
    command = [tool("ties-ray"), "merge", str(tmp_path / "recipe.json"), "--json", "--quiet"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=120, env=os.environ | {"RAY_DEDUP_LOGS": "0"}
    )
    assert json.loads(done.stdout)["workers_lost"] == 1
    assert "A worker died" in done.stderr  # with that setting Ray does print


def test_a_process_killed_while_it_reads_for_a_count_is_replaced(
    family: Family, undisturbed: dict[str, str], tmp_path: Path, plugged: Path, ray_cluster: None
) -> None:
    frail = replace(family, base=f"frail://{family.base}", models=tuple(f"frail://{uri}" for uri in family.models))
    point = {"what": "read", "uri": "*/model-1/*", "count": 3, "marker": str(tmp_path / "died")}  # in its first shard
    output = {"path": str(tmp_path / "out"), **OUTPUT}
    method = {"name": "ties", "profile": "official"}
    result = merging.merge(recipe_of(frail, output, method, storage={"frail": point}, run=on_ray()))
    assert (tmp_path / "died").exists()
    assert result.workers_lost == 1
    assert digests(tmp_path / "out") == undisturbed


def test_a_shard_that_kills_every_worker_is_named_and_the_mended_run_continues(
    family: Family, undisturbed: dict[str, str], trouble: Path, plugged: Path, ray_cluster: None
) -> None:
    recipe = troubled(family, trouble, "kill", run=on_ray(), times=1000)
    with pytest.raises(InterruptedMerge, match=r"merge, shard 2: .*3 workers were lost while they ran it") as raised:
        merging.merge(recipe)
    assert raised.value.shard == 2
    assert raised.value.exit_code == 4
    assert len(set(struck(trouble))) == 3
    (trouble / "mended").touch()
    assert_continues(recipe, undisturbed)


def test_a_process_that_is_killed_while_it_starts_is_replaced_and_counted(
    family: Family, undisturbed: dict[str, str], tmp_path: Path, plugged: Path, ray_cluster: None
) -> None:
    point = {"what": "head", "uri": "*/plan.json.gz", "marker": str(tmp_path / "died")}
    output = {"path": f"frail://{tmp_path / 'out'}", **OUTPUT}
    seen: list[Progress] = []
    recipe = recipe_of(family, output, {"name": "ties", "profile": "official"}, storage={"frail": point}, run=on_ray())
    result = merging.merge(recipe, watch=seen.append)
    assert (tmp_path / "died").exists()
    assert result.workers_lost == 1
    assert any("was lost, and another takes its place" in progress.event for progress in seen)
    assert (seen[-1].workers, seen[-1].workers_missing, seen[-1].workers_lost) == (2, 0, 1)
    assert digests(tmp_path / "out") == undisturbed


def test_a_process_that_stands_still_like_one_cut_off_is_replaced_and_ended(
    family: Family, undisturbed: dict[str, str], trouble: Path, plugged: Path, ray_cluster: None
) -> None:
    result = merging.merge(troubled(family, trouble, "stop", run=on_ray(patience=4)))
    [pid] = struck(trouble)
    assert result.workers_lost >= 1
    assert digests(trouble.parent / "out") == undisturbed
    assert is_gone(pid)


# Nodes and drivers: the command, on a cluster that is there already.


@contextmanager
def command(recipe: Recipe, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run `ties-ray merge` beside the test, with its plugins."""
    path, log = folder / "recipe.json", folder / "log"
    path.write_text(recipe.model_dump_json(exclude_unset=True, by_alias=True))
    with log.open("a") as out:
        words = [tool("ties-ray"), "merge", str(path), "--result", str(folder / "result.json")]
        process = subprocess.Popen(words, stdout=out, stderr=out, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(path: Path, process: "subprocess.Popen[str]", log: Path) -> None:
    """Wait until a file is there, with something in it."""
    end = time.monotonic() + 100
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def wait_for_a_loss(process: "subprocess.Popen[str]", log: Path) -> None:
    """Wait until the command says that it has lost a worker."""
    end = time.monotonic() + 100
    while "was lost" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def merge_while(
    family: Family, trouble: Path, address: str, strike: Callable[[], None], join: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Merge by the command on two nodes; strike when both are in the middle of a shard; return the result record.

    join: called when the first one is.
    """
    both = {"parameter": "*.up_proj.weight", "times": 2}  # the first shard of either worker begins with one of these
    recipe = troubled(family, trouble, "hang", run=on_ray(address=address), **both)
    with command(recipe, trouble.parent) as process:
        wait_for(trouble / "0", process, trouble.parent / "log")
        join()
        wait_for(trouble / "1", process, trouble.parent / "log")
        strike()
        wait_for_a_loss(process, trouble.parent / "log")
        (trouble / "release").touch()
        assert process.wait(150) == 0, (trouble.parent / "log").read_text()
    record: dict[str, Any] = json.loads((trouble.parent / "out" / RESULT_NAME).read_bytes())
    return record


@pytest.mark.usefixtures("plugged")
def test_a_node_that_comes_late_takes_part_and_one_that_is_taken_away_leaves_its_work_to_it(
    family: Family, undisturbed: dict[str, str], trouble: Path
) -> None:
    from ray.cluster_utils import Cluster

    room = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20},
    )
    try:
        first = cluster.add_node(**room)
        result = merge_while(
            family,
            trouble,
            cluster.address,
            lambda: cluster.remove_node(first, allow_graceful=False),
            lambda: cluster.add_node(**room),
        )
    finally:
        cluster.shutdown()
    assert "the merge begins with 1 of 2 workers" in (trouble.parent / "log").read_text()
    assert result["workers_lost"] >= 1
    assert result["shards_again"] >= 1
    assert not result["resumed"]
    assert digests(trouble.parent / "out") == undisturbed


def free_ports(count: int) -> list[int]:
    """Return ports that differ: held all at once."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def ray_start(folder: Path, agent: int, *how: str) -> Iterator[psutil.Process]:
    """Run `ray start` with one CPU, its agent at a port; return its raylet."""
    words = ["start", "--block", "--num-cpus=1", "--object-store-memory=100000000"]
    words += [f"--dashboard-agent-listen-port={agent}", *how]
    log = folder / f"{agent}.log"
    with log.open("w") as out:
        process = subprocess.Popen([tool("ray"), *words], stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        [raylet] = [child for child in psutil.Process(process.pid).children() if child.name() == "raylet"]
        yield raylet
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):  # a node whose head is gone takes a minute
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.usefixtures("plugged")
def test_a_raylet_that_is_killed_costs_the_merge_no_byte(
    family: Family, undisturbed: dict[str, str], trouble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    port, head_port, other = free_ports(3)
    short = Path("/tmp") / f"ray-n{os.getpid()}"  # Ray's sockets want a short path
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}")
    with ray_start(tmp_path, head_port, *head), ray_start(tmp_path, other, f"--address=127.0.0.1:{port}") as raylet:
        result = merge_while(family, trouble, f"127.0.0.1:{port}", raylet.kill)
    shutil.rmtree(short, ignore_errors=True)
    assert result["workers_lost"] >= 1
    assert result["shards_again"] >= 1
    assert digests(trouble.parent / "out") == undisturbed


@pytest.mark.usefixtures("plugged")
def test_a_merge_that_loses_all_workers_says_so_ends_in_time_and_the_same_command_continues(
    family: Family, undisturbed: dict[str, str], trouble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    port, head_port, other, again = free_ports(4)
    short, address = Path("/tmp") / f"ray-w{os.getpid()}", f"127.0.0.1:{port}"  # Ray's sockets want a short path
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}", "--num-cpus=0")
    run = on_ray(address=address, workers=1, deadline=15)
    recipe = troubled(family, trouble, "hang", run=run, parameter="*.up_proj.weight")
    with ray_start(tmp_path, head_port, *head):
        with (
            ray_start(tmp_path, other, f"--address={address}") as raylet,
            command(recipe, trouble.parent) as process,
        ):
            wait_for(trouble / "0", process, trouble.parent / "log")
            raylet.kill()
            assert process.wait(120) == 5, (trouble.parent / "log").read_text()
        assert "0 of 1 worker, waiting for a place for" in (trouble.parent / "log").read_text()
        record = (trouble.parent / "result.json").read_text()
        assert "there has been no worker for 15 s (run.deadline)" in record
        with ray_start(tmp_path, again, f"--address={address}"), command(recipe, trouble.parent) as process:
            assert process.wait(150) == 0, (trouble.parent / "log").read_text()
    shutil.rmtree(short, ignore_errors=True)
    assert digests(trouble.parent / "out") == undisturbed


@pytest.mark.usefixtures("plugged")
def test_a_merge_that_loses_the_head_says_so_and_the_same_command_continues(
    family: Family, undisturbed: dict[str, str], trouble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    port, head_port, other, again = free_ports(4)
    short, address = Path("/tmp") / f"ray-h{os.getpid()}", f"127.0.0.1:{port}"  # Ray's sockets want a short path
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}")
    recipe = troubled(family, trouble, "hang", run=on_ray(address=address), parameter="*.up_proj.weight", times=2)
    with (
        ray_start(tmp_path, head_port, *head) as raylet,
        ray_start(tmp_path, other, f"--address={address}"),
        command(recipe, trouble.parent) as process,
    ):
        wait_for(trouble / "1", process, trouble.parent / "log")
        beside = psutil.Process(raylet.ppid()).children()
        [store] = [each for each in beside if each.name() == "gcs_server"]
        store.kill()
        assert process.wait(58) == 5, (trouble.parent / "log").read_text()  # after 60 s Ray would end it with 1
    record = json.loads((trouble.parent / "result.json").read_bytes())
    assert "the head of the cluster has not answered for 20 s" in json.dumps(record)
    (trouble / "release").touch()
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"workers": 1})})
    with ray_start(tmp_path, again, *head), command(recipe, trouble.parent) as process:
        assert process.wait(150) == 0, (trouble.parent / "log").read_text()
    shutil.rmtree(short, ignore_errors=True)
    assert digests(trouble.parent / "out") == undisturbed


@pytest.mark.usefixtures("plugged")
def test_the_workers_of_a_killed_driver_go_with_it_and_the_same_command_continues(
    family: Family, undisturbed: dict[str, str], trouble: Path, ray_cluster: None
) -> None:
    import ray

    run = on_ray(workers=4, address=ray.get_runtime_context().gcs_address)  # all CPUs: nothing may be left of the dead
    recipe = troubled(family, trouble, "hang", run=run)
    with command(recipe, trouble.parent) as process:
        wait_for(trouble / "0", process, trouble.parent / "log")
        process.kill()
        assert process.wait() == -9
    [pid] = struck(trouble)
    assert is_gone(pid)
    with command(recipe, trouble.parent) as process:
        assert process.wait(120) == 0, (trouble.parent / "log").read_text()
    result = json.loads((trouble.parent / "out" / RESULT_NAME).read_bytes())
    rounds = carried_out(MergeResult.model_validate(result)).merges[0].rounds
    assert result["resumed"]
    assert result["shards_done_before"] >= sum(round_.num_shards for round_ in rounds[:-1])
    assert (result["workers_lost"], result["shards_again"]) == (0, 0)
    assert digests(trouble.parent / "out") == undisturbed
