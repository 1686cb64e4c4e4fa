"""A driver that has lost its output to another run changes nothing there, and says why it ends."""

from collections.abc import Callable
from pathlib import Path

import pytest

import ties_ray
from tests.tools.families import Family
from tests.tools.merging import LOCAL, digests, merge, recipe_of
from ties_ray.driver import resume
from ties_ray.errors import InterruptedMerge
from ties_ray.operations import merging
from ties_ray.reports.records import Progress
from ties_ray.state.lease import HOLDER, Holder
from ties_ray.stores import Stores
from ties_ray.stores.local import Local

OTHER = Holder(token="0" * 32, host="elsewhere", machine="", process="")


@pytest.mark.parametrize("activity", ["counting", "merging"])
def test_a_fenced_driver_neither_begins_nor_aborts_an_upload(
    activity: str, family_of: Callable[..., Family], tmp_path: Path
) -> None:
    family, output = family_of(num_models=3), tmp_path / "merged"
    store = Stores({}).writer(str(output))
    uploads: list[tuple[tuple[str, str], ...]] = []

    def watch(progress: Progress) -> None:
        if progress.activity == activity and not uploads:
            (output / ".ties-ray/lease.json").write_bytes(HOLDER.dump_json(OTHER))
            store.begin_upload(f"{output}/of-another-run.safetensors", 100)
            uploads.append(store.list_uploads(str(output)))

    recipe = recipe_of(family, output, "ties", run=LOCAL)
    with pytest.raises(InterruptedMerge, match="another run took over"):
        merging.merge(recipe, watch=watch)
    assert store.list_uploads(str(output)) == uploads[0]
    assert not list(output.glob("*.safetensors"))


def test_an_upload_that_a_late_request_begins_is_aborted(family_of: Callable[..., Family], tmp_path: Path) -> None:
    family, output = family_of(num_models=3), tmp_path / "merged"
    store = Stores({}).writer(str(output))
    begun: list[str] = []

    def watch(progress: Progress) -> None:
        if progress.activity == "merging" and not begun:
            begun.append(store.begin_upload(f"{output}/model.safetensors", 100))

    merging.merge(recipe_of(family, output, "ties", run=LOCAL), watch=watch)
    assert begun
    assert store.list_uploads(str(output)) == ()


def test_verify_names_uploads_that_lie_in_a_finished_output(family_of: Callable[..., Family], tmp_path: Path) -> None:
    output = tmp_path / "merged"
    merge(family_of(num_models=2), output, "average", run=LOCAL)
    assert not any("unfinished" in note for note in ties_ray.verify(output).notes)
    Stores({}).writer(str(output)).begin_upload(f"{output}/left.safetensors", 100)
    verification = ties_ray.verify(output)
    assert "unfinished uploads lie here: left.safetensors; `ties-ray clean` removes them" in verification.notes
    assert not verification.problems


def test_a_merge_that_another_run_finishes_meanwhile_is_no_other_merge(
    family_of: Callable[..., Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(family_of(num_models=2), tmp_path / "out", "average", run=LOCAL)
    merging.merge(recipe)
    published = digests(tmp_path / "out")
    monkeypatch.setattr(merging, "_finished", lambda planned, stores: None)  # it has looked just before
    assert merging.merge(recipe).resumed
    assert digests(tmp_path / "out") == published


def test_a_fenced_driver_does_not_refuse_what_the_other_run_has_written(
    family_of: Callable[..., Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, output = recipe_of(family_of(num_models=2), tmp_path / "out", "average", run=LOCAL), tmp_path / "out"
    find_runs = resume.find_runs

    def overtaken(stores: Stores, uri: str) -> list[tuple[str, int]]:
        """Look for runs, and be overtaken by another one that publishes."""
        runs = find_runs(stores, uri)
        (output / ".ties-ray/lease.json").write_bytes(HOLDER.dump_json(OTHER))
        (output / "model.safetensors").write_bytes(b"of the other run")
        return runs

    monkeypatch.setattr(resume, "find_runs", overtaken)
    with pytest.raises(InterruptedMerge, match="another run took over"):
        merging.merge(recipe)


def test_a_driver_that_is_overtaken_while_it_begins_uploads_aborts_its_own(
    family_of: Callable[..., Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, output = recipe_of(family_of(num_models=2), tmp_path / "out", "average", run=LOCAL), tmp_path / "out"
    begin = Local.begin_upload

    def overtaken(self: Local, uri: str, size: int) -> str:
        (output / ".ties-ray/lease.json").write_bytes(HOLDER.dump_json(OTHER))
        return begin(self, uri, size)

    monkeypatch.setattr(Local, "begin_upload", overtaken)
    with pytest.raises(InterruptedMerge, match="another run took over"):
        merging.merge(recipe)
    assert Stores({}).writer(str(output)).list_uploads(str(output)) == ()
