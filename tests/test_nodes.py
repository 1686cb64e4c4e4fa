"""Promise 6 under attack: workers, drivers and nodes that die, hang, fall asleep, or can't do one shard.

Every trouble strikes at an exact place (`plugins/methods/troubled.py`, `plugins/stores/frail.py`) or when the driver has
seen a given progress; every merge is compared with an undisturbed one, byte by byte.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.families import Family
from tests.merging import LOCAL, digests, merge, recipe_of
from ties_ray import drive, stage
from ties_ray.errors import InterruptedMerge, MergeError, UnavailableError
from ties_ray.recipe import Recipe
from ties_ray.report import RESULT_NAME, MergeResult, Progress

MakeFamily = Callable[..., Family]
OUTPUT = {"file_size": "15MB", "part_size": "5MiB"}


@pytest.fixture(scope="session")
def family(family_of: MakeFamily) -> Family:
    """Return three fine-tunes of 21 MB: 11 shards a round, 5 in the merge."""
    return family_of(hidden=1024, shards=3)


@pytest.fixture(scope="session")
def wanted(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what an undisturbed merge writes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    merge(family, {"path": str(folder), **OUTPUT}, {"name": "ties", "profile": "official"})
    return digests(folder)


@pytest.fixture
def trouble(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of the method's troubles; at the end what hangs there is let go."""
    folder = tmp_path / "trouble"
    folder.mkdir()
    yield folder
    (folder / "release").touch()


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
    round_: str, family: Family, wanted: dict[str, str], trouble: Path, plugged: Path
) -> None:
    recipe = troubled(family, trouble, "hang", run=local(patience=2), round=round_)
    result, out = drive.merge(recipe), trouble.parent / "out"
    assert len(struck(trouble)) == 1
    assert result.workers_lost >= 1
    assert result.shards_again >= 1
    assert digests(out) == wanted
    before = files_of(out)
    wake(trouble)
    assert files_of(out) == before
    assert digests(out) == wanted
    assert drive.merge(recipe).reused


def test_a_hanging_worker_is_named_with_the_setting_that_gave_it_up(
    family: Family, trouble: Path, plugged: Path
) -> None:
    recipe = troubled(family, trouble, "hang", run=local(workers=1, patience=0.5), times=3)
    with pytest.raises(InterruptedMerge, match=r"3 workers were lost .*no answer within 0\.5 s \(run\.patience\)") as e:
        drive.merge(recipe)
    assert e.value.shard is not None
    assert len(struck(trouble)) == 3


@pytest.mark.parametrize("shard", [0, 1])
def test_an_idle_worker_overtakes_one_that_is_slow_and_the_run_does_not_wait_for_it(
    shard: int, family: Family, wanted: dict[str, str], trouble: Path, plugged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "SLOW_SECONDS", 0.1)
    # At its second shard the slow worker holds its first: done, but in no record yet.
    parameter = ("lm_head.weight", "model.layers.0.self_attn.o_proj.weight")[shard]
    result = drive.merge(troubled(family, trouble, "hang", run=local(), parameter=parameter))
    out = trouble.parent / "out"
    assert len(struck(trouble)) == 1
    assert result.workers_lost == 0
    assert digests(out) == wanted
    before = files_of(out)
    wake(trouble)
    assert files_of(out) == before
    assert digests(out) == wanted


@pytest.mark.parametrize(
    ("kind", "error", "code", "told"),
    [
        ("raise", MergeError, 1, r"merge, shard \d+: ValueError: this shard is not to its method's taste"),
        ("unavailable", UnavailableError, 5, r"somewhere: does not answer"),
    ],
)
def test_a_shard_that_always_fails_ends_the_run_and_the_mended_run_continues(
    kind: str,
    error: type[MergeError],
    code: int,
    told: str,
    family: Family,
    wanted: dict[str, str],
    trouble: Path,
    plugged: Path,
) -> None:
    recipe = troubled(family, trouble, kind, run=local(), times=1000)
    with pytest.raises(error, match=told) as raised:
        drive.merge(recipe)
    assert raised.value.exit_code == code
    assert len(struck(trouble)) == 3
    (trouble / "mended").touch()
    assert_continues(recipe, wanted)


def assert_continues(recipe: Recipe, wanted: dict[str, str]) -> None:
    """Merge again after a failure in the last round: nothing of the rounds before is done again."""
    rounds = drive.plan(recipe).result.rounds
    result = drive.merge(recipe)
    assert result.resumed
    assert result.shards_done_before >= sum(round_.num_shards for round_ in rounds[:-1])
    assert result.bytes_read <= rounds[-1].bytes_read
    assert digests(recipe.output.path) == wanted


@pytest.mark.parametrize("kind", ["raise", "unavailable", "memory"])
def test_a_shard_that_fails_once_is_done_by_another_worker(
    kind: str, family: Family, wanted: dict[str, str], trouble: Path, plugged: Path
) -> None:
    result = drive.merge(troubled(family, trouble, kind, run=local()))
    assert len(struck(trouble)) == 1
    assert (result.workers_lost, result.shards_again) == (0, 1)
    assert digests(trouble.parent / "out") == wanted
