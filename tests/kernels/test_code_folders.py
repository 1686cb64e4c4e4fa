import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ties_ray.kernels import code_folders


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the test a cache of the user and a temporary folder, and no installation."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(code_folders, "BESIDE", tmp_path / "beside")
    code_folders.own.cache_clear()
    yield
    code_folders.own.cache_clear()


def own() -> Path:
    code_folders.own.cache_clear()
    return code_folders.own()


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    home, temporary = tmp_path / "cache" / "ties_ray", tmp_path / "tmp" / f"ties_ray-{os.getuid()}"
    assert own() == home
    home.chmod(0o770)
    assert own() == temporary
    temporary.chmod(0o707)
    assert own() not in (home, temporary)
    home.chmod(0o755)
    assert own() == home


def test_a_link_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache" / "ties_ray").symlink_to(tmp_path / "elsewhere")
    assert own().parent == tmp_path / "tmp"


def test_code_is_read_only_where_nobody_else_may_write_folder_and_file(tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    for folder in (beside, own()):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        code_folders.write(folder, "name", b"code")
        for path in (folder, folder / "name"):
            for mode in (0o777, 0o775):
                path.chmod(mode)
                assert code_folders.read("name") is None
            path.chmod(0o755)
            assert code_folders.read("name") == b"code"
        (folder / "name").unlink()


def test_a_file_of_another_user_is_not_trusted(tmp_path: Path) -> None:
    status = tmp_path.stat()
    fields = list(status)
    assert code_folders.is_trusted(os.stat_result(fields))
    fields[4] = 12_345  # st_uid
    assert not code_folders.is_trusted(os.stat_result(fields))


def test_no_code_is_there_until_a_function_is_compiled() -> None:
    assert code_folders.are_empty()
    code_folders.write(code_folders.own(), "cpu._product-1.compiled", b"code")
    assert not code_folders.are_empty()
