"""Azure Blob Storage, `az://container/name`, through adlfs: parts are blocks of the blob, which a list of them commits.

Credentials come from where adlfs finds them (AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_ACCOUNT_NAME with a key or
a managed identity). Azure forgets blocks that nobody commits after a week.
"""

import base64
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from ties_ray.stores import Part
from ties_ray.stores._fsspec_uploads import UPLOAD_KEY, FsspecWriter

T = TypeVar("T")


class Az(FsspecWriter):
    """Blobs of containers; a blob is made of blocks that any process may stage."""

    def _stage(self, uri: str, upload: str, number: int, data: bytes) -> Part:
        self._of_blob(uri, lambda blob: blob.stage_block(_block(upload, number), data, validate_content=True))
        return Part(number, len(data), "")

    def _staged(self, uri: str, upload: str) -> tuple[Part, ...]:
        try:
            _, blocks = self._of_blob(uri, lambda blob: blob.get_block_list("uncommitted"))
        except FileNotFoundError:
            return ()
        names = [(_name(block.id), block.size) for block in blocks]
        return tuple(
            Part(int(name.partition(" ")[2]), size, "") for name, size in names if name.startswith(f"{upload} ")
        )

    def _join(self, uri: str, upload: str, parts: Sequence[Part]) -> None:
        from azure.storage.blob import BlobBlock

        blocks = [BlobBlock(block_id=_block(upload, part.number)) for part in parts]
        self.meter.add(requests=1)
        self._of_blob(uri, lambda blob: blob.commit_block_list(blocks, metadata={UPLOAD_KEY: upload}))

    def _discard(self, uri: str, upload: str) -> None:
        """Do nothing: blocks that are not committed can't be removed, and go by themselves."""

    def _maker(self, uri: str) -> str:
        properties = self._of_blob(uri, lambda blob: blob.get_blob_properties())
        return str(properties.metadata.get(UPLOAD_KEY, ""))

    def _of_blob(self, uri: str, function: Callable[[Any], Awaitable[T]]) -> T:
        """Return the result of a function of the blob's client, in the loop of the file system."""
        from azure.core.exceptions import ResourceNotFoundError
        from fsspec.asyn import sync

        files, path = self._at(uri)
        container, name, _ = files.split_path(path)

        async def call() -> T:
            async with files.service_client.get_blob_client(container, name) as blob:
                return await function(blob)

        try:
            result: T = sync(files.loop, call)
        except ResourceNotFoundError as error:
            raise FileNotFoundError(uri) from error
        return result


def _name(block_id: str | bytes) -> str:
    """Return the name of a block as this store gives it: the upload's id and the number of the part."""
    text = block_id.decode() if isinstance(block_id, bytes) else block_id
    return base64.b64decode(text).decode(errors="replace") if not text.count(" ") else text


def _block(upload: str, number: int) -> str:
    return f"{upload} {number:05}"
