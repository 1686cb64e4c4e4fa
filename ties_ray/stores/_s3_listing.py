"""The names in folders, from the rows of listings."""

from collections.abc import Mapping
from typing import Any

from ties_ray.errors import InputError, Problem
from ties_ray.stores import Listing, Pin
from ties_ray.stores._s3_answers import bare, rows

MOST_NAMES = 200_000
"""The most names directly in a folder, so that a listing without an end has one."""
_MOST_IDLE_PAGES = 20
"""Pages in a row that may bring nothing new; a service skips deleted objects by an empty page."""


class Names:
    """The names directly in a folder.

    Markers are left out: keys that end with a slash, and Hadoop's `name_$folder$`.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        """prefix: of the folder's keys, with a slash at its end; empty for the bucket's root."""
        self._place = f"s3://{bucket}/{prefix}"
        self._prefix = prefix
        self._files: dict[str, Pin] = {}
        self._folders: set[str] = set()
        self._idle = 0

    def add_page(self, page: Mapping[str, Any], uri: str) -> None:
        """Add a page of the folder's own listing. Raises `InputError` where pages bring nothing new without end."""
        before = len(self._files) + len(self._folders)
        for row in rows(page, "Contents", "Key", "Size"):
            self.add_key(row)
        names = (
            row["Prefix"].removeprefix(self._prefix).partition("/")[0] for row in rows(page, "CommonPrefixes", "Prefix")
        )
        self._folders.update(name for name in names if name)
        count = len(self._files) + len(self._folders)
        self._idle = 0 if count > before else self._idle + 1
        if self._idle > _MOST_IDLE_PAGES or count > MOST_NAMES:
            why = (
                f"{self._idle} pages in a row brought nothing new" if self._idle else f"more than {MOST_NAMES:,} names"
            )
            message = f"its listing has no end: {why}, and the service says that more follows"
            raise InputError(Problem(uri, message, "check storage.s3.endpoint_url, or name a smaller folder"))

    def add_key(self, row: Mapping[str, Any]) -> None:
        """Add a key of the folder, at any depth."""
        name, slash, _ = row["Key"].removeprefix(self._prefix).partition("/")
        if slash and name:
            self._folders.add(name)
        elif name and not name.endswith("_$folder$"):
            self._files[name] = Pin(self._place + name, row["Size"], bare(row.get("ETag")))

    def listing(self) -> Listing:
        """Return the names."""
        return Listing(
            tuple(sorted(self._files.values(), key=lambda pin: pin.uri.encode())),
            tuple(sorted((self._place + name for name in self._folders), key=str.encode)),
        )
