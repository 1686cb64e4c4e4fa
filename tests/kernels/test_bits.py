import numpy as np
import torch

from ties_ray.kernels.bits import packed, unpacked


def test_any_slice_of_packed_bits_is_that_of_the_mask() -> None:
    mask = torch.rand(83, generator=torch.Generator().manual_seed(1)) < 0.5
    data = packed(mask)
    assert torch.equal(data, torch.from_numpy(np.packbits(mask.numpy())))
    for start in (0, 1, 7, 8, 9, 40):
        for stop in (start + 1, 50, 83):
            assert torch.equal(unpacked(data[start // 8 : -(-stop // 8)], start, stop), mask[start:stop])
