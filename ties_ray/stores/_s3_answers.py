"""Answers of S3, checked against their requests before anything is taken from them."""

import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from ties_ray.errors import InputError, Problem
from ties_ray.stores import Part, Pin, Transient, changed, crc32c


def split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def prefix_of(uri: str) -> tuple[str, str]:
    """Return bucket and prefix of a folder's objects."""
    bucket, key = split(uri)
    return bucket, f"{key.rstrip('/')}/" if key.strip("/") else ""


def object_of(uri: str) -> dict[str, Any]:
    bucket, key = split(uri)
    if not bucket or not key:
        raise InputError(Problem(uri, "names no object", "write s3://bucket/key"))
    return {"Bucket": bucket, "Key": key}


def bare(etag: str | None) -> str:
    """Return an ETag without its quotes."""
    return (etag or "").strip('"')


def md5(data: bytes | bytearray | memoryview) -> "hashlib._Hash":
    return hashlib.md5(data, usedforsecurity=False)


def proof_of(data: memoryview, *, crc: bool) -> tuple[str, dict[str, str]]:
    """Return the checksum of a part, and the argument of a request by which the service checks it."""
    if crc:
        checksum = b64encode(bytes.fromhex(crc32c(data))).decode()
        return checksum, {"ChecksumCRC32C": checksum}
    checksum = md5(data).hexdigest()
    return checksum, {"ContentMD5": b64encode(bytes.fromhex(checksum)).decode()}


def rows(page: Mapping[str, Any], kind: str, *names: str) -> Sequence[Mapping[str, Any]]:
    """Return the rows of a kind that a page lists; raise `InputError` where a row lacks one of `names`."""
    rows: Sequence[Mapping[str, Any]] = page.get(kind, ())
    missing = [name for name in names if any(name not in row for row in rows)]
    if missing:
        message = f"a service lists {kind} without their {', '.join(missing)}"
        raise InputError(Problem("storage.s3", message, "check endpoint_url: S3 answers otherwise"))
    return rows


def endless(uri: str, message: str) -> InputError:
    message = f"{message} has no end: the service says that more follows, and sends nothing new"
    return InputError(Problem(uri, message, "check storage.s3.endpoint_url: S3 answers otherwise"))


def pin_of(uri: str, size: int, response: Mapping[str, Any]) -> Pin:
    version = response.get("VersionId", "")
    return Pin(uri, size, bare(response.get("ETag")), "" if version == "null" else version)


def joined_etag(parts: Sequence[Part]) -> str:
    """Return the ETag of an object joined from parts whose ETags are their MD5; empty if they can't be."""
    if not all(re.fullmatch("[0-9a-f]{32}", part.etag) for part in parts):
        return ""
    return f"{md5(b''.join(bytes.fromhex(part.etag) for part in parts)).hexdigest()}-{len(parts)}"


def _status(response: Mapping[str, Any]) -> int:
    return int(response["ResponseMetadata"]["HTTPStatusCode"])


def demand_plain(response: Mapping[str, Any], uri: str) -> None:
    """Raise for an object that was compressed on upload, as its headers tell."""
    headers = response["ResponseMetadata"].get("HTTPHeaders", {})  # Google shows there what it has unpacked
    encodings = f"{response.get('ContentEncoding') or ''},{headers.get('x-goog-stored-content-encoding') or ''}".lower()
    encoded = {encoding.strip() for encoding in encodings.split(",")} - {"", "identity", "none", "aws-chunked"}
    if encoded:
        names = ", ".join(sorted(encoded))
        message = f"is stored with Content-Encoding {names}: its bytes are compressed, and not the file's"
        raise InputError(Problem(uri, message, "unpack it (gzip -d), and upload it again without that header"))


def whole_size(response: Mapping[str, Any], asked: int) -> int:
    """Return the size of an object whose first `asked` bytes were asked for; raise for an unsound answer."""
    status, content_range, length = _status(response), response.get("ContentRange"), response.get("ContentLength")
    if status == 200 and content_range is None and length is not None and length <= asked:
        return int(length)
    ranged = re.fullmatch(r"bytes 0-(\d+)/(\d+)", content_range or "")
    if status == 206 and ranged and int(ranged[1]) + 1 == min(asked, int(ranged[2])) and length == int(ranged[1]) + 1:
        return int(ranged[2])
    raise Transient(f"asked for bytes 0-{asked - 1}, {_described(response)}", attempts=4)


def demand(response: Mapping[str, Any], asked: str, count: int, pin: Pin) -> None:
    """Raise unless the answer announces exactly the asked range of the pinned object."""
    etag, content_range = bare(response.get("ETag")), response.get("ContentRange")
    if etag != pin.etag:
        raise changed(pin, f"ETag {pin.etag or 'none'}, now {etag or 'none'}")
    whole = _status(response) == 200 and content_range is None and count == pin.size
    ranged = _status(response) == 206 and content_range == asked
    if not (whole or ranged) or response.get("ContentLength") != count:
        raise Transient(f"asked for {asked}, {_described(response)}", attempts=4)


def _described(response: Mapping[str, Any]) -> str:
    content_range = response.get("ContentRange", "no Content-Range")
    return f"got status {_status(response)} with {content_range} and {response.get('ContentLength')} bytes"
