"""S3 as services other than AWS speak it: what they lack, what they demand, how they refuse."""

import base64
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import boto3
import pytest
import trustme

from tests.conftest import Bucket, free_port
from tests.tools.families import Family, make_family
from tests.tools.fault_proxy import Dialect, FaultProxy
from tests.tools.merging import LOCAL, recipe_of
from ties_ray.errors import InputError, MergeError, RecipeError, UnavailableError
from ties_ray.operations import merging
from ties_ray.recipe import parse
from ties_ray.stores import Listing, Part, Stores, _s3_client, _s3_listing
from ties_ray.stores.s3 import S3

PART = 5 << 20


def opened(storage: dict[str, object] | None = None, *, settle: float = 0.3) -> S3:
    store = Stores({"s3": storage or {}}).of("s3://")
    assert isinstance(store, S3)
    store.service.first_patience = 3.0
    store.settle = settle
    return store


@contextmanager
def service(upstream: str, dialect: Dialect) -> Iterator[FaultProxy]:
    with FaultProxy(upstream, dialect=dialect) as proxy:
        yield proxy


def write(store: S3, uri: str, data: bytes) -> None:
    """Write an object by an upload of parts."""
    upload = store.begin_upload(uri, len(data))
    pieces = [data[start : start + PART] for start in range(0, len(data), PART)]
    parts = [store.write_part(uri, upload, n, (n - 1) * PART, memoryview(one)) for n, one in enumerate(pieces, 1)]
    store.complete_upload(uri, upload, parts)


# Checksums, and where the endpoint is named.


def unsupported(status: int, code: str, message: str) -> Dialect:
    """Return a service that refuses every header of the new checksums."""

    def refuse(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str, str] | None:
        wrong = [name for name in headers if name.startswith(("x-amz-checksum-", "x-amz-sdk-checksum"))]
        return (status, code, message.format(*wrong)) if wrong else None

    return Dialect(refuse)


BACKBLAZE = unsupported(400, "InvalidArgument", "Unsupported header '{}' received for this API call.")


def in_environment(endpoint: str, folder: Path, how: str, change: pytest.MonkeyPatch) -> None:
    if how.startswith("AWS_"):
        change.setenv(how, endpoint)
        return
    lines = ["[default]", f"endpoint_url = {endpoint}"]
    if how == "services":
        lines = ["[default]", "services = mine", "[services mine]", "s3 =", f"  endpoint_url = {endpoint}"]
    (folder / "config").write_text("\n".join(lines) + "\n")
    change.setenv("AWS_CONFIG_FILE", str(folder / "config"))


@pytest.mark.parametrize("how", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "profile", "services"])
def test_an_endpoint_of_the_environment_counts_as_one_of_the_recipe(
    how: str, s3_bucket: Bucket, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(s3_server, BACKBLAZE) as proxy:
        in_environment(proxy.url, tmp_path, how, monkeypatch)
        store = opened()
        assert store.get(store.put(f"{s3_bucket.uri}/x", b"data").uri, 4)[1] == b"data"
        assert (proxy.requests["put"], store.notes) == (1, [])


@pytest.mark.parametrize("how", ["environment", "profile", "recipe"])
def test_the_checksum_mode_is_taken_from_recipe_environment_or_profile(
    how: str, s3_bucket: Bucket, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def look(method: str, path: str, headers: Mapping[str, str]) -> None:
        seen.extend(name for name in headers if name in ("content-md5", "x-amz-checksum-crc32c"))

    if how == "environment":
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "WHEN_SUPPORTED")
    elif how == "profile":
        (tmp_path / "config").write_text("[default]\nrequest_checksum_calculation = when_supported\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    else:
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    with service(s3_server, Dialect(look)) as proxy:
        asked = {"checksums": "when_supported"} if how == "recipe" else {}
        opened({"endpoint_url": proxy.url, **asked}).put(f"{s3_bucket.uri}/x", b"data")
    assert seen == ["x-amz-checksum-crc32c"]


@pytest.mark.parametrize(
    "dialect",
    [
        BACKBLAZE,
        unsupported(501, "NotImplemented", "A header you provided implies functionality that is not implemented."),
        unsupported(400, "InvalidRequest", "Checksum algorithm crc32c is not supported"),
        unsupported(400, "XNotImplemented", "{}: not implemented"),
    ],
)
def test_a_service_that_refuses_checksums_gets_md5_and_the_result_says_so(
    dialect: Dialect, s3_bucket: Bucket, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    with service(s3_server, dialect) as proxy:
        data = os.urandom(PART + 3)
        store = opened({"endpoint_url": proxy.url})
        write(store, f"{s3_bucket.uri}/x", data)
        assert store.get(f"{s3_bucket.uri}/x", len(data))[1] == data
        assert store.notes == [
            "s3://: the service refuses CRC32C checksums; Content-MD5 proves what is written instead"
        ]
        asked = opened({"endpoint_url": proxy.url, "checksums": "when_supported"})
        with pytest.raises(InputError, match=r"set it to when_required|what it says") as caught:
            asked.put(f"{s3_bucket.uri}/y", data)
        assert "region" not in str(caught.value)


# Conditional writes.


def no_conditions(status: int, code: str) -> Dialect:
    def refuse(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str, str] | None:
        wrong = method == "PUT" and ("if-match" in headers or "if-none-match" in headers)
        return (status, code, "If-None-Match and If-Match are not supported for this operation") if wrong else None

    return Dialect(refuse)


WEAK = {
    "refused": no_conditions(501, "NotImplemented"),
    "called wrong": no_conditions(400, "InvalidArgument"),
    "ignored": Dialect(ignore=("if-match", "if-none-match")),
}


@pytest.mark.parametrize("how", WEAK)
def test_without_conditional_writes_one_of_two_writers_wins_and_the_result_says_so(
    how: str, s3_bucket: Bucket, s3_server: str
) -> None:
    with service(s3_server, WEAK[how]) as proxy:
        uri = f"{s3_bucket.uri}/lease"
        first = opened({"endpoint_url": proxy.url})
        pin = first.swap(uri, b"first", "")
        assert pin is not None
        assert (first.swap(uri, b"late", ""), first.swap(uri, b"wrong", "0" * 32)) == (None, None)
        assert first.get(uri, 10) == (pin, b"first")
        (note,) = first.notes
        assert "the service keeps no If-None-Match on writes" in note
        rivals = [opened({"endpoint_url": proxy.url}, settle=1.5) for _ in range(4)]
        barrier = threading.Barrier(len(rivals))

        def take(number: int) -> bool:
            barrier.wait()
            return rivals[number].swap(uri, b"%d" % number, pin.etag) is not None

        with ThreadPoolExecutor(len(rivals)) as pool:
            won = list(pool.map(take, range(len(rivals))))
        assert won.count(True) == 1
        assert first.get(uri, 10)[1] == b"%d" % won.index(True)


def test_a_service_that_keeps_conditions_is_asked_once_and_never_waited_for(s3_bucket: Bucket, s3_server: str) -> None:
    with service(s3_server, Dialect()) as proxy:
        store, uri = opened({"endpoint_url": proxy.url}, settle=60), f"{s3_bucket.uri}/lease"
        started = time.monotonic()
        first = store.swap(uri, b"1", "")
        assert first is not None
        second = store.swap(uri, b"2", first.etag)
        assert second is not None
        assert (proxy.requests["put"], store.notes) == (4, [])  # each kind of condition was tried once
        third = store.swap(uri, b"3", second.etag)
        assert third is not None
        assert proxy.requests["put"] == 5
        assert time.monotonic() - started < 30


GOOGLE = Dialect(BACKBLAZE.refuse, ignore=("if-match", "if-none-match"))


def test_a_merge_is_made_on_a_service_without_checksums_and_conditions(
    s3_bucket: Bucket, s3_server: str, family_of: Callable[..., Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3, "settle", 0.3)
    with service(s3_server, GOOGLE) as proxy:
        output = f"{s3_bucket.uri}/out"
        family = family_of(num_models=2)
        result = merging.merge(
            recipe_of(family, output, "average", run=LOCAL, storage={"s3": {"endpoint_url": proxy.url}})
        )
        assert result.status == "done"
        assert [note for note in result.notes if "keeps no If-None-Match" in note]


# Lists.


def names_of(store: S3, uri: str) -> list[str]:
    return [pin.uri.rpartition("/")[2] for pin in store.list(uri).files]


def in_pages(path: str, *unknown: str) -> str:
    """Ask for pages of three keys, and leave out the parameters that a service knows nothing of."""
    path, _, query = path.partition("?")
    known = [(name, value) for name, value in parse_qsl(query, keep_blank_values=True) if name not in unknown]
    lists = any(name == "prefix" for name, _ in known)
    return f"{path}?{urlencode(known + [('max-keys', '3')] * lists)}" if known else path


def refuse_version_two(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str, str] | None:
    return (501, "NotImplemented", "list-type=2 is not implemented") if "list-type=2" in path else None


@pytest.mark.parametrize(
    "dialect",
    [
        Dialect(rewrite=in_pages),
        Dialect(refuse_version_two, rewrite=in_pages),
        Dialect(rewrite=lambda path: in_pages(path, "list-type", "continuation-token")),
    ],
)
def test_a_service_with_the_first_version_of_lists_is_listed_whole(
    dialect: Dialect, s3_bucket: Bucket, s3_server: str
) -> None:
    plain = opened(dict(s3_bucket.storage["s3"]))
    wanted = [f"{number:04}" for number in range(10)]
    for name in (*wanted, "sub/deeper"):
        plain.put(f"{s3_bucket.uri}/m/{name}", b"x")
    with service(s3_server, dialect) as proxy:
        store = opened({"endpoint_url": proxy.url})
        found = store.list(f"{s3_bucket.uri}/m")
        assert [pin.uri.rpartition("/")[2] for pin in found.files] == wanted
        assert found.folders == (f"{s3_bucket.uri}/m/sub",)
        assert store.newest(f"{s3_bucket.uri}/m") is not None


def no_lists(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str, str] | None:
    of_uploads = method == "GET" and ("uploadId=" in path or "uploads" in path.partition("?")[2])
    return (
        (501, "NotImplemented", "A header you provided implies functionality that is not implemented")
        if (of_uploads)
        else None
    )


def test_a_service_that_lists_no_parts_and_no_uploads_is_written_to(s3_bucket: Bucket, s3_server: str) -> None:
    with service(s3_server, Dialect(no_lists)) as proxy:
        store, data = opened({"endpoint_url": proxy.url}), os.urandom(PART + 3)
        uri = f"{s3_bucket.uri}/x"
        upload = store.begin_upload(uri, len(data))
        assert store.list_parts(uri, upload) == ()
        assert store.list_uploads(s3_bucket.uri) == ()
        write(store, uri, data)
        assert store.get(uri, len(data))[1] == data
        assert len(store.notes) == 2


def test_markers_of_folders_are_no_files_and_no_folders(s3_bucket: Bucket, s3_server: str) -> None:
    client = boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1")
    bucket = s3_bucket.uri.removeprefix("s3://")
    for key in ("m/", "m//x", "m//", "m/old_$folder$", "m_$folder$", "m/x", "m/sub/"):
        client.put_object(Bucket=bucket, Key=key, Body=b"")
    store = opened(dict(s3_bucket.storage["s3"]))
    found = store.list(f"{s3_bucket.uri}/m")
    assert ([pin.uri for pin in found.files], found.folders) == ([f"{s3_bucket.uri}/m/x"], (f"{s3_bucket.uri}/m/sub",))
    assert store.list(s3_bucket.uri) == Listing((), (f"{s3_bucket.uri}/m",))


def test_the_marker_of_an_empty_folder_is_no_model_and_the_remedy_leaves_it_out(s3_bucket: Bucket) -> None:
    storage = {"s3": {**s3_bucket.storage["s3"]}}
    store = opened(dict(storage["s3"]))
    family = make_family(store, f"{s3_bucket.uri}/pool", num_models=2)
    store.put(f"{s3_bucket.uri}/pool/model-old/", b"")
    store.put(f"{s3_bucket.uri}/pool/model-0_$folder$", b"")
    data = {"base": family.base, "method": "average", "output": {"path": f"{s3_bucket.uri}/out"}, "storage": storage}
    models = f"{s3_bucket.uri}/pool/model-*"
    with pytest.raises(InputError, match=r"model-old: there is nothing;.*`not: \[model-old\]`"):
        merging.plan(parse.validate({**data, "models": [models]}))
    made = merging.plan(parse.validate({**data, "models": [{"path": models, "not": ["model-old"]}]}))
    assert [model.uri for model in made.catalog.models] == list(family.models)


ODD = ["with space", "a+b", "ünï-模型", "per%20cent", "x=1&y=2", "hash#tag", "quo'te", "tilde~", "a:b", "q?x", "[1]",
       "..", "back\\slash", "semi;colon", "<xml>&amp;", "tab\tin"]  # fmt: skip


def test_keys_with_odd_characters_are_listed_read_and_written(s3_bucket: Bucket) -> None:
    store = opened(dict(s3_bucket.storage["s3"]))
    for name in ODD:
        store.put(f"{s3_bucket.uri}/m/{name}/x", name.encode())
    folders = store.list(f"{s3_bucket.uri}/m").folders
    assert sorted(folders) == sorted(f"{s3_bucket.uri}/m/{name}" for name in ODD)
    for name in ODD:
        (pin,) = store.list(f"{s3_bucket.uri}/m/{name}").files
        assert store.get(pin.uri, 100)[1] == name.encode()


# Objects that are not what they seem.


def test_an_archived_object_is_refused_with_the_command_that_restores_it(s3_bucket: Bucket, s3_server: str) -> None:
    client = boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1")
    bucket = s3_bucket.uri.removeprefix("s3://")
    for kind in ("GLACIER", "DEEP_ARCHIVE"):
        client.put_object(Bucket=bucket, Key="my model", Body=b"x", StorageClass=kind)
        with pytest.raises(InputError, match=rf"is archived \({kind}\).*--bucket {bucket} --key 'my model'"):
            opened(dict(s3_bucket.storage["s3"])).head(f"{s3_bucket.uri}/my model", 1)
        client.restore_object(Bucket=bucket, Key="my model", RestoreRequest={"Days": 7})  # as the command does
        assert opened(dict(s3_bucket.storage["s3"])).get(f"{s3_bucket.uri}/my model", 1)[1] == b"x"


def test_an_object_with_a_content_encoding_is_refused_by_that_name(s3_bucket: Bucket, s3_server: str) -> None:
    client = boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1")
    bucket = s3_bucket.uri.removeprefix("s3://")
    store = opened(dict(s3_bucket.storage["s3"]))
    for encoding in ("gzip", "zstd", "br", "gzip,aws-chunked"):
        client.put_object(Bucket=bucket, Key="x", Body=b"x", ContentEncoding=encoding)
        with pytest.raises(
            InputError, match=rf"/x: is stored with Content-Encoding {encoding.split(',')[0]}:.*gzip -d"
        ):
            store.head(f"{s3_bucket.uri}/x", 1)
    for harmless in ("", "aws-chunked", "identity"):
        client.put_object(Bucket=bucket, Key="x", Body=b"x", ContentEncoding=harmless)
        assert store.head(f"{s3_bucket.uri}/x", 1)[1] == b"x"


# Public buckets.


def anonymous_only(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str, str] | None:
    private = "/private" in path
    if private == ("authorization" in headers):
        return None
    return 403, "AccessDenied", "Access Denied"


def test_public_buckets_are_read_without_a_signature_all_or_those_that_are_named(
    s3_server: str, s3_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{kind}{os.urandom(4).hex()}" for kind in ("public", "private")]
    for name in names:
        client = boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1")
        client.create_bucket(Bucket=name, ACL="public-read")
        client.put_object(Bucket=name, Key="m/x", Body=b"data", ACL="public-read")
    public, private = (f"s3://{name}/m/x" for name in names)
    with service(s3_server, Dialect(anonymous_only)) as proxy:
        both = opened({"endpoint_url": proxy.url, "anonymous": [names[0]]})
        assert both.get(public, 4)[1] == both.get(private, 4)[1] == b"data"
        assert names_of(both, f"s3://{names[0]}/m") == ["x"]
        with pytest.raises(InputError, match=r"AccessDenied.*a public bucket: storage\.s3\.anonymous"):
            opened({"endpoint_url": proxy.url}).get(public, 4)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        everything = opened({"endpoint_url": proxy.url, "anonymous": True})
        assert everything.get(public, 4)[1] == b"data"
        with pytest.raises(InputError, match=r"takes no anonymous requests: take it out of storage\.s3\.anonymous"):
            everything.get(private, 4)
        with pytest.raises(InputError, match=r"credentials.*a public bucket: storage\.s3\.anonymous: true"):
            opened({"endpoint_url": proxy.url}).get(public, 4)


# Encryption.


def demanding(**wanted: str) -> Dialect:
    """Return a service whose bucket policy denies what is written otherwise."""
    names = {name.replace("_", "-"): value for name, value in wanted.items()}

    def refuse(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str, str] | None:
        starts = "partNumber" not in path if method == "PUT" else method == "POST" and path.endswith("?uploads")
        found = {name: headers.get(name) for name in names}
        return (403, "AccessDenied", "explicit deny") if starts and found != names else None

    return Dialect(refuse)


HEADER = "x_amz_server_side_encryption"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"encryption": "AES256"}, {HEADER: "AES256"}),
        ({"encryption": "aws:kms"}, {HEADER: "aws:kms"}),
        ({"kms_key_id": "alias/m"}, {HEADER: "aws:kms", f"{HEADER}_aws_kms_key_id": "alias/m"}),
        ({"encryption": "aws:kms:dsse", "kms_key_id": "k"}, {HEADER: "aws:kms:dsse", f"{HEADER}_aws_kms_key_id": "k"}),
    ],
)
def test_a_bucket_gets_the_encryption_that_it_demands(
    options: dict[str, object], wanted: dict[str, str], s3_bucket: Bucket, s3_server: str
) -> None:
    with service(s3_server, demanding(**wanted)) as proxy:
        with pytest.raises(InputError, match=r"AccessDenied.*may also demand encryption: storage\.s3\.encryption"):
            opened({"endpoint_url": proxy.url}).put(f"{s3_bucket.uri}/x", b"data")
        store, data = opened({"endpoint_url": proxy.url, **options}), os.urandom(PART + 3)
        pin = store.swap(f"{s3_bucket.uri}/x", b"data", "")
        assert pin is not None
        assert store.get(pin.uri, 4) == (pin, b"data")
        write(store, f"{s3_bucket.uri}/y", data)
        assert store.get(f"{s3_bucket.uri}/y", len(data))[1] == data


KEY = b"32 bytes that nobody may ever see"[:32]
ENCODED = base64.b64encode(KEY).decode()


def under_customer_key(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str, str] | None:
    """Keep what lies under `/keyed` as S3 keeps objects of SSE-C; answer as it does where the key is wrong or alien."""
    given = headers.get("x-amz-server-side-encryption-customer-key")
    if method not in ("GET", "PUT") or "/keyed" not in path:
        wrong = method == "GET" and "list-type" not in path and given is not None
        return (
            (400, "InvalidRequest", "The encryption parameters are not applicable to this object.") if wrong else None
        )
    if given is None and "list-type" not in path and "uploadId" not in path:
        return 400, "InvalidRequest", "The object was stored using a form of Server Side Encryption."
    return None if given in (None, ENCODED) else (403, "AccessDenied", "Access Denied")


@pytest.mark.parametrize("kind", ["env", "file", "file of bytes"])
def test_a_customers_key_comes_from_the_environment_or_a_file_and_is_never_shown(
    kind: str, s3_bucket: Bucket, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_KEY", ENCODED)
    (tmp_path / "key").write_bytes(KEY if kind == "file of bytes" else f"{ENCODED}\n".encode())
    place = "env:MODEL_KEY" if kind == "env" else f"file:{tmp_path}/key"
    plain = opened(dict(s3_bucket.storage["s3"]))
    plain.put(f"{s3_bucket.uri}/plain", b"plain")
    with service(s3_server, Dialect(under_customer_key)) as proxy:
        store, data = opened({"endpoint_url": proxy.url, "customer_key": place}), os.urandom(PART + 3)
        pin = store.put(f"{s3_bucket.uri}/keyed/x", b"data")
        assert store.get(pin.uri, 4)[1] == b"data"
        write(store, f"{s3_bucket.uri}/keyed/y", data)
        assert store.get(f"{s3_bucket.uri}/keyed/y", len(data))[1] == data
        assert store.get(f"{s3_bucket.uri}/plain", 5)[1] == b"plain"  # an input without a key of its own
        assert store.get(pin.uri, 4)[1] == b"data"
        with pytest.raises(InputError, match=r"say in storage\.s3\.customer_key where that key lies"):
            opened({"endpoint_url": proxy.url}).get(pin.uri, 4)
        monkeypatch.setenv("OTHER", base64.b64encode(b"x" * 32).decode())
        with pytest.raises(InputError, match="AccessDenied") as caught:
            opened({"endpoint_url": proxy.url, "customer_key": "env:OTHER"}).get(pin.uri, 4)
        assert base64.b64encode(b"x" * 32).decode() not in str(caught.value)


def test_wrong_encryption_options_are_refused_and_no_key_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="env:NAME or file:/path; a recipe never holds it") as caught:
        opened({"customer_key": ENCODED})
    assert ENCODED not in str(caught.value)
    for options in ({"customer_key": "env:K", "kms_key_id": "k"}, {"customer_key": "env:K", "encryption": "AES256"},
                    {"encryption": "AES256", "kms_key_id": "k"}, {"anonymous": True, "profile": "p"}):  # fmt: skip
        with pytest.raises(RecipeError, match=r"exclude each other|needs encryption|use no profile"):
            opened(options)
    with pytest.raises(InputError, match="there is no environment variable NOTHING; every worker needs it"):
        opened({"customer_key": "env:NOTHING"})
    with pytest.raises(InputError, match="there is no readable file"):
        opened({"customer_key": f"file:{tmp_path}/nothing"})
    monkeypatch.setenv("SHORT", "c2hvcnQgc2VjcmV0")
    with pytest.raises(InputError, match="env:SHORT holds no key of 32 bytes") as caught_short:
        opened({"customer_key": "env:SHORT"})
    assert "c2hvcnQgc2VjcmV0" not in str(caught_short.value)


# Refusals: what lasts, and what passes.


def always(status: int, code: str, message: str = "because") -> Dialect:
    return Dialect(lambda method, path, headers: (status, code, message))


LASTING = [
    (403, "AccessDenied", "", "check the credentials and their permissions"),
    (403, "InvalidAccessKeyId", "", "check the credentials and that they are of this service"),
    (403, "SignatureDoesNotMatch", "", "the secret key does not belong to this access key"),
    (403, "RequestTimeTooSkewed", "", "set the clock of this machine"),
    (400, "InvalidToken", "", "AWS_SESSION_TOKEN must belong to the access key"),
    (400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong", r"check storage\.s3\.region"),
    (400, "KMS.NotFoundException", "", r"check storage\.s3\.kms_key_id"),
    (403, "SecondLevelDomainForbidden", "", r"set storage\.s3\.addressing: virtual"),
    (400, "InvalidRequest", "Please use virtual hosted style", r"set storage\.s3\.addressing: virtual"),
    (400, "InvalidBucketName", "", "check the name of the bucket"),
    (409, "InvalidBucketState", "", "the service refuses this for good"),
    (501, "NotImplemented", "", "the service refuses this for good"),
    (507, "XMinioStorageFull", "", "free some room there"),
    (404, "NoSuchBucket", "", "check the name, and storage.s3.endpoint_url"),
    (400, "ExpiredToken", "", "get new credentials"),
]
PASSING = [(503, "SlowDown"), (500, "InternalError"), (502, "BadGateway"), (504, "GatewayTimeout"),
           (400, "RequestTimeout"), (409, "OperationAborted"), (429, "TooManyRequests"),
           (400, "ThrottlingException"), (403, "RequestLimitExceeded")]  # fmt: skip


@pytest.mark.parametrize(("status", "code", "message", "remedy"), LASTING)
def test_a_refusal_that_lasts_is_an_input_error_with_true_advice(
    status: int, code: str, message: str, remedy: str, s3_server: str, s3_credentials: None
) -> None:
    with service(s3_server, always(status, code, message or "because")) as proxy:
        with pytest.raises(InputError, match=remedy) as caught:
            opened({"endpoint_url": proxy.url}).put("s3://bucket/x", b"data")
        assert proxy.requests["put"] == (4 if code == "ExpiredToken" else 1)
        assert "region" not in str(caught.value) or code in ("AuthorizationHeaderMalformed", "KMS.NotFoundException")


@pytest.mark.parametrize(("status", "code"), PASSING)
def test_a_refusal_that_may_pass_is_repeated_and_then_unavailable(
    status: int, code: str, s3_server: str, s3_credentials: None
) -> None:
    with service(s3_server, always(status, code)) as proxy:
        store = opened({"endpoint_url": proxy.url})
        store.service.patience = 4.0
        with pytest.raises(UnavailableError, match=rf"{status} {code}"):
            store.put("s3://bucket/x", b"data")
        assert proxy.requests["put"] > 1


def test_the_region_of_the_bucket_is_named_where_the_service_tells_it(
    s3_server: str, s3_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refuse(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str, str] | None:
        asked.append(headers["authorization"].partition("Credential=")[2].split("/")[2])
        return None

    with service(s3_server, Dialect(refuse)) as proxy:
        for names in ({"AWS_DEFAULT_REGION": "eu-north-1"}, {"AWS_REGION": "ap-south-1"}):
            for name, value in names.items():
                monkeypatch.setenv(name, value)
            with pytest.raises(InputError, match="no such bucket"):
                opened({"endpoint_url": proxy.url}).head("s3://nothing/x", 1)
        with pytest.raises(InputError, match="no such bucket"):
            opened({"endpoint_url": proxy.url, "region": "eu-west-1"}).head("s3://nothing/x", 1)
    assert asked == ["eu-north-1", "ap-south-1", "eu-west-1"]


def without(header: str, value: str, answer: tuple[int, str, str]) -> Dialect:
    """Return a service that refuses requests whose header lacks a text."""
    return Dialect(lambda method, path, headers: None if value in headers.get(header, "") else answer)


SECOND = (400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-west-3'")
FOLLOWED = [
    (without("x-amz-request-payer", "requester", (403, "AccessDenied", "no")), "storage.s3.requester_pays", True),
    (without("authorization", "/eu-west-3/s3/", SECOND), "storage.s3.region", "eu-west-3"),
]


@pytest.mark.parametrize(("dialect", "remedy", "value"), FOLLOWED)
def test_the_option_that_a_refusal_names_makes_the_request_succeed(
    dialect: Dialect, remedy: str, value: object, s3_bucket: Bucket, s3_server: str
) -> None:
    uri = f"{s3_bucket.uri}/x"
    opened({"endpoint_url": s3_server}).put(uri, b"data")
    with service(s3_server, dialect) as proxy:
        with pytest.raises(InputError, match=re.escape(remedy)):
            opened({"endpoint_url": proxy.url}).get(uri, 4)
        followed = opened({"endpoint_url": proxy.url, remedy.rpartition(".")[2]: value})
        assert followed.get(uri, 4)[1] == b"data"


def test_an_ended_single_sign_on_is_refused_with_the_command_that_renews_it(
    s3_credentials: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["[profile merges]", "sso_account_id = 111122223333", "sso_role_name = merges", "sso_region = us-east-1",
             "sso_start_url = https://sso.example/start"]  # fmt: skip
    (tmp_path / "config").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(InputError, match=r"log in again \(aws sso login\), and run the same command"):
        opened({"profile": "merges", "endpoint_url": f"http://127.0.0.1:{free_port()}"}).head("s3://bucket/x", 1)


def test_a_name_that_is_not_known_is_refused_for_good(s3_credentials: None) -> None:
    store = opened({"endpoint_url": "http://no-such-host.invalid:9000"})
    store.service.first_patience = 60.0
    with pytest.raises(InputError, match=r"the name is not known.*check storage\.s3\.endpoint_url"):
        store.head("s3://bucket/x", 1)
    assert store.meter.retries == 3


# A server of any kind, by what it says.


@contextmanager
def saying(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                answer(self)
            except ConnectionError:
                self.close_connection = True

        do_PUT = do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def send(request: BaseHTTPRequestHandler, body: bytes, status: int = 200, kind: str = "application/xml") -> None:
    request.send_response(status)
    request.send_header("Content-Type", kind)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def test_what_does_not_speak_s3_is_refused_for_good(s3_credentials: None) -> None:
    def page(request: BaseHTTPRequestHandler) -> None:
        send(request, b"<!doctype html><html><p>Welcome<br></html>", kind="text/html")

    with saying(page) as url:
        store = opened({"endpoint_url": url})
        store.service.first_patience = 60.0
        with pytest.raises(InputError, match="something else than XML: it does not speak S3"):
            store.list("s3://bucket/m")


def test_a_server_that_knows_none_of_our_requests_is_refused_for_good(s3_credentials: None) -> None:
    with saying(lambda request: send(request, b"no such page", status=404, kind="text/plain")) as url:
        store = opened({"endpoint_url": url})
        calls: list[Callable[[], object]] = [
            lambda: store.list("s3://bucket/m"),
            lambda: store.list_uploads("s3://bucket/m"),
            lambda: store.put("s3://bucket/m/x", b"data"),
            lambda: store.begin_upload("s3://bucket/m/x", 1),
        ]
        for call in calls:
            with pytest.raises(InputError, match=r"404.*nothing there answers as S3 does"):
                call()


def listing(keys: list[str], more: bool, token: str = "again") -> bytes:
    entries = "".join(f"<Contents><Key>{key}</Key><Size>1</Size><ETag>&quot;e&quot;</ETag></Contents>" for key in keys)
    return (
        f"<ListBucketResult><IsTruncated>{'true' if more else 'false'}</IsTruncated>{entries}"
        f"<NextContinuationToken>{token}</NextContinuationToken><NextMarker>{token}</NextMarker></ListBucketResult>"
    ).encode()


@pytest.mark.parametrize("kind", ["same", "empty", "new", "no token"])
def test_a_listing_without_an_end_is_given_up(kind: str, s3_credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_listing, "MOST_NAMES", 5_000)
    pages = 0

    def page(request: BaseHTTPRequestHandler) -> None:
        nonlocal pages
        pages += 1
        numbers = range(pages * 1000, pages * 1000 + 1000) if kind == "new" else range(0 if kind == "empty" else 2)
        body = listing([f"m/{number}" for number in numbers], more=True)
        if kind == "no token":
            body = body.replace(
                b"<NextContinuationToken>again</NextContinuationToken><NextMarker>again</NextMarker>", b""
            )
        send(request, body)

    with saying(page) as url, pytest.raises(InputError, match=r"s3://bucket/m: its listing has no end.*check storage"):
        opened({"endpoint_url": url}).list("s3://bucket/m")
    assert pages <= 23


def test_folders_with_many_files_are_not_listed_together(s3_credentials: None) -> None:
    pages = 0

    def page(request: BaseHTTPRequestHandler) -> None:
        nonlocal pages
        pages += 1
        send(request, listing([f"m/0/{pages}-{number}" for number in range(1000)], more=True))

    with saying(page) as url:
        assert opened({"endpoint_url": url}).list_each([f"s3://bucket/m/{n}" for n in range(100)]) == {}
    assert pages == 2


def test_lists_of_parts_and_uploads_without_an_end_are_given_up(s3_credentials: None) -> None:
    def parts(request: BaseHTTPRequestHandler) -> None:
        one = "<Part><PartNumber>1</PartNumber><Size>1</Size><ETag>e</ETag></Part>"
        told = f"<IsTruncated>true</IsTruncated><NextPartNumberMarker>1</NextPartNumberMarker>{one}"
        send(request, f"<ListPartsResult>{told}</ListPartsResult>".encode())

    def uploads(request: BaseHTTPRequestHandler) -> None:
        one = "<Upload><Key>m/x</Key><UploadId>u</UploadId></Upload>"
        marks = "<NextKeyMarker>m/x</NextKeyMarker><NextUploadIdMarker>u</NextUploadIdMarker>"
        told = f"<IsTruncated>true</IsTruncated>{marks}{one}"
        send(request, f"<ListMultipartUploadsResult>{told}</ListMultipartUploadsResult>".encode())

    with saying(parts) as url, pytest.raises(InputError, match="the list of parts has no end"):
        opened({"endpoint_url": url}).list_parts("s3://bucket/m/x", "u")
    with saying(uploads) as url, pytest.raises(InputError, match="the list of uploads has no end"):
        opened({"endpoint_url": url}).list_uploads("s3://bucket/m")


def test_a_listing_without_keys_is_no_defect_of_ours(s3_credentials: None) -> None:
    def page(request: BaseHTTPRequestHandler) -> None:
        send(request, b"<ListBucketResult><Contents><Size>1</Size></Contents></ListBucketResult>")

    with (
        saying(page) as url,
        pytest.raises(InputError, match=r"lists Contents without their Key.*S3 answers otherwise"),
    ):
        opened({"endpoint_url": url}).list("s3://bucket/m")


@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_document_is_read_up_to_a_limit(status: int, s3_credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_client, "DOCUMENT_BYTES", 1 << 20)
    sent = 0

    def flood(request: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        request.send_response(status)
        request.send_header("Content-Length", str(1 << 40))
        request.end_headers()
        for _ in range(1000):
            request.wfile.write(b"x" * (1 << 16))
            sent += 1 << 16

    with saying(flood) as url, pytest.raises(InputError, match=r"answers ListObjectsV2 with more than 1,048,576 bytes"):
        opened({"endpoint_url": url}).list("s3://bucket/m")
    assert sent < 32 << 20  # what the sockets took


def test_a_document_that_trickles_is_given_up(s3_credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_client, "DOCUMENT_SECONDS", 0.3)

    def trickle(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "10000")
        request.end_headers()
        for _ in range(10_000):
            request.wfile.write(b"x" * 100)
            time.sleep(0.05)

    with saying(trickle) as url:
        store = opened({"endpoint_url": url})
        store.service.first_patience = store.service.patience = 1.0
        with pytest.raises(UnavailableError, match=r"its answer took more than 0\.3 s"):
            store.list("s3://bucket/m")


def test_headers_without_an_end_are_given_up(s3_credentials: None) -> None:
    def headers(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        for number in range(100_000):
            request.send_header(f"X-{number}", "x" * 100)
        request.end_headers()

    with saying(headers) as url:
        store = opened({"endpoint_url": url})
        store.service.first_patience = store.service.patience = 1.0
        with pytest.raises(MergeError, match="listing it failed"):
            store.list("s3://bucket/m")


@pytest.mark.parametrize("kind", ["another name", "expired", "no TLS"])
def test_tls_that_can_not_work_is_refused_for_good(kind: str, s3_credentials: None, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    name = "elsewhere.example" if kind == "another name" else "localhost"
    ends = datetime(2020, 1, 2, tzinfo=UTC) if kind == "expired" else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, not_before=ends and ends.replace(day=1), not_after=ends).configure_cert(context)
    remedy = {"another name": "name the host as its certificate does", "expired": "certificate must be renewed",
              "no TLS": "speaks no TLS there: write http://"}[kind]  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", free_port()), partial(BaseHTTPRequestHandler))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    if kind != "no TLS":
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        options = {"endpoint_url": f"https://localhost:{server.server_port}", "ca": str(tmp_path / "ca.pem")}
        with pytest.raises(InputError, match=remedy):
            opened(options).head("s3://bucket/x", 1)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_parts_of_both_checksums_are_joined(s3_bucket: Bucket) -> None:
    """As after a service has refused one of them in the middle of a run."""
    storage = dict(s3_bucket.storage["s3"])
    uri, data = f"{s3_bucket.uri}/x", os.urandom(PART + 3)
    md5, crc = opened(storage), opened({**storage, "checksums": "when_supported"})
    upload = md5.begin_upload(uri, len(data))
    parts: list[Part] = [
        md5.write_part(uri, upload, 1, 0, memoryview(data)[:PART]),
        crc.write_part(uri, upload, 2, PART, memoryview(data)[PART:]),
    ]
    md5.complete_upload(uri, upload, parts)
    assert md5.get(uri, len(data))[1] == data
