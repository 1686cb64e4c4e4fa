"""What `status` says of a run that is dead, finished, or broken."""

import io
import os
import re
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from tests.state.test_manifest import TIES, Stop, stop_at
from tests.tools.families import Family
from tests.tools.merging import LOCAL, recipe_of
from ties_ray.cli.text import of_status
from ties_ray.operations import merging
from ties_ray.operations.status import SHOWN, status
from ties_ray.reports.records import Progress
from ties_ray.state import lease
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]


def printed(lines: Iterable[RenderableType]) -> str:
    """Return what the command prints."""
    console = Console(file=io.StringIO(), width=300)
    for line in lines:
        console.print(line)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(("stage", "merged"), [("merge", False), ("publish", True)])
def test_a_dead_run_shows_how_far_it_came(stage: str, merged: bool, family_of: MakeFamily, tmp_path: Path) -> None:
    recipe = recipe_of(family_of(num_models=3), tmp_path / "out", TIES)
    with pytest.raises(Stop):
        merging.merge(recipe, watch=stop_at(stage))
    state = status(Stores({}), str(tmp_path / "out"))
    assert (state.result, state.holder) == (None, None)
    (run,) = state.runs
    plan = merging.plan(recipe)
    assert (run.run_id, run.generation, run.problem) == (plan.run_id, 1, "")
    assert run.uploads == ["model.safetensors"]
    *counting, last = run.rounds
    assert [round_.name for round_ in run.rounds] == [round_.name for round_ in plan.merges[0].rounds]
    assert all(round_.done == round_.shards for round_ in counting)
    assert counting[0].shards == plan.merges[0].rounds[0].num_shards > 0
    assert (last.done, last.shards) == (last.shards if merged else 0, plan.merges[0].rounds[-1].num_shards)
    assert (run.stopped_in, run.open_shards) == (("", []) if merged else ("merge", list(range(last.shards))[:SHOWN]))
    assert 0 < run.bytes_planned <= plan.bytes_read
    assert run.bytes_done == run.bytes_planned - (0 if merged else plan.merges[0].rounds[-1].bytes_read)
    assert run.last_record
    assert abs(run.last_record - time.time()) < 100
    told = printed(of_status(state))
    if merged:
        assert "all rounds are done, and only the publication is left; the last record is of 20" in told
    else:
        assert f"it is in round merge: {last.shards} shard" in told
    merging.merge(recipe)
    state = status(Stores({}), str(tmp_path / "out"))
    assert state.result
    assert state.result.run_id == plan.run_id


@pytest.mark.parametrize("name", ["plan.json.gz", "uploads.json", "records/0"])
def test_what_can_not_be_read_is_the_problem_of_its_run(name: str, family_of: MakeFamily, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        merging.merge(recipe_of(family_of(num_models=2), tmp_path / "out", "average"), watch=stop_at("publish"))
    (generation,) = tmp_path.glob("out/.ties-ray/*/1")
    path = generation / name
    (next(path.iterdir()) if path.is_dir() else path).write_bytes(b"no document")
    (run,) = status(Stores({}), str(tmp_path / "out")).runs
    assert "this ties_ray can't read" in run.problem


def test_a_run_that_was_killed_shows_what_it_did_where_and_when_it_last_lived(
    family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    left = tmp_path / "out/.ties-ray/lease.json"
    stored = b""

    def stop(progress: Progress) -> None:
        nonlocal stored
        if progress.stage == "merge":
            while b"merge" not in stored:
                stored = left.read_bytes()
            raise Stop

    with pytest.raises(Stop):
        merging.merge(recipe_of(family_of(num_models=2), tmp_path / "out", TIES, run=LOCAL), watch=stop)
    assert not left.exists()
    left.write_bytes(stored)
    state = status(Stores({}), str(tmp_path / "out"))
    assert state.holder
    assert re.fullmatch(r"merge, 0 of \d+ done, 1 of 1 workers", state.holder.doing)
    assert state.last_sign
    assert not state.is_gone
    at = rf"held by process {os.getpid()} on {re.escape(socket.gethostname())}, "
    assert re.match(
        at + r"the last sign of life is of 20[-\d :]+UTC, \d\.\d s ago; it was at: merge, ", printed(of_status(state))
    )
    left.write_bytes(state.holder.model_copy(update={"process": "4000000-1"}).model_dump_json().encode())
    state = status(Stores({}), str(tmp_path / "out"))
    assert state.is_gone
    assert ", which has ended; it was at: merge, " in printed(of_status(state))
