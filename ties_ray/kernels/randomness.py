"""Random numbers that depend on a position alone: Philox4x32-10 (Salmon et al. 2011), without state or order.

It needs neither torch nor numpy. The same lines work on Python ints and, element by element, on int64 tensors.
"""

import hashlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    Word = TypeVar("Word", int, Tensor)
else:
    Word = TypeVar("Word")

MASK = 0xFFFF_FFFF
MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
KEY_STEPS = (0x9E37_79B9, 0xBB67_AE85)
ROUNDS = 10


def key(seed: int, id: str, name: str) -> tuple[int, int]:
    """Return the key (two uint32) for the model `id` and the parameter `name` of a recipe with this seed.

    It is the first 8 bytes of SHA-256 of the UTF-8 text "seed, NUL, id, NUL, name", as two little-endian uint32.
    """
    digest = hashlib.sha256(f"{seed}\0{id}\0{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Return four random words for each counter. All are uint32 values in ints or int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product of two words may wrap; its 64 bits are right all the same, and the masks drop the sign.
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32 & MASK) ^ c1 ^ k0, b & MASK, (a >> 32 & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3
