"""The meaning of an error of an S3 service or of its client: exit 5 only where trying again can help."""

import re
import shlex
import socket
from collections.abc import Mapping
from typing import Any

from ties_ray.errors import InputError, Problem
from ties_ray.stores import Transient, causes_of, no_upload, shown
from ties_ray.stores._s3_clock import SKEWED

EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
_DAMAGED = ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "IncompleteBody")
_THROTTLED = (
    *("SlowDown", "Throttling", "ThrottlingException", "ThrottledException", "TooManyRequests"),
    *("TooManyRequestsException", "RequestThrottled", "RequestLimitExceeded", "BandwidthLimitExceeded"),
    *("KMS.ThrottlingException", "RequestThrottledException"),
)
_PASSING = ("RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "InternalError", "ServiceUnavailable")
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "Redirect")
_UNKNOWN_HEADER = ("NotImplemented", "XNotImplemented", "InvalidArgument", "InvalidRequest", "MethodNotAllowed", "400")

_PROXY = "the proxy wants credentials: check storage.s3.proxy or HTTPS_PROXY"
SET_CLOCK = "set the clock of this machine, and of every node"
_REMEDIES = {
    "InvalidAccessKeyId": "check the credentials and that they are of this service (storage.s3.endpoint_url, profile)",
    "SignatureDoesNotMatch": "check the credentials: the secret key does not belong to this access key",
    SKEWED: SET_CLOCK,
    "InvalidToken": "check the credentials: AWS_SESSION_TOKEN must belong to the access key",
    "KMS.DisabledException": "enable the KMS key, or name another in storage.s3.kms_key_id",
    "KMS.NotFoundException": "check storage.s3.kms_key_id: the key lies in the region of the bucket",
    "SecondLevelDomainForbidden": "set storage.s3.addressing: virtual",
    "InvalidPathAccess": "set storage.s3.addressing: virtual",
    "InvalidBucketName": "check the name of the bucket in the URI",
    "KeyTooLongError": "write to a shorter path",
    "EntityTooLarge": "write smaller files: output.file_size",
    "MethodNotAllowed": "check storage.s3.endpoint_url and what this service allows",
}
"""Remedies by the service's code."""


class Unmet(InputError):
    """The condition of a write does not hold."""


class Unconditional(InputError):
    """The service does not know conditional writes."""


def answer(error: Exception) -> tuple[int, str, str]:
    """Return HTTP status, code and message of an error that the service sent; (0, "", "") if it sent none."""
    response = getattr(error, "response", None)
    if not isinstance(response, Mapping):
        return 0, "", ""
    details = response.get("Error", {})
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status, str(details.get("Code", status)), str(details.get("Message", ""))


def refuses(error: Exception, header: str) -> bool:
    """Return whether an error says that the service does not know a header or an operation, given as a pattern."""
    status, code, message = answer(error)
    if status == 501:
        return True
    about = re.search(f"{header}|unsupported header|not implemented|not supported", message, re.IGNORECASE)
    return status in (400, 405) and code in _UNKNOWN_HEADER and bool(about)


def explained(error: Exception, uri: str, doing: str, *, reached: bool, unsigned: bool) -> Exception:
    """Return the error to raise for one of the service or of the client; a defect of ours is returned unchanged.

    reached: whether the service has ever answered as S3 does. unsigned: whether the request had no signature.
    """
    status, code, message = answer(error)
    if not status:
        return _of_client(error, uri, doing, reached=reached)
    reason = f"{code}: {shown(message[:2000])}" if message else code
    if code in _THROTTLED or status in (429, 503):
        return Transient(f"{status} {reason}", throttled=True)
    if code in _DAMAGED:
        return Transient(f"{status} {reason}", attempts=4)
    if code in EXPIRED:
        return Transient(f"{status} {reason}, and so again after the credentials were looked up anew", attempts=4)
    if code == "NoSuchBucket":
        remedy = "check the name, and storage.s3.endpoint_url: it may be of another service"
        return InputError(Problem(uri, "there is no such bucket", remedy))
    if code == "NoSuchUpload":
        return no_upload(uri, doing)
    if status == 404 and not doing.startswith(("listing it", "listing uploads", "starting")):
        return FileNotFoundError(uri)
    if status == 412:
        return Unmet(Problem(uri, f"{doing}: another writer was there first", "run again"))
    if status == 507 or code == "XMinioStorageFull":
        return InputError(
            Problem(uri, f"{doing} failed ({status} {reason})", "free some room there, or write elsewhere")
        )
    if (status >= 500 and status != 501) or status in (307, 408) or code in _PASSING:
        return Transient(f"{status} {reason}")
    return InputError(Problem(uri, *_refused(error, uri, doing, reason, unsigned=unsigned)))


def _refused(error: Exception, uri: str, doing: str, reason: str, *, unsigned: bool) -> tuple[str, str]:
    """Return (problem, remedy) where the service refuses for good."""
    status, code, message = answer(error)
    response: Mapping[str, Mapping[str, object]] = getattr(error, "response", {})
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    region = response.get("Error", {}).get("Region") or (
        headers.get("x-amz-bucket-region") if isinstance(headers, Mapping) else None
    )
    failure = f"{doing} was refused ({reason})" if status in (401, 403) else f"{doing} failed ({status} {reason})"
    if code == "InvalidObjectState":
        kept = response.get("Error", {}).get("StorageClass", "an archive")
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        place = f"--bucket {shlex.quote(bucket)} --key {shlex.quote(key)}"
        remedy = f"restore it and wait for that: aws s3api restore-object {place} --restore-request Days=7"
        return f"is archived ({kept}) and can't be read", remedy
    if code in _REGION or (region and status in (301, 400)):
        return failure, f"set storage.s3.region: {region}" if region else "check storage.s3.region and endpoint_url"
    if code in _REMEDIES:
        return failure, _REMEDIES[code]
    if re.search("virtual.hosted|second.level.domain", message, re.IGNORECASE):
        return failure, "set storage.s3.addressing: virtual"
    if re.search("checksum|crc32", message, re.IGNORECASE):
        return failure, "take storage.s3.checksums out, or set it to when_required"
    if re.search("customer.provided|form of server.side encryption|encryption parameters", message, re.IGNORECASE):
        return failure, "the object has a key of its own (SSE-C): say in storage.s3.customer_key where that key lies"
    if status in (401, 403):
        return failure, _permission(doing, unsigned=unsigned)
    if status == 407:
        return failure, _PROXY
    if status == 404:
        return failure, "check storage.s3.endpoint_url and the bucket: nothing there answers as S3 does"
    if status in (301, 302, 308):
        return failure, "check storage.s3.endpoint_url: it leads elsewhere"
    return failure, "the service refuses this for good: see what it says, and storage.s3"


def _permission(doing: str, *, unsigned: bool) -> str:
    """Return what to do about a request that was forbidden."""
    if unsigned:
        return "the bucket takes no anonymous requests: take it out of storage.s3.anonymous and give credentials"
    if doing.startswith(("writing", "starting")):
        return (
            "check the credentials and their permissions; a bucket may also demand encryption: storage.s3.encryption,"
            " kms_key_id or customer_key"
        )
    return (
        "check the credentials and their permissions; a missing object looks so too without s3:ListBucket, and so does"
        " a bucket whose reader pays (storage.s3.requester_pays); a public bucket: storage.s3.anonymous"
    )


def _of_client(error: Exception, uri: str, doing: str, *, reached: bool) -> Exception:
    """Return what to raise for an error that happened on our side of the wire."""
    import urllib3
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    message = f"{doing} failed: {shown(error)}"
    advice: str | None = _lasting(error, boto, reached=reached)
    if advice:
        return InputError(Problem(uri, message, advice))
    unknown = any(isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME for cause in causes_of(error))
    if unknown and not reached:  # once it was known, the name will be so again
        advice = (
            "check storage.s3.endpoint_url and region; if the bucket stands in the name: storage.s3.addressing: path"
        )
        return Transient(f"{error} (the name is not known)", attempts=4, remedy=advice)
    if isinstance(error, ResponseParserError):
        advice = None if reached else "check storage.s3.endpoint_url: what answers there does not speak S3"
        return Transient(error, attempts=4, remedy=advice)
    passing = (
        boto.HTTPClientError,
        boto.ConnectionError,
        boto.CredentialRetrievalError,
        boto.IncompleteReadError,
        boto.ResponseStreamingError,
        urllib3.exceptions.HTTPError,
        OSError,
    )
    if isinstance(error, passing):
        return Transient(error)
    if isinstance(error, boto.BotoCoreError | ValueError):
        return InputError(Problem(uri, message, "check the URI, storage.s3 and the AWS configuration"))
    return error


def _lasting(error: Exception, boto: Any, *, reached: bool) -> str:
    """Return what to do about an error of our side that another try can't mend; empty where one may."""
    text = str(error).lower()
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.ProfileNotFound):
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, storage.s3.profile, or a role, on every node; a public"
            " bucket: storage.s3.anonymous: true"
        )
    if isinstance(error, boto.UnauthorizedSSOTokenError | boto.SSOTokenLoadError | boto.TokenRetrievalError):
        return "log in again (aws sso login), and run the same command"
    if isinstance(error, boto.SSLError):
        if "certificate has expired" in text or "not yet valid" in text:
            return "the service's certificate must be renewed, or this machine's clock set"
        if "mismatch" in text or "doesn't match" in text or "not valid for" in text:
            return (
                "name the host as its certificate does in storage.s3.endpoint_url, or set storage.s3.addressing: path"
            )
        if "certificate" in text:
            return "set storage.s3.ca, or AWS_CA_BUNDLE, to the certificates to trust"
        if not reached and ("wrong_version" in text or "record layer" in text or "unknown_protocol" in text):
            return "the service speaks no TLS there: write http:// in storage.s3.endpoint_url, or another port"
    if isinstance(error, boto.ProxyConnectionError) and any("failed: 407" in str(cause) for cause in causes_of(error)):
        return _PROXY
    return ""
