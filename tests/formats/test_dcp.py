"""Sharded safetensors of torch's distributed checkpoints: whole tensors from parts that torch's own writer writes."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.families import CONFIG, file_bytes
from tests.tools.sharded import Cuts, write_sharded
from ties_ray.formats import Aside, Contents, Format, Rules
from ties_ray.formats.dcp import OF_TRAINING, Dcp, Part, _Layout
from ties_ray.safetensors import MERGEABLE, TensorInfo
from ties_ray.tensors import Parameter
from ties_ray.testing import FormatContract, folder_of

DRAW = torch.Generator().manual_seed(0)
TENSORS = {
    "model.rows.weight": torch.randn(13, 20, generator=DRAW),
    "model.columns.weight": torch.randn(11, 30, generator=DRAW, dtype=torch.float64),
    "model.both.weight": torch.randn(12, 25, generator=DRAW).bfloat16(),
    "model.experts": torch.randn(4, 6, 5, generator=DRAW),
    "model.norm.weight": torch.randn(9, generator=DRAW),
    "model.whole.weight": torch.randn(3, 4, generator=DRAW).half(),
    "model.scalar": torch.tensor(2.5),
    "model.ids": torch.arange(12).reshape(3, 4),
}
CUTS: dict[str, Cuts] = {
    "model.rows.weight": [[4, 8, 12]],
    "model.columns.weight": [[], [7, 8]],
    "model.both.weight": [[5], [9, 24]],
    "model.experts": [[1, 3], [4]],
    "model.norm.weight": [[5]],
    "model.ids": [[], [2]],
}


def files_of(
    folder: Path, tensors: Mapping[str, torch.Tensor] = TENSORS, cuts: Mapping[str, Cuts] = CUTS, files: int = 1
) -> dict[str, bytes]:
    write_sharded(folder, tensors, cuts, files=files)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def parameters_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Parameter]:
    names = {
        torch.float32: "F32",
        torch.float64: "F64",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.int64: "I64",
    }
    return {
        name: Parameter(name, tuple(tensor.shape), names[tensor.dtype], names[tensor.dtype] in MERGEABLE)
        for name, tensor in tensors.items()
    }


class TestContract(FormatContract):
    @pytest.fixture
    def format(self) -> Format:
        return Dcp()

    @pytest.fixture(params=[1, 2])
    def files(self, tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, bytes]:
        return files_of(tmp_path, files=request.param)

    @pytest.fixture
    def parameters(self) -> dict[str, Parameter]:
        return parameters_of(TENSORS)

    @pytest.fixture
    def expected(self) -> dict[str, torch.Tensor]:
        return {name: tensor.flatten() for name, tensor in TENSORS.items() if tensor.is_floating_point()}


def read(files: Mapping[str, bytes], base: dict[str, Parameter] | None = None, same: bool = True) -> Contents:
    folder = folder_of(Dcp(), files)
    asked = Dcp().questions(folder, base, Rules())
    return Dcp().read(replace(folder, answers=dict.fromkeys(asked, same)), base, Rules())


def test_torchs_own_reader_sees_the_same_shapes(tmp_path: Path) -> None:
    contents = read(files_of(tmp_path))
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    seen = HuggingFaceStorageReader(str(tmp_path)).read_metadata().state_dict_metadata
    shapes = {name: Dcp().shape(source) for name, source in contents.sources.items()}
    assert {name: tuple(each.size) for name, each in seen.items()} == shapes  # type: ignore[union-attr]
    assert shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def test_the_state_of_the_training_is_left_aside_and_named(tmp_path: Path) -> None:
    state = {"optimizer.exp_avg.model.norm.weight": torch.zeros(9), "train_state.step": torch.tensor(3.0)}
    contents = read(files_of(tmp_path, {**TENSORS, **state}, {**CUTS, next(iter(state)): [[5]]}))
    assert contents.problems == ()
    assert contents.sources.keys() == TENSORS.keys()
    (note,) = [note for note in contents.notes if "state of a training" in note]
    assert "2 tensors (optimizer.exp_avg.model.norm.weight, train_state.step)" in note
    assert sum(aside.elements for aside in contents.account.aside if aside.reason == OF_TRAINING) == 10
    assert Aside(OF_TRAINING, 2, 10) in contents.account.aside
    assert contents.account.adds_up


def test_ties_are_compared_part_by_part(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(8, 4), "lm_head.weight": torch.ones(8, 4)}
    files = files_of(tmp_path, tensors, {name: [[3], [1]] for name in tensors})
    files["config.json"] = json.dumps({**CONFIG, "tie_word_embeddings": True}).encode()
    assert len(Dcp().questions(folder_of(Dcp(), files), None, Rules())) == 4
    assert read(files).sources.keys() == {"model.embed_tokens.weight"}
    assert read(files, same=False).sources.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("tensors", "cuts", "message"),
    [
        ({"model.a": torch.zeros(2, 3, 4)}, {"model.a": [[], [], [2]]}, "cut along its third dimension or a later one"),
    ],
)
def test_parts_that_cannot_be_put_together_are_refused_by_name(
    tensors: dict[str, torch.Tensor], cuts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    problems = read(files_of(tmp_path, tensors, cuts)).problems
    assert [problem.what for problem in problems] == [f"model.a is {message}"]


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[Part], list[torch.Tensor]]:
    """Return a tensor, its parts (bands of rows, in each parts side by side), and what the file of each part holds."""
    heights = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    widths = [draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)) for _ in heights]
    columns, dtype = max(map(sum, widths)), draw(st.sampled_from(["F16", "F64"]))
    numbers = torch.arange(sum(heights) * columns * 2, dtype=torch.int16).view(sum(heights), columns, 2)
    tensor = numbers.half() if dtype == "F16" else numbers.double()
    parts, files = [], []
    for row, (height, across) in zip(accumulate([0, *heights[:-1]]), zip(heights, widths, strict=True), strict=True):
        across[-1] += columns - sum(across)
        for column, width in zip(accumulate([0, *across[:-1]]), across, strict=True):
            files.append(tensor[row : row + height, column : column + width].reshape(-1))
            info = TensorInfo(dtype, (height, width, 2), 6, 6 + tensor.element_size() * len(files[-1]))
            parts.append(Part(len(parts), (row, column, 0), info))
    return tensor, parts, files


@given(cut_tensors(), st.data())
def test_any_piece_of_any_cut_is_the_tensors_own(
    cut: tuple[torch.Tensor, list[Part], list[torch.Tensor]], data: st.DataObject
) -> None:
    """A piece is made of whole rows where parts lie side by side, else of any elements. Two may lie end to end."""
    tensor, parts, files = cut
    layout = _Layout()
    assert layout.add("another", [Part(9, (0, 0, 0), TensorInfo("F16", (1, 1, 2), 0, 4))]) == ""
    assert layout.add("cut", list(reversed(parts))) == ""
    whole = layout.tensors["cut"]
    unit = tensor[0].numel() if any(part.offsets[1] for part in parts) else 1
    low = data.draw(st.integers(0, tensor.numel() // unit - 1)) * unit
    high = data.draw(st.integers(low // unit + 1, tensor.numel() // unit)) * unit
    shape = (high - low,) if unit == 1 else ((high - low) // unit, *tensor.shape[1:])
    piece = whole._replace(start=whole.start + tensor.element_size() * low, shape=shape)
    again = data.draw(st.integers(1, 2))
    source = layout.source((piece,) * again)
    assert source
    assert Dcp().shape(source) == (shape[0] * again, *shape[1:])
    elements = tensor.reshape(-1)[low:high].repeat(again)
    start = data.draw(st.integers(0, len(elements) - 1))
    stop = data.draw(st.integers(start + 1, len(elements)))
    reads = Dcp().reads(source, start, stop)
    buffers = [files[read.object].view(torch.uint8)[read.start - 6 : read.stop - 6] for read in reads]
    assert torch.equal(Dcp().encoded(source, start, stop, buffers).data, elements[start:stop])


def test_rows_that_a_cut_divides_have_no_source() -> None:
    parts = [Part(at, (0, at), TensorInfo("F16", (2, 1), 0, 4)) for at in range(2)]
    layout = _Layout()
    assert layout.add("cut", parts) == ""
    whole = layout.tensors["cut"]
    assert layout.source((whole._replace(start=whole.start + 2, shape=(2,)),)) is None  # begins inside a row
    assert layout.source((whole._replace(shape=(1,)),)) is None  # ends inside one
    assert layout.source((whole._replace(shape=(1, 2)),))


def test_tensors_of_several_widths_whose_parts_lie_side_by_side_have_no_common_source() -> None:
    layout = _Layout()
    for name, width in (("narrow", 1), ("wide", 2)):
        parts = [Part(at, (0, at * width), TensorInfo("F16", (2, width), 0, 4 * width)) for at in range(2)]
        assert layout.add(name, parts) == ""
    narrow, wide = layout.tensors.values()
    assert layout.source((narrow, wide)) is None
    source = layout.source((wide, wide))
    assert source
    assert Dcp().shape(source) == (4, 4)
    assert Dcp().widened(source) == 3 * 2, "bytes of an element: the slice, and its rows twice"


def part_file(part: torch.Tensor, info: str) -> bytes:
    """Return a file with a part of model.a. info: what its header says of offsets."""
    data = file_bytes({"model.a": part})
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {"DCP_SHARDING_INFO": info}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_parts_of_several_shapes_are_refused() -> None:
    files = {
        f"shard-{rank:05}-model-00001-of-00001.safetensors": part_file(
            torch.zeros(shape), json.dumps({"model.a": {"saved_offsets": [0] * len(shape)}})
        )
        for rank, shape in ((1, (2, 3)), (2, (3,)))
    }
    assert "model.a has parts of several shapes" in {problem.what for problem in read(files).problems}


@pytest.mark.parametrize("lost", range(1, 6))
def test_a_lost_rank_is_a_gap(lost: int, tmp_path: Path) -> None:
    files = files_of(tmp_path, {"model.a": torch.zeros(6, 6)}, {"model.a": [[2, 4], [3]]})
    del files[f"shard-{lost:05}-model-00001-of-00001.safetensors"]
    (problem,) = read(files).problems
    assert "model.a has parts that overlap or leave gaps in its shape [6, 6]" in problem.what


@pytest.mark.parametrize(
    "info",
    [
        "", "[]", "[" * 5000, "{}", '{"model.a": {}}', '{"model.a": {"saved_offsets": [0]}}',
        '{"model.a": {"saved_offsets": [0, -1]}}', '{"model.a": {"saved_offsets": [0, 1.5]}}',
        '{"model.a": {"saved_offsets": "00"}}',
    ],
)  # fmt: skip
def test_hostile_offsets_are_a_problem_and_no_crash(info: str) -> None:
    (problem,) = read({"shard-00001-model-00001-of-00001.safetensors": part_file(torch.zeros(2, 2), info)}).problems
    assert "does not say where its part of model.a belongs" in problem.what


def test_a_whole_model_beside_the_parts_is_read_instead() -> None:
    names = ["shard-00001-model-00001-of-00001.safetensors", "config.json"]
    assert Dcp().recognises(names)
    assert not Dcp().recognises([*names, "model.safetensors"])
