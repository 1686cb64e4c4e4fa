"""RegMean (Jin et al., ICLR 2023): the linear layers whose outputs are closest to those of all models."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.methods import Companion, Context, Deltas, Member, Method, Result, Round, Stack, whole_matrices

if TYPE_CHECKING:
    from torch import Tensor


class Regmean(Method):
    """Minimises the differences of each linear layer's outputs on the inputs of every model, in closed form.

    Each model brings the Gram matrices X^T X / n of its layers' inputs: `with: {gram: <folder>}`. The folder holds
    safetensors files with a matrix of (inputs, inputs) by the name of the weight. All models have one of a weight, or
    none has; then it gets the mean, as vectors do. What no input reaches stays at the base. One pass, fp64, one thread.
    RegMean++ is this method with Gram matrices gathered through merged layers.
    """

    name: Literal["regmean"] = "regmean"
    shrink: FiniteFloat = Field(default=0.9, ge=0, le=1)
    """Factor on the elements of a Gram matrix beside its diagonal."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = (
        "Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of Language Models (arXiv:2212.09849)"
    )
    caveat: ClassVar[str] = "Gram matrices of few inputs do not span a layer. What they do not reach stays at the base."
    uses_lapack: ClassVar[bool] = True
    companions: ClassVar[tuple[Companion, ...]] = (Companion("gram", "gram", every=False, negative=True),)

    @property
    def weights_are_shares(self) -> bool:
        """Return that weights are divided by their sum."""
        return True

    @property
    def all_at_once(self) -> str:
        """Return why no merge goes on."""
        return "it keeps no sums of Gram matrices"

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse negative weights, since the closed form divides by them."""
        return [
            Problem(f"model {member.id}", f"weight {member.weight} is negative, and regmean divides by weights",
                    "give regmean a positive weight")
            for member in members
            if member.weight < 0
        ]  # fmt: skip

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole matrices."""
        merge = Round("merge", self._merge, unit=whole_matrices, companions=("gram",), holds=self._holds)
        return (merge,)

    def _holds(self, stack: Stack) -> int:
        """Return the bytes of fp64 matrices, some of them as wide and as high as a row is long."""
        parameter = stack.parameter
        return 8 * (5 + -(-6 * parameter.columns**2 // parameter.numel)) if parameter.is_matrix else 16

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        import torch

        from ties_ray.kernels.linalg import over

        width = context.parameter.columns
        plain = torch.zeros(context.stop - context.start, dtype=torch.float64, device=context.kernels.device)
        above = below = plain[:0]
        for model, delta in deltas:
            weight = context.weights[model]
            gram = deltas.companion("gram")
            plain += delta.double().mul_(weight)
            if gram is not None:
                own = self._shrunk(gram.double().view(width, width)).mul_(weight)
                tau = _by_rows(delta.double().view(context.parameter.shape), context)
                above, below = (tau @ own + above, own + below) if len(below) else (tau @ own, own)
        if not len(below):
            return Result(merged=plain.mul_(self.lambda_ / (sum(context.weights) or 1.0)).float())
        merged = _by_rows(over(above, below), context).mul(self.lambda_)
        return Result(merged=merged.float().reshape(-1))

    def _shrunk(self, gram: "Tensor") -> "Tensor":
        diagonal = gram.diagonal().clone()
        gram.mul_(self.shrink)
        gram.diagonal().copy_(diagonal)
        return gram


def _by_rows(matrix: "Tensor", context: Context) -> "Tensor":
    """Return a matrix as (outputs, inputs), or one of that form as the parameter has it."""
    return matrix.T if context.parameter.kind == "transposed" else matrix
