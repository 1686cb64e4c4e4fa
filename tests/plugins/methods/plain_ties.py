"""TIES as one would write it down: model by model, without the fused kernels."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from ties_ray.methods import Context, Deltas, Member, Method, Result, Round, Threshold


class PlainTies(Method):
    """Global trim, sign election, mean of the agreeing; all models weigh the same."""

    name: Literal["plain_ties"] = "plain_ties"
    density: float = 0.2

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Yadav et al. 2023, TIES-Merging (arXiv:2306.01708)"

    def needs(self, members: Sequence[Member]) -> Threshold:
        return Threshold((self.density,) * len(members))

    def rounds(self) -> tuple[Round, ...]:
        return (Round("merge", self._merge, passes=2),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        total = torch.zeros(context.stop - context.start)
        for slice_ in deltas:
            total += self._trimmed(slice_.delta, context.thresholds[slice_.model])
        chosen, count = torch.zeros_like(total), torch.zeros_like(total)
        for slice_ in deltas:
            kept = self._trimmed(slice_.delta, context.thresholds[slice_.model])
            agrees = (kept.sign() == total.sign()) & (kept != 0)
            chosen += torch.where(agrees, kept, 0.0)
            count += agrees
        return Result(merged=torch.where(count == 0, 0.0, chosen / count))

    def _trimmed(self, delta: torch.Tensor, threshold: int) -> torch.Tensor:
        return torch.where(delta.abs().view(torch.int32) >= threshold, delta, 0.0)
