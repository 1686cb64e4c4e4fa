"""Folders of compiled code, shared by the workers of a node and by later runs.

Code that is loaded is executed. So folders and files count only where this user or root owns them, and where nobody
else may write to them.
"""

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

BESIDE = Path(__file__).parent / "__pycache__"
"""The folder of the installation, for all who use it. `python -m ties_ray.kernels` fills it."""
SUFFIX = ".compiled"
"""The end of the name of a compiled function's file."""


def is_trusted(status: os.stat_result) -> bool:
    """Return whether only this user or root can have written a file or folder."""
    return status.st_uid in (0, os.getuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def own() -> Path:
    """Return this user's folder: below NUMBA_CACHE_DIR or the user's cache, else a temporary one."""
    caches = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (Path(caches) / "ties_ray", Path(tempfile.gettempdir()) / f"ties_ray-{os.getuid()}"):
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                status = folder.lstat()
                if is_trusted(status) and stat.S_ISDIR(status.st_mode):
                    return folder
    return Path(tempfile.mkdtemp(prefix="ties_ray-"))


def read(name: str) -> bytes | None:
    """Return the content of a file of compiled code; None where no trusted folder has it."""
    for folder in (BESIDE, own()):
        with suppress(OSError), (folder / name).open("rb") as file:
            if is_trusted(folder.stat()) and is_trusted(os.fstat(file.fileno())):
                return file.read()
    return None


def write(folder: Path, name: str, content: bytes) -> None:
    """Write a file at once, for its owner to change and for all to read."""
    handle, path = tempfile.mkstemp(dir=folder)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(path, 0o644)
        os.replace(path, folder / name)
    except OSError:
        os.unlink(path)
        raise


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Wait until no other process compiles for a folder. A process that ends gives the lock back."""
    with (folder / "lock").open("wb") as file:
        with suppress(OSError):  # some network folders have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def are_empty() -> bool:
    """Return whether no code is compiled yet."""
    return not any(file for folder in (BESIDE, own()) for file in folder.glob(f"cpu.*{SUFFIX}"))
