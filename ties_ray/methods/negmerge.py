"""NegMerge (Kim et al., ICML 2025): forget what fine-tunes agree on."""

from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.kernels import SignedSums, Term
from ties_ray.methods import Context, Deltas, Method, Result, Round, bytes_each


class NegMerge(Method):
    """Subtracts lambda times the mean change, where the changes of all models have one sign; one pass.

    It unlearns: the models are fine-tunes on what the base should forget. A single zero breaks the agreement, so many
    models, 16-bit models and adapters of unlike targets leave little or nothing.
    """

    name: Literal["negmerge"] = "negmerge"
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the mean that is subtracted; a negative one adds it."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = (
        "Kim et al. 2025, NegMerge: Sign-Consensual Weight Merging for Machine Unlearning (arXiv:2410.05583)"
    )
    caveat: ClassVar[str] = "A single zero breaks the agreement, so adapters of unlike targets leave nothing."
    uses_weights: ClassVar[bool] = False

    @property
    def all_at_once(self) -> str:
        """Return nothing: sums and counts go on."""
        return ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the one round."""
        return (Round("merge", self._merge, holds=bytes_each(4), state="sums"),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        count = len(context.members)
        state = deltas.fold(SignedSums((Term(1.0),) * count))
        agrees = (state["counts"] == count) | (state["counts"] == count << 16)
        return Result(merged=state["sum"].mul_(-self.lambda_ / count).masked_fill_(~agrees, 0.0))
