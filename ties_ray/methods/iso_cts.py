"""Iso-CTS (Marczak et al., ICML 2025): common directions and each model's own, all with one singular value."""

from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Method, Result, Round, bytes_each, whole_matrices


class IsoCts(Method):
    """Gives one singular value to the leading directions of the summed change and to each model's own beside them.

    Lambda scales a sum; vectors get the mean. Goes through the models twice, in fp64 LAPACK with one thread.
    With many models for the width of a matrix no own directions are left, and it is Iso-C.
    Directions that no model moves stay still; models inside the common directions add none.
    """

    name: Literal["iso_cts"] = "iso_cts"
    common: FiniteFloat = Field(default=0.8, gt=0, le=1)
    """Share of the min(m, n) directions that come from the sum of all models."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging (arXiv:2502.04959)"
    caveat: ClassVar[str] = "Many models leave each few directions of its own, and with more than the width none."
    uses_lapack: ClassVar[bool] = True

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole matrices, which goes through its models twice."""
        return (Round("merge", self._merge, unit=whole_matrices, passes=2, holds=bytes_each(136)),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        shape, count = context.parameter.shape, len(context.members)
        total = deltas.fold(WeightedSum(tuple(Term(weight) for weight in context.weights)))["sum"]
        if not context.parameter.is_matrix:
            return Result(merged=total.mul_(self.lambda_ / count))
        import torch

        from ties_ray.kernels.linalg import Svd, norm, polar, svd

        width = min(shape)
        own = round((width - int(self.common * width)) / count)
        common = svd(total.view(shape), max(0, width - own * count))
        largest = norm(total.view(shape).double())
        parts = []
        for model, delta in deltas if own else ():
            tau = delta.view(shape).double().mul_(context.weights[model])
            scale = max(largest, norm(tau))
            tau -= common.left @ (common.left.T @ tau)
            parts.append(Svd(*(part.clone() for part in svd(tau, own, scale=scale))))  # a view would keep it whole
        parts.append(common)
        spectrum = torch.cat([part.values for part in parts])
        left = polar(torch.cat([part.left for part in parts], 1))
        left *= float(spectrum.mean()) if len(spectrum) else 0.0
        right = polar(torch.cat([part.right for part in parts]))
        return Result(merged=(left @ right).mul_(self.lambda_).float().reshape(-1))
