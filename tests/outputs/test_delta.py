import json

import pytest
import torch

from ties_ray.kernels import load
from ties_ray.outputs import OutputFile, Placed
from ties_ray.outputs.delta import LIBRARY, Delta
from ties_ray.tensors import Parameter
from ties_ray.testing import OutputContract, same_bits


class TestDelta(OutputContract):
    @pytest.fixture
    def output(self) -> Delta:
        return Delta(path="/out")


class TestDeltaOfAnotherDtype(OutputContract):
    @pytest.fixture
    def output(self) -> Delta:
        return Delta(path="/out", dtype="bfloat16")


def test_what_is_merged_and_changed_is_written_and_nothing_else() -> None:
    parameters = [
        Parameter("a.weight", (4, 6), "BF16", True),
        Parameter("a.bias", (4,), "F16", True),
        Parameter("b.weight", (4, 6), "BF16", True, changed=False),
        Parameter("ids", (3,), "I64", False),
    ]
    found = [(each.name, each.dtype, each.shape, each.origin) for each in Delta(path="/out").tensors(parameters)]
    assert found == [("a.weight", "F32", (4, 6), "merged"), ("a.bias", "F32", (4,), "merged")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_change_is_rounded_once_and_no_change_is_plus_zero(dtype: torch.dtype) -> None:
    merged = torch.randn(150_001, generator=torch.Generator().manual_seed(1)) * 0.01
    merged[::3] = 0.0
    merged[1::3] = -0.0
    out = torch.empty(len(merged), dtype=dtype)
    assert Delta(path="/out").values(torch.empty(0), merged, out, load("cpu")) == 0
    assert same_bits(out, torch.where(merged == 0, 0.0, merged).to(dtype))
    assert not out.signbit()[merged == 0].any()


def test_a_change_that_is_not_a_number_is_counted() -> None:
    merged = torch.tensor([1.0, float("nan"), float("inf")])
    assert Delta(path="/out").values(torch.empty(0), merged, torch.empty(3), load("cpu")) == 2


def test_one_file_has_an_index_too() -> None:
    delta = Delta(path="/out")
    (tensor,) = delta.tensors([Parameter("a.weight", (4, 6), "BF16", True)])
    files = (OutputFile(LIBRARY.file_name(1, 1), "{}", (Placed(tensor, 8, 104),), 104),)
    name, data = delta.index(files, (), {}, LIBRARY)
    assert name == delta.entry_point_file(files, LIBRARY) == "delta.safetensors.index.json"
    assert json.loads(data) == {
        "metadata": {"total_size": 96}, "weight_map": {"a.weight": "delta.safetensors"},
    }  # fmt: skip
