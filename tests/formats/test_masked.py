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
    "replaced",
    [
        {"factor": torch.ones(2, dtype=torch.float64)},
        {"factor": torch.ones(1)},
        {"b": torch.zeros(2, dtype=torch.uint8)},
        {"b": torch.zeros(1)},
    ],
    ids=["two factors", "a factor in fp32", "too many bits", "no bits"],
)
def test_a_mask_that_does_not_fit_its_vector_is_refused(replaced: dict[str, torch.Tensor]) -> None:
    contents = Masked().read(folder_of(Masked(), files_of(**replaced)), PARAMETERS, Rules())
    (problem,) = contents.problems
    assert "vector, mask and base do not fit" in str(problem)


def test_a_vector_of_other_parameters_than_the_bases_is_refused() -> None:
    base = {"a.weight": PARAMETERS["a.weight"]}
    (problem,) = Masked().read(folder_of(Masked(), files_of()), base, Rules()).problems
    assert "other parameters than the base's" in str(problem)


def test_excluded_parameters_are_left_aside() -> None:
    contents = Masked().read(folder_of(Masked(), files_of()), PARAMETERS, Rules(exclude=("b",)))
    assert list(contents.sources) == ["a.weight"]
    assert contents.account.adds_up
