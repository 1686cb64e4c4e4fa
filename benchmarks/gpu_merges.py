"""Measures merges on a GPU, in one call of less than eight minutes. Without a GPU it says so, and counts proxies.

    OMP_NUM_THREADS=1 python -m benchmarks.gpu_merges [--folder /dev/shm] [--seconds 460]

One worker merges pools of 10, 100 and 1000 adapters of rank 16 on two layers of Llama-3.1-8B. It merges a pool of 100
adapters with the ranks of the public pool as well. Their outputs have the kind `delta`. Eight checkpoints of 1.1 G
parameters are merged three times: by one CPU worker, by one on the GPU, and on Ray by as many as its default takes.
`benchmarks.matrices` decomposes matrices of one layer.

Each step is a benchmark of its own, which prints its tables. When the time is up, the step ends, and no other begins.
Without a GPU, `benchmarks.gpu_proxies` counts launches, copies and waits, and measures a worker's host.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

POOL = ("benchmarks.pool", "--device", "cuda", "--layers", "2", "--memory", "1GiB", "--cache", "512MiB")
STEPS = (
    (*POOL, "--rank", "16", "--models", "10", "--models", "100"),
    ("benchmarks.merge", "--models", "8", "--size", "1B", "--run", "local/1", "--run", "local/1/cuda",
     "--run", "ray/0/cuda"),
    ("benchmarks.matrices", "--device", "cuda"),
    (*POOL, "--models", "100"),
    (*POOL, "--rank", "16", "--models", "1000"),
)  # fmt: skip
"""The steps, the most telling first."""


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="where inputs and outputs lie; else a temporary folder")
@click.option("--seconds", default=460.0, show_default=True, help="after which nothing is begun or goes on")
@click.option("--proxies", default="", help="options of `benchmarks.gpu_proxies`, which runs without a GPU")
def main(folder: Path | None, seconds: float, proxies: str) -> None:
    """Run all steps that there is time for."""
    import torch  # here, as it takes long to import

    steps: tuple[tuple[str, ...], ...] = STEPS
    if not torch.cuda.is_available():
        click.echo("There is no GPU here, so that nothing of a GPU was measured.")
        steps = (("benchmarks.gpu_proxies", *shlex.split(proxies)),)
    end = time.monotonic() + seconds
    environment = {**os.environ, **({"TMPDIR": str(folder)} if folder else {})}
    for step in steps:
        click.echo(f"\n{' '.join(step)}")
        try:
            subprocess.run([sys.executable, "-m", *step], check=True, timeout=end - time.monotonic(), env=environment)
        except subprocess.TimeoutExpired:
            click.echo("The time was up.")
            return


if __name__ == "__main__":
    main()
