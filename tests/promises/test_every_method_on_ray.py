"""Each method merges checkpoints and adapters on Ray to the bytes of this process; on demand, by `make every`."""

from pathlib import Path

import pytest

from tests.promises.test_every_method import OUTPUTS, merged
from ties_ray import plugins


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("name", plugins.names("methods"))
def test_a_method_merges_on_ray_from_storage_to_storage(name: str, kind: str, tmp_path: Path) -> None:
    assert merged(name, kind, tmp_path, "ray") == merged(name, kind, tmp_path, "local")
