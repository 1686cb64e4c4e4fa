"""EMR-Merging (Huang et al., NeurIPS 2024): elect one vector of all models."""

from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.kernels import Election, Extremes, Term
from ties_ray.methods import Context, Deltas, Method, Result, Round


class Emr(Method):
    """Elects the sign of the summed changes and keeps the largest change of that sign, element by element; one pass.

    This is the unified vector alone: each model's mask and rescaler, with which the paper rebuilds single models, are
    not written. Without them the vector is larger than an average, so tune lambda: the paper has none.
    """

    name: Literal["emr"] = "emr"
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the unified vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = (
        "Huang et al. 2024, EMR-Merging: Tuning-Free High-Performance Model Merging (arXiv:2405.17461)"
    )
    uses_weights: ClassVar[bool] = False

    @property
    def continues(self) -> bool:
        """Return True: sums and extremes go on."""
        return True

    def rounds(self) -> tuple[Round, ...]:
        """Return the one round."""
        return (Round("merge", self._merge),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        op = Extremes((Term(1.0),) * len(context.members))
        return Result(merged=deltas.elect(op, Election(zero_sign=-1, factor=self.lambda_, merge="max")))
