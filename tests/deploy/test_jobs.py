"""The client of the jobs API, against a real cluster that wants a token, and against servers that misbehave."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import free_port, tool
from tests.tools.families import Family
from ties_ray.cli.commands import commands
from ties_ray_pipelines import jobs as client
from ties_ray_pipelines.jobs import Job, Jobs, JobsError, exit_code_of, merge_command, record_in, visible

SCRIPT = Path(client.__file__)
TOKEN = "a token of tests"


# -- without a cluster


@pytest.mark.parametrize(
    ("job", "record", "code"),
    [
        (Job("j", "SUCCEEDED", 0, "", ""), None, 0),
        (Job("j", "FAILED", 2, "JOB_ENTRYPOINT_COMMAND_ERROR", ""), None, 2),
        (Job("j", "STOPPED", None, "", ""), None, 143),
        (Job("j", "FAILED", -9, "JOB_ENTRYPOINT_COMMAND_ERROR", ""), None, 4),
        (Job("j", "FAILED", -15, "JOB_ENTRYPOINT_COMMAND_ERROR", ""), None, 143),
        (Job("j", "FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", ""), None, 4),
        (Job("j", "FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", ""), None, 5),
        (Job("j", "FAILED", None, "", ""), {"status": "failed", "error": {"kind": "input"}}, 3),
        (Job("j", "FAILED", None, "", ""), {"status": "done", "error": None}, 0),
    ],
)
def test_an_exit_code_is_the_commands_own_or_what_record_and_cluster_tell(
    job: Job, record: dict[str, object] | None, code: int
) -> None:
    assert exit_code_of(job, record) == code


def test_the_result_record_is_the_last_one_in_a_log() -> None:
    def record(status: str) -> str:
        return json.dumps({"schema_version": 1, "status": status, "notes": ["}\n{"], "error": {"kind": "x"}}, indent=2)

    log = f"plan\n{record('failed')}\nagain\n{record('done')}\n{{\n  not json\n"
    found = record_in(log)
    assert found is not None
    assert found["status"] == "done"
    assert record_in("no record { here }\n") is None


@pytest.mark.parametrize(
    "log",
    [
        "{\n" + '"a": {' * 100_000,
        "{\n" + '"a": ' + "[" * 100_000,
        '{\n"schema_version": 1, "status": "done", "error": "x"}',
        '{\n"schema_version": 1, "status": "done", "error": ["x"]}',
        "{\n" * 5000,
    ],
)
def test_a_log_that_is_made_to_hurt_holds_no_record(log: str) -> None:
    assert record_in(log) is None
    good = json.dumps({"schema_version": 1, "status": "done"}, indent=2)
    assert record_in(f"{good}\n{log}") == {"schema_version": 1, "status": "done"}


@given(st.text(st.characters() | st.sampled_from("\x1b\x9b\r\n\u202e[;m0"), max_size=40))
def test_nothing_that_a_log_holds_moves_the_cursor_or_turns_the_text(log: str) -> None:
    assert all(line.isprintable() for line in visible(log).replace("\t", "\n").split("\n"))
    assert visible(visible(log)) == visible(log)


def test_colours_of_a_log_are_left_out_and_other_escapes_are_shown() -> None:
    assert visible("\x1b[36m(pid=1)\x1b[0m \x1b]0;owned\x07\n\tdone") == "(pid=1) \\x1b]0;owned\\x07\n\tdone"
    assert str(JobsError("\x1b[2Jgone", 5)) == "\\x1b[2Jgone"


def test_a_jobs_environment_takes_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    code = client.main(["--id", "x", "--env", "HTTPS_PROXY=http://user:hidden@proxy:3128", "--", "true"])
    assert code == 2
    assert "HTTPS_PROXY is a URL with a user or password" in (told := capsys.readouterr().err)
    assert "hidden" not in told


def test_a_recipe_travels_in_the_command_and_a_huge_one_is_refused() -> None:
    command = merge_command({"base": "it's $HOME"}, overrides=["method.density=0.3"], result="s3://b/r.json")
    sent, _, merge = command.partition(" | ")
    assert json.loads(shlex.split(sent)[2]) == {"base": "it's $HOME"}
    assert shlex.split(merge)[:3] == ["ties-ray", "merge", "--json"]
    assert shlex.split(merge)[-2:] == ["--", "-"]
    assert "--result s3://b/r.json" in merge
    assert "run.address=auto" in merge
    assert merge_command("s3://r/x.yaml") == "ties-ray merge --json --set run.address=auto -- s3://r/x.yaml"
    with pytest.raises(JobsError, match="put it where the cluster reads it") as refused:
        merge_command({"models": ["m" * 200_000]})
    assert refused.value.exit_code == 2


def test_an_address_that_is_not_the_dashboards_is_refused() -> None:
    with pytest.raises(JobsError, match="no http address"):
        Jobs("ray://head:10001")
    assert Jobs("head:8265").address == "http://head:8265"


Answer = Callable[[str], tuple[int, object]]


@pytest.fixture
def served() -> Iterator[Callable[[Answer], str]]:
    """Return how to start a server on loopback that answers by a function of the request's path."""
    servers: list[ThreadingHTTPServer] = []

    def serve(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answer(self.path)
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "code"), [(500, 5), (429, 5), (503, 5), (401, 3), (403, 3), (400, 2), (404, 4)])
def test_what_the_server_refuses_has_the_exit_code_of_its_kind(
    served: Callable[[Answer], str], status: int, code: int
) -> None:
    jobs = Jobs(served(lambda path: (status, "Traceback\nValueError: because\n")))
    with pytest.raises(JobsError, match=f"{status}: ValueError: because") as refused:
        jobs.info("j")
    assert refused.value.exit_code == code


def test_a_page_that_is_not_rays_and_a_closed_port_mean_retry_later(served: Callable[[Answer], str]) -> None:
    for address in (served(lambda path: (200, "<html>")), f"http://127.0.0.1:{free_port()}"):
        with pytest.raises(JobsError, match="does not answer as Ray does") as refused:
            Jobs(address).info("j")
        assert refused.value.exit_code == 5


def test_a_log_is_followed_past_a_dashboard_that_fails_for_a_while(served: Callable[[Answer], str]) -> None:
    calls: list[str] = []

    def answer(path: str) -> tuple[int, object]:
        calls.append(path)
        if 2 < len(calls) < 7:
            return 503, "restarting"
        if path.endswith("/logs"):
            return 200, {"logs": "one\n" if len(calls) < 7 else "one\ntwo\n"}
        return 200, {"submission_id": "j", "status": "RUNNING" if len(calls) < 7 else "SUCCEEDED"}

    jobs = Jobs(served(answer))
    assert list(jobs.follow("j", poll=0.01)) == ["one\n", "two\n"]
    calls[:] = ["", ""]
    with pytest.raises(JobsError, match="503"):
        list(jobs.follow("j", poll=0.01, patience=0.0))


# -- on a cluster


class Cluster(NamedTuple):
    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Return a cluster of this machine, started as an operator does, that wants a token."""
    folder = tmp_path_factory.mktemp("ray")
    dashboard = free_port()
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["start", "--head", "--block", "--num-cpus=2", "--object-store-memory=100000000", "--port=0"]
    words += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]
    agent = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    )
    words += [f"--{name}={free_port()}" for name in agent]  # another cluster of this machine may have the usual ones
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [tool("ray"), *words], env=kept | own | paths, stdout=log, stderr=log, start_new_session=True
        )
    jobs = Jobs(f"http://127.0.0.1:{dashboard}", TOKEN)
    try:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                jobs._attempts("any")
                break
            except JobsError:
                assert time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.5)
        yield Cluster(jobs.address, own)
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # `ray stop` would end every Ray of the machine
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_wrong_token_is_refused_at_once(cluster: Cluster) -> None:
    with pytest.raises(JobsError, match=r"40[13]") as refused:
        Jobs(cluster.address, "another").submit("true", "refused")
    assert refused.value.exit_code == 3


def test_a_merge_runs_as_a_job_once_and_again(
    cluster: Cluster, family_of: Callable[..., Family], tmp_path: Path
) -> None:
    family = family_of(num_models=2)
    recipe = {"base": family.base, "models": list(family.models), "method": "average", "output": str(tmp_path / "out")}
    jobs, lines = Jobs(cluster.address, TOKEN), []
    command = merge_command(recipe, overrides=["run.workers=1"])
    first = client.run(jobs, command, "merge", show=lines.append, poll=0.5)
    assert (first.submission_id, first.exit_code, first.retryable) == ("merge", 0, False), "".join(lines)
    assert first.record is not None
    assert first.record["status"] == "done"
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "plan: reading headers" in "".join(lines)
    again = client.run(jobs, command, "merge", show=lines.append, poll=0.5)
    assert (again.submission_id, again.exit_code) == ("merge-2", 0)
    assert again.record is not None
    assert again.record["reused"] is True


def test_the_command_line_sends_a_recipe_and_shows_what_came_of_it(
    cluster: Cluster, family_of: Callable[..., Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(num_models=2)
    monkeypatch.chdir(Path(family.base).parent)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: base\nmodels: [model-0, model-1]\nmethod: average\noutput: {tmp_path}/sent\n")
    words = ["submit", str(recipe), "--address", cluster.address, "--set", "run.workers=1"]
    done = CliRunner().invoke(commands, words)
    assert done.exit_code == 0, done.output
    assert f"done: {tmp_path}/sent" in done.stdout
    assert "merge: merging" in done.stderr
    record = json.loads(CliRunner().invoke(commands, [*words, "--json", "--quiet"]).stdout)
    assert record["reused"] is True


def test_a_recipe_is_checked_before_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bose: b\nmodels: [a]\nmethod: average\noutput: o\n")
    words = ["submit", str(recipe), "--address", "http://127.0.0.1:9"]
    done = CliRunner().invoke(commands, words)
    assert done.exit_code == 2
    assert "line 1: bose: unknown key; did you mean 'base'?" in done.stderr
    recipe.write_text("base: b\nmodels: [a]\nmethod: average\noutput: o\n")
    assert CliRunner().invoke(commands, words).exit_code == 5
    monkeypatch.setitem(sys.modules, "ties_ray_pipelines", None)
    refused = CliRunner().invoke(commands, words)
    assert refused.exit_code == 3
    assert "pip install ties-ray-pipelines" in refused.stderr


def test_a_recipe_with_a_typo_ends_with_the_code_that_ray_job_submit_hides(cluster: Cluster) -> None:
    outcome = client.run(Jobs(cluster.address, TOKEN), merge_command({"bose": "b"}), "typo", show=str, poll=0.5)
    assert (outcome.exit_code, outcome.retryable) == (2, False)
    assert outcome.record is not None
    assert outcome.record["error"]["kind"] == "recipe"


def test_a_job_that_runs_is_joined_and_a_signal_stops_it(cluster: Cluster) -> None:
    words = [sys.executable, "-S", str(SCRIPT), "--address", cluster.address, "--id", "long", "--env", "A=it's"]
    command = "echo A is $A; sleep 60"
    with subprocess.Popen(
        [*words, "--", "sh", "-c", command],
        env={"PATH": "/usr/bin:/bin", "RAY_AUTH_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdout is not None
        assert any("A is it's" in line for line in started.stdout)
        jobs = Jobs(cluster.address, TOKEN)
        assert jobs.submit("false", "long") == "long"
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) == 143
    assert list(jobs.follow("long", poll=0.2))
    assert jobs.outcome("long").exit_code == 143
    assert jobs.submit("true", "long") == "long-2"
