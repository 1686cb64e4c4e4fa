"""The reader of stored documents: its bounds to the byte and the value, and what its messages show."""

import gzip
import json
import random
import zlib
from pathlib import Path
from typing import Annotated, NoReturn

import pytest
from pydantic import AfterValidator, TypeAdapter

from ties_ray.errors import InputError
from ties_ray.state import documents
from ties_ray.state.documents import REASON, STRAY_ERRORS, Bounds, first_of, inflate, num_values, parse, read
from ties_ray.stores import Stores

NUMBERS = TypeAdapter(dict[str, list[int]])


def parsed(data: bytes, bounds: Bounds) -> object:
    return parse(data, NUMBERS, bounds, "m://x", "the document", "remove it")


@pytest.mark.parametrize(
    ("text", "values"), [(b"1", 1), (b"[1,2]", 3), (b'{"a":[1]}', 4), (b'{"a":{"b":[1,2,3]},"c":2}', 10), (b"", 1)]
)
def test_commas_colons_and_brackets_bound_the_values(text: bytes, values: int) -> None:
    assert num_values(text) == values


def test_a_document_may_have_as_many_values_as_its_bound_says() -> None:
    data = b'{"a": [1, 2]}'
    assert parsed(data, Bounds(100, values=5)) == {"a": [1, 2]}
    with pytest.raises(InputError, match=r"m://x: this ties_ray can't read the document \(it holds more than 4 v"):
        parsed(data, Bounds(100, values=4))


def test_a_compressed_document_may_be_as_large_as_its_bounds_say(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'{"a": [1, 2, 3, 4, 5, 6]}'
    data = gzip.compress(content)
    assert inflate(data, Bounds(100, values=9, inflated=len(content))) == content
    with pytest.raises(ValueError, match="it inflates to more than 24 bytes"):
        inflate(data, Bounds(100, values=9, inflated=len(content) - 1))
    with pytest.raises(ValueError, match="it holds more than 8 values"):
        inflate(data, Bounds(100, values=8, inflated=len(content)))
    monkeypatch.setattr(documents, "PIECE", 7)
    assert inflate(data, Bounds(100, values=100, inflated=len(content))) == content
    with pytest.raises(ValueError, match="it inflates to more than 24 bytes"):
        inflate(data, Bounds(100, values=100, inflated=len(content) - 1))
    with pytest.raises(ValueError, match="it holds more than 8 values"):
        inflate(data, Bounds(100, values=8, inflated=len(content)))
    for spoilt, fault in ((data[:-1], "it is cut off"), (b"", "it is cut off"), (data + b"x", "something follows it")):
        with pytest.raises(ValueError, match=fault):
            inflate(spoilt, Bounds(100, 100, 100))
    for no_gzip in (content, zlib.compress(content)):
        with pytest.raises(zlib.error):
            inflate(no_gzip, Bounds(100, 100, 100))
    far = random.Random(0).randbytes(20_000) * 2  # what repeats lies as far apart as gzip looks back
    assert inflate(gzip.compress(far), Bounds(2**20, 2**20, 2**20)) == far


def test_a_compressed_document_may_grow_with_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "FREE", Bounds(0, values=10, inflated=50))
    bounds = Bounds(2**20, values=2**20, inflated=2**20)
    data = gzip.compress(b'{"a": [' + b" " * 100_000 + b"]}")
    with pytest.raises(InputError, match=f"it inflates to more than {50 + 64 * len(data):,} bytes"):
        parsed(data, bounds)
    data = gzip.compress(b'{"a": [' + b"1," * 1500 + b"1]}")
    with pytest.raises(InputError, match=f"it holds more than {10 + 4 * len(data):,} values"):
        parsed(data, bounds)
    with pytest.raises(InputError, match="it holds more than 3 values"):
        parsed(data, bounds._replace(values=3))
    values = {"a": list(range(1000))}
    assert parsed(gzip.compress(json.dumps(values).encode()), bounds) == values


def test_the_first_fault_is_shown_with_its_place_and_without_its_value() -> None:
    with pytest.raises(InputError, match=r"\(a\.1: Input should be a valid integer") as raised:
        parsed(b'{"a": [1, "0123abcd", "x"]}', Bounds(100, 100))
    assert "0123abcd" not in str(raised.value)
    assert "http" not in str(raised.value)
    with pytest.raises(InputError, match=r"\(Input should be an object\)"):
        parsed(b"[]", Bounds(100, 100))


@pytest.mark.parametrize("faults", [STRAY_ERRORS, STRAY_ERRORS + 1])
def test_of_many_faults_the_number_is_shown(faults: int) -> None:
    with pytest.raises(ValueError, match="validation error") as raised:
        NUMBERS.validate_python({"a": ["x"] * faults})
    text = first_of(raised.value)  # type: ignore[arg-type]
    assert text.startswith("a.0: ") if faults == STRAY_ERRORS else text == "101 of its values are not as they should be"


@pytest.mark.parametrize(
    "error",
    [ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError, RecursionError, zlib.error],
)
def test_whatever_a_validator_meets_is_a_refusal_in_few_words(error: type[Exception]) -> None:
    def odd(value: object) -> NoReturn:
        raise error("odd " + "x" * 5000)

    adapter: TypeAdapter[object] = TypeAdapter(Annotated[int, AfterValidator(odd)])
    with pytest.raises(InputError, match=r"can't read the document .*odd xxx") as raised:
        parse(b"1", adapter, Bounds(100, 100), "m://x", "the document", "remove it")
    assert len(str(raised.value)) < REASON + 100
    assert str(raised.value).endswith("; remove it")


def test_a_document_is_read_with_its_pin_and_within_its_bytes(tmp_path: Path) -> None:
    store, uri = Stores({}).writer(str(tmp_path)), f"{tmp_path}/x.json"
    with pytest.raises(FileNotFoundError):
        read(store, uri, NUMBERS, Bounds(100, 100), "the document", "")
    pin = store.put(uri, b'{"a": [1]}')
    assert read(store, uri, NUMBERS, Bounds(10, 100), "the document", "") == (pin, {"a": [1]})
    with pytest.raises(InputError, match=r"x\.json"):
        read(store, uri, NUMBERS, Bounds(9, 100), "the document", "")
