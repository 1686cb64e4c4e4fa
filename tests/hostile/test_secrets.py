"""Credentials go from the environment to the storage and nowhere else; ports and files are as open as they must be."""

import base64
import gzip
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest
import torch

import ties_ray
from tests.conftest import Bucket, tool
from tests.tools.families import Family, make_family, write_checkpoint
from tests.tools.merging import LOCAL
from ties_ray.errors import InputError, MergeError, Problem, RecipeError, holds_secret, shown
from ties_ray.inputs.expand import entries_of
from ties_ray.operations import merging
from ties_ray.recipe import parse
from ties_ray.recipe.recipe import ModelEntry
from ties_ray.stores import Stores

KEY = "AKIAZZTIESRAYTEST0Q7"
SECRET = "gV9/distinctive+secret0key7Kq3xW2mZ"
TOKEN = "IQoJdistinctive//session+token//Hf83hs0aPq=="


def secrets_in(data: bytes) -> set[str]:
    """Return which credentials stand in the data: plain, quoted for a URL or JSON, or in base64."""
    found = set()
    for name, secret in (("key", KEY), ("secret", SECRET), ("token", TOKEN)):
        forms = {secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1], secret.replace("/", "\\/")}
        encoded = {base64.b64encode(secret[start:].encode())[4:-4] for start in range(3)}
        if any(form in data for form in {form.encode() for form in forms} | encoded):
            found.add(name)
    return found


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)


@pytest.fixture
def family(s3_bucket: Bucket, credentials: None) -> Family:
    return make_family(Stores(s3_bucket.storage).of(s3_bucket.uri), f"{s3_bucket.uri}/in", num_models=2)


def recipe_of(bucket: Bucket, family: Family, **more: object) -> dict[str, Any]:
    return {
        "base": family.base,
        "models": list(family.models),
        "method": "ties",
        "output": f"{bucket.uri}/out",
        "storage": bucket.storage,
        "run": LOCAL,
    } | more


def merge_by_command(tmp_path: Path, data: dict[str, Any], *options: str) -> "subprocess.CompletedProcess[bytes]":
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    command = [tool("ties-ray"), "merge", str(tmp_path / "recipe.json"), "--debug", *options]
    return subprocess.run(command, capture_output=True, timeout=200)


def objects(bucket: Bucket) -> Iterator[tuple[str, bytes]]:
    """Yield the key of each object of the bucket and its content, unpacked."""
    client = boto3.client("s3", endpoint_url=bucket.storage["s3"]["endpoint_url"], region_name="us-east-1")
    name = bucket.uri.removeprefix("s3://")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for found in page.get("Contents", []):
            answer = client.get_object(Bucket=name, Key=found["Key"])
            data = answer["Body"].read() + json.dumps(answer["Metadata"]).encode()
            yield found["Key"], gzip.decompress(data[: -len(b"{}")]) if found["Key"].endswith(".gz") else data


def test_a_secret_is_found_however_it_is_written() -> None:
    assert secrets_in(b"x" + SECRET.encode()) == {"secret"}
    assert secrets_in(quote(TOKEN, safe="").encode() + KEY.encode()) == {"key", "token"}
    assert all(secrets_in(base64.b64encode(b"u" * pad + SECRET.encode() + b"end")) == {"secret"} for pad in range(3))
    assert secrets_in(b"nothing") == set()


def test_a_merge_leaves_no_credential_in_what_it_says_and_writes(
    s3_bucket: Bucket, family: Family, tmp_path: Path
) -> None:
    result = f"{s3_bucket.uri}/result.json"
    done = merge_by_command(tmp_path, recipe_of(s3_bucket, family), "--result", result)
    assert done.returncode == 0, done.stderr
    assert done.stderr
    assert secrets_in(done.stdout + done.stderr) == set()
    written = dict(objects(s3_bucket))
    names = {key.rpartition("/")[2] for key in written}
    assert names >= {"plan.json.gz", "uploads.json", "ties-ray.recipe.yaml", "README.md", "result.json"}
    assert any("/records/" in key for key in written)
    assert {key: secrets_in(data) for key, data in written.items() if secrets_in(data)} == {}


@pytest.mark.parametrize("wrong", ["bucket", "secret", "key"])
def test_a_failure_names_no_credential(
    s3_bucket: Bucket,
    juicefs_bucket: Bucket,
    family: Family,
    tmp_path: Path,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = recipe_of(s3_bucket, family)
    if wrong == "bucket":
        data["base"] = "s3://no-such-bucket/base"
    else:  # this server checks signatures
        data |= {"base": f"{juicefs_bucket.uri}/base", "storage": juicefs_bucket.storage}
        monkeypatch.delenv("AWS_SESSION_TOKEN")
        if wrong == "secret":
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ties-ray")
    failed = merge_by_command(tmp_path, data, "--json")
    assert failed.returncode == 3, failed.stderr
    assert b"Traceback" in failed.stderr
    assert b'"status": "failed"' in failed.stdout
    assert secrets_in(failed.stdout + failed.stderr) == set()


SCRIPT = """
import json, os, sys
from pathlib import Path
import psutil, ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list
from tests.hostile.test_secrets import secrets_in
from ties_ray.operations import merging
from ties_ray.recipe import parse
from ties_ray.executors.ray import RayExecutor, _OWN_CLUSTER

said, seen = [], {}
start, submit = RayExecutor.start, RayExecutor.submit
RayExecutor.start = lambda self, *what: (said.append(repr(what)), start(self, *what))[1]
RayExecutor.submit = lambda self, *what: (said.append(repr(what)), submit(self, *what))[1]

def watch(progress):
    if seen or not ray.is_initialized() or progress.stage != "merge" or progress.done == 0:
        return
    me = psutil.Process()
    family = [me, *me.children(recursive=True)]
    seen["listening"] = sorted({
        at.laddr.ip for process in family for at in process.net_connections("inet") if at.status == "LISTEN"
    })
    seen["processes"] = len(family)
    texts = {" ".join(process.cmdline())[:200]: "\\0".join(process.cmdline()).encode() for process in family}
    files = [path for path in Path(os.environ["RAY_TMPDIR"]).rglob("*") if path.is_file()]
    texts |= {str(path): path.read_bytes() for path in files}
    for namespace in (None, "fun", "session", "cluster", "job", "package", "usage_stats", "tracing"):
        for key in _internal_kv_list(b"", namespace=namespace):
            texts[f"kv {namespace} {key}"] = key + (_internal_kv_get(key, namespace=namespace) or b"")
    texts["actors"] = repr(ray._private.state.actors()).encode()
    texts["jobs"] = repr(ray._private.state.jobs()).encode()
    texts["arguments"] = "".join(said).encode()
    seen["kinds"] = {"files": len(files), "kv": sum(name.startswith("kv") for name in texts), "said": len(said)}
    own = _OWN_CLUSTER["RAY_AUTH_TOKEN"].encode()
    seen["leaks"] = {name: sorted(secrets_in(text)) for name, text in texts.items() if secrets_in(text)}
    seen["leaks"] |= {name: "Ray's token" for name, text in texts.items() if own in text}

merging.merge(parse.validate(json.loads(sys.argv[1])), watch=watch)
print(json.dumps(seen))
"""


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """Return a folder whose path is short enough for Ray's sockets."""
    folder = tempfile.mkdtemp(prefix="r")
    yield folder
    shutil.rmtree(folder)


def test_ray_keeps_no_credential_and_listens_on_the_loopback_alone(
    s3_bucket: Bucket, family: Family, ray_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", ray_folder)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    data = recipe_of(s3_bucket, family, run={"executor": "ray", "workers": 1})
    command = [sys.executable, "-c", SCRIPT, json.dumps(data)]
    done = subprocess.run(command, capture_output=True, timeout=200, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr.decode()
    assert secrets_in(done.stdout + done.stderr) == set()
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["kinds"]["files"] > 10
    assert seen["kinds"]["kv"] > 3
    assert seen["kinds"]["said"] > 2
    assert seen["processes"] > 4
    assert seen["leaks"] == {}
    assert set(seen["listening"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    left = {str(path): secrets_in(path.read_bytes()) for path in Path(ray_folder).rglob("*") if path.is_file()}
    assert {path: found for path, found in left.items() if found} == {}
    assert {key for key, content in objects(s3_bucket) if secrets_in(content)} == set()


def test_no_store_travels(s3_bucket: Bucket, tmp_path: Path) -> None:
    for uri in (s3_bucket.uri, str(tmp_path), "memory://x"):
        with pytest.raises(TypeError, match="build it in the process that uses it"):
            pickle.dumps(Stores(s3_bucket.storage).of(uri))


GOOD: dict[str, Any] = {"base": "/b", "models": ["/m"], "method": "ties", "output": "/o"}


@pytest.mark.parametrize(
    "change",
    [
        {"storage": {"s3": {"aws_secret_access_key": SECRET}}},
        {"storage": {"s3": {"secret": SECRET}}},
        {"storage": {"s3": {"region": [SECRET]}}},
        {"storage": {"s3": {"addressing": SECRET}}},
        {"storage": {"s3": {"endpoint_url": f"https://user:{SECRET}@host"}}},
        {"storage": {"s3": {"endpoint_url": f"https://host/?X-Amz-Signature={SECRET}"}}},
        {"storage": {"s3": {"unknown": {"deep": SECRET}}}},
        {"storage": {"s3": SECRET}},
        {"storage": [SECRET]},
        {"storage": SECRET},
        {"storage": {"gs": {"token": SECRET}}},
        {"storage": {"abfs": {"account": {"sas": [SECRET]}}}},
        {"storage": {"https": {"headers": {"Authorization": f"Bearer {SECRET}"}}}},
        {"storage": {"local": {"follow_links": SECRET}}},
        {"base": f"https://user:{SECRET}@host/model"},
        {"models": ["/m", f"s3://bucket/model?X-Amz-Credential=a&X-Amz-Signature={SECRET}"]},
        {"models": [{"table": f"https://host/t.csv?sig={SECRET}"}]},
        {"output": f"s3://{KEY}:{SECRET}@bucket/out"},
    ],
    ids=lambda change: json.dumps(change)[:50],
)
def test_a_recipe_with_a_secret_is_refused_and_the_secret_is_not_repeated(change: dict[str, Any]) -> None:
    place = next(iter(change))
    with pytest.raises(RecipeError, match=place) as raised:
        parse.parse(json.dumps(GOOD | change))
    assert secrets_in(repr(raised.value).encode()) == set()
    (name, value) = next(iter(change.items()))
    with pytest.raises(RecipeError, match=place) as raised:
        parse.parse(json.dumps(GOOD), overrides=[f"{name}={json.dumps(value)}"])
    assert secrets_in(repr(raised.value).encode()) == set()


@pytest.mark.parametrize("override", [f"storage.s3.secret=[{SECRET}", f"base.x.y={SECRET}", "=x"])
def test_an_override_that_fails_does_not_repeat_its_value(override: str) -> None:
    with pytest.raises(RecipeError, match=r"--set|base\.x: unknown key") as raised:
        parse.parse(json.dumps(GOOD), overrides=[override])
    assert secrets_in(str(raised.value).encode()) == set()


def test_a_container_at_an_account_is_no_secret() -> None:
    assert parse.validate(GOOD | {"base": "abfs://models@account.dfs.core.windows.net/base"}).base
    assert parse.validate(GOOD | {"models": ["s3://bucket/team-?/key=7/m-*"]}).models


def test_a_signed_url_in_a_table_is_refused_by_its_line() -> None:
    stores = Stores({})
    table = f"path\n/a\nhttps://host/m?X-Amz-Signature={SECRET}\n".encode()
    stores.of("memory://x").put("memory://secret-tables/t.csv", table)
    with pytest.raises(InputError, match=r"t.csv:3: is a URL with a password or a signature") as raised:
        list(entries_of(ModelEntry(table="memory://secret-tables/t.csv"), "models.0", stores, None, []))  # type: ignore[arg-type]
    assert secrets_in(str(raised.value).encode()) == set()


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022, 0o002])
def test_everything_that_is_written_honours_the_umask(tmp_path: Path, umask: int) -> None:
    tensors = {"w": torch.ones(8, dtype=torch.bfloat16)}
    for name in ("base", "m"):
        write_checkpoint(Stores({}).of(str(tmp_path)), f"{tmp_path}/{name}", tensors)
    modes: dict[str, int] = {}

    def watch(progress: object) -> None:
        for path in (tmp_path / "out").rglob("*"):
            modes.setdefault(str(path), stat.S_IMODE(path.stat().st_mode) | (path.is_dir() << 16))

    before = os.umask(umask)
    try:
        data = {"base": f"{tmp_path}/base", "models": [f"{tmp_path}/m"], "method": "ties", "output": f"{tmp_path}/out"}
        merging.merge(parse.validate(data | {"run": LOCAL}), watch=watch)
        watch(None)
    finally:
        os.umask(before)
    assert any(".ties-ray-part" in path for path in modes)
    assert any(path.endswith("plan.json.gz") for path in modes)
    assert {mode for mode in modes.values() if not mode >> 16} == {0o666 & ~umask}
    assert {mode & 0o7777 for mode in modes.values() if mode >> 16} == {0o777 & ~umask}


@pytest.mark.parametrize(
    "url",
    [
        f"s3://{KEY}:{SECRET}@bucket/model",
        f"https://user:{SECRET}@host:9000/model",
        f"https://{quote(SECRET, safe='')}@host/model",
        f"https://host/model?X-Amz-Credential={KEY}%2F2026&X-Amz-Security-Token={quote(TOKEN)}&X-Amz-Signature={SECRET}",
    ],
    ids=["pair", "password", "user", "signed"],
)
def test_messages_hide_what_a_url_holds(s3_credentials: None, url: str) -> None:
    assert secrets_in(shown(f"can't read {url}: 403").encode()) == set()
    with pytest.raises((InputError, RecipeError), match=r".") as raised:
        ties_ray.load_recipe(url.replace("https://", "memory://"))
    assert secrets_in(repr(raised.value).encode()) == set()


SIGNED = {
    "azure": f"https://acct.blob.core.windows.net/c/m?sv=2024-11-04&se=2026-12-01&sr=c&sig={quote(SECRET, safe='')}",
    "azure, first": f"https://acct.blob.core.windows.net/c/m?sig={quote(SECRET, safe='')}&sv=2024",
    "azure, by container": f"abfss://c@acct.dfs.core.windows.net/m?sig={quote(SECRET, safe='')}",
    "s3": f"https://b.s3.amazonaws.com/k?X-Amz-Algorithm=a&X-Amz-Credential={KEY}%2Fx&X-Amz-Signature={SECRET}",
    "s3, version 2": f"https://b.s3.amazonaws.com/k?AWSAccessKeyId={KEY}&Expires=1&Signature={quote(SECRET, safe='')}",
    "google": f"https://storage.googleapis.com/b/k?GoogleAccessId=a&Expires=1&Signature={quote(SECRET, safe='')}",
    "google, version 4": f"https://storage.googleapis.com/b/k?X-Goog-Credential={KEY}&X-Goog-Signature={SECRET}",
    "cloudfront": f"https://d.cloudfront.net/k?Policy=x&Signature={SECRET}&Key-Pair-Id={KEY}",
    "alibaba": f"https://b.oss-cn.aliyuncs.com/k?OSSAccessKeyId={KEY}&Expires=1&Signature={SECRET}",
    "token": f"https://host/k?access_token={SECRET}",
    "fragment": f"https://host/k#access_token={SECRET}",
    "api key": f"https://host/k?api-key={SECRET}",
}


@pytest.mark.parametrize("kind", SIGNED)
def test_a_signed_url_is_refused_wherever_it_stands_and_never_repeated(kind: str) -> None:
    url = SIGNED[kind]
    for change in ({"base": url}, {"models": [url]}, {"models": [{"table": url}]}, {"output": url}):
        with pytest.raises(RecipeError, match=r"is a URL with a password or a signature|unknown scheme") as raised:
            parse.parse(json.dumps(GOOD | change))
        assert secrets_in(repr(raised.value).encode()) == set()
    with pytest.raises(InputError, match="is a URL with a password or a signature") as refused:
        Stores({}).of(url)
    assert secrets_in(repr(refused.value).encode()) == set()
    error = MergeError(Problem(url, f"GET '{url}' failed", f"see ({url})"))
    assert secrets_in(repr(error).encode()) == set()
    assert secrets_in(str(error).encode()) == set()


@pytest.mark.parametrize(
    "text",
    [
        f"AccountKey={SECRET};EndpointSuffix=core.windows.net",
        f"SharedAccessSignature=sv=2024&sig={SECRET}",
        f'{{"token": "{SECRET}", "password": "{SECRET}"}}',
        f"Authorization: Bearer {SECRET}",
        f"api_key={SECRET} secret: {SECRET}",
    ],
)
def test_a_servers_words_are_told_without_what_they_repeat(text: str) -> None:
    assert secrets_in(str(MergeError(Problem("https://host/x", text))).encode()) == set()


@pytest.mark.parametrize("text", ["http://" + "?sig" * 30_000, "a://b:" * 30_000, "://a" * 30_000, "a" * 120_000])
def test_a_long_text_is_looked_through_in_no_time(text: str) -> None:
    began = time.monotonic()
    holds_secret(text)
    assert len(shown(text)) < 25_000
    assert list(parse.unfit({"path": text}))
    assert time.monotonic() - began < 5


def test_messages_keep_the_port_and_the_path_of_a_url() -> None:
    for url in (
        "http://127.0.0.1:9000/bucket/a@b",
        "hdfs://host:8020/m@2",
        "s3://bucket/a:b@c/m",
        "s3://b/team-?/key=7/m",
    ):
        assert shown(url) == url
