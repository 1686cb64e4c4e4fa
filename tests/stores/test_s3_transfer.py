"""Bytes from and to a service of S3 whose ETags, checksums and refusals are odd."""

import base64
import hashlib
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from tests.tools.odd_service import DATA, Answer, Misbehaving, answer, misbehaving, ranged
from ties_ray import runtime
from ties_ray.errors import InputError, UnavailableError
from ties_ray.stores import Part, crc32c
from ties_ray.stores._s3_transfer import Body, demand_time

CRC = base64.b64encode(bytes.fromhex(crc32c(memoryview(DATA)))).decode()
DAMAGED = "failed 4 times .*: other bytes arrived than were sent"


@pytest.fixture
def odd(s3_credentials: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Misbehaving]:
    monkeypatch.setattr(runtime, "sleep", lambda seconds: None)
    with misbehaving() as state:
        yield state


def taking(etag: str = "", **headers: str) -> Answer:
    """Return the answer to a write: its MD5 as the ETag, or the given one."""

    def take(request: BaseHTTPRequestHandler, data: bytes) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        answer(request, 200, b"", ETag=f'"{etag or hashlib.md5(body).hexdigest()}"', **headers)

    return take


def holding(content: bytes, etag: str = "odd", **headers: str) -> Answer:
    """Return the answer to a read of an object without a range."""
    return lambda request, data: answer(request, 200, content, ETag=f'"{etag}"', **headers)


def refusing(status: int, code: str, message: str = "") -> Answer:
    def refuse(request: BaseHTTPRequestHandler, data: bytes) -> None:
        request.rfile.read(int(request.headers.get("Content-Length", 0)))
        answer(request, status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())

    return refuse


KMS = {"x-amz-server-side-encryption": "aws:kms"}
UNDER_KEY = {"x-amz-server-side-encryption-customer-algorithm": "AES256"}


def verbs(odd: Misbehaving) -> str:
    """Return the requests so far: r for a read, w for a write."""
    return "".join("w" if "Content-MD5" in headers or "x-amz-checksum-crc32c" in headers else "r"
                   for _, headers in odd.requests)  # fmt: skip


def part(odd: Misbehaving, store: object = None, number: int = 1) -> Part:
    return (store or odd.store()).write_part(f"{odd.uri}/x", "u", number, 0, memoryview(DATA))  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("headers", [{}, KMS, UNDER_KEY, {"x-amz-server-side-encryption": "AES256"}])
def test_an_etag_that_is_no_md5_is_the_services_way_if_the_object_is_read_back_right(
    headers: dict[str, str], odd: Misbehaving
) -> None:
    store = odd.store()
    odd.answers = [taking("odd", **headers), holding(DATA), taking("odd", **headers)]
    assert store.put(f"{odd.uri}/x", DATA).etag == store.put(f"{odd.uri}/x", DATA).etag == "odd"
    assert verbs(odd) == "wrw", "it is known by then"
    assert store.meter.bytes_written == 2 * len(DATA)
    odd.answers = [taking("odd", **headers)]
    assert part(odd, store).etag == "odd"
    assert store.meter.retries == 0


@pytest.mark.parametrize("content", [DATA[:-1], DATA[::-1], DATA + b"x", b""])
def test_an_object_that_is_read_back_wrong_is_damaged(content: bytes, odd: Misbehaving) -> None:
    odd.answers = [taking("odd"), holding(content)] * 4
    with pytest.raises(UnavailableError, match=DAMAGED):
        odd.store().put(f"{odd.uri}/x", DATA)
    assert verbs(odd) == "wr" * 4


@pytest.mark.parametrize("how", ["written", "read whole", "part"])
def test_once_an_etag_was_the_md5_another_one_is_damage(how: str, odd: Misbehaving) -> None:
    store = odd.store()
    if how == "written":
        odd.answers = [taking()]
        store.put(f"{odd.uri}/x", DATA)
    elif how == "part":
        odd.answers = [taking()]
        part(odd, store)
    else:
        md5 = hashlib.md5(DATA).hexdigest()
        odd.answers = [lambda request, data: ranged(request, DATA, f"bytes 0-{len(DATA) - 1}/{len(DATA)}", etag=md5)]
        assert store.get(f"{odd.uri}/x", len(DATA))[1] == DATA
    odd.requests.clear()
    odd.answers = [taking("odd")] * 4
    with pytest.raises(UnavailableError, match=rf"{DAMAGED}: odd, not [0-9a-f]{{32}}"):
        part(odd, store)
    assert verbs(odd) == "wwww"
    odd.answers = [taking("odd"), taking()]
    assert part(odd, store).etag == hashlib.md5(DATA).hexdigest()
    odd.answers = [taking("odd", **KMS), holding(DATA)]
    store.put(f"{odd.uri}/x", DATA)  # what a key encrypts is another matter


def test_an_etag_of_another_object_says_nothing_about_the_etags_of_a_service(odd: Misbehaving) -> None:
    store = odd.store()
    odd.answers = [lambda request, data: ranged(request, DATA, f"bytes 0-{len(DATA) - 1}/{len(DATA)}")]
    store.get(f"{odd.uri}/x", len(DATA))
    odd.answers = [taking("odd")] * 3
    assert part(odd, store).etag == "odd"


def test_of_a_part_the_third_answer_is_believed_and_then_the_first(odd: Misbehaving) -> None:
    store = odd.store()
    odd.answers = [taking("odd")] * 4
    assert part(odd, store) == Part(1, len(DATA), "odd", hashlib.md5(DATA).hexdigest())
    assert (verbs(odd), store.meter.retries) == ("www", 2)
    part(odd, store, 2)
    assert verbs(odd) == "wwww"


def test_a_checksum_that_the_service_gives_back_is_compared(odd: Misbehaving) -> None:
    store = odd.store(checksums="when_supported")
    odd.answers = [taking("odd", **{"x-amz-checksum-crc32c": CRC}), taking("odd")]
    assert part(odd, store) == part(odd, store) == Part(1, len(DATA), "odd", CRC)
    assert odd.requests[0][1]["x-amz-checksum-crc32c"] == CRC
    odd.requests.clear()
    odd.answers = [taking(**{"x-amz-checksum-crc32c": "AAAAAA=="})] * 4
    with pytest.raises(UnavailableError, match=rf"{DAMAGED}: AAAAAA==, not {CRC}"):
        part(odd, store)
    assert verbs(odd) == "wwww"


def test_a_refused_checksum_is_replaced_by_md5_only_where_nobody_asked_for_it(
    odd: Misbehaving, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = refusing(400, "InvalidArgument", "Unsupported header x-amz-checksum-crc32c")
    asked = odd.store(checksums="when_supported")
    odd.answers = [unknown]
    with pytest.raises(InputError, match=r"set it to when_required"):
        part(odd, asked)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    store = odd.store()
    odd.answers = [unknown, taking(), taking()]
    assert part(odd, store).checksum == hashlib.md5(DATA).hexdigest()
    part(odd, store)
    assert ["Content-MD5" in headers for _, headers in odd.requests] == [False, False, True, True]
    assert store.notes == ["s3://: the service refuses CRC32C checksums; Content-MD5 proves what is written instead"]
    odd.answers = [refusing(400, "InvalidArgument", "the name is wrong")]
    with pytest.raises(InputError, match="the name is wrong"):
        part(odd, odd.store())


def test_only_a_request_with_a_condition_can_have_it_refused(odd: Misbehaving) -> None:
    unknown, store = refusing(501, "NotImplemented", "If-None-Match"), odd.store()
    odd.answers = [unknown]
    with pytest.raises(InputError, match="the service refuses this for good"):
        store.put(f"{odd.uri}/x", DATA)
    odd.answers = [refusing(404, "NoSuchKey"), unknown, taking(), holding(DATA)]
    odd.answers[-1] = lambda request, data: ranged(request, DATA, f"bytes 0-{len(DATA) - 1}/{len(DATA)}")
    assert store.swap(f"{odd.uri}/x", DATA, "")
    assert "keeps no If-None-Match" in store.notes[0]


def test_the_key_of_a_customer_is_left_out_for_a_bucket_whose_objects_have_none(
    odd: Misbehaving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K", base64.b64encode(b"k" * 32).decode())
    store, other = odd.store(customer_key="env:K"), refusing(400, "InvalidRequest", "encryption parameters")

    def keys() -> list[bool]:
        return ["x-amz-server-side-encryption-customer-key" in headers for _, headers in odd.requests]

    assert odd.read(0, 10, store) == DATA[:10]
    odd.answers = [other]
    assert odd.read(0, 10, store) == odd.read(0, 10, store) == DATA[:10]
    assert keys() == [True, True, False, False]
    assert store.meter.requests == 4
    odd.answers = [other]
    assert odd.read(0, 10, store) == odd.read(0, 10, store) == DATA[:10]
    assert keys()[4:] == [False, True, True]
    odd.answers = [refusing(403, "AccessDenied")]
    with pytest.raises(InputError, match="AccessDenied"):
        odd.read(0, 10, store)
    assert len(keys()) == 8
    odd.answers, plain = [other], odd.store()
    with pytest.raises(InputError, match=r"say in storage\.s3\.customer_key"):
        odd.read(0, 10, plain)
    assert (keys()[8:], plain.meter.requests) == ([False], 1)


def test_what_came_is_counted_and_a_connection_serves_again(odd: Misbehaving) -> None:
    store = odd.store()

    def cut(request: BaseHTTPRequestHandler, data: bytes) -> None:
        ranged(request, data[:60], f"bytes 0-99/{len(data)}", announced=100)

    odd.answers = [cut]
    for _ in range(3):
        assert odd.read(0, 100, store) == DATA[:100]
    assert (store.meter.bytes_read, store.meter.requests, store.meter.retries) == (360, 4, 1)
    assert len(odd.connections) == 2


def test_a_body_is_a_file_that_is_read_in_large_pieces() -> None:
    data = memoryview(bytes(3 << 20))
    body = Body(data, late=time.monotonic() + 100)
    assert (len(body), body.tell()) == (3 << 20, 0)
    assert len(body.read(16_384)) == 1 << 20, "a socket may take more than urllib3 asks for"
    assert len(body.read((1 << 20) + 1)) == (1 << 20) + 1
    assert body.tell() == (2 << 20) + 1
    assert len(body.read(1 << 21)) == (1 << 20) - 1
    assert len(body.read()) == 0
    assert (body.seek(0), len(body.read())) == (0, 3 << 20)
    assert (body.seek(-5, 2), body.seek(2, 1), body.tell()) == ((3 << 20) - 5, (3 << 20) - 3, (3 << 20) - 3)
    assert len(body.read(0)) == 3
    assert body.seek(7) == 7
    with pytest.raises(TimeoutError, match="fewer than 262,144 bytes a second"):
        Body(data, late=time.monotonic() - 1).read(1)


def test_a_transfer_is_late_after_its_time_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "monotonic", lambda: 10.0)
    demand_time(10.0)
    with pytest.raises(TimeoutError):
        demand_time(9.9)
