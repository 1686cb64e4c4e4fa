"""What has been done, durable, beside the output: `<output>/.ties-ray/<run_id>/<generation>/`.

    run.json            what a call must share with this run to continue it; no more is taken from storage
    plan.json.gz        the plan, for workers, `status` and `verify`; plan-<n>.json.gz its revisions
    uploads.json        upload id of each weight file
    records/<round>/    what workers have finished, one object a batch, written after the data is durable
    folded/<round>/     what a barrier made of the records: thresholds, a method's statistics
    scratch/<name>      condensed matrices, until they are assembled
    seen/<shard>.json   checksums of what the first round has read, which later rounds must read again

Losing a record costs a redo, never a byte.
"""

import functools
import gzip
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ties_ray import rounds
from ties_ray.errors import InputError, Problem
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.outputs import PartSize
from ties_ray.planning.plan import PLAN_FORM, Plan
from ties_ray.rounds import Folded, Merge, Record, Zeroed
from ties_ray.state import documents
from ties_ray.state.documents import LARGE, PLAN, SMALL, Bounds
from ties_ray.stores import Stores, WritableStore, crc32c, join, within

T = TypeVar("T")

FOLDER = ".ties-ray"
"""Name of the manifest's folder in an output."""
THREADS = 16
"""Requests in flight; what is waited for is the storage's latency."""
SCRATCH_LIMIT = 2**36
"""Bytes: nor any scratch; it is as large as the two factors of the largest matrix."""


class Seen(NamedTuple):
    """The bytes [start, stop) of an object when they were first read."""

    uri: str
    start: int
    stop: int
    sums: str
    """base64 of little-endian uint32: the CRC32C of each piece, cut as `transfer.Ledger` says."""


class Start(BaseModel):
    """What a run began with: a call that differs in it can't continue the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2] = 2
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    """Digest of what the records rest on (`Plan.digest`)."""
    part_size: PartSize = None
    """The recipe's `output.part_size` when the run began."""
    sizes: Sizes = SIZES
    """How the run was cut. Parts and shards follow from it, though no byte of the result does."""


_START = TypeAdapter(Start)
_UPLOADS = TypeAdapter(dict[str, Annotated[str, Field(max_length=2**12)]])
_SEEN = TypeAdapter(tuple[Seen, ...])
_PLAN_NAME = re.compile(r"plan-([1-9][0-9]{0,3})\.json\.gz")
_RECORD_NAME = re.compile(r"([0-9]{8}-[0-9a-f]{12}-[0-9]{6}|known-[0-9]{1,9})\.json")
FRESH = "merge again with --fresh"


class Manifest:
    """One generation of one run."""

    def __init__(self, stores: Stores, folder: str) -> None:
        """`folder` is the URI of the generation's folder."""
        self.folder = folder
        self._stores = stores
        self._store = stores.of(folder)

    @property
    def _writer(self) -> WritableStore:
        return self._stores.writer(self.folder)

    @staticmethod
    def folder_of(output: str, run_id: str, generation: int = 1) -> str:
        """Return the URI of a generation's folder."""
        return join(join(join(output, FOLDER), run_id), str(generation))

    def write_start(self, start: Start) -> None:
        """Store what the run begins with; its presence makes the run one that can be continued."""
        self._writer.put(join(self.folder, "run.json"), _START.dump_json(start))

    def read_start(self) -> Start | None:
        """Return what the run began with, None where that is not there."""
        return self._get("run.json", _START, SMALL, "what a run began with")

    def write_plan(self, plan: Plan) -> str:
        """Store a revision of the plan; return the SHA-256 by which `read_plan` knows it again."""
        data = gzip.compress(plan.to_json(), 1, mtime=0)
        self._writer.put(join(self.folder, _plan_name(plan.revision)), data)
        return hashlib.sha256(data).hexdigest()

    def read_plan(self, revision: int = 0, digest: str | None = None) -> Plan | None:
        """Return a revision of the stored plan, None where it is not there.

        digest: of the one that is meant. Raises `InputError` where another lies there, or one of another version of
        ties_ray, or of a plugin that this process lacks. Without a digest the plan is somebody's claim: nothing may be
        read, written or deleted because it says so.
        """
        uri = join(self.folder, _plan_name(revision))
        try:
            _, data = self._store.get(uri, PLAN.stored)
        except FileNotFoundError:
            return None
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            what = "another plan lies there than the one that this merge has written"
            raise InputError(Problem(uri, what, f"find out who else writes to the output, then {FRESH}"))
        remedy = "use the version and the plugins that made it, or delete the folder"
        return documents.parse(data, PLAN_FORM, PLAN, self.folder, "the stored plan", remedy)

    def read_last_plan(self) -> Plan | None:
        """Return the last revision of the stored plan, as barriers left it; None where there is none."""
        names = (pin.uri.rpartition("/")[2] for pin in self._store.list(self.folder).files)
        revisions = [int(found[1]) for name in names if (found := _PLAN_NAME.fullmatch(name))]
        return self.read_plan(max(revisions, default=0))

    def write_uploads(self, uploads: dict[str, str]) -> None:
        """Store the upload id of each weight file."""
        self._writer.put(join(self.folder, "uploads.json"), _UPLOADS.dump_json(uploads))

    def read_uploads(self) -> dict[str, str]:
        """Return the upload ids by file name; empty where none were begun."""
        return self._get("uploads.json", _UPLOADS, SMALL, "the ids of uploads") or {}

    def write_record(self, merge: Merge, name: str, record: Record[Any]) -> None:
        """Store one batch; `name` is unique among all workers of all attempts."""
        data = _record_form(merge.rounds[record.round].kind).dump_json(record)
        self._writer.put(join(self._records(record.round), name), data)

    def record_names(self, round_: int) -> list[str]:
        """Return the names of a round's records, sorted; what else lies there is not ours."""
        names = (pin.uri.rpartition("/")[2] for pin in self._store.list(self._records(round_)).files)
        return [name for name in names if _RECORD_NAME.fullmatch(name)]

    def read_record(self, merge: Merge, round_: int, name: str) -> Record[Any]:
        """Return one record. Raises `InputError` where it is gone, or is not of this merge."""
        uri, form = join(self._records(round_), name), _record_form(merge.rounds[round_].kind)
        try:
            record = documents.read(self._store, uri, form, LARGE, "a record of this merge", FRESH)[1]
        except FileNotFoundError as error:
            raise InputError(Problem(uri, "the record has gone", "run the same command again")) from error
        _demand_fit(misfit(record, merge, round_), uri)
        return record

    def read_records(self, merge: Merge, round_: int, names: Iterable[str]) -> Iterator[Record[Any]]:
        """Yield some records of a round, in that order; of thousands, many are asked for and few held at a time."""
        remaining = iter(names)
        with ThreadPoolExecutor(THREADS) as threads:
            while batch := list(itertools.islice(remaining, 2 * THREADS)):
                yield from threads.map(partial(self.read_record, merge, round_), batch)

    def write_folded(self, merge: Merge, round_: int, group: int, folded: Folded[Any]) -> None:
        """Store what the barrier after a round finds of a group."""
        data = _folded_form(merge.rounds[round_].kind).dump_json(folded)
        self._writer.put(within(self.folder, f"folded/{round_}/{group}.json"), data)

    def read_folded(self, merge: Merge, round_: int, groups: Iterable[int]) -> dict[int, Folded[Any]]:
        """Return what the barrier after a round has found, by group; groups not folded yet are missing."""
        form, stored = _folded_form(merge.rounds[round_].kind), {}
        for group in groups:
            name = f"folded/{round_}/{group}.json"
            folded = self._get(name, form, LARGE, "what a barrier has stored")
            if folded is not None:
                _demand_fit(misfit_folded(folded, merge, round_), within(self.folder, name))
                stored[group] = folded
        return stored

    def write_seen(self, shard: int, seen: Sequence[Seen]) -> None:
        """Store what a shard of the first round has read."""
        self._writer.put(within(self.folder, f"seen/{shard}.json"), _SEEN.dump_json(tuple(seen)))

    def read_seen(self, shard: int) -> tuple[Seen, ...]:
        """Return what a shard of the first round has read; nothing if it is not done yet."""
        return self._get(f"seen/{shard}.json", _SEEN, LARGE, "the checksums of what was read") or ()

    def write_scratch(self, parameter: int, data: memoryview) -> str:
        """Store the condensed matrix of a parameter; return its CRC32C."""
        self._writer.put(self._scratch(parameter), bytes(data))
        return crc32c(data)

    def read_scratch(self, parameter: int, crc: str) -> bytes:
        """Return a condensed matrix. Raises `InputError` where it is not what was written."""
        uri = self._scratch(parameter)
        try:
            data = self._store.get(uri, SCRATCH_LIMIT)[1]
        except FileNotFoundError as error:
            raise InputError(Problem(uri, "scratch of this merge has gone", "merge again with --fresh")) from error
        if crc32c(memoryview(data)) != crc:
            raise InputError(Problem(uri, "scratch is not what was written", "merge again with --fresh"))
        return data

    def delete_scratch(self) -> None:
        """Remove all scratch; nothing needs it once the result is there."""
        self._writer.delete_folder(join(self.folder, "scratch"))

    def _scratch(self, parameter: int) -> str:
        return within(self.folder, f"scratch/{parameter}")

    def _records(self, round_: int) -> str:
        return within(self.folder, f"records/{round_}")

    def _get(self, name: str, adapter: TypeAdapter[T], bounds: Bounds, what: str) -> T | None:
        try:
            return documents.read(self._store, within(self.folder, name), adapter, bounds, what, FRESH)[1]
        except FileNotFoundError:
            return None


def _plan_name(revision: int) -> str:
    return f"plan-{revision}.json.gz" if revision else "plan.json.gz"


def misfit(record: Record[Any], merge: Merge, round_: int) -> list[str]:
    """Return what in a record can't be of this merge: numbers lead into lists and files, so all must be in range."""
    kind = merge.kind(round_)
    wrong = [] if record.round == round_ else ["the round"]
    if not set(record.shards) <= set(kind.shards(merge, round_)):
        wrong.append("a shard")
    return [*wrong, *_misfit_zeroed(record.zeroed, merge), *kind.misfit(merge, round_, record.finding)]


def misfit_folded(folded: Folded[Any], merge: Merge, round_: int) -> list[str]:
    """Return what can't be of this merge in what a barrier has stored."""
    of_kind = merge.kind(round_).misfit_folded(merge, round_, folded.finding)
    return [*_misfit_zeroed(folded.zeroed, merge), *of_kind]


def _misfit_zeroed(zeroed: Iterable[Zeroed], merge: Merge) -> Iterator[str]:
    for member, parameter, _ in zeroed:
        if member not in range(len(merge.members)):
            yield "a model"
        if parameter not in merge.layout.by_name:
            yield "a zeroed parameter"


def _demand_fit(wrong: list[str], uri: str) -> None:
    if wrong:
        what = "; ".join(f"{name} is out of range" for name in dict.fromkeys(wrong))
        raise InputError(Problem(uri, f"is not of this merge: {what}", FRESH))


@functools.cache
def _record_form(kind: str) -> TypeAdapter[Record[Any]]:
    return TypeAdapter(cast(Any, Record)[rounds.load(kind).finding])


@functools.cache
def _folded_form(kind: str) -> TypeAdapter[Folded[Any]]:
    return TypeAdapter(cast(Any, Folded)[rounds.load(kind).folded])


_RUN_ID, _GENERATION = re.compile("[0-9a-f]{16}"), re.compile("[1-9][0-9]{0,8}")


def find_runs(stores: Stores, output: str) -> list[tuple[str, int]]:
    """Return (run_id, generation) of what the output's manifest folder holds, sorted.

    What has another name there is not ours, whoever put it there: nobody reads or removes it.
    """
    store = stores.of(output)
    folders = [uri for uri in store.list(join(output, FOLDER)).folders if _RUN_ID.fullmatch(uri.rpartition("/")[2])]
    return sorted(
        (folder.rpartition("/")[2], int(name))
        for folder in folders
        for generation in store.list(folder).folders
        if _GENERATION.fullmatch(name := generation.rpartition("/")[2])
    )
