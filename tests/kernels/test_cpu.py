import pytest

from ties_ray.kernels import Kernels, load
from ties_ray.testing import KernelContract


class TestCpu(KernelContract):
    @pytest.fixture
    def kernels(self) -> Kernels:
        return load("cpu")
