import socket
import ssl

import pytest
import urllib3
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from ties_ray.errors import InputError
from ties_ray.stores import NoUpload, Transient
from ties_ray.stores._s3_errors import Unmet, answer, explained, refuses


def refusal(status: int, code: str, message: str = "", headers: object = None, **details: str) -> boto.ClientError:
    """Return the error of botocore for an answer of a service."""
    return boto.ClientError(
        {
            "Error": {"Code": code, "Message": message, **details},
            "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
        },  # type: ignore[typeddict-item]
        "GetObject",
    )


def meaning(error: Exception, doing: str = "reading it", *, reached: bool = True, unsigned: bool = False) -> Exception:
    return explained(error, "s3://b/my key", doing, reached=reached, unsigned=unsigned)


def test_an_answer_is_taken_apart() -> None:
    assert answer(refusal(503, "SlowDown", "less")) == (503, "SlowDown", "less")
    assert answer(boto.ClientError({"ResponseMetadata": {"HTTPStatusCode": 500}}, "X")) == (500, "500", "")  # type: ignore[typeddict-item]
    assert answer(OSError("cut")) == (0, "", "")
    assert answer(boto.ClientError({}, "X")) == (0, "0", "")


@pytest.mark.parametrize(
    ("status", "code", "message", "refused"),
    [
        (501, "Anything", "", True),
        (400, "InvalidArgument", "Unsupported header 'x-amz-checksum-crc32c'", True),
        (400, "InvalidRequest", "CHECKSUM algorithm", True),
        (405, "MethodNotAllowed", "this is not supported", True),
        (400, "XNotImplemented", "x: Not Implemented", True),
        (400, "InvalidArgument", "the name of the bucket", False),
        (400, "AccessDenied", "checksum", False),
        (403, "InvalidArgument", "checksum", False),
        (500, "InvalidArgument", "checksum", False),
    ],
)
def test_a_service_that_does_not_know_a_header_is_recognised(
    status: int, code: str, message: str, refused: bool
) -> None:
    assert refuses(refusal(status, code, message), "checksum|crc32") == refused


def test_an_error_of_our_side_refuses_no_header() -> None:
    assert not refuses(OSError("checksum not supported"), "checksum")


@pytest.mark.parametrize(
    ("error", "shown", "attempts", "throttled"),
    [
        (refusal(503, "SlowDown", "fewer"), "503 SlowDown: fewer", None, True),
        (refusal(429, "Odd"), "429 Odd", None, True),
        (refusal(503, "Odd"), "503 Odd", None, True),
        (refusal(400, "ThrottlingException"), "400 ThrottlingException", None, True),
        (refusal(400, "KMS.ThrottlingException"), "400 KMS.ThrottlingException", None, True),
        (refusal(400, "BadDigest", "md5"), "400 BadDigest: md5", 4, False),
        (refusal(400, "IncompleteBody"), "400 IncompleteBody", 4, False),
        (refusal(400, "RequestExpired"), "400 RequestExpired, and so again after the credentials", 4, False),
        (refusal(500, "InternalError"), "500 InternalError", None, False),
        (refusal(500, "Odd"), "500 Odd", None, False),
        (refusal(502, "Odd"), "502 Odd", None, False),
        (refusal(307, "TemporaryRedirect"), "307", None, False),
        (refusal(408, "Odd"), "408 Odd", None, False),
        (refusal(400, "RequestTimeout"), "400 RequestTimeout", None, False),
        (refusal(409, "ConditionalRequestConflict"), "409 Cond", None, False),
    ],
)
def test_what_may_pass_is_repeated(error: Exception, shown: str, attempts: int | None, throttled: bool) -> None:
    transient = meaning(error)
    assert isinstance(transient, Transient)
    assert str(transient).startswith(shown)
    assert (transient.attempts, transient.throttled, transient.remedy) == (attempts, throttled, None)


@pytest.mark.parametrize(
    ("error", "doing", "message"),
    [
        (refusal(404, "NoSuchBucket"), "reading it", "there is no such bucket; check the name"),
        (refusal(507, "Odd"), "writing it", r"writing it failed \(507 Odd\); free some room"),
        (refusal(400, "XMinioStorageFull"), "writing it", "free some room"),
        (refusal(501, "NotImplemented"), "reading it", r"failed \(501 NotImplemented\); the service refuses"),
        (refusal(403, "AccessDenied", "no"), "reading it", r"was refused \(AccessDenied: no\); check the cred"),
        (refusal(401, "Odd"), "reading it", r"reading it was refused \(Odd\); .*s3:ListBucket.*requester_pays"),
        (refusal(403, "AccessDenied"), "writing it", "permissions; a bucket may also demand encryption"),
        (refusal(403, "AccessDenied"), "starting an upload", "permissions; a bucket may also demand encryption"),
        (refusal(403, "SignatureDoesNotMatch"), "reading it", "the secret key does not belong to this access key"),
        (refusal(301, "PermanentRedirect", Region="eu-west-3"), "reading it", "set storage.s3.region: eu-west-3"),
        (refusal(301, "PermanentRedirect"), "reading it", "check storage.s3.region and endpoint_url"),
        (refusal(301, "301", headers={"x-amz-bucket-region": "eu-west-3"}), "x", "set storage.s3.region: eu-west-3"),
        (refusal(400, "400", headers={"x-amz-bucket-region": "eu-west-3"}), "x", "set storage.s3.region: eu-west-3"),
        (refusal(403, "AccessDenied", headers={"x-amz-bucket-region": "eu-west-3"}), "x", "check the credentials"),
        (refusal(302, "302"), "reading it", "check storage.s3.endpoint_url: it leads elsewhere"),
        (refusal(308, "308"), "reading it", "it leads elsewhere"),
        (refusal(407, "407"), "reading it", "the proxy wants credentials"),
        (refusal(404, "404"), "listing it", "nothing there answers as S3 does"),
        (refusal(404, "404"), "listing uploads", "nothing there answers as S3 does"),
        (refusal(404, "404"), "starting an upload", "nothing there answers as S3 does"),
        (refusal(400, "Odd", "Use VIRTUAL-hosted style"), "reading it", "set storage.s3.addressing: virtual"),
        (refusal(400, "Odd", "a CRC32C is wrong"), "writing it", "take storage.s3.checksums out"),
        (refusal(400, "Odd", "a form of Server Side Encryption"), "reading it", "say in storage.s3.customer_key"),
        (refusal(400, "Odd"), "reading it", "the service refuses this for good"),
    ],
)  # fmt: skip
def test_what_lasts_is_refused_with_advice(error: Exception, doing: str, message: str) -> None:
    refused = meaning(error, doing)
    assert isinstance(refused, InputError)
    with pytest.raises(InputError, match=rf"s3://b/my key: .*{message}"):
        raise refused


def test_a_bucket_without_a_signature_is_refused_with_other_advice() -> None:
    with pytest.raises(InputError, match="takes no anonymous requests"):
        raise meaning(refusal(403, "AccessDenied"), unsigned=True)


def test_an_archived_object_is_refused_with_a_command_that_a_shell_understands() -> None:
    message = r"is archived \(GLACIER\) and can't be read; .*--bucket b --key 'my key' --restore-request Days=7"
    with pytest.raises(InputError, match=message):
        raise meaning(refusal(403, "InvalidObjectState", StorageClass="GLACIER"))
    with pytest.raises(InputError, match=r"is archived \(an archive\)"):
        raise meaning(refusal(403, "InvalidObjectState"))


def test_what_is_missing_or_unmet_keeps_its_kind() -> None:
    assert isinstance(meaning(refusal(404, "NoSuchKey")), FileNotFoundError)
    assert isinstance(meaning(refusal(404, "NoSuchUpload"), "writing part 1"), NoUpload)
    assert isinstance(meaning(refusal(412, "PreconditionFailed"), "writing it"), Unmet)


def test_a_long_message_of_a_service_is_cut() -> None:
    assert len(str(meaning(refusal(400, "Odd", "x" * 100_000)))) < 3_000


# Errors of our side of the wire.


def of_client(error: Exception, cause: Exception | None = None) -> Exception:
    error.__cause__ = cause
    return error


UNKNOWN = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
CONNECT = {"endpoint_url": "http://h"}


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (boto.NoCredentialsError(), "set AWS_ACCESS_KEY_ID"),
        (boto.PartialCredentialsError(provider="env", cred_var="X"), "set AWS_ACCESS_KEY_ID"),
        (boto.ProfileNotFound(profile="nobody"), "set AWS_ACCESS_KEY_ID"),
        (boto.SSOTokenLoadError(error_msg="x"), "log in again"),
        (boto.TokenRetrievalError(provider="sso", error_msg="x"), "log in again"),
        (boto.SSLError(**CONNECT, error="CERTIFICATE has expired"), "certificate must be renewed"),
        (boto.SSLError(**CONNECT, error="is not yet valid"), "certificate must be renewed"),
        (boto.SSLError(**CONNECT, error="Hostname mismatch, certificate"), "name the host as its certificate does"),
        (boto.SSLError(**CONNECT, error="not valid for 'h'"), "name the host as its certificate does"),
        (boto.SSLError(**CONNECT, error="certificate verify failed"), "set storage.s3.ca"),
        (boto.ParamValidationError(report="odd"), "check the URI, storage.s3 and the AWS configuration"),
        (ValueError("Invalid endpoint"), "check the URI, storage.s3 and the AWS configuration"),
    ],
)
@pytest.mark.parametrize("reached", [True, False])
def test_what_no_other_try_mends_is_refused(error: Exception, advice: str, reached: bool) -> None:
    with pytest.raises(InputError, match=rf"(?s)s3://b/my key: reading it failed: .*{advice}"):
        raise meaning(error, reached=reached)


@pytest.mark.parametrize(
    "error",
    [
        boto.EndpointConnectionError(**CONNECT),
        boto.ReadTimeoutError(**CONNECT),
        boto.ProxyConnectionError(proxy_url="p", error="refused"),
        boto.SSLError(**CONNECT, error="EOF occurred"),
        boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        boto.ResponseStreamingError(error="cut"),
        boto.CredentialRetrievalError(provider="role", error_msg="x"),
        urllib3.exceptions.ProtocolError("cut"),
        ConnectionResetError("reset"),
        TimeoutError("slow"),
        ssl.SSLError("odd"),
    ],
)
@pytest.mark.parametrize("reached", [True, False])
def test_a_wire_that_breaks_is_tried_again(error: Exception, reached: bool) -> None:
    transient = meaning(error, reached=reached)
    assert isinstance(transient, Transient)
    assert (transient.attempts, transient.throttled, transient.remedy) == (None, False, None)


@pytest.mark.parametrize(
    ("error", "shown", "remedy"),
    [
        (of_client(boto.EndpointConnectionError(**CONNECT), UNKNOWN), "the name is not known", "check storage.s3.endp"),
        (ResponseParserError("invalid XML"), "invalid XML", "what answers there does not speak S3"),
    ],
)
def test_a_service_that_never_answered_may_be_named_wrong(error: Exception, shown: str, remedy: str) -> None:
    transient = meaning(error, reached=False)
    assert isinstance(transient, Transient)
    assert shown in str(transient)
    assert transient.attempts == 4
    assert remedy in str(transient.remedy)
    again = meaning(error, reached=True)
    assert isinstance(again, Transient)
    assert again.remedy is None


@pytest.mark.parametrize("text", ["WRONG_VERSION_NUMBER", "record layer failure", "unknown_protocol"])
def test_a_service_without_tls_is_told_unless_it_has_answered(text: str) -> None:
    error = boto.SSLError(**CONNECT, error=text)
    with pytest.raises(InputError, match="the service speaks no TLS there: write http://"):
        raise meaning(error, reached=False)
    assert isinstance(meaning(error, reached=True), Transient)


def test_a_defect_of_ours_stays_itself() -> None:
    defect = KeyError("ours")
    assert meaning(defect) is defect
