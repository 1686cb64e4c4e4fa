import secrets

import pytest

from ties_ray.errors import InputError
from ties_ray.stores import NoOptions, Part, Store
from ties_ray.stores.memory import Memory
from ties_ray.testing import StoreContract


class TestMemory(StoreContract):
    part_bytes = 5000

    @pytest.fixture
    def place(self) -> tuple[Store, str]:
        return Memory(NoOptions()), f"memory://{secrets.token_hex(4)}"


@pytest.mark.parametrize("kind", ["missing", "other", "size"])
def test_parts_that_were_not_written_are_not_joined(kind: str) -> None:
    store, uri = Memory(NoOptions()), f"memory://{secrets.token_hex(4)}/x"
    upload = store.begin_upload(uri, 5 if kind == "size" else 4)
    part = store.write_part(uri, upload, 1, 0, memoryview(b"0123"))
    parts: dict[str, list[Part]] = {"missing": [], "other": [part._replace(etag="other")], "size": [part]}
    with pytest.raises(InputError, match=r"/x: the parts are not those that were written; run the merge with --fresh"):
        store.complete_upload(uri, upload, parts[kind])
