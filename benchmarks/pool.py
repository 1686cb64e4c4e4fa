"""Merge pools of LoRA adapters shaped like the public ones: ns per (element, adapter) by round, memory, bytes read.

    OMP_NUM_THREADS=1 python -m benchmarks.pool [--models 10 --models 100] [--rank 16] [--kind delta] [--peft]

One layer (--layers) of Llama-3.1-8B's real shapes, or some of its --modules, or fewer rows and columns (--shrink).
Ranks, targets and scales are dealt out as they were found in 955 public adapters; factors are random, in bf16 or fp32:
about 6 MB an adapter and layer, 3 GB for 500 (--rank 16 for all: 2.6 MB, 1.3 GB). One worker merges by TIES, density
0.2, which counts twice and then merges. `elements` are those that the adapters change, summed over adapters. CPU
seconds of a round are those of the whole process (`start`: imports and planning); of Ray's workers, whose CPU the
driver does not see, the first table alone tells. --kind checkpoint merges into a base.

--peft: beside it what PEFT does with eight dense deltas of rank 16 of one matrix (its `ties_svd`, up to the SVD), and
its `ties` of the factors, which computes something else: A and B are trimmed and elected each for itself.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import click
import torch

import ties_ray
from benchmarks import measure
from benchmarks.family import hash_of
from benchmarks.memory import IDLE
from ties_ray.safetensors import build, canonical_order

T = TypeVar("T")
HIDDEN, INNER, KEYS = 4096, 14336, 1024
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""Of one layer of Llama-3.1-8B: (out, in)."""
RANKS = {8: 0.29, 16: 0.30, 32: 0.14, 64: 0.21, 128: 0.03, 256: 0.03}
TARGETS = {tuple(MODULES): 0.86, ("self_attn.q_proj", "self_attn.v_proj"): 0.11, tuple(MODULES)[:3]: 0.03}
SCALES = {2.0: 0.52, 1.0: 0.29, 0.5: 0.12, 0.25: 0.05, 4.0: 0.02}
"""Shares of a public pool (955 adapters of Llama-3.1-8B-Instruct): r, target modules, alpha / r."""
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
CHILD = """\
import json, sys, time, ties_ray
spent, stage, then = {}, "start", (time.process_time(), time.monotonic())
def watch(progress):
    global stage, then
    now = time.process_time(), time.monotonic()
    seconds = spent.setdefault(stage, [0.0, 0.0])
    spent[stage] = [total + new - old for total, new, old in zip(seconds, now, then)]
    stage, then = progress.stage, now
result = ties_ray.merge(sys.argv[1], watch=watch)
print(json.dumps({"stages": spent, "result": result.model_dump(mode="json")}))
"""
PEFT = """\
import json, sys, time, torch
from peft.utils.merge_utils import ties
rows, columns, rank, num_models = map(int, sys.argv[1:])
torch.set_num_threads(1)
random = torch.Generator().manual_seed(0)
def factors(): return [torch.randn(rows, rank, generator=random), torch.randn(rank, columns, generator=random)]
pool, weights, spent = [factors() for _ in range(num_models)], torch.ones(num_models), {}
def timed(name, run):
    then = time.process_time()
    found = run()
    spent[name] = time.process_time() - then
    return found
if num_models:
    timed("A and B, ties (something else)", lambda: [ties(list(side), weights, 0.2) for side in zip(*pool)])
    deltas = timed("B @ A", lambda: [2.0 * (left @ right) for left, right in pool])
    timed("deltas, ties", lambda: ties(deltas, weights, 0.2))
print(json.dumps(spent))
"""


class Adapter(NamedTuple):
    """What tells one adapter of a pool from the next."""

    rank: int
    targets: tuple[str, ...]
    scale: float
    """alpha / r."""


def dealt(number: int, rank: int | None) -> Adapter:
    """Return adapter `number` of any pool: every beginning of the sequence has the shares of the whole, about."""

    def pick(shares: Mapping[T, float], axis: int) -> T:
        # Roberts's R3 sequence: even in all three at once.
        place = math.fmod(0.5 + (number + 1) * 1.2207440846057596 ** -(axis + 1), 1.0)
        *others, last = shares
        for value in others:
            place -= shares[value]
            if place < 0:
                return value
        return last

    return Adapter(rank or pick(RANKS, 0), pick(TARGETS, 1), pick(SCALES, 2))


class Shape(NamedTuple):
    """Which matrices there are."""

    layers: int
    modules: Mapping[str, tuple[int, int]]

    def paths(self, targets: Sequence[str] | None = None) -> Iterator[tuple[str, int, int]]:
        """Yield (path, rows, columns), of some targets or of all."""
        for layer in range(self.layers):
            for module, size in self.modules.items():
                if targets is None or module in targets:
                    yield f"model.layers.{layer}.{module}", *size

    def elements(self, adapters: Sequence[Adapter]) -> int:
        """Return the elements that the adapters change, summed."""
        return sum(rows * columns for one in adapters for _, rows, columns in self.paths(one.targets))


def write(file: Path, dtype: str, tensors: Mapping[str, tuple[int, int]], std: float) -> None:
    """Write random tensors, the same for the same names, file and folder."""
    ordered = sorted(tensors, key=lambda name: canonical_order(dtype, name))
    random = torch.Generator().manual_seed(hash_of("/".join(file.parts[-2:])))
    with file.open("wb") as out:
        out.write(build([(name, dtype, tensors[name]) for name in ordered], {"format": "pt"}))
        for name in ordered:
            values = torch.randn(tensors[name], generator=random).mul_(std).to(DTYPES[dtype])
            out.write(values.view(torch.uint8).numpy().data)


def write_adapter(folder: Path, shape: Shape, adapter: Adapter, dtype: str) -> int:
    """Write an adapter as PEFT does; return the size of its weights."""
    folder.mkdir()
    targets = sorted(module.rpartition(".")[2] for module in adapter.targets)
    config = {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.scale * adapter.rank,
              "target_modules": targets, "task_type": "CAUSAL_LM", "base_model_name_or_path": "pool/base"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for path, rows, columns in shape.paths(adapter.targets):
        tensors[f"base_model.model.{path}.lora_A.weight"] = adapter.rank, columns
        tensors[f"base_model.model.{path}.lora_B.weight"] = rows, adapter.rank
    write(folder / "adapter_model.safetensors", dtype, tensors, 0.01)
    return (folder / "adapter_model.safetensors").stat().st_size


def write_base(folder: Path, shape: Shape) -> None:
    """Write a base of these matrices alone, bf16."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = {f"{path}.weight": (rows, columns) for path, rows, columns in shape.paths()}
    write(folder / "model.safetensors", "BF16", tensors, 0.02)


def report_peft(rows: int, columns: int, num_models: int) -> None:
    """Print what PEFT takes for one matrix."""
    click.echo(f"\nPEFT, {num_models} adapters of rank 16, one matrix of {rows} x {columns}")
    idle, seen = (
        measure.run(["-c", PEFT, str(rows), str(columns), "16", str(count)], ray=False) for count in (0, num_models)
    )
    peak = (seen.workers[0].anonymous - idle.workers[0].anonymous) / 1e6
    measure.table(("PEFT", "CPU s", "ns per element, adapter", "peak MB of all"))
    for name, seconds in json.loads(seen.output).items():
        measure.row((name, seconds, seconds / rows / columns / num_models * 1e9, peak))


@contextmanager
def pool_in(
    folder: Path | None, shape: Shape, adapters: Sequence[Adapter], dtype: str, *, base: bool
) -> Iterator[tuple[Path, list[int]]]:
    """Yield a folder with `base`, `adapter-0000`, ..., and the adapters' sizes; temporary, in `folder` or elsewhere."""
    with tempfile.TemporaryDirectory(prefix="ties-ray-", dir=folder) as temporary:
        place = Path(temporary)
        sizes = [write_adapter(place / f"adapter-{n:04d}", shape, one, dtype) for n, one in enumerate(adapters)]
        click.echo(f"{len(sizes)} adapters, mean rank {sum(one.rank for one in adapters) / len(sizes):.0f}, {dtype}, "
                   f"{sum(sizes) / 1e9:.2f} GB, for {shape.elements([Adapter(1, tuple(shape.modules), 1.0)]):,} "
                   f"elements of a base")  # fmt: skip
        if base:
            write_base(place / "base", shape)
        yield place, sizes


@click.command()
@click.option("--models", multiple=True, default=[10, 100], show_default=True, help="how many; may be repeated")
@click.option("--layers", default=1, show_default=True)
@click.option("--modules", default="", help="some alone, as q_proj,v_proj")
@click.option("--shrink", default=1, show_default=True, help="divides rows and columns")
@click.option("--rank", type=int, help="of all adapters; else as in the public pool")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="BF16", show_default=True)
@click.option("--kind", type=click.Choice(["delta", "adapter", "checkpoint"]), default="delta", show_default=True)
@click.option("--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--workers", default=1, show_default=True)
@click.option("--memory", default="512MiB", show_default=True, help="the recipe's run.memory")
@click.option("--cache", default="64MiB", show_default=True, help="the recipe's run.cache")
@click.option("--peft", is_flag=True, help="measure PEFT, too")
@click.option("--folder", type=click.Path(path_type=Path), help="where to write; else where temporary files go")
def main(
    models: tuple[int, ...], layers: int, modules: str, shrink: int, rank: int | None, dtype: str, kind: str,
    executor: str, device: str, workers: int, memory: str, cache: str, peft: bool, folder: Path | None,
) -> None:  # fmt: skip
    """Make a pool, merge its first adapters, more and more of them, and print what each round took."""
    torch.set_num_threads(1)
    known = {
        path: (rows // shrink, columns // shrink)
        for path, (rows, columns) in MODULES.items()
        if not modules or path.rpartition(".")[2] in modules.split(",")
    }
    shape, adapters = Shape(layers, known), [dealt(number, rank) for number in range(max(models))]
    # An adapter must change something of what there is.
    adapters = [one if set(one.targets) & set(known) else one._replace(targets=tuple(known)) for one in adapters]
    (idle,) = measure.run(["-c", IDLE, executor], ray=executor == "ray").workers
    found = []
    with pool_in(folder, shape, adapters, dtype, base=kind == "checkpoint") as (place, sizes):
        measure.table(("adapters", "elements, 1e9", "factors GB", "read GB", "read / factors", "requests (planned)",
                       "planned MB", "peak MB", "seconds", "CPU s", "ns per element, adapter"))  # fmt: skip
        for count in models:
            output = {"path": str(place / "merged"), "kind": kind} | ({"rank": 64} if kind == "adapter" else {})
            recipe = {
                "models": [str(place / f"adapter-{number:04d}") for number in range(count)],
                "method": {"name": "ties", "density": 0.2},
                "output": output,
                "run": {
                    "executor": executor,
                    "workers": workers,
                    "device": device,
                    "memory": memory,
                    "cache": cache,
                },
            } | ({"base": str(place / "base")} if kind == "checkpoint" else {})
            plan = ties_ray.plan(recipe)
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                json.dump(recipe, file)
                file.flush()
                seen = measure.run(["-c", CHILD, file.name], ray=executor == "ray")
            told = json.loads(seen.output)
            result, elements, factors = told["result"], shape.elements(adapters[:count]), sum(sizes[:count])
            planned = sum(round_.requests for round_ in plan.merges[0].rounds)
            peak = max(worker.anonymous for worker in seen.workers) - idle.anonymous
            cpu = sum(worker.cpu - idle.cpu for worker in seen.workers)
            measure.row((count, elements / 1e9, factors / 1e9, result["bytes_read"] / 1e9,
                         result["bytes_read"] / factors, f"{result['requests']:,} ({planned:,})", plan.memory / 1e6,
                         peak / 1e6, seen.seconds, cpu, cpu / elements * 1e9))  # fmt: skip
            found.append((count, elements, told["stages"]))
            shutil.rmtree(place / "merged")
    measure.table(("adapters", "round", "seconds", "CPU s", "ns per element, adapter"))
    for count, elements, stages in found:
        for stage, (cpu, seconds) in stages.items():
            measure.row((count, stage, seconds, cpu, cpu / elements * 1e9))
    if peft:
        report_peft(HIDDEN // shrink, HIDDEN // shrink, 8)


if __name__ == "__main__":
    main()
