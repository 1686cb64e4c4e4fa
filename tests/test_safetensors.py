import json
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from ties_ray.errors import InputError
from ties_ray.safetensors import (
    ALIGNMENT,
    DTYPE_BITS,
    Header,
    TensorInfo,
    TensorSpec,
    build,
    canonical_order,
    header_bytes,
    nbytes,
    parse,
)


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def in_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    return sorted(specs, key=lambda spec: canonical_order(spec[1], spec[0]))


def parsed(content: bytes) -> Header:
    return parse(content, len(content), "m.safetensors")


def one(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_a_file_of_the_formats_own_writer_is_read_as_it_is() -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(3),
    }
    content = save(tensors, metadata={"format": "pt"})
    header = parsed(content)
    assert header.metadata == {"format": "pt"}
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.tensors["scalar"].dtype == "F64"
    info = header.tensors["b"]
    assert content[info.start : info.stop] == tensors["b"].view(torch.uint8).numpy().tobytes()


def test_the_formats_own_reader_loads_what_we_build() -> None:
    specs = in_order([("b", "BF16", (2, 3)), ("s", "F32", ()), ("none", "F16", (0, 7)), ("i", "I64", (1, 2))])
    data = bytes(range(sum(nbytes(dtype, shape) for _, dtype, shape in specs)))
    loaded = load(build(specs, {"format": "pt"}) + data)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {n: s for n, _, s in specs}
    assert loaded["i"].view(torch.uint8).flatten().tolist() == list(range(16))
    assert loaded["b"].view(torch.uint8).flatten().tolist() == list(range(20, 32))


def test_a_built_header_has_exactly_these_bytes() -> None:
    text = b'{"__metadata__":{"format":"pt"},"w\\u00e9":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}}'
    assert build([("wé", "BF16", (2, 1))], {"format": "pt"}) == (4088).to_bytes(8, "little") + text.ljust(4088)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
whole_dtypes = st.sampled_from([dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0])
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(st.lists(st.tuples(names, whole_dtypes, shapes), unique_by=lambda spec: spec[0], max_size=40))
def test_what_is_built_is_parsed_back_page_aligned_and_element_aligned(specs: list[TensorSpec]) -> None:
    ordered = in_order(specs)
    head = build(ordered, {})
    size = len(head) + sum(nbytes(dtype, shape) for _, dtype, shape in specs)
    header = parse(head, size, "m.safetensors")
    assert header.size == len(head) == header_bytes(head[:8], size, "m.safetensors")
    assert len(head) % ALIGNMENT == 0
    assert {(name, info.dtype, info.shape) for name, info in header.tensors.items()} == set(specs)
    assert all(info.start % (DTYPE_BITS[info.dtype] // 8) == 0 for info in header.tensors.values())


def test_canonical_order_is_that_of_the_formats_own_writer() -> None:
    tensors = {
        "z": torch.zeros(1),
        "a": torch.zeros(1, dtype=torch.bfloat16),
        "é": torch.zeros(1),
        "i": torch.zeros(1, dtype=torch.int64),
        "d": torch.zeros(1, dtype=torch.float64),
        "u": torch.zeros(1, dtype=torch.uint8),
    }
    header = parsed(save(tensors))
    specs = [(name, info.dtype, info.shape) for name, info in header.tensors.items()]
    assert in_order(reversed(specs)) == specs


def test_tensors_come_in_the_order_of_their_offsets_whatever_the_order_of_the_keys() -> None:
    header = {
        "second": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]},
        "first": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
    }
    content = file_of(header, bytes(3))
    assert list(parsed(content).tensors.items()) == [
        ("first", TensorInfo("BF16", (1,), len(content) - 3, len(content) - 1)),
        ("second", TensorInfo("U8", (1,), len(content) - 1, len(content))),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x01\x00", "has 2 bytes, too few"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "above the format's limit of 100000000"),
        ((500).to_bytes(8, "little") + b"{}", "is truncated: its header alone has 500 bytes, the file 10"),
        (file_of(b"[]"), "not a JSON object"),
        (file_of(b"{"), "not valid JSON"),
        (file_of(b"\xff\xfe{}"), "not valid JSON"),
        (file_of(b"[" * 100_000), "not valid JSON"),
        (file_of(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
        (file_of(b'{"a":NaN}'), "NaN is no JSON number"),
        (file_of(b'{"w":{},"w":{}}'), "'w' stands there twice"),
        (file_of(b'{"w":{"dtype":"F32","dtype":"F32"}}'), "'dtype' stands there twice"),
        (file_of(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "not valid Unicode"),
        (file_of({"__metadata__": {"format": 1}}), "__metadata__ does not map strings to strings"),
        (file_of({"__metadata__": "pt"}), "__metadata__ does not map strings to strings"),
        (file_of({"w": [1]}), "'w' lacks dtype, shape or data_offsets"),
        (file_of(one(dtype="F31"), bytes(8)), "'w' has the unknown dtype 'F31'"),
        (file_of(one(dtype=["F32"]), bytes(8)), "'w' has the unknown dtype"),
        (file_of(one(shape=[-1, -2]), bytes(8)), "'w' has a shape that is not a list"),
        (file_of(one(shape=[True, 2]), bytes(8)), "'w' has a shape that is not a list"),
        (file_of(one(shape=[2.0]), bytes(8)), "'w' has a shape that is not a list"),
        (file_of(one(shape=[2**63, 0]), bytes(8)), "'w' has a shape that is not a list"),
        (file_of(one(shape=[1] * 65)), "'w' has a shape that is not a list of at most 64"),
        (file_of(one(shape=[2**62, 2**62]), bytes(8)), "'w' has 8 bytes where"),
        (file_of(one(offsets=[0.0, 8]), bytes(8)), "'w' has data_offsets that are not"),
        (file_of(one(offsets=[8, 0]), bytes(8)), "'w' has data_offsets that are not"),
        (file_of(one(offsets=[0, 8, 8]), bytes(8)), "'w' has data_offsets that are not"),
        (file_of(one(dtype="F4", shape=[3], offsets=[0, 1]), bytes(1)), "'w' has 12 bits, not a whole number of bytes"),
        (file_of(one(shape=[3]), bytes(8)), r"'w' has 8 bytes where F32 \[3\] takes 12"),
        (file_of(one(offsets=[4, 12]), bytes(12)), "'w' leaves a hole of 4 bytes after the header"),
        (file_of({**one(), "v": one(offsets=[4, 12])["w"]}, bytes(12)), "'v' overlaps 'w'"),
        (file_of(one(), bytes(9)), "has 1 bytes after its last tensor"),
        (file_of(one(), bytes(7)), r"is truncated: \d+ of \d+ bytes are there; upload it again"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_the_reason(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"^m.safetensors: .*{message}"):
        parsed(content)


def test_all_that_is_wrong_is_said_at_once_but_not_without_end() -> None:
    entry = {"dtype": "F31", "shape": [], "data_offsets": [0, 0]}
    with pytest.raises(InputError, match="unknown dtype") as raised:
        parsed(file_of({f"w{number}": entry for number in range(1000)}))
    assert len(raised.value.problems) == 9
    assert raised.value.problems[-1].what == "and 992 more problems"


def test_a_length_is_judged_from_eight_bytes_before_more_is_fetched() -> None:
    assert header_bytes((4088).to_bytes(8, "little"), 5000, "m") == 4096
    with pytest.raises(InputError, match="above the format's limit"):
        header_bytes((2**63).to_bytes(8, "little"), 2**64, "m")


def test_two_tensors_of_one_name_are_not_built() -> None:
    with pytest.raises(ValueError, match="would be called 'w'"):
        build([("w", "F32", ()), ("w", "F32", ())], {})
    with pytest.raises(ValueError, match="would be called '__metadata__'"):
        build([("__metadata__", "F32", ())], {})
