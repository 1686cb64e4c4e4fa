"""A GPU's kernels are compiled once a node. Triton compiles for a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.runtime.cache import FileCacheManager

from ties_ray.kernels import gpu_code

pytestmark = pytest.mark.skipif(not hasattr(triton, "knobs"), reason="the extra `gpu` asks for Triton 3.5")

COMPILE = """
import os, sys, time
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ties_ray.kernels import gpu_code

gpu_code.be_used()


@triton.jit
def kernel(x, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(x + at, tl.exp(tl.load(x + at)) * 3)


hits = []
triton.knobs.compilation.listener = lambda cache_hit, **others: hits.append(cache_hit)
here = Path(sys.argv[1])
(here / f"ready-{os.getpid()}").touch()
while len(list(here.glob("ready-*"))) < int(sys.argv[2]):
    time.sleep(0.001)
source = ASTSource(kernel, {"x": "*fp32", "n": "constexpr"}, {(1,): 64})
made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(int(hits[0]), len(made.asm["cubin"]))
"""


def compiled(folder: Path, count: int, **environment: str) -> list[list[int]]:
    """Have processes compile one kernel at once; return (found in the cache, bytes of code) of each."""
    place, program = folder / f"{count}", folder / "compile_it.py"
    place.mkdir()
    program.write_text(COMPILE)
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "TRITON_INTERPRET": "0", **environment}
    environment.pop("NUMBA_CACHE_DIR", None)
    words = [sys.executable, str(program), str(place), str(count)]
    processes = [subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return sorted(json.loads(f"[{process.communicate()[0].replace(' ', ',')}]") for process in processes)


def test_of_processes_that_begin_at_once_one_compiles_and_the_others_load(tmp_path: Path) -> None:
    (compiles, size), *others = compiled(tmp_path, 3)
    assert compiles == 0
    assert others == [[1, size]] * 2
    assert compiled(tmp_path, 1) == [[1, size]]
    assert list((tmp_path / "cache" / "ties_ray" / "triton").glob("*/*.cubin"))


def test_the_users_own_cache_stays_and_other_programs_hear_of_no_class_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = triton.knobs.cache
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "triton.runtime.cache:FileCacheManager")
    gpu_code.be_used()
    assert (os.environ["TRITON_CACHE_DIR"], cache.manager_class) == ("/mine", FileCacheManager)
    monkeypatch.delenv("TRITON_CACHE_MANAGER")
    try:
        gpu_code.be_used()
        assert cache.manager_class is gpu_code.OnceCompiled
        assert "TRITON_CACHE_MANAGER" not in os.environ
    finally:
        del cache.manager_class


def test_a_compiler_that_fails_lets_the_next_one_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = gpu_code.OnceCompiled("key")
    assert first.get_group("kernel.json") is None
    del first
    second = gpu_code.OnceCompiled("key")
    assert second.get_group("kernel.json") is None
    second.put_group("kernel.json", {"kernel.cubin": second.put(b"code", "kernel.cubin")})
    assert gpu_code.OnceCompiled("key").get_group("kernel.json") == {"kernel.cubin": str(tmp_path / "key/kernel.cubin")}
