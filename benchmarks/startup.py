"""How long a command takes before it does anything: `ties-ray --help`, `ties-ray plan`, and what an import costs.

    python -m benchmarks.startup [--runs 5]

The best of some runs, each a process of its own; files are in the page cache. A bare Python is the limit. Of a merge,
what passes until the first byte of an input's weights is asked for, by its own profile. The first merge compiles the
kernels, unless the installation holds them (`python -m ties_ray.kernels`).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from benchmarks import measure
from benchmarks.family import write_family

HEAVY = ("torch", "ray", "numba", "numpy", "pydantic", "botocore", "fsspec", "rich")


def best(command: list[str], runs: int) -> float:
    """Return the shortest time of a command in seconds."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return min(times)


def first_read(command: list[str], profile: Path, runs: int, environment: dict[str, str]) -> float:
    """Return the shortest time, in seconds, until a merge that writes its profile begins to read."""
    times: list[float] = []
    for _ in range(runs):
        started = time.time()
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment
        )
        events = json.loads(profile.read_text())
        times.append(min(event["ts"] for event in events if event["name"] == "read") / 1e6 - started)
    return min(times)


@contextmanager
def running_cluster(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Yield the address of a Ray cluster on this machine. folder: short, for its sockets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=2",
    ]
    command += [f"--temp-dir={folder}", "--include-dashboard=false", "--object-store-memory=100000000"]
    with (folder / "log").open("wb") as log:
        ray = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=os.environ | environment)
    try:
        time.sleep(10)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(ray.pid, signal.SIGTERM)
        ray.wait()


def loaded(program: str) -> list[str]:
    """Return which heavy packages are loaded after a program has run."""
    tell = f"import json, sys; print(); print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    code = f"try:\n  {program}\nexcept SystemExit: pass\n{tell}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [str(name) for name in json.loads(done.stdout.splitlines()[-1])]


def through_click(*words: str) -> str:
    """Return a program that runs the command line in its own process."""
    return f"from ties_ray.cli.commands import commands; commands({list(words)!r})"


@click.command()
@click.option("--runs", default=5, show_default=True)
def main(runs: int) -> None:
    """Print seconds and what was loaded."""
    python, ties_ray = sys.executable, str(Path(sys.executable).with_name("ties-ray"))
    with tempfile.TemporaryDirectory(prefix="ties-ray-") as temporary:
        folder = Path(temporary)
        write_family(folder, "1M", 2)
        recipe = folder / "recipe.json"
        models = [str(folder / "model-*")]
        recipe.write_text(
            json.dumps(
                {"base": str(folder / "base"), "models": models, "method": "ties", "output": str(folder / "out")}
            )
        )
        rows = [
            ("python -c pass", [python, "-c", "pass"], "pass"),
            ("import ties_ray", [python, "-c", "import ties_ray"], "import ties_ray"),
            ("ties-ray --help", [ties_ray, "--help"], through_click("--help")),
            ("ties-ray methods ties", [ties_ray, "methods", "ties"], through_click("methods", "ties")),
            (
                "ties-ray plan, 2 small models",
                [ties_ray, "plan", str(recipe), "--no-rates"],
                through_click("plan", str(recipe), "--no-rates"),
            ),
            ("import torch, numba", [python, "-c", "import torch, numba"], "import torch, numba"),
            ("import ray", [python, "-c", "import ray"], "import ray"),
        ]
        measure.table(("command", "seconds", "loads"))
        for name, command, program in rows:
            measure.row((name, best(command, runs), ", ".join(loaded(program)) or "-"))
        profile = folder / "profile.json"

        def merge(where: str, executor: str, runs: int, environment: dict[str, str]) -> None:
            settings = ["--fresh", "--profile", str(profile), "--set", f"run.executor={executor}"]
            seconds = first_read([ties_ray, "merge", str(recipe), *settings], profile, runs, environment)
            measure.row((f"merge {where}: first byte read", seconds, "all"))

        cache = {"NUMBA_CACHE_DIR": str(folder / "cache")}
        merge("in this process, kernels are compiled", "local", 1, cache)
        merge("in this process", "local", min(runs, 2), cache)
        merge("on a cluster that starts by itself", "ray", min(runs, 2), cache)
        with running_cluster(folder, cache) as address:
            merge("on a running cluster", "ray", 2, {"RAY_ADDRESS": address})


if __name__ == "__main__":
    main()
