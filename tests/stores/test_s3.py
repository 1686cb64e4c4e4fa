import pytest

from tests.conftest import Bucket
from ties_ray.stores import Store, Stores, join
from ties_ray.testing import StoreContract


class TestS3(StoreContract):
    test_a_part_of_an_unknown_upload_is_refused = None  # type: ignore[assignment]  # moto 5.2.5 answers 500

    @pytest.fixture
    def place(self, s3_bucket: Bucket) -> tuple[Store, str]:
        return Stores(s3_bucket.storage).of(s3_bucket.uri), join(s3_bucket.uri, "folder")


class TestJuiceFS(StoreContract):
    @pytest.fixture
    def place(self, juicefs_bucket: Bucket) -> tuple[Store, str]:
        return Stores(juicefs_bucket.storage).of(juicefs_bucket.uri), join(juicefs_bucket.uri, "folder")
