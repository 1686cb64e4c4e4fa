"""The promises of the design (section 2), each by a merge that could break it."""

import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Bucket
from tests.tools.families import NAMES, Family, raw_bytes, write_checkpoint
from tests.tools.merging import LOCAL, carried_out, digests, draw_sizes, merge, recipe_of
from ties_ray.executors import MESSAGE_BYTES, Answered, Event, Executor
from ties_ray.executors.local import LocalExecutor
from ties_ray.executors.ray import RayExecutor
from ties_ray.kernels.buffers import Buffers
from ties_ray.layout import footprint
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.operations import merging
from ties_ray.planning.plan import Plan
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import MergeResult, Progress
from ties_ray.safetensors import build
from ties_ray.stores import Pin, Store, Stores, join
from ties_ray.stores.local import Local
from ties_ray.stores.s3 import S3
from ties_ray.worker import read_ahead

MakeFamily = Callable[..., Family]
METHODS: dict[str, dict[str, Any]] = {
    "official": {"name": "ties", "profile": "official", "lambda": 0.7},
    "tensor_max": {"name": "ties", "trim": "tensor", "merge": "max"},
    "dare": {"name": "dare", "density": 0.3, "combine": "ties"},
    "consensus": {"name": "consensus", "lambda": 0.3},
}


@pytest.fixture(scope="session")
def large(family_of: MakeFamily) -> Family:
    """Return three fine-tunes of 21 MB."""
    return family_of(hidden=1024, shards=3)


@pytest.fixture(scope="session")
def wanted(large: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Return the digests of the large family's merges by method: one local worker, two files, one part a file."""
    folder = tmp_path_factory.mktemp("wanted")
    for name, method in METHODS.items():
        merge(large, output_in(folder, name, "64MiB"), method)
    return {name: digests(folder / name) for name in METHODS}


def output_in(folder: Path, name: str, part_size: str = "5MiB") -> dict[str, object]:
    return {"path": str(folder / name), "file_size": "15MB", "part_size": part_size}


# 1. Same recipe, same bytes.


def test_the_large_family_has_several_files_and_parts(large: Family, wanted: dict[str, dict[str, str]]) -> None:
    made = merging.plan(recipe_of(large, output_in(Path("/nowhere"), "out"), METHODS["official"]))
    assert [made.merges[0].layout.num_parts(file) for file in range(len(made.files))] == [3, 2]
    assert all(len(files) == 3 for files in wanted.values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("part_size", "workers", "memory"),
    [("5MiB", 3, "512MiB"), ("7MiB", 2, "128MiB"), ("5MiB", 1, "4GiB")],
)
def test_part_sizes_workers_and_memory_change_no_byte(
    name: str,
    part_size: str,
    workers: int,
    memory: str,
    large: Family,
    wanted: dict[str, dict[str, str]],
    tmp_path: Path,
) -> None:
    run = {**LOCAL, "workers": workers, "memory": memory}
    merge(large, output_in(tmp_path, "out", part_size), METHODS[name], run=run)
    assert digests(tmp_path / "out") == wanted[name]


@pytest.mark.parametrize("caches", [{}, {"cache": 0, "disk_cache": 0}])
def test_inputs_and_outputs_in_a_bucket_give_the_same_bytes(
    caches: dict[str, int], large: Family, wanted: dict[str, dict[str, str]], tmp_path: Path, s3_bucket: Bucket
) -> None:
    stores, local = Stores(s3_bucket.storage), Stores({})
    uploaded = copy_family(large, local, stores, s3_bucket.uri)
    output = {**output_in(tmp_path, "x"), "path": f"{s3_bucket.uri}/out"}
    recipe = recipe_of(
        uploaded, output, METHODS["official"], storage=s3_bucket.storage, run={**LOCAL, "workers": 2, **caches}
    )
    with reads_counted() as counted:
        result = merging.merge(recipe)
    made = carried_out(result, s3_bucket.storage)
    assert_as_planned(result, counted, uploaded, workers=0, made=made)  # only local files need a look
    assert (result.bytes_kept > made.bytes_again // 2) == (caches == {})
    copy_folder(stores, f"{s3_bucket.uri}/out", local, str(tmp_path / "back"))
    assert digests(tmp_path / "back") == wanted["official"]


def test_a_method_that_iterates_gives_the_bits_of_the_fused_one(
    large: Family, tmp_path: Path, plugged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(large, tmp_path / "fused", {"name": "ties", "density": 0.3})
    merge(large, tmp_path / "plain", {"name": "plain_ties", "density": 0.3})
    assert digests(tmp_path / "plain") == digests(tmp_path / "fused")


@pytest.mark.parametrize("name", ["consensus", "plain_ties"])
def test_reading_twice_gives_the_bits_of_keeping_all_slices(
    name: str, large: Family, tmp_path: Path, plugged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = merge(large, tmp_path / "resident", name)
    again = merge(large, tmp_path / "again", name, sizes=replace(SIZES, min_resident_block=2**40))
    assert digests(tmp_path / "again") == digests(tmp_path / "resident")
    assert again.bytes_read == carried_out(again).bytes_read
    assert again.bytes_read - resident.bytes_read == sum(
        tensor.nbytes for tensors in large.model_tensors for tensor in tensors.values() if tensor.is_floating_point()
    )


@pytest.mark.parametrize("seed", range(12))
def test_any_sizes_any_interruption_and_any_number_of_workers_give_the_same_bytes(
    seed: int, family_of: MakeFamily, tmp_path: Path, plugged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes below which a cut is invisible, drawn at random and small, on a family of all dtypes."""
    draw = random.Random(seed)
    family = family_of(num_models=5, mixed=True, shards=2)
    method = draw.choice([*METHODS.values(), {"name": "plain_ties"}, {"name": "ties", "zero_sum": "majority"}])
    whole = merge(family, {"path": str(tmp_path / "whole"), "file_size": "9KB"}, method)

    sizes = draw_sizes(draw)
    run = {**LOCAL, "workers": draw.choice([1, 2, 3])}
    recipe = recipe_of(family, {"path": str(tmp_path / "cut"), "file_size": "9KB"}, method, run=run)
    assert merging.plan(recipe, sizes).merges[0].layout.num_merge_shards > 1

    events = draw.randint(1, 60)
    with reads_counted() as counted:
        result = interrupted_after(events, recipe, sizes) or merging.merge(recipe, sizes=sizes)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert result.trims == whole.trims
    if not result.resumed:
        assert_as_planned(result, counted, family, workers=run["workers"])


def interrupted_after(events: int, recipe: Any, sizes: Sizes) -> MergeResult | None:
    """Merge until so many events have been seen; return the result if there were fewer."""
    seen = 0

    def watch(progress: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == events:
            raise KeyboardInterrupt

    try:
        return merging.merge(recipe, watch=watch, sizes=sizes)
    except KeyboardInterrupt:
        return None


# 2. Memory does not grow with the number of models.

SCRIPT = """
import sys
from ties_ray import kernels
from ties_ray.operations import merging
from ties_ray.worker import worker
from ties_ray.recipe.parse import parse
from ties_ray.executors.local import LocalExecutor
kernels.load("cpu")
recipe = parse(open(sys.argv[1]).read())
print("ready", flush=True)
sys.stdin.readline()
merging.merge(recipe)
print("done", flush=True)
sys.stdin.readline()
"""


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of a process, as the kernel counts it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such line")


def peak_of(recipe_file: Path) -> int:
    """Return what a merge in a process of its own takes beyond its imports, in bytes, sampled from outside."""
    command = [sys.executable, "-c", SCRIPT, str(recipe_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), False)
        while process.stdout.readline() != "done\n":
            assert process.poll() is None, "the merge failed"
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.005)
        process.stdin.write("\n")
    return peak - before


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Return 32 models of 25 MB over one base; their files are links to three, since only their number matters."""
    root = tmp_path_factory.mktemp("many")
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 6_000_000, generator=generator).to(torch.bfloat16)
    store = Stores({}).of("/")
    for number in range(4):
        noise = torch.randint(-2, 3, values.shape, generator=generator, dtype=torch.int16)
        changed = (values.view(torch.int16) + noise * (number > 0)).view(torch.bfloat16)
        write_checkpoint(store, str(root / str(number)), {"a.weight": changed[0], "b.weight": changed[1]})
    for number in range(4, 33):
        (root / str(number)).mkdir()
        for file in (root / str(number % 3 + 1)).iterdir():
            os.link(file, root / str(number) / file.name)
    return Family(str(root / "0"), tuple(str(root / str(number)) for number in range(1, 33)), {}, ())


@pytest.mark.parametrize(
    ("method", "memory"),
    [("average", "128MiB"), ("ties", "384MiB")],
)
def test_the_peak_is_the_planned_one_and_does_not_grow_with_models(
    method: str, memory: str, many: Family, tmp_path: Path
) -> None:
    peaks, planned = [], []
    for count in (4, 32):
        family = replace(many, models=many.models[:count])
        run = {**LOCAL, "workers": 1, "memory": memory}
        recipe = recipe_of(family, tmp_path / f"out-{count}", method, run=run)
        made = merging.plan(recipe)
        (tmp_path / "recipe.json").write_text(recipe.model_dump_json(exclude_unset=True, by_alias=True))
        peaks.append(peak_of(tmp_path / "recipe.json"))
        planned.append(made.memory)
        assert 20 * 2**20 < peaks[-1] <= made.memory <= recipe.run.memory, f"{peaks[-1]:,} bytes for {count} models"
    assert planned[1] < planned[0] + 2**20
    assert peaks[1] <= 1.1 * peaks[0] + made.merges[0].layout.part_size, (
        "and perhaps one part more on its way to the disk"
    )


def test_a_round_of_smaller_blocks_does_not_work_in_the_buffers_of_larger_ones(
    many: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, int]] = []
    take = Buffers._take

    def noted(self: Buffers, wanted: int) -> Any:
        taken.append((wanted, len(found := take(self, wanted))))
        return found

    monkeypatch.setattr(Buffers, "_take", noted)
    sizes = replace(SIZES, max_local_block=2**21, shards_at_least=1)
    family = replace(many, models=many.models[:16])
    merge(family, tmp_path / "out", "ties", sizes=sizes, run={**LOCAL, "workers": 1})
    assert {2**22, 2**23} <= {wanted for wanted, _ in taken}, (
        "slices and the base where it is counted, in bf16 and fp32"
    )
    buffers = [size for wanted, size in taken if wanted in (2**19, 2**20)]
    assert len(buffers) > 16 * 40, "slices and the base where they are merged"
    assert max(buffers) == 2**21


def test_a_method_that_keeps_all_slices_keeps_to_its_memory_too(many: Family, tmp_path: Path) -> None:
    run = {**LOCAL, "workers": 1, "memory": "192MiB"}
    recipe = recipe_of(replace(many, models=many.models[:16]), tmp_path / "out", "consensus", run=run)
    made = merging.plan(recipe)
    assert made.merges[0].rounds[-1].passes == 1, "the slices of 16 models fit"
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json(exclude_unset=True, by_alias=True))
    assert peak_of(tmp_path / "recipe.json") <= made.memory <= recipe.run.memory


# 4. No tensor passes through the driver or through Ray's object store.


@pytest.mark.parametrize("executor", [LocalExecutor, RayExecutor])
def test_only_short_messages_travel_and_every_executor_gives_the_same_bytes(
    executor: type[Executor],
    large: Family,
    wanted: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: None,
) -> None:
    sizes: list[int] = []
    start, submit, wait = executor.start, executor.submit, executor.wait

    def started(self: Executor, factory: str, setup: str, needs: Any) -> int:
        sizes.append(len(setup) + len(factory))
        return start(self, factory, setup, needs)

    def submitted(self: Executor, worker: int, ticket: int, message: str) -> None:
        sizes.append(len(message))
        submit(self, worker, ticket, message)

    def waited(self: Executor, timeout: float) -> list[Event]:
        events = wait(self, timeout)
        sizes.extend(len(event.answer) for event in events if isinstance(event, Answered))
        return events

    for name, instead in (("start", started), ("submit", submitted), ("wait", waited)):
        monkeypatch.setattr(executor, name, instead)
    run = {"executor": executor.name, "workers": 2}
    result = merge(large, output_in(tmp_path, "out"), METHODS["official"], run=run)
    assert digests(tmp_path / "out") == wanted["official"]
    assert result.bytes_read > 200 * 2**20
    assert len(sizes) > 2 * result.shards
    assert max(sizes) < 10_000 < MESSAGE_BYTES


# 5. Reads are planned, and the plan holds.


@pytest.mark.parametrize(
    "how",
    [{"num_models": 3}, {"dtype": "F32", "smooth": True}, {"num_models": 40, "layers": 1, "hidden": 8, "mixed": True}],
    ids=str,
)
@pytest.mark.parametrize(
    "method",
    [*METHODS.values(), {"name": "ties"}, {"name": "ties", "density": 1.0}, {"name": "average"}],
    ids=lambda method: "-".join(map(str, method.values())),
)
def test_the_plans_bytes_and_requests_are_those_that_the_store_counts(
    method: dict[str, Any], how: dict[str, Any], family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(**how)
    with reads_counted() as counted:
        result = merge(family, tmp_path / "out", method, exclude=["lm_head.*", "*.o_proj.*"])
    assert_as_planned(result, counted, family)


@pytest.mark.parametrize("method", ["ties", "consensus", "iso_c"])
@pytest.mark.parametrize(
    "how", [{"num_models": 3}, {"num_models": 5, "hidden": 64, "shards": 3, "mixed": True}], ids=str
)
def test_figures_alone_read_what_is_planned(
    method: str, how: dict[str, Any], family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(**how)
    with reads_counted() as counted:
        result = merge(family, {"path": str(tmp_path / "out"), "kind": "metrics"}, method)
    assert_as_planned(result, counted, family)


def test_models_that_are_not_trimmed_are_not_read_for_a_threshold(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=40, layers=1, hidden=8)
    densities = [0.1, 1.0, *[0.3] * 20, *[1.0] * 18]  # none of the second group of 32 has a threshold
    with reads_counted() as counted:
        result = merge(family, tmp_path / "out", "ties", densities=densities)
    assert_as_planned(result, counted, family)


@pytest.mark.parametrize(
    "how", [{"num_models": 2}, {"num_models": 6, "mixed": True}, {"num_models": 40, "shards": 3}], ids=str
)
@pytest.mark.parametrize("gap", [SIZES.gap, 0])
def test_small_tensors_are_read_together_and_so_is_what_lies_between(
    how: dict[str, Any], gap: int, family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(layers=12, **how)
    sizes = replace(SIZES, gap=gap)
    found = {}
    for name in ("joined", "alone"):
        if name == "alone":
            monkeypatch.setattr(footprint.Sources, "run_of", lambda *_: 0)
        with reads_counted() as counted:
            found[name] = merge(
                family, tmp_path / name, "ties", sizes=sizes, exclude=["*.o_proj.*"]
            )  # lie between others
        assert_as_planned(found[name], counted, family)
    assert digests(tmp_path / "joined") == digests(tmp_path / "alone")
    assert found["joined"].requests * (4 if gap else 2) < found["alone"].requests
    assert (found["joined"].bytes_read > found["alone"].bytes_read) == (gap > 0)


def test_models_whose_files_are_in_another_order_give_the_same_bytes(family_of: MakeFamily, tmp_path: Path) -> None:
    family, store = family_of(layers=12), Stores({}).of("/")
    write_checkpoint(store, str(tmp_path / "1"), family.model_tensors[1], shards=4)
    write_checkpoint(store, str(tmp_path / "2"), family.model_tensors[2])
    names = sorted(family.model_tensors[2], reverse=True)
    specs = [(name, NAMES[one.dtype], tuple(one.shape)) for name in names for one in [family.model_tensors[2][name]]]
    data = b"".join(raw_bytes(family.model_tensors[2][name]) for name in names)
    (tmp_path / "2/model.safetensors").write_bytes(build(specs, {"format": "pt"}) + data)
    other = replace(family, models=(family.models[0], str(tmp_path / "1"), str(tmp_path / "2")))
    merge(family, tmp_path / "whole", "ties")
    with reads_counted() as counted:
        result = merge(other, tmp_path / "out", "ties")
    assert_as_planned(result, counted, other)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("num_models", [1, 4, 5, 16, 40])
def test_slices_that_wait_for_each_other_take_no_more_than_those_of_a_block(
    num_models: int, family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies in a shard: whole blocks before runs, after them, and between."""
    live, peaks = Counter[int](), Counter[int]()

    class Watched(Buffers):
        def _lend(self, wanted: int) -> Any:
            lent = super()._lend(wanted)
            live[id(self)] += len(lent)
            weakref.finalize(lent, live.subtract, {id(self): len(lent)})
            peaks[id(self)] = max(peaks[id(self)], live[id(self)])
            return lent

    monkeypatch.setattr(read_ahead, "Buffers", Watched)
    sizes = replace(SIZES, max_block=4096)
    family = family_of(num_models=num_models, layers=6, hidden=48)
    for method in ("average", "ties"):
        made = merging.plan(recipe_of(family, tmp_path / method, method), sizes)
        assert {one.run for one in made.merges[0].rounds} - {0}
        sizes = replace(sizes, least_part=16_384, most_part=16_384)
        peaks.clear()
        merge(family, tmp_path / method, method, sizes=sizes, run={**LOCAL, "workers": 1})
        of_reads = next(iter(peaks.values()))
        assert 0 < of_reads <= (made.ahead + sizes.models_per_pass + 1) * made.merges[0].rounds[-1].block * 2


@pytest.mark.parametrize("cached", [False, True])
def test_what_the_system_holds_is_copied_by_the_worker_itself(
    cached: bool, family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers, read = set[str](), Local.read

    def noted(self: Local, pin: Pin, start: int, into: memoryview) -> None:
        if pin.uri.endswith(".safetensors"):
            readers.add(threading.current_thread().name.partition("_")[0])
        read(self, pin, start, into)

    monkeypatch.setattr(Local, "read", noted)
    monkeypatch.setattr(Local, "is_in_page_cache", lambda self, pin, position: cached)
    merge(family_of(num_models=3), tmp_path, "ties", run={**LOCAL, "workers": 1})
    planning = {name for name in readers if name.startswith("ThreadPoolExecutor")}  # compares what is no weight
    assert readers - planning - {"MainThread"} == {"ties-ray-0"} | ({"read"} if not cached else set())


def test_a_large_plan_holds_with_several_blocks_a_part(large: Family, tmp_path: Path) -> None:
    run = {**LOCAL, "workers": 2, "memory": "128MiB"}
    for name, method in METHODS.items():
        with reads_counted() as counted:
            result = merge(large, output_in(tmp_path, name, "7MiB"), method, run=run)
        assert_as_planned(result, counted, large, workers=2)


def test_a_finished_merge_is_recognised_and_reads_no_weights(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    first = merge(family, tmp_path / "out", "ties")
    with reads_counted() as counted:
        second = merge(family, tmp_path / "out", "ties")
    assert counted == []
    assert second == first.model_copy(update={"reused": True})


@contextmanager
def reads_counted(*, planning: bool = False) -> Iterator[list[tuple[str, int, int]]]:
    """Collect (URI, start, bytes) of every range that any store of this process reads meanwhile.

    planning: also of tensors that are compared while the plan is made.
    """
    counted: list[tuple[str, int, int]] = []
    quiet = False

    def plan(recipe: Recipe, sizes: Sizes = SIZES, original: Any = merging.plan) -> Plan:
        nonlocal quiet
        quiet = not planning
        try:
            return original(recipe, sizes)
        finally:
            quiet = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "plan", plan)
        for store in (Local, S3):

            def read(self: Store, pin: Pin, start: int, into: memoryview, original: Any = store.read) -> None:
                before = self.meter.bytes_read
                original(self, pin, start, into)
                if not quiet:
                    counted.append((pin.uri, start, len(into)))
                assert self.meter.bytes_read >= before + len(into), "the meter counts every byte"

            patch.setattr(store, "read", read)
        yield counted


def assert_as_planned(
    result: MergeResult,
    counted: list[tuple[str, int, int]],
    family: Family,
    *,
    workers: int = 1,
    made: Plan | None = None,
) -> None:
    """Bytes and requests are the same in plan, result and store; `workers` looked at each input's first 8 bytes."""
    made = made or carried_out(result)
    rounds = made.merges[0].rounds
    assert result.bytes_read + result.bytes_kept == sum(round_.bytes_read for round_ in rounds) == made.bytes_read
    assert result.bytes_kept <= made.bytes_again
    spared = sum(round_.requests for round_ in rounds) - result.requests
    assert spared >= 0
    assert (spared > 0) == (result.bytes_kept > 0)
    inputs = (family.base, *family.models)
    of_inputs = [item for item in counted if item[0].startswith(inputs) and item[0].endswith(".safetensors")]
    looks = workers * (1 + len(made.merges[0].members))
    assert sum(item[2] for item in of_inputs) == result.bytes_read + 8 * looks
    assert len(of_inputs) == result.requests + looks


def copy_family(family: Family, source: Stores, target: Stores, folder: str) -> Family:
    uris = [join(folder, uri.rpartition("/")[2]) for uri in (family.base, *family.models)]
    for old, new in zip((family.base, *family.models), uris, strict=True):
        copy_folder(source, old, target, new)
    return replace(family, base=uris[0], models=tuple(uris[1:]))


def copy_folder(source: Stores, old: str, target: Stores, new: str) -> None:
    for pin in source.of(old).list(old).files:
        target.of(new).put(join(new, pin.uri.rpartition("/")[2]), source.of(old).get(pin.uri, 2**30)[1])
