"""Promise 6 under attack: workers that die, hang, fall asleep, or can't do a shard. `test_clusters.py` has the nodes.

Every trouble strikes at an exact place (`plugins/methods/troubled.py`, `plugins/stores/frail.py`). There a worker can
also wait until another process has been killed. Every merge is compared with an undisturbed one, byte by byte.
"""

import json
import os
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import tool
from tests.driver.conftest import OUTPUT
from tests.tools.families import Family
from tests.tools.merging import LOCAL, carried_out, digests, recipe_of
from ties_ray.driver import dispatch
from ties_ray.errors import InterruptedMerge, MergeError, UnavailableError
from ties_ray.operations import merging
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import Progress

MakeFamily = Callable[..., Family]


def troubled(family: Family, folder: Path, trouble: str, *, run: dict[str, Any], **more: Any) -> Recipe:
    """Return the recipe of a merge whose workers are troubled; `folder` holds the troubles, beside it the output."""
    method = {"name": "troubled", "profile": "official", "folder": str(folder), "trouble": trouble, **more}
    return recipe_of(family, {"path": str(folder.parent / "out"), **OUTPUT}, method, run=run)


def struck(folder: Path) -> list[int]:
    """Return the processes that were troubled, in order."""
    return [int((folder / name).read_text()) for name in sorted(p.name for p in folder.iterdir() if p.name.isdigit())]


def is_gone(pid: int, seconds: float = 30) -> bool:
    """Whether a process has ended, or does soon."""
    try:
        psutil.Process(pid).wait(seconds)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


# Threads of one process.


def local(workers: int = 2, **more: Any) -> dict[str, Any]:
    return {**LOCAL, "workers": workers, **more}


def files_of(folder: Path) -> dict[str, int]:
    """Return what lies in a folder itself, hidden or not, with the time of its last change."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def wake(trouble: Path) -> None:
    """Let the hanging threads go on, and wait until they are done."""
    sleepers = [thread for thread in threading.enumerate() if thread.name.startswith("ties-ray-")]
    assert sleepers
    (trouble / "release").touch()
    for thread in sleepers:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("round_", ["majority", "merge"])
def test_a_worker_that_hangs_is_replaced_and_does_no_harm_when_it_wakes_up(
    round_: str, family: Family, undisturbed: dict[str, str], trouble: Path, plugged: Path
) -> None:
    recipe = troubled(family, trouble, "hang", run=local(patience=2), round=round_)
    result, out = merging.merge(recipe), trouble.parent / "out"
    assert len(struck(trouble)) == 1
    assert result.workers_lost >= 1
    assert result.shards_again >= 1
    assert digests(out) == undisturbed
    before = files_of(out)
    wake(trouble)
    assert files_of(out) == before
    assert digests(out) == undisturbed
    assert merging.merge(recipe).reused


def test_a_hanging_worker_is_named_with_the_setting_that_gave_it_up(
    family: Family, trouble: Path, plugged: Path
) -> None:
    recipe = troubled(family, trouble, "hang", run=local(workers=1, patience=0.5), times=3)
    with pytest.raises(InterruptedMerge, match=r"3 workers were lost .*no answer within 0\.5 s \(run\.patience\)") as e:
        merging.merge(recipe)
    assert e.value.shard is not None
    assert len(struck(trouble)) == 3


@pytest.mark.parametrize("shard", [0, 1])
def test_an_idle_worker_overtakes_one_that_is_slow_and_the_run_does_not_wait_for_it(
    shard: int,
    family: Family,
    undisturbed: dict[str, str],
    trouble: Path,
    plugged: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "SLOW_SECONDS", 0.1)
    # At its second shard the slow worker holds its first: done, but in no record yet.
    parameter = ("lm_head.weight", "model.layers.0.self_attn.o_proj.weight")[shard]
    result = merging.merge(troubled(family, trouble, "hang", run=local(), parameter=parameter))
    out = trouble.parent / "out"
    assert len(struck(trouble)) == 1
    assert result.workers_lost == 0
    assert digests(out) == undisturbed
    before = files_of(out)
    wake(trouble)
    assert files_of(out) == before
    assert digests(out) == undisturbed


@pytest.mark.parametrize(
    ("kind", "error", "code", "message"),
    [
        ("raise", MergeError, 1, r"merge, shard \d+: ValueError: this shard is not to its method's taste"),
        ("unavailable", UnavailableError, 5, r"somewhere: does not answer"),
    ],
)
def test_a_shard_that_always_fails_ends_the_run_and_the_mended_run_continues(
    kind: str,
    error: type[MergeError],
    code: int,
    message: str,
    family: Family,
    undisturbed: dict[str, str],
    trouble: Path,
    plugged: Path,
) -> None:
    recipe = troubled(family, trouble, kind, run=local(), times=1000)
    with pytest.raises(error, match=message) as raised:
        merging.merge(recipe)
    assert raised.value.exit_code == code
    assert len(struck(trouble)) == 3
    (trouble / "mended").touch()
    assert_continues(recipe, undisturbed)


def assert_continues(recipe: Recipe, undisturbed: dict[str, str]) -> None:
    """Merge again after a failure in the last round: nothing of the rounds before is done again."""
    result = merging.merge(recipe)
    rounds = carried_out(result).merges[0].rounds
    assert result.resumed
    assert result.shards_done_before >= sum(round_.num_shards for round_ in rounds[:-1])
    assert result.bytes_read <= rounds[-1].bytes_read
    assert digests(recipe.output.path) == undisturbed


@pytest.mark.parametrize("kind", ["raise", "unavailable", "memory"])
def test_a_shard_that_fails_once_is_done_by_another_worker(
    kind: str, family: Family, undisturbed: dict[str, str], trouble: Path, plugged: Path
) -> None:
    result = merging.merge(troubled(family, trouble, kind, run=local()))
    assert len(struck(trouble)) == 1
    assert (result.workers_lost, result.shards_again) == (0, 1)
    assert digests(trouble.parent / "out") == undisturbed


# Processes: workers on Ray.


def on_ray(workers: int = 2, **more: Any) -> dict[str, Any]:
    return {"workers": workers, **more}


@pytest.mark.parametrize("round_", ["majority", "merge"])
def test_a_killed_process_is_replaced(
    round_: str, family: Family, undisturbed: dict[str, str], trouble: Path, plugged: Path, ray_cluster: None
) -> None:
    events: list[str] = []
    recipe = troubled(family, trouble, "kill", run=on_ray(), round=round_)
    result = merging.merge(recipe, watch=lambda progress: events.append(progress.event))
    assert len(struck(trouble)) == 1
    assert (result.workers_lost, result.resumed) == (1, False), events
    assert result.shards_again >= 1
    assert digests(trouble.parent / "out") == undisturbed


@pytest.mark.usefixtures("plugged")
def test_what_ray_prints_about_a_lost_worker_is_not_in_the_record_on_standard_output(
    family: Family, trouble: Path, tmp_path: Path, ray_cluster: None
) -> None:
    import ray

    run = on_ray(address=ray.get_runtime_context().gcs_address)
    recipe = troubled(family, trouble, "kill", run=run, round="merge")
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json(exclude_unset=True, by_alias=True))
    command = [tool("ties-ray"), "merge", str(tmp_path / "recipe.json"), "--json", "--quiet"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=120, env=os.environ | {"RAY_DEDUP_LOGS": "0"}
    )
    assert json.loads(done.stdout)["workers_lost"] == 1
    assert "A worker died" in done.stderr  # with that setting Ray does print


def test_a_process_killed_while_it_reads_for_a_count_is_replaced(
    family: Family, undisturbed: dict[str, str], tmp_path: Path, plugged: Path, ray_cluster: None
) -> None:
    frail = replace(family, base=f"frail://{family.base}", models=tuple(f"frail://{uri}" for uri in family.models))
    point = {"what": "read", "uri": "*/model-1/*", "count": 3, "marker": str(tmp_path / "died")}  # in its first shard
    output = {"path": str(tmp_path / "out"), **OUTPUT}
    method = {"name": "ties", "profile": "official"}
    result = merging.merge(recipe_of(frail, output, method, storage={"frail": point}, run=on_ray()))
    assert (tmp_path / "died").exists()
    assert result.workers_lost == 1
    assert digests(tmp_path / "out") == undisturbed


def test_a_shard_that_kills_every_worker_is_named_and_the_mended_run_continues(
    family: Family, undisturbed: dict[str, str], trouble: Path, plugged: Path, ray_cluster: None
) -> None:
    recipe = troubled(family, trouble, "kill", run=on_ray(), times=1000)
    with pytest.raises(InterruptedMerge, match=r"merge, shard 2: .*3 workers were lost while they ran it") as raised:
        merging.merge(recipe)
    assert raised.value.shard == 2
    assert raised.value.exit_code == 4
    assert len(set(struck(trouble))) == 3
    (trouble / "mended").touch()
    assert_continues(recipe, undisturbed)


def test_a_process_that_is_killed_while_it_starts_is_replaced_and_counted(
    family: Family, undisturbed: dict[str, str], tmp_path: Path, plugged: Path, ray_cluster: None
) -> None:
    point = {"what": "head", "uri": "*/plan.json.gz", "marker": str(tmp_path / "died")}
    output = {"path": f"frail://{tmp_path / 'out'}", **OUTPUT}
    seen: list[Progress] = []
    recipe = recipe_of(family, output, {"name": "ties", "profile": "official"}, storage={"frail": point}, run=on_ray())
    result = merging.merge(recipe, watch=seen.append)
    assert (tmp_path / "died").exists()
    assert result.workers_lost == 1
    assert any("was lost, and another takes its place" in progress.event for progress in seen)
    assert (seen[-1].workers, seen[-1].workers_missing, seen[-1].workers_lost) == (2, 0, 1)
    assert digests(tmp_path / "out") == undisturbed


def test_a_process_that_stands_still_like_one_cut_off_is_replaced_and_ended(
    family: Family, undisturbed: dict[str, str], trouble: Path, plugged: Path, ray_cluster: None
) -> None:
    result = merging.merge(troubled(family, trouble, "stop", run=on_ray(patience=4)))
    [pid] = struck(trouble)
    assert result.workers_lost >= 1
    assert digests(trouble.parent / "out") == undisturbed
    assert is_gone(pid)
