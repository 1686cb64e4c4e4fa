from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.tools.families import Family, write_checkpoint
from tests.tools.merging import digests, merge, read_tensors
from ties_ray.errors import InputError
from ties_ray.stores import Stores

PLAIN = {"a.weight": torch.linspace(-1, 1, 60).view(6, 10), "a.bias": torch.zeros(20)}
LARGEST = torch.finfo(torch.float32).max


def family(folder: Any, extra: Mapping[str, torch.Tensor]) -> Family:
    """Write a base and two models that have the same constants."""
    store = Stores({}).of(str(folder))
    base = {**PLAIN, **extra}
    models = tuple({**base, "a.weight": PLAIN["a.weight"] + step} for step in (0.1, 0.2))
    names = (str(folder / "base"), str(folder / "m0"), str(folder / "m1"))
    for name, tensors in zip(names, (base, *models), strict=True):
        write_checkpoint(store, name, tensors)
    return Family(names[0], names[1:], base, models)


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", -1e9), ("float16", 65_520.0), ("bfloat16", -LARGEST), ("float16", LARGEST)]
)
def test_a_constant_that_a_narrower_dtype_cannot_hold_keeps_its_own(tmp_path: Any, dtype: str, value: float) -> None:
    constants = {"a.masked_bias": torch.tensor(value), "a.mask": torch.full((30, 30), value)}
    result = merge(family(tmp_path, constants), {"path": str(tmp_path / "out"), "dtype": dtype}, "average")
    got = read_tensors(tmp_path / "out")
    for name, tensor in constants.items():
        assert torch.equal(got[name], tensor)
        assert got[name].dtype == torch.float32
    assert got["a.weight"].dtype == getattr(torch, dtype)
    (note,) = (note for note in result.notes if "overflow" in note)
    named = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert note.endswith(f"since their values overflow {named}: a.mask, a.masked_bias")


@pytest.mark.parametrize("value", [-1e4, 65_504.0, 0.0])
def test_a_constant_that_fits_takes_the_outputs_dtype(tmp_path: Any, value: float) -> None:
    output = {"path": str(tmp_path / "out"), "dtype": "float16"}
    merge(family(tmp_path, {"a.masked_bias": torch.tensor(value)}), output, "average")
    assert read_tensors(tmp_path / "out")["a.masked_bias"].dtype == torch.float16


def test_a_large_constant_called_a_weight_is_refused_with_a_remedy_that_works(tmp_path: Any) -> None:
    given = family(tmp_path, {"pos.weight": torch.full((40,), -1e9)})
    output = {"path": str(tmp_path / "out"), "dtype": "float16"}
    told = r"pos\.weight: 40 merged values are finite but overflow F16, as 40 of the base's do; "
    with pytest.raises(InputError, match=told + r'.*exclude: \["pos.weight"\]'):
        merge(given, output, "average")
    merge(given, {**output, "path": str(tmp_path / "other")}, "average", exclude=["pos.weight"])
    assert torch.equal(read_tensors(tmp_path / "other")["pos.weight"], given.base_tensors["pos.weight"])


def test_without_another_dtype_constants_are_not_looked_at(tmp_path: Any) -> None:
    given = family(tmp_path, {"a.masked_bias": torch.tensor(-1e9)})
    assert not [note for note in merge(given, str(tmp_path / "one"), "average").notes if "overflow" in note]
    merge(given, {"path": str(tmp_path / "two"), "dtype": "float32"}, "average")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
