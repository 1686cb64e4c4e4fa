"""MagMax (Marczak et al., ECCV 2024): keep the change of the largest magnitude, element by element."""

from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.methods import Context, Deltas, Method, Result, Round, bytes_each


class MagMax(Method):
    """Keeps, of each element, the change of the largest magnitude, times lambda; one pass.

    Where two changes are equally large, the later model of the recipe wins. With many models nearly every element
    takes an extreme, so the merged change grows with their number: lower lambda.
    """

    name: Literal["magmax"] = "magmax"
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged task vector."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = (
        "Marczak et al. 2024, MagMax: Leveraging Model Merging for Seamless Continual Learning (arXiv:2407.06322)"
    )
    caveat: ClassVar[str] = "Nearly every element takes an extreme once there are many models."
    uses_weights: ClassVar[bool] = False

    @property
    def all_at_once(self) -> str:
        """Return nothing: the largest change so far goes on."""
        return ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the one round."""
        return (Round("merge", self._merge, holds=bytes_each(12), state="largest"),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        import torch

        largest = torch.zeros(context.stop - context.start, device=context.kernels.device)
        deltas.resume(largest)
        for _, delta in deltas:
            largest = torch.where(delta.abs() >= largest.abs(), delta, largest)
        deltas.keep(largest)
        return Result(merged=largest.mul_(self.lambda_))
