"""What tests of troubled workers and nodes share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.merging import digests, merge

OUTPUT = {"file_size": "15MB", "part_size": "5MiB"}


@pytest.fixture(scope="session")
def family(family_of: Callable[..., Family]) -> Family:
    """Return three fine-tunes of 21 MB: 11 shards a round, 5 in the merge."""
    return family_of(hidden=1024, shards=3)


@pytest.fixture(scope="session")
def undisturbed(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what an undisturbed merge writes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    merge(family, {"path": str(folder), **OUTPUT}, {"name": "ties", "profile": "official"})
    return digests(folder)


@pytest.fixture
def trouble(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of the method's troubles; at the end what hangs there is let go."""
    folder = tmp_path / "trouble"
    folder.mkdir()
    yield folder
    (folder / "release").touch()
