"""What has been done, durable, beside the output: `<output>/.ties-ray/<run_id>/<generation>/`.

    run.json            what a call must share with this run to continue it
    plan.json.gz        the plan, for workers, `status` and `verify`; plan-<n>.json.gz is a revision
    lapack.json         how LAPACK computes on all workers, where a method or an output uses it
    uploads.json        the upload id of each weight file
    records/<round>/    what workers have finished, one object a batch, written after the data is durable
    folded/<round>/     the findings of a barrier: thresholds, a method's statistics
    scratch/<name>      condensed matrices, until they are assembled
    seen/<shard>.json   checksums of the bytes that the first round has read

A lost record costs work that is done again, never a byte of the result.
"""

import functools
import gzip
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ties_ray import rounds, runtime
from ties_ray.errors import InputError, InterruptedMerge, Problem
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.measures import positions
from ties_ray.measures.effects import Effects
from ties_ray.outputs import PartSize
from ties_ray.planning.plan import PLAN_FORM, Plan
from ties_ray.rounds import Folded, Merge, Record, Zeroed
from ties_ray.state import documents
from ties_ray.state.documents import LARGE, PLAN, SMALL, Bounds
from ties_ray.stores import Pin, Stores, WritableStore, crc32c, join, within

T = TypeVar("T")

FOLDER = ".ties-ray"
"""Name of the manifest's folder in an output."""
THREADS = 16
"""Requests in flight. They hide the latency of the storage."""
SCRATCH_LIMIT = 2**36
"""The most bytes of a scratch object, which holds the two factors of a matrix."""


class RangeChecksums(NamedTuple):
    """The checksums of bytes [start, stop) of an object when they were first read."""

    uri: str
    start: int
    stop: int
    crc32cs: str
    """The CRC32C of each piece (`worker.checksums.PIECE`), as base64 of little-endian uint32."""


class Start(BaseModel):
    """What a run began with. A call with another start can't continue the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2] = 2
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    """Digest of what the records rest on (`Plan.digest`)."""
    part_size: PartSize = None
    """The recipe's `output.part_size` when the run began."""
    sizes: Sizes = SIZES
    """How the run was cut. Parts and shards follow from it, though no byte of the result does."""


_START = TypeAdapter(Start)
_CODE_PATH = TypeAdapter(Annotated[str, Field(pattern="^[0-9a-f]{8}$")])
_UPLOADS = TypeAdapter(dict[str, Annotated[str, Field(max_length=2**12)]])
_CHECKSUMS = TypeAdapter(tuple[RangeChecksums, ...])
_PLAN_NAME = re.compile(r"plan-([1-9][0-9]{0,3})\.json\.gz")
_RECORD_NAME = re.compile(r"([0-9]{8}-[0-9a-f]{12}-[0-9]{6}|known-[0-9]{1,9})\.json")
FRESH = "merge again with --fresh"
_ANEW = "merge all models in one recipe, with `output.state: true`"


STATE = "state"
"""The folder of the state that later merges go on from."""


class Manifest:
    """One generation of one run."""

    def __init__(self, stores: Stores, folder: str) -> None:
        """folder: URI of the generation's folder."""
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
        """Store what the run begins with. A run without it can't be continued."""
        self._writer.put(join(self.folder, "run.json"), _START.dump_json(start))

    def read_start(self) -> Start | None:
        """Return what the run began with, None where it is not stored."""
        return self._get("run.json", _START, SMALL, "what a run began with")

    def write_plan(self, plan: Plan) -> str:
        """Store a revision of the plan; return its SHA-256, which `read_plan` demands."""
        data = gzip.compress(plan.to_json(), 1, mtime=0)
        self._writer.put(join(self.folder, _plan_name(plan.revision)), data)
        return hashlib.sha256(data).hexdigest()

    def read_plan(self, revision: int = 0, digest: str | None = None) -> Plan | None:
        """Return a revision of the stored plan, None where it is not stored.

        digest: SHA-256 of the expected plan. Without it the plan is a claim of whoever may write there: nothing may be
        read, written or deleted because of it. Raises `InterruptedMerge` where another plan lies there; the same
        command writes its own again. Raises `InputError` for a plan of another version, or of a missing plugin.
        """
        uri = join(self.folder, _plan_name(revision))
        try:
            _, data = self._store.get(uri, PLAN.stored)
        except FileNotFoundError:
            return None
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            problem = "another plan lies there than the one that this merge has written"
            raise InterruptedMerge(
                Problem(uri, problem, "run the same command again; if it comes back, find out who else writes there")
            )
        remedy = "use the version and the plugins that made it, or delete the folder"
        return documents.parse(data, PLAN_FORM, PLAN, self.folder, "the stored plan", remedy)

    def read_last_plan(self) -> Plan | None:
        """Return the last revision of the stored plan, None where there is none."""
        names = (pin.uri.rpartition("/")[2] for pin in self._store.list(self.folder).files)
        revisions = [int(match[1]) for name in names if (match := _PLAN_NAME.fullmatch(name))]
        return self.read_plan(max(revisions, default=0))

    def agree_on_lapack(self, code_path: str) -> str:
        """Return how LAPACK computes in this run (`kernels.linalg.code_path`): the first worker's word holds."""
        self._writer.swap(join(self.folder, "lapack.json"), _CODE_PATH.dump_json(code_path), "")
        return self.read_lapack() or code_path

    def read_lapack(self) -> str | None:
        """Return how LAPACK computes in this run, None where nothing says it."""
        return self._get("lapack.json", _CODE_PATH, SMALL, "how LAPACK computes")

    def write_uploads(self, uploads: dict[str, str]) -> None:
        """Store the upload id of each weight file."""
        self._writer.put(join(self.folder, "uploads.json"), _UPLOADS.dump_json(uploads))

    def read_uploads(self) -> dict[str, str]:
        """Return the upload ids by file name; empty where no upload has begun."""
        return self._get("uploads.json", _UPLOADS, SMALL, "the ids of uploads") or {}

    def write_record(self, merge: Merge, name: str, record: Record[Any]) -> None:
        """Store a record. name: unique among all workers of all attempts."""
        data = _record_form(merge.rounds[record.round].kind).dump_json(record)
        self._writer.put(join(self._records(record.round), name), data)

    def record_names(self, round_: int) -> list[str]:
        """Return the sorted names of a round's records; other files there are not ours."""
        names = (pin.uri.rpartition("/")[2] for pin in self._store.list(self._records(round_)).files)
        return [name for name in names if _RECORD_NAME.fullmatch(name)]

    def last_record(self, round_: int) -> float | None:
        """Return when a round's last record was written (seconds since 1970, by the store's clock), None without."""
        return self._store.newest(self._records(round_))

    def read_record(self, merge: Merge, round_: int, name: str) -> Record[Any]:
        """Return a record. Raises `InputError` where it is gone, or does not fit this merge."""
        uri, form = join(self._records(round_), name), _record_form(merge.rounds[round_].kind)
        try:
            record = documents.read(self._store, uri, form, LARGE, "a record of this merge", FRESH)[1]
        except FileNotFoundError as error:
            raise InputError(Problem(uri, "the record has gone", "run the same command again")) from error
        _demand_fit(misfit(record, merge, round_), uri)
        return record

    def read_records(self, merge: Merge, round_: int, names: Iterable[str]) -> Iterator[Record[Any]]:
        """Yield records of a round in the order of their names. Few are held at a time."""
        remaining = iter(names)
        with runtime.pool(THREADS) as threads:
            while batch := list(itertools.islice(remaining, 2 * THREADS)):
                yield from threads.map(partial(self.read_record, merge, round_), batch)

    def write_folded(self, merge: Merge, round_: int, group: int, folded: Folded[Any]) -> None:
        """Store the barrier's findings of a group after a round."""
        data = _folded_form(merge.rounds[round_].kind).dump_json(folded)
        self._writer.put(within(self.folder, f"folded/{round_}/{group}.json"), data)

    def read_folded(self, merge: Merge, round_: int, groups: Iterable[int]) -> dict[int, Folded[Any]]:
        """Return the barrier's findings after a round, by group. Groups that are not folded yet are missing."""
        form, stored = _folded_form(merge.rounds[round_].kind), {}
        for group in groups:
            name = f"folded/{round_}/{group}.json"
            folded = self._get(name, form, LARGE, "what a barrier has stored")
            if folded is not None:
                _demand_fit(misfit_folded(folded, merge, round_), within(self.folder, name))
                stored[group] = folded
        return stored

    def num_folded(self, round_: int) -> int:
        """Return for how many groups a barrier has stored what it found after a round."""
        return len(self._store.list(within(self.folder, f"folded/{round_}")).files)

    def read_of_earlier(self, merge: Merge, round_: int, pin: Pin) -> Any:
        """Return what the barrier of an earlier merge has found after the same round of the method.

        Raises `InputError` where it has changed since it was pinned.
        """
        form, kind = _folded_form(merge.rounds[round_].kind), merge.kind(round_)
        data = self._stores.of(pin.uri).get_pinned(pin)
        folded = documents.parse(data, form, LARGE, pin.uri, "what a barrier of the earlier merge has stored", _ANEW)
        if wrong := list(kind.misfit_folded(merge, round_, folded.finding)):
            raise InputError(Problem(pin.uri, f"is not of this merge: {wrong[0]} is out of range", _ANEW))
        return folded.finding

    def write_checksums(self, shard: int, checksums: Sequence[RangeChecksums]) -> None:
        """Store the checksums of what a shard of the first round has read."""
        self._writer.put(within(self.folder, f"seen/{shard}.json"), _CHECKSUMS.dump_json(tuple(checksums)))

    def read_checksums(self, shard: int) -> tuple[RangeChecksums, ...]:
        """Return the checksums of what a shard of the first round has read; empty until the shard is done."""
        return self._get(f"seen/{shard}.json", _CHECKSUMS, LARGE, "the checksums of what was read") or ()

    def write_state(self, name: str, data: bytes) -> None:
        """Store a file of the merge's state."""
        self._writer.put(within(self.folder, f"{STATE}/{name}"), data)

    def write_scratch(self, parameter: int, data: memoryview) -> str:
        """Store the condensed matrix of a parameter; return its CRC32C, 8 hex digits."""
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
        """Remove all scratch, which nothing needs once the result is published."""
        self._writer.delete_folder(join(self.folder, "scratch"))

    def _scratch(self, parameter: int) -> str:
        return within(self.folder, f"scratch/{parameter}")

    def _records(self, round_: int) -> str:
        return within(self.folder, f"records/{round_}")

    def _get(self, name: str, adapter: TypeAdapter[T], bounds: Bounds, title: str) -> T | None:
        try:
            return documents.read(self._store, within(self.folder, name), adapter, bounds, title, FRESH)[1]
        except FileNotFoundError:
            return None


def _plan_name(revision: int) -> str:
    return f"plan-{revision}.json.gz" if revision else "plan.json.gz"


def misfit(record: Record[Any], merge: Merge, round_: int) -> list[str]:
    """Return the parts of a record that don't fit this merge. Numbers lead into lists, so all must be in range."""
    kind = merge.kind(round_)
    wrong = [] if record.round == round_ else ["the round"]
    if not set(record.shards) <= set(kind.shards(merge, round_)):
        wrong.append("a shard")
    wrong += [*_misfit_zeroed(record.zeroed, merge), *_misfit_effects(record.effects, merge)]
    return [*wrong, *kind.misfit(merge, round_, record.finding)]


def misfit_folded(folded: Folded[Any], merge: Merge, round_: int) -> list[str]:
    """Return the parts of a barrier's findings that don't fit this merge."""
    of_kind = merge.kind(round_).misfit_folded(merge, round_, folded.finding)
    return [*_misfit_zeroed(folded.zeroed, merge), *_misfit_effects(folded.effects, merge), *of_kind]


def _misfit_zeroed(zeroed: Iterable[Zeroed], merge: Merge) -> Iterator[str]:
    for member, parameter, _ in zeroed:
        if member not in range(len(merge.members)):
            yield "a model"
        if parameter not in merge.layout.by_name:
            yield "a zeroed parameter"


def _misfit_effects(effects: Iterable[Effects], merge: Merge) -> Iterator[str]:
    for each in effects:
        if len(each.models) != (len(merge.members) if len(merge.members) <= positions.MOST_MODELS else 0):
            yield "the effects of the models"
        if any(sums.parameter not in range(len(merge.catalog.parameters)) for sums in each.parameters):
            yield "the effects on a parameter"
        if not all(map(math.isfinite, itertools.chain(*each.models, *each.parameters))):
            yield "a sum of effects"


def _demand_fit(wrong: list[str], uri: str) -> None:
    if wrong:
        problem = "; ".join(f"{name} is out of range" for name in dict.fromkeys(wrong))
        raise InputError(Problem(uri, f"is not of this merge: {problem}", FRESH))


@functools.cache
def _record_form(kind: str) -> TypeAdapter[Record[Any]]:
    return TypeAdapter(cast(Any, Record)[rounds.load(kind).finding])


@functools.cache
def _folded_form(kind: str) -> TypeAdapter[Folded[Any]]:
    return TypeAdapter(cast(Any, Folded)[rounds.load(kind).folded])


_RUN_ID, _GENERATION = re.compile("[0-9a-f]{16}"), re.compile("[1-9][0-9]{0,8}")


def find_runs(stores: Stores, output: str) -> list[tuple[str, int]]:
    """Return the sorted (run_id, generation) of all runs in the output's manifest folder.

    Anything with another name is not ours, and is neither read nor removed.
    """
    store = stores.of(output)
    folders = [uri for uri in store.list(join(output, FOLDER)).folders if _RUN_ID.fullmatch(uri.rpartition("/")[2])]
    return sorted(
        (folder.rpartition("/")[2], int(name))
        for folder in folders
        for generation in store.list(folder).folders
        if _GENERATION.fullmatch(name := generation.rpartition("/")[2])
    )
