"""The one reader of documents that lie in storage, where anybody who may write there could have put another.

A document is bounded before it is parsed (bytes as stored, bytes inflated, number of values; the parser bounds the
nesting), and typed. Whatever is wrong with it is an `InputError` with advice, never a defect of ours.
"""

import zlib
from typing import Any, NamedTuple, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from ties_ray.errors import InputError, Problem
from ties_ray.stores import Pin, Store, shown

T = TypeVar("T")
REASON = 200
"""Characters of what a parser says that are shown."""
STRAY_ERRORS = 100
"""Errors of a document that are looked at; each takes half a kilobyte."""


class Bounds(NamedTuple):
    """How large a document may be."""

    stored: int
    """Bytes as they lie in storage."""
    values: int
    """JSON values in it: each takes about 90 bytes while it is parsed."""
    inflated: int = 0
    """Bytes once gzip is undone; 0 where it is not compressed."""


SMALL = Bounds(stored=2**20, values=2**15)
"""A lease, a pointer, the ids of uploads."""
LARGE = Bounds(stored=2**28, values=2**22)
"""A record, what a barrier knows, a result record."""
PLAN = Bounds(stored=2**28, values=2**24, inflated=2**29)
"""A plan of 1000 adapters, each stored in its own way, has some 5 million values."""
FREE, A_BYTE = Bounds(0, values=2**19, inflated=2**25), Bounds(1, values=4, inflated=64)
"""What a compressed document may grow to, and how much more for each byte of it. A small object can't take much memory.
Plans of 300 models with 723 tensors have about 1.4 values and 16 bytes a byte."""
PIECE = 2**20
"""Bytes inflated at a time."""


def read(store: Store, uri: str, adapter: TypeAdapter[T], bounds: Bounds, what: str, remedy: str) -> tuple[Pin, T]:
    """Return the pin and the value of the document at `uri`.

    what: names the document in messages, as in "the result record". Raises `FileNotFoundError` where there is none,
    `InputError` where it is too large, or not what the adapter describes.
    """
    pin, data = store.get(uri, bounds.stored)
    return pin, parse(data, adapter, bounds, uri, what, remedy)


def parse(data: bytes, adapter: TypeAdapter[T], bounds: Bounds, where: str, what: str, remedy: str) -> T:
    """Return the value of a document; raise `InputError` where it is too large, or not what the adapter describes."""

    def refuse(why: object) -> NoReturn:
        problem = f"this ties_ray can't read {what} ({shown(why)[:REASON]})"
        raise InputError(Problem(shown(where), problem, remedy)) from None

    most = bounds
    try:
        if bounds.inflated:
            most = Bounds(
                *(min(one, free + each * len(data)) for one, free, each in zip(bounds, FREE, A_BYTE, strict=True))
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
        refuse(error)  # a validator of a method or an output, which may be a plugin's, has met what it did not expect


def first_of(error: ValidationError) -> str:
    """Return the first thing that is wrong, and where, without the value that is."""
    count = error.error_count()
    if count > STRAY_ERRORS:
        return f"{count:,} of its values are not as they should be"
    first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def inflate(data: bytes, most: Bounds) -> bytes:
    """Return what a gzip file holds; raise `ValueError` where that is more than allowed, or not whole."""
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


_TOO_MANY = "it holds more than {:,} values"


def num_values(data: bytes) -> int:
    """Return about how many JSON values a text holds, not fewer: what stands in strings counts as well."""
    return 1 + sum(map(data.count, (b",", b":", b"[", b"{")))
