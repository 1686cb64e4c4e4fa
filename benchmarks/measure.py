"""Run a program and watch its workers from outside: anonymous memory and CPU time, as Linux counts them."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil

from benchmarks.family import write_family

INTERVAL = 0.01
"""Seconds between samples."""
MERGE = "import sys, ties_ray; print(ties_ray.merge(sys.argv[1]).model_dump_json())"


@dataclass
class Usage:
    """What one process took."""

    cpu: float = 0.0
    """Seconds, of user and system."""
    anonymous: int = 0
    """Bytes; the peak."""


@dataclass
class Seen:
    """One run of a program."""

    seconds: float = 0.0
    output: str = ""
    workers: list[Usage] = field(default_factory=list)
    """The processes that do the work: Ray's actors, or the program itself where it has none."""


def anonymous(pid: int) -> int:
    """Return the anonymous memory of a process in bytes, which leaves out shared libraries and mapped files.

    0 where it has just ended.
    """
    found = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def run(command: Sequence[str], *, ray: bool, python: str = sys.executable) -> Seen:
    """Run a program of this or another Python to its end; ray: what works are Ray's actors."""
    started = time.monotonic()
    used: dict[psutil.Process, Usage] = {}
    with tempfile.TemporaryFile("w+") as output:
        process = psutil.Popen([python, *command], stdout=output)
        looked = 0.0
        workers = [] if ray else [psutil.Process(process.pid)]
        while process.poll() is None:
            if ray and time.monotonic() - looked > 0.2:
                workers, looked = actors(process), time.monotonic()
            for worker in workers:
                _sample(worker, used.setdefault(worker, Usage()))
            time.sleep(INTERVAL)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, text)
    return Seen(time.monotonic() - started, text, list(used.values()))


def actors(driver: psutil.Process) -> list[psutil.Process]:
    """Return the processes of Ray's actors, which Ray names after their class."""
    found = []
    for process in driver.children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::_Worker"):
                found.append(process)
        except psutil.Error:
            continue  # it has ended meanwhile
    return found


def _sample(process: psutil.Process, used: Usage) -> None:
    try:
        times = process.cpu_times()
        used.cpu = max(used.cpu, times.user + times.system)
        used.anonymous = max(used.anonymous, anonymous(process.pid))
    except (psutil.Error, OSError):
        pass  # it has ended; what was seen stands


def merge(recipe: Mapping[str, object], *, ray: bool) -> tuple[Seen, dict[str, object]]:
    """Merge in a process of its own; return what was seen and the result record."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(recipe, file)
        file.flush()
        seen = run(["-c", MERGE, file.name], ray=ray)
    return seen, json.loads(seen.output)


@contextmanager
def family_in(folder: Path | None, size: str, num_models: int) -> Iterator[Path]:
    """Yield a folder with `base`, `model-0`, ...: the one given, which is kept, or a temporary one."""
    with tempfile.TemporaryDirectory(prefix="ties-ray-") as temporary:
        place = folder or Path(temporary)
        click.echo(f"family: {num_models} models and their base of {size} parameters, bf16, in {place}")
        write_family(place, size, num_models)
        yield place


def table(heads: Sequence[str]) -> None:
    """Begin a table."""
    click.echo(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")


def row(cells: Sequence[object]) -> None:
    """Add a row to it."""
    click.echo(f"| {' | '.join(f'{cell:,.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")


@contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """Run an S3 server on loopback (moto, whose data is in its memory); yield its endpoint. `log`: a line a request."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if process.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def upload(folder: Path, endpoint: str, bucket: str) -> None:
    """Copy a folder with all it holds into a new bucket."""
    import boto3  # type: ignore[import-untyped]

    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=bucket)
    files = [path for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda path: client.upload_file(str(path), bucket, str(path.relative_to(folder))), files))
