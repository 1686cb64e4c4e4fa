"""What texts of strangers take in memory, measured from outside, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.families import write_checkpoint
from ties_ray.libraries import bounded
from ties_ray.stores import Stores

MIB = 2**20
TENSORS = {"w": torch.ones(2, 2), "v": torch.zeros(3)}


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def repeated(piece: bytes, size: int, begin: bytes = b"[", end: bytes = b"]") -> bytes:
    return begin + b",".join([piece] * (size // (len(piece) + 1))) + end


def numbered(form: bytes, size: int, begin: bytes = b"{", end: bytes = b"}") -> bytes:
    return begin + b",".join(form % number for number in range(size // (len(form) + 6))) + end


TEXTS: dict[str, Callable[[int], bytes]] = {
    "objects": lambda size: repeated(b"{}", size),
    "lists": lambda size: repeated(b"[]", size),
    "texts": lambda size: repeated(b'"ab"', size),
    "longer texts": lambda size: repeated(b'"abcdefgh"', size),
    "numbers": lambda size: repeated(b"9999", size),
    "fractions": lambda size: repeated(b"1e1", size),
    "keys": lambda size: numbered(b'"%x":0', size),
    "objects by key": lambda size: numbered(b'"%x":{}', size),
    "nested": lambda size: repeated(b"[[[[[[{}]]]]]]", size),
    "metadata": lambda size: numbered(b'"%x":""', size, b'{"__metadata__":{', b"}}"),
    "entries": lambda size: numbered(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', size),
    "wrong entries": lambda size: numbered(b'"%x":{"dtype":"U8","shape":[9],"data_offsets":[0,0]}', size),
    "dimensions": lambda size: repeated(b"0", size, b'{"w":{"dtype":"U8","shape":[', b'],"data_offsets":[0,0]}}'),
    "one name": lambda size: b'{"' + b"x" * size + b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "prefixes": lambda size: (
        b'{"' + b"base_model.model." * (size // 17) + b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    ),
}
PLACES = {
    "model.safetensors": "m", "config.json": "m", "model.safetensors.index.json": "m", "adapter_config.json": "a",
    "tokenizer.json": "m", "tokenizer_config.json": "m",
}  # fmt: skip
"""Files, and the folder that has them."""
SIZE = 8 * MIB
ALLOWED = 250
"""MiB that a text of this size may take, itself included: `bounded.TIMES`, which is an upper estimate, allows less."""

SCRIPT = """
import json, re, sys
from pathlib import Path
from ties_ray.recipe import parse
from ties_ray.inputs.catalog import read_catalog
from ties_ray.errors import MergeError
from ties_ray.stores import Stores
import ties_ray.formats.lora, ties_ray.formats.checkpoint, ties_ray.stores.local

def most():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

asked = parse.validate(json.loads(sys.argv[1]))
before = most()
try:
    read_catalog(asked, Stores({}))
    told = "read"
except MergeError as error:
    told = str(error)[:500]
print(json.dumps([(most() - before) / 1024, told]))
"""


def peak(asked: dict[str, object]) -> tuple[float, str]:
    """Return by how many MiB the memory of a process grows that reads the catalog of a recipe, and what it says."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(asked)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown, told = json.loads(done.stdout)
    return grown, told


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["objects", "texts", "keys"])
def test_a_text_of_a_stranger_takes_no_more_memory_than_is_allowed(tmp_path: Path, place: str, kind: str) -> None:
    grown, told = peak(planted(tmp_path, place, TEXTS[kind](SIZE)))
    assert grown < ALLOWED, told


@pytest.mark.parametrize("kind", sorted(TEXTS.keys() - {"objects", "texts", "keys"}))
def test_a_header_takes_no_more_memory_than_is_allowed(tmp_path: Path, kind: str) -> None:
    grown, told = peak(planted(tmp_path, "model.safetensors", TEXTS[kind](SIZE)))
    assert grown < ALLOWED, told


def test_twenty_megabytes_of_empty_objects_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    grown, told = peak(planted(tmp_path, "model.safetensors", TEXTS["objects"](20 * MIB)))
    assert "its values would take more than" in told
    assert grown < 120  # the file, twice or thrice


def planted(folder: Path, place: str, text: bytes) -> dict[str, object]:
    """Return a recipe whose model has this text at a place."""
    store = Stores({}).of(str(folder))
    write_checkpoint(store, f"{folder}/base", TENSORS)
    model = folder / PLACES[place]
    write_checkpoint(store, str(model), TENSORS)
    if place == "adapter_config.json":
        (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / place).write_bytes(header(text) if place == "model.safetensors" else text)
    asked = {"base": f"{folder}/base", "models": [str(model)], "method": "ties", "output": f"{folder}/out"}
    return asked | {"allow": {"extra_rows": "drop"}}


def test_a_table_that_is_made_to_hurt_takes_little_memory(tmp_path: Path) -> None:
    write_checkpoint(Stores({}).of(str(tmp_path)), f"{tmp_path}/base", TENSORS)
    for name, text in {
        "rows": b"path\n" + b"/\n" * (2 * MIB),
        "columns": b",".join(b"%x" % number for number in range(300_000)) + b"\n" + b"x\n" * (MIB // 2),
        "one row": b"path\n" + b"," * (4 * MIB - 10),
        "one path": b"path\n" + b"x" * 100_000 + b"\n",
    }.items():
        (tmp_path / "t.csv").write_bytes(text)
        asked = {"base": f"{tmp_path}/base", "models": [{"table": f"{tmp_path}/t.csv"}], "method": "ties"}
        grown, told = peak(asked | {"output": f"{tmp_path}/out"})
        assert grown < 150, name
        assert "t.csv" in told


def test_what_stands_in_strings_is_no_value() -> None:
    inner = json.dumps([{}] * 100_000).replace(" ", "")
    text = json.dumps({"__metadata__": {"x": inner}}).encode()
    assert bounded.loads(text) == {"__metadata__": {"x": inner}}
    with pytest.raises(ValueError, match="its values would take more than"):
        bounded.loads(inner.encode())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    )
)
def test_small_texts_are_read_as_json_reads_them(value: object) -> None:
    assert bounded.loads(json.dumps(value).encode()) == value
