import hashlib

import pytest
import torch

from ties_ray.kernels.definition import words
from ties_ray.kernels.randomness import key, philox


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers_for_ints_and_tensors(counter: str, key: str, expected: str) -> None:
    assert philox(numbers(counter), numbers(key)) == numbers(expected)
    tensors = tuple(torch.tensor([word]) for word in numbers(counter))
    assert tuple(int(word) for word in philox(tensors, numbers(key))) == numbers(expected)


def test_words_belong_to_positions_whatever_range_is_asked_for() -> None:
    expected = [philox((e // 4 & 0xFFFF_FFFF, e // 4 >> 32, 0, 0), (7, 9))[e % 4] for e in range(2**34 - 9, 2**34 + 9)]
    assert words((7, 9), 2**34 - 9, 2**34 + 9).tolist() == expected
    for start in range(18):
        assert words((7, 9), 2**34 - 9 + start, 2**34 + 9).tolist() == expected[start:]
        assert words((7, 9), 2**34 - 9, 2**34 - 9 + start).tolist() == expected[:start]


def test_the_key_is_the_head_of_a_sha256() -> None:
    digest = hashlib.sha256("7\0modèle\0layers.0.weight".encode()).hexdigest()
    words = key(7, "modèle", "layers.0.weight")
    assert b"".join(half.to_bytes(4, "little") for half in words).hex() == digest[:16]
    assert len({key(*parts) for parts in ((7, "1", "a"), (71, "", "a"), (7, "", "1a"), (8, "1", "a"))}) == 4


def test_the_share_of_words_below_a_bound_is_the_density() -> None:
    drawn = words(key(0, "0", "w"), 0, 1_000_000)
    assert drawn.min() >= 0
    assert drawn.max() < 2**32
    assert abs((drawn < 2**32 // 10).double().mean() - 0.1) < 0.0015
