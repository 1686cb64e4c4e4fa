"""Small files of inputs, which a worker reads whole and keeps in memory."""

from collections.abc import Collection

import google_crc32c

from ties_ray.worker.cache import Bytes


class SmallFiles:
    """Keeps whole files. Their checksums show whether memory has changed them."""

    def __init__(self, uris: Collection[str]) -> None:
        """uris: the files that are kept; the plan counts their bytes."""
        self._uris = frozenset(uris)
        self._held: dict[str, tuple[Bytes, int]] = {}

    def __contains__(self, uri: str) -> bool:
        return uri in self._uris

    def holds(self, uri: str) -> bool:
        """Return whether a file is there, whatever has become of it."""
        return uri in self._held

    def get(self, uri: str) -> Bytes | None:
        """Return a file's bytes, None where they are not there or have changed."""
        data, crc32c = self._held.get(uri, (None, 0))
        return data if data is not None and google_crc32c.value(data) == crc32c else None

    def put(self, uri: str, data: Bytes) -> None:
        """Keep a file."""
        self._held[uri] = data, google_crc32c.value(data)
