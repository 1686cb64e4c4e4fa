"""TSV-Merge (Gargiulo et al., CVPR 2025): the leading singular vectors of all models, made orthogonal to each other."""

from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Method, Result, Round, Stack, whole_matrices
from ties_ray.tensors import Parameter


class Tsv(Method):
    """Keeps the leading singular triplets of each matrix of each model, and makes all of them orthogonal.

    Lambda scales a sum; vectors get the mean. One pass in fp64 LAPACK, one thread; all triplets lie in memory.
    More models than a matrix has rows or columns keep one triplet each, and these can't all be orthogonal.
    Duplicates share their directions, and the merge is weaker than their sum.
    """

    name: Literal["tsv"] = "tsv"
    rank: int | None = Field(default=None, ge=1)
    """Triplets of each model and matrix. By default min(m, n) divided by the number of models, at least 1."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Gargiulo et al. 2025, Task Singular Vectors (arXiv:2412.00081)"
    caveat: ClassVar[str] = (
        "More models than a matrix is wide can't be orthogonal. Duplicates come out weaker than their sum."
    )
    uses_lapack: ClassVar[bool] = True

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole matrices."""
        return (Round("merge", self._merge, unit=whole_matrices, holds=self._holds),)

    def _holds(self, stack: Stack) -> int:
        """Return the bytes of a decomposition, and of all triplets with the decomposition of their vectors."""
        num_models, parameter = stack[:2]
        if not parameter.is_matrix:
            return 4
        triplets = num_models * self._rank(parameter, num_models) * sum(parameter.shape)
        return 60 + 30 * triplets // parameter.numel

    def _rank(self, parameter: Parameter, num_models: int) -> int:
        return max(1, min(parameter.shape) // num_models) if self.rank is None else min(self.rank, *parameter.shape)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        shape, count = context.parameter.shape, len(context.members)
        if not context.parameter.is_matrix:
            total = deltas.fold(WeightedSum(tuple(Term(weight) for weight in context.weights)))["sum"]
            return Result(merged=total.mul_(self.lambda_ / count))
        import torch

        from ties_ray.kernels.linalg import Svd, polar, svd, svd_of_factors

        rank = self._rank(context.parameter, count)
        triplets = []
        for model, factors, delta in deltas.factored():
            if factors:
                weight = factors.scale * context.weights[model]
                triplets.append(svd_of_factors(factors.left.double().mul_(weight), factors.right, rank))
            elif delta is not None:
                parts = svd(delta.view(shape).double().mul_(context.weights[model]), rank)
                triplets.append(Svd(*(part.clone() for part in parts)))  # a view would keep the whole decomposition
        if not triplets:  # no adapter changes this matrix
            return Result(merged=torch.zeros(context.parameter.numel, device=context.kernels.device))
        left = polar(torch.cat([parts.left for parts in triplets], 1))
        left *= torch.cat([parts.values for parts in triplets])
        right = polar(torch.cat([parts.right for parts in triplets]))
        return Result(merged=(left @ right).mul_(self.lambda_).float().reshape(-1))
