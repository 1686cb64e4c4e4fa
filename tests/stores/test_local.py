import os
from pathlib import Path

import pytest

from ties_ray.errors import InputError, UnavailableError
from ties_ray.stores import NoOptions, Store, join
from ties_ray.stores.local import Local
from ties_ray.testing import StoreContract


class TestLocal(StoreContract):
    part_bytes = 70_000

    @pytest.fixture
    def place(self, tmp_path: Path) -> tuple[Store, str]:
        return Local(NoOptions()), str(tmp_path)


class TestLocalByUri(StoreContract):
    part_bytes = 70_000

    @pytest.fixture
    def place(self, tmp_path: Path) -> tuple[Store, str]:
        return Local(NoOptions()), f"file://{tmp_path}"
