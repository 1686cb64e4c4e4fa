import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from tests.planning.test_plan import catalog_of, recipe_for
from tests.tools.adapters import make_pool
from tests.tools.families import Family, write_checkpoint
from tests.tools.merging import LOCAL, recipe_of
from ties_ray.cli.commands import commands
from ties_ray.cli.screen import show
from ties_ray.cli.text import of_plan, of_result
from ties_ray.driver.meters import Foreseen
from ties_ray.driver.result import predicted_seconds
from ties_ray.inputs.catalog import Catalog
from ties_ray.operations import merging
from ties_ray.planning.forecast import Progressed, ProgressForecast, Rates, observed, predict, work_of
from ties_ray.planning.plan import Plan
from ties_ray.planning.planner import make_plan
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import plan_record
from ties_ray.stores import Stores
from ties_ray.tensors import Parameter
from ties_ray.worker.rates import measure

PARAMETERS = [Parameter(f"p{number}", (4096, 8192), "F32", True) for number in range(40)]
ELEMENTS = 40 * 4096 * 8192
QUICK = Rates(read=1e15, write=1e15, request=0.0, dense={})
"""A worker that takes no time for anything."""


def plan_of(num_models: int = 4, *, local: bool = False, **more: object) -> Plan:
    """Return a plan of models in a bucket, of which workers keep nothing, or in local files."""
    catalog = catalog_of(PARAMETERS, num_models)
    recipe = recipe_for(num_models, **{"run": {**LOCAL, "cache": 0, "disk_cache": 0}, **more})
    return make_plan(recipe, catalog if local else in_a_bucket(catalog))


def in_a_bucket(catalog: Catalog) -> Catalog:
    models = [
        replace(
            model,
            uri=f"s3://bucket/{model.id}",
            objects=tuple(pin._replace(uri=f"s3:/{pin.uri}") for pin in model.objects),
        )
        for model in (catalog.base, *catalog.models)
    ]
    return replace(catalog, base=models[0], models=tuple(models[1:]))


def with_ns(rates: Rates, plan: Plan, ns: float) -> Rates:
    return rates.model_copy(update={"dense": {round_.name: ns for round_ in plan.merges[0].rounds}})


def test_a_round_has_to_do_what_its_models_store() -> None:
    catalog = catalog_of(PARAMETERS, 4)
    whole = replace(catalog.models[2], density=1.0)
    plan = make_plan(recipe_for(4), replace(catalog, models=(*catalog.models[:2], whole, catalog.models[3])))
    high, low, merge = work_of(plan, workers=1)
    assert high.dense == low.dense == 3 * ELEMENTS  # what is not trimmed is not counted
    assert merge.dense == 4 * ELEMENTS
    assert merge.factors == 0
    assert (high.bytes_written, merge.bytes_written) == (0, plan.bytes_written)
    assert [work.bytes_read for work in (high, low, merge)] == [round_.bytes_read for round_ in plan.merges[0].rounds]


def test_of_short_models_no_second_count_is_foreseen() -> None:
    short = [parameter._replace(dtype="BF16") for parameter in PARAMETERS]
    high, low, merge = work_of(make_plan(recipe_for(4), catalog_of(short, 4)), workers=1)
    assert (low.dense, low.bytes_read, low.requests) == (0, 0, 0)
    assert high.dense == merge.dense == 4 * ELEMENTS


def test_what_workers_keep_of_a_bucket_is_not_read_again() -> None:
    local, remote = plan_of(local=True), in_a_bucket(catalog_of(PARAMETERS, 4))
    once = local.merges[0].rounds[0].bytes_read
    half = make_plan(recipe_for(4, run={**LOCAL, "cache": 0, "disk_cache": once // 2}), remote)
    assert [work.bytes_read for work in work_of(local, 1)] == [once] * 3
    assert [work.bytes_read for work in work_of(half, 1)] == pytest.approx([once, once // 2, once // 2], rel=1e-6)
    assert [work.bytes_read for work in work_of(half, 2)] == pytest.approx([once, 0, 0], abs=16)
    assert [work.requests for work in work_of(half, 2)][1:] == [0, 0]


def test_a_shard_reads_blocks_of_all_models_and_writes_parts() -> None:
    plan = plan_of(num_models=5)
    last = plan.merges[0].rounds[-1]
    work = work_of(plan, workers=1)[-1]
    assert work.slices == 5 * math.ceil(ELEMENTS / last.num_shards / last.block) > 5
    parts = sum(plan.merges[0].layout.num_parts(file) for file in range(len(plan.files)))
    assert work.parts == math.ceil(parts / last.num_shards)
    assert work.requests == last.requests


def test_what_is_read_twice_is_merged_twice(tmp_path: Path) -> None:
    """A pass over factors counts as one over whole models does."""
    twice = {"name": "consensus", "agree": 1}
    plan = plan_of(num_models=300, method=twice, run={**LOCAL, "cache": 0, "disk_cache": 0, "memory": "128MiB"},
                   output={"path": "/out", "part_size": "5MiB"})  # fmt: skip
    last = plan.merges[0].rounds[-1]
    assert last.passes == 2
    assert work_of(plan, workers=1)[-1].dense == 2 * 300 * ELEMENTS
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=3)
    settings = {"base": pool.base, "models": list(pool.adapters), "method": "average", "run": LOCAL}
    once = merging.plan(validate({**settings, "output": {"path": str(tmp_path / "out"), "kind": "checkpoint"}}))
    result = once.results[0]
    again = replace(result, rounds=(*result.rounds[:-1], result.rounds[-1]._replace(passes=2)))
    changed = sum(delta.numel() for deltas in pool.deltas for delta in deltas.values())
    assert [work_of(each, workers=1)[-1].factors for each in (once, replace(once, results=(again,)))] == [
        changed, 2 * changed,
    ]  # fmt: skip
    assert work_of(once, workers=1)[-1].dense == 0
    quick = predict(once, QUICK, 1)
    assert quick
    assert quick.seconds < 1e-6  # rates that nobody has measured take no time


def test_a_round_takes_its_slowest_stage_the_first_slices_and_the_last_part() -> None:
    plan = plan_of()
    rates = with_ns(QUICK, plan, 2.0).model_copy(update={"read": 1e10, "write": 2e8})
    work = work_of(plan, workers=1)[-1]
    read, merged, written = work.bytes_read / 1e10, work.dense * 2e-9, work.bytes_written / 2e8
    prediction = predict(plan, rates, 1)
    assert prediction
    pieces = read * plan.ahead / work.slices, merged / work.slices, written / work.parts
    assert read < merged < written
    assert prediction.rounds[-1].seconds == pytest.approx(pieces[0] + pieces[1] + written)
    assert prediction.bound == "write"
    assert predict(plan, QUICK.model_copy(update={"read": 1e9}), 1).rounds[-1].seconds == pytest.approx(  # type: ignore[union-attr]
        work.bytes_read / 1e9, rel=1e-3
    )


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("bound", ["read", "merge", "write"])
def test_the_slowest_of_reading_merging_and_writing_sets_the_pace(bound: str, local: bool) -> None:
    plan = plan_of(local=local)
    rates = {
        "read": with_ns(QUICK, plan, 0.001).model_copy(update={"read": 1e9}),
        "merge": with_ns(QUICK, plan, 2.0),
        "write": QUICK.model_copy(update={"write": 1e8}),
    }[bound]
    prediction = predict(plan, rates, 1)
    assert prediction
    assert prediction.rounds[-1].bound == bound
    last = plan.merges[0].rounds[-1].bytes_read / 1e9, 4 * ELEMENTS * 2e-9, plan.bytes_written / 1e8
    assert prediction.rounds[-1].seconds == pytest.approx(last[["read", "merge", "write"].index(bound)], rel=0.01)
    if bound == "write":  # nothing is written before the last round
        assert prediction.rounds[0].seconds < 0.01


@pytest.mark.parametrize("local", [False, True])
def test_stages_overlap_unless_a_worker_copies_by_itself_what_it_merges(local: bool) -> None:
    plan = plan_of(local=local)
    read = sum(round_.bytes_read for round_ in plan.merges[0].rounds) / 1e9
    both = with_ns(QUICK, plan, 1.0).model_copy(update={"read": 1e9})
    alone = predict(plan, with_ns(QUICK, plan, 1.0), 1)
    prediction = predict(plan, both, 1)
    assert prediction
    assert alone
    if local:
        assert prediction.seconds == pytest.approx(read + alone.seconds, rel=1e-6)
    else:  # but for the first reads and the last part of each shard
        assert max(read, alone.seconds) < prediction.seconds < read + alone.seconds
    shown = observed(plan, 0, Progressed(1, 10**9, 0, seconds=10.0, waited=4.0))
    assert shown.read == 10**9 / (4 if local else 10)


def test_rounds_and_start_add_up_and_more_workers_take_as_much_less() -> None:
    plan = plan_of()
    rates = with_ns(QUICK, plan, 1.5).model_copy(update={"read": 5e8, "start": 7.0})
    single, four, enough, more = filter(None, (predict(plan, rates, workers) for workers in (1, 4, 10_000, 20_000)))
    assert single.seconds == pytest.approx(7 + sum(round_.seconds for round_ in single.rounds))
    assert (single.seconds - 7) / (four.seconds - 7) == pytest.approx(4, rel=0.1)
    longest = max(round_.num_shards for round_ in plan.merges[0].rounds)
    assert (single.seconds - 7) / (enough.seconds - 7) <= longest  # a shard is done by one worker
    assert more.seconds == enough.seconds


def test_small_requests_take_their_time_where_there_is_little_to_read() -> None:
    plan = plan_of()
    prediction = predict(plan, QUICK.model_copy(update={"request": 0.1}), 1)
    assert prediction
    assert [round_.seconds for round_ in prediction.rounds] == pytest.approx(
        [round_.requests * 0.1 / plan.ahead for round_ in plan.merges[0].rounds], rel=0.01
    )


def test_what_is_done_takes_no_more_time() -> None:
    plan = plan_of()
    rates = with_ns(QUICK, plan, 1.0)
    whole = predict(plan, rates, 1)
    last = predict(plan, rates, 1, [0, 0, plan.merges[0].rounds[-1].num_shards])
    assert whole
    assert last
    assert [round_.seconds for round_ in last.rounds] == [0, 0, whole.rounds[-1].seconds]


def test_of_condensing_nothing_is_predicted() -> None:
    plan = plan_of()
    condense = plan.merges[0].rounds[-1]._replace(kind="condense")
    result = replace(plan.results[0], rounds=(*plan.merges[0].rounds[:-1], condense))
    assert predict(replace(plan, results=(result,)), QUICK, 1) is None


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_shards_tell_of_all_the_rest(workers: int) -> None:
    plan = plan_of()
    high = plan.merges[0].rounds[0]
    progress = ProgressForecast(plan, 0, workers, high.num_shards)
    shard = Progressed(1, high.bytes_read // high.num_shards, 0, seconds=10.0, waited=0.0)
    forecasts = []
    for _ in range(2 * workers):
        progress.add(shard)
        forecasts.append(progress.seconds_left())
    assert forecasts[:-1] == [None] * (2 * workers - 1)
    assert forecasts[-1] is not None
    left = -(-(high.num_shards - 2 * workers) // workers) * 10.0
    work = (
        sum(round_.bytes_read for round_ in plan.merges[0].rounds[1:])
        / high.bytes_read
        * high.num_shards
        * 10.0
        / workers
    )
    assert forecasts[-1] == pytest.approx(left + work, rel=0.45)  # counting low bits takes 0.6 of it


def test_finished_shards_add_up_and_what_is_done_is_not_left() -> None:
    shard = Progressed(1, 10**9, 10**8, seconds=10.0, waited=4.0)
    assert Progressed().plus(shard) == shard
    assert shard.plus(shard) == Progressed(2, 2 * 10**9, 2 * 10**8, seconds=20.0, waited=8.0)
    plan = plan_of()
    left = []
    for index, round_ in enumerate(plan.merges[0].rounds):
        progress = ProgressForecast(plan, index, 1, round_.num_shards)
        for _ in range(round_.num_shards):
            progress.add(Progressed(1, round_.bytes_read // round_.num_shards, 1, seconds=10.0, waited=0.0))
        seconds = progress.seconds_left()
        assert seconds is not None
        left.append(seconds)
    assert left[0] > left[1] > left[2] == 0


def test_the_costs_of_other_kinds_of_rounds_follow_from_those_of_one() -> None:
    plan = plan_of()
    high, _, last = plan.merges[0].rounds
    shown = observed(plan, 0, Progressed(2, 10**9, 0, seconds=12.0, waited=2.0))
    ns = 10 * 1e9 / (4 * ELEMENTS * 2 / high.num_shards)
    assert shown.dense == shown.factors
    assert shown.dense[high.name] == pytest.approx(ns)
    ratio = shown.dense[last.name] / shown.dense[high.name]
    other = observed(plan, 2, Progressed(2, 10**9, 0, seconds=12.0, waited=2.0))
    assert other.dense[last.name] / other.dense[high.name] == pytest.approx(ratio)
    assert (shown.request, shown.start) == (0, 0)


def test_records_that_a_counting_round_writes_say_nothing_of_writing_weights() -> None:
    plan = plan_of()
    few = Progressed(2, 10**9, 1000, seconds=2.0, waited=0.0)
    assert observed(plan, 0, few).write == observed(plan, 0, few).read == 5e8
    assert observed(plan, 2, few._replace(bytes_written=10**7)).write == 5e6


def test_shards_that_have_read_nothing_show_a_slow_worker_and_no_defect() -> None:
    plan = plan_of()
    rates = observed(plan, 0, Progressed(1, 0, 0, seconds=10.0))
    assert rates.read == 1 / 10
    assert predict(plan, rates, 1)


def test_a_rate_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValidationError, match="reads"):
        Rates.model_validate({**QUICK.model_dump(), "reads": 1.0})


def test_time_spent_waiting_is_not_the_kernels() -> None:
    plan = plan_of()
    high = plan.merges[0].rounds[0]
    share = Progressed(2, 2 * high.bytes_read // high.num_shards, 0, seconds=10.0, waited=10.0)
    rates = observed(plan, 0, share)
    assert set(rates.dense.values()) == {0.0}
    assert rates.read == pytest.approx(share.bytes_read / 10)
    prediction = predict(plan, rates, 1)
    assert prediction
    assert {round_.bound for round_ in prediction.rounds} == {"read"}


def test_rates_are_measured_on_the_models_themselves(family_of: Callable[..., Family], tmp_path: Path) -> None:
    plan = merging.plan(recipe_of(family_of(), tmp_path / "out", "ties"))
    rates = measure(plan, Stores({}))
    assert rates.dense.keys() == {round_.name for round_ in plan.merges[0].rounds}
    assert all(ns > 0 for ns in rates.dense.values())
    assert rates.factors == {}
    assert min(rates.read, rates.write, rates.request) > 0
    assert not (tmp_path / "out").exists()


def test_rates_of_a_pool_are_those_of_its_factors(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), variants=("plain", "dora"))
    settings = {"base": pool.base, "models": list(pool.adapters), "method": "ties", "run": LOCAL}
    plan = merging.plan(validate({**settings, "output": {"path": str(tmp_path / "out"), "kind": "checkpoint"}}))
    rates = measure(plan, Stores({}))
    assert rates.factors.keys() == {round_.name for round_ in plan.merges[0].rounds}
    assert all(ns > 0 for ns in rates.factors.values())
    assert work_of(plan, workers=1)[-1].factors > 0


def test_a_plan_tells_machines_and_people_how_long_it_takes(family_of: Callable[..., Family], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    family = family_of()
    run = {"executor": "local", "workers": 3}
    written = {"base": family.base, "models": list(family.models), "method": "ties", "output": str(tmp_path / "out")}
    recipe.write_text(json.dumps({**written, "run": run}))

    def printed(*options: str) -> str:
        done = CliRunner().invoke(commands, ["plan", str(recipe), *options])
        assert done.exit_code == 0, done.output
        return done.stdout

    record, without = json.loads(printed("--json")), json.loads(printed("--json", "--no-rates"))
    forecast = record.pop("forecast")
    assert without.pop("forecast") is None
    assert record == without
    assert [prediction["workers"] for prediction in forecast["predictions"]] == [1, 3]
    for prediction in forecast["predictions"]:
        rounds = sum(round_["seconds"] for round_ in prediction["rounds"])
        assert prediction["seconds"] == pytest.approx(forecast["rates"]["start"] + rounds)
    assert "limited by" in printed()
    assert "limited by" not in printed("--no-rates")


def test_a_merge_holds_what_was_predicted_beside_what_it_took(
    family_of: Callable[..., Family], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(family_of(), tmp_path / "out", "ties")
    result = merging.merge(recipe)
    assert merging.merge(recipe).predicted_seconds == result.predicted_seconds  # of what was done then
    assert result.predicted_seconds is None or result.predicted_seconds <= 2 * result.seconds
    for predicted in (None, 1.5):
        show(*of_result(result.model_copy(update={"predicted_seconds": predicted}), "r.yaml"))
        assert ("(1.5 s predicted)" in capsys.readouterr().out) == (predicted is not None)


def test_the_first_shards_that_read_nothing_predict_nothing() -> None:
    """The first shards of a checkpoint may hold what no adapter changes."""
    plan = plan_of()
    high = plan.merges[0].rounds[0]
    progress = ProgressForecast(plan, 0, 1, high.num_shards)
    for _ in range(3):
        progress.add(Progressed(1, 0, 0, seconds=10.0, waited=0.0))
        assert progress.seconds_left() is None
    progress.add(Progressed(1, 4 * high.bytes_read // high.num_shards, 0, seconds=10.0, waited=0.0))
    assert progress.seconds_left() is not None


@pytest.mark.parametrize(
    ("at", "end", "predicted"), [(10.0, 99.0, 99.0), (10.0, 49.0, None), (10.0, 201.0, None), (51.0, 100.0, None)]
)
def test_a_prediction_that_was_late_or_wrong_by_a_factor_of_two_is_not_shown(
    at: float, end: float, predicted: float | None
) -> None:
    assert predicted_seconds(Foreseen(1000.0 + at, 1000.0 + end), 1000.0, 100.0) == predicted
    assert predicted_seconds(None, 1000.0, 100.0) is None


def test_models_without_elements_take_no_time_and_can_be_measured(tmp_path: Path) -> None:
    store = Stores({}).of("/")
    for name in ("base", "tune"):
        write_checkpoint(store, str(tmp_path / name), {"model.norm.weight": torch.zeros(0)})
    settings = {"base": str(tmp_path / "base"), "models": [str(tmp_path / "tune")], "method": "ties", "run": LOCAL}
    prediction = merging.forecast(merging.plan(validate({**settings, "output": str(tmp_path / "out")})))
    assert prediction
    assert [round_.seconds for round_ in prediction.predictions[0].rounds[:2]] == [0, 0]
    shown = io.StringIO()
    show(
        *of_plan(plan_record(merging.plan(validate({**settings, "output": str(tmp_path / "out")})), prediction)),
        file=shown,
    )
    assert "limited by" in shown.getvalue()
