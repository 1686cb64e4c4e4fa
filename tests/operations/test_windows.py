"""Windows of a training run: exact averages by schedule, and many windows and schedules from one reading."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ties_ray
from tests.conftest import Bucket
from tests.operations.test_sweeping import digests
from tests.tools.families import Tensors, write_checkpoint
from tests.tools.merging import merge_and_die, read_tensors
from tests.tools.sharded import write_sharded
from ties_ray.errors import InputError
from ties_ray.layout.sizes import Sizes
from ties_ray.operations import merging, sweeping
from ties_ray.recipe.parse import validate
from ties_ray.recipe.settings import sweep_of
from ties_ray.stores import Stores

LOCAL = {"executor": "local", "workers": 2}
SMALL = Sizes(least_part=2**12, most_part=2**12, max_shard=2**13, max_range=2**12, min_range=2**10, max_block=211,
              least_block=97, max_local_block=211, least_local_block=97)  # fmt: skip
LASTS = [4, 8, 12, 16, 20]
SCHEDULES: list[Any] = ["mean", {"ema": 0.7}, "minus_sqrt", "cosine"]
SHAPES = {
    "model.embed_tokens.weight": (48, 16),
    "model.layers.0.mlp.up_proj.weight": (33, 16),
    "model.norm.weight": (16,),
}


def write_run(
    folder: str, count: int, storage: dict[str, Any] | None = None, more: Tensors | None = None
) -> list[Tensors]:
    """Write a run of so many checkpoints: a random walk in fp32, whose steps 90, 180, ... are written backwards."""
    generator = torch.Generator().manual_seed(3)
    moved = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    run: list[Tensors] = []
    for _ in range(count):
        moved = {
            name: value + 0.3 * torch.randn(value.shape, generator=generator).double() for name, value in moved.items()
        }
        run.append({name: value.float() for name, value in moved.items()} | (more or {}))
    store = Stores(storage or {}).of(folder)
    for number in reversed(range(count)):
        write_checkpoint(store, f"{folder}/step-{90 * (number + 1)}", run[number])
    return run


def by_definition(name: Any, count: int) -> np.ndarray:
    """Return the weights of `count` checkpoints, written from the papers without the code of ties_ray."""
    place = np.arange(count + 1) / count
    if name == "linear":
        return np.arange(1, count + 1) / (count * (count + 1) / 2)
    if isinstance(name, dict):
        weights = np.zeros(count)
        for number in range(count):
            weights = weights * (name["ema"] if number else 0)
            weights[number] += 1 - name["ema"] if number else 1
        return weights
    if isinstance(name, list):
        return np.array(name) / np.sum(name)
    scale = {"mean": 1 - place, "minus_sqrt": 1 - np.sqrt(place), "cosine": (1 + np.cos(np.pi * place)) / 2}[name]
    return -np.diff(scale)


@pytest.mark.parametrize("schedule", [*SCHEDULES, "linear", [1, 0, 2, 3, 3, -1]])
def test_a_window_is_the_weighted_mean_of_its_checkpoints_without_a_base(schedule: Any, tmp_path: Path) -> None:
    run = write_run(str(tmp_path / "run"), 12)
    window = {"run": str(tmp_path / "run"), "last": 6, "every": 2, "schedule": schedule}
    merging.merge(validate({"models": [window], "method": "average", "output": str(tmp_path / "out"), "run": LOCAL}))
    weights = by_definition(schedule, 6)
    merged = read_tensors(tmp_path / "out")
    for name in SHAPES:
        mean = sum(weight * tensors[name].double() for weight, tensors in zip(weights, run[1::2], strict=True))
        assert isinstance(mean, torch.Tensor)
        torch.testing.assert_close(merged[name].double(), mean, rtol=1e-6, atol=3e-7)
        others = by_definition("linear" if schedule != "linear" else "mean", 6)
        other = sum(weight * tensors[name].double() for weight, tensors in zip(others, run[1::2], strict=True))
        assert float((mean - other).abs().max()) > 1e-3  # another schedule is far off


def test_every_method_has_the_weights_of_a_schedule(tmp_path: Path) -> None:
    run = write_run(str(tmp_path / "run"), 4)
    write_checkpoint(
        Stores({}).of("/"), str(tmp_path / "base"), {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    )
    window = {"run": str(tmp_path / "run"), "schedule": "minus_sqrt", "weight": 2}
    data = {"base": str(tmp_path / "base"), "models": [window], "output": str(tmp_path / "out"), "run": LOCAL}
    merging.merge(validate({**data, "method": {"name": "task_arithmetic", "lambda": 0.5}}))
    weights = by_definition("minus_sqrt", 4)
    for name, merged in read_tensors(tmp_path / "out").items():
        mean = sum(weight * tensors[name].double() for weight, tensors in zip(weights, run, strict=True))
        torch.testing.assert_close(merged.double(), mean, rtol=1e-6, atol=3e-7)


def windows(folder: object, run: str, **more: Any) -> dict[str, Any]:
    return {
        "models": [{"run": run}],
        "method": "average",
        "output": {"path": f"{folder}/{{setting}}"},
        "grid": {"models.0.last": LASTS, "models.0.schedule": SCHEDULES},
        "run": LOCAL,
        **more,
    }


def test_five_windows_and_four_schedules_of_twenty_checkpoints_read_each_byte_once(tmp_path: Path) -> None:
    write_run(str(tmp_path / "run"), 20)
    data = windows(tmp_path / "swept", str(tmp_path / "run"))
    result = sweeping.sweep(sweep_of(data))
    assert len(result.rows) == 20
    assert {row.setting for row in result.rows} >= {"last-4_schedule-mean", "last-20_schedule-ema-0.7"}
    assert result.bytes_read == 20 * sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    planned = sweeping.plan(sweep_of(data))
    for setting, plan in zip(planned.settings[::6], planned.plans[::6], strict=True):
        output = plan.recipe.output.model_copy(update={"path": str(tmp_path / "alone" / setting.name)})
        merging.merge(plan.recipe.model_copy(update={"output": output}))
        assert digests(tmp_path / "alone" / setting.name) == digests(tmp_path / "swept" / setting.name)


def test_windows_in_a_bucket_are_killed_and_go_on(s3_bucket: Bucket, tmp_path: Path, plugged: Path) -> None:
    run = f"{s3_bucket.uri}/run"
    write_run(run, 3, s3_bucket.storage)
    grid = {"models.0.last": [2, 3], "models.0.schedule": ["minus_sqrt"]}
    point = {"what": "write_part", "count": 2, "marker": str(tmp_path / "died")}
    storage = {**s3_bucket.storage, "frail": point}
    data = windows(f"frail://{tmp_path}/swept", run, grid=grid, storage=storage)
    assert merge_and_die(data, plugged) == -9
    assert (tmp_path / "died").exists()
    result = sweeping.sweep(sweep_of(data))
    write_run(str(tmp_path / "run"), 3)
    whole = sweeping.sweep(sweep_of(windows(tmp_path / "whole", str(tmp_path / "run"), grid=grid)))
    for row, other in zip(result.rows, whole.rows, strict=True):
        assert digests(tmp_path / "swept" / row.setting) == digests(other.output)


def sharded_run(whole: Path, sharded: Path, run: list[Tensors]) -> None:
    """Write a run again in parts, cut otherwise at each step, with the small files of the whole checkpoints."""
    for number, tensors in enumerate(run):
        name = f"step-{90 * (number + 1)}"
        cuts = {"model.layers.0.mlp.up_proj.weight": [[20][: number % 2], [5, 6 + number]], "model.ids": [[], [2]]}
        cuts["model.embed_tokens.weight"] = [[16, 32, 40]]
        (sharded / name).mkdir(parents=True)
        write_sharded(sharded / name, tensors, cuts)
        for path in (whole / name).iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, sharded / name)


@pytest.mark.parametrize("more", [{}, {"exclude": ["*up_proj*"], "output.dtype": "bfloat16"}, {"vocabulary": {}}])
def test_checkpoints_in_parts_give_the_bytes_of_whole_ones(more: dict[str, Any], tmp_path: Path) -> None:
    ids = {"model.ids": torch.arange(12).reshape(3, 4)}
    run = write_run(str(tmp_path / "run"), 4, more=ids)
    sharded_run(tmp_path / "run", tmp_path / "parts", run)
    for folder in ("run", "parts"):
        window = {"run": str(tmp_path / folder), "schedule": "minus_sqrt"}
        output = {"path": str(tmp_path / f"{folder}-out")}
        if "output.dtype" in more:
            output["dtype"] = more["output.dtype"]
        data = {"models": [window], "method": "average", "output": output, "run": LOCAL}
        recipe = validate({**data, **{key: value for key, value in more.items() if "." not in key}})
        if folder == "parts" and "vocabulary" in more:
            with pytest.raises(InputError, match=r"in several tensors"):
                merging.merge(recipe, sizes=SMALL)
            return
        merging.merge(recipe, sizes=SMALL)
    assert digests(tmp_path / "parts-out") == digests(tmp_path / "run-out")


@pytest.mark.parametrize("method", ["ties", "iso_c", "model_stock"])
def test_methods_read_parts_beside_whole_models(method: str, tmp_path: Path) -> None:
    run = write_run(str(tmp_path / "run"), 4)
    sharded_run(tmp_path / "run", tmp_path / "parts", run)
    for folder in ("run", "parts"):
        models = [{"run": str(tmp_path / folder), "from": 180, "to": 270}, f"{tmp_path}/run/step-360"]
        data = {"base": f"{tmp_path}/{folder}/step-90", "models": models, "method": method, "run": LOCAL}
        merging.merge(validate({**data, "output": f"{tmp_path}/{folder}-out"}), sizes=SMALL)
    assert digests(tmp_path / "parts-out") == digests(tmp_path / "run-out")


def test_parts_are_inspected_and_compared_by_their_changes(tmp_path: Path) -> None:
    run = write_run(str(tmp_path / "run"), 2)
    sharded_run(tmp_path / "run", tmp_path / "parts", run)
    sides = f"{tmp_path}/parts/step-180", f"{tmp_path}/run/step-180"
    with pytest.raises(InputError, match="is stored in parts, of which only changes"):
        ties_ray.compare(*sides)
    same = ties_ray.compare(*sides, base=f"{tmp_path}/parts/step-90")
    assert same.equal
    assert len(same.tensors) == len(SHAPES)
    (shown,) = ties_ray.inspect(sides[0]).folders
    assert shown.format == "dcp"
    assert not shown.problems
