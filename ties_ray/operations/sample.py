"""`verify --sample` and `--recount`: compute a part of a finished merge again, and compare it bit by bit."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from ties_ray.errors import InputError, Problem
from ties_ray.inputs.catalog import Model
from ties_ray.kernels import ARITHMETICS
from ties_ray.outputs import CondensingOutput, Placed
from ties_ray.planning.plan import Plan
from ties_ray.reports.records import Progress, Sample, Watch
from ties_ray.rounds._kth_largest import Pick
from ties_ray.safetensors import DTYPE_BITS
from ties_ray.state.manifest import Manifest
from ties_ray.stores import Pin, Stores
from ties_ray.worker.messages import Setup
from ties_ray.worker.worker import Worker

W = TypeVar("W", bound=Worker)
SLICE = 2**18
"""Elements of a slice, the unit of a sample: 512 KiB of bf16 from every model."""
LEAVE_OUT = "or leave --sample out"

Slices = Sequence[tuple[int, int]]
"""Ranges [start, stop) of a tensor's elements, in order."""


def compare(
    stores: Stores,
    plan: Plan,
    manifest: Manifest,
    pins: Mapping[str, Pin],
    share: float,
    seed: int,
    watch: Watch,
    announce: Callable[[Sequence[str]], None],
) -> tuple[Sample, list[Problem]]:
    """Return the sample, and a problem for each tensor that differs.

    A worker merges in this process, with the stored plan and thresholds, and writes nothing. It uses neither the
    storage options of the stored plan nor its folders on this disk.
    pins: the weight files that can be compared, by name.
    announce: gets the folders of the inputs before they are read.
    Raises `InputError` where the arithmetic is another, thresholds are gone, or inputs have changed.
    """
    _require_arithmetic(plan, "--sample")
    if isinstance(plan.recipe.output, CondensingOutput):
        message = "the merged matrices went through scratch, which is gone: they can't be merged again in samples"
        raise InputError(Problem("--sample", message, LEAVE_OUT.removeprefix("or ")))
    chosen = [(pins[name], placed, slices) for name, placed, slices in choose(plan, share, seed) if name in pins]
    total = sum(_num_bytes(placed, slices) for _, placed, slices in chosen)
    inputs = _folders(_inputs(plan))
    announce(inputs)
    worker = worker_of(stores, plan, manifest, Worker)
    worker.check_lapack(lambda here: manifest.read_lapack())
    problems = []
    compared = 0
    for number, (pin, placed, slices) in enumerate(chosen):
        watch(Progress("sample", number, len(chosen), compared, total))
        problems += _compare(stores, worker, pin, placed, slices)
        compared += _num_bytes(placed, slices)
    watch(Progress("sample", len(chosen), len(chosen), compared, total))
    sample = Sample(
        share=share,
        seed=seed,
        tensors=len(chosen),
        elements=sum(stop - start for _, _, slices in chosen for start, stop in slices),
        of=sum(_numel(placed) for _, placed, _ in chosen),
        inputs=inputs,
    )
    return sample, problems


def recount(
    stores: Stores,
    plan: Plan,
    manifest: Manifest,
    share: float,
    seed: int,
    watch: Watch,
    announce: Callable[[Sequence[str]], None],
) -> tuple[list[str], list[Problem]]:
    """Return the ids of the models whose thresholds are counted anew, and a problem for each that differs.

    The merge may have taken its thresholds from a pool cache, which others can write.
    announce: gets the folders of the inputs before they are read.
    Raises `InputError` where there are no thresholds, the arithmetic is another, or inputs have changed.
    """
    _require_arithmetic(plan, "--recount")
    merge = plan.merges[0]
    low = [index for index, round_ in enumerate(merge.rounds) if round_.kind == "threshold"]
    trimmed = merge.by_parameter.trimmed()
    if not low or not trimmed:
        raise InputError(Problem("--recount", "this merge has no thresholds", "leave --recount out"))
    generator = random.Random(f"{plan.run_id} {seed}")
    chosen = sorted(generator.sample(trimmed, max(1, round(share * len(trimmed)))))
    size = plan.sizes.model_group
    folded = manifest.read_folded(merge, low[-1], sorted({member // size for member in chosen}))
    announce(_folders([plan.catalog.base, *(merge.models[member] for member in chosen)]))
    worker = worker_of(stores, plan, manifest, Worker)
    problems = []
    for number, member in enumerate(chosen):
        watch(Progress("recount", number, len(chosen), 0, 0))
        used = [pick for pick in folded[member // size].finding if pick.member == member] if folded else []
        counted = worker.recounted(member)
        if list(map(_threshold, used)) != list(map(_threshold, counted)):
            model = merge.members[member].id
            message = f"the merge trimmed it at {_shown(used)}, and its values give {_shown(counted)}"
            problems.append(Problem(f"model {model}", message, "clear the pool cache, and merge again with --fresh"))
    watch(Progress("recount", len(chosen), len(chosen), 0, 0))
    return [merge.members[member].id for member in chosen], problems


def _threshold(pick: Pick) -> tuple[int, int, int, int]:
    return pick.parameter, pick.bits, pick.kept, pick.tied


def _shown(picks: Sequence[Pick]) -> str:
    values = [f"{np.uint32(pick.bits).view(np.float32):.6g}" for pick in picks[:3]]
    return f"{', '.join(values) or 'nothing'}{' and more' if len(picks) > 3 else ''}"


def _require_arithmetic(plan: Plan, option: str) -> None:
    ours = ARITHMETICS[plan.recipe.run.arithmetic]
    if plan.arithmetic != ours:
        message = f"the merge was computed by arithmetic {plan.arithmetic}, and this ties_ray has {ours}"
        raise InputError(Problem(option, message, f"use the version that merged, or leave {option} out"))


def worker_of(stores: Stores, plan: Plan, manifest: Manifest, kind: type[W]) -> W:
    """Return a worker in this process that merges parts of a finished merge, and writes nothing."""
    storage = {scheme: dict(options) for scheme, options in stores.options.items()}
    return kind(Setup(manifest.folder, storage, "", device=plan.recipe.run.device), plan)


def _folders(models: Sequence[Model]) -> list[str]:
    return sorted({pin.uri.rpartition("/")[0] for model in models for each in model.inputs for pin in each.objects})


def _inputs(plan: Plan) -> list[Model]:
    return [plan.catalog.base, *plan.merges[0].models]


def choose(plan: Plan, share: float, seed: int) -> Iterator[tuple[str, Placed, Slices]]:
    """Yield (file, tensor, slices) for every tensor that has elements; at least one slice, about `share` of all."""
    generator = random.Random(f"{plan.run_id} {seed}")
    for file in plan.files:
        for placed in file.tensors:
            numel = _numel(placed)
            starts = range(0, numel, SLICE)
            if starts:
                chosen = generator.sample(starts, max(1, round(share * len(starts))))
                yield file.name, placed, [(start, min(start + SLICE, numel)) for start in sorted(chosen)]


def _compare(stores: Stores, worker: Worker, pin: Pin, placed: Placed, slices: Slices) -> list[Problem]:
    """Return a problem if a tensor's bytes differ from those that the inputs give."""
    wrong = []
    try:
        for (start, _), expected in zip(slices, worker.merged(placed, slices), strict=True):
            wrong += _differing(stores, pin, placed, start, expected)
    except InputError as error:
        remedy = (
            f"bring the inputs back as they were, give the options of their storage (--set storage....), {LEAVE_OUT}"
        )
        problems = (Problem(each.where, f"can't be merged again: {each.what}", remedy) for each in error.problems)
        raise InputError(problems) from error
    if not wrong:
        return []
    count = sum(count for _, _, count in wrong)
    message = f"of the elements [{wrong[0][0]:,}, {wrong[-1][1]:,}) {count:,} are not what the inputs give"
    return [Problem(f"{pin.uri.rpartition('/')[2]}: {placed.tensor.name}", message, "merge again with --fresh")]


def _differing(stores: Stores, pin: Pin, placed: Placed, start: int, expected: Tensor) -> list[tuple[int, int, int]]:
    """Return (start, stop, number) of the elements of a slice that differ, if any."""
    width = DTYPE_BITS[placed.tensor.dtype] // 8
    written = np.empty(len(expected), np.uint8)
    stores.of(pin.uri).read(pin, placed.start + start * width, written.data)
    wrong = np.flatnonzero((written != expected.numpy()).reshape(-1, width).any(axis=1))
    return [(start + int(wrong[0]), start + int(wrong[-1]) + 1, len(wrong))] if len(wrong) else []


def _numel(placed: Placed) -> int:
    return (placed.stop - placed.start) // (DTYPE_BITS[placed.tensor.dtype] // 8)


def _num_bytes(placed: Placed, slices: Slices) -> int:
    return sum(stop - start for start, stop in slices) * (DTYPE_BITS[placed.tensor.dtype] // 8)
