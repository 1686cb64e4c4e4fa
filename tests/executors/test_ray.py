import os
import re
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import free_port, tool
from ties_ray.errors import InputError, UnavailableError
from ties_ray.executors import Answered, Lost, Needs, Ready, address_problem
from ties_ray.executors import ray as ray_executor
from ties_ray.executors.ray import RayExecutor, _digest, _facts, _short_folder, sharers_of
from ties_ray.testing import ExecutorContract


@pytest.mark.parametrize(
    ("most", "num_workers", "nodes", "sharers"),
    [
        (4, None, [(16.0, 1.0)], 4),
        (4, None, [(16.0, 8.0)], 2),  # more would leave GPUs without a core
        (4, None, [(16.0, 1.0), (8.0, 4.0)], 2),
        (4, None, [(4.0, 8.0)], 1),
        (4, 2, [(16.0, 2.0)], 1),  # Ray would put both on one
        (4, 3, [(16.0, 2.0)], 2),
        (4, 8, [(16.0, 1.0), (16.0, 1.0)], 4),
        (2, 8, [(16.0, 1.0)], 2),
        (4, 8, [], 4),  # the nodes are yet to come
    ],
)
def test_as_many_workers_share_a_gpu_as_leave_none_idle(
    most: int, num_workers: int | None, nodes: list[tuple[float, float]], sharers: int
) -> None:
    assert sharers_of(most, num_workers, nodes) == sharers


@pytest.mark.usefixtures("ray_cluster")
class TestRayExecutor(ExecutorContract):
    executor = RayExecutor
    loss = "kill"

    def test_a_worker_is_a_process_and_a_lost_one_comes_back_as_another(self) -> None:
        with self.started(2) as executor:
            executor.submit(0, 0, "pid")
            executor.submit(1, 1, "pid")
            first = {
                event.worker: int(event.answer) for event in self.events(executor, 2) if isinstance(event, Answered)
            }
            assert len({os.getpid(), *first.values()}) == 3
            os.kill(first[0], 9)  # while it is idle: seen at the next message, never passed over
            time.sleep(0.5)
            executor.submit(0, 2, "pid")
            assert [(type(e).__name__, e.worker) for e in self.events(executor)] == [("Lost", 0)]
            executor.revive(0)
            assert self.events(executor) == [Ready(0)]
            executor.submit(0, 3, "pid")
            [event] = self.events(executor)
            assert isinstance(event, Answered)
            assert int(event.answer) not in first.values()

    def test_libraries_of_a_worker_use_one_thread_on_a_connection_of_the_caller(self) -> None:
        with self.started(1) as executor:
            executor.submit(0, 0, "variable OPENBLAS_NUM_THREADS")
            assert self.events(executor) == [Answered(0, 0, "1")]

    def test_the_default_is_a_worker_for_each_cpu_there_is_room_for(self) -> None:
        executor = RayExecutor()
        assert executor.start("ties_ray.testing.echo:EchoHost", "s", Needs(None, 2**20, gpus=1)) == 2
        executor.stop()

    @pytest.mark.parametrize(("num_workers", "by_gpu"), [(2, {"0": 1, "1": 1}), (None, {"0": 2, "1": 2})])
    def test_workers_share_gpus_so_that_none_is_idle(self, num_workers: int | None, by_gpu: dict[str, int]) -> None:
        executor, expected = RayExecutor(), sum(by_gpu.values())
        needs = Needs(num_workers, 2**20, gpus=1, sharers=4, deadline=60)
        try:
            assert executor.start("ties_ray.testing.echo:EchoHost", "s", needs) == expected
            for worker in range(expected):
                executor.submit(worker, worker, "variable CUDA_VISIBLE_DEVICES")
            answers = [event.answer for event in self.events(executor, expected) if isinstance(event, Answered)]
        finally:
            executor.stop()
        assert Counter(answers) == by_gpu

    def test_a_worker_that_dies_while_it_starts_is_replaced_and_told(self, tmp_path: Path) -> None:
        with self.started(2, f"mortal {tmp_path / 'died'}") as executor:
            [place] = executor.empty_places()
            lost, ready = self.events(executor, 2)
            assert isinstance(lost, Lost)
            assert (lost.worker, lost.ticket, ready) == (place, None, Ready(place))
            assert executor.empty_places() == frozenset()
            executor.submit(place, 0, "pid")
            [event] = self.events(executor)
            assert isinstance(event, Answered)

    def test_what_no_node_has_is_refused_in_time_with_what_there_is(self) -> None:
        executor = RayExecutor()
        begun = time.monotonic()
        with pytest.raises(
            UnavailableError,
            match=r"no worker of 1 CPU, 0\.00 GiB, 64 GPU within 1 s; nodes: .*4 CPU, .* GiB, 2 GPU\)",
        ):
            executor.start("ties_ray.testing.echo:EchoHost", "s", Needs(1, 2**20, gpus=64, deadline=1))
        assert time.monotonic() - begun < 10

    def test_a_place_for_which_a_cluster_has_no_room_is_filled_when_there_is_room(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_executor, "_GRACE", 1.0)
        executor, lines = RayExecutor(), list[str]()
        with self.started(2):
            needs = Needs(5, 2**20, gpus=0.5, announce=lines.append, deadline=300)
            assert executor.start("ties_ray.testing.echo:EchoHost", "s", needs) == 5
            empty = executor.empty_places()
            assert 3 <= len(empty) <= 4
        joined = self.events(executor, len(empty) - 1)
        executor.stop()
        assert {type(event) for event in joined} == {Ready}
        assert {event.worker for event in joined} <= empty
        assert [line for line in lines if "Ray" not in line] == [
            "5 workers are asked for, and the nodes have room for 4: the others join when nodes come",
            f"the merge begins with {5 - len(empty)} of 5 workers",
        ]

    def test_a_lost_worker_gets_a_place_as_soon_as_there_is_one(self) -> None:
        with self.started(2) as executor:
            assert isinstance(executor, RayExecutor)
            executor.submit(0, 0, "kill")
            self.events(executor)
            with self.started(3):
                executor._needs = replace(executor._needs, deadline=0.5)
                executor.revive(0)
                assert executor.wait(2.0) == []
                executor._needs = replace(executor._needs, deadline=60)
            assert self.events(executor) == [Ready(0)]


def test_a_worker_finds_the_plugins_where_they_were_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "methods").mkdir(parents=True)
    (tmp_path / "mine" / "methods" / "my.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TIES_RAY_PLUGINS", "/driver/mine")
    digest = _digest(str(tmp_path / "mine"))
    assert _facts((), "/driver/mine", digest)["plugins"] == digest
    assert os.environ["TIES_RAY_PLUGINS"] == str(tmp_path / "mine")
    assert _facts((), "/driver/mine", "another digest")["plugins"] == "nothing"


NO_OTHERS = "    import functools, ray._private.services as s; s.find_gcs_addresses = functools.cache(set)"
"""Begins a program that sees no cluster of other tests on this machine."""


def driver(code: str, *, cwd: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run a program that is no part of this session's cluster. environment: None takes a variable away."""
    program = "from ties_ray.executors import *\nfrom ties_ray.executors.ray import RayExecutor\n" + textwrap.dedent(
        code
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={name: value for name, value in (os.environ | environment).items() if value is not None},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def start(needs: str, factory: str = "ties_ray.testing.echo:EchoHost") -> str:
    return f"""
    executor = RayExecutor()
    try:
        executor.start("{factory}", "s", Needs({needs}))
        executor.submit(0, 1, "hello")
        print(executor.wait(30))
        executor.submit(0, 2, "kill")
        executor.wait(30)
    except Exception as error:
        print(type(error).__name__, error)
    executor.stop()
    """


def test_it_starts_a_ray_of_its_own_without_a_word_and_leaves_nothing_in_the_home(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_ADDRESS": ""}
    code = "import signal\nmine = lambda *_: None\nsignal.signal(signal.SIGTERM, mine)\n"
    code += textwrap.dedent(start("1, 2**20")).replace('"hello"', '"variable OPENBLAS_NUM_THREADS"')
    code += "assert signal.getsignal(signal.SIGTERM) is mine\n"  # ray.init takes it for itself
    done = driver(code, cwd=tmp_path, **environment)
    assert done.stdout == "[Answered(worker=0, ticket=1, answer='1')]\n"
    assert done.stderr == ""
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_what_this_machine_will_never_have_is_refused_at_once(tmp_path: Path) -> None:
    done = driver(start("2, 2**60"), cwd=tmp_path, RAY_ADDRESS="")
    assert "UnavailableError this machine: 2 workers of 1 CPU, 1073741824.00 GiB are asked for" in done.stdout
    assert "there is room for 0; lower run.workers or run.memory" in done.stdout


WITHOUT_GRPC = "import sys\nsys.modules['ray._private.grpc_utils'] = None\n"


@pytest.mark.parametrize("asks", ["", WITHOUT_GRPC], ids=["with grpc", "without grpc"])
@pytest.mark.parametrize("listening", [False, True])
def test_an_address_where_no_cluster_is_gets_an_error_that_names_it(listening: bool, asks: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1] if listening else free_port()}"
        begun = time.monotonic()
        done = driver(asks + textwrap.dedent(start(f"1, 2**20, address={address!r}, deadline=4")), cwd=tmp_path)
        assert time.monotonic() - begun < 20
    assert done.stdout.startswith(f"UnavailableError Ray at {address}: no Ray cluster answers (")
    assert done.stderr == ""


def test_a_head_that_is_gone_and_left_its_address_is_named(tmp_path: Path) -> None:
    place = f"127.0.0.1:{free_port()}"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(place)
    code = NO_OTHERS + start("1, 2**20, address='auto', deadline=4")
    done = driver(code, cwd=tmp_path, RAY_TMPDIR=str(tmp_path), RAY_ADDRESS="")
    assert done.stdout.startswith(f"UnavailableError Ray at {place}: no Ray cluster answers (")


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Yield the ports of a cluster that wants a token: the head's, and the one of Ray Client."""
    port, client = free_port(), 20_000 + free_port() % 10_000  # Ray's workers have the ports below
    words = ["start", "--head", "--block", "--num-cpus=0", "--include-dashboard=false", f"--port={port}"]
    words += [f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1"]
    agent = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
    words += [f"--{name}={free_port()}" for name in (*agent, "metrics-export-port")]
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "HOME": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [tool("ray"), *words], env=os.environ | own, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for each in (port, client):
            end = time.monotonic() + 60
            while True:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                with suppress(OSError), socket.create_connection(("127.0.0.1", each), 1):
                    break
                time.sleep(0.2)
        yield port, client
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_missing_or_wrong_token_of_a_cluster_is_called_that(guarded: tuple[int, int], tmp_path: Path) -> None:
    none = {"HOME": str(tmp_path / "nobody"), "RAY_AUTH_MODE": "disabled"}
    environments = (
        none,
        none | {"RAY_AUTH_MODE": "token"},
        none | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64},
    )
    for address in (f"127.0.0.1:{guarded[0]}", f"ray://127.0.0.1:{guarded[1]}"):
        for environment in environments:
            done = driver(start(f"1, 2**20, address={address!r}, deadline=20"), cwd=tmp_path, **environment)
            assert done.stdout.startswith(
                f"InputError Ray at {address}: the cluster's token is missing here, or is another; set RAY_AUTH_MODE"
            )
            assert done.stderr == ""
    code = WITHOUT_GRPC + textwrap.dedent(start(f"1, 2**20, address='127.0.0.1:{guarded[0]}', deadline=20"))
    assert "the cluster's token is missing here" in driver(code, cwd=tmp_path, **none).stdout


def test_auto_uses_the_token_that_the_head_has_left_on_this_machine(guarded: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir(exist_ok=True)
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{guarded[0]}")
    (tmp_path / ".ray").mkdir(exist_ok=True)
    (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    here = {"HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": "", "RAY_AUTH_MODE": None}
    done = driver(NO_OTHERS + start("1, 2**20, address='auto', deadline=5"), cwd=tmp_path, **here)
    assert "UnavailableError" in done.stdout, "it has no CPU"
    assert "token" not in done.stdout + done.stderr


def test_of_more_workers_than_the_machine_can_serve_a_few_start_and_it_is_said(tmp_path: Path) -> None:
    done = driver(start("10_000, 2**60, announce=print"), cwd=tmp_path, RAY_ADDRESS="")
    most = 4 * len(os.sched_getaffinity(0))
    assert "starting Ray on this machine" in done.stdout
    assert (
        f"10000 workers are asked for, and this machine has {most // 4} cores: the merge runs with {most}"
        in done.stdout
    )


@pytest.mark.parametrize(
    "address", ["auto", "local", "head:6379", "10.0.0.1:6379", "[::1]:6379", "ray://head:10001", "ray://[::1]:10001"]
)
def test_the_address_of_a_cluster_may_be(address: str) -> None:
    assert address_problem(address) is None


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("http://127.0.0.1:8265", "ray job submit --address http://127.0.0.1:8265 -- ties-ray merge"),
        ("https://ray.example/", "write ray://host:10001 or host:6379"),
        ("head", "write auto, local, host:port or ray://host:port"),
        ("ray://head", "write auto"),
        ("ray:head:10001", "write auto"),
        ("", "write auto"),
    ],
)
def test_the_address_of_a_cluster_is_refused_with_what_to_write(address: str, remedy: str) -> None:
    wrong = address_problem(address)
    assert wrong is not None
    assert remedy in wrong[1]


def test_the_dashboards_address_in_the_environment_is_refused_for_good(tmp_path: Path) -> None:
    done = driver(start("1, 2**20"), cwd=tmp_path, RAY_ADDRESS="http://127.0.0.1:8265")
    assert done.stdout.startswith("InputError RAY_ADDRESS: http://127.0.0.1:8265 is where Ray takes jobs")


def test_a_temporary_folder_too_long_for_sockets_is_gone_around(tmp_path: Path) -> None:
    scratch = tmp_path / ("slurm-" + "1" * 40) / ("tmp." + "t" * 40)
    scratch.mkdir(parents=True)
    before = set(Path("/tmp").glob("ties-ray-session-*"))
    done = driver(start("1, 2**20"), cwd=tmp_path, RAY_ADDRESS="", TMPDIR=str(scratch))
    assert (done.stdout, done.stderr) == ("[Answered(worker=0, ticket=1, answer='1:s:hello')]\n", "")
    assert list(scratch.iterdir()) == []
    assert set(Path("/tmp").glob("ties-ray-session-*")) <= before


def test_workers_that_rays_memory_monitor_kills_while_they_start_are_told_with_the_nodes_memory(tmp_path: Path) -> None:
    code = start("1, 2**20").replace('"s"', '"slow"')
    full = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "50"}
    done = driver(code, cwd=tmp_path, **full)
    told = (
        r"UnavailableError Ray: each worker of 1 CPU, 0\.00 GiB died while it started: Ray's memory monitor killed it"
    )
    assert re.search(told + r", as node [\d.]+ had [\d.]+ ?GB of [\d.]+ ?GB in use; nodes: ", done.stdout), done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_full_disk_of_rays_session_is_called_that(tmp_path: Path) -> None:
    disk = tempfile.mkdtemp(dir="/tmp")  # a short path, which Ray takes
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=True)
    try:
        done = driver(start("1, 2**20"), cwd=tmp_path, RAY_TMPDIR=disk)
    finally:
        subprocess.run(["umount", disk], check=True)
        os.rmdir(disk)
    told = f"{disk}: Ray keeps its session there, and 3,145,728 bytes are free; free space there, or set RAY_TMPDIR"
    assert f"UnavailableError {told}" in done.stdout, done.stderr


def test_where_no_short_folder_can_be_written_the_variable_to_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**how: str) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    monkeypatch.setenv("RAY_TMPDIR", "/scratch")
    assert _short_folder() is None
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", "/" + "t" * 60)
    with pytest.raises(InputError, match=r"too long for Ray's sockets.*set RAY_TMPDIR to a folder of at most 36 bytes"):
        _short_folder()


def test_the_project_of_a_driver_under_uv_run_is_not_uploaded(tmp_path: Path) -> None:
    """Ray looks for a parent whose command line begins with `uv run`."""
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'mine'\nversion = '1'\n")
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    program = "from ties_ray.executors import *\nfrom ties_ray.executors.ray import RayExecutor\n"
    program += textwrap.dedent(start("1, 2**20")).replace(
        "executor.submit(0, 1", "import ray; print(ray.get_runtime_context().runtime_env); executor.submit(0, 1"
    )
    (tmp_path / "driver.py").write_text(program)
    (tmp_path / "run").write_text('"$@"; exit $?\n')
    done = subprocess.run(
        ["uv", "run", sys.executable, "driver.py"],
        executable="/bin/sh",
        env=os.environ | {"RAY_ADDRESS": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "{}\n[Answered(worker=0, ticket=1, answer='1:s:hello')]\n", done.stderr


STUMBLE = """
    import os, sys
    from pathlib import Path

    once = Path(__file__).with_name("once")
    if "--mode=specific-server" in sys.orig_argv and once.exists():
        once.unlink()
        os._exit(1)
"""
"""A sitecustomize for a head: the process for a client ends at once, where a file is there that says so."""


@pytest.fixture(scope="module")
def bare_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the addresses of a Ray whose Python has every package of this one but ties_ray, and by Ray Client.

    stumble: the folder of its sitecustomize.
    """
    folder, port, client = Path("/tmp") / f"ray-{os.getpid()}", free_port(), free_port()  # sockets want a short path
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    stumble = tmp_path_factory.mktemp("stumble")
    (stumble / "sitecustomize.py").write_text(textwrap.dedent(STUMBLE))
    paths = f"{stumble}:{site.getsitepackages()[0]}"
    environment = os.environ | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S"] = "12"  # seconds that the head waits for its process
    ports = [f"--{name}-port={free_port()}" for name in ("node-manager", "object-manager", "dashboard-agent-listen")]
    command = [str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", *ports]
    command += [
        f"--ray-client-server-port={client}",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--object-store-memory=100000000",
        f"--temp-dir={folder}",
    ]
    cwd = tmp_path_factory.mktemp("elsewhere")
    log = cwd / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, cwd=cwd, stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield {"direct": f"127.0.0.1:{port}", "client": f"ray://127.0.0.1:{client}", "stumble": str(stumble)}
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("how", ["direct", "client"])
def test_ties_ray_is_shipped_to_a_cluster_without_it_and_uses_the_plugins(
    how: str, bare_cluster: dict[str, str], tmp_path: Path
) -> None:
    plugins = tmp_path / "my_plugins"
    (plugins / "methods").mkdir(parents=True)
    (plugins / "methods" / "mine.py").write_text("from ties_ray.testing.echo import EchoHost as Mine\n")
    code = start(f"1, 2**20, address={bare_cluster[how]!r}", factory="ties_ray.methods.mine:Mine")
    done = driver(code, cwd=tmp_path, TIES_RAY_PLUGINS=str(plugins))
    assert done.stdout == "[Answered(worker=0, ticket=1, answer='1:s:hello')]\n", done.stderr
    assert done.stderr == ""


def test_where_the_heads_process_for_a_client_ends_while_it_starts_the_connection_is_tried_again(
    bare_cluster: dict[str, str], tmp_path: Path
) -> None:
    once = Path(bare_cluster["stumble"]) / "once"
    once.touch()
    done = driver(start(f"1, 2**20, address={bare_cluster['client']!r}"), cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[Answered(worker=0, ticket=1, answer='1:s:hello')]\n", "")
    assert not once.exists(), "the process did not end"


def test_on_a_connection_of_the_callers_a_missing_ties_ray_is_refused_with_what_to_do(
    bare_cluster: dict[str, str], tmp_path: Path
) -> None:
    code = f"import ray\nray.init({bare_cluster['direct']!r}, log_to_driver=False, logging_level='ERROR')\n"
    done = driver(code + textwrap.dedent(start("1, 2**20")), cwd=tmp_path)
    assert "InputError node " in done.stdout, done.stderr
    assert "ties_ray nothing is there, not " in done.stdout
    assert "pip install ties-ray==" in done.stdout
