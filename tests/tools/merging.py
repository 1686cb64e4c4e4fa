"""What the tests of whole merges share: run one, read what it wrote, compare it."""

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.tools.families import Family
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.operations import merging, sweeping
from ties_ray.operations.pool import open_pool
from ties_ray.planning.plan import Plan
from ties_ray.plugins import PLUGIN_FOLDER, search_path
from ties_ray.recipe.parse import parse, validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.recipe.settings import is_sweep, sweep_of
from ties_ray.reports.records import MergeResult, Progress
from ties_ray.state.manifest import Manifest, find_runs
from ties_ray.stores import Stores

LOCAL = {"executor": "local"}
INDEX = "model.safetensors.index.json"
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
SMALLEST = {torch.bfloat16: -133, torch.float16: -24, torch.float32: -149, torch.float64: -1074}
"""Exponents of the smallest denormal numbers."""


def recipe_of(
    family: Family,
    output: object,
    method: object,
    *,
    weights: Sequence[float] | None = None,
    densities: Sequence[float | None] | None = None,
    **more: Any,
) -> Recipe:
    """Return the recipe of a whole family; `output` is a path or a mapping, without a word locally."""
    entries: list[dict[str, object]] = [{"path": uri} for uri in family.models]
    for entry, weight in zip(entries, weights or (), strict=False):
        entry["weight"] = weight
    for entry, density in zip(entries, densities or (), strict=False):
        entry["density"] = density
    written = output if isinstance(output, Mapping) else {"path": str(output)}
    data = {"base": family.base, "models": entries, "method": method, "output": written, "run": LOCAL}
    return validate(data | more)


class Stop(Exception):
    """Ends a merge at a stage, as a kill would."""


def stop_at(stage: str) -> Callable[[Progress], None]:
    """Return a watch that ends a merge when it reaches a stage."""

    def watch(progress: Progress) -> None:
        if progress.stage == stage:
            raise Stop

    return watch


def merge(family: Family, output: object, method: object, *, sizes: Sizes = SIZES, **more: Any) -> MergeResult:
    return merging.merge(recipe_of(family, output, method, **more), sizes=sizes)


def carried_out(result: MergeResult, storage: Mapping[str, Any] | None = None) -> Plan:
    """Return the plan of a finished merge as its barriers left it."""
    stores = Stores(dict(storage or {}))
    generation = max(generation for run, generation in find_runs(stores, result.output) if run == result.run_id)
    plan = Manifest(stores, Manifest.folder_of(result.output, result.run_id, generation)).read_last_plan()
    assert plan
    return plan


def draw_sizes(draw: random.Random) -> Sizes:
    """Return small random sizes; with the usual ones a cut is invisible on a small family."""
    part = draw.choice([4096, 8192, 16_384])
    return replace(
        SIZES,
        least_part=part,
        most_part=part,
        max_shard=part * draw.randint(1, 3),
        min_range=draw.choice([700, 3000, 2**20]),
        max_block=draw.choice([97, 256, 1001, 4096]),
        shards_at_least=draw.choice([2, 5, 100]),
        min_resident_block=draw.choice([0, 2**30]),
        model_group=draw.choice([1, 2, 3, 32]),
        ahead=draw.choice([1, 2, 4]),
        models_per_pass=draw.choice([1, 3, 4, 16]),
        factored_models_per_pass=draw.choice([1, 3, 32]),
        record_shards=draw.choice([1, 2, 256]),
    )


def weight_files(folder: str | Path) -> list[Path]:
    """Return the weight files that a loader would open, by way of the index if there is one."""
    folder = Path(folder)
    if not (folder / INDEX).exists():
        return [folder / "model.safetensors"]
    return sorted({folder / name for name in json.loads((folder / INDEX).read_bytes())["weight_map"].values()})


def read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, read with the safetensors library."""
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def digests(folder: str | Path) -> dict[str, str]:
    """Return the SHA-256 of every weight file and of the index."""
    paths = [*weight_files(folder), *Path(folder).glob(INDEX)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def quantum(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance of neighbouring numbers of `dtype` around fp64 `values`."""
    exponents = torch.frexp(values).exponent - 1 - MANTISSA[dtype]
    return torch.ldexp(torch.ones_like(values), exponents.clamp(min=SMALLEST[dtype]))


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return fp64 `values` rounded once to nearest even."""
    if dtype == torch.float64:
        return values
    step = quantum(values, dtype)
    exact = torch.where(values == 0, values, (values / step).round() * step)
    result = exact.to(dtype)
    assert torch.equal(result.double(), exact), "an overflow, which no test here means"
    return result


def fp32(value: float) -> float:
    """Return a number rounded to fp32."""
    assert math.isfinite(value)
    return float(torch.tensor(value, dtype=torch.float32))


def merge_and_die(recipe: Recipe | Mapping[str, object], plugin_folder: Path) -> int:
    """Merge in a process of its own, with the plugins of a folder; return its exit code.

    Plain data is a sweep, or a change of a pool: `pool`, and `add` or `drop`.

    It is -9 where the process was killed.
    """
    context = multiprocessing.get_context("forkserver")  # imports once, where a new interpreter takes seconds a merge
    context.set_forkserver_preload(["tests.tools.merging", "ties_ray.worker.worker", "ties_ray.kernels.cpu"])
    if isinstance(recipe, Recipe):
        text = recipe.model_dump_json(exclude_unset=True, by_alias=True)
    else:
        text = json.dumps(recipe)
    process = context.Process(target=_merge_plugged, args=(text, str(plugin_folder), dict(os.environ)))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the merge hangs"
    return process.exitcode


def plug(folder: Path, setattr: Callable[[object, str, object], None] = setattr) -> None:
    """Let recipes of this process and of its workers use what lies in a folder laid out as `ties_ray`."""
    for name in sorted(path.name for path in folder.iterdir()):
        package = importlib.import_module(f"ties_ray.{name}")
        setattr(package, "__path__", search_path(name, list(package.__path__)))


def _merge_plugged(text: str, folder: str, environment: Mapping[str, str]) -> None:
    os.environ.clear()  # the server of forks has that of its first caller
    os.environ.update(environment)
    os.environ[PLUGIN_FOLDER] = folder
    plug(Path(folder))
    data = json.loads(text)
    if is_sweep(data):
        sweeping.sweep(sweep_of(data))
    elif "pool" in data:
        living = open_pool(data["pool"])
        living.drop(data["drop"], erase=True) if data.get("drop") else living.add(data.get("add", ()))
    else:
        merging.merge(parse(text))
