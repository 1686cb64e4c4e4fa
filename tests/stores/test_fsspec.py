import secrets
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from ties_ray.errors import InputError, RecipeError, UnavailableError
from ties_ray.stores import Listing, Stores
from ties_ray.stores.fsspec import Fsspec


class _Elsewhere(MemoryFileSystem):
    """fsspec's own memory, under a scheme that we have no file for."""

    protocol = "elsewhere"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("elsewhere://", "memory://"))


fsspec.register_implementation("elsewhere", _Elsewhere, clobber=True)


@pytest.fixture
def folder() -> Iterator[str]:
    """Return the URI of an empty folder in fsspec's memory."""
    yield f"elsewhere://{secrets.token_hex(4)}"
    _Elsewhere.store.clear()


def _write(uri: str, data: bytes) -> None:
    with fsspec.open(uri, "wb") as file:
        file.write(data)


def test_any_scheme_of_fsspec_is_read_by_ranges(folder: str) -> None:
    _write(f"{folder}/a/x", bytes(range(256)))
    store = Stores({}).of(folder)
    pin, start = store.head(f"{folder}/a/x", 10)
    assert isinstance(store, Fsspec)
    assert (pin.uri, pin.size, start) == (f"{folder}/a/x", 256, bytes(range(10)))
    buffer = bytearray(102)
    store.read(pin, 50, memoryview(buffer)[1:-1])
    assert buffer == b"\0" + bytes(range(50, 150)) + b"\0"
    assert store.meter.bytes_read == 110


def test_a_listing_is_one_level_deep_and_a_missing_folder_empty(folder: str) -> None:
    for name in ("b", "a", "c/d", "e/f/g"):
        _write(f"{folder}/{name}", name.encode())
    store = Stores({}).of(folder)
    found = store.list(folder)
    assert [(pin.uri, pin.size) for pin in found.files] == [(f"{folder}/a", 1), (f"{folder}/b", 1)]
    assert found.folders == (f"{folder}/c", f"{folder}/e")
    assert store.list(f"{folder}/nowhere") == Listing((), ())


def test_a_file_that_changed_at_the_same_size_is_refused(folder: str) -> None:
    _write(f"{folder}/x", b"old")
    store = Stores({}).of(folder)
    pin, _ = store.head(f"{folder}/x", 3)
    _write(f"{folder}/x", b"new")
    with pytest.raises(InputError, match=r"/x: changed since the plan"):
        store.read(pin, 0, memoryview(bytearray(3)))
    fsspec.filesystem("elsewhere").rm(f"{folder}/x")
    with pytest.raises(InputError, match="the file is gone"):
        store.read(pin, 0, memoryview(bytearray(3)))
    with pytest.raises(FileNotFoundError, match="/x"):
        store.head(f"{folder}/x", 3)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Return the URL of `tmp_path`, served by a server that, as Python's, knows no ranges."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_web_server_is_listed_and_pinned_by_what_it_tells(web: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "x").write_bytes(b"0123456789")
    store = Stores({}).of(web)
    found = store.list(web)
    assert [pin.uri for pin in found.files] == [f"{web}/x"]
    pin, data = store.get(f"{web}/x", 100)
    assert (pin.size, data) == (10, b"0123456789")
    assert pin.etag.startswith("Last-Modified ")
    with pytest.raises(FileNotFoundError, match="nothing"):
        store.head(f"{web}/nothing", 3)


def test_a_server_that_ignores_ranges_is_found_out(web: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    store = Stores({}).of(web)
    with pytest.raises(UnavailableError, match=r"asked for 4 bytes, 10 came"):
        store.head(f"{web}/x", 4)
    assert store.meter.requests == 4


def test_no_message_holds_a_presigned_query(web: str) -> None:
    store = Stores({}).of(web)
    with pytest.raises(FileNotFoundError) as caught:
        store.head(f"{web}/x?X-Amz-Signature=0123abcd", 4)
    assert "0123abcd" not in str(caught.value)


def test_a_chain_reads_inside_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("m/x", b"0123456789")
    store = Stores({}).of(f"zip://m::file://{tmp_path}/a.zip")
    (pin,) = store.list(f"zip://m::file://{tmp_path}/a.zip").files
    assert pin.uri == f"zip://m/x::file://{tmp_path}/a.zip"
    assert store.get(pin.uri, 10)[1] == b"0123456789"


def test_options_reach_the_file_system_and_secrets_are_refused(folder: str) -> None:
    with pytest.raises(RecipeError, match=r"storage.elsewhere: 'secret' looks like a secret"):
        Stores({"elsewhere": {"secret": "abc"}}).of(folder)
    with pytest.raises(RecipeError, match="never holds one") as caught:
        Stores({"http": {"client_kwargs": {"headers": {"Authorization": "Bearer 0123abcd"}}}}).of("http://x/y")
    assert "0123abcd" not in str(caught.value)
    with pytest.raises(RecipeError, match="unknown scheme 'nonsense'"):
        Stores({}).of("nonsense://x").head("nonsense://x", 1)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known_implementations, "odd", {"class": "odd_cloud.files.OddFileSystem", "err": "install it"})
    store = Stores({}).of("odd://bucket/x")
    with pytest.raises(InputError, match=r"odd:// needs another package; run `pip install odd-cloud`"):
        store.head("odd://bucket/x", 1)
