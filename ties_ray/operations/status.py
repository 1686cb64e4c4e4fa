"""The status of an output folder: a finished merge, or unfinished ones and how far they are."""

from ties_ray.errors import InputError
from ties_ray.reports.records import MergeResult, Report, find_result
from ties_ray.rounds import Merge
from ties_ray.state import documents, lease
from ties_ray.state.lease import Holder
from ties_ray.state.manifest import FOLDER, Manifest, find_runs
from ties_ray.stores import Stores, within

SHOWN = 5
"""Unfinished shards that are named."""


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
    stopped_in: str = ""
    """The round that is not whole; empty where all are, or where no plan is stored."""
    open_shards: list[int] = []
    """Its first shards that are in no record, `SHOWN` at most."""
    last_record: float | None = None
    """When its last record was written, in seconds since 1970 by the store's clock; None where none was."""
    bytes_done: int = 0
    """Bytes of inputs that finished shards have read; the same command does not read them again."""
    bytes_planned: int = 0
    """Bytes of inputs that the whole run reads."""
    uploads: list[str] = []
    """Weight files whose upload has begun."""
    problem: str = ""
    """Why the plan or the manifest of the run can't be read; empty if they can."""


class Status(Report):
    """The content of an output folder."""

    output: str
    holder: Holder | None
    """Holder of the output's lease: a merge at work, or one that was killed."""
    is_gone: bool = False
    """True: the holder was a process of this machine, and has ended."""
    last_sign: float | None = None
    """When the holder last gave a sign of life, in seconds since 1970 by the store's clock; None without a holder."""
    result: MergeResult | None
    runs: list[RunStatus]


def status(stores: Stores, output: str) -> Status:
    """Return what the folder holds; read the manifests, one request a record."""
    runs = [_run(stores, output, run_id, generation) for run_id, generation in find_runs(stores, output)]
    holder = _holder(stores, output)
    return Status(
        output=output,
        holder=holder,
        is_gone=holder is not None and lease.is_gone(holder),
        last_sign=stores.of(output).newest(within(output, FOLDER)) if holder else None,
        result=find_result(stores, output),
        runs=runs,
    )


def _holder(stores: Stores, output: str) -> Holder | None:
    uri = within(output, f"{FOLDER}/{lease.NAME}")
    try:
        return documents.read(stores.of(output), uri, lease.HOLDER, documents.SMALL, "the lease", "")[1]
    except (FileNotFoundError, InputError):
        return None


def _run(stores: Stores, output: str, run_id: str, generation: int) -> RunStatus:
    manifest = Manifest(stores, Manifest.folder_of(output, run_id, generation))
    try:
        uploads = list(manifest.read_uploads())
        plan = manifest.read_last_plan()
        if plan is None:
            return RunStatus(run_id=run_id, generation=generation, uploads=uploads)
        merge = plan.merges[0]
        missing = [_missing(manifest, merge, index) for index in range(len(merge.rounds))]
        at = next((index for index, shards in enumerate(missing) if shards), None)
        done = [
            1 - len(shards) / max(1, round_.num_shards) for shards, round_ in zip(missing, merge.rounds, strict=True)
        ]
        return RunStatus(
            run_id=run_id,
            generation=generation,
            uploads=uploads,
            rounds=[
                RoundStatus(name=round_.name, shards=round_.num_shards, done=round_.num_shards - len(shards))
                for round_, shards in zip(merge.rounds, missing, strict=True)
            ],
            stopped_in="" if at is None else merge.rounds[at].name,
            open_shards=[] if at is None else missing[at][:SHOWN],
            last_record=max(filter(None, map(manifest.last_record, range(len(merge.rounds)))), default=None),
            bytes_done=sum(int(share * round_.bytes_read) for share, round_ in zip(done, merge.rounds, strict=True)),
            bytes_planned=plan.bytes_read,
        )
    except InputError as error:
        return RunStatus(run_id=run_id, generation=generation, problem=str(error))


def _missing(manifest: Manifest, merge: Merge, index: int) -> list[int]:
    """Return the shards of a round that are in no record; none once its barrier is passed."""
    kind, round_ = merge.kind(index), merge.rounds[index]
    if kind.folded is not None and manifest.num_folded(index) >= kind.num_groups(merge):
        return []
    records = manifest.read_records(merge, index, manifest.record_names(index))
    done = {shard for record in records for shard in record.shards}
    return [shard for shard in range(round_.num_shards) if shard not in done]
