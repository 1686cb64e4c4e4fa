"""Objects of S3 and of what speaks its protocol, through botocore, but with a strict reader of our own.

botocore brings sessions, credentials, signatures and a pool of connections. Its retries are off. Its responses are
not trusted: clients that asked for 1 MiB have got half of it, or the whole object, without an error. So a response is
checked for status, Content-Range, length and ETag. Its body is received straight into the caller's memory.
"""

import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from ties_ray.errors import InputError, Problem, UnavailableError
from ties_ray.stores import Listing, Part, Pin, Transient, WritableStore, changed, no_upload
from ties_ray.stores._s3_answers import (
    bare,
    demand,
    demand_plain,
    endless,
    joined_etag,
    object_of,
    pin_of,
    prefix_of,
    rows,
    split,
    whole_size,
)
from ties_ray.stores._s3_client import S3Options
from ties_ray.stores._s3_conditions import ConditionalWrites
from ties_ray.stores._s3_errors import answer, refuses
from ties_ray.stores._s3_listing import Names
from ties_ray.stores._s3_service import Service
from ties_ray.stores._s3_transfer import Transfer

_TOGETHER = 8
"""Folders beside each other that are listed together, at least."""
_CRC_LETTERS = 8
"""Letters of a CRC32C in base64; an MD5 has 32, in hex."""


class S3(WritableStore):
    """`s3://bucket/key`. A request runs in the thread of its caller; all share one client and its connections."""

    options = S3Options
    pinned_by = "ETag, and version where the bucket keeps versions"
    settle: float = 2.0
    """Seconds between a write and the look at it that tells who won, at a service without conditional writes."""

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        assert isinstance(options, S3Options)
        self.service = Service(options, self.meter, self.notes)
        self._transfer = Transfer(self.service)
        self._conditions = ConditionalWrites(self.service, self)
        self._ask_version = True
        self._lists_v2 = True
        self._options = options

    def download_command(self, uri: str, folder: str) -> str:
        """Return the command of the AWS client; it leaves out what `verify` needs."""
        words = ["aws", "s3", "cp", "--recursive", uri, folder, "--exclude", ".ties-ray/*"]
        for name in ("endpoint_url", "region", "profile"):
            value = getattr(self._options, name)
            words += [f"--{name.replace('_', '-')}", value] if value else []
        return shlex.join(words)

    def list(self, uri: str) -> Listing:
        """Return the content of the folder, page by page of up to 1000 keys."""
        names = Names(*prefix_of(uri))
        for page in self._pages(uri):
            names.add_page(page, uri)
        return names.listing()

    def list_each(self, uris: Sequence[str]) -> dict[str, Listing]:
        """Return the content of folders that lie beside each other, from pages of the folder around them.

        It gives up where pages bring fewer than four of these folders each, as other content of the folder does.
        """
        beside: defaultdict[str, list[str]] = defaultdict(list)
        for uri in uris:
            beside[uri.rstrip("/").rpartition("/")[0]].append(uri)
        listings: dict[str, Listing] = {}
        for parent, group in beside.items():
            if len(group) >= _TOGETHER and parent != "s3:/":
                names = self._names_below(parent, group)
                listings |= {uri: names[key].listing() for uri in group if (key := prefix_of(uri)[1]) in names}
        return listings

    def _names_below(self, parent: str, uris: Sequence[str]) -> dict[str, Names]:
        """Return the names in folders of a folder that hold any, by prefix; none where it takes too many pages."""
        bucket, prefix = prefix_of(parent)
        prefixes = {prefix_of(uri)[1] for uri in uris}
        names: dict[str, Names] = {}
        for number, page in enumerate(self._pages(parent, delimiter="")):
            if 4 * number > len(names):
                return {}
            for row in rows(page, "Contents", "Key", "Size"):
                own = f"{prefix}{row['Key'].removeprefix(prefix).partition('/')[0]}/"
                if own in prefixes:
                    names.setdefault(own, Names(bucket, own)).add_key(row)
        return names

    def _pages(self, uri: str, delimiter: str = "/") -> Iterator[Mapping[str, Any]]:
        """Yield the pages of a folder's listing, by version 1 of the operation where a service knows no other.

        delimiter: none for a listing at any depth.
        """
        bucket, prefix = prefix_of(uri)
        where = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
        after: dict[str, str] = {}
        marker = ""

        def ask(client: Any, late: float) -> Any:
            if self._lists_v2:
                try:
                    return client.list_objects_v2(**where, **after, **self.service.payer)
                except Exception as error:
                    if not refuses(error, "list-type|ListObjectsV2"):
                        raise
            self._lists_v2 = False
            return client.list_objects(**where, Marker=marker, **self.service.payer)

        while True:
            page = self.service.repeat(uri, "listing it", ask, 0)
            yield page
            if not page.get("IsTruncated"):
                return
            if self._lists_v2 and "NextContinuationToken" not in page:
                self._lists_v2 = False  # version 1 was answered, though 2 was asked for: begin anew, by that
                continue
            after = {"ContinuationToken": page.get("NextContinuationToken", "")}
            last = [row["Key"] for row in rows(page, "Contents", "Key")]
            last += [row["Prefix"] for row in rows(page, "CommonPrefixes", "Prefix")]
            marker = page.get("NextMarker") or max([marker, *last], key=str.encode)

    def newest(self, uri: str) -> float | None:
        """Return the newest LastModified of a folder, whose first 1000 keys tell enough of a model."""
        page = next(self._pages(uri))
        return max((row["LastModified"].timestamp() for row in rows(page, "Contents", "LastModified")), default=None)

    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        """Return pin and first bytes by one GET of a range; an empty object, which has no range, costs a second GET."""
        asked = max(nbytes, 1)

        def get(client: Any, late: float) -> tuple[Pin, bytes]:
            try:
                response = self._transfer.get(client, uri, Range=f"bytes=0-{asked - 1}")
            except Exception as error:
                if answer(error)[0] != 416:
                    raise
                response = self._transfer.get(client, uri)
            with response["Body"] as body:
                demand_plain(response, uri)
                size = whole_size(response, asked)
                data = bytearray(min(asked, size))
                self._transfer.fill(body, memoryview(data), late)
            if size == len(data):
                self._transfer.learn(uri, response, data)
            return pin_of(uri, size, response), bytes(data[:nbytes])

        return self.service.repeat(uri, f"reading its first {asked:,} bytes", get, asked)

    def read(self, pin: Pin, start: int, into: memoryview) -> None:
        """Read a range of the pinned object: If-Match is always sent, and the answer's ETag compared as well."""
        into = into.cast("B")
        if not into:
            return
        asked = f"bytes {start}-{start + len(into) - 1}/{pin.size}"
        arguments = {"Range": f"bytes={start}-{start + len(into) - 1}"}
        if pin.etag and not pin.etag.startswith("W/"):  # a weak ETag never satisfies If-Match
            arguments["IfMatch"] = f'"{pin.etag}"'

        def get(client: Any, late: float) -> None:
            version = {"VersionId": pin.version} if pin.version and self._ask_version else {}
            try:
                response = self._transfer.get(client, pin.uri, **arguments, **version)
            except Exception as error:
                status, code, _ = answer(error)
                if status in (404, 412, 416) and code != "NoSuchBucket":
                    raise changed(pin, f"the store says {code}") from error
                if version and status == 403:  # a role may read objects, but no versions by id: the ETag pins as well
                    self._ask_version = False
                    raise Transient("no permission to read a version by its id") from error
                raise
            with response["Body"] as body:
                demand(response, asked, len(into), pin)
                self._transfer.fill(body, into, late)

        self.service.repeat(pin.uri, f"reading bytes {start:,} to {start + len(into):,}", get, len(into))

    def put(self, uri: str, data: bytes) -> Pin:
        """Write an object by one request."""
        try:
            done = self.put_if(uri, data, {})
        except FileNotFoundError:
            message = "writing it failed (404)"
            remedy = "check storage.s3.endpoint_url and the bucket: nothing there answers as S3 does"
            raise InputError(Problem(uri, message, remedy)) from None
        return pin_of(uri, len(data), done)

    def put_if(self, uri: str, data: bytes, condition: Mapping[str, str]) -> Any:
        """Write an object by one request under a condition (its arguments); return the answer."""
        sealed = self.service.sealed
        return self._transfer.send(uri, "writing it", "put_object", memoryview(data), **condition, **sealed)[0]

    def swap(self, uri: str, data: bytes, etag: str) -> Pin | None:
        """Write under a condition, or by the substitute at a service that lacks conditions."""
        return self._conditions.swap(uri, data, etag, self.settle)

    def delete(self, uri: str) -> None:
        """Remove the object."""
        self.service.ask(uri, "deleting it", "delete_object", **object_of(uri))

    def begin_upload(self, uri: str, size: int) -> str:
        """Start a multipart upload."""

        def begin(client: Any, late: float) -> Any:
            algorithm = {"ChecksumAlgorithm": "CRC32C"} if self.service.crc else {}
            with self._transfer.dialect(algorithm):
                return client.create_multipart_upload(
                    **object_of(uri), **algorithm, **self.service.sealed, **self.service.customer, **self.service.payer
                )

        begun = self.service.repeat(uri, "starting an upload", begin, 0)
        return str(begun["UploadId"])

    def write_part(self, uri: str, upload: str, number: int, offset: int, data: memoryview) -> Part:
        """Send one part, with the checksum by which the service proves what it got."""
        data = data.cast("B")
        done, checksum = self._transfer.send(
            uri, f"writing part {number}", "upload_part", data, UploadId=upload, PartNumber=number
        )
        return Part(number, len(data), bare(done.get("ETag")), checksum)

    def list_parts(self, uri: str, upload: str) -> tuple[Part, ...] | None:
        """Return the parts that the service has, page by page of up to 1000; () where it can't list them."""
        parts: list[Part] = []
        marker = 0
        while True:
            page = self.service.ask_upload(uri, "listing parts", "list_parts", upload, PartNumberMarker=marker)
            if page is None:
                return None
            parts += [
                Part(row["PartNumber"], row["Size"], bare(row["ETag"]), row.get("ChecksumCRC32C", ""))
                for row in rows(page, "Parts", "PartNumber", "Size", "ETag")
            ]
            if not page.get("IsTruncated"):
                return tuple(sorted(parts))
            before, marker = marker, int(page.get("NextPartNumberMarker", 0))
            if marker <= before:
                raise endless(uri, "the list of parts")

    def list_uploads(self, folder: str) -> tuple[tuple[str, str], ...]:
        """Return the multipart uploads under the prefix, page by page of up to 1000; () where it can't list them."""
        bucket, key = split(folder)
        prefix = f"{key.rstrip('/')}/" if key else ""
        all_uploads: set[tuple[str, str]] = set()
        marker: dict[str, str] = {}
        while True:
            page = self.service.ask(
                folder, "listing uploads", "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker
            )
            uploads = {
                (f"s3://{bucket}/{row['Key']}", str(row["UploadId"]))
                for row in rows(page, "Uploads", "Key", "UploadId")
            }
            more = page.get("IsTruncated")
            if more and (uploads <= all_uploads or "NextKeyMarker" not in page):
                raise endless(folder, "the list of uploads")
            all_uploads |= uploads
            if not more:
                below = len(f"s3://{bucket}/{prefix}")
                return tuple(sorted((uri, upload) for uri, upload in all_uploads if "/" not in uri[below:]))
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}

    def complete_upload(self, uri: str, upload: str, parts: Sequence[Part]) -> Pin:
        """Join the parts, and check that the object is what they give.

        The size is always compared, and the ETag where the parts' ETags are the MD5 of their bytes (not with KMS). With
        CRC32C the service itself compares. Where the upload is gone, such an object is its work.
        """
        parts = sorted(parts)
        entries: list[dict[str, int | str]] = [{"PartNumber": part.number, "ETag": f'"{part.etag}"'} for part in parts]
        for entry, part in zip(entries, parts, strict=True):
            if len(part.checksum) == _CRC_LETTERS:  # else it is an MD5
                entry["ChecksumCRC32C"] = part.checksum
        done = None
        if self.list_parts(uri, upload) is not None:  # some services answer 500 about an upload they don't know
            arguments = {"MultipartUpload": {"Parts": entries}, **self.service.customer}
            done = self.service.ask_upload(
                uri, "completing an upload", "complete_multipart_upload", upload, **arguments
            )
        try:
            pin, _ = self.head(uri, 0)
        except FileNotFoundError:
            raise no_upload(uri, "completing an upload") from None
        is_md5 = all(part.etag == part.checksum for part in parts)
        etag = joined_etag(parts)
        likely = pin.etag == etag or (not is_md5 and (done is not None or pin.etag.endswith(f"-{len(parts)}")))
        if likely and pin.size == sum(part.size for part in parts):
            return pin
        if done is None:
            message = "the store does not know the upload, and the object is another"
            raise InputError(Problem(uri, message, "run the merge with --fresh"))
        message = f"the completed object has {pin.size:,} bytes and ETag {pin.etag}, but its parts give {etag}"
        raise UnavailableError(Problem(uri, message, "delete it, and run the merge with --fresh"))

    def abort_upload(self, uri: str, upload: str) -> None:
        """Forget the upload."""
        self.service.ask_upload(uri, "aborting an upload", "abort_multipart_upload", upload)
