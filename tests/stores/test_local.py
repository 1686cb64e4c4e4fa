import ctypes
import errno
import fcntl
import mmap
import multiprocessing
import os
import re
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ties_ray.errors import InputError, InterruptedMerge, UnavailableError
from ties_ray.stores import Part, Store, Stores, local
from ties_ray.stores.local import Local, LocalOptions
from ties_ray.testing import StoreContract


class TestLocal(StoreContract):
    part_bytes = 70_000

    @pytest.fixture
    def place(self, tmp_path: Path) -> tuple[Store, str]:
        return Local(LocalOptions()), str(tmp_path)


class TestLocalByUri(StoreContract):
    part_bytes = 70_000

    @pytest.fixture
    def place(self, tmp_path: Path) -> tuple[Store, str]:
        return Local(LocalOptions()), f"file://{tmp_path}"


@pytest.fixture
def store() -> Local:
    return Local(LocalOptions())


def test_a_file_written_in_place_is_refused(store: Local, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    pin, _ = store.head(str(path), 0)
    with path.open("r+b") as file:
        file.write(b"9")
    os.utime(path, ns=(0, int(pin.etag.partition("-")[0]) + 1))  # as a coarse clock may not have moved
    with pytest.raises(InputError, match="changed since the plan"):
        store.read(pin, 0, memoryview(bytearray(4)))


def test_another_file_of_the_same_name_size_and_time_is_refused(store: Local, tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content in (b"one", b"two"):  # as an archive with fixed times unpacks it; the inode is often the same
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(0, 0))
        if content == b"one":
            pin, _ = store.head(str(path), 0)
    with pytest.raises(InputError, match="changed since the plan"):
        store.read(pin, 0, memoryview(bytearray(3)))


@pytest.mark.parametrize("look", ["head", "list", "link"])
def test_a_file_rewritten_within_one_tick_of_the_clock_is_refused(
    look: str, store: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, fstat = os.stat, os.fstat

    def coarse(status: os.stat_result) -> object:
        kept = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        ticks = {name: kept[name] // 10**7 * 10**7 + 1 for name in ("st_mtime_ns", "st_ctime_ns")}
        return SimpleNamespace(**kept | ticks)

    monkeypatch.setattr(local.os, "stat", lambda *where, **how: coarse(stat(*where, **how)))
    monkeypatch.setattr(local.os, "fstat", lambda file: coarse(fstat(file)))
    for number in range(10):
        path = tmp_path / str(number) / "x"
        path.parent.mkdir()
        path.write_bytes(b"one")
        if look == "link":
            path = path.rename(path.with_name("y"))
            path.with_name("x").symlink_to("y")
        pin = store.head(str(path), 0)[0] if look == "head" else store.list(str(path.parent)).files[0]
        with path.open("r+b") as file:
            file.write(b"two")
        with pytest.raises(InputError, match="changed since the plan"):
            store.read(pin, 0, memoryview(bytearray(3)))


def test_two_files_of_one_size_that_a_merge_writes_at_once_differ_in_their_marks(
    store: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = [store.put(str(tmp_path / "x"), b"%03d" % number).etag for number in range(50)]
    assert len({mark.partition("-")[0] for mark in marks}) == 50
    monkeypatch.setattr(local.time, "time_ns", lambda: 123_456_789)
    marks.append(store.put(str(tmp_path / "x"), b"last").etag)
    assert marks[-1].startswith("123456789-"), "by a clock that ticks finely, whatever the file system's does"
    assert store.head(str(tmp_path / "x"), 0)[0].etag == marks[-1]


def test_a_file_cut_short_is_refused(store: Local, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    pin, _ = store.head(str(path), 0)
    os.truncate(path, 3)
    with pytest.raises(InputError, match=r"10 bytes with mark .*, now 3 with"):
        store.read(pin, 0, memoryview(bytearray(10)))


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system can't be asked")
def test_it_knows_what_the_page_cache_holds(store: Local, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(2**20))
    pin, _ = store.head(str(path), 0)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        assert store.is_in_page_cache(pin, 2**20 - 1)
        assert not store.is_in_page_cache(pin, 2**20), "there is no such byte"
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            resident = is_resident(mapped, 2**20 - mmap.PAGESIZE)  # asked first: a read makes the system fetch more
            assert store.is_in_page_cache(pin, 2**20 - 1) == resident
    path.unlink()
    assert not store.is_in_page_cache(pin, 0), "the read will say what is wrong"


def is_resident(mapped: mmap.mmap, offset: int) -> bool:
    """Return what the system itself says of the page at an offset."""
    found = (ctypes.c_ubyte * 1)()
    address = np.frombuffer(mapped, np.uint8).ctypes.data + offset
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(1), found) == 0
    return bool(found[0] & 1)


def test_links_are_followed_and_a_dangling_one_is_refused(store: Local, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to("weights")
    assert [pin.uri for pin in store.list(str(tmp_path)).files] == [str(link), f"{tmp_path}/weights"]
    assert store.get(str(link), 100) == (store.list(str(tmp_path)).files[0], b"weights")
    (tmp_path / "weights").unlink()
    with pytest.raises(InputError, match=r"model.safetensors: a link that leads nowhere"):
        store.list(str(tmp_path))


def _downloaded(cache: Path) -> Path:
    """Lay out a file as the Hugging Face cache does; return the folder that users name."""
    snapshot = cache / "models--a--b/snapshots/4f1e"
    snapshot.mkdir(parents=True)
    (cache / "models--a--b/blobs").mkdir()
    (cache / "models--a--b/blobs/0123").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    return snapshot


def test_links_of_a_hugging_face_cache_lead_to_its_blobs(store: Local, tmp_path: Path) -> None:
    snapshot = _downloaded(tmp_path)
    (pin,) = store.list(str(snapshot)).files
    assert store.get(pin.uri, 100) == (pin, b"weights")


@pytest.mark.parametrize("target", ["{tmp}/secret", "../../../secret", "../../blobs/../../secret", "../other"])
def test_a_link_that_leads_out_of_a_folder_is_refused_unless_the_recipe_trusts_it(
    store: Local, tmp_path: Path, target: str
) -> None:
    snapshot = _downloaded(tmp_path)
    for secret in (tmp_path / "secret", snapshot.parent / "other"):
        secret.write_bytes(b"not yours")
    (snapshot / "config.json").symlink_to(target.format(tmp=tmp_path))
    with pytest.raises(InputError, match=r"config.json: is a link that leads out of its folder, to .*follow_links"):
        store.list(str(snapshot))
    trusting = Local(LocalOptions(follow_links=True))
    pin = trusting.list(str(snapshot)).files[0]
    assert trusting.get(pin.uri, 100)[1] == b"not yours"


def test_a_folder_that_the_user_names_may_be_a_link_to_anywhere(store: Local, tmp_path: Path) -> None:
    snapshot = _downloaded(tmp_path / "cache")
    (tmp_path / "mine").symlink_to(snapshot)
    (pin,) = store.list(f"{tmp_path}/mine").files
    assert pin.uri == f"{tmp_path}/mine/model.safetensors"


def test_a_pipe_is_refused_without_waiting_for_its_other_end(store: Local, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="not a file"):
        store.head(f"{tmp_path}/model.safetensors", 8)


def test_names_that_are_no_text_are_refused(store: Local, tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))).touch()
    with pytest.raises(InputError, match=r"holds a file whose name is not UTF-8: 'caf\\udce9'; rename it"):
        store.list(str(tmp_path))
    with pytest.raises(InputError, match="no path holds a NUL"):
        store.head(f"{tmp_path}/a\0b", 8)
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/deep/caf\xe9"))).mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds a file whose name is not UTF-8"):
        store.folders(str(tmp_path / "deep"))


def test_what_it_writes_has_the_permissions_of_any_new_file(store: Local, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        store.put(f"{tmp_path}/small", b"x")
        upload = store.begin_upload(f"{tmp_path}/large", 1)
        store.complete_upload(f"{tmp_path}/large", upload, [_write(store, f"{tmp_path}/large", upload, 0, b"x")])
    finally:
        os.umask(old)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("small", "large")] == [0o640, 0o640]


def test_an_unfinished_upload_is_hidden_beside_its_target_and_has_the_final_size(store: Local, tmp_path: Path) -> None:
    store.begin_upload(f"{tmp_path}/out", 12_345)
    (hidden,) = tmp_path.iterdir()
    assert hidden.name.startswith(".out.")
    assert hidden.stat().st_size == 12_345
    assert store.list(str(tmp_path)).files == ()


def test_parts_that_do_not_fill_the_file_are_refused(store: Local, tmp_path: Path) -> None:
    upload = store.begin_upload(f"{tmp_path}/out", 10)
    with pytest.raises(InputError, match=r"the upload has 10 bytes, its parts 4"):
        store.complete_upload(f"{tmp_path}/out", upload, [_write(store, f"{tmp_path}/out", upload, 0, b"0123")])


def test_a_disk_that_is_too_small_is_known_at_the_start(store: Local, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"No space|bytes wanted.*; free space"):
        store.begin_upload(f"{tmp_path}/out", 1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_what_is_forbidden_is_an_input_error(store: Local) -> None:
    with tempfile.TemporaryDirectory() as folder, _same_user_afterwards():
        os.chmod(folder, 0o755)
        Path(folder, "x").write_bytes(b"0")
        os.chmod(f"{folder}/x", 0)
        os.chmod(folder, 0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)  # nothing is forbidden to root
        with pytest.raises(InputError, match=r"/x: can't read it: Permission denied; give"):
            store.head(f"{folder}/x", 1)
        with pytest.raises(InputError, match=r"/y: can't write it: Permission denied; give"):
            store.put(f"{folder}/y", b"")


def test_a_path_through_a_file_is_an_input_error(store: Local, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0")
    with pytest.raises(InputError, match=r"can't read it: Not a directory; check the path"):
        store.head(f"{tmp_path}/x/y", 1)
    with pytest.raises(InputError, match="absolute path"):
        store.head("file://x/y", 1)


def test_a_folder_is_no_object(store: Local, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a file"):
        store.head(str(tmp_path), 1)


def test_a_failed_put_leaves_nothing_behind(store: Local, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="can't write it: Is a directory"):
        store.put(f"{tmp_path}/taken", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_several_processes_write_one_file(store: Local, tmp_path: Path) -> None:
    uri, data = f"{tmp_path}/out", bytes(range(200)) * 1000
    upload = store.begin_upload(uri, len(data))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.starmap(_write_elsewhere, [(uri, upload, start, data) for start in range(0, len(data), 50_000)])
    store.complete_upload(uri, upload, parts)
    assert Path(uri).read_bytes() == data


@pytest.mark.parametrize("size", [100, 4096, 3 * 4096 + 100])
@pytest.mark.parametrize("can", [True, False])
def test_whole_sectors_of_a_part_are_written_past_the_page_cache_where_that_can_be(
    store: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool, size: int
) -> None:
    """Shown by the flags of the file that the bytes went to, on a file system that this test makes able or not."""
    uri, data = str(tmp_path / "x"), memoryview(os.urandom(4096 + size))
    straight, written = set(), {}
    opening, writing = os.open, os.pwrite

    def opened(path: Path, flags: int, mode: int) -> int:
        if flags & os.O_DIRECT and not can:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        file = opening(path, flags & ~os.O_DIRECT, mode)
        (straight.add if flags & os.O_DIRECT else straight.discard)(file)
        return file

    def pwrite(file: int, part: memoryview, offset: int) -> int:
        written[file in straight] = written.get(file in straight, 0) + len(part)
        return writing(file, part, offset)

    upload = store.begin_upload(uri, len(data))
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwrite", pwrite)
    parts = [store.write_part(uri, upload, 1, 0, data[:4096]), store.write_part(uri, upload, 2, 4096, data[4096:])]
    store.complete_upload(uri, upload, parts)
    assert Path(uri).read_bytes() == data
    tail = size % 4096
    assert written.get(True, 0) == (4096 + size - tail if can else 0)
    assert written.get(False, 0) == (tail if can else 4096 + size)


def test_a_disk_that_fails_past_the_page_cache_is_told(
    store: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "x")
    upload = store.begin_upload(uri, 4096)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(UnavailableError, match="can't write it: Input/output error"):
        store.write_part(uri, upload, 1, 0, memoryview(bytes(4096)))


@contextmanager
def _same_user_afterwards() -> Iterator[None]:
    user = os.geteuid()
    try:
        yield
    finally:
        os.seteuid(user)


def _write(store: Store, uri: str, upload: str, start: int, data: bytes) -> Part:
    return store.write_part(uri, upload, 1, start, memoryview(data))


def _write_elsewhere(uri: str, upload: str, start: int, data: bytes) -> Part:
    part = memoryview(data)[start : start + 50_000]
    return Local(LocalOptions()).write_part(uri, upload, start // 50_000 + 1, start, part)


@pytest.mark.parametrize("planted", ["link", "hard link", "pipe", "folder"])
def test_only_a_file_that_an_upload_has_made_is_written(planted: str, tmp_path: Path) -> None:
    """Somebody who may write to an output puts another's file under the name of an unfinished one."""
    store, uri, token = Stores({}).of("/"), str(tmp_path / "model.safetensors"), "0123456789abcdef"
    mine, hidden = tmp_path / "mine", tmp_path / f".model.safetensors.{token}.ties-ray-part"
    mine.write_bytes(b"mine")
    if planted == "link":
        hidden.symlink_to(mine)
    elif planted == "hard link":
        hidden.hardlink_to(mine)
    elif planted == "pipe":
        os.mkfifo(hidden)
    else:
        hidden.mkdir()
    upload = f"{token}-{hidden.lstat().st_ino}"
    for data in (memoryview(bytearray(4)), memoryview(mmap.mmap(-1, 4096))):  # also what bypasses the page cache
        with pytest.raises((InputError, UnavailableError, InterruptedMerge)):
            store.write_part(uri, upload, 1, 0, data)
    with suppress(InputError, UnavailableError):
        assert store.list_parts(uri, upload) is None
    with pytest.raises((InputError, UnavailableError, InterruptedMerge)):
        store.complete_upload(uri, upload, [Part(1, 4, "")])
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("upload", ["../../mine", "", "x", "0123456789ABCDEF-1", "/etc/passwd-1", "0123456789abcde/-1"])
def test_the_id_of_an_upload_names_nothing_but_its_hidden_file(upload: str, tmp_path: Path) -> None:
    store, uri = Stores({}).of("/"), str(tmp_path / "out" / "m")
    assert store.list_parts(uri, upload) is None
    store.abort_upload(uri, upload)  # nothing happens
    with pytest.raises(InterruptedMerge, match="does not know the upload"):
        store.write_part(uri, upload, 1, 0, memoryview(bytearray(4)))


def test_no_link_below_the_folder_of_merges_is_followed(tmp_path: Path) -> None:
    store, victim, own = Stores({}).of("/"), tmp_path / "victim", tmp_path / "out" / ".ties-ray"
    (victim / "1").mkdir(parents=True)
    (victim / "1" / "diary").write_text("dear")
    own.mkdir(parents=True)
    (own / "0123456789abcdef").symlink_to(victim)
    folder = f"{own}/0123456789abcdef/1"
    for act in (
        lambda: store.put(f"{folder}/plan.json.gz", b""), lambda: store.swap(f"{folder}/x", b"", ""),
        lambda: store.delete(f"{folder}/diary"), lambda: store.delete_folder(folder), lambda: store.list(folder),
        lambda: store.get(f"{folder}/diary", 9),
    ):  # fmt: skip
        with pytest.raises(InputError, match="0123456789abcdef: is a link, and no merge makes one"):
            act()
    assert [path.name for path in victim.rglob("*")] == ["1", "diary"]


def test_the_folder_of_merges_may_be_no_link_and_those_above_it_may(store: Local, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "linked").symlink_to("out")
    store.put(f"{tmp_path}/linked/.ties-ray/lease", b"x")
    assert (tmp_path / "out/.ties-ray/lease").read_bytes() == b"x"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.ties-ray").symlink_to("../victim")
    with pytest.raises(InputError, match=r"\.ties-ray: is a link, and no merge makes one"):
        store.put(f"{tmp_path}/other/.ties-ray/lease", b"x")


def test_another_file_under_the_name_of_an_unfinished_one_is_not_written_through_the_page_cache(
    store: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / ".x.0123456789abcdef.ties-ray-part").hardlink_to(tmp_path / "mine")
    opening = os.open

    def opened(path: Path, flags: int, mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opening(path, flags, mode)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(InterruptedMerge, match="does not know the upload"):
        store.write_part(f"{tmp_path}/x", "0123456789abcdef-1", 1, 0, memoryview(bytearray(4)))
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_a_folder_inside_another_is_listed_unless_a_link_leads_out(store: Local, tmp_path: Path) -> None:
    for name in ("model/sub/a", "model/other/b", "secrets/key"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    root = str(tmp_path / "model")
    (tmp_path / "model/sub/inside").symlink_to("../other/b")
    (tmp_path / "model/near").symlink_to("other")
    (tmp_path / "model/out").symlink_to("../secrets")
    assert [pin.uri for pin in store.list_below(root, "sub").files] == [f"{root}/sub/a", f"{root}/sub/inside"]
    assert [pin.uri for pin in store.list_below(root, "near").files] == [f"{root}/near/b"]
    assert store.list_below(root, "gone").files == ()
    with pytest.raises(InputError, match=r"is a link that leads out of its folder, to .*secrets; put"):
        store.list_below(root, "out")
    assert Local(LocalOptions(follow_links=True)).list_below(root, "out").files
    for name in ("../secrets", "/etc", "sub//a", "", ".", "a\\b"):
        with pytest.raises(InputError, match="is not the name of a file in this folder"):
            store.list_below(root, name)


def test_a_file_that_becomes_a_link_after_the_listing_is_not_read(store: Local, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/x").write_bytes(b"2")
    (pin,) = store.list(str(tmp_path / "model")).files
    assert store.head_listed(pin, 1) == (pin, b"2")
    (tmp_path / "model/x").unlink()
    (tmp_path / "model/x").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="changed while the plan was made"):
        store.head_listed(pin, 1)
    with pytest.raises(InputError, match="changed since the plan was made"):
        store.get_pinned(pin)
    (tmp_path / "model/x").unlink()
    with pytest.raises(InputError, match="is gone although it was listed"):
        store.head_listed(pin, 1)


def test_a_link_that_is_swapped_while_its_folder_is_listed_is_judged_by_what_was_opened(
    store: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_bytes(b"1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/fine").write_bytes(b"2")
    (tmp_path / "model/x").symlink_to(tmp_path / "secret")
    opened = os.open

    def swapping(path: object, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        file = opened(path, flags, mode, dir_fd=dir_fd)  # type: ignore[arg-type]
        if path == "x":
            (tmp_path / "model/x").unlink()
            (tmp_path / "model/x").symlink_to("fine")
        return file

    monkeypatch.setattr(os, "open", swapping)
    with pytest.raises(InputError, match=r"leads out of its folder, to .*secret"):
        store.list(str(tmp_path / "model"))


def test_the_room_of_a_disk_counts_what_unfinished_uploads_hold(store: Local, tmp_path: Path) -> None:
    assert store.space(str(tmp_path / "not/there/yet")).held == 0
    upload = store.begin_upload(f"{tmp_path}/x", 2**20)
    assert store.space(str(tmp_path)).held < 2**16, "nothing is written yet"
    store.write_part(f"{tmp_path}/x", upload, 1, 0, memoryview(os.urandom(2**20)))
    assert store.space(str(tmp_path)).held >= 2**20
    assert store.space(str(tmp_path)).free > 0


def test_a_limit_on_file_sizes_is_permanent(store: Local, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(InputError, match=r"File too large; .*`output\.file_size`"):
            store.begin_upload(f"{tmp_path}/x", 2**21)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_linked_folder_is_not_removed(store: Local, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x").write_bytes(b"1")
    (tmp_path / "link").symlink_to("mine")
    with pytest.raises(InputError, match=r"can't delete it: .*symbolic link"):
        store.delete_folder(str(tmp_path / "link"))
    assert (tmp_path / "mine/x").exists()


def test_folders_are_those_and_links_that_lead_nowhere(store: Local, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    assert [uri.rpartition("/")[2] for uri in store.folders(str(tmp_path))] == ["folder", "gone", "linked"]


def test_a_file_that_changes_while_its_first_bytes_are_read_is_refused(
    store: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"first content")
    fill = Local._fill

    def late(self: Local, file: int, start: int, into: memoryview) -> None:
        fill(self, file, start, into)
        path.write_bytes(b"second")

    monkeypatch.setattr(Local, "_fill", late)
    with pytest.raises(InputError, match="changed"):
        store.head(str(path), 5)


def test_what_the_system_writes_in_pieces_is_whole(
    store: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:3], offset))
    store.put(str(tmp_path / "file"), b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_document_may_be_the_first_file_of_a_folder(store: Local, tmp_path: Path) -> None:
    assert store.swap(str(tmp_path / "new/deep/file"), b"x", "")
    assert (tmp_path / "new/deep/file").read_bytes() == b"x"


def test_an_upload_without_room_is_told_with_both_figures(store: Local, tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    with pytest.raises(UnavailableError, match=f"{2**60:,} bytes wanted, [0-9,]+ are free") as raised:
        store.begin_upload(str(tmp_path / "file"), 2**60)
    (free,) = re.findall(r"wanted, ([0-9,]+) are", str(raised.value))
    assert int(free.replace(",", "")) == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.5)


def test_unfinished_uploads_are_our_hidden_files(store: Local, tmp_path: Path) -> None:
    upload = store.begin_upload(str(tmp_path / "file"), 5)
    (hidden,) = tmp_path.iterdir()
    (tmp_path / hidden.name.removeprefix(".")).write_text("not hidden")
    (tmp_path / ".other").write_text("not ours")
    assert store.list_uploads(str(tmp_path)) == ((str(tmp_path / "file"), upload),)


def test_a_link_to_a_pipe_holds_up_no_listing(store: Local, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "linked").symlink_to(tmp_path / "pipe")
    assert [pin.uri.rpartition("/")[2] for pin in store.list(str(tmp_path)).files] == ["linked", "pipe"]


def test_a_pipe_is_no_folder_and_is_not_waited_for(store: Local, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="can't list it: Not a directory"):
        store.list(str(tmp_path / "pipe"))


def test_a_listing_leaves_out_our_unfinished_files_alone(store: Local, tmp_path: Path) -> None:
    for name in (".gitattributes", "x.ties-ray-part", ".x.0123456789abcdef.ties-ray-part", "\U0001f600", "\uffee"):
        (tmp_path / name).touch()
    names = [pin.uri.rpartition("/")[2] for pin in store.list(str(tmp_path)).files]
    assert names == [".gitattributes", "x.ties-ray-part", "\uffee", "\U0001f600"]  # in the order of their UTF-8 bytes


@pytest.mark.parametrize(
    ("changed", "seconds", "waits"),
    [
        (5.001, 5.001, [0.02]),  # a tick of 0.02 s
        (5.001, 5.016, [0.005]),
        (5.001, 5.0215, []),
        (5.0, 5.5, [1.5]),  # a file system that keeps whole seconds
        (5.0, 7.0, []),
        (5.001, 4.0, []),  # a clock that is behind can't say
    ],
)
def test_a_file_is_looked_at_again_once_its_next_change_would_show(
    changed: float, seconds: float, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, waited = [seconds], []

    def sleep(seconds: float) -> None:
        waited.append(round(seconds, 6))
        now[0] += seconds + 1e-4  # as any sleep

    monkeypatch.setattr(local.runtime, "time", lambda: now[0])
    monkeypatch.setattr(local.runtime, "sleep", sleep)
    status = SimpleNamespace(st_ctime_ns=round(changed * 10**9))
    assert local._settled(lambda: status) is status  # type: ignore[arg-type,return-value]
    assert waited == waits


def test_a_file_that_changes_again_and_again_is_looked_at_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def look() -> os.stat_result:
        looks.append(1)
        return SimpleNamespace(st_ctime_ns=10**15 + 10)  # type: ignore[return-value]

    monkeypatch.setattr(local.runtime, "time", lambda: 10**6 + 0.001)
    monkeypatch.setattr(local.runtime, "sleep", lambda seconds: None)
    local._settled(look)
    assert len(looks) == 3


def test_a_swap_waits_for_another_of_the_same_folder(store: Local, tmp_path: Path) -> None:
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    swap = threading.Thread(target=store.swap, args=(str(tmp_path / "lease"), b"x", ""))
    swap.start()
    swap.join(0.2)
    assert swap.is_alive()
    assert not (tmp_path / "lease").exists()
    os.close(lock)
    swap.join()
    assert (tmp_path / "lease").read_bytes() == b"x"
