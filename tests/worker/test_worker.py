"""What a worker does with its orders, its slices and its failures."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.families import Family
from tests.tools.merging import LOCAL, carried_out, digests, merge, recipe_of
from ties_ray.errors import InputError, InterruptedMerge, MergeError, Problem, UnavailableError
from ties_ray.kernels import Election, Encoded, SignedSums, Term, WeightedSum, load
from ties_ray.layout.sizes import SIZES
from ties_ray.methods import Context, Deltas, Result, Round
from ties_ray.methods.average import Average
from ties_ray.operations import merging
from ties_ray.reports.records import Progress
from ties_ray.state.manifest import Manifest
from ties_ray.stores import Stores
from ties_ray.worker import worker
from ties_ray.worker.slices import StoredSlices
from ties_ray.worker.worker import ANSWER, ORDER, SETUP, Order, Setup, Worker, make_worker

MakeFamily = Callable[..., Family]


def make_slices(
    models: list[torch.Tensor | None], base: torch.Tensor, *, passes: int = 1, resident: bool = False, together: int = 2
) -> tuple[StoredSlices, list[int]]:
    """Return the slices of some models, and a list of those that were taken from storage so far."""
    passes = 1 if resident else passes
    numbers: list[int] = []

    def coming() -> Iterator[Encoded | None]:
        for _ in range(passes):
            for number, model in enumerate(models):
                numbers.append(number)
                yield None if model is None else Encoded(model)

    slices = StoredSlices(
        load("cpu"), base, 0, len(models), coming(), passes=passes, resident=resident, per_pass=together,
        factor_room=SIZES.factor_room,
    )  # fmt: skip
    return slices, numbers


def some_models(count: int, length: int = 1000) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    values = torch.randn(count + 1, length, generator=torch.Generator().manual_seed(count)).to(torch.bfloat16)
    models: list[torch.Tensor | None] = list(values[1:])
    models[count // 2] = None
    return models, values[0].float()


@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_iterating_and_folding_give_the_same_bits(count: int, together: int) -> None:
    models, base = some_models(count)
    op = WeightedSum(tuple(Term(0.3 + number) for number in range(count)))
    folded = make_slices(models, base, together=together)[0].fold(op)["sum"]
    total = torch.zeros_like(base)
    for model, delta in make_slices(models, base)[0]:
        assert bool(delta.any()) == (models[model] is not None), "a model that lacks the parameter moves nothing"
        total += delta * torch.tensor(0.3 + model, dtype=torch.float32)
    assert torch.equal(folded, total)


@pytest.mark.parametrize("lacking", [0, 4, 8])
@pytest.mark.parametrize("together", [1, 4, 8, 9])
def test_an_election_has_the_bits_of_folding_first(together: int, lacking: int) -> None:
    models, base = some_models(9)
    models[lacking] = None
    assert models[3] is not None
    models[3][7] = float("nan")
    op, election = SignedSums((Term(threshold=0x3F00_0000),) * 9), Election(factor=0.7)
    slices, other = (make_slices(models, base, together=together)[0] for _ in range(2))
    merged = slices.elect(op, election)
    assert torch.equal(merged, load("cpu").elect(op, other.fold(op), *election))
    assert merged.count_nonzero() > 500
    assert slices.not_finite == other.not_finite == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    slices.close()


@pytest.mark.parametrize("resident", [True, False])
def test_a_second_pass_sees_the_same_slices(resident: bool) -> None:
    models, base = some_models(5)
    slices, numbers = make_slices(models, base, passes=2, resident=resident)
    first = [(model, delta.clone()) for model, delta in slices]
    second = [(model, delta.clone()) for model, delta in slices]
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(first, second, strict=True))
    assert numbers == [0, 1, 2, 3, 4] * (1 if resident else 2)


def test_a_method_that_goes_through_its_models_too_often_is_told() -> None:
    slices, _ = make_slices(*some_models(2))
    assert len(list(slices)) == 2
    with pytest.raises(RuntimeError, match="more often than its round's `passes` says"):
        next(iter(slices))


def test_slices_that_a_method_leaves_are_taken_all_the_same() -> None:
    models, base = some_models(5)
    slices, numbers = make_slices(models, base, passes=2)
    next(iter(slices))
    next(iter(slices))
    assert numbers == [0, 1, 2, 3, 4, 0]
    slices.close()
    assert numbers == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("resident", [True, False])
def test_what_is_not_finite_is_counted_once_however_often_it_is_seen(resident: bool) -> None:
    models, base = some_models(3)
    assert models[2] is not None
    models[2][[3, 500]] = torch.tensor([float("nan"), float("inf")], dtype=torch.bfloat16)
    slices, _ = make_slices(models, base, passes=2, resident=resident)
    op = SignedSums((Term(), Term(), Term()))
    assert torch.equal(slices.fold(op)["sum"], slices.fold(op)["sum"])
    assert slices.not_finite == [0, 0, 2]


# What goes wrong while a worker works.


SMALL = replace(
    SIZES, least_part=4096, most_part=4096, min_range=700, shards_at_least=100, model_group=2, record_shards=2
)
"""Cuts the merge of a tiny family into dozens of shards, in groups of two models, recorded two at a time."""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(8))
def test_failures_that_a_repetition_mends_cost_work_and_no_byte(
    seed: int, family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that can't be written, reads that fail: at random, in any round, several in a run."""
    family = family_of(num_models=5, mixed=True, shards=2)
    method = {"name": "ties", "profile": "official"}
    whole = merge(family, tmp_path / "whole", method)
    draw = random.Random(seed)
    failed: list[str] = []

    def failing(original: Callable[..., Any], name: str, rate: float) -> Callable[..., Any]:
        def call(self: object, *arguments: Any) -> Any:
            if failed.count(name) < 3 and draw.random() < rate:
                failed.append(name)
                raise UnavailableError(Problem("the storage", f"{name} was throttled"))
            return original(self, *arguments)

        return call

    monkeypatch.setattr(Manifest, "write_record", failing(Manifest.write_record, "write_record", 0.3))
    monkeypatch.setattr(Worker, "_shard", failing(Worker._shard, "_shard", 0.15))
    run = {**LOCAL, "workers": draw.choice([1, 2, 3])}
    result = None
    while result is None:  # chance may fail one shard three times, which ends a run: then the same command continues
        with suppress(UnavailableError):
            result = merge(family, tmp_path / "out", method, sizes=SMALL, run=run)
    assert set(failed) == {"write_record", "_shard"}
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert result.trims == whole.trims
    assert result.statistics == whole.statistics


@pytest.mark.timeout(60)
def test_a_storage_that_stays_away_ends_the_run_and_the_same_command_continues(
    family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(num_models=5, mixed=True, shards=2)
    merge(family, tmp_path / "whole", "ties")
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise UnavailableError(Problem("the storage", "is away", "try later"))

        patch.setattr(Manifest, "write_record", refuse)
        with pytest.raises(MergeError, match="the storage: is away") as raised:
            merge(family, tmp_path / "out", "ties", sizes=SMALL)
        assert raised.value.retryable
    assert merge(family, tmp_path / "out", "ties", sizes=SMALL).resumed
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_method_that_owes_its_delta_is_named(
    family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(self: Average, deltas: Deltas, context: Context) -> Result:
        return Result(statistics={"seen": 1})

    monkeypatch.setattr(Average, "rounds", lambda self: (Round("merge", lambda d, c: forgetful(self, d, c)),))
    with pytest.raises(MergeError, match="method average: the last round owes the merged delta, fp32, 1-D"):
        merge(family_of(num_models=3), tmp_path / "out", "average")


# A worker by itself.


@pytest.fixture
def setup(family_of: MakeFamily, tmp_path: Path) -> Setup:
    """Return the setup of a run that was planned and not begun."""
    made = merging.plan(recipe_of(family_of(num_models=3), tmp_path / "out", "ties"))
    stores = Stores({})
    manifest = Manifest(stores, Manifest.folder_of(made.output, made.run_id))
    return Setup(manifest.folder, {}, manifest.write_plan(made))


def order(**fields: Any) -> str:
    return ORDER.dump_json(Order(**fields)).decode()


def test_a_worker_tells_what_it_has_done_and_writes_it_when_asked(setup: Setup) -> None:
    worker = make_worker(SETUP.dump_json(setup).decode())
    assert ANSWER.validate_json(worker.run(order(action="hello"))).traffic.bytes_read == 0
    done = ANSWER.validate_json(worker.run(order(action="shard", round=0, index=0)))
    assert (done.record, done.shards) == ("", ())
    assert done.traffic.bytes_read > 0
    assert done.traffic.requests > 0
    answer = ANSWER.validate_json(worker.run(order(action="flush")))
    assert (answer.round, answer.shards, answer.traffic.bytes_read) == (0, (0,), 0)
    manifest = Manifest(Stores({}), setup.folder)
    made = manifest.read_plan()
    assert made
    record = manifest.read_record(made.merges[0], 0, answer.record)
    assert record.shards == (0,)
    assert {count.member for count in record.finding} == {0, 1, 2}
    assert ANSWER.validate_json(worker.run(order(action="flush"))).record == ""


def test_a_worker_that_does_not_see_the_output_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this worker does not see the output folder; use a folder that all nodes"):
        Worker(Setup(str(tmp_path), {}, ""))


def test_a_worker_that_does_not_see_an_input_as_planned_gets_no_work(
    family_of: MakeFamily, setup: Setup, tmp_path: Path
) -> None:
    manifest = Manifest(Stores({}), setup.folder)
    made = manifest.read_plan()
    assert made
    model = made.catalog.models[1]
    missing = replace(model, objects=(model.objects[0]._replace(uri=str(tmp_path / "elsewhere/model.safetensors")),))
    models = (made.catalog.models[0], missing, made.catalog.models[2])
    digest = manifest.write_plan(replace(made, catalog=replace(made.catalog, models=models)))
    with pytest.raises(InterruptedMerge, match="another plan lies there than the one that this merge has written"):
        Worker(setup)
    with pytest.raises(InputError, match=r"elsewhere/model\.safetensors"):
        Worker(replace(setup, digest=digest)).run(order(action="hello"))


def test_a_worker_that_flushes_denormals_to_zero_gets_no_work(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "flushes_to_zero", lambda: True)
    with pytest.raises(InputError, match="flushes denormal numbers to zero, which changes results"):
        Worker(setup).run(order(action="hello"))


def test_progress_is_told_from_the_first_to_the_last_stage(family_of: MakeFamily, tmp_path: Path) -> None:
    progresses: list[Progress] = []
    recipe = recipe_of(family_of(num_models=3), tmp_path / "out", "ties")
    result = merging.merge(recipe, watch=progresses.append)
    stages = list(dict.fromkeys(progress.stage for progress in progresses))
    assert [*stages[:2], *stages[-2:]] == ["plan", "start", "merge", "publish"]
    assert progresses[-1].bytes_read == progresses[-1].bytes_planned == result.bytes_read
    assert all(progress.done <= progress.total for progress in progresses)
    assert [progress.bytes_read for progress in progresses] == sorted(progress.bytes_read for progress in progresses)


def test_a_json_log_has_a_line_for_each_shard_with_its_run(
    family_of: Callable[..., Family], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = {**LOCAL, "workers": 1, "log": "json"}
    result = merging.merge(recipe_of(family_of(num_models=2), tmp_path / "out", "ties", run=run))
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    shards = [line for line in lines if line["action"] == "shard"]
    rounds = Counter(line["round"] for line in shards)
    assert rounds == {
        round_.name: round_.num_shards for round_ in carried_out(result).merges[0].rounds if round_.bytes_read
    }
    assert {line["outcome"] for line in shards} == {"done"}
    assert {line["run_id"] for line in lines} == {result.run_id}
