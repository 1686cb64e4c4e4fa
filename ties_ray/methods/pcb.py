"""PCB-Merging (Du et al., NeurIPS 2024): values weigh by how they compete within a model and between models."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.methods import Context, Deltas, Key, Method, Result, Round, bytes_each

if TYPE_CHECKING:
    from torch import Tensor

TAIL = 1e-4
"""Share of the magnitudes at either end that are clipped."""
LEAST_LOG = -210
"""No score has a smaller logarithm: the product of two fp32 numbers is 2**-298 or more."""


class Pcb(Method):
    """Weighs values by exp(N z^2) tanh(d_i sum d_j), z the clipped magnitude from 0 to 1, and keeps the top `ratio`.

    Weights of a model run from 0 at the cut to 1 at its highest score; lambda scales their weighted mean.
    Reads the models five times, twice each for magnitudes, scores and the merge in a small memory.
    A model without a positive score at the cut adds nothing. Negative scores count where the cut lies below zero.
    """

    name: Literal["pcb"] = "pcb"
    ratio: FiniteFloat = Field(default=0.1, gt=0, le=1)
    """Share of each task vector that has a weight."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Du et al. 2024, Parameter Competition Balancing for Model Merging (arXiv:2410.02396)"
    caveat: ClassVar[str] = "The exponent grows with the models, so among many only the largest values of each count."
    uses_weights: ClassVar[bool] = False

    def rounds(self) -> tuple[Round, ...]:
        """Return the clipping of magnitudes, the cut of scores, and the merge."""
        return (
            Round("magnitudes", self._magnitudes, ranks=_tails, holds=lambda stack: 4 * stack.num_models),
            Round(
                "scores",
                self._scores,
                ranks=self._cut,
                passes=2,
                holds=lambda stack: 60 + 4 * stack.num_models,
            ),
            Round("merge", self._merge, passes=2, holds=bytes_each(76)),
        )

    def _magnitudes(self, deltas: Deltas, context: Context) -> Result:
        return Result(ranked={Key("magnitude", (model,), whole=True): delta.abs() for model, delta in deltas})

    def _cut(self, key: Key, number: int) -> tuple[int, int]:
        return min(int(number * (1 - self.ratio)), number - 1), number - 1

    def _scores(self, deltas: Deltas, context: Context) -> Result:
        scored = self._scored(deltas, context)
        return Result(ranked={Key("score", (model,), whole=True): score for model, _, score in scored})

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        import torch

        above = torch.zeros(context.stop - context.start, dtype=torch.float64, device=context.kernels.device)
        below = torch.zeros_like(above)
        for model, clipped, score in self._scored(deltas, context):
            share = self._share(score, context.ranked("score", model, whole=True), _scale(context))
            below += share
            above += share.mul_(clipped)
        return Result(merged=above.div_(below.clamp_(min=1e-12)).mul_(self.lambda_).float())

    def _scored(self, deltas: Deltas, context: Context) -> "Iterator[tuple[int, Tensor, Tensor]]":
        """Yield (model, clipped delta in fp64, score).

        A score is an int32 number: its sign is that of the score, and its size the logarithm above LEAST_LOG in units
        of 1 / `_scale`. So it orders as the score does for any number of models, and overflows for none.
        """
        import torch

        from ties_ray.kernels.elementary import log_tanh

        total = torch.zeros(context.stop - context.start, dtype=torch.float64, device=context.kernels.device)
        for _, delta in deltas:
            total += delta
        for model, delta in deltas:
            low, high = context.ranked("magnitude", model, whole=True)
            product = total * delta
            clipped = delta.abs().clamp_(low, high).double()
            steep = ((clipped - low) / (high - low)).square_() if high > low else torch.zeros_like(clipped)
            steep *= len(context.members)
            steep += log_tanh(product.abs().clamp_(min=2.0**-300))
            score = steep.sub_(LEAST_LOG).mul_(_scale(context)).round_().mul_(product.sign_()).int()
            yield model, clipped.mul_(delta.sign()), score

    def _share(self, score: "Tensor", bounds: tuple[float, ...], scale: float) -> "Tensor":
        """Return the weight of each value (fp64), linear in its score between both bounds."""
        from ties_ray.kernels.elementary import exp

        cut, top = bounds
        if cut == top:
            return (score == top).logical_and_(score > 0).double()
        largest = max(abs(cut), abs(top))

        def linear(score: "Tensor") -> "Tensor":
            return exp((score.abs() - largest).clamp_(max=0.0).div_(scale)).mul_(score.sign())

        ends = linear(score.new_tensor([cut, top]).double())
        share = linear(score.double()).sub_(ends[0]).div_(ends[1] - ends[0])
        return share.masked_fill_(score <= cut, 0.0)


def _tails(key: Key, number: int) -> tuple[int, int]:
    """Return the ranks of the magnitudes that are clipped to."""
    return int(number * TAIL), max(0, int(number * (1 - TAIL) - 1))


def _scale(context: Context) -> float:
    """Return the parts of a unit of logarithms that an int32 number can tell apart, a power of 2."""
    return 2.0 ** (31 - (len(context.members) - LEAST_LOG).bit_length())
