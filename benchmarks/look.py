"""Compare models without a merge, beside plain torch that does the same with whole tensors in memory.

    OMP_NUM_THREADS=1 python -m benchmarks.look [--models 50] [--hidden 1024] [--rank 16] [--size 60M]

`compare` reads two checkpoints of a family; torch loads both and takes norms in fp64, tensor by tensor. `inspect
--compare` reads a pool of random adapters, two layers of q_proj and v_proj in bf16; torch forms all dense changes of a
matrix and multiplies them in fp64. CPU seconds are those of this process after its imports.
"""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from benchmarks import measure
from benchmarks.family import SHAPES
from ties_ray import kernels
from ties_ray.operations.compare import compare
from ties_ray.operations.pool_comparison import compare_models
from ties_ray.stores import Stores

STORES = Stores({})
CONFIG = '{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {rank}, "base_model_name_or_path": "benchmark"}}'
MODULES = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]


def write_pool(folder: Path, num_models: int, hidden: int, rank: int) -> None:
    """Write random adapters."""
    generator = torch.Generator().manual_seed(0)
    for number in range(num_models):
        adapter = folder / f"adapter-{number:04}"
        adapter.mkdir(parents=True)
        tensors = {}
        for module in MODULES:
            a = torch.randn(rank, hidden, generator=generator)
            b = torch.randn(hidden, rank, generator=generator)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.bfloat16()
            tensors[f"base_model.model.{module}.lora_B.weight"] = b.bfloat16()
        save_file(tensors, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(CONFIG.format(rank=rank))


def plain_compare(a: Path, b: Path) -> float:
    """Return the norm of the difference of two checkpoints, by torch alone."""
    total = 0.0
    for path in sorted(a.glob("*.safetensors")):
        mine, other = load_file(path), load_file(b / path.name)
        for name, tensor in mine.items():
            x, y = tensor.double(), other[name].double()
            float(x.norm()), float(y.norm()), float((x * y).sum()), int((x != y).sum())
            total += float((y - x).square().sum())
    return math.sqrt(total)


def plain_pool(folder: Path) -> torch.Tensor:
    """Return the products of all pairs of adapters, by torch alone."""
    adapters = [load_file(path) for path in sorted(folder.glob("*/adapter_model.safetensors"))]
    products = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for module in MODULES:
        name = f"base_model.model.{module}.lora_{{}}.weight"
        dense = torch.stack([
            (each[name.format("B")].double() @ each[name.format("A")].double()).flatten() for each in adapters
        ])  # fmt: skip
        products += dense @ dense.T
    return products


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU seconds of this process and the seconds that a call takes."""
    began, spent = time.monotonic(), time.process_time()
    function()
    return time.process_time() - spent, time.monotonic() - began


@click.command()
@click.option("--models", default=50, show_default=True, help="adapters of the pool")
@click.option("--hidden", default=1024, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--size", type=click.Choice(list(SHAPES)), default="60M", show_default=True, help="of the checkpoints")
def main(models: int, hidden: int, rank: int, size: str) -> None:
    """Print what comparisons cost."""
    kernels.load("cpu")
    with tempfile.TemporaryDirectory() as folder, measure.family_in(None, size, 2) as family:
        pool = Path(folder)
        write_pool(pool, models, hidden, rank)
        a, b = family / "model-0", family / "model-1"
        measure.table(["what", "CPU s", "s", "torch: CPU s", "torch: s"])
        for what, ours, theirs in (
            (f"compare, {size}", lambda: compare(STORES, str(a), str(b)), lambda: plain_compare(a, b)),
            (
                f"inspect --compare, {models} adapters",
                lambda: compare_models(STORES, [f"{pool}/adapter-*"]),
                lambda: plain_pool(pool),
            ),
        ):
            measure.row([what, *(f"{value:.2f}" for value in (*timed(ours), *timed(theirs)))])


if __name__ == "__main__":
    main()
