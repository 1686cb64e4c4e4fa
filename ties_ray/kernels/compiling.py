"""Compiles loops at import, once a node: other processes wait, and then load what was compiled.

numba's own cache has each process compile that finds nothing. It knows a function by its file's place, and code by the
exact processor. Here a name follows from the source, and code is made for a level of processors. So one image serves
all nodes.
"""

import hashlib
import inspect
import pickle
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba
from llvmlite import binding
from numba.core import compiler, serialize

from ties_ray.kernels import code_folders

Result = TypeVar("Result")
_V3 = ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
LEVELS = {"x86-64-v3": _V3, "x86-64-v4": (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")}
"""Levels of x86 processors, and the features that a processor of the level has (x86-64 psABI)."""


def levels() -> list[str]:
    """Return the levels that this processor has, the highest last; none where it is another kind of processor."""
    features = binding.get_host_cpu_features()
    return [level for level, needed in LEVELS.items() if all(features.get(name) for name in needed)]


def _choose_level() -> None:
    """Compile for the level of this processor, with vectors as wide as it has.

    LLVM uses half of that on most Intel processors, so that they don't clock down. A fold of factors of rank 16 takes
    0.66 ns with whole vectors instead of 0.81, and `apply` to bf16 0.4 ns instead of 2.4.
    """
    if numba.config.CPU_NAME is None and numba.config.CPU_FEATURES is None and levels():
        numba.config.CPU_NAME = levels()[-1]
    if numba.config.CPU_NAME in LEVELS and numba.config.CPU_FEATURES is None:
        numba.config.CPU_FEATURES = "-prefer-256-bit"


_choose_level()


def compiled(*signatures: Any) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Compile for these signatures at import, so that no shard waits for a compiler."""

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        dispatcher = numba.njit(nogil=True, error_model="numpy", boundscheck=False, _nrt=False)(function)
        dispatcher._cache = _Code(function)
        for signature in signatures:
            dispatcher.compile(signature)
        dispatcher.disable_compile()
        compiled_function: Callable[..., Result] = dispatcher
        return compiled_function

    return decorate


class _Code:
    """Stands where numba's dispatcher expects the cache of a function. It has one file for each signature."""

    def __init__(self, function: Callable[..., Any]) -> None:
        path = Path(inspect.getfile(function))
        self._name = f"{path.stem}.{function.__name__}"
        files = path, path.with_name("__init__.py"), Path(__file__)
        source = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        self._versions = source, sys.version_info[:2], numba.__version__, llvmlite.__version__
        self._locked = ExitStack()
        self.cache_path = str(code_folders.own())

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Return what was compiled; None, with the lock held until it is saved, where this process has to."""
        target.refresh()
        name = self._file(signature, target.codegen())
        content = code_folders.read(name)
        if content is None:
            self._locked.enter_context(code_folders.lock(code_folders.own()))
            content = code_folders.read(name)  # another process may have compiled it meanwhile
        if content is None:
            return None
        self._locked.close()
        return compiler.CompileResult._rebuild(target, *pickle.loads(content))  # noqa: S301  from a trusted folder

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what was compiled. Where the disk is full, it serves this process alone."""
        with self._locked, suppress(OSError):
            name = self._file(signature, result.codegen)
            code_folders.write(code_folders.own(), name, serialize.dumps(result._reduce()))

    def _file(self, signature: Any, codegen: Any) -> str:
        key = repr((self._versions, signature, codegen.magic_tuple()))
        return f"{self._name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}{code_folders.SUFFIX}"
