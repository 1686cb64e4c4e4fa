"""Reads stored documents, which anybody who may write to the storage could have changed.

A document is bounded and typed. Its stored bytes, inflated bytes and number of values are bounded before it is parsed;
the parser bounds its nesting. A fault of the document is an `InputError` with a remedy, never a defect of ours.
"""

import zlib
from typing import Any, NamedTuple, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from ties_ray.errors import InputError, Problem
from ties_ray.stores import Pin, Store, shown

T = TypeVar("T")
REASON = 200
"""The most characters that are shown of a parser's message."""
STRAY_ERRORS = 100
"""The most errors of a document that are looked at. Each takes half a kilobyte."""


class Bounds(NamedTuple):
    """How large a document may be."""

    stored: int
    """The most bytes as it is stored."""
    values: int
    """The most JSON values. Each takes about 90 bytes while it is parsed."""
    inflated: int = 0
    """The most bytes after decompression; 0 where the document is not compressed."""


SMALL = Bounds(stored=2**20, values=2**15)
"""The bounds of a lease, of a pointer, and of the ids of uploads."""
LARGE = Bounds(stored=2**28, values=2**22)
"""The bounds of a record, of a barrier's findings, and of a result record."""
PLAN = Bounds(stored=2**28, values=2**24, inflated=2**29)
"""The bounds of a plan. A plan of 1000 adapters, each stored in its own way, has some 5 million values."""
FREE = Bounds(0, values=2**19, inflated=2**25)
"""What any compressed document may grow to. A small object can't take much memory."""
A_BYTE = Bounds(1, values=4, inflated=64)
"""How much more it may grow for each stored byte. Plans of 300 models have about 1.4 values and 16 bytes a byte."""
PIECE = 2**20
"""Bytes inflated at a time."""
_TOO_MANY = "it holds more than {:,} values"


def read(store: Store, uri: str, adapter: TypeAdapter[T], bounds: Bounds, title: str, remedy: str) -> tuple[Pin, T]:
    """Return the pin and the value of the document at `uri`.

    title: names the document in messages, as in "the result record". Raises `FileNotFoundError` where there is none,
    `InputError` where it is too large, or does not fit the adapter.
    """
    pin, data = store.get(uri, bounds.stored)
    return pin, parse(data, adapter, bounds, uri, title, remedy)


def parse(data: bytes, adapter: TypeAdapter[T], bounds: Bounds, where: str, title: str, remedy: str) -> T:
    """Return the value of a document; raise `InputError` where it is too large, or does not fit the adapter.

    where: the place that messages name. title: names the document in messages.
    """

    def refuse(reason: object) -> NoReturn:
        problem = f"this ties_ray can't read {title} ({shown(reason)[:REASON]})"
        raise InputError(Problem(shown(where), problem, remedy)) from None

    most = bounds
    try:
        if bounds.inflated:
            most = Bounds(
                *(min(bound, free + each * len(data)) for bound, free, each in zip(bounds, FREE, A_BYTE, strict=True))
            )
            data = inflate(data, most)
        elif num_values(data) > most.values:
            refuse(_TOO_MANY.format(most.values))
        return adapter.validate_json(data)
    except ValidationError as error:
        refuse(first_of(error))
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, zlib.error) as error:
        refuse(error)  # a validator, which may be a plugin's, has met something unexpected


def first_of(error: ValidationError) -> str:
    """Return the first fault and its place, without the faulty value."""
    count = error.error_count()
    if count > STRAY_ERRORS:
        return f"{count:,} of its values are not as they should be"
    first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def inflate(data: bytes, most: Bounds) -> bytes:
    """Return the content of a gzip file; raise `ValueError` where it is more than allowed, or not whole."""
    stream, pieces, size, values = zlib.decompressobj(wbits=31), list[bytes](), 0, 0
    while not stream.eof:
        piece, data = stream.decompress(data, PIECE), stream.unconsumed_tail
        if not piece and not stream.eof:
            raise ValueError("it is cut off")
        size, values = size + len(piece), values + num_values(piece)
        if size > most.inflated:
            raise ValueError(f"it inflates to more than {most.inflated:,} bytes")
        if values > most.values:
            raise ValueError(_TOO_MANY.format(most.values))
        pieces.append(piece)
    if stream.unused_data:
        raise ValueError("something follows it")
    return b"".join(pieces)


def num_values(data: bytes) -> int:
    """Return an upper bound for the number of JSON values in a text. Characters in strings count as well."""
    return 1 + sum(map(data.count, (b",", b":", b"[", b"{")))
