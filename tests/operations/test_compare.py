import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import ties_ray
from tests.conftest import Bucket
from tests.tools.adapters import make_pool
from tests.tools.families import make_family, write_checkpoint
from tests.tools.merging import merge
from ties_ray.errors import InputError
from ties_ray.operations.compare import compare, problems_of
from ties_ray.stores import Stores

STORES = Stores({})
STORE = STORES.of("/")


def test_checkpoints_are_compared_tensor_by_tensor_and_in_sum(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=2, shards=2)
    comparison = ties_ray.compare(family.models[0], family.models[1])
    assert comparison.compares == "values"
    assert {tensor.name for tensor in comparison.tensors} == set(family.model_tensors[0])
    total = 0.0
    for tensor in comparison.tensors:
        a, b = (each[tensor.name].double() for each in family.model_tensors[:2])
        assert tensor.difference == pytest.approx(float((b - a).norm()), rel=1e-12)
        assert tensor.changed == int((a != b).sum())
        assert list(a.shape) == tensor.shape
        total += float((b - a).square().sum())
    assert comparison.total.difference == pytest.approx(total**0.5, rel=1e-12)
    assert not comparison.equal


def test_with_a_base_the_changes_are_compared(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=2)
    comparison = ties_ray.compare(family.models[0], family.models[1], base=family.base)
    tensor = max(comparison.tensors, key=lambda each: each.elements)
    base, *models = (each[tensor.name].float() for each in (family.base_tensors, *family.model_tensors[:2]))
    a, b = ((model - base).double().flatten() for model in models)
    assert comparison.compares == "changes"
    assert tensor.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-12)


def test_adapters_are_compared_by_the_changes_that_their_factors_make(tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path), num_adapters=2)
    comparison = compare(STORES, *pool.adapters)
    both = [tensor for tensor in comparison.tensors if tensor.name in pool.deltas[0] and tensor.name in pool.deltas[1]]
    assert both
    for tensor in both:
        a, b = (delta[tensor.name].double() for delta in pool.deltas)
        assert tensor.difference == pytest.approx(float((b - a).norm()), rel=1e-5)
        assert tensor.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-5)


def test_a_module_that_an_adapter_lacks_is_a_change_of_zero(tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path), num_adapters=2)
    comparison = compare(STORES, *pool.adapters)
    assert set(comparison.only_in_a) == set(pool.deltas[0]) - set(pool.deltas[1])
    by_name = {tensor.name: tensor for tensor in comparison.tensors}
    assert {by_name[name].relative_error for name in comparison.only_in_a} == {1.0}
    whole = sum(float(delta.square().sum()) for delta in pool.deltas[0].values())
    assert comparison.total.norm_a == pytest.approx(whole**0.5, rel=1e-5)


def test_an_adapter_of_dora_needs_the_base_and_is_compared_with_it(tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path), num_adapters=2, variants=("dora", "plain"))
    with pytest.raises(InputError, match="base"):
        compare(STORES, *pool.adapters)
    comparison = compare(STORES, *pool.adapters, base=pool.base)
    (tensor,) = [each for each in comparison.tensors if each.name == "model.layers.0.self_attn.q_proj.weight"]
    a, b = (delta[tensor.name].double() for delta in pool.deltas)
    assert tensor.difference == pytest.approx(float((b - a).norm()), rel=1e-4)


def test_a_merged_delta_is_compared_with_an_adapter(tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path), num_adapters=1)
    recipe = {
        "models": list(pool.adapters),
        "method": "average",
        "output": {"path": str(tmp_path / "out"), "kind": "delta"},
    }
    ties_ray.merge(recipe | {"run": {"executor": "local"}})
    comparison = compare(STORES, str(tmp_path / "out"), pool.adapters[0])
    assert comparison.compares == "changes"
    assert comparison.total.relative_error == pytest.approx(0, abs=0.01)
    assert comparison.dtypes == {} or "BF16 -> F32" in comparison.dtypes


def test_a_change_and_a_whole_model_need_their_base(tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path), num_adapters=1)
    with pytest.raises(InputError, match="--base"):
        compare(STORES, pool.adapters[0], pool.base)


def test_names_shapes_and_dtypes_that_differ_are_listed(tmp_path: Path) -> None:
    write_checkpoint(STORE, str(tmp_path / "a"), {"x": torch.ones(3), "y": torch.ones(2, 2), "z": torch.ones(4)})
    other = {"x": torch.ones(3, dtype=torch.bfloat16), "y": torch.ones(4), "new": torch.zeros(1)}
    write_checkpoint(STORE, str(tmp_path / "b"), other)
    comparison = compare(STORES, str(tmp_path / "a"), str(tmp_path / "b"))
    assert (comparison.only_in_a, comparison.only_in_b) == (["z"], ["new"])
    assert comparison.dtypes == {"F32 -> BF16": 1}
    assert [(each.name, each.a, each.b) for each in comparison.unlike] == [("y", "F32 [2, 2]", "F32 [4]")]
    assert [tensor.changed for tensor in comparison.tensors] == [0]
    assert not comparison.equal
    assert [problem.where for problem in problems_of(comparison, 1)] == ["z", "new", "y"]


def test_merges_of_the_same_bytes_are_known_by_their_records_and_not_read(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=2)
    for name in ("one", "two", "three"):
        merge(family, tmp_path / name, {"name": "ties", "density": 0.3 if name == "three" else 0.2})
    comparison = compare(STORES, str(tmp_path / "one"), str(tmp_path / "two"))
    assert comparison.same_bytes
    assert comparison.equal
    assert comparison.tensors == []
    assert "CRC32C" in comparison.proof
    assert not compare(STORES, str(tmp_path / "one"), str(tmp_path / "three")).same_bytes


def test_a_file_that_was_touched_since_its_merge_is_read(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=2)
    for name in ("one", "two"):
        merge(family, tmp_path / name, "average")
    path = tmp_path / "two" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[5000] ^= 64
    path.write_bytes(bytes(data))
    comparison = compare(STORES, str(tmp_path / "one"), str(tmp_path / "two"))
    assert not comparison.same_bytes
    assert comparison.total.changed == 1


def test_a_copy_has_equal_values_without_a_record_that_says_so(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=1)
    shutil.copytree(family.models[0], tmp_path / "copy")
    comparison = compare(STORES, family.models[0], str(tmp_path / "copy"))
    assert (comparison.same_bytes, comparison.equal) == (False, True)
    assert problems_of(comparison, 0) == []


def test_a_result_is_frozen_and_has_a_json_form(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=2)
    comparison = ties_ray.compare(*family.models[:2])
    with pytest.raises(ValidationError, match="frozen"):
        comparison.a = "other"
    again = ties_ray.Comparison.model_validate(json.loads(comparison.model_dump_json()))
    assert again == comparison


def test_orders_put_the_largest_differences_first(tmp_path: Path) -> None:
    a = {"x": torch.ones(4), "y": torch.ones(4), "z": torch.zeros(4)}
    b = {"x": torch.ones(4) * 1.5, "y": torch.tensor([1.0, 1.0, 1.0, 9.0]), "z": torch.full((4,), 0.1)}
    write_checkpoint(STORE, str(tmp_path / "a"), a)
    write_checkpoint(STORE, str(tmp_path / "b"), b)
    comparison = compare(STORES, str(tmp_path / "a"), str(tmp_path / "b"))
    names = {
        order: "".join(each.name for each in comparison.in_order(order)) for order in ("relative", "cosine", "changed")
    }
    assert names == {"relative": "zyx", "cosine": "yxz", "changed": "xzy"}


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        compare(STORES, family.models[0], str(tmp_path / "empty"))


def test_models_in_a_bucket_are_compared_as_on_disk(s3_bucket: Bucket) -> None:
    stores = Stores(s3_bucket.storage)
    family = make_family(stores.of(s3_bucket.uri), f"{s3_bucket.uri}/f", num_models=2)
    comparison = ties_ray.compare(*family.models[:2], storage=s3_bucket.storage)
    assert comparison.total.changed
    same = ties_ray.compare(family.models[0], family.models[0], storage=s3_bucket.storage)
    assert same.same_bytes
