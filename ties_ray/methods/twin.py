"""Twin-Merging (Lu et al., NeurIPS 2024): a shared change, and for each model what it has beside it, truncated."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Member, Method, Result, Round, bytes_each, unknown_part, whole_matrices

if TYPE_CHECKING:
    from torch import Tensor


class Twin(Method):
    """Adds lambda times the sum of all task vectors; or, with `part`, gives what one model has beside that sum.

    The parts of all models are one merge each: an output of kind `adapter` with the same rank holds a part exactly.
    The router that adds parts by the input is outside. A part keeps the leading singular triplets of each matrix, in
    fp64 LAPACK with one thread, and vectors whole. At full rank the shared change and a part are that model.
    """

    name: Literal["twin"] = "twin"
    part: str | None = None
    """The `id` of the model whose exclusive part is the result. By default the result is the shared change."""
    mask_rate: FiniteFloat = Field(default=0.9, ge=0, lt=1)
    """Share of the min(m, n) triplets that a part loses; at least one stays."""
    rank: int | None = Field(default=None, ge=1)
    """Triplets that a part keeps, instead of `mask_rate`."""
    lambda_: FiniteFloat = Field(default=0.3, alias="lambda")
    """Factor on the sum; the authors take 0.29 to 0.3."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Lu et al. 2024, Twin-Merging (arXiv:2406.15479)"
    caveat: ClassVar[str] = "A part of too low a rank loses what makes its model good, and nothing here says so."
    uses_lapack: ClassVar[bool] = True

    @property
    def all_at_once(self) -> str:
        """Return why a part needs its model again; the shared sum goes on."""
        return "" if self.part is None else "a part is what lies between a model and the finished sum"

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse a part of a model that is not merged."""
        return unknown_part(self.part, members)

    def rounds(self) -> tuple[Round, ...]:
        """Return the sum, or the part by whole matrices, which goes through the models twice."""
        if self.part is None:
            return (Round("merge", self._shared, state="sum"),)
        return (Round("merge", self._exclusive, unit=whole_matrices, passes=2, holds=bytes_each(96)),)

    def coefficients(self, members: Sequence[Member], present: Sequence[bool]) -> tuple[float, ...] | None:
        """Return lambda times each weight for the shared change."""
        return None if self.part else tuple(self.lambda_ * member.weight for member in members)

    def _shared(self, deltas: Deltas, context: Context) -> Result:
        return Result(merged=self._sum(deltas, context))

    def _sum(self, deltas: Deltas, context: Context) -> "Tensor":
        terms = tuple(Term(weight) for weight in context.weights)
        return deltas.fold(WeightedSum(terms))["sum"].mul_(self.lambda_)

    def _exclusive(self, deltas: Deltas, context: Context) -> Result:
        shared, own = self._sum(deltas, context), context.members
        (tau,) = [delta.clone() for model, delta in deltas if own[model].id == self.part]
        shape = context.parameter.shape
        if not context.parameter.is_matrix:
            return Result(merged=tau.sub_(shared))
        from ties_ray.kernels.linalg import norm, svd

        tau, shared = (each.view(shape).double() for each in (tau, shared))
        scale = max(norm(tau), norm(shared))
        rank = max(1, int((1 - self.mask_rate) * min(shape))) if self.rank is None else self.rank
        left, values, right = svd(tau.sub_(shared), rank, scale=scale)
        return Result(merged=((left * values) @ right).float().reshape(-1))
