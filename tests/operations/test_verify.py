import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family, make_family
from tests.tools.merging import INDEX, digests, merge
from ties_ray import kernels
from ties_ray.errors import InputError
from ties_ray.operations import sample
from ties_ray.operations.verify import Verification, verify
from ties_ray.planning.plan import Plan
from ties_ray.reports.records import RESULT_NAME, SUMS_NAME, Progress, find_result
from ties_ray.safetensors import parse
from ties_ray.state.manifest import FOLDER, Manifest, find_runs
from ties_ray.stores import Stores, crc32c, local

METHOD = {"name": "ties", "density": 0.3}


@pytest.fixture
def output(family_of: Callable[..., Family], tmp_path: Path) -> Path:
    """Return a finished merge of two weight files under an index."""
    merge(family_of(num_models=2, mixed=True), {"path": str(tmp_path / "out"), "file_size": 9000}, METHOD)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    return tmp_path / "out"


def check(output: Path) -> Verification:
    return verify(Stores({}), str(output))


def problems_of(verification: Verification) -> str:
    return "\n".join(f"{each.where}: {each.what}" for each in verification.problems)


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
    return next((name, each.start) for name, each in tensors.items() if each.dtype == dtype and each.stop > each.start)


def test_an_untouched_output_is_whole_and_every_part_is_proved(output: Path) -> None:
    progress: list[Progress] = []
    verification = verify(Stores({}), str(output), progress.append)
    assert (verification.problems, verification.notes) == ([], [])
    assert [file.name for file in verification.files] == sorted(path.name for path in output.glob("*.safetensors"))
    assert all(file.parts_proved == file.parts > 0 and file.nan == file.infinite == 0 for file in verification.files)
    result = find_result(Stores({}), str(output))
    assert result
    assert [file.crc32c for file in verification.files] == [file.crc32c for file in result.files]
    assert [file.crc32c for file in verification.files] == [
        crc32c(memoryview((output / file.name).read_bytes())) for file in verification.files
    ]
    assert progress[-1].bytes_read == sum(path.stat().st_size for path in output.glob("*.safetensors"))


def test_one_changed_bit_is_found_with_its_part(output: Path) -> None:
    path = first(output)
    patch(path, path.stat().st_size - 1, bytes([path.read_bytes()[-1] ^ 1]))
    verification = check(output)
    assert (
        problems_of(verification)
        == f"{path.name}: the bytes [0, {path.stat().st_size:,}) are not those that were written"
    )
    assert verification.files[0].parts_proved == 0


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
    verification = check(output)
    assert f"{path.name}: {name}: holds 1 NaN and 1 infinite values" in problems_of(verification)
    assert sum(file.nan for file in verification.files) == sum(file.infinite for file in verification.files) == 1


def test_infinity_in_a_tensor_copied_from_the_base_is_a_note(family_of: Callable[..., Family], tmp_path: Path) -> None:
    family = family_of(num_models=2)
    merge(family, tmp_path / "out", METHOD, exclude=["model.norm.weight"])
    path = tmp_path / "out" / "model.safetensors"
    data = path.read_bytes()
    patch(path, parse(data, len(data), "").tensors["model.norm.weight"].start, struct.pack("<H", 0x7F80))
    verification = check(tmp_path / "out")
    assert "infinite" not in problems_of(verification)  # the changed byte itself is told, as ever
    assert verification.notes == [
        "model.safetensors: model.norm.weight holds 0 NaN and 1 infinite values, as in the base"
    ]


def test_a_truncated_file_is_told_by_its_size_and_header(output: Path) -> None:
    path = first(output)
    path.write_bytes(path.read_bytes()[:-100])
    text = problems_of(check(output))
    assert "were written" in text
    assert "is truncated" in text


def test_a_missing_file_is_told_and_the_others_are_still_checked(output: Path) -> None:
    first(output).unlink()
    verification = check(output)
    assert f"{first(output).name}" not in problems_of(verification)
    assert "is not there" in problems_of(verification)
    assert "disagrees with the files' headers" in problems_of(verification)
    assert all(file.parts_proved == file.parts for file in verification.files)


def test_a_header_that_is_not_the_planned_one_is_told(output: Path) -> None:
    path = first(output)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"format":"pt"', b'"format":"tf"', 1))
    assert f"{path.name}: its header is not the planned one" in problems_of(check(output))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"total_size": 1}}, "says 1 bytes"),
        ({"weight_map": {}}, "disagrees with the files' headers"),
        ({"weight_map": None}, "this ties_ray can't read it as an index (weight_map: "),
    ],
)
def test_an_index_that_is_not_the_headers_is_told(output: Path, change: dict[str, object], message: str) -> None:
    index = json.loads((output / INDEX).read_bytes())
    (output / INDEX).write_text(json.dumps(index | change))
    assert message in problems_of(check(output))


def test_a_missing_index_is_told(output: Path) -> None:
    (output / INDEX).unlink()
    assert "weight files and no index" in problems_of(check(output))


def test_a_weight_file_of_somebody_else_is_told(output: Path) -> None:
    (output / "other.safetensors").write_bytes(first(output).read_bytes())
    assert problems_of(check(output)) == ("other.safetensors: was not written by this merge, and a loader may take it")


def test_without_the_records_it_says_what_could_not_be_checked(output: Path) -> None:
    (output / FOLDER).rename(output.parent / "elsewhere")
    verification = check(output)
    assert verification.problems == []
    assert len(verification.notes) == 1
    assert "headers and parts can't be compared" in verification.notes[0]
    assert sum(file.parts_proved for file in verification.files) == 0

    path = first(output)
    patch(path, path.stat().st_size - 1, bytes([path.read_bytes()[-1] ^ 1]))
    assert problems_of(check(output)).startswith(
        f"{path.name}: its CRC32C is "
    )  # the result record knows the whole file's


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no finished merge"):
        check(tmp_path)


# -- what is done when asked for


def repair(output: Path) -> None:
    """Make every recorded checksum that of the bytes as they are now, so that only the inputs can tell."""
    plan, manifest = run_of(output)
    for path in Path(manifest.folder, "records", str(len(plan.merges[0].rounds) - 1)).glob("*.json"):
        record = json.loads(path.read_bytes())
        for written in record["finding"][0]:
            data = (output / plan.files[written[0]].name).read_bytes()
            start, stop = plan.merges[0].layout.part(written[0], written[1][0] - 1)
            written[2] = crc32c(memoryview(data[start:stop]))
        path.write_text(json.dumps(record))
    result = json.loads((output / RESULT_NAME).read_bytes())
    for file in result["files"]:
        file["crc32c"] = crc32c(memoryview((output / file["name"]).read_bytes()))
    (output / RESULT_NAME).write_text(json.dumps(result))


def run_of(output: Path) -> tuple[Plan, Manifest]:
    stores = Stores({})
    manifest = Manifest(stores, Manifest.folder_of(str(output), *find_runs(stores, str(output))[-1]))
    plan = manifest.read_last_plan()
    assert plan
    return plan, manifest


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SLICE", 100)


METHODS = [
    "average",
    METHOD,
    {**METHOD, "trim": "tensor"},
    {"name": "consensus"},
    {"name": "dare", "density": 0.5},
    {"name": "ties", "profile": "official"},
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_what_is_merged_again_has_the_bytes_of_the_output(
    method: object, share: float, family_of: Callable[..., Family], tmp_path: Path, slices: None
) -> None:
    output = {"path": str(tmp_path / "out"), "file_size": 9000}
    merge(family_of(num_models=3, mixed=True), output, method, exclude=["model.norm.weight"])
    before = digests(tmp_path / "out")
    verification = verify(Stores({}), str(tmp_path / "out"), sample=share)
    assert verification.problems == []
    assert verification.sample
    assert (verification.sample.elements == verification.sample.of) == (share == 1)
    assert share <= verification.sample.elements / verification.sample.of < share + 0.25
    assert digests(tmp_path / "out") == before


def test_one_element_that_the_inputs_do_not_give_is_found_though_all_checksums_agree(
    output: Path, slices: None
) -> None:
    plan, _ = run_of(output)
    number, name, start = next(
        (number, placed.tensor.name, placed.start)
        for number, file in enumerate(plan.files)
        for placed in file.tensors
        if placed.tensor.dtype == "BF16" and len(placed.tensor.shape) == 2 and placed.stop > placed.start + 2 * 150
    )
    path = output / plan.files[number].name
    position = start + 2 * 123
    patch(path, position, bytes([path.read_bytes()[position] ^ 1]))
    repair(output)
    assert check(output).problems == []
    verification = verify(Stores({}), str(output), sample=1.0)
    assert (
        problems_of(verification) == f"{path.name}: {name}: of the elements [123, 124) 1 are not what the inputs give"
    )


def test_a_sample_holds_something_of_every_tensor_and_depends_on_its_seed(output: Path, slices: None) -> None:
    plan, _ = run_of(output)
    samples = {seed: list(sample.choose(plan, 0.01, seed)) for seed in (0, 1)}
    everything = list(sample.choose(plan, 1.0, 0))
    assert [placed for _, placed, _ in samples[0]] == [placed for _, placed, _ in everything]
    assert all(len(runs) == 1 for _, _, runs in samples[0])
    assert max(len(runs) for _, _, runs in everything) > 5
    assert samples[0] == list(sample.choose(plan, 0.01, 0)) != samples[1]


@pytest.mark.parametrize("change", ["rewritten", "removed"])
def test_inputs_that_are_not_as_they_were_are_told(change: str, output: Path, family_of: Callable[..., Family]) -> None:
    plan, _ = run_of(output)
    victim = Path(plan.catalog.models[1].objects[0].uri)
    data, times = victim.read_bytes(), victim.stat()
    victim.rename(victim.with_name("aside"))
    if change == "rewritten":
        victim.write_bytes(data)
    try:
        verification = verify(Stores({}), str(output), sample=0.01)
    finally:
        victim.with_name("aside").replace(victim)  # the family is shared; its inode and its time are its mark
    assert victim.stat().st_mtime_ns == times.st_mtime_ns
    assert "model-1/model.safetensors: can't be merged again: changed since the plan was made" in problems_of(
        verification
    )
    assert verification.sample is None


def test_bytes_of_an_input_that_changed_behind_its_mark_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_mark", lambda status: str(status.st_ino))
    family = make_family(Stores({}).of("/"), str(tmp_path), num_models=2)
    merge(family, tmp_path / "out", METHOD)
    victim = Path(family.models[1]) / "model.safetensors"
    _, start = place_of(victim, "BF16")
    patch(victim, start, b"\x11")
    verification = verify(Stores({}), str(tmp_path / "out"), sample=1.0)
    assert "are not those that this merge read first, though its ETag is the same" in problems_of(verification)


def test_without_thresholds_a_sample_is_refused_and_not_called_different(output: Path) -> None:
    _, manifest = run_of(output)
    shutil.rmtree(Path(manifest.folder, "folded"))
    verification = verify(Stores({}), str(output), sample=0.01)
    assert "stored of group 0 has gone" in problems_of(verification)
    assert "are not what the inputs give" not in problems_of(verification)


def test_without_a_plan_or_under_another_arithmetic_there_is_no_sample(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(kernels.ARITHMETICS, "exact", "exact-2")
        assert "computed by arithmetic exact-1" in problems_of(verify(Stores({}), str(output), sample=0.01))
    (output / FOLDER).rename(output.parent / "elsewhere")
    assert "there is no plan by which" in problems_of(verify(Stores({}), str(output), sample=0.01))


def test_sha256sum_finds_every_file_and_sees_a_changed_one(output: Path) -> None:
    assert verify(Stores({}), str(output), sums=True).sums == str(output / SUMS_NAME)
    names = {line.partition("  ")[2] for line in (output / SUMS_NAME).read_text().splitlines()}
    assert names == {path.name for path in output.iterdir() if path.is_file()} - {SUMS_NAME}
    assert {INDEX, "config.json", "tokenizer.json", RESULT_NAME, first(output).name} <= names
    command = ["sha256sum", "--strict", "-c", SUMS_NAME]
    assert subprocess.run(command, cwd=output, capture_output=True, check=False).returncode == 0
    patch(output / "tokenizer.json", 0, b" ")
    spoiled = subprocess.run(command, cwd=output, capture_output=True, text=True, check=False)
    assert spoiled.returncode == 1
    assert "tokenizer.json: FAILED" in spoiled.stdout


def test_no_sums_are_written_of_a_damaged_output(output: Path) -> None:
    patch(first(output), first(output).stat().st_size - 1, b"\x11")
    assert verify(Stores({}), str(output), sums=True).sums is None
    assert not (output / SUMS_NAME).exists()
