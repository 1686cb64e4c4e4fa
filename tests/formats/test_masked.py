import numpy as np
import pytest
import torch

from tests.tools.families import file_bytes
from ties_ray.formats import Rules
from ties_ray.formats.masked import Masked
from ties_ray.tensors import Parameter
from ties_ray.testing import FormatContract, folder_of

VECTOR = {"a.weight": torch.randn(17, 19, generator=torch.Generator().manual_seed(2)), "b": torch.tensor(0.5)}
MASK = {
    name: torch.rand(value.shape, generator=torch.Generator().manual_seed(3)) < 0.6 for name, value in VECTOR.items()
}
FACTOR = 1.2345678912345
PARAMETERS = {name: Parameter(name, tuple(value.shape), "BF16", True) for name, value in VECTOR.items()}


def files_of(**replaced: torch.Tensor) -> dict[str, bytes]:
    bits = {name: torch.from_numpy(np.packbits(mask.numpy())) for name, mask in MASK.items()}
    mask = {"factor": torch.tensor([FACTOR], dtype=torch.float64), **bits, **replaced}
    return {"unified_vector.safetensors": file_bytes(VECTOR), "mask-00001.safetensors": file_bytes(mask)}


class TestMasked(FormatContract):
    @pytest.fixture
    def format(self) -> Masked:
        return Masked()

    @pytest.fixture
    def files(self) -> dict[str, bytes]:
        return files_of()

    @pytest.fixture
    def parameters(self) -> dict[str, Parameter]:
        return PARAMETERS

    @pytest.fixture
    def expected(self) -> dict[str, torch.Tensor]:
        return {name: (torch.where(MASK[name], value, 0.0) * FACTOR).view(-1) for name, value in VECTOR.items()}


@pytest.mark.parametrize(
    ("replaced", "culprit"),
    [
        ({"factor": torch.ones(2, dtype=torch.float64)}, "factor"),
        ({"factor": torch.ones(1)}, "factor"),
        ({"b": torch.zeros(2, dtype=torch.uint8)}, "b"),
        ({"b": torch.zeros(1)}, "b"),
    ],
    ids=["two factors", "a factor in fp32", "too many bits", "no bits"],
)
def test_a_mask_that_does_not_fit_its_vector_is_refused(replaced: dict[str, torch.Tensor], culprit: str) -> None:
    contents = Masked().read(folder_of(Masked(), files_of(**replaced)), PARAMETERS, Rules())
    (problem,) = contents.problems
    assert f"vector, mask and base do not fit: {culprit}; merge again" in str(problem)


def test_a_mask_without_a_factor_and_a_vector_of_another_dtype_or_shape_are_refused() -> None:
    files = files_of()
    bits = {name: torch.from_numpy(np.packbits(mask.numpy())) for name, mask in MASK.items()}
    vector = {**VECTOR, "b": VECTOR["b"].double()}
    shape = {**PARAMETERS, "a.weight": Parameter("a.weight", (19, 17), "BF16", True)}
    for replaced, parameters, culprit in (
        ({"mask-00001.safetensors": file_bytes(bits)}, PARAMETERS, "factor"),
        ({"unified_vector.safetensors": file_bytes(vector)}, PARAMETERS, "b"),
        ({}, shape, "a.weight"),
    ):
        (problem,) = Masked().read(folder_of(Masked(), {**files, **replaced}), parameters, Rules()).problems
        assert f"do not fit: {culprit}; merge" in str(problem)


def test_one_of_several_masks_has_to_be_chosen() -> None:
    vector, mask = files_of()
    assert Masked().wanted([vector, mask, "mask-00001.txt"]) == ((vector, mask), ())
    assert Masked().wanted([vector, mask, "mask-00002.safetensors"]) == ((vector,), ())
    files = {**files_of(), "mask-00002.safetensors": files_of()[mask]}
    (problem,) = Masked().read(folder_of(Masked(), files), PARAMETERS, Rules()).problems
    assert "holds the masks of 2 models" in str(problem)
    assert mask in problem.remedy


def test_without_a_base_names_and_shapes_are_the_vectors_own() -> None:
    contents = Masked().read(folder_of(Masked(), files_of()), None, Rules())
    assert contents.sources == Masked().read(folder_of(Masked(), files_of()), PARAMETERS, Rules()).sources
    bits = 1 + 17 * 19 + 1 + -(-17 * 19 // 8) + 1  # the factor, the vector's elements and the bytes of the mask
    assert (contents.account.stored, contents.account.merged) == (bits, bits)
    assert not Masked().whole, "it counts as an adapter does: what it changes, beside the base"


def test_a_vector_of_other_parameters_than_the_bases_is_refused() -> None:
    base = {"a.weight": PARAMETERS["a.weight"]}
    (problem,) = Masked().read(folder_of(Masked(), files_of()), base, Rules()).problems
    assert "other parameters than the base's" in str(problem)


def test_excluded_parameters_are_left_aside() -> None:
    contents = Masked().read(folder_of(Masked(), files_of()), PARAMETERS, Rules(exclude=("b",)))
    assert list(contents.sources) == ["a.weight"]
    assert contents.account.adds_up
    assert [(aside.reason, aside.elements) for aside in contents.account.aside] == [("excluded by the recipe", 2)]
