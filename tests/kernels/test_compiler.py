"""The kernels compiled anew: without a writable folder, and for another processor. Each takes half a minute."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import ties_ray


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Have two processes compile a copy of the kernels at once; return what they say of themselves.

    Neither package nor home can be written to.

    A file stands where each folder should be: modes would prove nothing to root, who may write anywhere.
    """
    root = tmp_path_factory.mktemp("fresh")
    package = root / "site" / "ties_ray"
    (package / "kernels").mkdir(parents=True)
    for file in (Path(ties_ray.__file__).parent / "kernels").glob("*.py"):
        (package / "kernels" / file.name).write_bytes(file.read_bytes())
    (package / "__init__.py").touch()
    (package / "kernels" / "__pycache__").touch()
    (root / "home").touch()
    (root / "tmp").mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(root / "site"),
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "tmp"),
    }
    processes = [
        subprocess.Popen([sys.executable, "-c", REPORT], env=environment, cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    reports = [json.loads(process.communicate()[0]) for process in processes]
    assembly = [each for report in reports for each in report.pop("assembly")]
    return {"root": str(root), "environment": environment, **reports[0], "assembly": assembly}


REPORT = """
import json
from ties_ray.kernels import code_folders, cpu
loops = [value for value in vars(cpu).values() if hasattr(value, "inspect_asm") and value.stats.cache_path]
assembly = [(loop.__name__, loop.inspect_asm(sig.args)) for loop in loops for sig in loop.stats.cache_misses]
print(json.dumps({"file": cpu.__file__, "cache": str(code_folders.own()), "assembly": assembly}))
"""


def test_kernels_work_where_neither_package_nor_home_is_writable(fresh: dict[str, Any]) -> None:
    assert fresh["file"].startswith(f"{fresh['root']}/site/")
    assert Path(fresh["cache"]).parent == Path(fresh["root"], "tmp")
    assert list(Path(fresh["cache"]).glob("*.compiled"))


def test_two_processes_that_start_at_once_compile_each_function_once(fresh: dict[str, Any]) -> None:
    files = [file.name.partition("-")[0] for file in Path(fresh["cache"]).glob("*.compiled")]
    assert sorted(files) == sorted(f"cpu.{name}" for name, _ in fresh["assembly"])


def test_code_beside_the_package_serves_those_who_find_none_of_their_own(fresh: dict[str, Any]) -> None:
    beside = Path(fresh["root"], "site", "ties_ray", "kernels", "__pycache__")
    beside.unlink()
    environment, place = fresh["environment"], Path(fresh["root"], "another")
    place.mkdir()
    subprocess.run([sys.executable, "-m", "ties_ray.kernels"], env=environment, cwd=place, check=True)
    assert {file.name for file in beside.glob("*.compiled")} == {
        file.name for file in Path(fresh["cache"]).glob("*.compiled")
    }
    another = environment | {"TMPDIR": str(place)}
    done = subprocess.run([sys.executable, "-c", REPORT], env=another, cwd=place, check=True, stdout=subprocess.PIPE)
    assert json.loads(done.stdout)["assembly"] == []


def test_no_compiled_loop_but_the_product_holds_a_fused_multiply_add(fresh: dict[str, Any]) -> None:
    """It may be spelled fmadd, fmsub, fmla or fmls, or be a call of fmaf where the processor has none.

    The loops that contain the product hold its own and no more.
    """
    fused = re.compile(r"\bv?fn?m(?:add|sub|la|ls)\w*|\bfmaf?\b")
    held = Counter[str]()
    for name, text in fresh["assembly"]:
        held[name] += len(fused.findall(text))
    assert {name for name, count in held.items() if count} == {"_product", "_walk", "_add_squares"}
    assert held["_walk"] == held["_product"]
    assert held["_add_squares"] == 2 * held["_product"], "with both kinds of base"


BITS = """
import hashlib, torch
from ties_ray.kernels import load
from ties_ray.testing import some_factors

whole = torch.randn(37 * 1009, generator=torch.Generator().manual_seed(1))
for rank, dora in ((1, False), (17, True), (200, False)):
    source = some_factors(37, 1009, rank, 0, dora)
    delta = torch.empty(len(whole))
    others = load("cpu").delta(source, whole, delta)
    print(rank, others, hashlib.sha256(delta.numpy().tobytes()).hexdigest())
"""


def test_the_product_has_the_same_bits_without_the_instructions_of_this_processor(tmp_path: Path) -> None:
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", BITS], env=os.environ | extra, capture_output=True, text=True)
        for extra in ({}, generic)
    ]
    assert [done.returncode for done in runs] == [0, 0], runs[1].stderr
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.count("\n") == 3
