"""Masks as packed bits: eight elements a byte, the first in the highest bit, as `numpy.packbits` packs them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def packed(mask: "Tensor") -> "Tensor":
    """Return a mask (bool, 1-D) as bytes (uint8, 1-D, on the CPU); the last byte is filled with zeros."""
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpacked(data: "Tensor", start: int, stop: int) -> "Tensor":
    """Return elements [start, stop) of a mask (bool, 1-D). data: its bytes from that of `start` on (uint8, 1-D)."""
    import numpy as np
    import torch

    first = start % 8
    bits = np.unpackbits(data.numpy(), count=first + stop - start)[first:]
    return torch.from_numpy(bits.view(np.bool_))
