"""What hostile files are made of, and the readers they are thrown at; for pytest and for `fuzz_readers`."""

import json
from collections.abc import Callable

from ties_ray import safetensors
from ties_ray.errors import MergeError
from ties_ray.formats import Folder, Rules
from ties_ray.formats.checkpoint import Checkpoint
from ties_ray.formats.lora import Lora
from ties_ray.inputs.licence import licence_of
from ties_ray.recipe import parse
from ties_ray.safetensors import Header, TensorInfo
from ties_ray.stores import Pin

BYTES_A_BYTE = 40
"""Python's smallest values in JSON, `{}` and `[]` with a comma, take some 70 bytes for 3."""

TOKENS = [
    b"", b"\x00", b"\xff", b"0", b"-", b"9" * 30, b"1e9", b"NaN", b"-Infinity", b"null", b"true", b'"', b"{", b"}",
    b"[",
    b"]", b":", b",", b"\\", b"\\ud800", b"\\u0000", b'"a":', b"F32", b"F4", b"shape", b"data_offsets", b"__metadata__",
    b"9223372036854775808", b"[[[[", b"\xed\xa0\x80",
]  # fmt: skip


def read_header(content: bytes) -> None:
    """Read a file as the catalog does, and demand that what is believed is true."""
    size = safetensors.header_bytes(content[:8], len(content), "m")
    header = safetensors.parse(content, len(content), "m")
    assert header.size == size
    end = size
    for info in header.tensors.values():
        assert info.start == end
        end = info.stop
        assert info.stop - info.start == safetensors.nbytes(info.dtype, info.shape)
    assert end == len(content)


def read_header_text(text: bytes) -> None:
    """Read a file with this header and 16 bytes of data."""
    read_header(len(text).to_bytes(8, "little") + text + bytes(16))


def read_index(content: bytes) -> None:
    """Read a folder whose index is `content` and whose config is its second line."""
    index, _, config = content.partition(b"\n")
    tensor = TensorInfo("F32", (2,), 8, 16)
    header = Header({"w": tensor}, {}, 8)
    names = ("model.safetensors", "model.safetensors.index.json", "config.json")
    pins = tuple(Pin(f"/m/{name}", 16) for name in names)
    folder = Folder("/m", pins, {names[0]: header}, {names[1]: index, names[2]: config or b"{}"})
    found = Checkpoint().read(folder, None, Rules(()))
    assert found.problems or {pin.uri for pin in found.objects} <= {"/m/model.safetensors"}


def read_adapter(content: bytes) -> None:
    """Read an adapter whose config is `content`: it has one module, and reads stay in its one file."""
    tensors = {
        f"base_model.model.a.{role}.weight": TensorInfo("F32", shape, 8 + 8 * number, 16 + 8 * number)
        for number, (role, shape) in enumerate((("lora_A", (1, 2)), ("lora_B", (2, 1))))
    }
    names = ("adapter_model.safetensors", "adapter_config.json")
    pins = tuple(Pin(f"/m/{name}", 24) for name in names)
    folder = Folder("/m", pins, {names[0]: Header(tensors, {}, 8)}, {names[1]: content})
    lora = Lora()
    found = lora.read(folder, None, Rules(saved_modules=True))
    assert found.problems or found.sources
    for source in found.sources.values():
        reads = lora.reads(source, 0, 4)
        assert all(8 <= read.start <= read.stop <= 24 and read.object == 0 for read in reads)


def read_recipe(content: bytes) -> None:
    """Read a recipe; what is understood is written and understood again, the same."""
    read = parse.parse(content.decode(errors="surrogateescape"))
    assert parse.validate(json.loads(read.model_dump_json(exclude_unset=True))) == read


def read_card(content: bytes) -> None:
    """Read a model card's licence."""
    licence_of(content)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "file": read_header,
    "header": read_header_text,
    "index": read_index,
    "adapter": read_adapter,
    "recipe": read_recipe,
    "card": read_card,
}


def attack(target: str, content: bytes) -> None:
    """Give `content` to a reader; every other exception than a `MergeError` passes."""
    try:
        TARGETS[target](content)
    except MergeError as error:
        str(error).encode()
