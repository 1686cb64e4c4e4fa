"""Whether stored tensors have the same bytes, where a format asks: what no header tells."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from threading import Event
from typing import NamedTuple

from ties_ray.errors import InputError, Problem
from ties_ray.formats import Folder, Format, Question
from ties_ray.stores import Pin, Stores

FIRST_BYTES = 64 * 2**10
"""Read first of both tensors: training changes nearly all of a tensor, so these show most differences."""
PIECE_BYTES = 4 * 2**20
"""Read at a time of the rest, of each of the two."""


class Stored(NamedTuple):
    """Where the bytes of one tensor lie."""

    pin: Pin
    start: int
    size: int
    """Bytes."""


class Inquiry(NamedTuple):
    """One question of one input, and where the bytes of both tensors lie."""

    owner: str
    """Id of the input whose format asks."""
    question: Question
    mine: Stored
    other: Stored


class Answers(NamedTuple):
    """What the bytes told."""

    same: Mapping[str, Mapping[Question, bool]]
    """By owner. A question whose bytes could not be read has no answer."""
    problems: Mapping[str, Sequence[Problem]]
    """By owner."""
    num_bytes: int
    """That were read."""


class _Piece(NamedTuple):
    number: int
    """Of the inquiry."""
    start: int
    """From the first byte of either tensor."""
    stop: int


def stored(folder: Folder, form: Format) -> dict[str, Stored]:
    """Return where each tensor of a folder's weight files lies."""
    pins = {pin.uri.rpartition("/")[2]: pin for pin in folder.files}
    return {
        name: Stored(pins[file], info.start, info.stop - info.start)
        for file in form.weight_files(folder)
        for name, info in folder.headers[file].tensors.items()
    }


def inquiries(
    owner: str, questions: Iterable[Question], mine: Mapping[str, Stored], base: Mapping[str, Stored]
) -> list[Inquiry]:
    """Return the questions about tensors that exist, with their places."""
    others = {"model": mine, "base": base}
    return [
        Inquiry(owner, question, mine[question.mine], others[question.of][question.other])
        for question in dict.fromkeys(questions)
        if question.mine in mine and question.other in others[question.of]
    ]


def answer(asked: Sequence[Inquiry], stores: Stores, threads: Executor) -> Answers:
    """Compare the bytes of each two tensors, many pieces at a time; reading ends at the first difference.

    A tensor of the base is read once, however many models are compared with it.
    """
    differs = [Event() for _ in asked]
    failed: dict[int, InputError] = {}
    num_bytes = 0

    def digest(range_: tuple[Stored, int, int]) -> bytes | InputError:
        try:
            return hashlib.sha256(_bytes(*range_, stores)).digest()
        except InputError as error:
            return error

    for first, last in ((0, FIRST_BYTES), (FIRST_BYTES, None)):
        pieces = [
            piece
            for number in range(len(asked))
            if number not in failed and not differs[number].is_set()
            for piece in _pieces(asked, number, first, last)
        ]
        others = {(asked[number].other, start, stop): stop - start for number, start, stop in pieces}
        digests = dict(zip(others, threads.map(digest, others), strict=True))
        num_bytes += sum(others.values())

        def compare(piece: _Piece, digests: Mapping[tuple[Stored, int, int], bytes | InputError] = digests) -> int:
            number, start, stop = piece
            if differs[number].is_set():
                return 0
            mine, other = digest((asked[number].mine, start, stop)), digests[asked[number].other, start, stop]
            for one in (mine, other):
                if isinstance(one, InputError):
                    failed[number] = one
            if mine != other:
                differs[number].set()
            return stop - start

        num_bytes += sum(threads.map(compare, pieces))
    same: defaultdict[str, dict[Question, bool]] = defaultdict(dict)
    problems: defaultdict[str, list[Problem]] = defaultdict(list)
    for number, inquiry in enumerate(asked):
        if number in failed:
            problems[inquiry.owner] += failed[number].problems
        else:
            equal = inquiry.mine.size == inquiry.other.size and not differs[number].is_set()
            same[inquiry.owner][inquiry.question] = equal
    return Answers(same, problems, num_bytes)


def _pieces(asked: Sequence[Inquiry], number: int, first: int, last: int | None) -> list[_Piece]:
    """Return the pieces of the bytes [first, last) of two tensors; none where their sizes tell that they differ."""
    inquiry = asked[number]
    if inquiry.mine.size != inquiry.other.size:
        return []
    end = inquiry.mine.size if last is None else min(last, inquiry.mine.size)
    return [_Piece(number, at, min(at + PIECE_BYTES, end)) for at in range(first, end, PIECE_BYTES)]


def _bytes(tensor: Stored, start: int, stop: int, stores: Stores) -> bytearray:
    data = bytearray(stop - start)
    stores.of(tensor.pin.uri).read(tensor.pin, tensor.start + start, memoryview(data))
    return data
