import hashlib
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import botocore.auth
import pytest
import trustme

from tests.conftest import Bucket, free_port, served, tool
from tests.tools.odd_service import DATA, Answer, Misbehaving, answer, asked, good, misbehaving, ranged
from ties_ray.errors import InputError, UnavailableError
from ties_ray.stores import Listing, Part, Store, Stores, _s3_clock, _s3_service, join
from ties_ray.stores.s3 import S3
from ties_ray.testing import StoreContract

PART = 5 << 20


class TestS3(StoreContract):
    test_a_part_of_an_unknown_upload_is_refused = None  # type: ignore[assignment]  # moto 5.2.5 answers 500

    @pytest.fixture
    def place(self, s3_bucket: Bucket) -> tuple[Store, str]:
        return Stores(s3_bucket.storage).of(s3_bucket.uri), join(s3_bucket.uri, "folder")


class TestS3WithChecksums(StoreContract):
    test_a_part_of_an_unknown_upload_is_refused = None  # type: ignore[assignment]  # moto 5.2.5 answers 500

    @pytest.fixture
    def place(self, s3_bucket: Bucket) -> tuple[Store, str]:
        storage = {"s3": {**s3_bucket.storage["s3"], "checksums": "when_supported"}}
        return Stores(storage).of(s3_bucket.uri), join(s3_bucket.uri, "folder")


class TestJuiceFS(StoreContract):
    @pytest.fixture
    def place(self, juicefs_bucket: Bucket) -> tuple[Store, str]:
        return Stores(juicefs_bucket.storage).of(juicefs_bucket.uri), join(juicefs_bucket.uri, "folder")


def opened(bucket: Bucket, **options: object) -> S3:
    store = Stores({"s3": {**bucket.storage["s3"], **options}}).of(bucket.uri)
    assert isinstance(store, S3)
    return store


def test_a_folder_of_more_keys_than_a_page_is_listed_whole(s3_bucket: Bucket) -> None:
    store = opened(s3_bucket)
    names = [f"{number:04}" for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        pins = list(pool.map(lambda name: store.put(f"{s3_bucket.uri}/m/{name}", name.encode()), names))
    store.put(f"{s3_bucket.uri}/m/z/deeper", b"")
    found = store.list(f"{s3_bucket.uri}/m")
    assert found == Listing(tuple(pins), (f"{s3_bucket.uri}/m/z",))
    assert store.list(s3_bucket.uri) == Listing((), (f"{s3_bucket.uri}/m",))


def test_a_folder_marker_is_no_file(s3_bucket: Bucket) -> None:
    store = opened(s3_bucket)
    store.put(f"{s3_bucket.uri}/m/", b"")
    assert store.list(f"{s3_bucket.uri}/m") == Listing((), ())


def test_a_version_is_pinned_and_still_read_after_an_overwrite(s3_bucket: Bucket) -> None:
    client = boto3.client("s3", endpoint_url=s3_bucket.storage["s3"]["endpoint_url"], region_name="us-east-1")
    name = s3_bucket.uri.removeprefix("s3://")
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    store = opened(s3_bucket)
    pin = store.put(f"{s3_bucket.uri}/x", b"old")
    assert pin.version
    assert store.head(pin.uri, 3) == (pin, b"old")
    store.put(pin.uri, b"new")
    buffer = bytearray(3)
    store.read(pin, 0, memoryview(buffer))
    assert buffer == b"old"


def test_the_etag_of_a_joined_object_is_predicted(s3_bucket: Bucket) -> None:
    store, uri = opened(s3_bucket), f"{s3_bucket.uri}/x"
    data = bytes(PART) + b"end"
    upload = store.begin_upload(uri, len(data))
    parts = [_write(store, uri, upload, number, data) for number in (1, 2)]
    digests = [hashlib.md5(data[:PART]), hashlib.md5(data[PART:])]
    assert [part.etag for part in parts] == [digest.hexdigest() for digest in digests]
    joined = hashlib.md5(b"".join(digest.digest() for digest in digests)).hexdigest()
    assert store.complete_upload(uri, upload, parts).etag == f"{joined}-2"


def test_several_processes_write_one_object(s3_bucket: Bucket) -> None:
    store, uri = opened(s3_bucket), f"{s3_bucket.uri}/x"
    data = bytes(range(251)) * (3 * PART // 251)
    upload = store.begin_upload(uri, len(data))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.starmap(_write_elsewhere, [(s3_bucket, uri, upload, number) for number in (3, 1, 2)])
    pin = store.complete_upload(uri, upload, parts)
    assert store.get(uri, len(data)) == (pin, data)


def _write_elsewhere(bucket: Bucket, uri: str, upload: str, number: int) -> Part:
    return _write(opened(bucket), uri, upload, number, bytes(range(251)) * (3 * PART // 251))


def _write(store: Store, uri: str, upload: str, number: int, data: bytes) -> Part:
    start = (number - 1) * PART
    return store.write_part(uri, upload, number, start, memoryview(data)[start : start + PART])


def test_what_is_written_is_encrypted_with_the_key_that_was_asked_for(s3_bucket: Bucket) -> None:
    store = opened(s3_bucket, kms_key_id="alias/models")
    pin = store.put(f"{s3_bucket.uri}/small", b"x")
    assert store.get(pin.uri, 10) == (pin, b"x")
    uri = f"{s3_bucket.uri}/large"
    upload = store.begin_upload(uri, 3)
    store.complete_upload(uri, upload, [_write(store, uri, upload, 1, b"abc")])
    client = boto3.client("s3", endpoint_url=s3_bucket.storage["s3"]["endpoint_url"], region_name="us-east-1")
    for key in ("small", "large"):
        found = client.head_object(Bucket=s3_bucket.uri.removeprefix("s3://"), Key=key)
        assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", "alias/models")


def test_a_missing_bucket_is_an_input_error(s3_bucket: Bucket) -> None:
    store = opened(s3_bucket)
    with pytest.raises(InputError, match="s3://no-such-bucket/x: there is no such bucket"):
        store.head("s3://no-such-bucket/x", 1)
    with pytest.raises(InputError, match="there is no such bucket"):
        store.list("s3://no-such-bucket/folder")
    with pytest.raises(InputError, match="names no object"):
        store.head(s3_bucket.uri, 1)


def test_a_wrong_secret_is_an_input_error_and_is_not_tried_again(
    juicefs_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "0123abcd")
    store = opened(juicefs_bucket)
    with pytest.raises(
        InputError, match=r"/x: reading .* was refused \(SignatureDoesNotMatch.*check the cred"
    ) as caught:
        store.head(f"{juicefs_bucket.uri}/x", 1)
    assert "0123abcd" not in str(caught.value)
    assert store.meter.retries == 0


def test_missing_credentials_are_an_input_error(s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InputError, match=r"Unable to locate credentials; set AWS_ACCESS_KEY_ID"):
        opened(s3_bucket).head(f"{s3_bucket.uri}/x", 1)
    with pytest.raises(InputError, match=r"profile \(nobody\) could not be found"):
        opened(s3_bucket, profile="nobody").head(f"{s3_bucket.uri}/x", 1)


def test_an_endpoint_that_nobody_serves_is_unavailable(s3_credentials: None) -> None:
    store = opened(Bucket("s3://bucket", {"s3": {"endpoint_url": f"http://127.0.0.1:{free_port()}"}}))
    store.service.first_patience = 3.0
    with pytest.raises(UnavailableError, match=r"s3://bucket/x: reading .* failed \d+ times.*Could not connect"):
        store.head("s3://bucket/x", 1)
    assert store.meter.retries > 0


def test_a_private_certificate_authority_is_trusted_where_the_recipe_names_it(
    s3_credentials: None, tmp_path: Path
) -> None:
    authority, port = trustme.CA(), free_port()
    authority.cert_pem.write_to_path(f"{tmp_path}/ca.pem")
    server = authority.issue_cert("localhost")
    server.private_key_and_cert_chain_pem.write_to_path(f"{tmp_path}/server.pem")
    endpoint = f"https://localhost:{port}"
    command = [tool("moto_server"), "-H", "localhost", "-p", str(port), "-s", "-c", f"{tmp_path}/server.pem"]
    with served([*command, "-k", f"{tmp_path}/server.pem"], port):
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", verify=f"{tmp_path}/ca.pem")
        client.create_bucket(Bucket="bucket")
        bucket = Bucket("s3://bucket", {"s3": {"endpoint_url": endpoint}})
        store = opened(bucket, ca=f"{tmp_path}/ca.pem")
        pin = store.put("s3://bucket/x", b"0123")
        assert store.get("s3://bucket/x", 4) == (pin, b"0123")
        uri, upload = "s3://bucket/y", store.begin_upload("s3://bucket/y", PART + 3)
        store.complete_upload(uri, upload, [_write(store, uri, upload, n, bytes(PART + 3)) for n in (1, 2)])
        with pytest.raises(InputError, match=r"CERTIFICATE_VERIFY_FAILED.*set storage.s3.ca"):
            opened(bucket).head("s3://bucket/x", 1)
    with pytest.raises(InputError, match="there is no file"):
        opened(bucket, ca=f"{tmp_path}/nothing.pem")


def test_bytes_go_from_the_socket_into_the_callers_memory_and_back_without_another_copy(s3_bucket: Bucket) -> None:
    store, uri, data = opened(s3_bucket), f"{s3_bucket.uri}/x", os.urandom(3 * PART)
    pin, upload, found = store.put(uri, data), store.begin_upload(uri, len(data)), bytearray(len(data))
    tracemalloc.start()
    try:
        store.read(pin, 0, memoryview(found))
        store.write_part(uri, upload, 1, 0, memoryview(data))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == data
    assert peak < 1 << 20


# A server that misbehaves as told, where the servers above don't.


@pytest.fixture
def odd(s3_credentials: None) -> Iterator[Misbehaving]:
    with misbehaving() as state:
        yield state


def slow_down(request: BaseHTTPRequestHandler, data: bytes) -> None:
    answer(request, 503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>")


def cut(request: BaseHTTPRequestHandler, data: bytes) -> None:
    start, stop = asked(request)
    headers = {"ETag": '"mark"', "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
    answer(request, 206, data[start : (start + stop) // 2], announced=stop - start, **headers)


def hang_up(request: BaseHTTPRequestHandler, data: bytes) -> None:
    request.close_connection = True


def half(request: BaseHTTPRequestHandler, data: bytes) -> None:
    start, stop = asked(request)
    middle = (start + stop) // 2
    ranged(request, data[start:middle], f"bytes {start}-{middle - 1}/{len(data)}")


def whole(request: BaseHTTPRequestHandler, data: bytes) -> None:
    answer(request, 200, data, ETag='"mark"')


def shifted(request: BaseHTTPRequestHandler, data: bytes) -> None:
    start, stop = asked(request)
    ranged(request, data[start + 1 : stop + 1], f"bytes {start + 1}-{stop}/{len(data)}")


def another(request: BaseHTTPRequestHandler, data: bytes) -> None:
    start, stop = asked(request)
    ranged(request, data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}", etag="other")


def trickle(request: BaseHTTPRequestHandler, data: bytes) -> None:
    start, stop = asked(request)
    ranged(request, b"", f"bytes {start}-{stop - 1}/{len(data)}", announced=stop - start)
    for at in range(start, stop, 100):
        request.wfile.write(data[at : min(at + 100, stop)])
        time.sleep(0.05)


def sip(request: BaseHTTPRequestHandler, data: bytes) -> None:
    with suppress(ConnectionError):
        while request.rfile.read(1 << 16):
            time.sleep(0.05)
    request.close_connection = True


def take(request: BaseHTTPRequestHandler, data: bytes) -> None:
    body = request.rfile.read(int(request.headers["Content-Length"]))
    answer(request, 200, b"", ETag=f'"{hashlib.md5(body).hexdigest()}"')


def login(request: BaseHTTPRequestHandler, data: bytes) -> None:
    answer(request, 407, b"")


def no_versions(request: BaseHTTPRequestHandler, data: bytes) -> None:
    assert "versionId=7" in request.path
    answer(request, 403, b"<Error><Code>AccessDenied</Code><Message>s3:GetObjectVersion</Message></Error>")


@pytest.mark.parametrize("faults", [[slow_down, slow_down], [cut], [cut, slow_down, cut], [half], [whole], [shifted]])
def test_a_fault_that_passes_is_read_over(odd: Misbehaving, faults: list[Answer]) -> None:
    odd.answers = list(faults)
    store = odd.store()
    assert odd.read(1000, 9000, store) == DATA[1000:9000]
    assert len(odd.requests) == store.meter.requests == len(faults) + 1
    assert store.meter.retries == len(faults)


def test_a_connection_closed_without_an_answer_is_opened_again(odd: Misbehaving) -> None:
    odd.answers = [hang_up, hang_up]
    store = odd.store()
    assert odd.read(1000, 9000, store) == DATA[1000:9000]
    assert len(odd.requests) == 3
    assert store.meter.retries == 2  # nothing below asks once more by itself


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (half, "asked for bytes 1000-8999/16384, got status 206 with bytes 1000-4999/16384 and 4000 bytes"),
        (whole, "asked for bytes 1000-8999/16384, got status 200 with no Content-Range and 16384 bytes"),
        (shifted, "got status 206 with bytes 1001-9000/16384"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_given_up_soon(odd: Misbehaving, fault: Answer, found: str) -> None:
    odd.answers = [fault] * 100
    with pytest.raises(UnavailableError, match=rf"s3://bucket/x: reading bytes 1,000 to 9,000 failed 4 times.*{found}"):
        odd.read(1000, 9000)
    assert len(odd.requests) == 4


def test_a_throttle_that_lasts_is_given_up_when_patience_ends(odd: Misbehaving) -> None:
    odd.answers = [slow_down] * 1000
    store = odd.store()
    store.service.patience = 1.5
    with pytest.raises(UnavailableError, match=r"bytes 0 to 10 failed \d+ times in \d s, last: 503 SlowDown"):
        odd.read(0, 10, store)
    assert len(odd.requests) == store.meter.requests
    # The last retry may have been held back by the throttle until patience ended.
    assert store.meter.retries in (len(odd.requests) - 1, len(odd.requests))


def test_another_content_is_refused_even_where_if_match_is_ignored(odd: Misbehaving) -> None:
    odd.answers = [another]
    with pytest.raises(InputError, match="changed since the plan was made: ETag mark, now other"):
        odd.read(0, 10)
    assert len(odd.requests) == 1


def test_sixteen_threads_have_their_requests_under_way_at_once(odd: Misbehaving) -> None:
    all_there = threading.Barrier(16)

    def wait_for_all(request: BaseHTTPRequestHandler, data: bytes) -> None:
        all_there.wait(60)  # a request that came alone would find the barrier broken, and no answer
        good(request, data)

    odd.answers = [wait_for_all] * 16
    store = odd.store()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda start: odd.read(start, start + 1000, store), range(16)))
    assert found == [DATA[start : start + 1000] for start in range(16)]
    assert (len(odd.connections), store.meter.retries) == (16, 0)


def test_a_connection_serves_request_after_request_until_an_answer_was_cut(odd: Misbehaving) -> None:
    store = odd.store()
    for _ in range(10):
        assert odd.read(0, len(DATA), store) == DATA
    assert len(odd.connections) == 1
    odd.answers = [cut]
    for _ in range(10):
        assert odd.read(100, 9000, store) == DATA[100:9000]
    assert len(odd.connections) == 2


def test_an_answer_that_trickles_is_given_up_though_it_never_falls_silent(
    odd: Misbehaving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_s3_service, "GRACE", 0.5)
    odd.answers = [trickle]
    store, started = odd.store(), time.monotonic()
    assert odd.read(0, len(DATA), store) == DATA
    assert (len(odd.requests), store.meter.retries) == (2, 1)
    assert time.monotonic() - started < 0.05 * len(DATA) / 100


def test_a_part_that_is_taken_in_sips_is_sent_again(odd: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_service, "GRACE", 0.5)
    monkeypatch.setattr(_s3_service, "LEAST_RATE", 1 << 26)
    odd.answers = [sip, take]
    store, data, started = odd.store(), os.urandom(6 * PART), time.monotonic()  # more than the sockets hold
    part = store.write_part(f"{odd.uri}/x", "upload", 1, 0, memoryview(data))
    assert part.etag == hashlib.md5(data).hexdigest()
    assert (len(odd.requests), len(odd.connections), store.meter.retries) == (2, 2, 1)
    assert time.monotonic() - started < 0.05 * len(data) / (1 << 16)


def test_a_whole_object_may_come_as_200(odd: Misbehaving) -> None:
    odd.answers = [whole]
    assert odd.read(0, len(DATA)) == DATA
    odd.answers = [whole, whole]
    store = odd.store()
    assert store.head(f"{odd.uri}/x", 20_000) == (odd.pin, DATA)
    store.service.first_patience = store.service.patience = 60
    odd.answers = [whole] * 4
    with pytest.raises(UnavailableError, match="asked for bytes 0-99, got status 200"):
        store.head(f"{odd.uri}/x", 100)


def test_if_match_is_always_sent_and_options_reach_the_wire(odd: Misbehaving) -> None:
    assert odd.read(0, 10, odd.store(requester_pays=True, addressing="path")) == DATA[:10]
    ((path, headers),) = odd.requests
    assert path == "/bucket/x"
    assert (headers["If-Match"], headers["Range"], headers["x-amz-request-payer"]) == (
        '"mark"',
        "bytes=0-9",
        "requester",
    )


def test_a_proxy_is_used(odd: Misbehaving) -> None:
    proxy = odd.storage["s3"]["endpoint_url"]
    odd.storage = {"s3": {"endpoint_url": "http://storage.example"}}
    assert odd.read(0, 10, odd.store(proxy=proxy, addressing="virtual")) == DATA[:10]
    assert odd.requests[0][0] == "http://bucket.storage.example/x"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_credentials_is_told(scheme: str, odd: Misbehaving) -> None:
    proxy = odd.storage["s3"]["endpoint_url"]
    odd.storage, odd.answers = {"s3": {"endpoint_url": f"{scheme}://storage.example"}}, [login]
    with pytest.raises(InputError, match=r"the proxy wants credentials: check storage\.s3\.proxy or HTTPS_PROXY"):
        odd.read(0, 10, odd.store(proxy=proxy))
    assert len(odd.requests) == 1


def test_a_role_without_access_to_versions_reads_by_etag(odd: Misbehaving) -> None:
    odd.answers = [no_versions]
    store, buffer = odd.store(), bytearray(10)
    for _ in range(2):
        store.read(odd.pin._replace(version="7"), 0, memoryview(buffer))
    assert buffer == DATA[:10]
    assert ["versionId" in path for path, _ in odd.requests] == [True, False, False]


def test_importing_the_store_imports_no_client() -> None:
    code = "import sys, ties_ray.stores.s3; sys.exit(any(name in sys.modules for name in ('botocore', 'urllib3')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("seconds", [-7200, 7200])
def test_a_machine_whose_clock_is_wrong_signs_by_the_services(
    seconds: int, juicefs_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time

    def wrong() -> datetime:
        return datetime.fromtimestamp(now() + seconds, UTC).replace(tzinfo=None)

    if hasattr(botocore.auth, "get_current_datetime"):
        monkeypatch.setattr("botocore.auth.get_current_datetime", wrong)
    else:  # as older versions tell the time
        late = type("Late", (datetime,), {"utcnow": staticmethod(wrong)})
        monkeypatch.setattr("botocore.auth.datetime", SimpleNamespace(datetime=late))
    monkeypatch.setattr(_s3_clock, "time", SimpleNamespace(**vars(time) | {"time": lambda: now() + seconds}))
    stores = Stores(juicefs_bucket.storage)
    store, uri = stores.of(juicefs_bucket.uri), f"{juicefs_bucket.uri}/clock"
    assert isinstance(store, S3)
    pin = store.put(uri, b"data")
    data = bytearray(4)
    store.read(pin, 0, memoryview(data))
    assert data == b"data"
    side = "ahead of" if seconds > 0 else "behind"
    wanted = rf"the clock of {re.escape(socket.gethostname())} is 7,(199|200|201) s {side} the service's"
    assert re.search(wanted, "".join(store.notes))
    assert store.meter.retries == 1


# Folders beside each other.


def test_folders_beside_each_other_are_listed_together_as_each_is_alone(
    s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(s3_bucket)
    uris = [f"{s3_bucket.uri}/pool/{name}" for name in ("a", "a-b", "a.b", *"bcdefgh", "é")]
    for uri in uris:
        for name in ("x", "y/z", "y/w/v", "_$folder$"):
            store.put(f"{uri}/{name}", name.encode())
    store.put(f"{s3_bucket.uri}/pool/other", b"")
    asked = [*uris, f"{uris[0]}/", f"{s3_bucket.uri}/pool/empty", f"{s3_bucket.uri}/elsewhere/a"]
    pages = 0
    ask = S3._pages

    def counted(self: S3, *given: Any, **named: Any) -> Iterator[Mapping[str, Any]]:
        nonlocal pages
        for page in ask(self, *given, **named):
            pages += 1
            yield page

    monkeypatch.setattr(S3, "_pages", counted)
    together = store.list_each(asked)
    assert pages == 1
    assert together == {uri: store.list(uri) for uri in asked[:-2]}
    assert store.list_each(uris[:3]) == {}, "few folders are not worth it"
