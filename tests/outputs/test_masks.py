import pytest

from ties_ray.outputs.masks import LIBRARY, Masks
from ties_ray.tensors import Parameter
from ties_ray.testing import OutputContract

PARAMETERS = [
    Parameter("a.weight", (3, 3), "BF16", True),
    Parameter("b.weight", (4, 6), "BF16", True, changed=False),
    Parameter("ids", (3,), "I64", False),
]


class TestMasks(OutputContract):
    @pytest.fixture
    def output(self) -> Masks:
        return Masks(path="/out")


def test_each_model_has_a_file_with_its_factor_and_a_bit_for_each_element() -> None:
    (first, second) = Masks(path="/out").products(PARAMETERS, ["code", "math"])
    assert [first.name, second.name] == ["mask-00000.safetensors", "mask-00001.safetensors"]
    assert second.metadata["model"] == "math"
    found = [(each.name, each.dtype, each.shape, each.origin, each.member) for each in second.tensors]
    assert found == [("factor", "F64", (1,), "factor", 1), ("a.weight", "U8", (2,), "mask", 1)]


def test_the_vector_holds_what_is_merged_and_changed() -> None:
    (tensor,) = Masks(path="/out").tensors(PARAMETERS)
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.origin) == ("a.weight", "F32", (3, 3), "merged")
    assert LIBRARY.file_name(1, 1) == "unified_vector.safetensors"


def test_a_parameter_called_as_the_factor_is_refused() -> None:
    (problem,) = Masks(path="/out").problems([*PARAMETERS, Parameter("factor", (1,), "F32", True)])
    assert problem.where == "output.kind"
