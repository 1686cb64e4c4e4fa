"""Methods and rounds keep to the device of their kernels, shown without a GPU (`tests/tools/elsewhere.py`)."""

from pathlib import Path

import pytest

from tests.promises.test_every_method import OUTPUTS, merged
from tests.tools.adapters import make_pool
from tests.tools.elsewhere import compute_elsewhere
from ties_ray import plugins
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("name", plugins.names("methods"))
def test_a_method_keeps_to_the_device_of_its_kernels(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = merged(name, kind, tmp_path, "local")
    compute_elsewhere(monkeypatch)
    assert merged(name, kind, tmp_path, "local", device="cuda") == here


@pytest.mark.parametrize("method", ["average", "ties", "iso_c", "opcm"])
def test_a_matrix_is_condensed_on_the_device_of_the_kernels(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path / "pool"), num_adapters=3)

    def files(device: str) -> list[bytes]:
        output = {"path": str(tmp_path / device), "kind": "adapter", "rank": "auto"}
        run = {"executor": "local", "device": device}
        data = {"base": pool.base, "models": list(pool.adapters), "method": method, "output": output, "run": run}
        result = merging.merge(validate(data))
        return [(tmp_path / device / file.name).read_bytes() for file in result.files]

    here = files("cpu")
    compute_elsewhere(monkeypatch)
    assert files("cuda") == here
