import json
import secrets
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import trustme
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from ties_ray import runtime
from ties_ray.errors import InputError, RecipeError, UnavailableError
from ties_ray.inputs.expand import entries_of
from ties_ray.operations import merging
from ties_ray.recipe import parse
from ties_ray.recipe.recipe import ModelEntry
from ties_ray.stores import REMOTE, Listing, Part, Pin, Stores, _uris, crc32c, join, last_part, leads_from, store_class
from ties_ray.stores._fsspec_uploads import FsspecWriter, parts_folder
from ties_ray.stores.fsspec import Fsspec, FsspecOptions, _pin
from ties_ray.testing import StoreContract


class _Elsewhere(MemoryFileSystem):
    """fsspec's own memory, under a scheme that we have no file for."""

    protocol = "elsewhere"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("elsewhere://", "memory://"))


fsspec.register_implementation("elsewhere", _Elsewhere, clobber=True)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a URI name that scheme, as no user could."""
    monkeypatch.setattr(_uris, "REMOTE", REMOTE | {"elsewhere"})


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
    with pytest.raises(InputError, match=r"asked for 4 bytes, 10 came; copy the files to a store that sends parts"):
        store.head(f"{web}/x", 4)
    assert store.meter.requests == 4


class _Whole(_Quiet):
    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "none")
        super().end_headers()


def test_a_large_file_of_a_server_that_says_it_sends_no_ranges_is_never_asked_for(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(17 << 20)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Whole, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        uri = f"http://127.0.0.1:{server.server_port}/x"
        store = Stores({}).of(uri)
        with pytest.raises(InputError, match=r"says that it sends no ranges; copy the files"):
            store.head(uri, 4)
        assert store.meter.requests == 0
        server.shutdown()
        thread.join()


class _Troubled(_Quiet):
    status = 503

    def do_GET(self) -> None:
        self.send_error(self.status)

    do_HEAD = do_GET


def test_an_outage_is_not_taken_for_a_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fsspec, "patience", 1.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Troubled) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        uri = f"http://127.0.0.1:{server.server_port}/x"
        with pytest.raises(UnavailableError, match="503"):
            Stores({}).of(uri).head(uri, 4)
        monkeypatch.setattr(_Troubled, "status", 403)
        with pytest.raises(InputError, match=r"was refused.*check the credentials that http:// finds"):
            Stores({}).of(uri).head(uri, 4)
        server.shutdown()
        thread.join()
    with pytest.raises(UnavailableError, match="Connect"):
        Stores({}).of(uri).head(uri, 4)


def test_what_another_try_can_not_mend_is_refused_for_good(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="check the host in the URI: its name is not known"):
        Stores({}).of("http://x").head("http://no-such-host.invalid/x", 1)
    authority = trustme.CA()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Quiet)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        with pytest.raises(InputError, match=r"CERTIFICATE_VERIFY_FAILED.*let this machine trust"):
            Stores({}).of("https://x").head(f"https://localhost:{server.server_port}/x", 1)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

    class DefaultCredentialsError(Exception):  # as Google's library calls it
        pass

    _write(f"{folder}/x", b"0123")
    store = Stores({}).of(folder)
    for error, remedy in (
        (DefaultCredentialsError("none"), "give the credentials"),
        (NotImplementedError(), "copy the"),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(_Elsewhere, "cat_file", fail)
        with pytest.raises(InputError, match=remedy):
            store.head(f"{folder}/x", 1)
    monkeypatch.setattr(Fsspec, "patience", 1.0)
    monkeypatch.setattr(_Elsewhere, "cat_file", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("odd")))
    with pytest.raises(UnavailableError, match="RuntimeError: odd"):
        store.head(f"{folder}/x", 1)


@pytest.mark.parametrize(
    ("shown", "pinned"),
    [
        # what gcsfs 2026.10 shows of a file, and adlfs 2026.8: the marks of another content differ
        ({"etag": "COjB", "generation": "17", "md5Hash": "eA==", "mtime": "2026"}, "etag COjB"),
        ({"generation": "17", "md5Hash": "eA==", "updated": "2026"}, "generation 17"),
        ({"etag": "0x8DD", "content_settings": {"content_md5": None}, "last_modified": "2026"}, "etag 0x8DD"),
        ({"ETag": '"5f"', "Last-Modified": "Sat"}, 'ETag "5f"'),
        ({"Last-Modified": "Sat"}, "Last-Modified Sat"),
        ({"lfs": {"sha256": "ab"}, "mtime": "2026"}, "sha256 ab"),
        ({"lfs": "a pointer", "mtime": "2026"}, "mtime 2026"),
        ({"lfs": {"size": 4}}, ""),
        ({}, ""),
    ],
)
def test_a_pin_holds_the_best_mark_that_a_scheme_shows(shown: dict[str, object], pinned: str) -> None:
    assert _pin("gs://models/x", {"size": 4, "type": "file", **shown}) == Pin("gs://models/x", 4, pinned)


def test_a_file_without_bytes_or_without_a_size_counts_as_empty_in_a_listing() -> None:
    assert [_pin("gs://b/x", {"size": size}).size for size in (0, None, 4)] == [0, 0, 4]


class Answered(Exception):
    """An error of some client library, with the status of an answer or with other marks."""

    def __init__(self, **marks: object) -> None:
        super().__init__(f"with {marks}")
        vars(self).update(marks)


class NoCredentialsError(Answered):
    pass


def missing(cause: Exception | None = None) -> Exception:
    error = FileNotFoundError("as fsspec calls every failure of HTTP")
    error.__cause__ = cause
    return error


REFUSED, FAILED, COPY = (
    "was refused .*check the credentials",
    "check the URI and its storage",
    "copy the files to another",
)


@pytest.mark.parametrize(
    ("error", "kind", "message", "tries"),
    [
        (PermissionError("no"), InputError, REFUSED, 1),
        (Answered(status=401), InputError, REFUSED, 1),
        (Answered(code="403"), InputError, REFUSED, 1),
        (Answered(status_code=400), InputError, FAILED, 1),
        (Answered(response=Answered(status_code=404)), InputError, FAILED, 1),
        (Answered(status=499), InputError, FAILED, 1),
        (Answered(status=409), InputError, FAILED, 1),
        (Answered(status=408), UnavailableError, "Answered: with", 3),
        (Answered(status=429), UnavailableError, "Answered: with", 3),
        (Answered(status=500), UnavailableError, "Answered: with", 3),
        (Answered(status=399), UnavailableError, "Answered: with", 3),
        (Answered(code="odd"), UnavailableError, "Answered: with", 3),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), InputError, "check the host in the URI", 4),
        (socket.gaierror(socket.EAI_AGAIN, "later"), UnavailableError, "gaierror", 3),
        (ssl.SSLCertVerificationError("self-signed"), InputError, "let this machine trust the certificate", 1),
        (ssl.SSLError("cut"), UnavailableError, "SSLError", 3),
        (NoCredentialsError(), InputError, "give the credentials that elsewhere:// looks for", 1),
        (NoCredentialsError(retryable=True), UnavailableError, "NoCredentialsError", 3),
        (NotImplementedError(), InputError, COPY, 1),
        (TypeError("odd"), InputError, COPY, 1),
        (AttributeError("odd"), InputError, COPY, 1),
        (KeyError("odd"), InputError, COPY, 1),
        (missing(), FileNotFoundError, "/x", 1),
        (missing(Answered(status=404)), FileNotFoundError, "/x", 1),
        (missing(Answered(status=410)), FileNotFoundError, "/x", 1),
        (missing(Answered(status=403)), InputError, REFUSED, 1),
        (missing(Answered(status=503)), UnavailableError, "Answered", 3),
        (missing(TimeoutError("slow")), UnavailableError, "TimeoutError: slow", 3),
        (missing(ConnectionResetError("cut")), UnavailableError, "ConnectionResetError", 3),
        (missing(ssl.SSLError("cut")), UnavailableError, "SSLError", 3),
        (missing(socket.gaierror(socket.EAI_AGAIN, "later")), UnavailableError, "gaierror", 3),
    ],
)
def test_an_error_of_any_client_is_tried_again_only_where_that_can_help(
    error: Exception, kind: type[Exception], message: str, tries: int, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(f"{folder}/x", b"0123")
    store, now = Stores({}).of(folder), [0.0]

    def fail(*_: object, **__: object) -> bytes:
        now[0] += 1 if tries == 3 else 0
        raise error

    monkeypatch.setattr(_Elsewhere, "cat_file", fail)
    monkeypatch.setattr(Fsspec, "patience", 2.9)
    monkeypatch.setattr(runtime, "monotonic", lambda: now[0])
    monkeypatch.setattr(runtime, "sleep", lambda seconds: None)
    monkeypatch.setattr(runtime, "uniform", lambda low, high: low)
    with pytest.raises(kind, match=message):
        store.head(f"{folder}/x", 4)
    assert (store.meter.requests, store.meter.retries) == (tries, tries - 1)


def test_an_answer_that_is_too_short_is_asked_for_four_times(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(f"{folder}/x", b"0123456789")
    store = Stores({}).of(folder)
    monkeypatch.setattr(runtime, "sleep", lambda seconds: None)
    monkeypatch.setattr(_Elsewhere, "cat_file", lambda *_, **__: b"01")
    with pytest.raises(UnavailableError, match=r"failed 4 times .*: asked for 4 bytes, 2 came; run the same"):
        store.head(f"{folder}/x", 4)
    assert (store.meter.requests, store.meter.bytes_read) == (4, 8)


def test_a_look_without_bytes_asks_for_none_and_a_file_is_no_folder(folder: str) -> None:
    _write(f"{folder}/x", b"0123")
    store = Stores({}).of(folder)
    assert store.head(f"{folder}/x", 0)[1] == b""
    assert store.meter.requests == 0
    assert store.list(f"{folder}/x") == Listing((), ())
    with pytest.raises(FileNotFoundError, match=folder):
        store.head(folder, 4)


def test_a_file_whose_size_is_not_told_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Elsewhere, "info", lambda *_: {"type": "file", "size": None})
    with pytest.raises(InputError, match="/x: the server does not tell its size; copy it to another store"):
        Stores({}).of(folder).head(f"{folder}/x", 4)


def test_no_message_holds_a_presigned_query(web: str) -> None:
    store = Stores({}).of(web)
    with pytest.raises(FileNotFoundError) as caught:
        store.head(f"{web}/x?X-Amz-Signature=0123abcd", 4)
    assert "0123abcd" not in str(caught.value)


HOSTILE = [
    "reference://::file:///x.json", "reference://x", "simplecache::s3://b/k", "filecache::http://h/x", "filecache://x",
    "blockcache://x", "cached://x", "zip://m::file:///a.zip", "tar://m::https://h/a.tar", "libarchive://m::/a", "git://x",
    "dir://x", "local:///etc/passwd", "jupyter://h/x", "jlab://h/x", "dask://x", "data://text/plain,x", "generic://x",
    "asyncwrapper://x", "pyscript://x", "dvc://x", "smb://h/x", "fsspec:///etc/passwd", "https://h/a::file:///etc/passwd",
    "gs://b/a::reference://x", "FILE:///etc/passwd", "S3://b/k", " https://h/x", "https ://h/x", "://x", "\t://x",
]  # fmt: skip


@pytest.mark.parametrize("uri", HOSTILE)
def test_a_uri_that_could_lead_from_its_store_to_another_is_refused(uri: str) -> None:
    with pytest.raises(RecipeError, match=r"unknown scheme|is a chain of URIs"):
        Stores({}).of(uri)
    data = {"base": uri, "models": [uri, {"table": uri}], "method": "ties", "output": uri, "run": {"pool_cache": uri}}
    with pytest.raises(RecipeError, match=r"unknown scheme|is a chain of URIs|holds a control character") as raised:
        parse.validate(data)
    assert len(raised.value.problems) == 5


def test_a_row_of_a_table_cannot_run_what_a_reference_says(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    template = "{{ x.__init__.__globals__['__builtins__']['open']('" + str(ran) + "', 'w') }}"
    document = {"version": 1, "templates": {"x": "{{y}}"}, "refs": {"model.safetensors": [template]}}
    (tmp_path / "x.json").write_text(json.dumps(document))
    (tmp_path / "pool.csv").write_text(f"path\nreference://::file://{tmp_path}/x.json\n")
    (tmp_path / "base").mkdir()
    data = {"base": f"{tmp_path}/base", "models": [{"table": f"{tmp_path}/pool.csv"}], "method": "ties"}
    with pytest.raises(InputError, match=r"pool.csv:2: path: unknown scheme 'reference'"):
        merging.plan(parse.validate(data | {"output": f"{tmp_path}/out"}))
    assert not ran.exists()


@pytest.mark.parametrize("scheme", sorted(REMOTE - {"hf"}))  # which has a store of its own
def test_every_remote_scheme_is_one_of_fsspec_that_keeps_no_local_files(scheme: str) -> None:
    found = known_implementations.get(scheme, {"class": "of another package"})["class"]
    assert not found.startswith(("fsspec.implementations.cached", "fsspec.implementations.local"))
    assert issubclass(store_class(scheme), Fsspec)
    with pytest.raises(RecipeError, match=r"`protocol` would lead"):
        Stores({scheme: {"protocol": "file"}}).of(f"{scheme}://x")


@pytest.mark.parametrize(
    ("table", "path", "allowed"),
    [
        ("s3://b/t.csv", "s3://other/m", True),
        ("s3://b/t.csv", "/etc", False),
        ("s3://b/t.csv", "relative", False),
        ("s3://b/t.csv", "~/m", False),
        ("s3://b/t.csv", "file:///etc", False),
        ("s3://b/t.csv", "memory://x", False),
        ("s3://b/t.csv", "http://169.254.169.254/latest", False),
        ("http://h/t.csv", "https://h/m", True),
        ("gs://b/t.csv", "gcs://b/m", True),
        ("abfs://b/t.csv", "az://b/m", True),
        ("hf://o/r/t.csv", "s3://b/m", False),
        ("/t.csv", "/m", True),
        ("file:///t.csv", "s3://b/m", True),
    ],
)
def test_a_table_of_a_store_names_only_what_that_store_holds(table: str, path: str, allowed: bool) -> None:
    assert leads_from(table, path) == allowed


def test_a_row_that_leads_from_a_remote_table_to_a_local_path_is_refused_by_its_line(folder: str) -> None:
    _write(f"{folder}/t.csv", f"path\n{folder}/m\n/etc\nrelative\n".encode())
    with pytest.raises(InputError, match=r"(?s)t.csv:3: names /etc, and a table of elsewhere.*t.csv:4: names relative"):
        list(entries_of(ModelEntry(table=f"{folder}/t.csv"), "models.0", Stores({}), None, []))  # type: ignore[arg-type]


def test_options_reach_the_file_system_and_secrets_are_refused(folder: str) -> None:
    with pytest.raises(RecipeError, match=r"storage.elsewhere: 'secret' looks like a secret"):
        Stores({"elsewhere": {"secret": "abc"}}).of(folder)
    with pytest.raises(RecipeError, match="never holds one") as caught:
        Stores({"http": {"client_kwargs": {"headers": {"Authorization": "Bearer 0123abcd"}}}}).of("http://x/y")
    assert "0123abcd" not in str(caught.value)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known_implementations, "oci", {"class": "odd_cloud.files.OddFileSystem", "err": "install it"})
    store = Stores({}).of("oci://bucket/x")
    with pytest.raises(InputError, match=r"oci:// needs another package; run `pip install odd-cloud`"):
        store.head("oci://bucket/x", 1)
    with pytest.raises(InputError, match=r"no package is installed that serves abfss://; install one for fsspec"):
        Stores({}).of("abfss://bucket/x").head("abfss://bucket/x", 1)


# Writing in parts.


class _Joined(FsspecWriter):
    """Parts that lie by themselves until they are joined, as on gs://."""

    def _stage(self, uri: str, upload: str, number: int, data: bytes) -> Part:
        _write(join(parts_folder(uri, upload), f"{number:05}"), data)
        return Part(number, len(data), crc32c(memoryview(data)))

    def _staged(self, uri: str, upload: str) -> tuple[Part, ...]:
        files, path = self._at(parts_folder(uri, upload))
        paths = files.ls(path, detail=False) if files.exists(path) else []
        numbers = {int(last_part(path)): files.cat_file(path) for path in reversed(paths)}
        return tuple(Part(number, len(data), crc32c(memoryview(data))) for number, data in numbers.items())

    def _join(self, uri: str, upload: str, parts: Sequence[Part]) -> None:
        files, folder = self._at(uri)[0], self._at(parts_folder(uri, upload))[1]
        _write(uri, b"".join(files.cat_file(f"{folder}/{part.number:05}") for part in parts))
        files.store[self._at(uri)[1]].upload = upload

    def _discard(self, uri: str, upload: str) -> None:
        self.delete_folder(parts_folder(uri, upload))

    def _maker(self, uri: str) -> str:
        files, path = self._at(uri)
        files.info(path)
        return getattr(files.store[path], "upload", "")


@pytest.fixture
def writer() -> _Joined:
    return _Joined(FsspecOptions())


class TestWriter(StoreContract):
    part_bytes = 5000

    @pytest.fixture
    def place(self, writer: _Joined, folder: str) -> tuple[_Joined, str]:
        return writer, folder


OWN = ["_stage", "_staged", "_join", "_discard", "_maker"]


@pytest.mark.parametrize("name", OWN)
def test_a_store_that_lacks_a_way_to_join_parts_can_not_be_made(name: str) -> None:
    made = type("Incomplete", (FsspecWriter,), {other: getattr(_Joined, other) for other in OWN if other != name})
    with pytest.raises(TypeError, match=rf"abstract method '?{name}'?$"):
        made(FsspecOptions())


def test_uploads_under_way_are_those_of_a_folder_and_go_with_it(writer: _Joined, folder: str) -> None:
    for name in ("a/x", "a/y", "a/b/z", "c"):
        upload = writer.begin_upload(f"{folder}/{name}", 4)
        writer.write_part(f"{folder}/{name}", upload, 1, 0, memoryview(b"0123"))
    names = [uri.removeprefix(folder) for uri, _ in writer.list_uploads(f"{folder}/a")]
    assert names == ["/a/x", "/a/y"]
    assert writer.list(f"{folder}/a") == Listing((), (f"{folder}/a/b",))
    writer.delete_folder(f"{folder}/a")
    assert writer.list_uploads(f"{folder}/a") == writer.list_uploads(f"{folder}/a/b") == ()
    assert [uri for uri, _ in writer.list_uploads(folder)] == [f"{folder}/c"]
    assert not [path for path in _Elsewhere.store if "/a/" in path]


def test_an_upload_that_was_completed_leaves_the_object_alone(writer: _Joined, folder: str) -> None:
    upload = writer.begin_upload(f"{folder}/x", 4)
    part = writer.write_part(f"{folder}/x", upload, 1, 0, memoryview(b"0123"))
    writer.complete_upload(f"{folder}/x", upload, [part])
    assert [f"elsewhere:/{path}" for path in _Elsewhere.store] == [f"{folder}/x"]


def test_what_was_written_after_its_folder_was_listed_is_seen(
    writer: _Joined, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gcsfs and adlfs do, the file system answers from a listing that it keeps until all is invalidated."""
    kept: set[str] = set()
    info = _Elsewhere.info

    def keep(files: _Elsewhere, path: str | None = None) -> None:
        if path is None:
            kept.clear()

    def from_listing(files: _Elsewhere, path: str, **how: object) -> object:
        if kept and files._strip_protocol(path) not in kept:
            raise FileNotFoundError(path)
        return info(files, path, **how)

    monkeypatch.setattr(_Elsewhere, "invalidate_cache", keep)
    monkeypatch.setattr(_Elsewhere, "info", from_listing)
    kept.add("an earlier listing")
    pin = writer.put(f"{folder}/x", b"0123")
    kept.add("an earlier listing")
    assert writer.head(f"{folder}/x", 4) == (pin, b"0123")


@pytest.mark.parametrize("kind", ["missing", "other", "size"])
def test_parts_that_were_not_written_are_not_joined(kind: str, writer: _Joined, folder: str) -> None:
    uri = f"{folder}/x"
    upload = writer.begin_upload(uri, 5 if kind == "size" else 4)
    part = writer.write_part(uri, upload, 1, 0, memoryview(b"0123"))
    parts = {"missing": [], "other": [part._replace(etag="other")], "size": [part]}[kind]
    with pytest.raises(InputError, match=r"/x: the parts are not those that were written; run the merge with --fresh"):
        writer.complete_upload(uri, upload, parts)
    assert writer.list(folder).files == ()


def test_what_is_written_is_counted(writer: _Joined, folder: str) -> None:
    writer.put(f"{folder}/small", b"0123")
    assert (writer.meter.requests, writer.meter.bytes_written) == (1, 4)
    upload = writer.begin_upload(f"{folder}/x", 6)
    before, marker = writer.meter.requests, writer.meter.bytes_written - 4
    writer.write_part(f"{folder}/x", upload, 1, 0, memoryview(b"012345"))
    assert writer.meter.bytes_written == 4 + marker + 6
    assert writer.meter.requests == before + 2, "one for the marker, one for the part"
