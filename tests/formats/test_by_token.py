"""Rows by token: a parameter put together of rows of several tensors, however it is cut."""

import itertools

import pytest
import torch
from pydantic import TypeAdapter

from tests.tools.families import raw_bytes
from ties_ray.formats.by_token import ByToken
from ties_ray.kernels import Encoded
from ties_ray.tensors import Read, Rows, Run, Source, TensorRef
from ties_ray.testing.kernels import same_bits

WIDTH = 5
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
RUNS = (
    Run(3, ((0, 4),)),
    Run(1, ((1, 0),)),
    Run(2, ()),
    Run(2, ((0, 1), (1, 2), (2, 0))),
    Run(1, ((0, 0),)),
    Run(1, ((0, 0),)),
)


def tensors_of(*dtypes: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(7, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for dtype in dtypes]
    made[0][4, 2] = -0.0
    return made


def source_of(tensors: list[torch.Tensor], runs: tuple[Run, ...]) -> Source:
    refs = [TensorRef(number, 16, NAMES[tensor.dtype], tuple(tensor.shape)) for number, tensor in enumerate(tensors)]
    return Source(tuple(refs), rows=Rows(runs))


def decoded(source: Source, tensors: list[torch.Tensor], start: int, stop: int) -> Encoded:
    files = [bytes(16) + raw_bytes(tensor) for tensor in tensors]
    reads = ByToken().reads(source, start, stop)
    assert len(set(reads)) == len(reads), "no range is read twice for one slice"
    buffers = [
        torch.frombuffer(bytearray(files[read.object][read.start : read.stop]), dtype=torch.uint8) for read in reads
    ]
    return ByToken().encoded(source, start, stop, [torch.cat(buffers)] if buffers else [])


def whole(tensors: list[torch.Tensor], runs: tuple[Run, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the rows, one after the other, by the words of `Run`."""
    rows = []
    for run in runs:
        for number in range(run.num_rows):
            parts = [tensors[tensor][row + number].to(dtype) for tensor, row in run.places]
            total = parts[0].clone() if parts else torch.zeros(WIDTH, dtype=dtype)
            for part in parts[1:]:
                total = total + part
            rows.append(total / max(1, len(parts)) if len(parts) > 1 else total)
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("dtypes", "dtype"),
    [
        ((torch.bfloat16, torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float16, torch.float32), torch.float32),
        ((torch.float32, torch.float64, torch.bfloat16), torch.float64),
    ],
)
def test_every_cut_gives_the_bits_of_the_whole(dtypes: tuple[torch.dtype, ...], dtype: torch.dtype) -> None:
    tensors = tensors_of(*dtypes)
    source, expected = source_of(tensors, RUNS), whole(tensors, RUNS, dtype)
    assert ByToken().shape(source) == (10, WIDTH)
    assert ByToken().needs(source) == "slice"
    assert not ByToken().recognises(["model.safetensors"])
    for start, stop in itertools.combinations(range(len(expected) + 1), 2):
        data = decoded(source, tensors, start, stop).data
        assert same_bits(data.to(dtype), expected[start:stop]), (start, stop)
        assert (torch.float64 in dtypes) == (data.dtype == torch.float64), "fp64 in one slice is fp64 in all"
    assert decoded(source, tensors, 3, 3).data.numel() == 0


def test_rows_of_one_tensor_stay_as_they_are_stored() -> None:
    tensors = tensors_of(torch.bfloat16)
    source = source_of(tensors, (Run(2, ((0, 3),)), Run(1, ((0, 0),))))
    data = decoded(source, tensors, 0, 3 * WIDTH).data
    assert same_bits(data, torch.cat([tensors[0][3:5], tensors[0][:1]]).reshape(-1))
    assert ByToken().reads(source, 0, 2) == (Read(0, 16 + 2 * 3 * WIDTH, 16 + 2 * (3 * WIDTH + 2)),)


def test_places_survive_json() -> None:
    source = source_of(tensors_of(torch.float32), RUNS[:2])
    adapter = TypeAdapter(Source)
    assert adapter.validate_json(adapter.dump_json(source)) == source
