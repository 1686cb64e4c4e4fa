"""Folders for a while: each is removed by its process, or by the next one after a kill."""

import fcntl
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

PREFIX = "ties-ray-scratch-"


class ScratchFolder:
    """A new folder. Its process holds a lock on a file beside it, by which others see that it is in use."""

    def __init__(self, parent: str) -> None:
        """parent: where it is made. Folders of processes that were killed are removed there first."""
        _remove_left(Path(parent))
        self.path = str(Path(parent, f"{PREFIX}{secrets.token_hex(8)}"))
        self._lock = os.open(f"{self.path}.lock", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        Path(self.path).mkdir(0o700)

    def remove(self) -> None:
        """Remove the folder and what it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
        Path(f"{self.path}.lock").unlink(missing_ok=True)
        os.close(self._lock)


def _remove_left(parent: Path) -> None:
    """Remove folders whose process has gone, as nobody holds their lock."""
    for lock in parent.glob(f"{PREFIX}*.lock"):
        with suppress(OSError):  # it is another user's, held, or gone by now
            file = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
            finally:
                os.close(file)
