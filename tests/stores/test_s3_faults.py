"""The S3 store, and merges on it, while a proxy before a real server commits every kind of fault.

Each test bounds the requests that the server would have seen: a retry layer must not become a storm.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bucket
from tests.tools.families import Family, make_family
from tests.tools.fault_proxy import Fault, FaultProxy, Rule, main, read_script
from tests.tools.merging import LOCAL, recipe_of
from ties_ray.errors import InputError, UnavailableError
from ties_ray.operations import merging
from ties_ray.reports.records import MergeResult, Progress
from ties_ray.stores import NoUpload, Part, Pin, Stores, _s3_answers, _s3_transfer
from ties_ray.stores._s3_service import Service
from ties_ray.stores.s3 import S3

DATA = os.urandom(1 << 20)
FIRST, LAST = 100_000, 900_000
PART = 5 << 20


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server) as made:
        yield made


@pytest.fixture
def store(s3_bucket: Bucket, proxy: FaultProxy) -> S3:
    return opened(proxy)


def opened(proxy: FaultProxy, patience: float = 5.0, **options: object) -> S3:
    made = Stores({"s3": {"endpoint_url": proxy.url, **options}}).of("s3://")
    assert isinstance(made, S3)
    made.service.patience = made.service.first_patience = patience
    return made


@pytest.fixture
def pin(s3_bucket: Bucket, store: S3) -> Pin:
    return store.put(f"{s3_bucket.uri}/x", DATA)


def read(store: S3, pin: Pin, start: int = FIRST, stop: int = LAST) -> bytes:
    buffer = bytearray(stop - start)
    store.read(pin, start, memoryview(buffer))
    return bytes(buffer)


# Reading.


@pytest.mark.parametrize("fault", ["slow_down", "internal_error", "hang_up", "cut", "short", "whole", "expired_token"])
def test_a_read_outlives_a_fault_that_passes(fault: Fault, proxy: FaultProxy, store: S3, pin: Pin) -> None:
    proxy.script = [Rule(fault, "get-range", count=1), Rule(fault, "get-range", nth=2)]
    assert read(store, pin) == DATA[FIRST:LAST]
    assert read(store, pin) == DATA[FIRST:LAST]
    assert proxy.faults[fault] == 2
    assert proxy.requests["get-range"] == 4
    assert store.meter.bytes_read >= 2 * (LAST - FIRST)


@pytest.mark.parametrize(
    ("fault", "cause", "most"),
    [
        ("slow_down", "503 SlowDown", 12),
        ("internal_error", "500 InternalError", 12),
        ("hang_up", "", 12),
        ("cut", "ended after 400,000 of 800,000|payload|Response", 12),
        ("short", r"got status 206 with bytes 100000-499999/1048576 and 400000 bytes", 4),
        ("whole", "got status 200 with no Content-Range and 1048576 bytes", 4),
    ],
)
def test_a_fault_that_lasts_ends_in_an_error_with_object_range_and_cause(
    fault: Fault, cause: str, most: int, proxy: FaultProxy, store: S3, pin: Pin
) -> None:
    proxy.script = [Rule(fault, "get-range")]
    store.service.patience = 1.5
    started = time.monotonic()
    message = rf"s3://\w+/x: reading bytes 100,000 to 900,000 failed \d+ times in \d+ s, last: .*({cause})"
    with pytest.raises(UnavailableError, match=message) as caught:
        read(store, pin)
    assert caught.value.retryable
    assert time.monotonic() - started < 4
    assert 1 < proxy.requests["get-range"] <= most


def test_a_connection_that_falls_silent_is_given_up_and_opened_anew(
    s3_bucket: Bucket, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Service, "silence", 0.5)
    store = opened(proxy)
    pin = store.put(f"{s3_bucket.uri}/x", DATA)
    proxy.script = [Rule("hang", "get-range", count=2, seconds=60)]
    started = time.monotonic()
    assert read(store, pin) == DATA[FIRST:LAST]
    assert proxy.requests["get-range"] == 3
    assert 1.0 <= time.monotonic() - started < 5


def test_a_slow_answer_is_waited_for(proxy: FaultProxy, store: S3, pin: Pin) -> None:
    proxy.script = [Rule("delay", "get-range", seconds=0.5)]
    assert read(store, pin) == DATA[FIRST:LAST]
    assert (proxy.requests["get-range"], store.meter.retries) == (1, 0)


def test_an_object_that_was_overwritten_is_refused_at_once(proxy: FaultProxy, store: S3, pin: Pin) -> None:
    proxy.script = [Rule("new_etag", "get-range")]
    with pytest.raises(InputError, match=rf"changed since the plan was made: ETag {pin.etag}, now [0-9a-f]{{32}};"):
        read(store, pin)
    assert proxy.requests["get-range"] == 1
    proxy.script = [Rule("stale", "get-range")]
    assert read(store, pin) == DATA[FIRST:LAST]  # kept by the proxy from now on
    new = store.put(pin.uri, DATA[::-1])
    with pytest.raises(InputError, match=f"ETag {new.etag}, now {pin.etag}"):
        read(store, new)
    with pytest.raises(InputError, match="the store says"):
        read(store, pin, 0, 10)
    assert (proxy.requests["get-range"], proxy.faults["stale"]) == (4, 1)


def test_a_throttled_worker_slows_down_as_one_whatever_its_threads(proxy: FaultProxy, store: S3, pin: Pin) -> None:
    proxy.script = [Rule("slow_down", "get-range")]
    store.service.patience = 3.0
    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(read, store, pin, start, start + 10) for start in range(16)]
        assert all(isinstance(call.exception(), UnavailableError) for call in calls)
    # What was on its way when the first refusal came (all 16, if the machine is quick), then few.
    assert 2 <= proxy.requests["get-range"] <= 16 + 10


def test_a_throttle_that_passes_costs_few_requests(proxy: FaultProxy, store: S3, pin: Pin) -> None:
    proxy.script = [Rule("slow_down", "get-range", count=20)]
    store.service.patience = 60
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda start: read(store, pin, start, start + 10), range(64)))
    assert found == [DATA[start : start + 10] for start in range(64)]
    assert proxy.requests["get-range"] == 64 + 20


def test_after_it_gave_up_a_store_gives_up_sooner_until_it_is_served(proxy: FaultProxy, store: S3, pin: Pin) -> None:
    store.service.patience, store.service.first_patience = 1.0, 0.0

    def times(rules: list[Rule]) -> int:
        proxy.script = rules
        with pytest.raises(UnavailableError, match=r"failed \d+ times in .*500 InternalError") as caught:
            read(store, pin)
        return int(str(caught.value).partition(" failed ")[2].split()[0])

    down = [Rule("internal_error", "get-range")]
    assert times(down) > 1
    assert times(down) == 1
    proxy.script = []
    read(store, pin)
    assert times(down) > 1


def test_expired_credentials_are_looked_up_anew(
    juicefs_bucket: Bucket, juicefs_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "which has run out")
    with FaultProxy(juicefs_server, [Rule("expired_token")]) as proxy:
        store = opened(proxy, patience=60)  # so that the number of tries ends it, on a busy machine too
        with pytest.raises(InputError, match=r"400 ExpiredToken.*; get new credentials"):  # those of the environment
            store.put(f"{juicefs_bucket.uri}/x", DATA)
        assert proxy.requests["put"] == 4
        proxy.script = [Rule("expired_token", nth=1)]
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", right)
        pin = store.put(f"{juicefs_bucket.uri}/x", DATA)  # signed by the right secret now, which this server checks
        assert read(store, pin) == DATA[FIRST:LAST]
        assert proxy.requests == {"put": 6, "get-range": 1}


def test_a_server_that_checks_signatures_is_read_and_written_through_the_proxy(
    juicefs_bucket: Bucket, juicefs_server: str
) -> None:
    script = [
        Rule("flip_upload", "put-part", count=1),
        Rule("drop_upload", "put-part", count=1),
        Rule("error_after", "complete", count=1),
        Rule("cut", "get-range", count=1),
        Rule("slow_down", "get-range", count=1),
    ]
    with FaultProxy(juicefs_server, script) as proxy:
        store = opened(proxy)
        pin = upload(store, f"{juicefs_bucket.uri}/x")
        assert read(store, pin) == DATA[FIRST:LAST]
        assert proxy.faults == {rule.fault: 1 for rule in script}
        assert proxy.requests["put-part"] == 3
        assert proxy.requests["complete"] <= 2


# Writing.


def upload(store: S3, uri: str) -> Pin:
    """Write DATA as a single part."""
    begun = store.begin_upload(uri, len(DATA))
    part = store.write_part(uri, begun, 1, 0, memoryview(DATA))
    return store.complete_upload(uri, begun, [part])


def part_of(store: S3, uri: str, upload_id: str, data: bytes, number: int) -> Part:
    start = (number - 1) * PART
    return store.write_part(uri, upload_id, number, start, memoryview(data)[start : start + PART])


@pytest.mark.parametrize(
    ("fault", "operation"),
    [
        *((fault, "put-part") for fault in ("slow_down", "hang_up", "drop_upload", "flip_upload", "error_after")),
        *((fault, "complete") for fault in ("internal_error", "error_after", "error_inside", "hang_up")),
        *((fault, "put") for fault in ("error_after", "drop_upload", "flip_upload", "internal_error")),
    ],
)
def test_what_is_written_arrives_whole_and_once(
    fault: Fault, operation: str, s3_bucket: Bucket, proxy: FaultProxy, store: S3
) -> None:
    store.put(f"{s3_bucket.uri}/before", b"as a plan is")
    proxy.script = [Rule(fault, operation, count=1)]
    pin = store.put(f"{s3_bucket.uri}/x", DATA) if operation == "put" else upload(store, f"{s3_bucket.uri}/x")
    assert proxy.faults[fault] == 1
    assert store.get(pin.uri, len(DATA)) == (pin, DATA)
    assert proxy.requests[operation] <= 2 + (operation == "put")


def test_bytes_that_always_arrive_changed_are_never_accepted(s3_bucket: Bucket, proxy: FaultProxy, store: S3) -> None:
    store.put(f"{s3_bucket.uri}/before", b"as a plan is")
    proxy.script = [Rule("flip_upload", "put-part")]
    with pytest.raises(
        UnavailableError, match=r"/x: writing part 1 failed 4 times .*other bytes arrived than were sent"
    ):
        upload(store, f"{s3_bucket.uri}/x")
    assert proxy.requests["put-part"] == 4
    with pytest.raises(FileNotFoundError, match="/x"):
        store.head(f"{s3_bucket.uri}/x", 1)


def test_the_first_bytes_that_arrive_changed_are_found_before_any_etag_has_proved_to_be_the_md5(
    s3_bucket: Bucket, proxy: FaultProxy, store: S3
) -> None:
    proxy.script = [Rule("flip_upload", "put-part", count=2)]
    pin = upload(store, f"{s3_bucket.uri}/x")
    assert proxy.faults == {"flip_upload": 2}
    assert store.get(pin.uri, len(DATA))[1] == DATA


def test_a_worker_knows_the_servers_etags_from_its_plan_and_accepts_no_first_part_that_always_arrives_changed(
    s3_bucket: Bucket, proxy: FaultProxy, store: S3
) -> None:
    opened(proxy).put(f"{s3_bucket.uri}/plan", b"of the driver")
    store.get(f"{s3_bucket.uri}/plan", 100)
    proxy.script = [Rule("flip_upload", "put-part")]
    with pytest.raises(UnavailableError, match=r"writing part 1 failed 4 times .*other bytes arrived than were sent"):
        upload(store, f"{s3_bucket.uri}/x")


def test_parts_changed_at_the_same_time_do_not_pass_for_the_way_of_the_service(
    s3_bucket: Bucket, proxy: FaultProxy, store: S3
) -> None:
    """Nothing is known of this server's ETags: three that differ, of three parts, say less than three of one part."""
    uri, data = f"{s3_bucket.uri}/x", os.urandom(3 * PART)
    upload_id = store.begin_upload(uri, len(data))
    proxy.script = [Rule("flip_upload", "put-part", count=3), Rule("delay", "put-part", seconds=1)]
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(partial(part_of, store, uri, upload_id, data), (1, 2, 3)))
    assert proxy.faults == {"flip_upload": 3, "delay": 3}
    assert store.get(store.complete_upload(uri, upload_id, parts).uri, len(data))[1] == data


def test_a_first_object_that_always_arrives_changed_is_never_accepted(
    s3_bucket: Bucket, proxy: FaultProxy, store: S3
) -> None:
    proxy.script = [Rule("flip_upload", "put")]
    with pytest.raises(UnavailableError, match=r"/x: writing it failed 4 times .*other bytes arrived than were sent"):
        store.put(f"{s3_bucket.uri}/x", DATA)
    proxy.script = [Rule("flip_upload", "put", count=3)]
    assert store.get(store.put(f"{s3_bucket.uri}/x", DATA).uri, len(DATA))[1] == DATA


def test_a_service_whose_etags_are_no_md5_is_believed_once_it_has_shown_so(
    s3_bucket: Bucket, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the service is right and the digest is ours: it is as if its ETags had been drawn."""
    for module in (_s3_answers, _s3_transfer):
        monkeypatch.setattr(module, "md5", lambda data: hashlib.md5(b"salt" + data, usedforsecurity=False))
    writer, worker = opened(proxy), opened(proxy)
    for name in ("x", "y"):
        pin = writer.put(f"{s3_bucket.uri}/{name}", DATA)
    assert (proxy.requests["put"], proxy.requests["get"]) == (2, 1)  # the first was read back
    assert worker.get(pin.uri, len(DATA))[1] == DATA
    for name in ("x", "y"):
        upload(worker, f"{s3_bucket.uri}/{name}")
    assert proxy.requests["put-part"] == 3 + 1


@pytest.mark.parametrize("operation", ["put-part", "complete"])
def test_a_forgotten_upload_is_told_and_can_be_begun_again(
    operation: str, s3_bucket: Bucket, proxy: FaultProxy, store: S3
) -> None:
    proxy.script = [Rule("forget_upload", operation, count=1)]
    with pytest.raises(NoUpload, match=r"/x: .*does not know the upload \(any more\); run the same") as caught:
        upload(store, f"{s3_bucket.uri}/x")
    assert (caught.value.exit_code, caught.value.retryable) == (4, True)
    assert proxy.requests[operation] == 1
    pin = upload(store, f"{s3_bucket.uri}/x")
    assert store.get(pin.uri, len(DATA)) == (pin, DATA)


def test_a_conditional_write_whose_answer_was_lost_counts_as_ours(
    s3_bucket: Bucket, proxy: FaultProxy, store: S3
) -> None:
    proxy.script = [Rule("error_after", "put", count=1)]
    mine = store.swap(f"{s3_bucket.uri}/lease", b"mine", "")
    assert mine
    assert store.swap(mine.uri, b"another's", "") is None
    assert store.get(mine.uri, 100) == (mine, b"mine")


# Whole merges. What differs from a merge that nothing disturbs is told by bytes and by counts.


@pytest.fixture(scope="module")
def family(s3_server: str) -> Iterator[tuple[Family, bytes, str]]:
    """Return a family in a bucket, what its merge gives, and the bucket."""
    from tests.conftest import _bucket

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "ties-ray")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "a password of tests")
        bucket = _bucket(s3_server)
        store = Stores(bucket.storage).of(bucket.uri)
        made = make_family(store, f"{bucket.uri}/family", hidden=256)
        merging.merge(recipe_of(made, f"{bucket.uri}/calm", "ties", storage=bucket.storage))
        yield made, store.get(f"{bucket.uri}/calm/model.safetensors", 1 << 30)[1], bucket.uri


def merged(
    family: Family, output: str, proxy: FaultProxy, at: Callable[[Progress], None] = lambda progress: None
) -> MergeResult:
    storage = {"s3": {"endpoint_url": proxy.url}}
    run = {**LOCAL, "workers": 2, "cache": 0, "disk_cache": 0}  # every round reads from the bucket
    recipe = recipe_of(family, output, "ties", storage=storage, run=run)
    return merging.merge(recipe, watch=at)


def in_the_merge(proxy: FaultProxy, rules: list[Rule], progress: Progress) -> None:
    """Let the proxy turn bad when the last round begins."""
    if progress.stage == "merge" and not proxy.script:
        proxy.script = rules


def test_bits_that_flip_on_their_way_are_read_again(
    family: tuple[Family, bytes, str], proxy: FaultProxy, s3_credentials: None
) -> None:
    models, wanted, bucket = family
    at = partial(in_the_merge, proxy, [Rule("flip", "get-range", "*/family/model-*", count=3)])
    result = merged(models, f"{bucket}/flipped", proxy, at)
    assert proxy.faults["flip"] == 3
    assert Stores(result_storage(proxy)).of(bucket).get(f"{bucket}/flipped/model.safetensors", 1 << 30)[1] == wanted
    assert result.retries == 3
    assert 0.9 * result.bytes_read < 2 * result.bytes_compared <= result.bytes_read  # the merge, after one count


def test_an_upload_whose_answer_was_lost_does_not_stay_behind(
    family: tuple[Family, bytes, str], proxy: FaultProxy, s3_credentials: None
) -> None:
    models, _, bucket = family
    proxy.script = [Rule("error_after", "create-upload", count=2)]
    merged(models, f"{bucket}/begun-thrice", proxy)
    assert proxy.requests["create-upload"] == 3
    assert Stores(result_storage(proxy)).of(bucket).list_uploads(f"{bucket}/begun-thrice") == ()


def test_an_input_that_changed_under_the_same_etag_is_refused_and_nothing_is_published(
    family: tuple[Family, bytes, str], proxy: FaultProxy, s3_credentials: None
) -> None:
    models, _, bucket = family
    at = partial(in_the_merge, proxy, [Rule("flip", "get-range", "*/family/model-1/*")])
    message = r"family/model-1/model.safetensors: bytes [\d,]+ to [\d,]+ are not those that this merge read first"
    with pytest.raises(InputError, match=message):
        merged(models, f"{bucket}/changed", proxy, at)
    listing = Stores(result_storage(proxy)).of(bucket).list(f"{bucket}/changed")
    assert listing.files == ()


def test_a_run_whose_storage_goes_down_ends_soon_and_continues(
    family: tuple[Family, bytes, str], proxy: FaultProxy, s3_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, wanted, bucket = family
    monkeypatch.setattr(Service, "patience", 1.5)
    monkeypatch.setattr(Service, "first_patience", 0.5)
    monkeypatch.setattr("ties_ray.state.lease.STILL_SECONDS", 5.0)  # the lease could not be given back, and we live on
    at = partial(in_the_merge, proxy, [Rule("slow_down")])
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=r"s3://.*failed \d+ times in \d+ s, last: 503 SlowDown"):
        merged(models, f"{bucket}/down", proxy, at)
    assert time.monotonic() - started < 20
    assert proxy.faults["slow_down"] < 100
    proxy.script = []
    result = merged(models, f"{bucket}/down", proxy)
    assert result.resumed
    assert result.shards_done_before > 0
    assert Stores(result_storage(proxy)).of(bucket).get(f"{bucket}/down/model.safetensors", 1 << 30)[1] == wanted


def test_an_upload_forgotten_in_mid_run_is_begun_again_by_the_same_run(
    family: tuple[Family, bytes, str], proxy: FaultProxy, s3_credentials: None
) -> None:
    models, wanted, bucket = family
    proxy.script = [Rule("forget_upload", "put-part", count=1)]
    result = merged(models, f"{bucket}/forgotten", proxy)
    assert proxy.faults["forget_upload"] == 1
    assert result.shards_done_before > 0
    assert Stores(result_storage(proxy)).of(bucket).get(f"{bucket}/forgotten/model.safetensors", 1 << 30)[1] == wanted


def result_storage(proxy: FaultProxy) -> dict[str, dict[str, Any]]:
    return {"s3": {"endpoint_url": proxy.upstream}}


# The proxy itself.


def test_the_same_seed_fails_the_same_requests(s3_bucket: Bucket, s3_server: str) -> None:
    def failed(seed: int) -> list[bool]:
        rules = [Rule("internal_error", "get-range", probability=0.3)]
        with FaultProxy(s3_server, rules, seed=seed) as proxy:
            decisions = [proxy.decide("get-range", "/b/x", f"bytes {number}") for number in range(100)]
            assert 10 < proxy.counts()["faults"]["internal_error"] < 60
        return [rule is not None for rule in decisions]

    assert failed(1) == failed(1) != failed(2)


def test_a_script_is_read_from_a_file_and_the_counts_from_an_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], proxy: FaultProxy
) -> None:
    import json
    import urllib.request

    (tmp_path / "faults.json").write_text('[{"fault": "cut", "operation": "get-range", "nth": 2}]')
    assert read_script(f"{tmp_path}/faults.json") == [Rule("cut", "get-range", nth=2)]
    with urllib.request.urlopen(f"{proxy.url}/-/counts") as answer:
        assert json.load(answer) == {"requests": {}, "faults": {}}
    with pytest.raises(SystemExit, match="2"):
        main(["--script", f"{tmp_path}/faults.json"])
    assert "--upstream" in capsys.readouterr().err
