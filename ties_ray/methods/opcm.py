"""OPCM (Tang et al. 2025): models one after the other, each with what lies beside the merge so far."""

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.methods import Context, Deltas, Key, Method, Result, Round, bytes_each, whole_matrices

if TYPE_CHECKING:
    from torch import Tensor


class Opcm(Method):
    """Adds of each model, in recipe order, what the leading directions of the merge so far do not hold.

    The sum is scaled to the mean norm of the task vectors, times lambda; vectors are summed. fp64 LAPACK, one thread.
    It decomposes every matrix once a model. The order matters: earlier models are kept whole, later ones lose more.
    Directions that no earlier model moves are never taken away, so a matrix frozen so far keeps all of a model.
    """

    name: Literal["opcm"] = "opcm"
    alpha: FiniteFloat = Field(default=0.5, ge=0, lt=1)
    """Share of the nuclear norm whose directions are closed to later models."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Tang et al. 2025, Merging Models on the Fly Without Retraining (arXiv:2501.09522)"
    caveat: ClassVar[str] = "Another order of the models is another merge, and later models lose more."
    uses_weights: ClassVar[bool] = False
    uses_lapack: ClassVar[bool] = True
    state_uses_lapack: ClassVar[bool] = True

    @property
    def all_at_once(self) -> str:
        """Return nothing: a model needs the merge of those before it, and the scale their norms."""
        return ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the norms, and the merge of whole matrices, which is scaled in the end."""
        merge = Round("merge", self._merge, unit=whole_matrices, holds=bytes_each(92), finish=self._scaled, state="sum")
        return Round("norms", self._norms), merge

    def _norms(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.exact_sums import dot

        return Result(sums={Key("norm2", (model,), whole=True): dot(delta, delta) for model, delta in deltas})

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        import torch

        from ties_ray.kernels.exact_sums import dot

        total = torch.zeros(context.stop - context.start, device=context.kernels.device)
        deltas.resume(total)
        shape = context.parameter.shape
        for model, delta in deltas:
            if model and context.parameter.is_matrix:
                before = total.view(shape).double()
                total = (before + self._beside(delta.view(shape).double(), before)).float().reshape(-1)
            else:
                total += delta
        deltas.keep(total)
        return Result(merged=total, sums={Key("size2", whole=True): dot(total, total)})

    def _beside(self, tau: "Tensor", before: "Tensor") -> "Tensor":
        """Return what of a matrix lies beside the leading directions of another, and off its diagonal (fp64)."""
        import torch

        from ties_ray.kernels.linalg import svd

        left, spectrum, right = svd(before)
        if not len(spectrum):
            return tau
        core = left.T @ tau @ right.T
        closed = int((spectrum.cumsum(0) <= self.alpha * float(spectrum.sum())).sum())
        gone = torch.diag(core.diagonal())
        gone[:closed, :closed] = core[:closed, :closed]
        return tau.sub_(left @ gone @ right)

    def _scaled(self, merged: "Tensor", context: Context) -> "Tensor":
        norms = [math.sqrt(context.sum("norm2", model, whole=True)) for model in range(len(context.members))]
        size = math.sqrt(context.sum("size2", whole=True))
        return merged.mul_(self.lambda_ * sum(norms) / len(norms) / size if size else 0.0)
