import secrets

import pytest

from ties_ray.stores import NoOptions, Store
from ties_ray.stores.memory import Memory
from ties_ray.testing import StoreContract


class TestMemory(StoreContract):
    part_bytes = 5000

    @pytest.fixture
    def place(self) -> tuple[Store, str]:
        return Memory(NoOptions()), f"memory://{secrets.token_hex(4)}"
