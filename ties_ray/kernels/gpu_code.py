"""Compiles a GPU's kernels once a node: other processes wait, and then load what was compiled.

Triton's own cache has each process compile that finds nothing. The workers of a GPU begin at once.
"""

import os
from contextlib import ExitStack
from pathlib import Path

import triton
from triton.runtime.cache import FileCacheManager

from ties_ray.kernels import code_folders


def be_used() -> None:
    """Have Triton keep code in a folder of this user, compiled once. The user's own settings stay as they are."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(code_folders.own() / "triton"))
    if "TRITON_CACHE_MANAGER" not in os.environ:
        # No variable: a command that we run may have another Python, which could not import the class.
        triton.knobs.cache.manager_class = OnceCompiled


class OnceCompiled(FileCacheManager):  # type: ignore[misc]  # Triton has no types
    """Keeps the code of one kernel. Who finds none has a lock until it is there, or until the process ends."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        """See Triton's class."""
        super().__init__(key, override=override, dump=dump)
        self._locked = ExitStack()

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Return the paths of the files of a kernel; None, with the lock held, where this process has to compile."""
        group: dict[str, str] | None = super().get_group(filename)
        if not group:
            self._locked.enter_context(code_folders.lock(Path(self.cache_dir)))
            group = super().get_group(filename)  # another process may have compiled it meanwhile
        if group:
            self._locked.close()
        return group

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        """Note that a kernel is compiled, and let others in."""
        with self._locked:
            return str(super().put_group(filename, group))
