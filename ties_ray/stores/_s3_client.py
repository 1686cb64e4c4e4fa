"""The client of S3, configured by the recipe, the environment and the AWS configuration."""

import hashlib
import os
import time
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, model_validator

from ties_ray.errors import InputError, Problem
from ties_ray.stores import refuse_secrets
from ties_ray.stores._s3_clock import Clock

DOCUMENT_BYTES = 16 << 20
"""The largest answer that is no object: a page of a listing has up to 1000 keys, each up to 1024 bytes."""
DOCUMENT_SECONDS = 60.0
"""Seconds in which such an answer has to arrive."""


class S3Options(BaseModel):
    """`storage.s3` of a recipe. Credentials are found as every AWS tool finds them: environment, profile, role."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)

    endpoint_url: str | None = None
    """The service's address, if it is not AWS. None: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile's."""
    region: str | None = None
    """The region. None: AWS_REGION, AWS_DEFAULT_REGION or the profile's."""
    profile: str | None = None
    """A profile in the AWS configuration, which every worker must have."""
    anonymous: bool | tuple[str, ...] = False
    """Whether requests are sent without a signature, as public buckets take them: all, or those to these buckets."""
    ca: str | None = None
    """Path of a file with the certificates to trust, on every worker."""
    proxy: str | None = None
    """URL of an HTTP proxy."""
    requester_pays: bool = False
    encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    """The encryption of written objects. None: the bucket's own, or aws:kms where `kms_key_id` is given."""
    kms_key_id: str | None = None
    """The KMS key that encrypts written objects."""
    customer_key: str | None = None
    """The place of the key by which the service encrypts and decrypts (SSE-C), on every worker.

    It is `env:NAME` (base64) or `file:/path` (32 bytes, or base64), and never the key itself."""
    addressing: Literal["auto", "path", "virtual"] = "auto"
    """Whether the bucket stands in the path or in the host name."""
    checksums: Literal["when_required", "when_supported"] | None = None
    """The proof of written bytes: Content-MD5 (when_required) or CRC32C, which some services other than AWS refuse.

    None: AWS_REQUEST_CHECKSUM_CALCULATION or the profile decides, else CRC32C at AWS and MD5 elsewhere."""

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, options: object) -> object:
        return refuse_secrets(options)

    @model_validator(mode="after")
    def _agree(self) -> "S3Options":
        if self.customer_key is not None and not self.customer_key.startswith(("env:", "file:")):
            raise ValueError("customer_key says where the key lies, env:NAME or file:/path; a recipe never holds it")
        if self.customer_key and (self.encryption or self.kms_key_id):
            raise ValueError("customer_key and encryption by the service exclude each other")
        if self.kms_key_id and self.encryption == "AES256":
            raise ValueError("kms_key_id needs encryption aws:kms or aws:kms:dsse, not AES256")
        if self.anonymous is True and self.profile:
            raise ValueError("anonymous requests use no profile; name the public buckets: anonymous: [bucket]")
        return self

    def sealed(self) -> dict[str, str]:
        """Return the arguments of a request by which the service encrypts the object."""
        kind = self.encryption or ("aws:kms" if self.kms_key_id else None)
        key = {"SSEKMSKeyId": self.kms_key_id} if self.kms_key_id else {}
        return {"ServerSideEncryption": kind, **key} if kind else {}

    def customer(self) -> dict[str, str]:
        """Return the arguments of a request for an object under the customer's key; raise `InputError` without it."""
        if self.customer_key is None:
            return {}
        key = _customer_key(self.customer_key)
        digest = hashlib.md5(key, usedforsecurity=False).digest()
        return {
            "SSECustomerAlgorithm": "AES256",
            "SSECustomerKey": b64encode(key).decode(),
            "SSECustomerKeyMD5": b64encode(digest).decode(),
        }

    def unsigned(self, bucket: str) -> bool:
        """Return whether requests to a bucket go without a signature."""
        return self.anonymous if isinstance(self.anonymous, bool) else bucket in self.anonymous


def _customer_key(place: str) -> bytes:
    """Return the 32 bytes that lie at `env:NAME` or `file:/path`; no message repeats them."""
    kind, _, name = place.partition(":")
    try:
        text = os.environb[name.encode()] if kind == "env" else Path(name).expanduser().read_bytes()
    except (KeyError, OSError):
        message = f"there is no {'environment variable' if kind == 'env' else 'readable file'} {name}"
        raise InputError(Problem("storage.s3.customer_key", message, "every worker needs it")) from None
    try:
        key = text if len(text) == 32 else b64decode(text.strip(), validate=True)
    except NotBase64:
        key = b""
    if len(key) != 32:
        message = f"{place} holds no key of 32 bytes, plain or in base64"
        remedy = "make one: head -c 32 /dev/urandom | base64"
        raise InputError(Problem("storage.s3.customer_key", message, remedy))
    return key


class Connection(NamedTuple):
    """A client of botocore and what its configuration says."""

    client: Any
    is_aws: bool
    checksums: str
    """`when_required` or `when_supported` where somebody said so, else empty."""
    credentials: tuple[str, str]
    """What they are found by (`env`, `iam-role`, ...), and the access key with its session token; never shown."""


def connect(options: S3Options, silence: float, clock: Clock, *, unsigned: bool) -> Connection:
    """Return a client, of a session of its own, whose connections may fall silent for `silence` seconds."""
    import botocore.session  # slow, and checking a recipe should not pay for it
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=silence,  # which urllib3 also gives each chunk that is sent
        read_timeout=silence,
        max_pool_connections=64,
        tcp_keepalive=True,
        s3=None if options.addressing == "auto" else {"addressing_style": options.addressing},
        request_checksum_calculation="when_required",  # write_part and put send their own
        response_checksum_validation="when_required",  # some send the whole object's checksum with a range
        proxies={"http": options.proxy, "https": options.proxy} if options.proxy else None,
        signature_version=UNSIGNED if unsigned else None,
    )
    session = botocore.session.Session(profile=options.profile)
    region = options.region or os.environ.get("AWS_REGION") or None  # botocore reads AWS_DEFAULT_REGION alone
    place = {"region_name": region, "endpoint_url": options.endpoint_url}
    client = session.create_client("s3", **place, verify=options.ca, config=config)
    _bound(client)
    clock.register(client)
    asked = os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION")
    asked = options.checksums or (asked or session.get_scoped_config().get("request_checksum_calculation", "")).lower()
    host = urlsplit(client.meta.endpoint_url).hostname or ""
    credentials = None if unsigned else session.get_credentials()
    frozen = credentials.get_frozen_credentials() if credentials else None
    identity = f"{frozen.access_key} {frozen.token}" if frozen else ""
    is_aws = any(host.endswith(f".{suffix}") for suffix in _suffixes(session))
    return Connection(client, is_aws, asked, (credentials.method if credentials else "", identity))


def _suffixes(session: Any) -> Iterator[str]:
    """Yield the domains of AWS, as botocore knows them."""
    for partition in session.get_component("data_loader").load_data("partitions")["partitions"]:
        yield partition["outputs"]["dnsSuffix"]
        yield partition["outputs"]["dualStackDnsSuffix"]


def _bound(client: Any) -> None:
    """Let the client read at most DOCUMENT_BYTES of an answer that is no object, and for at most DOCUMENT_SECONDS.

    botocore reads listings and errors whole, however long they are.
    """
    session = client._endpoint.http_session

    def send(request: Any, event_name: str, **_: object) -> Any:
        is_object = event_name.endswith(".GetObject")
        request.stream_output = True  # so that the body is left to us
        response = session.send(request)
        if is_object and response.status_code < 300:
            return response
        try:
            response._content = _document(response, event_name.rpartition(".")[2], client.meta.endpoint_url)
        except BaseException:
            response.raw.close()
            raise
        return response

    client.meta.events.register("before-send.s3", send)


def _document(response: Any, operation: str, endpoint: str) -> bytes:
    """Return the body of an answer; raise `InputError` where it is too long, or no XML."""
    data, late = bytearray(), time.monotonic() + DOCUMENT_SECONDS
    for chunk in response.raw.stream(1 << 16):
        data += chunk
        if len(data) > DOCUMENT_BYTES:
            message = f"it answers {operation} with more than {DOCUMENT_BYTES:,} bytes"
            remedy = "check storage.s3.endpoint_url: a service that speaks S3 sends less"
            raise InputError(Problem(endpoint, message, remedy))
        if time.monotonic() > late:
            raise TimeoutError(f"its answer took more than {DOCUMENT_SECONDS:g} s")
    start = bytes(data[:64]).lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if response.status_code < 300 and start and (start[:1] != b"<" or start.startswith((b"<html", b"<!doctype"))):
        message = f"it answers {operation} with something else than XML: it does not speak S3"
        raise InputError(Problem(endpoint, message, "check storage.s3.endpoint_url and its port"))
    return bytes(data)
