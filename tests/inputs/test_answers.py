import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
import torch

from tests.tools.families import file_bytes
from ties_ray.formats import Question
from ties_ray.formats.checkpoint import Checkpoint
from ties_ray.inputs.answers import FIRST_BYTES, PIECE_BYTES, Inquiry, Stored, answer, inquiries, stored
from ties_ray.stores import Pin, Stores
from ties_ray.testing import folder_of

HEAD = 40
"""Bytes before a tensor."""


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def put(stores: Stores, data: bytes) -> Stored:
    uri = f"memory://{secrets.token_hex(6)}/x"
    store = stores.of(uri)
    store.put(uri, bytes(HEAD) + data)
    return Stored(store.head(uri, 1)[0], HEAD, len(data))


def asked(*pairs: tuple[Stored, Stored]) -> list[Inquiry]:
    return [Inquiry("m", Question(str(n), "other", "base"), *pair) for n, pair in enumerate(pairs)]


def same(inquiries: Sequence[Inquiry], stores: Stores, threads: Executor) -> tuple[list[bool], int]:
    told = answer(inquiries, stores, threads)
    assert told.problems == {}
    return [told.same["m"][one.question] for one in inquiries], told.num_bytes


def test_equal_tensors_are_read_whole_and_different_ones_to_their_first_difference(threads: Executor) -> None:
    stores = Stores({})
    size = FIRST_BYTES + PIECE_BYTES + 5
    data = bytes(size)
    one = put(stores, data)
    assert same(asked((one, put(stores, data))), stores, threads) == ([True], 2 * size)
    assert same(asked((one, put(stores, b"x" + data[1:]))), stores, threads) == ([False], 2 * FIRST_BYTES)
    assert same(asked((one, put(stores, data[1:]))), stores, threads) == ([False], 0)
    last, empty = put(stores, data[1:] + b"x"), put(stores, b"")
    assert same(asked((one, last), (one, one), (empty, empty)), stores, threads)[0] == [False, True, True]


def test_a_tensor_that_cannot_be_read_has_no_answer(threads: Executor) -> None:
    stores = Stores({})
    one = put(stores, b"123")
    gone = Stored(Pin(one.pin.uri + "-gone", 43, "", ""), HEAD, 3)
    told = answer(asked((one, one), (one, gone)), stores, threads)
    assert list(told.same["m"].values()) == [True]
    assert len(told.problems["m"]) == 1


def test_a_question_is_about_tensors_of_the_files_that_the_format_uses() -> None:
    mine, base = (
        stored(folder_of(Checkpoint(), {"model.safetensors": file_bytes(tensors), "config.json": b"{}"}), Checkpoint())
        for tensors in ({"a": torch.zeros(2), "b": torch.ones(3)}, {"a": torch.zeros(2)})
    )
    assert [mine["b"].size, base["a"].size] == [12, 8]
    questions = [
        Question("a", "b", "model"),
        Question("a", "a", "base"),
        Question("a", "b", "base"),
        Question("c", "a", "model"),
    ]
    assert [one.question for one in inquiries("m", questions, mine, base)] == questions[:2]
