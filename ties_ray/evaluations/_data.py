"""Reads examples from JSON lines or Parquet, through a store, and pins what it read. The files are not trusted."""

import base64
import hashlib
import random
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ties_ray.errors import InputError, Problem, enumerated, shown
from ties_ray.evaluations import DataPin, Evaluation, Json
from ties_ray.libraries import bounded
from ties_ray.stores import Stores, Uri, absolute

if TYPE_CHECKING:
    import pyarrow

MOST_BYTES = 2**30
"""Bytes of a file of data, and of the values that a Parquet file says to hold. A file is read whole."""
MOST_LINE = 2**20
"""Bytes of one example."""
MOST_EXAMPLES = 1_000_000
"""Examples of all files."""
FEW = 3
"""Bad examples that an error lists."""
PIECE = 2**23
"""Bytes of a request to a store."""
ROWS = 64
"""Rows of a Parquet file that become Python values at a time."""
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{16,}")


class ReadsData(Evaluation):
    """An evaluation on examples in files."""

    data: tuple[Uri, ...] | Uri
    """File of examples, JSON lines or Parquet, as a path or URI of any store; or a list of such files."""
    fields: dict[str, str] = Field(default={})
    """Names of the fields in the files, where they differ: `{text: content}`."""
    sample: int | None = Field(default=None, ge=1)
    """Number of examples that are drawn by the seed, without repetition. Default: all, as where there are fewer."""

    @field_validator("data", mode="after")
    @classmethod
    def _absolute_data(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        return absolute(value) if isinstance(value, str) else tuple(map(absolute, value))

    def examples(self, stores: Stores, seed: int) -> "tuple[list[Json], list[DataPin]]":
        """Return the examples in the order of the files, and the pins of these. Raises `InputError`."""
        rows: list[Json] = []
        pins = []
        for uri in [self.data] if isinstance(self.data, str) else self.data:
            pin, data = _read(stores, uri)
            pins.append(pin)
            rows += _rows(shown(pin.uri), data, MOST_EXAMPLES - len(rows))
        if not rows:
            raise InputError(Problem(shown(pins[0].uri), "holds no example", "name a file with examples"))
        if self.sample is not None and self.sample < len(rows):
            drawn = sorted(random.Random(seed).sample(range(len(rows)), self.sample))
            rows = [rows[number] for number in drawn]
        return [self._renamed(row) for row in rows], pins

    def _renamed(self, row: Json) -> Json:
        """Return an example with the names that evaluations use, without fields that are null."""
        named = row | {name: row[there] for name, there in self.fields.items() if there in row}
        return {name: value for name, value in named.items() if value is not None}

    def refused(self, problems: "list[str]") -> InputError:
        """Return the error of examples that are not as they should be."""
        uri = self.data if isinstance(self.data, str) else self.data[0]
        more = [f"and {len(problems) - FEW:,} more"] if len(problems) > FEW else []
        message = "; ".join(problems[:FEW] + more)
        remedy = "write the fields as the guide has them, or name them by `fields: {text: your_name}`"
        return InputError(Problem(shown(uri), message, remedy))


def _read(stores: Stores, uri: str) -> tuple[DataPin, bytearray]:
    """Return the pin and the content of a file."""
    store = stores.of(uri)
    try:
        pin, _ = store.head(uri, 0)
    except FileNotFoundError:
        raise InputError(Problem(shown(uri), "there is no such file of data", "check the path or URI")) from None
    if pin.size > MOST_BYTES:
        message = f"has {pin.size:,} bytes, and at most {MOST_BYTES:,} are read"
        raise InputError(Problem(shown(uri), message, "split it, or cut it to the examples that count"))
    data = bytearray(pin.size)
    with memoryview(data) as view:
        for start in range(0, pin.size, PIECE):
            store.read(pin, start, view[start : start + PIECE])
    sha256 = hashlib.sha256(data).hexdigest()
    return DataPin(uri=shown(uri), size=pin.size, etag=pin.etag, sha256=sha256), data


def _rows(uri: str, data: bytearray, most: int) -> list[Json]:
    """Return the examples of a file; raise `InputError` where there are more than `most`, or it is malformed."""
    if data[:2] == b"\x1f\x8b" or data[:4] == b"\x28\xb5\x2f\xfd":
        raise InputError(Problem(uri, "is compressed", "unpack it, or store it as Parquet"))
    rows: list[Json] = []
    for row in _of_parquet(uri, data) if data[:4] == b"PAR1" else _of_lines(uri, data):
        if len(rows) == most:
            message = f"holds more than {MOST_EXAMPLES:,} examples, with the files before it"
            raise InputError(Problem(uri, message, "cut it to the examples that count"))
        rows.append(row)
    return rows


def _of_lines(uri: str, data: bytearray) -> Iterator[Json]:
    start, number = 0, 0
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        number += 1
        if stop - start > MOST_LINE:
            message = f"line {number:,} has {stop - start:,} bytes, and at most {MOST_LINE:,} are read"
            raise InputError(Problem(uri, message, "write one example a line"))
        line = bytes(data[start:stop]).strip()
        start = stop + 1
        if not line:
            continue
        try:
            value = bounded.loads(line)
        except (ValueError, RecursionError) as error:
            message = f"line {number:,} is no JSON: {shown(error)[:100]}"
            raise InputError(Problem(uri, message, "write one JSON object a line")) from None
        if not isinstance(value, dict):
            message = f"line {number:,} is no JSON object"
            raise InputError(Problem(uri, message, "write one JSON object a line"))
        yield value


def _of_parquet(uri: str, data: bytearray) -> Iterator[Json]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        message = f"Parquet needs pyarrow ({error})"
        raise InputError(Problem(uri, message, "pip install 'ties-ray[evaluate]'")) from error
    if _names_extensions(data):
        raise _foreign(uri, "types of an extension of Arrow")
    try:
        file = parquet.ParquetFile(
            pyarrow.BufferReader(data), thrift_string_size_limit=2**24, thrift_container_size_limit=2**20
        )
        meta = file.metadata
        held = sum(meta.row_group(number).total_byte_size for number in range(meta.num_row_groups))
        names = [field.name for field in file.schema_arrow if _is_plain(field.type)]
        if held > MOST_BYTES:
            message = f"holds {held:,} bytes of values, and at most {MOST_BYTES:,} are read"
            raise InputError(Problem(uri, message, "split it, or cut it to the examples that count"))
        if not names:
            raise _foreign(uri, "no column of texts, numbers or lists of them")
        for batch in file.iter_batches(ROWS, columns=names):
            if batch.nbytes > ROWS * MOST_LINE:
                message = f"{ROWS} rows take more than {ROWS * MOST_LINE:,} bytes"
                raise InputError(Problem(uri, message, "cut the texts to those that count"))
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, UnicodeDecodeError) as error:
        if isinstance(error, InputError):
            raise
        message = f"is no whole Parquet file: {shown(error)[:200]}"
        raise InputError(Problem(uri, message, "write it anew, with pyarrow or pandas")) from error


def _names_extensions(data: bytearray) -> bool:
    """Return whether the schema in the footer names an extension type, of which loading may run code.

    The schema is base64 in the footer. It is looked at before Arrow parses it.
    """
    length = int.from_bytes(data[-8:-4], "little")
    footer = bytes(data[max(0, len(data) - 8 - length) : -8])
    for match in _BASE64.finditer(footer):
        for offset in range(4):  # what stands before the text may look like a part of it
            text = match[0][offset:]
            if b"ARROW:extension" in base64.b64decode(text[: len(text) // 4 * 4]):
                return True
    return b"ARROW:extension" in footer


def _is_plain(kind: "pyarrow.DataType") -> bool:
    """Return whether a column holds texts, numbers, or lists of them."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in tests)


def _foreign(uri: str, message: str) -> InputError:
    return InputError(Problem(uri, f"has {message}", "write columns of texts, integers, or lists of them"))


def text_of(row: Mapping[str, Any], name: str) -> str | None:
    """Return a field of an example if it is a text."""
    value = row.get(name)
    return value if isinstance(value, str) else None


def fields_of(row: Mapping[str, Any]) -> str:
    """Return the names of an example's fields for a message."""
    return enumerated(map(str, row)) or "no field"
