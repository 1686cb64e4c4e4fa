"""Files of a disk or of a network file system that every node mounts."""

import errno
import fcntl
import functools
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ties_ray import runtime
from ties_ray.errors import InputError, MergeError, Problem, UnavailableError
from ties_ray.stores import Listing, Part, Pin, Space, WritableStore, changed, entry_uri, no_upload, within

_HIDDEN = ".ties-ray-part"
"""The names of our unfinished files begin with a dot and end so; a listing leaves them out, as S3 does."""
_OURS = ".ties-ray"
"""The folder in an output where merges keep their own files."""
_READ = os.O_RDONLY | os.O_NONBLOCK
"""Flags of a read. A file that turns out to be a pipe is not waited for."""
_LOOK = getattr(os, "O_PATH", _READ)
"""Flags of a look at a file's kind and place, which needs no permission to read it."""
_OWN = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""Flags of a write to an unfinished file: a link or a pipe may lie under its name."""
_TOKEN = re.compile("[0-9a-f]{16}")
"""The token in the name of an unfinished file."""
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
"""The flag of a read that takes bytes from memory alone."""
_STRAIGHT = getattr(os, "O_DIRECT", 0)
"""The flag of a write past the page cache, where the system has one."""
_TICK, _LONG_TICK = 0.02, 2.0
"""Seconds within which two changes of a file may get the same time; the long ones where it has no parts of a second."""
_LOOKS = 3
"""The most looks at a file that changes again and again."""
_SECTOR = 4096
"""Bytes. Writes past the page cache begin and end at multiples of it, which suits all common disks."""


class LocalOptions(BaseModel):
    """`storage.local` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)

    follow_links: bool = False
    """Whether a file of a folder may be a link that leads out of it."""


class Local(WritableStore):
    """Paths and `file://` URIs: `preadv` into the caller's buffer, `pwrite` into a file beside its target.

    A file is opened anew for each read: 10 us on a disk, one round trip on NFS, and never the wrong descriptor.

    A model is somebody else's work, and a link in it could name any file that the workers may read. So a link to a
    file has to stay in its folder. It may also lead from `snapshots/<revision>` of a Hugging Face cache to the `blobs`
    of that repository. Any other link is refused, unless `storage.local.follow_links` is set. A folder, recipe or table
    that the user names may be a link to anywhere.
    """

    options = LocalOptions

    pinned_by = "size, times of modification and change, and inode"
    exact_listing = True

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        assert isinstance(options, LocalOptions)
        self._follow_links = options.follow_links

    def list(self, uri: str) -> Listing:
        """Return the content of the folder; a link counts as its target.

        Raises `InputError` for a link that leads nowhere or out of the folder, and for a name that is not UTF-8.
        """
        return self._list(uri)

    def list_below(self, root: str, name: str) -> Listing:
        """Return the content of a folder inside `root`; its links must not lead out of `root`."""
        return self._list(within(root, name), root)

    def _list(self, uri: str, root: str = "") -> Listing:
        """Return a listing. All looks use one descriptor of the folder, so that no link can be swapped."""
        files, folders = [], []
        with _explained(uri, "list"):
            try:
                folder = os.open(_place(uri), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                return Listing((), ())
            try:
                limit = real = _real(folder, _path(uri))
                if root and not self._follow_links:
                    limit = Path(os.path.realpath(_path(root)))
                    _demand_inside(uri, real, limit)
                for entry in list(os.scandir(folder)):
                    if not entry.name.isascii():
                        _demand_utf8(uri, entry.name)
                    if entry.is_dir():
                        folders.append(entry_uri(uri, entry.name))
                    elif entry.is_symlink():
                        files.append(self._linked(entry_uri(uri, entry.name), folder, limit))
                    elif not (entry.name.startswith(".") and entry.name.endswith(_HIDDEN)):
                        with suppress(FileNotFoundError):
                            look = partial(os.stat, entry.name, dir_fd=folder, follow_symlinks=False)
                            files.append(_pin(entry_uri(uri, entry.name), _settled(look)))
            finally:
                os.close(folder)
        return Listing(tuple(sorted(files)), tuple(sorted(folders)))

    def folders(self, uri: str) -> tuple[str, ...]:
        """Return the folders, and links that lead nowhere: they may have led to folders."""
        with _explained(uri, "list"), suppress(FileNotFoundError):
            entries = list(os.scandir(_path(uri)))
            for entry in entries:
                _demand_utf8(uri, entry.name)
            names = [entry.name for entry in entries if entry.is_dir() or not os.path.exists(entry)]
            return tuple(sorted(entry_uri(uri, name) for name in names))
        return ()

    def _linked(self, uri: str, folder: int, limit: Path) -> Pin:
        """Return the pin of the target of a link in an open folder: of the same file whose place is checked."""
        path = _path(uri)
        try:
            file = os.open(path.name, _LOOK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            raise _dangling(uri) from None
        try:
            if not self._follow_links:
                _demand_inside(uri, _real(file, path), limit)
            return _pin(uri, _settled(partial(os.fstat, file)))
        finally:
            os.close(file)

    def newest(self, uri: str) -> float | None:
        """Return the newest modification time."""
        with _explained(uri, "list"), suppress(FileNotFoundError):
            return max((entry.stat().st_mtime for entry in os.scandir(_path(uri)) if entry.is_file()), default=None)
        return None

    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        """Return the file's pin and its first bytes."""
        with _explained(uri, "read"), _opened(_place(uri), _READ) as file:
            pin = _pin(uri, _settled(partial(_regular, file, uri)))
            data = bytearray(min(nbytes, pin.size))
            self._fill(file, 0, memoryview(data))
            self._unchanged(file, pin)
            return pin, bytes(data)

    def read(self, pin: Pin, start: int, into: memoryview) -> None:
        """Fill `into`, then look whether the file is still the pinned one: a change during the read shows too."""
        try:
            with _explained(pin.uri, "read"), _opened(_path(pin.uri), _READ) as file:
                self._fill(file, start, into)
                self._unchanged(file, pin)
        except FileNotFoundError:
            raise changed(pin, "the file is gone") from None

    def is_in_page_cache(self, pin: Pin, position: int) -> bool:
        """Ask the page cache, where the system and the file system know how."""
        if _NOWAIT:
            with suppress(OSError), _opened(_path(pin.uri), _READ) as file:
                return os.preadv(file, [bytearray(1)], position, _NOWAIT) == 1
        return False

    def _fill(self, file: int, start: int, into: memoryview) -> None:
        """Read up to the end of the file; `_unchanged` then tells why it was too short."""
        into = into.cast("B")
        self.meter.add(requests=1)
        while into and (count := os.preadv(file, [into], start)):
            self.meter.add(bytes_read=count)
            into, start = into[count:], start + count

    def _unchanged(self, file: int, pin: Pin) -> None:
        now = _pin(pin.uri, os.fstat(file))
        if now != pin:
            raise changed(pin, f"{pin.size:,} bytes with mark {pin.etag}, now {now.size:,} with {now.etag}")

    def put(self, uri: str, data: bytes) -> Pin:
        """Write a temporary file beside the target and rename it."""
        path = _place(uri)
        with _explained(uri, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = _beside(path, secrets.token_hex(8))
            try:
                with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
                    self._write(file, 0, memoryview(data))
                    os.utime(file, ns=(time.time_ns(),) * 2)  # its own, where the system's clock ticks more slowly
                    os.fsync(file)
                    os.replace(temporary, path)
                    pin = _pin(uri, os.fstat(file))
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)
        return pin

    def swap(self, uri: str, data: bytes, etag: str) -> Pin | None:
        """Compare and write under a lock of the folder, which all processes of this machine see."""
        folder = _place(uri).parent
        with _explained(uri, "write"):
            folder.mkdir(parents=True, exist_ok=True)
            with _opened(folder, os.O_RDONLY) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                return super().swap(uri, data, etag)

    def _write(self, file: int, offset: int, data: memoryview) -> None:
        data = data.cast("B")
        while data:
            count = os.pwrite(file, data, offset)
            self.meter.add(bytes_written=count)
            data, offset = data[count:], offset + count

    def delete(self, uri: str) -> None:
        """Remove the file."""
        with _explained(uri, "delete"):
            _place(uri).unlink(missing_ok=True)

    def delete_folder(self, uri: str) -> None:
        """Remove the folder itself, with what a killed `put` left in it."""
        with _explained(uri, "delete"), suppress(FileNotFoundError):
            shutil.rmtree(_place(uri))

    def space(self, folder: str) -> Space:
        """Return the free room of the disk of the folder, or of its nearest existing parent."""
        path = _path(folder)
        with _explained(folder, "look at"):
            held = 0
            with suppress(FileNotFoundError):
                for entry in list(os.scandir(path)):
                    if entry.name.startswith(".") and entry.name.endswith(_HIDDEN):
                        held += 512 * entry.stat(follow_symlinks=False).st_blocks
            disk = os.statvfs(next(place for place in (path, *path.parents) if place.exists()))
            return Space(disk.f_bavail * disk.f_frsize, held)

    def begin_upload(self, uri: str, size: int) -> str:
        """Make a hidden file of the final size beside the target.

        The id ends in the file's inode, which the rename keeps and no other file has. By it `complete_upload`
        recognises its own work.
        """
        path, token = _path(uri), secrets.token_hex(8)
        with _explained(uri, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            disk = os.statvfs(path.parent)
            if disk.f_bavail * disk.f_frsize < size:
                raise OSError(errno.ENOSPC, f"{size:,} bytes wanted, {disk.f_bavail * disk.f_frsize:,} are free")
            with _opened(_beside(path, token), os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
                os.ftruncate(file, size)
                return f"{token}-{os.fstat(file).st_ino}"

    def write_part(self, uri: str, upload: str, number: int, offset: int, data: memoryview) -> Part:
        """Write in place and flush; a file knows no ETag of its parts."""
        data = data.cast("B")
        try:
            path = _unfinished(uri, upload)
            with _explained(uri, "write"):
                straight = self._write_straight(path, offset, data[: data.nbytes - data.nbytes % _SECTOR])
                with _opened(path, _OWN) as file:
                    _demand_own(file)
                    self._write(file, offset + straight, data[straight:])
                    os.fdatasync(file)
        except FileNotFoundError:
            raise no_upload(uri, f"writing part {number}") from None
        return Part(number, data.nbytes, "")

    def _write_straight(self, path: Path, offset: int, data: memoryview) -> int:
        """Write from the caller's memory to the disk, without a copy in the page cache; return how many bytes.

        It returns 0 where the file system can't do that, or not from such memory. A part waits for the disk anyway. A
        copy takes 0.2 ns a byte, or 1 to 2 on a virtual machine with little free memory, and drives out inputs.
        """
        try:
            with _opened(path, _OWN | _STRAIGHT) as file:
                _demand_own(file)
                self._write(file, offset, data)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0
        return data.nbytes

    def list_parts(self, uri: str, upload: str) -> tuple[Part, ...] | None:
        """Return () for a known upload: a file doesn't know its parts."""
        with _explained(uri, "read"), suppress(FileNotFoundError), _opened(_unfinished(uri, upload), _OWN) as file:
            _demand_own(file)
            return ()
        return None

    def list_uploads(self, folder: str) -> tuple[tuple[str, str], ...]:
        """Return our hidden files, with those of a killed `put`."""
        with _explained(folder, "list"):
            try:
                entries = list(os.scandir(_path(folder)))
            except FileNotFoundError:
                return ()
            uploads = []
            for entry in entries:
                if entry.name.startswith(".") and entry.name.endswith(_HIDDEN):
                    name, _, token = entry.name[1 : -len(_HIDDEN)].rpartition(".")
                    if name and _TOKEN.fullmatch(token):
                        uploads.append((entry_uri(folder, name), f"{token}-{entry.inode()}"))
        return tuple(sorted(uploads))

    def complete_upload(self, uri: str, upload: str, parts: Sequence[Part]) -> Pin:
        """Flush, rename, flush the folder."""
        path, size = _path(uri), sum(part.size for part in parts)
        with _explained(uri, "write"):
            try:
                with _opened(_unfinished(uri, upload), _OWN) as file:
                    _demand_own(file)
                    if os.fstat(file).st_size != size:
                        message = f"the upload has {os.fstat(file).st_size:,} bytes, its parts {size:,}"
                        raise InputError(Problem(uri, message, "run the merge with --fresh"))
                    os.fsync(file)
                os.replace(_unfinished(uri, upload), path)
            except FileNotFoundError:
                if not path.exists():
                    raise no_upload(uri, "completing an upload") from None
                if not _is_from(path, upload, size):
                    raise _not_ours(uri) from None
            _sync_folder(path.parent)
            return _pin(uri, os.stat(path))

    def abort_upload(self, uri: str, upload: str) -> None:
        """Remove the hidden file."""
        with _explained(uri, "delete"), suppress(FileNotFoundError):
            _unfinished(uri, upload).unlink()


@functools.lru_cache(4096)
def _path(uri: str) -> Path:
    if "\0" in uri:
        raise InputError(Problem(repr(uri), "no path holds a NUL", "check the path"))
    if uri.startswith("file://") and not uri.startswith("file:///"):
        raise InputError(Problem(uri, "a file URI names an absolute path", "write file:///folder/file"))
    return Path(uri.removeprefix("file://"))


def _place(uri: str) -> Path:
    """Return the path of a file that is read or written whole; below a folder `.ties-ray` no component may be a link.

    Anybody who may write to an output could put a link there, which would lead our writes elsewhere.
    """
    path = _path(uri)
    if _OURS in path.parts:
        last = len(path.parts) - path.parts[::-1].index(_OURS)
        for link in (path, *path.parents)[: len(path.parts) - last + 1]:
            if link.is_symlink():
                message = "is a link, and no merge makes one in its own folder"
                raise InputError(Problem(str(link), message, "remove the link; or write to another output folder"))
    return path


def _beside(path: Path, token: str) -> Path:
    return path.with_name(f".{path.name}.{token}{_HIDDEN}")


def _unfinished(uri: str, upload: str) -> Path:
    """Return the hidden file of an upload; raise `FileNotFoundError` for an id that `begin_upload` never gives."""
    token, _, _ = upload.partition("-")
    if not _TOKEN.fullmatch(token):
        raise FileNotFoundError(errno.ENOENT, "no such upload", uri)
    return _beside(_path(uri), token)


def _is_from(path: Path, upload: str, size: int) -> bool:
    """Return whether the file at `path` is the one which the upload made."""
    with suppress(FileNotFoundError):
        status = os.stat(path)
        return (str(status.st_ino), status.st_size) == (upload.partition("-")[2], size)
    return False


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _demand_own(file: int) -> None:
    """Raise `FileNotFoundError` for a file that `begin_upload` has not made: such a file may have two names."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise FileNotFoundError(errno.ENOENT, "not the hidden file of an upload")


def _regular(file: int, uri: str) -> os.stat_result:
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a file", uri)
    return status


def _pin(uri: str, status: os.stat_result) -> Pin:
    return Pin(uri, status.st_size, _mark(status))


def _mark(status: os.stat_result) -> str:
    """Return the mark of a file's content.

    Archives and copies set the time of modification, so that two versions may share it, and even an inode. Nobody sets
    the time of change.
    """
    return f"{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"


def _settled(look: Callable[[], os.stat_result]) -> os.stat_result:
    """Return the status of a file whose next change will show: within one tick of the clock, two look alike."""
    for _ in range(_LOOKS):
        status = look()
        tick = _TICK if status.st_ctime_ns % 10**9 else _LONG_TICK  # whole seconds: a file system without smaller units
        age = runtime.time() - status.st_ctime_ns / 1e9
        if not 0 <= age < tick:
            break
        runtime.sleep(tick - age)
    return status


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable."""
    with _opened(folder, os.O_RDONLY) as file:
        os.fsync(file)


def _not_ours(uri: str) -> InputError:
    message = "the unfinished file of this upload is gone, and the file is another"
    return InputError(
        Problem(uri, message, "leave the hidden files beside an output alone; run the merge with --fresh")
    )


def _real(file: int, path: Path) -> Path:
    """Return the place of an open file; where the system can't tell it, the present target of its path."""
    try:
        return Path(os.readlink(f"/proc/self/fd/{file}"))
    except OSError:
        return Path(os.path.realpath(path))


def _demand_inside(uri: str, target: Path, folder: Path) -> None:
    """Raise `InputError` where a link leads out of a folder, but to the blobs of the same Hugging Face repository."""
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"][:1]
    if not any(target.is_relative_to(place) for place in (folder, *blobs)):
        message = f"is a link that leads out of its folder, to {target}"
        remedy = "put the file itself there, or set `storage: {local: {follow_links: true}}` if you trust the folder"
        raise InputError(Problem(uri, message, remedy))


def _demand_utf8(folder: str, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(Problem(folder, f"holds a file whose name is not UTF-8: {name!r}", "rename it")) from None


def _dangling(uri: str) -> InputError:
    return InputError(Problem(uri, "a link that leads nowhere", "finish the download, or remove the link"))


@contextmanager
def _explained(uri: str, doing: str) -> Iterator[None]:
    """Turn errors of the operating system into ours, with remedies; FileNotFoundError stays itself."""
    try:
        yield
    except (FileNotFoundError, MergeError):
        raise
    except OSError as error:
        message = f"can't {doing} it: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UnavailableError(Problem(uri, message, "free space, and run the same command again")) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(Problem(uri, message, "give the user of the workers this permission")) from error
        if error.errno == errno.EFBIG:
            raise InputError(
                Problem(uri, message, "this file system or its limits want a smaller `output.file_size`")
            ) from error
        if error.errno is None:  # Python itself refuses it: to remove all behind a link
            raise InputError(Problem(uri, f"can't {doing} it: {error}", "check the path")) from error
        if error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise InputError(
                Problem(uri, message, "this file system can't do that: use a folder on another one")
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ELOOP):
            raise InputError(Problem(uri, message, "check the path")) from error
        raise UnavailableError(
            Problem(uri, message, "check the disk or the mount, and run the command again")
        ) from error
