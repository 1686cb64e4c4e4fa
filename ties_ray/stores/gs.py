"""Google Cloud Storage, `gs://bucket/name`, through gcsfs: parts are objects of their own, which the service composes.

Credentials come from where gcsfs finds them (GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account).
"""

import base64
from collections.abc import Sequence
from typing import Any

from ties_ray.stores import Part, Transient, crc32c, join, last_part
from ties_ray.stores._fsspec_uploads import UPLOAD_KEY, FsspecWriter, parts_folder

MOST_COMPOSED = 32
"""Objects that one request composes at most."""


class Gs(FsspecWriter):
    """Objects of buckets; a compose request joins parts on the server."""

    def _stage(self, uri: str, upload: str, number: int, data: bytes) -> Part:
        part = join(parts_folder(uri, upload), f"{number:05}")
        files, path = self._at(part)
        files.pipe_file(path, data)
        stored, expected = self._sums(part), crc32c(memoryview(data))
        if stored and stored != expected:
            raise Transient(f"the part has CRC32C {stored}, {expected} was sent", attempts=4)
        return Part(number, len(data), stored)

    def _staged(self, uri: str, upload: str) -> tuple[Part, ...]:
        files, path = self._at(parts_folder(uri, upload))
        files.invalidate_cache()
        try:
            entries = files.ls(path, detail=True)
        except FileNotFoundError:
            return ()
        named = [(last_part(entry["name"]), entry) for entry in entries if entry["type"] == "file"]
        return tuple(Part(int(name), entry["size"], _crc(entry)) for name, entry in named if name.isdecimal())

    def _join(self, uri: str, upload: str, parts: Sequence[Part]) -> None:
        folder = parts_folder(uri, upload)
        names = [join(folder, f"{part.number:05}") for part in parts]
        level = 0
        while len(names) > MOST_COMPOSED:
            groups = [names[start : start + MOST_COMPOSED] for start in range(0, len(names), MOST_COMPOSED)]
            names = [join(folder, f"joined-{level}-{number:05}") for number in range(len(groups))]
            for name, group in zip(names, groups, strict=True):
                self._compose(name, group, "")
            level += 1
        self._compose(uri, names, upload)

    def _compose(self, target: str, sources: Sequence[str], upload: str) -> None:
        """Make an object of others of its bucket."""
        files, path = self._at(target)
        bucket, key, _ = files.split_path(path)
        metadata = {"metadata": {UPLOAD_KEY: upload}} if upload else {}
        body = {
            "sourceObjects": [{"name": files.split_path(self._at(source)[1])[1]} for source in sources],
            "destination": {"contentType": "application/octet-stream", **metadata},
        }
        self.meter.add(requests=1)
        headers = {"Content-Type": "application/json"}
        files.call("POST", "b/{}/o/{}/compose", bucket, key, headers=headers, json=body)

    def _discard(self, uri: str, upload: str) -> None:
        self.delete_folder(parts_folder(uri, upload))

    def _maker(self, uri: str) -> str:
        files, path = self._at(uri)
        files.invalidate_cache(path)
        return str((files.info(path).get("metadata") or {}).get(UPLOAD_KEY, ""))

    def _sums(self, uri: str) -> str:
        files, path = self._at(uri)
        files.invalidate_cache(path)
        return _crc(files.info(path))


def _crc(entry: dict[str, Any]) -> str:
    """Return the CRC32C of an object as hexadecimal digits; empty where the service tells none."""
    stored = entry.get("crc32c")
    return base64.b64decode(stored).hex() if isinstance(stored, str) else ""
