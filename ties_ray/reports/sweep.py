"""The table of a sweep: a row for each setting, as JSON, CSV and, with pyarrow, Parquet."""

import csv
import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import FiniteFloat, TypeAdapter

from ties_ray.errors import InputError, Problem
from ties_ray.reports.records import MergeResult, Report
from ties_ray.state import documents
from ties_ray.state.documents import LARGE
from ties_ray.stores import Stores, join
from ties_ray.tables import Row

NAME = "results"
"""The table's name, without its ending."""


class PlannedSetting(Report):
    """One setting of a sweep that is planned."""

    setting: str
    values: dict[str, Any]
    """What the setting sets, by place in the recipe."""
    output: str
    run_id: str
    num_models: int


class SweepRecord(Report):
    """What a sweep will do."""

    output: str
    """The path of the outputs, with `{setting}` in it."""
    settings: list[PlannedSetting]
    bytes_read: int
    """Bytes that all readings take; settings that can't be read together take more."""
    bytes_written: int
    memory: int
    """The most bytes of memory that a worker takes beyond its imports."""
    missing: int
    """Bytes of a shard's slices that find no room in a worker, so that each setting reads them again."""


class SettingResult(Report):
    """One setting of a sweep, and what its merge did."""

    setting: str
    values: dict[str, Any]
    """What the setting sets, by place in the recipe."""
    output: str
    run_id: str
    num_models: int
    bytes_written: int
    """Bytes of the weight files."""
    norm: float | None = None
    """Norm of the merged change; None where nothing was looked at."""
    changed: float | None = None
    """Share of the elements that were looked at to which any model adds a term."""
    conflict: float | None = None
    """Share of the elements with several terms that have terms of both signs."""
    cancellation: float | None = None
    """Share of the terms' magnitudes that is lost because terms of both signs cancel."""
    truncation: float | None = None
    """Relative error of an output that holds factors."""
    reused: bool = False
    """Whether the output held this very merge already."""
    scores: dict[str, float | None] = {}
    """Scores by their label, as `ties-ray evaluate` has found them; None for one that is no number."""
    warnings: list[str] = []

    def row(self) -> Row:
        """Return a row of the table: what it sets by place, then the figures."""
        values = {place: value if isinstance(value, str | int | float) else json.dumps(value)
                  for place, value in self.values.items()}  # fmt: skip
        figures = {name: value for name, value in super().row().items() if name != "setting"}
        own = {"setting": self.setting, **values, **figures}
        scores = {f"score.{label}" if label in own else label: value for label, value in self.scores.items()}
        return {**own, **scores, "warnings": "; ".join(self.warnings)}


class SweepResult(Report):
    """The results of a sweep."""

    output: str
    """The path of the outputs, with `{setting}` in it."""
    rows: list[SettingResult]
    table_files: list[str] = []
    """URIs of the table."""
    bytes_read: int = 0
    """Bytes of inputs that the workers of this call read, for all settings."""
    workers_lost: int = 0
    seconds: FiniteFloat = 0.0


SWEEP_RESULT = TypeAdapter(SweepResult)


def row_of(setting: str, values: Mapping[str, Any], result: MergeResult) -> SettingResult:
    """Return the row of a setting."""
    effects = result.effects
    figures: dict[str, Any] = {}
    if effects:
        looked_at = max(1, effects.looked_at)
        for name in ("changed", "conflict", "cancellation"):
            total = sum(getattr(each, name) * each.looked_at for each in effects.parameters)
            figures[name] = float(f"{total / looked_at:.6g}")
        figures["norm"] = effects.norm
    return SettingResult(
        setting=setting,
        values=dict(values),
        output=result.output,
        run_id=result.run_id,
        num_models=len(result.provenance.models) if result.provenance else 0,
        bytes_written=sum(file.size for file in result.files),
        truncation=result.truncation.relative_error if result.truncation else None,
        reused=result.reused,
        warnings=result.warnings,
        **figures,
    )


def write(stores: Stores, folder: str, result: SweepResult) -> SweepResult:
    """Write the table into a folder, and return the result with the files' URIs."""
    contents = {"csv": _csv(result).encode()}
    if importlib.util.find_spec("pyarrow"):
        contents["parquet"] = _parquet(result)
    uris = [join(folder, f"{NAME}.{ending}") for ending in (*contents, "json")]
    result = result.model_copy(update={"table_files": uris})
    contents["json"] = (result.model_dump_json(indent=2) + "\n").encode()
    for uri, data in zip(uris, contents.values(), strict=True):
        stores.writer(folder).put(uri, data)
    return result


def with_kept_scores(stores: Stores, folder: str, result: SweepResult) -> SweepResult:
    """Return results with the scores that the table in the folder has of the same merges.

    A table that can't be read is replaced; each score lies beside its output as well.
    """
    try:
        before = find(stores, folder)
    except InputError:
        before = None
    scores = {row.run_id: row.scores for row in before.rows} if before else {}
    rows = [row.model_copy(update={"scores": scores.get(row.run_id, {})}) for row in result.rows]
    return result.model_copy(update={"rows": rows})


def find(stores: Stores, folder: str) -> SweepResult | None:
    """Return the results of a sweep in a folder; None where there are none."""
    uri = join(folder, f"{NAME}.json")
    try:
        return documents.read(stores.of(folder), uri, SWEEP_RESULT, LARGE, "the results of a sweep", "sweep again")[1]
    except FileNotFoundError:
        return None


def read(stores: Stores, folder: str) -> SweepResult:
    """Return the results of a sweep in a folder. Raises `InputError` where there are none."""
    if result := find(stores, folder):
        return result
    remedy = "give the output of a search, or the folder above a sweep's outputs: what stands before {setting}"
    raise InputError(Problem(folder, "holds no results of a sweep or a search", remedy))


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _csv(result: SweepResult) -> str:
    rows, text = result.table(), io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _parquet(result: SweepResult) -> bytes:
    import pyarrow
    from pyarrow import json as reading
    from pyarrow import parquet

    rows = result.table()
    names = _columns(rows)
    columns = {name: {type(row[name]) for row in rows if row.get(name) is not None} for name in names}
    kinds = {name: _KINDS.get(frozenset(types), "string") for name, types in columns.items()}
    lines = (
        {name: str(value) if kinds[name] == "string" else value for name, value in row.items() if value is not None}
        for row in rows
    )
    # pyarrow imports pandas to take Python's lists, and nothing to read JSON
    text = "\n".join(json.dumps(line) for line in lines)
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in kinds.items()])
    options = reading.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    buffer = io.BytesIO()
    parquet.write_table(reading.read_json(io.BytesIO(text.encode()), parse_options=options), buffer)
    return buffer.getvalue()


_KINDS = {
    frozenset({bool}): "bool",
    frozenset({int}): "int64",
    frozenset({float}): "float64",
    frozenset({int, float}): "float64",
}
"""A column's type by the types of its values. A place may hold numbers in one setting, and a text in another."""
