import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import google_crc32c
import pytest

from ties_ray.errors import InputError, RecipeError, UnavailableError
from ties_ray.stores import (
    Meter,
    NoOptions,
    Stores,
    Transient,
    WritableStore,
    crc32c_joined,
    entry_uri,
    join,
    options_of,
    persist,
    scheme_of,
    shown,
    within,
)
from ties_ray.stores.local import Local
from ties_ray.stores.memory import Memory


def test_the_scheme_chooses_the_store_and_each_is_opened_once() -> None:
    stores = Stores({})
    assert isinstance(stores.of("/a/b"), Local)
    assert stores.of("file:///a/b") is stores.of("relative/path")
    assert isinstance(stores.of("memory://a"), Memory)
    assert len(stores.opened()) == 2
    assert [scheme_of(uri) for uri in ("s3://a/b", "zip://x::s3://a/b", "a:b")] == ["s3", "zip", "local"]


def test_a_uri_with_a_secret_or_a_chain_is_refused_also_where_its_store_is_open() -> None:
    stores = Stores({})
    stores.of("https://host/x")
    for uri in ("https://me:0123abcd@host/x", "https://host/x?X-Amz-Signature=0123abcd"):
        with pytest.raises(
            InputError, match="is a URL with a password or a signature in it; give the plain URL"
        ) as caught:
            stores.of(uri)
        assert "0123abcd" not in str(caught.value)
    with pytest.raises(RecipeError, match="is a chain of URIs"):
        stores.of("https://host/x::file:///etc/passwd")


METHODS = ["list", "head", "read", "put", "delete", "begin_upload", "write_part", "list_parts", "list_uploads",
           "complete_upload", "abort_upload"]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_store_that_lacks_a_method_can_not_be_made(name: str) -> None:
    made = type("Incomplete", (WritableStore,), {other: getattr(Memory, other) for other in METHODS if other != name})
    with pytest.raises(TypeError, match=rf"abstract method '?{name}'?$"):
        made(NoOptions())


def test_a_store_that_only_reads_has_no_method_that_writes() -> None:
    stores = Stores({})
    reader = stores.of("https://host/folder")
    assert not isinstance(reader, WritableStore)
    assert not hasattr(reader, "put")
    with pytest.raises(InputError, match=r"https://host/folder: can only be read; write to a local folder"):
        stores.writer("https://host/folder")
    assert stores.writer("memory://x") is stores.of("memory://y")


def test_names_are_joined_to_folders() -> None:
    assert join("s3://a/b/", "c") == "s3://a/b/c"
    assert join("/a::b", "c") == "/a::b/c"
    assert join("s3://b/a::b", "c") == "s3://b/a::b/c"
    assert within("s3://a/b/", "c/d") == "s3://a/b/c/d"
    assert entry_uri("s3://a", "odd\\name") == "s3://a/odd\\name"  # what a store lists is there, whatever its name


@pytest.mark.parametrize("folder", ["/out", "s3://bucket/out", "memory://out", "file:///out"])
@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\\b", "..\\x", "a\0b", "x/", "s3://b/k", "file:///x"]
)
def test_no_name_of_a_document_leads_out_of_its_folder(folder: str, name: str) -> None:
    with pytest.raises(InputError, match="is not the name of a file in this folder; rename the file"):
        join(folder, name)
    if name not in ("a/b",):
        with pytest.raises(InputError, match="is not the name of a file in this folder"):
            within(folder, f"inner/{name}")


def test_wrong_options_are_all_named_without_their_values() -> None:
    with pytest.raises(RecipeError, match=r"storage\.s3\.bucket: Extra inputs") as caught:
        options_of("s3", {"bucket": "hidden", "addressing": "sideways"})
    assert [problem.where for problem in caught.value.problems] == ["storage.s3.addressing", "storage.s3.bucket"]
    assert "hidden" not in str(caught.value)
    for scheme in ("local", "memory"):
        with pytest.raises(RecipeError, match=rf"storage\.{scheme}\.bucket: Extra inputs") as caught:
            options_of(scheme, {"bucket": "hidden"})
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["key", "secret", "aws_secret_access_key", "access_key_id", "session_token", "password"]
)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name!r} looks like a secret.*environment, a profile or a role") as caught:
        options_of("s3", {name: "0123abcd"})
    assert "0123abcd" not in str(caught.value)


def test_a_password_inside_a_url_is_refused() -> None:
    with pytest.raises(RecipeError, match="user or password") as caught:
        options_of("s3", {"proxy": "http://me:0123abcd@proxy:8080"})
    assert "0123abcd" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("s3://bucket/a key", "s3://bucket/a key"),
        ("at https://h/x?X-Amz-Signature=0123abcd&a=b: 403", "at https://h/x?... 403"),
        ("http://me:0123abcd@proxy:80/x", "http://proxy:80/x"),
        ("header Authorization: 0123abcd", "header Authorization: ..."),
    ],
)
def test_a_message_shows_no_signature_and_no_password(text: str, safe: str) -> None:
    assert shown(text) == safe


def test_a_transient_failure_is_repeated_and_counted() -> None:
    meter, left = Meter(), [Transient("once"), Transient("twice")]

    def attempt() -> str:
        if left:
            raise left.pop()
        return "done"

    assert persist(attempt, meter=meter, uri="s3://a/b", doing="reading", seconds=lambda: 10.0) == "done"
    assert asdict(meter) == asdict(Meter(retries=2))


def test_failures_of_another_kind_take_no_try_from_those_that_are_limited() -> None:
    expired = Transient("400 ExpiredToken", attempts=4, remedy="get new credentials")
    left = [expired, Transient("503"), expired, Transient("503"), expired, Transient("503")]

    def attempt() -> str:
        if left:
            raise left.pop()
        return "done"

    assert persist(attempt, meter=Meter(), uri="s3://a/b", doing="writing", seconds=lambda: 60.0) == "done"
    left = [expired] * 4
    with pytest.raises(InputError, match=r"writing failed 4 times .*get new credentials"):
        persist(attempt, meter=Meter(), uri="s3://a/b", doing="writing", seconds=lambda: 60.0)


def test_a_spent_budget_names_the_object_the_request_and_the_last_cause() -> None:
    def attempt() -> None:
        raise Transient("503 SlowDown")

    message = r"s3://a/b: reading bytes 1 to 2 failed \d+ times in 0 s, last: 503 SlowDown; run the same"
    with pytest.raises(UnavailableError, match=message):
        persist(attempt, meter=Meter(), uri="s3://a/b", doing="reading bytes 1 to 2", seconds=lambda: 0.2)


def test_checking_the_options_of_s3_imports_no_client() -> None:
    code = (
        "import sys; from ties_ray.stores import options_of; options_of('s3', {'region': 'x'});"
        "sys.exit([name for name in ('s3fs', 'botocore', 'aiohttp', 'torch', 'numpy') if name in sys.modules] or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_checksum_of_bytes_joined_comes_from_those_of_their_runs() -> None:
    generator = random.Random(1)
    for _ in range(50):
        runs = [generator.randbytes(generator.choice((0, 1, 3, 4096, generator.randrange(70_000)))) for _ in range(6)]
        told = [(f"{google_crc32c.value(run):08x}", len(run)) for run in runs]
        assert crc32c_joined(told) == f"{google_crc32c.value(b''.join(runs)):08x}"
    assert crc32c_joined([]) == "00000000"


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_a_folder_is_deleted_with_all_that_lies_in_it_and_nothing_beside_it(scheme: str, tmp_path: Path) -> None:
    root = str(tmp_path) if scheme == "local" else f"memory://{tmp_path.name}"
    store = Stores({}).of(root)
    for name in ("in/a", "in/deep/er/b", "in-side/c"):
        store.put(within(root, name), b"x")
    store.delete_folder(join(root, "in"))
    store.delete_folder(join(root, "in"))  # nothing happens
    assert [folder.rpartition("/")[2] for folder in store.list(root).folders] == ["in-side"]


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_an_object_is_swapped_where_it_is_still_the_same(scheme: str, tmp_path: Path) -> None:
    uri = f"{tmp_path}/x" if scheme == "local" else f"memory://{tmp_path.name}/x"
    store = Stores({}).writer(uri)
    assert store.swap(uri, b"0", "a mark") is None
    with pytest.raises(FileNotFoundError, match="x"):
        store.head(uri, 1)
    first = store.swap(uri, b"1", "")
    assert first
    assert store.swap(uri, b"2", "") is None
    assert store.get(uri, 1) == (first, b"1")
    assert store.swap(uri, b"2", first.etag)
    assert store.swap(uri, b"3", first.etag) is None
    assert store.get(uri, 1)[1] == b"2"
