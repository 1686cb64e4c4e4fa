"""The multipart uploads of a result's weight files. A store may forget one; its parts are then written again."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

from ties_ray.errors import InterruptedMerge
from ties_ray.planning.plan import Plan
from ties_ray.rounds import Merge, Record
from ties_ray.rounds.merge import Parts
from ties_ray.state.manifest import Manifest
from ties_ray.stores import Stores, join


class Uploads:
    """The uploads of a merge."""

    def __init__(self, stores: Stores, manifest: Manifest, output: str, check: Callable[[], None]) -> None:
        """output: URI of the output's folder. check: raises if another run holds it: its uploads are not ours."""
        self.ids: dict[str, str] = {}
        """The id of each weight file's upload, by the file's name."""
        self._store = stores.writer(output)
        self._manifest = manifest
        self._output = output
        self._check = check

    def begin(self, merge: Merge, records: Iterable[Record[Parts]]) -> None:
        """Begin the uploads that are missing, or that the store has forgotten.

        records: the records of an interrupted run. An upload whose parts are all recorded may be complete already.
        """
        uploads = self._manifest.read_uploads()
        recorded, begun = _parts_by_upload(records), dict[str, str]()
        try:
            for index, file in enumerate(merge.result.files):
                uri, upload_id = join(self._output, file.name), uploads.get(file.name, "")
                if upload_id and self._store.list_parts(uri, upload_id) is not None:
                    continue
                whole = len(recorded[index, upload_id]) == merge.layout.num_parts(index)
                if not (whole and self._is_completed(uri, file.size)):
                    self._check()
                    begun[uri] = uploads[file.name] = self._store.begin_upload(uri, file.size)
            self._check()
        except InterruptedMerge:
            for uri, upload in begun.items():  # nobody else knows them
                self._store.abort_upload(uri, upload)
            raise
        self._manifest.write_uploads(uploads)
        self.ids = uploads
        self.abort_others()

    def abort_others(self) -> None:
        """Abort the uploads that are not ours: a kill, a lost answer or a late request came before an id was stored."""
        for uri, upload in self._store.list_uploads(self._output):
            if upload not in self.ids.values():
                self._check()
                self._store.abort_upload(uri, upload)

    def are_known(self, plan: Plan) -> bool:
        """Return whether the store knows all uploads that have begun. A completed one counts as known."""
        begun = ((join(self._output, file.name), file) for file in plan.files if file.name in self.ids)
        return all(
            self._store.list_parts(uri, self.ids[file.name]) is not None or self._is_completed(uri, file.size)
            for uri, file in begun
        )

    def as_uploaded(self, merge: Merge, record: Record[Parts]) -> Record[Parts]:
        """Return a record without the shards of uploads that the store has forgotten; they are done again."""
        files, finding = merge.result.files, record.finding
        gone = {file for file, upload in finding.uploads if self.ids[files[file].name] != upload}
        lost = {placed.tensor.parameter for file in gone for placed in files[file].tensors}
        return replace(
            record,
            shards=tuple(shard for shard in record.shards if merge.layout.merge_shard(shard, 0).file not in gone),
            finding=finding._replace(written=tuple(part for part in finding.written if part.file not in gone)),
            zeroed=tuple(zeroed for zeroed in record.zeroed if zeroed[1] not in lost),
        )

    def _is_completed(self, uri: str, size: int) -> bool:
        """Return whether an upload whose parts are all recorded is complete: its object is there."""
        try:
            return self._store.head(uri, 0)[0].size == size
        except FileNotFoundError:
            return False


def _parts_by_upload(records: Iterable[Record[Parts]]) -> defaultdict[tuple[int, str], set[int]]:
    """Return the numbers of the recorded parts, by (file, upload)."""
    parts: defaultdict[tuple[int, str], set[int]] = defaultdict(set)
    for record in records:
        uploads = dict(record.finding.uploads)
        for written in record.finding.written:
            parts[written.file, uploads[written.file]].add(written.part.number)
    return parts
