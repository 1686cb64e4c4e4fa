"""Iso-C (Marczak et al., ICML 2025): the summed change of each matrix with all its singular values equal."""

from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Method, Result, Round, bytes_each, whole_matrices


class IsoC(Method):
    """Replaces the singular values of the sum of task vectors by their mean, matrix by matrix; vectors get the mean.

    Directions that no model moves stay still: the mean is taken over the numerical rank. fp64 LAPACK, one thread.
    """

    name: Literal["iso_c"] = "iso_c"
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging (arXiv:2502.04959)"
    caveat: ClassVar[str] = (
        "It raises weak directions, noise with them. The flat spectrum does not fit an adapter of a lower rank."
    )
    uses_lapack: ClassVar[bool] = True

    @property
    def all_at_once(self) -> str:
        """Return nothing: it needs the sum of the models alone."""
        return ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole matrices."""
        return (Round("merge", self._merge, unit=whole_matrices, holds=bytes_each(60), state="sum"),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        terms = tuple(Term(weight) for weight in context.weights)
        total = deltas.fold(WeightedSum(terms))["sum"]
        from ties_ray.kernels.linalg import svd

        if not context.parameter.is_matrix:
            return Result(merged=total.mul_(self.lambda_ / len(context.members)))
        left, spectrum, right = svd(total.view(context.parameter.shape))
        flat = spectrum.mean() * (left @ right) if len(spectrum) else total.double()
        return Result(merged=flat.mul_(self.lambda_).float().reshape(-1))
