"""What lies in an output folder: a finished merge, or unfinished ones and how far they are."""

from pydantic import BaseModel, ConfigDict

from ties_ray.manifest import Manifest, find_runs
from ties_ray.plan import PlannedRound
from ties_ray.report import MergeResult, find_result
from ties_ray.stores import Stores


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoundStatus(_Record):
    """How far one round is."""

    name: str
    shards: int
    done: int
    """Shards that are recorded; all of them once the round's barrier is behind."""


class RunStatus(_Record):
    """One generation of one run."""

    run_id: str
    generation: int
    rounds: list[RoundStatus] = []
    """Empty where no plan is stored."""
    uploads: list[str] = []
    """Weight files whose upload was begun."""


class Status(_Record):
    """What an output folder holds."""

    output: str
    result: MergeResult | None
    runs: list[RunStatus]


def status(stores: Stores, output: str) -> Status:
    """Return what the folder holds; reads the manifest, one request a record."""
    runs = [_run(stores, output, run_id, generation) for run_id, generation in find_runs(stores, output)]
    return Status(output=output, result=find_result(stores, output), runs=runs)


def _run(stores: Stores, output: str, run_id: str, generation: int) -> RunStatus:
    manifest = Manifest(stores, Manifest.folder_of(output, run_id, generation))
    plan = manifest.read_plan()
    rounds = plan.result.rounds if plan else ()
    return RunStatus(
        run_id=run_id,
        generation=generation,
        rounds=[_round(manifest, index, round_) for index, round_ in enumerate(rounds)],
        uploads=list(manifest.read_uploads()),
    )


def _round(manifest: Manifest, index: int, round_: PlannedRound) -> RoundStatus:
    records = (manifest.read_record(index, name) for name in manifest.record_names(index))
    done = {shard for record in records for shard in record.shards}
    return RoundStatus(name=round_.name, shards=round_.num_shards, done=len(done))
