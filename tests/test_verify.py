import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import Family
from tests.merging import INDEX, merge
from ties_ray.errors import InputError
from ties_ray.manifest import FOLDER
from ties_ray.report import Progress
from ties_ray.safetensors import parse
from ties_ray.stores import Stores
from ties_ray.verify import Verification, verify

METHOD = {"name": "ties", "density": 0.3}


@pytest.fixture
def output(family_of: Callable[..., Family], tmp_path: Path) -> Path:
    """Return a finished merge of two weight files under an index."""
    merge(family_of(num_models=2, mixed=True), {"path": str(tmp_path / "out"), "file_size": 9000}, METHOD)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    return tmp_path / "out"


def check(output: Path) -> Verification:
    return verify(Stores({}), str(output))


def told(found: Verification) -> str:
    return "\n".join(f"{one.where}: {one.what}" for one in found.findings)


def first(output: Path) -> Path:
    return min(output.glob("*.safetensors"))


def patch(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def place_of(path: Path, dtype: str) -> tuple[str, int]:
    """Return a tensor of this dtype that has elements, and its first byte."""
    data = path.read_bytes()
    tensors = parse(data, len(data), path.name).tensors
    return next((name, one.start) for name, one in tensors.items() if one.dtype == dtype and one.stop > one.start)


def test_an_untouched_output_is_whole_and_every_part_is_proved(output: Path) -> None:
    seen: list[Progress] = []
    found = verify(Stores({}), str(output), seen.append)
    assert (found.findings, found.notes) == ([], [])
    assert [file.name for file in found.files] == sorted(path.name for path in output.glob("*.safetensors"))
    assert all(file.parts_proved == file.parts > 0 and file.nan == file.infinite == 0 for file in found.files)
    assert seen[-1].bytes_read == sum(path.stat().st_size for path in output.glob("*.safetensors"))


def test_one_changed_bit_is_found_with_its_part(output: Path) -> None:
    path = first(output)
    patch(path, path.stat().st_size - 1, bytes([path.read_bytes()[-1] ^ 1]))
    found = check(output)
    assert told(found) == f"{path.name}: the bytes [0, {path.stat().st_size:,}) are not those that were written"
    assert found.files[0].parts_proved == 0


@pytest.mark.parametrize(
    ("dtype", "nan", "infinite"),
    [
        ("BF16", struct.pack("<H", 0x7FC1), struct.pack("<H", 0xFF80)),
        ("F16", struct.pack("<H", 0xFC01), struct.pack("<H", 0x7C00)),
        ("F32", struct.pack("<f", float("nan")), struct.pack("<f", float("-inf"))),
        ("F64", struct.pack("<d", float("nan")), struct.pack("<d", float("inf"))),
    ],
)
def test_values_that_are_not_finite_are_counted(output: Path, dtype: str, nan: bytes, infinite: bytes) -> None:
    path = next(path for path in sorted(output.glob("*.safetensors")) if f'"{dtype}"'.encode() in path.read_bytes())
    name, start = place_of(path, dtype)
    patch(path, start, nan)
    patch(path, start + 2 * len(nan), infinite)
    found = check(output)
    assert f"{path.name}: {name}: holds 1 NaN and 1 infinite values" in told(found)
    assert sum(file.nan for file in found.files) == sum(file.infinite for file in found.files) == 1


def test_infinity_in_a_tensor_copied_from_the_base_is_a_note(family_of: Callable[..., Family], tmp_path: Path) -> None:
    family = family_of(num_models=2)
    merge(family, tmp_path / "out", METHOD, exclude=["model.norm.weight"])
    path = tmp_path / "out" / "model.safetensors"
    data = path.read_bytes()
    patch(path, parse(data, len(data), "").tensors["model.norm.weight"].start, struct.pack("<H", 0x7F80))
    found = check(tmp_path / "out")
    assert "infinite" not in told(found)  # the changed byte itself is told, as ever
    assert found.notes == ["model.safetensors: model.norm.weight holds 0 NaN and 1 infinite values, as in the base"]


def test_a_truncated_file_is_told_by_its_size_and_header(output: Path) -> None:
    path = first(output)
    path.write_bytes(path.read_bytes()[:-100])
    text = told(check(output))
    assert "were written" in text
    assert "is truncated" in text


def test_a_missing_file_is_told_and_the_others_are_still_checked(output: Path) -> None:
    first(output).unlink()
    found = check(output)
    assert f"{first(output).name}" not in told(found)
    assert "is not there" in told(found)
    assert "disagrees with the files' headers" in told(found)
    assert all(file.parts_proved == file.parts for file in found.files)


def test_a_header_that_is_not_the_planned_one_is_told(output: Path) -> None:
    path = first(output)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"format":"pt"', b'"format":"tf"', 1))
    assert f"{path.name}: its header is not the planned one" in told(check(output))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"metadata": {"total_size": 1}}, "says 1 bytes"),
        ({"weight_map": {}}, "disagrees with the files' headers"),
        ({"weight_map": None}, "is not an index"),
    ],
)
def test_an_index_that_is_not_the_headers_is_told(output: Path, change: dict[str, object], what: str) -> None:
    index = json.loads((output / INDEX).read_bytes())
    (output / INDEX).write_text(json.dumps(index | change))
    assert what in told(check(output))


def test_a_missing_index_is_told(output: Path) -> None:
    (output / INDEX).unlink()
    assert "weight files and no index" in told(check(output))


def test_a_weight_file_of_somebody_else_is_told(output: Path) -> None:
    (output / "other.safetensors").write_bytes(first(output).read_bytes())
    assert told(check(output)) == "other.safetensors: was not written by this merge"


def test_without_the_records_it_says_what_could_not_be_checked(output: Path) -> None:
    (output / FOLDER).rename(output.parent / "elsewhere")
    found = check(output)
    assert found.findings == []
    assert len(found.notes) == 1
    assert "headers and parts can't be compared" in found.notes[0]
    assert sum(file.parts_proved for file in found.files) == 0

    path = first(output)
    patch(path, path.stat().st_size - 1, bytes([path.read_bytes()[-1] ^ 1]))
    assert told(check(output)).startswith(f"{path.name}: its CRC32C is ")  # the result record knows the whole file's


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no finished merge"):
        check(tmp_path)
