"""A sample of a finished output, computed again from the inputs and compared bit by bit; for `verify --sample`."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from ties_ray.errors import InputError, Problem
from ties_ray.inputs.catalog import Model
from ties_ray.kernels import ARITHMETICS
from ties_ray.layout.shards import MODEL_GROUP
from ties_ray.outputs import CondensingOutput, Placed
from ties_ray.planning.plan import Plan
from ties_ray.reports.records import Progress, Sample, Watch
from ties_ray.rounds.kth_largest import Pick
from ties_ray.safetensors import DTYPE_BITS
from ties_ray.state.manifest import Manifest
from ties_ray.stores import Pin, Stores
from ties_ray.worker.messages import Setup
from ties_ray.worker.worker import Worker

SLICE = 2**18
"""Elements of a tensor that are taken or left together: 512 KiB of bf16, of every model."""
LEAVE_OUT = "or leave --sample out"

Runs = Sequence[tuple[int, int]]
"""Elements [first, last) of a tensor."""


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
    """Return what was taken, and the tensors that differ; pins: by name, the weight files that can be compared.

    A worker merges in this process, with the stored plan and thresholds; nothing is written. Nothing of the stored
    plan's settings is used: neither storage options nor folders on this disk. announce: gets the folders of the inputs,
    before any is read. Raises `InputError` where it can't: another arithmetic, thresholds that are gone, inputs that
    are not as they were.
    """
    _demand_arithmetic(plan, "--sample")
    if isinstance(plan.recipe.output, CondensingOutput):
        what = "the merged matrices went through scratch, which is gone: they can't be merged again in samples"
        raise InputError(Problem("--sample", what, LEAVE_OUT.removeprefix("or ")))
    chosen = [(pins[name], placed, runs) for name, placed, runs in choose(plan, share, seed) if name in pins]
    total = sum(_num_bytes(placed, runs) for _, placed, runs in chosen)
    inputs = _folders(_inputs(plan))
    announce(inputs)
    worker = _worker(stores, plan, manifest)
    problems = []
    compared = 0
    for number, (pin, placed, runs) in enumerate(chosen):
        watch(Progress("sample", number, len(chosen), compared, total))
        problems += _compare(stores, worker, pin, placed, runs)
        compared += _num_bytes(placed, runs)
    watch(Progress("sample", len(chosen), len(chosen), compared, total))
    taken = Sample(
        share=share,
        seed=seed,
        tensors=len(chosen),
        elements=sum(last - first for _, _, runs in chosen for first, last in runs),
        of=sum(_numel(placed) for _, placed, _ in chosen),
        inputs=inputs,
    )
    return taken, problems


def recount(
    stores: Stores,
    plan: Plan,
    manifest: Manifest,
    share: float,
    seed: int,
    watch: Watch,
    announce: Callable[[Sequence[str]], None],
) -> tuple[list[str], list[Problem]]:
    """Return the ids of the models whose thresholds were counted anew, and of those that differ the problems.

    What the merge used may come from a pool cache, which whoever may write there decides. Raises as `compare` does.
    """
    _demand_arithmetic(plan, "--recount")
    low = [index for index, one in enumerate(plan.result.rounds) if one.kind == "count_low"]
    need = plan.recipe.method.needs(plan.result.members)
    trimmed = [number for number in range(len(plan.result.members)) if need and need.densities[number] < 1]
    if not low or not trimmed:
        raise InputError(Problem("--recount", "this merge has no thresholds", "leave --recount out"))
    generator = random.Random(f"{plan.run_id} {seed}")
    chosen = sorted(generator.sample(trimmed, max(1, round(share * len(trimmed)))))
    groups = sorted({member // MODEL_GROUP for member in chosen})
    known = manifest.read_folded(low[0], plan, groups)
    announce(_folders([plan.catalog.base, *(plan.catalog.models[plan.result.models[member]] for member in chosen)]))
    worker = _worker(stores, plan, manifest)
    problems = []
    for number, member in enumerate(chosen):
        watch(Progress("recount", number, len(chosen), 0, 0))
        used = [one for one in known[member // MODEL_GROUP].picks if one.member == member] if known else []
        counted = worker.recounted(member)
        if [_threshold(one) for one in used] != [_threshold(one) for one in counted]:
            model = plan.result.members[member].id
            what = f"the merge trimmed it at {_shown(used)}, and its values give {_shown(counted)}"
            problems.append(Problem(f"model {model}", what, "clear the pool cache, and merge again with --fresh"))
    watch(Progress("recount", len(chosen), len(chosen), 0, 0))
    return [plan.result.members[member].id for member in chosen], problems


def _threshold(pick: Pick) -> tuple[int, int, int, int]:
    return pick.parameter, pick.bits, pick.kept, pick.tied


def _shown(picks: Sequence[Pick]) -> str:
    values = [f"{np.uint32(pick.bits).view(np.float32):.6g}" for pick in picks[:3]]
    return f"{', '.join(values) or 'nothing'}{' and more' if len(picks) > 3 else ''}"


def _demand_arithmetic(plan: Plan, option: str) -> None:
    known = ARITHMETICS[plan.recipe.run.arithmetic]
    if plan.arithmetic != known:
        what = f"the merge was computed by arithmetic {plan.arithmetic}, and this ties_ray has {known}"
        raise InputError(Problem(option, what, f"use the version that merged, or leave {option} out"))


def _worker(stores: Stores, plan: Plan, manifest: Manifest) -> Worker:
    storage = {scheme: dict(options) for scheme, options in stores.options.items()}
    return Worker(Setup(manifest.folder, storage, "", device=plan.recipe.run.device), plan)


def _folders(models: Sequence[Model]) -> list[str]:
    return sorted({pin.uri.rpartition("/")[0] for model in models for pin in model.objects})


def _inputs(plan: Plan) -> list[Model]:
    return [plan.catalog.base, *(plan.catalog.models[index] for index in plan.result.models)]


def choose(plan: Plan, share: float, seed: int) -> Iterator[tuple[str, Placed, Runs]]:
    """Yield (file, tensor, runs) of every tensor that has elements: about `share` of them, one slice at least."""
    generator = random.Random(f"{plan.run_id} {seed}")
    for file in plan.result.files:
        for placed in file.tensors:
            numel = _numel(placed)
            starts = range(0, numel, SLICE)
            if starts:
                taken = generator.sample(starts, max(1, round(share * len(starts))))
                yield file.name, placed, [(start, min(start + SLICE, numel)) for start in sorted(taken)]


def _compare(stores: Stores, worker: Worker, pin: Pin, placed: Placed, runs: Runs) -> list[Problem]:
    """Return the problem of a tensor whose bytes are not what the inputs give, if so."""
    wrong = []
    try:
        for (first, _), wanted in zip(runs, worker.merged(placed, runs), strict=True):
            wrong += _differing(stores, pin, placed, first, wanted)
    except InputError as error:
        remedy = (
            f"bring the inputs back as they were, give the options of their storage (--set storage....), {LEAVE_OUT}"
        )
        problems = (Problem(one.where, f"can't be merged again: {one.what}", remedy) for one in error.problems)
        raise InputError(problems) from error
    if not wrong:
        return []
    count = sum(count for _, _, count in wrong)
    what = f"of the elements [{wrong[0][0]:,}, {wrong[-1][1]:,}) {count:,} are not what the inputs give"
    return [Problem(f"{pin.uri.rpartition('/')[2]}: {placed.tensor.name}", what, "merge again with --fresh")]


def _differing(stores: Stores, pin: Pin, placed: Placed, first: int, wanted: Tensor) -> list[tuple[int, int, int]]:
    """Return (first, last exclusive, number) of the elements that differ in one run, if any."""
    width = DTYPE_BITS[placed.tensor.dtype] // 8
    found = np.empty(len(wanted), np.uint8)
    stores.of(pin.uri).read(pin, placed.start + first * width, found.data)
    wrong = np.flatnonzero((found != wanted.numpy()).reshape(-1, width).any(axis=1))
    return [(first + int(wrong[0]), first + int(wrong[-1]) + 1, len(wrong))] if len(wrong) else []


def _numel(placed: Placed) -> int:
    return (placed.stop - placed.start) // (DTYPE_BITS[placed.tensor.dtype] // 8)


def _num_bytes(placed: Placed, runs: Runs) -> int:
    return sum(last - first for first, last in runs) * (DTYPE_BITS[placed.tensor.dtype] // 8)
