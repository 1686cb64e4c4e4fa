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

import gzip
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ties_ray.errors import InputError, Problem
from ties_ray.kernels import BINS
from ties_ray.outputs import CondensingOutput, PartSize
from ties_ray.planning.plan import PLAN_FORM, Plan
from ties_ray.rounds.kth_largest import WHOLE, Counts, Pick
from ties_ray.state import documents
from ties_ray.state.documents import LARGE, PLAN, SMALL, Bounds
from ties_ray.stores import Part, Stores, WritableStore, crc32c, join, within

T = TypeVar("T")
D = TypeVar("D", "Record", "Folded")

FOLDER = ".ties-ray"
"""Name of the manifest's folder in an output."""
THREADS = 16
"""Requests in flight; what is waited for is the storage's latency."""
SCRATCH_LIMIT = 2**36
"""Bytes: nor any scratch; it is as large as the two factors of the largest matrix."""


class Written(NamedTuple):
    """One part of a weight file, durable."""

    file: int
    """Index into the result's files."""
    part: Part
    crc32c: str
    """Of the bytes as the worker had them, 8 hex digits: whatever the store's own mark is."""


class Matrix(NamedTuple):
    """One matrix that was condensed into scratch."""

    parameter: int
    """Index into the catalog's parameters."""
    crc32c: str
    """Of its scratch, 8 hex digits."""
    norm2: float
    """Squared Frobenius norm of the merged matrix..."""
    errors2: dict[int, float]
    """...and of the error, by rank."""


class Survey(NamedTuple):
    """What the factors of one model are, before anything is merged."""

    member: int
    norm2: float
    """Squared Frobenius norm of its low-rank changes."""
    not_finite: int
    """Elements of its factors that are NaN or Inf."""


@dataclass(frozen=True)
class Record:
    """One batch of a worker: shards of one round, finished."""

    round: int
    shards: tuple[int, ...]
    parts: tuple[Written, ...] = ()
    """What the shards wrote..."""
    uploads: tuple[tuple[int, str], ...] = ()
    """...and into which upload of each file: one that the store has forgotten takes its parts with it."""
    counts: tuple[Counts, ...] = ()
    statistics: dict[str, int] = field(default_factory=dict)
    zeroed: tuple[tuple[int, str, int], ...] = ()
    """(member, parameter, values) that were not finite and counted as zero, because the recipe allows it."""
    matrices: tuple[Matrix, ...] = ()
    surveys: tuple[Survey, ...] = ()


@dataclass(frozen=True)
class Folded:
    """What a barrier knows: of one group of models (thresholds) or of all (a method's statistics, matrices)."""

    picks: tuple[Pick, ...] = ()
    statistics: dict[str, int] = field(default_factory=dict)
    surveys: tuple[Survey, ...] = ()
    matrices: tuple[Matrix, ...] = ()
    """In the order of their parameters."""
    zeroed: tuple[tuple[int, str, int], ...] = ()
    """As in the records, of the round that condenses."""


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

    schema_version: Literal[1] = 1
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    """Of what the records rest on (`Plan.digest`)."""
    part_size: PartSize = None
    """The recipe's when the run began: parts and shards are cut by it, though they change no byte."""


_START = TypeAdapter(Start)
_UPLOADS = TypeAdapter(dict[str, Annotated[str, Field(max_length=2**12)]])
_RECORD = TypeAdapter(Record)
_SEEN = TypeAdapter(tuple[Seen, ...])
_FOLDED = TypeAdapter(Folded)
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

    def write_record(self, name: str, record: Record) -> None:
        """Store one batch; `name` is unique among all workers of all attempts."""
        self._writer.put(join(self._records(record.round), name), _RECORD.dump_json(record))

    def record_names(self, round_: int) -> list[str]:
        """Return the names of a round's records, sorted; what else lies there is not ours."""
        names = (pin.uri.rpartition("/")[2] for pin in self._store.list(self._records(round_)).files)
        return [name for name in names if _RECORD_NAME.fullmatch(name)]

    def read_record(self, round_: int, plan: Plan, name: str) -> Record:
        """Return one record; raise `InputError` where it is gone, or is not of this plan."""
        uri = join(self._records(round_), name)
        try:
            record = documents.read(self._store, uri, _RECORD, LARGE, "a record of this merge", FRESH)[1]
        except FileNotFoundError as error:
            raise InputError(Problem(uri, "the record has gone", "run the same command again")) from error
        return self._fitting(record, plan, round_, uri)

    def read_records(self, round_: int, plan: Plan, names: Iterable[str]) -> Iterator[Record]:
        """Yield some records of a round, in that order; of thousands, many are asked for and few held at a time."""
        remaining = iter(names)
        with ThreadPoolExecutor(THREADS) as threads:
            while batch := list(itertools.islice(remaining, 2 * THREADS)):
                yield from threads.map(partial(self.read_record, round_, plan), batch)

    def write_folded(self, round_: int, group: int, folded: Folded) -> None:
        """Store what the barrier after a round knows of a group."""
        self._writer.put(within(self.folder, f"folded/{round_}/{group}.json"), _FOLDED.dump_json(folded))

    def read_folded(self, round_: int, plan: Plan, groups: Sequence[int]) -> dict[int, Folded]:
        """Return what is known after a round, by group; groups not folded yet are missing."""
        known = {}
        for group in groups:
            name = f"folded/{round_}/{group}.json"
            found = self._get(name, _FOLDED, LARGE, "what a barrier has stored")
            if found is not None:
                known[group] = self._fitting(found, plan, round_, within(self.folder, name))
        return known

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

    def read_scratch(self, matrix: Matrix) -> bytes:
        """Return a condensed matrix; raise `InputError` where it is not what was written."""
        uri = self._scratch(matrix.parameter)
        try:
            data = self._store.get(uri, SCRATCH_LIMIT)[1]
        except FileNotFoundError as error:
            raise InputError(Problem(uri, "scratch of this merge has gone", "merge again with --fresh")) from error
        if crc32c(memoryview(data)) != matrix.crc32c:
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

    def _fitting(self, found: D, plan: Plan, round_: int, uri: str) -> D:
        if why := misfit(found, plan, round_):
            raise InputError(Problem(uri, f"is not of this merge: {why}", FRESH))
        return found


def _plan_name(revision: int) -> str:
    return f"plan-{revision}.json.gz" if revision else "plan.json.gz"


def misfit(found: Record | Folded, plan: Plan, round_: int) -> str:
    """Return what in a record, or in what a barrier stored, can't be of this plan; empty where nothing is wrong.

    Numbers lead into lists and files, so all must be in range before anybody uses them.
    """
    members, parameters = range(len(plan.result.members)), range(len(plan.catalog.parameters))
    found_of = found.counts if isinstance(found, Record) else found.picks
    scopes = [(one.member, one.parameter) for one in found_of]
    output = plan.recipe.output
    ranks = set(output.ranks) if isinstance(output, CondensingOutput) else None
    wrong = {
        "a model": [one for one in (*scopes, *found.surveys, *found.zeroed) if one[0] not in members],
        "a parameter": [one for one in scopes if one[1] != WHOLE and one[1] not in parameters],
        "a matrix": [one for one in found.matrices if ranks is None or one.parameter not in parameters],
        "a norm": [
            norm2
            for norm2 in (*(one.norm2 for one in found.matrices), *(one.norm2 for one in found.surveys))
            if not _is_norm(norm2)
        ],
        "an error by rank": [
            one
            for one in found.matrices
            if not (one.errors2.keys() >= (ranks or set()) and all(map(_is_norm, one.errors2.values())))
        ],
        "a zeroed parameter": [one for one in found.zeroed if one[1] not in plan.layout.by_name],
    }
    if isinstance(found, Folded):
        wrong["a threshold"] = [one for one in found.picks if min(one[3:]) < 0 or one.bits >= 2**31]
        wrong["a bin"] = [one for one in found.picks if not -1 <= one.bin < BINS]
    else:
        wrong["the round"] = [found.round] * (found.round != round_)
        wrong["a shard"] = [one for one in found.shards if one not in _shards(plan, round_)]
        into = {file for file, _ in found.uploads}
        wrong["a weight file"] = [file for file in into if file not in range(len(plan.result.files))]
        wrong["a part"] = [one for one in found.parts if not (one.file in into and _is_part(one, plan))]
    return "; ".join(f"{name} is out of range" for name, some in wrong.items() if some)


def _shards(plan: Plan, round_: int) -> range:
    """Return the shards of a round; of low bits those of the high ones, whatever is left to count."""
    rounds = plan.result.rounds
    return range(rounds[round_ - (rounds[round_].kind == "count_low")].num_shards)


def _is_part(one: Written, plan: Plan) -> bool:
    if one.file not in range(len(plan.result.files)):
        return False
    if one.part.number not in range(1, plan.layout.num_parts(one.file) + 1):
        return False
    start, stop = plan.layout.part(one.file, one.part.number - 1)
    return one.part.size == stop - start and _CRC32C.fullmatch(one.crc32c) is not None


def _is_norm(value: float) -> bool:
    return math.isfinite(value) and value >= 0


_CRC32C = re.compile("[0-9a-f]{8}")
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
