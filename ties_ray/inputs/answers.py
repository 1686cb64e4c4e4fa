"""Answers to formats' questions whether stored tensors have the same bytes, which no header tells."""

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
"""The first bytes to compare. Training changes nearly all of a tensor, so they show most differences."""
PIECE_BYTES = 4 * 2**20
"""The rest of two tensors is compared in pieces of so many bytes."""


class Stored(NamedTuple):
    """The place of one tensor's bytes."""

    pin: Pin
    start: int
    size: int
    """The number of bytes."""


class Inquiry(NamedTuple):
    """One question of one input, with the places of both tensors."""

    owner: str
    """The id of the input whose format asks."""
    question: Question
    mine: Stored
    other: Stored


class Answers(NamedTuple):
    """The answers of the bytes."""

    same: Mapping[str, Mapping[Question, bool]]
    """Answers by owner. A question whose bytes could not be read has none."""
    problems: Mapping[str, Sequence[Problem]]
    """Problems of reading, by owner."""
    num_bytes: int
    """The bytes that were read."""


class _Piece(NamedTuple):
    """A run of bytes that two tensors are compared by."""

    number: int
    """The inquiry's."""
    start: int
    """Counted from the first byte of either tensor."""
    stop: int


_Range = tuple[Stored, int, int]
"""(tensor, first byte in it, end)."""


def stored(folder: Folder, form: Format) -> dict[str, Stored]:
    """Return the place of each tensor in a folder's weight files."""
    pins = {pin.uri.rpartition("/")[2]: pin for pin in folder.files}
    return {
        name: Stored(pins[file], info.start, info.stop - info.start)
        for name, (file, info) in form.places(folder).items()
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
    comparison = _Comparison(asked, stores)
    for first, last in ((0, FIRST_BYTES), (FIRST_BYTES, None)):
        comparison.run(first, last, threads)
    same: defaultdict[str, dict[Question, bool]] = defaultdict(dict)
    problems: defaultdict[str, list[Problem]] = defaultdict(list)
    for number, inquiry in enumerate(asked):
        if number in comparison.failed:
            problems[inquiry.owner] += comparison.failed[number].problems
        else:
            same[inquiry.owner][inquiry.question] = not comparison.differs[number].is_set()
    return Answers(same, problems, comparison.num_bytes)


class _Comparison:
    """The state of all inquiries while their bytes are compared, from many threads."""

    def __init__(self, asked: Sequence[Inquiry], stores: Stores) -> None:
        self._asked = asked
        self._stores = stores
        self.differs = [Event() for _ in asked]
        self.failed: dict[int, InputError] = {}
        self.num_bytes = 0
        for inquiry, differs in zip(asked, self.differs, strict=True):
            if inquiry.mine.size != inquiry.other.size:
                differs.set()

    def run(self, first: int, last: int | None, threads: Executor) -> None:
        """Compare the bytes [first, last) of all tensors that may still be equal; None: to the end."""
        pieces = [
            piece
            for number, inquiry in enumerate(self._asked)
            if number not in self.failed and not self.differs[number].is_set()
            for piece in _pieces(number, inquiry.mine.size, first, last)
        ]
        ranges = {(self._asked[number].other, start, stop): stop - start for number, start, stop in pieces}
        digests = dict(zip(ranges, threads.map(self._digest, ranges), strict=True))
        self.num_bytes += sum(ranges.values())
        self.num_bytes += sum(threads.map(lambda piece: self._compare(piece, digests), pieces))

    def _compare(self, piece: _Piece, digests: Mapping[_Range, bytes | InputError]) -> int:
        """Compare one piece with the digest of the other tensor's; return how many bytes were read for it."""
        number, start, stop = piece
        if self.differs[number].is_set():
            return 0
        inquiry = self._asked[number]
        mine, other = self._digest((inquiry.mine, start, stop)), digests[inquiry.other, start, stop]
        for digest in (mine, other):
            if isinstance(digest, InputError):
                self.failed[number] = digest
        if mine != other:
            self.differs[number].set()
        return stop - start

    def _digest(self, range_: _Range) -> bytes | InputError:
        tensor, start, stop = range_
        data = bytearray(stop - start)
        try:
            self._stores.of(tensor.pin.uri).read(tensor.pin, tensor.start + start, memoryview(data))
        except InputError as error:
            return error
        return hashlib.sha256(data).digest()


def _pieces(number: int, size: int, first: int, last: int | None) -> list[_Piece]:
    """Return the pieces of the bytes [first, last) of two tensors of so many bytes."""
    end = size if last is None else min(last, size)
    return [_Piece(number, at, min(at + PIECE_BYTES, end)) for at in range(first, end, PIECE_BYTES)]
