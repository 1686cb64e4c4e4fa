"""The records of plans and results: what they hold, what their tables show, and what a record of nothing says."""

import math
import shutil
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.tools.adapters import make_pool
from tests.tools.families import Family
from tests.tools.merging import recipe_of
from ties_ray.errors import InputError, Problem
from ties_ray.methods.ties import Ties
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import (
    RESULT_NAME,
    Failure,
    InputProvenance,
    MergeResult,
    Progress,
    Provenance,
    ReportedProblem,
    TrimReport,
    WrittenFile,
    find_result,
    plan_record,
)
from ties_ray.rounds import kind_of
from ties_ray.stores import Stores


def test_a_record_of_nothing_counts_nothing() -> None:
    result = MergeResult(status="failed")
    numbers = [
        value for value in result.model_dump(exclude={"schema_version"}).values() if isinstance(value, int | float)
    ]
    assert len(numbers) > 10
    assert not any(numbers)
    assert set(vars(Progress("plan", 0, 0, 0, 0)).values()) == {"plan", "", 0, None}


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError, match="Instance is frozen"):
        MergeResult(status="done").run_id = "0"
    with pytest.raises(FrozenInstanceError, match="done"):
        Progress("plan", 0, 0, 0, 0).done = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        MergeResult.model_validate({"status": "done", "run": "0"})


def test_a_record_shows_what_differs_from_its_defaults() -> None:
    file = WrittenFile(name="a", size=5, etag="e", crc32c="0" * 8)
    result = MergeResult(status="done", run_id="0", files=[file], seconds=2.5, zeroed={"a": 1, "b": 2}, error=failure())
    assert repr(result) == "MergeResult(status='done', run_id='0', num_files=1, seconds=2.5, num_zeroed=2)"
    assert file.table() == [{"name": "a", "size": 5, "etag": "e", "crc32c": "0" * 8}]
    provenance = provenance_of("a")
    assert provenance.table() == [provenance.models[0].row()]
    assert provenance.models[0].row()["density"] is None
    assert "objects" not in provenance.models[0].row()


def failure() -> Failure:
    return Failure.of(InputError([Problem("a", "is wrong", "mend it"), Problem("b", "too", "mend it")]))


def provenance_of(*ids: str) -> Provenance:
    models = [
        InputProvenance(id=id_, uri=f"/m/{id_}", weight=1.5, density=None, licence="mit", objects=[]) for id_ in ids
    ]
    return Provenance(
        ties_ray="1", python="3", torch="2", numba="0", ray="2", arithmetic="exact-1", method={}, base=models[0],
        models=models,
    )  # fmt: skip


def test_a_failure_says_why_and_whether_to_try_again() -> None:
    record = failure()
    assert (record.kind, record.retryable, record.shard) == ("input", False, None)
    assert record.message == str(InputError([Problem("a", "is wrong", "mend it"), Problem("b", "too", "mend it")]))
    problem = Problem("a", "is wrong", "mend it", "code")
    assert ReportedProblem.of(problem).problem() == problem


def test_the_table_of_a_result_has_a_row_a_model_with_the_share_that_is_kept() -> None:
    trims = [
        TrimReport(model="a", threshold=0.25, kept=20, size=100, parameter=None, tied=0),
        TrimReport(model="b", threshold=0.5, kept=1, size=2, parameter="p", tied=0),
        TrimReport(model="c", threshold=math.inf, kept=1, size=1, parameter=None, tied=0),
    ]
    rows = MergeResult(status="done", provenance=provenance_of("a", "b", "c"), trims=trims).table()
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [(row.get("threshold"), row.get("kept_share")) for row in rows] == [(0.25, 0.2), (None, None), (math.inf, 1)]
    assert rows[0]["weight"] == 1.5
    assert rows[0]["elements"] == 0
    assert MergeResult(status="failed").table() == []


def test_the_record_of_a_plan_holds_what_the_plan_says(family_of: Callable[..., Family], tmp_path: Path) -> None:
    family = family_of(num_models=3, shards=2)
    output = {"path": str(tmp_path / "out"), "file_size": "4kB"}
    made = merging.plan(recipe_of(family, output, "ties", weights=(0, 1, 2)))
    record = plan_record(made)
    rounds = made.merges[0].rounds
    assert [tuple(each.model_dump().values()) for each in record.rounds] == [
        (each.name, each.kind, each.num_shards, each.passes, each.bytes_read, each.requests, each.bytes_again,
         kind_of(each).remark(each))
        for each in rounds
    ]  # fmt: skip
    assert (record.shards, record.bytes_read) == (made.num_shards, made.bytes_read)
    assert (record.bytes_written, record.memory) == (made.bytes_written, made.memory)
    assert record.requests == sum(each.requests for each in rounds)
    assert [(each.name, each.size, each.tensors) for each in record.files] == [
        (each.name, each.size, len(each.tensors)) for each in made.files
    ]
    assert (record.run_id, record.arithmetic, record.output) == (made.run_id, made.arithmetic, made.output)
    assert (record.paper, record.scales) == (Ties.paper, made.recipe.method.scales)
    assert record.notes == list(made.notes)
    assert any("weight 0, left out" in note for note in record.notes)
    assert record.merged == made.merges[0].layout.num_elements
    assert record.task_vectors == (record.merged, record.merged)
    assert record.forecast is None


def test_the_record_of_a_plan_describes_each_input(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=2, layers=1)
    data = {"base": pool.base, "output": str(tmp_path / "out"), "method": {"name": "ties", "trim": "tensor"}}
    models: list[dict[str, object]] = [
        {"path": pool.adapters[0], "weight": {"*q_proj*": 2.0}},
        {"path": pool.adapters[1], "density": {"*q_proj*": 0.5}},
        {"path": str(shutil.copytree(pool.base, tmp_path / "whole")), "weight": 0.5, "density": 0.25},
    ]
    made = merging.plan(validate({**data, "models": models}))
    record = plan_record(made)
    assert [each.by_parameter for each in record.models] == [["weight"], ["density"], []]
    assert [each.format for each in (record.base, *record.models)] == ["checkpoint", "lora", "lora", "checkpoint"]
    assert [each.uri for each in record.models] == [each["path"] for each in models]
    assert [(each.weight, each.density) for each in record.models[2:]] == [(0.5, 0.25)]
    for each, model in zip(record.models, made.catalog.models, strict=True):
        assert each.account == model.account
        assert each.size == sum(pin.size for pin in model.objects)
        assert each.parameters == each.dtypes["F32"] > 0
    smallest, largest = record.task_vectors
    assert smallest < largest == record.merged


def test_a_folder_without_a_result_has_none(tmp_path: Path) -> None:
    assert find_result(Stores({}), str(tmp_path)) is None
    (tmp_path / RESULT_NAME).write_text(MergeResult(status="done", run_id="0" * 16).model_dump_json())
    assert find_result(Stores({}), str(tmp_path)) == MergeResult(status="done", run_id="0" * 16)
    (tmp_path / RESULT_NAME).write_text("{}")
    with pytest.raises(InputError, match=r"the result record .*; use the version that wrote it, or merge again with"):
        find_result(Stores({}), str(tmp_path))
