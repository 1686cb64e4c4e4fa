import importlib.util
import resource
from pathlib import Path
from types import ModuleType

import pytest

from ties_ray.kernels import code_folders, compiling

SOURCE = """
import numba
from ties_ray.kernels.compiling import compiled

@compiled(numba.int64(numba.int64), numba.float64(numba.float64))
def double(number):
    return 2 * number
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a module with a compiled function, whose code is kept beside it."""
    monkeypatch.setattr(code_folders, "own", lambda: tmp_path)
    (tmp_path / "__init__.py").touch()
    (tmp_path / "loops.py").write_text(SOURCE)
    return tmp_path / "loops.py"


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("loops", path)
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.double(21) == 42
    assert made.double(0.5) == 1.0
    return made


def compilations(path: Path) -> int:
    return sum(imported(path).double.stats.cache_misses.values())


def test_a_function_is_compiled_when_its_source_is_new(module: Path) -> None:
    assert [compilations(module) for _ in range(2)] == [2, 0]
    module.write_text(SOURCE.replace("2 *", "2.0 *"))
    assert [compilations(module) for _ in range(2)] == [2, 0]
    (module.parent / "__init__.py").write_text("BINS = 3")
    assert compilations(module) == 2


def test_code_that_others_may_have_written_is_compiled_anew(module: Path) -> None:
    assert compilations(module) == 2
    for file in module.parent.glob("*.compiled"):
        file.chmod(0o666)
    assert compilations(module) == 2


def test_a_full_disk_keeps_no_code_and_harms_nobody(module: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert compilations(module) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in module.parent.iterdir() if path.is_file()) == [
        "__init__.py",
        "lock",
        "loops.py",
    ]
    assert [compilations(module) for _ in range(2)] == [2, 0]


def test_a_processor_has_all_levels_below_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    features = dict.fromkeys(compiling.LEVELS["x86-64-v4"], True)
    monkeypatch.setattr(compiling.binding, "get_host_cpu_features", lambda: features)
    assert compiling.levels() == ["x86-64-v3", "x86-64-v4"]
    features["avx512vl"] = False
    assert compiling.levels() == ["x86-64-v3"]
    features["fma"] = False
    assert compiling.levels() == []
