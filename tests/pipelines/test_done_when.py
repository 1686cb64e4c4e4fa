"""Three engines run one merge on a cluster that wants a token. Each is killed once, and all end with the same bytes."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import psutil
import pytest

from tests.conftest import free_port, served, tool
from tests.pipelines.conformance import PLUGINS, Json, engine_running, wait_for
from tests.tools.adapters import make_pool
from ties_ray.stores import Stores
from ties_ray_pipelines.jobs import Jobs, JobsError

ENGINES = ("airflow", "dagster", "kfp")
PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port")
"""Of each node; Ray's defaults are one for a machine, so that a second node or cluster there can take no jobs."""
TOKEN = "a token of tests"
PARAMETER = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """Give credentials to whatever is started from here on: servers, cluster, engines."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_ADDRESS"))]:
            patch.delenv(name)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        for name, value in {
            "ACCESS_KEY_ID": "ties-ray",
            "SECRET_ACCESS_KEY": "a password",
            "REGION": "us-east-1",
        }.items():
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield


@pytest.fixture(scope="module")
def cluster(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Ray twice on this machine, as two nodes of one cluster; return the dashboard's address."""
    folder, port, dashboard = tmp_path_factory.mktemp("ray"), free_port(), free_port()
    shared = ["--block", "--num-cpus=2", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    address, nodes = f"http://127.0.0.1:{dashboard}", list[subprocess.Popen[bytes]]()
    with (folder / "log").open("wb") as log:

        def start(*words: str) -> None:
            own = [f"--{which}={free_port()}" for which in PORTS]
            command = [tool("ray"), "start", *shared, *own, *words]
            nodes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

        try:
            start(*head)
            wait_for(lambda: _takes_jobs(address), (folder / "log").read_text, nodes[0])
            start(f"--address=127.0.0.1:{port}")
            wait_for(lambda: _alive(address) == 2, (folder / "log").read_text, nodes[1])
            yield address
        finally:
            for node in reversed(nodes):  # `ray stop` would end every Ray of the machine
                os.killpg(node.pid, signal.SIGTERM)
            for node in nodes:
                try:
                    node.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(node.pid, signal.SIGKILL)
                    node.wait()


@pytest.fixture(scope="module")
def bucket(environment: None) -> Iterator[tuple[str, str]]:
    """Return an S3 server's endpoint and a bucket of it."""
    port, name = free_port(), f"b{secrets.token_hex(6)}"
    endpoint = f"http://127.0.0.1:{port}"
    with served([tool("moto_server"), "-H", "127.0.0.1", "-p", str(port)], port):
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
        yield endpoint, name


@pytest.mark.timeout(600)  # three engines and a cluster at once, on two cores
def test_engines_that_are_killed_once_end_with_the_same_bytes(
    cluster: str, bucket: tuple[str, str], tmp_path: Path
) -> None:
    endpoint, name = bucket
    storage = {"s3": {"endpoint_url": endpoint}}
    pool = make_pool(Stores(storage).of(f"s3://{name}/x"), f"s3://{name}/pool", num_adapters=3)
    with contextlib.ExitStack() as stack:
        running = {}
        for engine in ENGINES:
            trouble = tmp_path / engine / "trouble"
            trouble.mkdir(parents=True)
            method = {"name": "troubled", "density": 0.3, "folder": str(trouble), "trouble": "hang"}
            recipe: Json = {
                "base": pool.base,
                "models": list(pool.adapters),
                "method": method | {"parameter": PARAMETER},
                "output": {"path": f"s3://{name}/merged/{engine}", "kind": "adapter", "rank": 16},
                "storage": storage,
                "run": {"workers": 1},
            }
            case = {"id": "killed", "recipe": recipe, "address": cluster, "token": TOKEN, "retries": 2}
            case["env"] = {"TIES_RAY_PLUGINS": str(PLUGINS), "OMP_NUM_THREADS": "1"}
            variables = {"AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE": "True"}
            variables |= {"RAY_AUTH_TOKEN": TOKEN if engine == "kfp" else ""}  # the others name it themselves
            running[engine] = stack.enter_context(engine_running(engine, tmp_path / engine, [case], variables))
        for engine, process in running.items():
            wait_for((tmp_path / engine / "trouble" / "0").exists, (tmp_path / engine / "log").read_text, process)
            _driver_of(f"/merged/{engine}").send_signal(signal.SIGKILL)
        for engine, process in running.items():
            assert process.wait(240) == 0, (tmp_path / engine / "log").read_text()[-5000:]
    s3, merged = boto3.client("s3", endpoint_url=endpoint), {}
    for engine in ENGINES:
        told = json.loads((tmp_path / engine / "told.json").read_text())["killed"]
        assert told["state"] == "success", (tmp_path / engine / "log").read_text()[-5000:]
        assert told["record"]["resumed"]
        if engine == "airflow":
            assert told["link"].startswith(f"{cluster}/#/jobs/case_killed-")
            assert "task as DEFERRED" in (tmp_path / engine / "log").read_text(), "the configuration defers by default"
        key = f"merged/{engine}/adapter_model.safetensors"
        merged[engine] = s3.get_object(Bucket=name, Key=key)["Body"].read()
    assert len(merged["airflow"]) > 10_000
    assert merged["airflow"] == merged["dagster"] == merged["kfp"]


def _driver_of(output: str) -> psutil.Process:
    """Return the process of the job that merges into this output: its recipe stands in the shell's words."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(output in word for word in words) and any("ties-ray merge" in word for word in words):
            for child in process.children(recursive=True):
                if any(word.endswith("/ties-ray") for word in child.cmdline()):
                    return child
    raise AssertionError(f"no job merges into {output}")


def _takes_jobs(address: str) -> bool:
    try:
        Jobs(address).submit("true", "probe")
    except JobsError:
        return False
    return True


def _alive(address: str) -> int:
    """Return how many nodes a cluster has."""
    time.sleep(0.5)
    found = Jobs(address)._call("GET", "/api/v0/nodes")
    return sum(node["state"] == "ALIVE" for node in found["data"]["result"]["result"])
