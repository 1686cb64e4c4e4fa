"""What has been done, durable, beside the output: `<output>/.ties-ray/<run_id>/<generation>/`.

    plan.json.gz        the stored plan; a resumed run uses it
    uploads.json        upload id of each weight file
    records/<round>/    what workers have finished, one object a batch, written after the data is durable
    folded/<round>/     what a barrier made of the records: thresholds, a method's statistics
    scratch/<name>      condensed matrices, until they are assembled
    seen/<shard>.json   checksums of what the first round has read, which later rounds must read again

Losing a record costs a redo, never a byte.
"""

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from ties_ray.errors import InputError, Problem
from ties_ray.plan import Plan
from ties_ray.statistics import Counts, Pick
from ties_ray.stores import Part, Stores, crc32c, join

FOLDER = ".ties-ray"
"""Name of the manifest's folder in an output."""
LIMIT = 2**30
"""Bytes: no manifest object is larger."""
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


_RECORD = TypeAdapter(Record)
_SEEN = TypeAdapter(tuple[Seen, ...])
_FOLDED = TypeAdapter(Folded)


class Manifest:
    """One generation of one run."""

    def __init__(self, stores: Stores, folder: str) -> None:
        """`folder` is the URI of the generation's folder."""
        self.folder = folder
        self._stores = stores
        self._store = stores.of(folder)

    @staticmethod
    def folder_of(output: str, run_id: str, generation: int = 1) -> str:
        """Return the URI of a generation's folder."""
        return join(join(join(output, FOLDER), run_id), str(generation))

    def write_plan(self, plan: Plan) -> None:
        """Store the plan; its presence makes the run one that can be continued."""
        self._store.put(join(self.folder, "plan.json.gz"), gzip.compress(plan.to_json(), 1, mtime=0))

    def read_plan(self) -> Plan | None:
        """Return the stored plan, None where there is none.

        Raises `InputError` where it is of another version of ties_ray, or of a plugin that this process lacks.
        """
        data = self._get("plan.json.gz")
        try:
            return None if data is None else Plan.from_json(gzip.decompress(data))
        except (ValidationError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            why = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
            what = f"this ties_ray can't read the stored plan ({why})"
            remedy = "use the version and the plugins that made it, or delete the folder"
            raise InputError(Problem(self.folder, what, remedy)) from error

    def write_uploads(self, uploads: dict[str, str]) -> None:
        """Store the upload id of each weight file."""
        self._store.put(join(self.folder, "uploads.json"), json.dumps(uploads).encode())

    def read_uploads(self) -> dict[str, str]:
        """Return the upload ids by file name; empty where none were begun."""
        data = self._get("uploads.json")
        return {} if data is None else {str(name): str(upload) for name, upload in json.loads(data).items()}

    def write_record(self, name: str, record: Record) -> None:
        """Store one batch; `name` is unique among all workers of all attempts."""
        self._store.put(join(self._records(record.round), name), _RECORD.dump_json(record))

    def record_names(self, round_: int) -> list[str]:
        """Return the names of a round's records, sorted."""
        return [pin.uri.rsplit("/", 1)[-1] for pin in self._store.list(self._records(round_)).files]

    def read_record(self, round_: int, name: str) -> Record:
        """Return one record."""
        uri = join(self._records(round_), name)
        try:
            return _RECORD.validate_json(self._store.get(uri, LIMIT)[1])
        except FileNotFoundError as error:
            raise InputError(Problem(uri, "the record has gone", "run the same command again")) from error

    def read_records(self, round_: int, names: Iterable[str]) -> Iterator[Record]:
        """Yield some records of a round, in that order; of thousands, many are asked for and few held at a time."""
        remaining = iter(names)
        with ThreadPoolExecutor(THREADS) as threads:
            while batch := list(itertools.islice(remaining, 2 * THREADS)):
                yield from threads.map(partial(self.read_record, round_), batch)

    def write_folded(self, round_: int, group: int, folded: Folded) -> None:
        """Store what the barrier after a round knows of a group."""
        self._store.put(join(self.folder, f"folded/{round_}/{group}.json"), _FOLDED.dump_json(folded))

    def read_folded(self, round_: int, groups: Sequence[int]) -> dict[int, Folded]:
        """Return what is known after a round, by group; groups not folded yet are missing."""
        found = {group: self._get(f"folded/{round_}/{group}.json") for group in groups}
        return {group: _FOLDED.validate_json(data) for group, data in found.items() if data is not None}

    def write_seen(self, shard: int, seen: Sequence[Seen]) -> None:
        """Store what a shard of the first round has read."""
        self._store.put(join(self.folder, f"seen/{shard}.json"), _SEEN.dump_json(tuple(seen)))

    def read_seen(self, shard: int) -> tuple[Seen, ...]:
        """Return what a shard of the first round has read; nothing if it is not done yet."""
        data = self._get(f"seen/{shard}.json")
        return () if data is None else _SEEN.validate_json(data)

    def write_scratch(self, parameter: int, data: memoryview) -> str:
        """Store the condensed matrix of a parameter; return its CRC32C."""
        self._store.put(self._scratch(parameter), bytes(data))
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
        self._store.delete_folder(join(self.folder, "scratch"))

    def _scratch(self, parameter: int) -> str:
        return join(self.folder, f"scratch/{parameter}")

    def _records(self, round_: int) -> str:
        return join(self.folder, f"records/{round_}")

    def _get(self, name: str) -> bytes | None:
        try:
            return self._store.get(join(self.folder, name), LIMIT)[1]
        except FileNotFoundError:
            return None


def find_runs(stores: Stores, output: str) -> list[tuple[str, int]]:
    """Return (run_id, generation) of what the output's manifest folder holds, sorted."""
    store = stores.of(output)
    return sorted(
        (folder.rsplit("/", 1)[-1], int(generation.rsplit("/", 1)[-1]))
        for folder in store.list(join(output, FOLDER)).folders
        for generation in store.list(folder).folders
    )
