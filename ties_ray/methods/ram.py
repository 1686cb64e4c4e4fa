"""RAM and RAM+ (arXiv:2601.13572): average what several models change, keep whole what only one changes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.kernels import ONE, SignedSums, Term, WeightedSum
from ties_ray.methods import Context, Deltas, Key, Method, Result, Round, bytes_each

if TYPE_CHECKING:
    from torch import Tensor


class Ram(Method):
    """Averages each element over the models that change it by more than `epsilon`; lambda scales that mean.

    What only one model changes stays whole, and `plus` makes it larger by what that model shares with others. One
    pass; with `plus` four. Epsilon is absolute: the default drops every change below 1e-5, which may be most of them.
    """

    name: Literal["ram"] = "ram"
    epsilon: FiniteFloat = Field(default=1e-5, ge=0)
    """A model changes an element where its change is larger than this."""
    plus: bool = False
    """RAM+: multiply what only one model changes by 1 + r min(rho, alpha).

    rho: the number of elements that the model shares, over the number that it alone changes.
    """
    r: FiniteFloat = Field(default=0.1, ge=0)
    """Strength of RAM+; no effect without `plus`."""
    alpha: FiniteFloat = Field(default=0.2, ge=0)
    """Bound on rho; no effect without `plus`."""
    scope: Literal["model", "tensor"] = "tensor"
    """Where RAM+ counts: in each parameter for itself, or in the whole model."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Behavior Knowledge Merge in Reinforced Agentic Models, 2026 (arXiv:2601.13572)"
    caveat: ClassVar[str] = "Epsilon is absolute. Small changes, as of long training at a low rate, are all dropped."
    uses_weights: ClassVar[bool] = False

    @property
    def all_at_once(self) -> str:
        """Return why RAM+ needs its models again; sums and counts go on."""
        return "plus: true counts what each model alone changes" if self.plus else ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge, after a count of shared elements where RAM+ needs it."""
        if not self.plus:
            return (Round("merge", self._merge, holds=bytes_each(16), state="sums"),)
        count = Round("count", self._count, holds=bytes_each(24), passes=2)
        return count, Round("merge", self._merge_plus, holds=bytes_each(24), passes=2)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        total, counts = self._mean(deltas, context)
        return Result(merged=total.div_(counts.clamp_(min=1)).mul_(self.lambda_))

    def _mean(self, deltas: Deltas, context: Context) -> "tuple[Tensor, Tensor]":
        """Return the sum of the changes above epsilon (fp32), and how many they are (int32)."""
        state = deltas.fold(SignedSums(self._terms([1.0] * len(context.members))))
        return state["sum"], (state["counts"] & 0xFFFF) + (state["counts"] >> 16)

    def _terms(self, factors: Sequence[float]) -> tuple[Term, ...]:
        bits = self._bits()
        return tuple(Term(factor, bits, strict=True) for factor in factors)

    def _bits(self) -> int:
        """Return the magnitude bits of the largest fp32 number that is not above epsilon."""
        import torch

        rounded = torch.tensor(self.epsilon, dtype=torch.float32)
        return int(rounded.view(torch.int32)) - (float(rounded) > self.epsilon)

    def _count(self, deltas: Deltas, context: Context) -> Result:
        import torch

        _, counts = self._mean(deltas, context)
        bits, sums = self._bits(), {}
        for model, delta in deltas:
            changed = (delta.view(torch.int32) & 0x7FFF_FFFF) > bits
            for name, flags in (("alone", counts == 1), ("shared", counts > 1)):
                sums[Key(name, (model,), self.scope == "model")] = int((changed & flags).sum()) * ONE
        return Result(sums=sums)

    def _merge_plus(self, deltas: Deltas, context: Context) -> Result:
        total, counts = self._mean(deltas, context)
        mean = total.div_(counts.clamp(min=1))
        factors = [self._factor(context, model) for model in range(len(context.members))]
        own = deltas.fold(WeightedSum(self._terms(factors)))["sum"]
        return Result(merged=own.where(counts == 1, mean).mul_(self.lambda_))

    def _factor(self, context: Context, model: int) -> float:
        alone, shared = (context.sum(name, model, whole=self.scope == "model") for name in ("alone", "shared"))
        ratio = min(shared, self.alpha * alone) / alone if alone else 0.0
        return 1 + self.r * ratio
