"""Merges of families from storage to storage by our methods, beside what the oracles say."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from tests.tools.families import Family
from tests.tools.merging import merge, read_tensors
from tests.tools.oracles.protocol import Merged, Tensors


def check(
    family: Family,
    folder: Path,
    method: Mapping[str, object],
    oracle: Callable[[Tensors, Sequence[Tensors]], Merged],
    *,
    weights: Sequence[float] | None = None,
) -> None:
    """Merge a family, and compare each floating-point tensor with what the oracle makes of the stored values."""
    merge(family, folder / "out", method, weights=weights)
    written = read_tensors(folder / "out")
    base, *models = (_float64(tensors) for tensors in (family.base_tensors, *family.model_tensors))
    deltas = [{name: _in_fp32(value - base[name]) for name, value in model.items()} for model in models]
    zeros = {name: np.zeros_like(value) for name, value in base.items()}
    for name, delta in oracle(zeros, deltas).delta.items():
        step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(written[name].dtype, 2**-20)
        ours = written[name].double().numpy()
        np.testing.assert_allclose(ours, base[name] + delta, rtol=2 * step, atol=1e-6, err_msg=name)


def _float64(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the floating-point tensors that have elements."""
    merged = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    return {name: tensor.double().numpy() for name, tensor in merged.items()}


def _in_fp32(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32).astype(np.float64)
