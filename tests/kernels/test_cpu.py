import os
import tempfile
from pathlib import Path

import pytest

from ties_ray.kernels import Kernels, cpu, load
from ties_ray.testing import KernelContract


class TestCpu(KernelContract):
    @pytest.fixture
    def kernels(self) -> Kernels:
        return load("cpu")


def test_a_cache_folder_of_someone_else_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / f"ties_ray-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cpu._shared_cache() != shared
    shared.chmod(0o700)
    assert cpu._shared_cache() == shared
