"""Promise 6 under attack on real clusters: nodes, heads, networks and drivers that are lost, and nodes that come late.

The command merges. Its workers wait at an exact place until what is killed has gone, as in `test_nodes.py`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import pytest

from tests.conftest import tool
from tests.driver.test_nodes import files_of, is_gone, on_ray, struck, troubled
from tests.tools.families import Family
from tests.tools.merging import carried_out, digests
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import RESULT_NAME, MergeResult


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


def wait_until_told(words: str, process: "subprocess.Popen[str]", log: Path) -> None:
    """Wait until the command says some words."""
    end = time.monotonic() + 100
    while words not in log.read_text():
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
        wait_until_told("was lost", process, trouble.parent / "log")
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
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    head["dashboard_port"] = None  # else Ray tries one port, and leaves a socket open where the port is taken
    cluster = Cluster(initialize_head=True, head_node_args=head)
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


def control_store(raylet: psutil.Process) -> psutil.Process:
    """Return the control store of the head that a raylet belongs to."""
    [store] = [each for each in psutil.Process(raylet.ppid()).children() if each.name() == "gcs_server"]
    return store


def free_ports(count: int) -> list[int]:
    """Return ports that differ: held all at once."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def ray_start(folder: Path, agent: int, *how: str, inside: tuple[str, ...] = ()) -> Iterator[psutil.Process]:
    """Run `ray start` with one CPU, its agent at a port; return its raylet. inside: a command that runs the words."""
    words = ["start", "--block", "--num-cpus=1", "--object-store-memory=100000000"]
    words += [f"--dashboard-agent-listen-port={agent}", *how]
    log = folder / f"{agent}.log"
    with log.open("w") as out:
        process = subprocess.Popen([*inside, tool("ray"), *words], stdout=out, stderr=out, start_new_session=True)
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


class Network(NamedTuple):
    """A network of two hosts: this one, and a namespace of the kernel."""

    inside: tuple[str, ...]
    """The command that runs words in the namespace."""
    here: str
    there: str
    """The addresses of the two."""
    cable: str
    """The interface on this side."""

    def set(self, state: Literal["up", "down"]) -> None:
        """Plug the cable in, or pull it out."""
        subprocess.run(["ip", "link", "set", self.cable, state], check=True)


@pytest.fixture
def network() -> Iterator[Network]:
    """Return a network whose cable is plugged in."""
    number = os.getpid() % 60000
    name, here, there = f"ties{number}", f"tiesa{number}", f"tiesb{number}"
    net = f"10.77.{number % 250}"
    network = Network(("ip", "netns", "exec", name), f"{net}.1", f"{net}.2", here)
    done = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no network namespace can be made here: {done.stderr.strip()}")
    try:
        for command in (
            ["ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", name],
            ["ip", "address", "add", f"{network.here}/24", "dev", here],
            ["ip", "link", "set", here, "up"],
            [*network.inside, "ip", "address", "add", f"{network.there}/24", "dev", there],
            [*network.inside, "ip", "link", "set", there, "up"],
            [*network.inside, "ip", "link", "set", "lo", "up"],
        ):
            subprocess.run(command, check=True)
        yield network
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.usefixtures("plugged")
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="only root makes network namespaces, by `ip`")
def test_a_node_that_is_cut_off_is_replaced_and_does_no_harm_when_it_is_back(
    family: Family,
    undisturbed: dict[str, str],
    trouble: Path,
    network: Network,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    for name, value in (("period_ms", 1000), ("timeout_ms", 1000), ("failure_threshold", 3)):
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))  # else the head waits for a minute
    port, head_port, other = free_ports(3)
    short, address = Path("/tmp") / f"ray-c{os.getpid()}", f"{network.here}:{port}"  # Ray's sockets want a short path
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}")
    there = (f"--address={address}", f"--node-ip-address={network.there}")
    with (
        ray_start(tmp_path, head_port, *head, f"--node-ip-address={network.here}"),
        ray_start(tmp_path, other, *there, inside=network.inside),
    ):
        cut_off = -1

        def cut() -> None:
            nonlocal cut_off
            network.set("down")
            spaces = {pid: os.readlink(f"/proc/{pid}/ns/net") for pid in struck(trouble)}
            [cut_off] = [pid for pid, space in spaces.items() if space != os.readlink("/proc/self/ns/net")]

        result = merge_while(family, trouble, address, cut)
        assert digests(trouble.parent / "out") == undisturbed
        before = files_of(trouble.parent / "out")
        network.set("up")
        assert is_gone(cut_off, 60)
    shutil.rmtree(short, ignore_errors=True)
    assert result["workers_lost"] >= 1
    assert not result["resumed"]
    assert files_of(trouble.parent / "out") == before
    assert digests(trouble.parent / "out") == undisturbed


@pytest.mark.usefixtures("plugged")
def test_a_merge_that_loses_all_workers_says_so_ends_in_time_and_the_same_command_continues(
    family: Family, undisturbed: dict[str, str], trouble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    port, head_port, other, again = free_ports(4)
    short, address = Path("/tmp") / f"ray-w{os.getpid()}", f"127.0.0.1:{port}"  # Ray's sockets want a short path
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}", "--num-cpus=0")
    run = on_ray(address=address, workers=1, deadline=40)
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
        assert "there has been no worker for 40 s (run.deadline)" in record
        with ray_start(tmp_path, again, f"--address={address}"), command(recipe, trouble.parent) as process:
            assert process.wait(150) == 0, (trouble.parent / "log").read_text()
    shutil.rmtree(short, ignore_errors=True)
    assert digests(trouble.parent / "out") == undisturbed


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("loss", ["killed", "frozen"])
def test_a_merge_that_loses_the_head_says_so_and_the_same_command_continues(
    family: Family, undisturbed: dict[str, str], trouble: Path, tmp_path: Path, loss: str
) -> None:
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
        store = control_store(raylet)
        store.kill() if loss == "killed" else store.suspend()
        assert process.wait(58) == 5, (trouble.parent / "log").read_text()  # after 60 s Ray would end it with 1
        with suppress(psutil.NoSuchProcess):
            store.kill()
    record = json.loads((trouble.parent / "result.json").read_bytes())
    assert "the head of the cluster has not answered for 20 s" in json.dumps(record)
    (trouble / "release").touch()
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"workers": 1})})
    with ray_start(tmp_path, again, *head), command(recipe, trouble.parent) as process:
        assert process.wait(150) == 0, (trouble.parent / "log").read_text()
    shutil.rmtree(short, ignore_errors=True)
    assert digests(trouble.parent / "out") == undisturbed


@pytest.mark.usefixtures("plugged")
def test_a_head_that_is_lost_while_workers_wait_for_a_place_is_a_lost_head(
    family: Family, trouble: Path, tmp_path: Path
) -> None:
    port, head_port = free_ports(2)
    short, address = Path("/tmp") / f"ray-s{os.getpid()}", f"127.0.0.1:{port}"
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}", "--num-cpus=0")
    recipe = troubled(family, trouble, "hang", run=on_ray(address=address, workers=1, deadline=8))
    log = trouble.parent / "log"
    with ray_start(tmp_path, head_port, *head) as raylet, command(recipe, trouble.parent) as process:
        wait_until_told("the nodes have room for 0", process, log)
        control_store(raylet).kill()
        assert process.wait(58) == 5, log.read_text()  # Ray, asked for its nodes, would end it with 1
    assert "the head of the cluster has not answered for 20 s" in (trouble.parent / "result.json").read_text()
    shutil.rmtree(short, ignore_errors=True)


@pytest.mark.usefixtures("plugged")
def test_a_head_that_has_started_anew_is_a_lost_head(family: Family, trouble: Path, tmp_path: Path) -> None:
    port, head_port, again = free_ports(3)
    short, address = Path("/tmp") / f"ray-a{os.getpid()}", f"127.0.0.1:{port}"
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short}")
    recipe = troubled(family, trouble, "hang", run=on_ray(address=address, workers=1))
    with ExitStack() as first:
        first.enter_context(ray_start(tmp_path, head_port, *head))
        with command(recipe, trouble.parent) as process:
            wait_for(trouble / "0", process, trouble.parent / "log")
            process.send_signal(signal.SIGSTOP)  # so it does not see how long the head is away
            first.close()
            with ray_start(tmp_path, again, *head):
                process.send_signal(signal.SIGCONT)
                assert process.wait(58) == 5, (trouble.parent / "log").read_text()
    assert "the head of the cluster has started anew" in (trouble.parent / "result.json").read_text()
    shutil.rmtree(short, ignore_errors=True)


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
