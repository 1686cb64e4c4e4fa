"""Examples come from JSON lines and Parquet, of any store, and hostile files are refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.conftest import Bucket
from tests.tools import scored
from ties_ray.errors import InputError
from ties_ray.evaluations import _data
from ties_ray.evaluations.loss import Loss
from ties_ray.stores import Stores

ROWS: list[dict[str, Any]] = [{"text": f"the cat {number}"} for number in range(200)]


def pins_of(data: Any, stores: Stores | None = None, **settings: Any) -> Any:
    return Loss(data=data, **settings).prepared(stores or Stores({}), 0).pins


def examples(data: Any, stores: Stores | None = None, **settings: Any) -> list[dict[str, Any]]:
    return Loss(data=data, **settings).examples(stores or Stores({}), 0)[0]


def test_lines_and_parquet_give_the_same_examples_with_pins(tmp_path: Path) -> None:
    lines, table = tmp_path / "d.jsonl", tmp_path / "d.parquet"
    scored.lines(lines, ROWS)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    assert examples(str(lines)) == examples(str(table)) == ROWS
    assert examples([str(lines), str(table)]) == [*ROWS, *ROWS]
    (pin,) = pins_of(str(table))
    assert pin.sha256 == hashlib.sha256(table.read_bytes()).hexdigest()
    assert (pin.uri, pin.size) == (str(table), table.stat().st_size)
    assert pin.etag


def test_parquet_may_hold_lists_and_leave_fields_out(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "choices": ["a", "b"], "answer": 1, "text": None}, {"text": "y", "input_ids": [1, 2]}]
    columns = {name: [row.get(name) for row in rows] for name in ("prompt", "choices", "answer", "text", "input_ids")}
    parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
    assert examples(str(tmp_path / "d.parquet")) == [
        {"prompt": "x", "choices": ["a", "b"], "answer": 1},
        {"text": "y", "input_ids": [1, 2]},
    ]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_data_may_lie_in_a_bucket(s3_bucket: Bucket, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"d.{ending}"
    if ending == "jsonl":
        scored.lines(file, ROWS)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    uri, stores = f"{s3_bucket.uri}/d.{ending}", Stores(s3_bucket.storage)
    stores.writer(uri).put(uri, file.read_bytes())
    (pin,) = pins_of(uri, stores)
    assert pin.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert pin.uri == uri
    assert examples(uri, stores) == ROWS


def test_samples_are_drawn_without_repetition_in_the_order_of_the_file(tmp_path: Path) -> None:
    data = scored.lines(tmp_path / "d.jsonl", ROWS)
    drawn = [ROWS.index(row) for row in examples(data, sample=20)]
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 20
    assert examples(data, sample=999) == ROWS


class Pickled(pyarrow.ExtensionType):
    """An extension type whose loading would run code."""

    loaded: list[str] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(pyarrow.string(), "tests.pickled")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"code"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> "Pickled":
        cls.loaded.append("ran")
        return cls()


def test_an_extension_type_of_arrow_is_refused_before_its_code_runs(tmp_path: Path) -> None:
    pyarrow.register_extension_type(Pickled())
    try:
        for extra in range(5):  # the schema lies at another place of the base64 groups
            storage = pyarrow.array(["x"])
            column = pyarrow.ExtensionArray.from_storage(Pickled(), storage)
            table = pyarrow.table({"a" * (extra + 1): column, "text": storage})
            parquet.write_table(table, tmp_path / "d.parquet")
            Pickled.loaded.clear()
            with pytest.raises(InputError, match="has types of an extension of Arrow"):
                examples(str(tmp_path / "d.parquet"))
            assert not Pickled.loaded
    finally:
        pyarrow.unregister_extension_type("tests.pickled")


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"\n \n", "holds no example"),
    "no JSON": (b'{"text": "x"}\nhello\n', "line 2 is no JSON: .*; write one JSON object a line"),
    "no object": (b"[1]\n", "line 1 is no JSON object"),
    "deep": (b"[" * 100_000, "line 1 is no JSON"),
    "wide": (b'{"text": [' + b"{}," * 300_000 + b"{}]}", "line 1 is no JSON: its values would take more than"),
    "a long line": (b'{"text": "' + b"x" * 2**20 + b'"}', "line 1 has 1,048,588 bytes, and at most 1,048,576 are read"),
    "bytes": (b'\xff\xfe{"text": 1}', "line 1 is no JSON"),
    "gzip": (b"\x1f\x8b\x08\x00", "is compressed; unpack it, or store it as Parquet"),
    "half a Parquet": (b"PAR1" + b"\x00" * 40, "is no whole Parquet file"),
    "a Parquet with a long footer": (b"PAR1" + b"\xff" * 40 + b"\xff\xff\xff\x7fPAR1", "is no whole Parquet file"),
    "a pickle": (b"\x80\x04\x95\x1f\x00.", "line 1 is no JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_data_are_refused(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        examples(str(tmp_path / "d.jsonl"))


def test_data_that_are_not_there_too_large_or_too_many_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="there is no such file of data"):
        examples(str(tmp_path / "none.jsonl"))
    data = scored.lines(tmp_path / "d.jsonl", ROWS)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    monkeypatch.setattr(_data, "MOST_EXAMPLES", 199)
    with pytest.raises(InputError, match="holds more than 199 examples"):
        examples(data)
    monkeypatch.setattr(_data, "MOST_BYTES", 1900)
    with pytest.raises(InputError, match="bytes, and at most 1,900 are read"):
        examples(data)
    with pytest.raises(InputError, match="bytes of values, and at most 1,900 are read"):
        examples(str(tmp_path / "d.parquet"))


def test_a_parquet_that_inflates_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    text = "x" * 2**20
    table = pyarrow.table({"text": pyarrow.array([text] * 512)})
    parquet.write_table(table, tmp_path / "d.parquet", compression="zstd")
    assert (tmp_path / "d.parquet").stat().st_size < 2**20
    with pytest.raises(InputError, match="64 rows take more than 67,108,864 bytes"):
        examples(str(tmp_path / "d.parquet"))


def test_a_schema_that_is_no_plain_table_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"a": [{"b": 1}]}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match="has no column of texts, numbers or lists of them"):
        examples(str(tmp_path / "d.parquet"))


def test_a_uri_with_a_secret_is_refused_and_not_shown(tmp_path: Path) -> None:
    uri = "s3://user:hunter2@bucket/d.jsonl"
    with pytest.raises(ValueError, match="password") as caught:
        examples(uri)
    assert "hunter2" not in str(caught.value)


def test_the_record_of_an_evaluation_can_be_read_back(tmp_path: Path) -> None:
    evaluation = Loss(data=scored.lines(tmp_path / "d.jsonl", ROWS), sample=3)
    assert Loss.model_validate(json.loads(json.dumps(evaluation.shown()))) == evaluation
