"""STAR (Lee et al., NAACL 2025): truncate each model's spectrum, give it back its nuclear norm, then average."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Member, Method, Result, Round, bytes_each, whole_matrices


class Star(Method):
    """Keeps the fewest singular triplets of each matrix that hold `eta` per cent of its nuclear norm.

    They grow until the nuclear norm is what it was. Lambda scales the weighted mean of all models; vectors stay whole.
    One pass in fp64 LAPACK, one thread; the memory does not grow with the models.
    On a flat spectrum a rounding error may decide whether one more triplet stays.
    """

    name: Literal["star"] = "star"
    eta: FiniteFloat = Field(default=40.0, gt=0, le=100)
    """The kept triplets hold so many per cent of the nuclear norm, or more; 100 keeps all."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Lee et al. 2025, STAR: Spectral Truncation and Rescale for Model Merging (arXiv:2502.10339)"
    caveat: ClassVar[str] = "On a flat spectrum most triplets are needed, and a rounding error decides the last one."
    uses_lapack: ClassVar[bool] = True
    state_uses_lapack: ClassVar[bool] = True

    @property
    def weights_are_shares(self) -> bool:
        """Return that weights are divided by their sum."""
        return True

    @property
    def all_at_once(self) -> str:
        """Return nothing: what is left of a model depends on no other, and the sum goes on."""
        return ""

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse negative weights: the mean divides by weights."""
        return [
            Problem(
                f"model {member.id}",
                f"weight {member.weight} is negative, and star divides by weights",
                "give it a positive weight",
            )
            for member in members
            if member.weight < 0
        ]

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole matrices."""
        return (Round("merge", self._merge, unit=whole_matrices, holds=bytes_each(96), state="sum"),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        shape, factor = context.parameter.shape, self.lambda_ / sum(context.weights)
        if not context.parameter.is_matrix:
            total = deltas.fold(WeightedSum(tuple(Term(weight) for weight in context.weights)))["sum"]
            return Result(merged=total.mul_(factor))
        import torch

        from ties_ray.kernels.linalg import svd

        total = torch.zeros(shape, dtype=torch.float64, device=context.kernels.device)
        deltas.resume(total)
        for model, delta in deltas:
            left, spectrum, right = svd(delta.view(shape))
            if not len(spectrum):
                continue
            nuclear = float(spectrum.sum())
            rank = 1 + min(int((spectrum.cumsum(0) < nuclear * self.eta / 100).sum()), len(spectrum) - 1)
            grown = spectrum[:rank] * (context.weights[model] * nuclear / float(spectrum[:rank].sum()))
            total += (left[:, :rank] * grown) @ right[:rank]
        deltas.keep(total)
        return Result(merged=total.mul_(factor).float().reshape(-1))
