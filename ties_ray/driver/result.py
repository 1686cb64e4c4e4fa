"""Makes the result of a merge: it publishes weights and documents, and fills in the result record."""

import functools
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ties_ray import runtime
from ties_ray.driver.meters import Foreseen, Meters
from ties_ray.driver.publish import (
    as_loaded,
    complete_uploads,
    demand_no_foreign,
    publish_documents,
    publish_result,
    read_documents,
)
from ties_ray.driver.run import MergeRun
from ties_ray.inputs.catalog import Model
from ties_ray.libraries.loaders import opened_by
from ties_ray.outputs import Output
from ties_ray.planning.plan import Plan
from ties_ray.reports.effects import effects_of
from ties_ray.reports.records import InputProvenance, MergeResult, Provenance
from ties_ray.rounds import Record
from ties_ray.rounds.condense import Truncation
from ties_ray.rounds.merge import Written
from ties_ray.state.manifest import Manifest
from ties_ray.stores import Stores

MOST_ERROR = 0.1
"""The largest relative error of an adapter without a warning: what `rank: auto` leaves by default."""


def publish(
    run: MergeRun, meters: Meters, stores: Stores, manifest: Manifest, check: Callable[[], None],
    *, started: float,
) -> MergeResult:  # fmt: skip
    """Complete the uploads and write everything else; return the result record, which is written last.

    check: raises if another run holds the output. It is called before anything becomes visible. started: when the call
    began, by the monotonic clock. The same command mends a call that dies anywhere.
    """
    plan = run.plan
    meters.tell("publish", of=1, activity="publishing")
    records = run.records()
    written: list[Written] = [part for record in records for part in record.finding.written]
    documents = read_documents(plan, stores)
    demand_no_foreign(plan, stores, documents)
    files = complete_uploads(plan, stores, run.uploads.ids, written, check)
    run.uploads.abort_others()  # a request to begin one may come late
    folder = as_loaded(plan, documents)
    opener = opened_by(folder, plan.library.name) or plan.library.opened_by
    local = plan.output.rpartition("/")[2] if "://" in plan.output else plan.output
    result = MergeResult(
        status="done",
        run_id=plan.run_id,
        resumed=run.resumed,
        output=plan.output,
        opened_by=opener.replace("{output}", json.dumps(local, ensure_ascii=False)[1:-1]),
        download_command=stores.of(plan.output).download_command(plan.output, local),
        files=files,
        **_work_done(run, meters),
        **_findings(run, records),
        waiting=list(plan.catalog.waiting),
        refused={model.uri: [str(problem) for problem in model.problems] for model in plan.catalog.refused},
        notes=[*plan.notes, *(note for store in stores.opened() for note in store.notes)],
        provenance=provenance(plan),
        found_by=plan.recipe.found_by,
    )
    result = result.model_copy(update={"warnings": list(_warnings(result.truncation, plan.recipe.output))})
    check()
    written_documents = publish_documents(plan, stores, documents, result)
    seconds = round(runtime.monotonic() - started, 3)
    predicted = predicted_seconds(meters.first, started, seconds)
    result = result.model_copy(
        update={"documents": written_documents, "seconds": seconds, "predicted_seconds": predicted}
    )
    check()
    publish_result(plan, stores, result)
    if plan.bytes_of_scratch:
        manifest.delete_scratch()
    meters.tell("publish", done=1, of=1, activity="publishing")
    return result


def _warnings(truncation: Truncation | None, output: Output) -> Iterator[str]:
    """Yield that the rank loses much, and what to do."""
    if truncation is None or truncation.relative_error <= MOST_ERROR:
        return
    loss = f"rank {truncation.rank} loses {truncation.relative_error:.0%} of the merge's norm"
    if getattr(output, "max_rank", None) == truncation.rank:
        yield f"{loss}, and output.max_rank allows no more: raise it, or write kind: checkpoint, which loses nothing"
    else:
        yield f"{loss}: output.rank: auto takes the smallest rank that loses at most {MOST_ERROR:.0%}"


def predicted_seconds(first: Foreseen | None, started: float, seconds: float) -> float | None:
    """Return the predicted duration; None where it was wrong by more than a factor of two, or was made late."""
    if first is None or first.at - started > seconds / 2:
        return None
    predicted = round(first.end - started, 3)
    return predicted if seconds / 2 <= predicted <= seconds * 2 else None


def _work_done(run: MergeRun, meters: Meters) -> dict[str, Any]:
    """Return the record's fields about the cost of the merge."""
    return {
        "shards": run.plan.num_shards,
        "shards_done_before": run.shards_done_before,
        "shards_again": meters.shards_again,
        "workers_lost": meters.places.losses,
        "worker_seconds": meters.split_seconds(),
        **meters.traffic._asdict(),
    }


def _findings(run: MergeRun, records: Sequence[Record[Any]]) -> dict[str, Any]:
    """Return the record's fields about the findings of the rounds."""
    merge, fields = run.merge, dict[str, Any]()
    zeroed: dict[str, int] = {}
    all_zeroed = [zero for record in records for zero in record.zeroed]
    effects = [shard for record in records for shard in record.effects]
    for index in range(len(merge.rounds)):
        kind = merge.kind(index)
        if kind.folded is None:
            continue
        folded = run.barrier(index)
        if kind.final:
            all_zeroed += [zero for group in folded.values() for zero in group.zeroed]
            effects += [shard for group in folded.values() for shard in group.effects]
        findings = {group: each.finding for group, each in folded.items()}
        for name, value in kind.report(merge, index, findings).items():
            before = fields.get(name)
            fields[name] = before | value if isinstance(before, dict) else value
    for member, parameter, count in all_zeroed:
        key = f"{merge.members[member].id}: {parameter}"
        zeroed[key] = zeroed.get(key, 0) + count
    return {**fields, "zeroed": zeroed, "effects": effects_of(merge, effects)}


def provenance(plan: Plan) -> Provenance:
    """Return the inputs of a result, and the versions that have made it."""
    return Provenance(
        ties_ray=_installed("ties-ray"),
        python=platform.python_version(),
        torch=_installed("torch"),
        numba=_installed("numba"),
        ray=_installed("ray"),
        arithmetic=plan.arithmetic,
        method=plan.recipe.method.model_dump(mode="json"),
        base=_input(plan.catalog.base),
        models=[_input(each) for model in plan.catalog.models for each in model.inputs],
    )


def _input(model: Model) -> InputProvenance:
    return InputProvenance(
        id=model.id,
        uri=model.uri,
        weight=model.weight,
        density=model.density,
        licence=model.licence,
        objects=[(pin.uri, pin.size, pin.etag, pin.version) for pin in model.objects],
        account=model.account,
    )


@functools.cache
def _installed(package: str) -> str:
    """Return the version of a package. The answer is kept: a sweep asks once a setting."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "nothing"  # `local` needs no Ray
