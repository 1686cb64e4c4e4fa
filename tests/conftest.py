"""Servers and other real things that several test files share."""

import functools
import os
import secrets
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest

# Ray reads it when it is first imported, by whatever test file; else a start would write a token into the user's home.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from tests.tools.families import Family, make_family
from tests.tools.merging import plug
from ties_ray.plugins import PLUGIN_FOLDER
from ties_ray.stores import Stores


class Bucket(NamedTuple):
    """A fresh bucket of an S3 server; the environment holds the credentials."""

    uri: str
    storage: dict[str, dict[str, object]]
    """The recipe's `storage` section."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(command: list[str], port: int, **environment: str) -> Iterator[None]:
    """Run a server until the block ends; it counts as started when its port takes connections."""
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, f"{command[0]} ended by itself"
            assert time.monotonic() < deadline, f"{command[0]} does not start"
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tool(name: str) -> str:
    """Return the path of a program that was installed with the test dependencies."""
    return str(Path(sys.executable).with_name(name))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Return the endpoint of a moto server: the most complete S3 of the test dependencies; checks no signatures."""
    port = free_port()
    with served([tool("moto_server"), "-H", "127.0.0.1", "-p", str(port)], port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def juicefs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the endpoint of a JuiceFS gateway: a second S3, by other authors, which checks signatures."""
    folder, port = tmp_path_factory.mktemp("juicefs"), free_port()
    database = f"sqlite3://{folder}/meta.db"
    subprocess.run(
        [tool("juicefs"), "format", "--storage", "file", "--bucket", f"{folder}/data/", database, "test"],
        check=True,
        capture_output=True,
    )
    command = [tool("juicefs"), "gateway", "--multi-buckets", "--keep-etag", "--no-usage-report", "--no-banner"]
    command += ["--cache-dir", str(folder / "cache"), "--log", str(folder / "log"), database, f"127.0.0.1:{port}"]
    with served(command, port, MINIO_ROOT_USER="ties-ray", MINIO_ROOT_PASSWORD="a password of tests"):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put credentials into the environment, where the SDK finds them, and keep those of the machine out."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ties-ray")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a password of tests")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def s3_bucket(s3_server: str, s3_credentials: None) -> Bucket:
    return _bucket(s3_server)


@pytest.fixture
def juicefs_bucket(juicefs_server: str, s3_credentials: None) -> Bucket:
    return _bucket(juicefs_server)


def _bucket(endpoint: str) -> Bucket:
    name = f"b{secrets.token_hex(6)}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=name)
    return Bucket(f"s3://{name}", {"s3": {"endpoint_url": endpoint}})


@pytest.fixture(scope="session")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Family]:
    """Return `make_family` on this disk, which makes each family once; the tests that share it only read it."""
    root, store = tmp_path_factory.mktemp("families"), Stores({}).of("/")

    @functools.cache
    def make(**how: Any) -> Family:
        return make_family(store, str(root / secrets.token_hex(4)), **how)

    return make


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Be connected to a local Ray of four CPUs and two GPUs (only counted), one for the whole session."""
    import ray

    with pytest.MonkeyPatch.context() as environment, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield
    ray.shutdown()


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let recipes of this process and of its workers use what lies in tests/plugins; return that folder."""
    folder = Path(__file__).with_name("plugins")
    monkeypatch.setenv(PLUGIN_FOLDER, str(folder))
    plug(folder, monkeypatch.setattr)
    return folder
