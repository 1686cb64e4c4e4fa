"""Writing to gs:// and az://, beside emulators of both services.

    make clouds

TIES_RAY_AZURITE names azurite's command `azurite-blob`; gcp-storage-emulator comes from PyPI, with gcsfs and adlfs.
"""

import contextlib
import importlib.util
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.families import make_family
from tests.tools.merging import merge
from ties_ray.operations.verify import verify
from ties_ray.stores import Stores, WritableStore
from ties_ray.stores import gs as google
from ties_ray.testing import StoreContract

AZURITE = os.environ.get("TIES_RAY_AZURITE", "")
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key that azurite documents for its only account."""
pytestmark = pytest.mark.filterwarnings("ignore")  # the clients' own


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, folder: Path) -> Iterator[None]:
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
                break
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def gs_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not all(importlib.util.find_spec(name) for name in ("gcsfs", "gcp_storage_emulator")):
        pytest.skip("needs gcsfs and gcp-storage-emulator: `make clouds`")
    import gcsfs
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield "gs://bucket"
    server.stop()


@pytest.fixture(scope="module")
def az_container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not (AZURITE and importlib.util.find_spec("adlfs")):
        pytest.skip("TIES_RAY_AZURITE names no azurite-blob, or adlfs is missing: `make clouds`")
    import adlfs

    port, folder = free_port(), tmp_path_factory.mktemp("azurite")
    command = [AZURITE, "--blobPort", str(port), "--location", str(folder), "--silent", "--skipApiVersionCheck"]
    url = f"http://127.0.0.1:{port}/devstoreaccount1"
    text = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={KEY};BlobEndpoint={url};"
    with running(command, port, folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
        adlfs.AzureBlobFileSystem.clear_instance_cache()
        adlfs.AzureBlobFileSystem().mkdir("container")
        yield "az://container"


class TestGs(StoreContract):
    @pytest.fixture
    def place(self, gs_bucket: str) -> tuple[WritableStore, str]:
        root = f"{gs_bucket}/{secrets.token_hex(4)}"
        return Stores({}).writer(root), root

    def test_more_parts_than_one_request_composes(
        self, place: tuple[WritableStore, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(google, "MOST_COMPOSED", 3)
        store, root = place
        data = secrets.token_hex(11 * 50).encode()  # the emulator changes some bytes of a small upload
        upload = store.begin_upload(f"{root}/x", len(data))
        pieces = [memoryview(data)[start : start + 100] for start in range(0, len(data), 100)]
        parts = [store.write_part(f"{root}/x", upload, n + 1, 100 * n, piece) for n, piece in enumerate(pieces)]
        assert store.list_uploads(root) == ((f"{root}/x", upload),)
        pin = store.complete_upload(f"{root}/x", upload, parts)
        assert store.get(f"{root}/x", len(data)) == (pin, data)
        assert store.list_uploads(root) == ()


class TestAz(StoreContract):
    @pytest.fixture
    def place(self, az_container: str) -> tuple[WritableStore, str]:
        root = f"{az_container}/{secrets.token_hex(4)}"
        return Stores({}).writer(root), root


def check_a_merge(root: str) -> None:
    """Merge from and to a folder, twice, and verify the output."""
    stores = Stores({})
    family = make_family(stores.writer(root), f"{root}/in", num_models=2)
    result = merge(family, f"{root}/out", {"name": "ties", "density": 0.3})
    assert result.status == "done"
    assert verify(stores, f"{root}/out", sample=1.0).problems == []
    assert merge(family, f"{root}/out", {"name": "ties", "density": 0.3}).reused
    assert stores.writer(root).list_uploads(f"{root}/out") == ()


def test_a_merge_goes_from_bucket_to_bucket_of_google(gs_bucket: str) -> None:
    check_a_merge(f"{gs_bucket}/{secrets.token_hex(4)}")


def test_a_merge_goes_from_container_to_container_of_azure(az_container: str) -> None:
    check_a_merge(f"{az_container}/{secrets.token_hex(4)}")
