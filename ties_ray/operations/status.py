"""The status of an output folder: a finished merge, or unfinished ones and how far they are."""

from ties_ray.errors import InputError
from ties_ray.planning.plan import Plan
from ties_ray.reports.records import MergeResult, Report, find_result
from ties_ray.rounds import PlannedRound
from ties_ray.state import documents, lease
from ties_ray.state.lease import Holder
from ties_ray.state.manifest import FOLDER, Manifest, find_runs
from ties_ray.stores import Stores, within


class RoundStatus(Report):
    """How far one round is."""

    name: str
    shards: int
    done: int
    """Shards in durable records; all of them once the round's barrier is passed."""


class RunStatus(Report):
    """One generation of one run."""

    run_id: str
    generation: int
    rounds: list[RoundStatus] = []
    """Empty where no plan is stored."""
    uploads: list[str] = []
    """Weight files whose upload has begun."""
    problem: str = ""
    """Why the plan or the manifest of the run can't be read; empty if they can."""


class Status(Report):
    """The content of an output folder."""

    output: str
    holder: Holder | None
    """Holder of the output's lease: a merge at work, or a merge that was killed less than a minute ago."""
    result: MergeResult | None
    runs: list[RunStatus]


def status(stores: Stores, output: str) -> Status:
    """Return what the folder holds; read the manifests, one request a record."""
    runs = [_run(stores, output, run_id, generation) for run_id, generation in find_runs(stores, output)]
    return Status(output=output, holder=_holder(stores, output), result=find_result(stores, output), runs=runs)


def _holder(stores: Stores, output: str) -> Holder | None:
    uri = within(output, f"{FOLDER}/{lease.NAME}")
    try:
        return documents.read(stores.of(output), uri, lease.HOLDER, documents.SMALL, "the lease", "")[1]
    except (FileNotFoundError, InputError):
        return None


def _run(stores: Stores, output: str, run_id: str, generation: int) -> RunStatus:
    manifest = Manifest(stores, Manifest.folder_of(output, run_id, generation))
    uploads: list[str] = []
    rounds: list[RoundStatus] = []
    problem = ""
    try:
        uploads = list(manifest.read_uploads())
        plan = manifest.read_last_plan()
        planned = enumerate(plan.merges[0].rounds) if plan else ()
        rounds = [_round(manifest, plan, index, round_) for index, round_ in planned if plan]
    except InputError as error:
        problem = str(error)
    return RunStatus(run_id=run_id, generation=generation, rounds=rounds, uploads=uploads, problem=problem)


def _round(manifest: Manifest, plan: Plan, index: int, round_: PlannedRound) -> RoundStatus:
    records = manifest.read_records(plan.merges[0], index, manifest.record_names(index))
    done = {shard for record in records for shard in record.shards}
    return RoundStatus(name=round_.name, shards=round_.num_shards, done=len(done))
