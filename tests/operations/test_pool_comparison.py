from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tools.adapters import make_pool, write_adapter
from tests.tools.families import make_family
from ties_ray.errors import InputError
from ties_ray.operations.pool_comparison import compare_models
from ties_ray.reports.pool import PoolComparison
from ties_ray.stores import Stores

STORES = Stores({})
STORE = STORES.of("/")


def cosine_matrix(comparison: PoolComparison) -> np.ndarray:
    matrix = np.eye(len(comparison.models))
    for number, row in enumerate(comparison.cosines):
        matrix[number, :number] = matrix[:number, number] = row
    return matrix


def expected(changes: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """Return the cosines of changes by parameter, in fp64; a change that is missing is zero."""

    def product(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return sum(float((a[name].double() * b[name].double()).sum()) for name in a.keys() & b.keys())

    norms = [product(each, each) ** 0.5 for each in changes]
    return np.array([[product(a, b) / x / y for b, y in zip(changes, norms)] for a, x in zip(changes, norms)])  # noqa: B905


def test_adapters_are_compared_by_their_factors_without_a_base(tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path), num_adapters=4)
    comparison = compare_models(STORES, [str(tmp_path / "adapter-*")])
    np.testing.assert_allclose(cosine_matrix(comparison), expected(list(map(dict, pool.deltas))), atol=2e-6)
    norms = [sum(float(each.square().sum()) for each in delta.values()) ** 0.5 for delta in pool.deltas]
    assert [model.norm for model in comparison.models] == pytest.approx(norms, rel=1e-6)
    assert [model.rank for model in comparison.models] == [8, 16, 8, 16]
    assert sum(comparison.models[0].spectrum) == pytest.approx(1, abs=1e-4)


def test_adapters_of_dora_are_compared_with_the_base(tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path), num_adapters=3, variants=("plain", "dora"))
    comparison = compare_models(STORES, [str(tmp_path / "adapter-*")], pool.base)
    np.testing.assert_allclose(cosine_matrix(comparison), expected(list(map(dict, pool.deltas))), atol=1e-4)


def test_checkpoints_are_compared_by_their_changes_and_every_sign(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=3, dtype="F32")
    comparison = compare_models(STORES, [str(tmp_path / "*")], family.base)
    assert [model.name for model in comparison.models] == ["model-0", "model-1", "model-2"]
    changes = [
        {
            name: value.double() - family.base_tensors[name].double()
            for name, value in tensors.items()
            if value.is_floating_point()
        }
        for tensors in family.model_tensors
    ]
    np.testing.assert_allclose(cosine_matrix(comparison), expected(changes), atol=2e-6)
    assert comparison.signs_of == sum(each.numel() for each in changes[0].values())


def test_what_was_planted_is_named(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    paths = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]

    def modules(scale: float = 1.0) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        a, b = torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator)
        return {path: (a, b * scale, 4.0) for path in paths}

    models = [modules() for _ in range(12)]
    models[5] = models[2]
    models[7] = modules(30)
    models[8] = {path: (a, -b, alpha) for path, (a, b, alpha) in models[1].items()}
    models[9] = modules(0)
    for number, each in enumerate(models):
        write_adapter(STORE, str(tmp_path / f"team-{number}"), each)
    comparison = compare_models(STORES, [str(tmp_path / "team-?"), str(tmp_path / "team-??")])
    remarks = {remark.kind: remark.models for remark in reversed(comparison.remarks)}
    assert remarks["dead"] == ["team-9"]
    assert remarks["duplicate"] == ["team-2", "team-5"]
    assert remarks["conflict"] == ["team-1", "team-8"]
    assert remarks["outlier"] == ["team-7"]


def test_models_that_a_merge_would_refuse_are_left_out_and_told(tmp_path: Path) -> None:
    make_pool(STORE, str(tmp_path), num_adapters=3)
    (tmp_path / "adapter-0001" / "adapter_model.safetensors").write_bytes(b"none")
    comparison = compare_models(STORES, [str(tmp_path / "adapter-*")])
    assert [model.name for model in comparison.models] == ["adapter-0000", "adapter-0002"]
    assert list(comparison.refused) == [str(tmp_path / "adapter-0001")]
    assert not [note for note in comparison.notes if "adapter-0001" in note]


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=2, dtype="F32")
    path = Path(family.models[1]) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[5000 - 5000 % 4 : 5004 - 5000 % 4] = b"\x00\x00\xc0\x7f"
    path.write_bytes(bytes(data))
    comparison = compare_models(STORES, [str(tmp_path / "model-*")], family.base)
    assert [model.not_finite for model in comparison.models] == [0, 1]


def test_factors_that_are_not_finite_are_no_change_and_counted(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        a, b = torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator)
        broken = b.clone()
        broken[0, :2] = torch.nan
        modules = {f"model.layers.{n}.self_attn.q_proj": (a, b, 4.0) for n in range(2)}
        modules |= {"model.layers.2.self_attn.q_proj": (a, broken if number == 1 else b, 4.0)}
        write_adapter(STORE, str(tmp_path / f"team-{number}"), modules)
    comparison = compare_models(STORES, [str(tmp_path / "team-*")])
    assert [model.not_finite for model in comparison.models] == [0, 2, 0]
    assert np.isfinite(cosine_matrix(comparison)).all()


def test_whole_models_need_their_base(tmp_path: Path) -> None:
    make_family(STORE, str(tmp_path), num_models=2)
    with pytest.raises(InputError, match="base"):
        compare_models(STORES, [str(tmp_path / "model-*")])
