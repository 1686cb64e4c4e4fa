"""Uploads in parts through fsspec: what stores have in common whose service joins parts itself.

Each upload has a marker in a folder beside its object: `.ties-ray-uploads/UPLOAD.NAME`. Listings leave that folder out.
The object that an upload makes carries its id as metadata, so that a completion can be repeated.
"""

import json
import secrets
from abc import abstractmethod
from collections.abc import Sequence

from ties_ray.errors import InputError, Problem
from ties_ray.stores import Listing, Part, Pin, WritableStore, join, last_part, no_upload, shown
from ties_ray.stores.fsspec import Fsspec

UPLOADS = ".ties-ray-uploads"
"""The folder of markers and of parts that lie by themselves."""
UPLOAD_KEY = "ties_ray_upload"
"""The key of the metadata that names an object's upload."""
_MOST = 4096
"""Bytes of a marker at most."""


class FsspecWriter(Fsspec, WritableStore):
    """Reads as `Fsspec` does, and writes; a subclass stages parts and joins them."""

    def list(self, uri: str) -> Listing:
        """Return what lies directly in the folder, without the uploads under way."""
        listing = super().list(uri)
        folders = tuple(folder for folder in listing.folders if last_part(folder) != UPLOADS)
        return listing._replace(folders=folders)

    def _look(self, uri: str) -> Pin:
        self._at(uri)[0].invalidate_cache()  # a folder that was listed before hides what was written since
        return super()._look(uri)

    def put(self, uri: str, data: bytes) -> Pin:
        """Write an object by one request, and look at it."""

        def attempt() -> Pin:
            files, path = self._at(uri)
            self.meter.add(requests=1)
            files.pipe_file(path, bytes(data))
            self.meter.add(bytes_written=len(data))
            return self._look(uri)

        return self._repeat(uri, "writing it", attempt)

    def delete(self, uri: str) -> None:
        """Remove an object."""

        def attempt() -> None:
            files, path = self._at(uri)
            files.rm_file(path)

        try:
            self._repeat(uri, "removing it", attempt)
        except FileNotFoundError:
            return

    def delete_folder(self, uri: str) -> None:
        """Remove all that lies in a folder, with the uploads under way."""
        super().delete_folder(uri)
        if last_part(uri.rstrip("/")) != UPLOADS:
            super().delete_folder(join(uri, UPLOADS))

    def begin_upload(self, uri: str, size: int) -> str:
        """Write the marker of an upload."""
        upload = secrets.token_hex(16)
        self.put(_marker(uri, upload), json.dumps({"size": size}).encode())
        return upload

    def write_part(self, uri: str, upload: str, number: int, offset: int, data: memoryview) -> Part:
        """Stage a part, if the upload is known."""
        if self._begun(uri, upload) is None:
            raise no_upload(uri, f"writing part {number}")
        part = self._repeat(uri, f"writing part {number}", lambda: self._stage(uri, upload, number, bytes(data)))
        self.meter.add(requests=1, bytes_written=data.nbytes)
        return part

    def list_parts(self, uri: str, upload: str) -> tuple[Part, ...] | None:
        """Return the staged parts by number."""
        if self._begun(uri, upload) is None:
            return None
        return tuple(sorted(self._repeat(uri, "listing its parts", lambda: self._staged(uri, upload))))

    def list_uploads(self, folder: str) -> tuple[tuple[str, str], ...]:
        """Return the uploads whose markers lie beside the folder's objects."""
        named = (last_part(pin.uri).partition(".") for pin in super().list(join(folder, UPLOADS)).files)
        return tuple(sorted((join(folder, name), upload) for upload, _, name in named))

    def complete_upload(self, uri: str, upload: str, parts: Sequence[Part]) -> Pin:
        """Join the parts, then forget the upload."""
        size = self._begun(uri, upload)
        if size is None:
            return self._completed(uri, upload)
        if self.list_parts(uri, upload) != tuple(sorted(parts)) or sum(part.size for part in parts) != size:
            message = "the parts are not those that were written"
            raise InputError(Problem(shown(uri), message, "run the merge with --fresh"))
        self._repeat(uri, "joining its parts", lambda: self._join(uri, upload, sorted(parts)))
        self._forget(uri, upload)
        return self._repeat(uri, "looking at it", lambda: self._look(uri))

    def abort_upload(self, uri: str, upload: str) -> None:
        """Forget an upload and its parts."""
        self._forget(uri, upload)

    def _completed(self, uri: str, upload: str) -> Pin:
        """Return the object that an upload has made before."""
        try:
            maker = self._repeat(uri, "looking at it", lambda: self._maker(uri))
        except FileNotFoundError:
            raise no_upload(uri, "completing an upload") from None
        if maker != upload:
            message = "this upload does not exist, and the object is another"
            raise InputError(Problem(shown(uri), message, "run the merge with --fresh"))
        return self._repeat(uri, "looking at it", lambda: self._look(uri))

    def _begun(self, uri: str, upload: str) -> int | None:
        """Return the size that an upload was begun for; None where it is not known."""
        try:
            return int(json.loads(self.get(_marker(uri, upload), _MOST)[1])["size"])
        except FileNotFoundError:
            return None

    def _forget(self, uri: str, upload: str) -> None:
        self._discard(uri, upload)
        self.delete(_marker(uri, upload))

    @abstractmethod
    def _stage(self, uri: str, upload: str, number: int, data: bytes) -> Part:
        """Write a part, in place of an earlier one of its number."""

    @abstractmethod
    def _staged(self, uri: str, upload: str) -> tuple[Part, ...]:
        """Return the parts that are written."""

    @abstractmethod
    def _join(self, uri: str, upload: str, parts: Sequence[Part]) -> None:
        """Make the object of its parts, with the upload's id as metadata."""

    @abstractmethod
    def _discard(self, uri: str, upload: str) -> None:
        """Remove the parts."""

    @abstractmethod
    def _maker(self, uri: str) -> str:
        """Return the id of the upload that has made an object; empty for any other object."""


def _marker(uri: str, upload: str) -> str:
    folder, _, name = uri.rpartition("/")
    return join(join(folder, UPLOADS), f"{upload}.{name}")


def parts_folder(uri: str, upload: str) -> str:
    """Return the folder of an upload's parts, where they lie by themselves."""
    return join(join(uri.rpartition("/")[0], UPLOADS), upload)
