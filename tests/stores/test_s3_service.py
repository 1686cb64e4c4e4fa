"""Patience with a service of S3, and what it turns out to lack."""

from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from tests.stores.conftest import Clock
from ties_ray.errors import InputError, MergeError, Problem, UnavailableError
from ties_ray.stores import Meter, Stores, _s3_service
from ties_ray.stores._s3_client import S3Options
from ties_ray.stores._s3_service import Service
from ties_ray.stores.s3 import S3

URI = "s3://bucket/x"

pytestmark = pytest.mark.usefixtures("s3_credentials")


def refusal(status: int, code: str, message: str = "", **headers: str) -> ClientError:
    answer: Any = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
    }
    return ClientError(answer, "X")


def made(**options: Any) -> Service:
    return Service(S3Options(endpoint_url="http://127.0.0.1:9", **options), Meter(), [])


class Request:
    """A request that fails with an error, so many times."""

    def __init__(self, error: Exception | None = None, times: int = 1000) -> None:
        self.error, self.left = error, times if error else 0
        self.clients: list[Any] = []
        self.late = 0.0

    def __call__(self, client: Any, late: float) -> str:
        self.clients.append(client)
        self.late = late
        if self.left and self.error:
            self.left -= 1
            raise self.error
        return "done"


def times(service: Service, error: Exception) -> str:
    """Return what a message says of a request that always fails."""
    with pytest.raises(UnavailableError, match=r"s3://bucket/x: doing it failed \d+ times in \d+ s, last: ") as caught:
        service.repeat(URI, "doing it", Request(error), 0)
    return str(caught.value).partition(" failed ")[2].partition(",")[0]


CUT, BROKEN = ConnectionResetError("cut"), refusal(500, "InternalError")


def test_a_service_that_has_answered_is_repeated_for_longer_until_a_call_has_given_up(clock: Clock) -> None:
    service = made()
    soon, late = "7 times in 13 s", "14 times in 115 s"
    assert times(service, CUT) == soon
    assert service.repeat(URI, "doing it", Request(), 0) == "done"
    assert times(service, CUT) == late
    assert times(service, CUT) == soon
    assert times(service, BROKEN) == soon, "a refusal is no success"
    assert service.repeat(URI, "doing it", Request(CUT, 2), 0) == "done"
    assert times(service, CUT) == late
    assert service.meter.retries == 6 + 13 + 6 + 6 + 2 + 13


def test_any_answer_of_a_service_is_one(clock: Clock) -> None:
    assert times(made(), BROKEN) == "14 times in 115 s"
    ours, service = MergeError(Problem(URI, "ours", "x")), made()
    with pytest.raises(MergeError) as caught:
        service.repeat(URI, "doing it", Request(ours), 0)
    assert caught.value is ours
    assert times(service, CUT) == "14 times in 115 s"


def test_what_does_not_speak_s3_is_given_up_unless_it_has_answered(clock: Clock) -> None:
    odd, service = ResponseParserError("no XML"), made()
    with pytest.raises(InputError, match=r"failed 4 times .* what answers there does not speak S3"):
        service.repeat(URI, "doing it", Request(odd), 0)
    service.repeat(URI, "doing it", Request(), 0)
    assert times(service, odd).startswith("4 times")


def test_a_transfer_may_take_a_minute_and_the_time_of_its_bytes(clock: Clock) -> None:
    request = Request()
    made().repeat(URI, "doing it", request, 10 << 18)
    assert request.late == 1000 + 60 + 10


def test_after_refusals_for_too_many_requests_the_next_call_waits(clock: Clock) -> None:
    service = made()
    service.repeat(URI, "doing it", Request(refusal(503, "SlowDown"), 4), 0)
    started = clock.now
    service.repeat("s3://other/y", "doing it", Request(), 0)
    assert clock.now > started


def test_expired_credentials_are_looked_up_anew_at_each_try(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    service, expired = made(), refusal(400, "ExpiredToken", "too old")
    request = Request(expired, 2)
    assert service.repeat(URI, "doing it", request, 0) == "done"
    assert len({id(client) for client in request.clients}) == 3
    request = Request(expired)
    with pytest.raises(InputError, match=r"failed 4 times .*400 ExpiredToken: .* and so again .*; get new cred"):
        service.repeat(URI, "doing it", request, 0)
    assert len(request.clients) == 4
    monkeypatch.setattr(_s3_service, "_STATIC", ())  # as those of a role, which renew themselves
    assert times(service, expired).startswith("4 times")


def test_one_connection_serves_all_signed_requests_and_another_the_unsigned(clock: Clock) -> None:
    service, request = made(anonymous=("public",)), Request()
    for uri in (URI, "s3://other/x", "s3://public/x", "s3://public/y"):
        service.repeat(uri, "doing it", request, 0)
    first, second, third, fourth = request.clients
    assert first is second is not third
    assert third is fourth
    with pytest.raises(InputError, match="takes no anonymous requests"):
        service.repeat("s3://public/x", "doing it", Request(refusal(403, "AccessDenied")), 0)
    with pytest.raises(InputError, match="check the credentials and their permissions"):
        service.repeat(URI, "doing it", Request(refusal(403, "AccessDenied")), 0)


DATE = "Sun, 01 Jan 2040 00:00:00 GMT"


def test_a_signature_of_another_time_is_made_anew_by_the_time_of_the_service(clock: Clock) -> None:
    service = made()
    skewed = refusal(403, "RequestTimeTooSkewed", "too different", date=DATE)
    assert service.repeat(URI, "doing it", Request(skewed, 1), 0) == "done"
    assert service.meter.retries == 1
    (note,) = service._notes
    assert "behind the service's; requests are signed by the service's time" in note
    request = Request(skewed)
    with pytest.raises(InputError, match=r"failed 4 times .*; set the clock of this machine, and of every node"):
        service.repeat(URI, "doing it", request, 0)
    timeless, request = refusal(403, "RequestTimeTooSkewed", "too different"), Request()
    with pytest.raises(InputError, match=r"doing it was refused .*; set the clock of this machine"):
        service.repeat(URI, "doing it", Request(timeless), 0)
    dated = Request(refusal(500, "InternalError", date=DATE), 1)
    before = len(service._notes)
    service.repeat(URI, "doing it", dated, 0)
    assert len(service._notes) == before


@pytest.mark.parametrize(
    ("options", "crc"),
    [
        ({"region": "us-east-1"}, True),  # AWS, which knows CRC32C
        ({"region": "us-east-1", "checksums": "when_required"}, False),
        ({"endpoint_url": "http://127.0.0.1:9"}, False),
        ({"endpoint_url": "http://127.0.0.1:9", "checksums": "when_supported"}, True),
        ({"endpoint_url": "http://127.0.0.1:9", "checksums": "when_required"}, False),
    ],
)
def test_crc32c_proves_what_is_written_to_aws_or_where_it_is_asked_for(
    options: dict[str, object], crc: bool, s3_credentials: None
) -> None:
    store = Stores({"s3": options}).of(URI)
    assert isinstance(store, S3)
    assert store.service.crc is None
    store.service.connected(URI)
    assert store.service.crc == crc


def asking(service: Service, error: Exception | None, operation: str) -> Callable[..., Any]:
    """Replace the client's operation by one that fails, or returns its arguments."""

    def operate(**arguments: Any) -> Any:
        if error:
            raise error
        return arguments

    setattr(service.connected(URI).client, operation, operate)
    return operate


def test_a_list_that_a_service_does_not_know_is_empty_and_noted_once(clock: Clock) -> None:
    service = made()
    asking(service, refusal(501, "NotImplemented"), "list_parts")
    for _ in range(2):
        assert service.ask_upload(URI, "listing parts", "list_parts", "u") == {}
    assert service._notes == ["s3://: the service can't do list_parts; uploads that a kill leaves behind stay there"]
    for operation, error in (("delete_object", refusal(501, "NotImplemented")), ("list_parts", refusal(400, "Odd"))):
        asking(service, error, operation)
        with pytest.raises(InputError, match="the service refuses this for good"):
            service.ask(URI, "asking it", operation)
    asking(service, refusal(404, "NoSuchUpload"), "list_parts")
    assert service.ask_upload(URI, "listing parts", "list_parts", "u") is None


def test_a_request_about_an_upload_names_it_and_who_pays(clock: Clock) -> None:
    plain, paying = made(), made(requester_pays=True)
    for service in (plain, paying):
        asking(service, None, "list_parts")
    where = {"Bucket": "bucket", "Key": "x", "UploadId": "u", "PartNumberMarker": 3}
    assert plain.ask_upload(URI, "listing", "list_parts", "u", PartNumberMarker=3) == where
    assert paying.ask_upload(URI, "listing", "list_parts", "u", PartNumberMarker=3) == {
        **where, "RequestPayer": "requester",
    }  # fmt: skip


def test_certificates_that_are_not_there_are_told_at_the_start(tmp_path: Any) -> None:
    with pytest.raises(InputError, match=r"storage\.s3\.ca: there is no file .*nothing; every worker needs it"):
        made(ca=f"{tmp_path}/nothing")
    (tmp_path / "ca.pem").touch()
    made(ca=f"{tmp_path}/ca.pem")
