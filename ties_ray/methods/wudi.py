"""WUDI-Merging (Cheng et al., ICML 2025): the merged change that disturbs the models least, without data."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Method, Result, Round, Stack, whole_matrices
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor

STILL = 1e-12
"""Adam stops where no element of the gradient exceeds this share of the largest of P: all else is rounding error."""


class Wudi(Method):
    """Minimises sum_i |(T - d_i) d_i^T|^2 / |d_i|^2 of each matrix by Adam, from the sum of all task vectors.

    Lambda scales T, which begins as a sum; vectors get the mean. One pass over the models, fp64, one thread.
    Memory and time grow with the square of a row's length: steps on wide matrices take hours, `minimum` takes minutes.
    Identical models stay near their sum with few steps; their minimum is that model.
    """

    name: Literal["wudi"] = "wudi"
    solver: Literal["adam", "minimum"] = "adam"
    """`adam` stops early, as in the paper. `minimum` is the closed form, and steps and rate don't count."""
    steps: int = Field(default=300, ge=1)
    """Steps of Adam."""
    rate: FiniteFloat = Field(default=1e-5, gt=0)
    """Learning rate of Adam: what an element changes in a step at most, about."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "Cheng et al. 2025, Whoever Started the Interference Should End It (arXiv:2503.08099)"
    caveat: ClassVar[str] = "Few steps and the minimum are two different models. Wide matrices take hours."
    uses_lapack: ClassVar[bool] = True
    state_uses_lapack: ClassVar[bool] = True

    @property
    def all_at_once(self) -> str:
        """Return nothing: both solvers need three sums over the models, which go on."""
        return ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole matrices."""
        return (Round("merge", self._merge, unit=whole_matrices, holds=self._holds, state="sums", words=_words),)

    def _holds(self, stack: Stack) -> int:
        """Return the bytes of fp64 matrices, some of them as wide and as high as a row is long."""
        parameter = stack.parameter
        if not parameter.is_matrix:
            return 4
        like_the_parameter, square = (12, 2) if self.solver == "adam" else (5, 6)
        return 8 * (like_the_parameter + -(-square * parameter.shape[1] // parameter.shape[0]))

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        shape = context.parameter.shape
        if not context.parameter.is_matrix:
            total = deltas.fold(WeightedSum(tuple(Term(weight) for weight in context.weights)))["sum"]
            return Result(merged=total.mul_(self.lambda_ / len(context.members)))
        import torch

        total = torch.zeros(shape, dtype=torch.float64, device=context.kernels.device)
        left, gram = total.clone(), total.new_zeros((shape[1],) * 2)
        deltas.resume(total, left, gram)
        for model, delta in deltas:
            tau = delta.view(shape).double().mul_(context.weights[model])
            size = float(tau.square().sum())
            if size:
                own = (tau.T @ tau).div_(size)
                gram += own
                left += tau @ own
                total += tau
                del own
        deltas.keep(total, left, gram)
        merged = self._adam(total, left, gram) if self.solver == "adam" else _minimum(left, gram)
        return Result(merged=merged.mul_(self.lambda_).float().reshape(-1))

    def _adam(self, tau: "Tensor", left: "Tensor", gram: "Tensor") -> "Tensor":
        """Return what the steps make of tau: Adam with betas .9 and .999, epsilon 1e-8, bias corrected."""
        first, second = tau.new_zeros(tau.shape), tau.new_zeros(tau.shape)
        still = STILL * float(left.abs().max())
        for step in range(1, self.steps + 1):
            gradient = (tau @ gram).sub_(left).mul_(2)
            if float(gradient.abs().max()) <= still:
                break
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.999).add_(gradient.square_(), alpha=0.001)
            corrected = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
            tau -= (first / corrected).mul_(self.rate / (1 - 0.9**step))
        return tau


def _words(parameter: Parameter) -> int:
    """Return the words of two fp64 matrices like the parameter and one as wide and as high as a row is long."""
    return 2 * (2 + -(-parameter.shape[1] // parameter.shape[0])) if parameter.is_matrix else 1


def _minimum(left: "Tensor", gram: "Tensor") -> "Tensor":
    """Return P Q^+ for P (m, n) and Q (n, n); an eigenvalue counts where its root is above rounding errors."""
    import torch

    from ties_ray.kernels.linalg import RELATIVE

    values, vectors = torch.linalg.eigh(gram)
    counts = values > max(float(values[-1]), 0.0) * (max(left.shape) * RELATIVE) ** 2
    vectors = vectors[:, counts]
    minimum: Tensor = (left @ vectors).div_(values[counts]) @ vectors.T
    return minimum
