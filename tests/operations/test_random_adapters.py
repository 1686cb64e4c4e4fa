"""Random twins of adapters: equal norms module by module, nothing else in common, and the same by the same seed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools.adapters import make_pool
from ties_ray.errors import InputError
from ties_ray.operations import sweeping
from ties_ray.operations.random_adapters import randomise
from ties_ray.recipe.settings import sweep_of
from ties_ray.stores import Stores


def changes(folder: str) -> dict[str, torch.Tensor]:
    """Return B @ A of each module in fp64."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    return {
        name: tensors[name.replace("lora_A", "lora_B")].double() @ value.double()
        for name, value in tensors.items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_twin_has_the_norm_of_each_module_and_no_direction(dtype: str, tmp_path: Path) -> None:
    made = make_pool(Stores({}).of("/"), str(tmp_path / "made"), hidden=64, num_adapters=3, dtype=dtype, dense=False)
    record = randomise(Stores({}), [f"{tmp_path}/made/adapter-*"], str(tmp_path / "twins"), seed=3)
    assert [twin.model for twin in record.twins] == list(made.adapters)
    cosines = []
    for twin in record.twins:
        theirs, ours = changes(twin.model), changes(twin.output)
        assert theirs.keys() == ours.keys()
        for name, change in theirs.items():
            assert float(ours[name].norm()) == pytest.approx(float(change.norm()), rel=2e-3)
            cosines.append(float((ours[name] * change).sum() / change.norm() / ours[name].norm()))
        total = sum(float(change.norm()) ** 2 for change in ours.values()) ** 0.5
        assert twin.norm == pytest.approx(total, rel=1e-5)
        values = load_file(Path(twin.output) / "adapter_model.safetensors")
        firsts = torch.cat([value.flatten() for name, value in values.items() if "lora_A" in name]).double()
        assert abs(float(firsts.mean())) < 0.05
        assert float(firsts.square().mean()) == pytest.approx(1 / 3, rel=0.05)
    assert max(map(abs, cosines)) < 0.1


def test_twins_are_those_of_their_seed_and_are_swept_beside_the_models(tmp_path: Path) -> None:
    made = make_pool(Stores({}).of("/"), str(tmp_path / "made"), num_adapters=3, dense=False)
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        randomise(Stores({}), made.adapters, str(tmp_path / folder), seed=seed)
    files = [
        [path.read_bytes() for path in sorted((tmp_path / folder).rglob("*.safetensors"))] for folder in ("a", "b", "c")
    ]
    assert files[0] == files[1] != files[2]
    assert len({*files[0]}) == 3, "adapters have twins of their own"
    data = {
        "base": made.base,
        "models": [f"{tmp_path}/made/adapter-*"],
        "method": "task_arithmetic",
        "output": {"path": f"{tmp_path}/swept/{{setting}}", "kind": "delta"},
        "settings": [{"name": "real", "set": {}}, {"name": "random", "set": {"models.0.path": f"{tmp_path}/a/*"}}],
        "run": {"executor": "local"},
    }
    rows = {row.setting: row for row in sweeping.sweep(sweep_of(data)).rows}
    assert rows["random"].num_models == 3
    assert rows["random"].norm == pytest.approx(rows["real"].norm, rel=0.2)


def test_what_is_no_plain_adapter_has_no_twin(tmp_path: Path) -> None:
    made = make_pool(Stores({}).of("/"), str(tmp_path / "made"), num_adapters=2, variants=("plain", "dora"))
    with pytest.raises(InputError, match="only pairs of two-dimensional lora_A and lora_B have random twins"):
        randomise(Stores({}), made.adapters, str(tmp_path / "twins"))
    with pytest.raises(InputError, match="holds no adapter_config"):
        randomise(Stores({}), [made.base], str(tmp_path / "twins"))
    shutil.copytree(made.adapters[0], tmp_path / "copy/adapter-0000")
    with pytest.raises(InputError, match="two folders are called"):
        randomise(Stores({}), [made.adapters[0], f"{tmp_path}/copy/adapter-0000"], str(tmp_path / "twins"))
    path = Path(made.adapters[0]) / "adapter_model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(path).items()}, path)
    with pytest.raises(InputError, match="is not finite"):
        randomise(Stores({}), [made.adapters[0]], str(tmp_path / "twins"))
