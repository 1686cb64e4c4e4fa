"""NearSwap (alchemonaut; as mergekit has it): take over another model's values where they are near."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.methods import Context, Deltas, Member, Method, Result, Round


class NearSwap(Method):
    """Moves each weight of the base towards the one model, by `t` at most: nearer values are taken over whole.

    One pass. There is no lambda: choose `t` by the size of the changes, since above the largest the result is the model
    itself.
    """

    name: Literal["nearswap"] = "nearswap"
    t: FiniteFloat = Field(default=1e-4, gt=0)
    """The most that a weight moves, in units of the weights."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "NearSwap by alchemonaut, as in mergekit (arXiv:2403.13257)"
    caveat: ClassVar[str] = "A `t` above the largest change gives the model itself."
    uses_weights: ClassVar[bool] = False

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse any number of models but one, and a weight."""
        if len(members) != 1:
            return [
                Problem(
                    "models", f"nearswap takes one model beside the base, not {len(members)}", "drop the models but one"
                )
            ]
        return super().problems(members)

    def rounds(self) -> tuple[Round, ...]:
        """Return the one round."""
        return (Round("merge", self._merge),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        (merged,) = (delta.clamp(-self.t, self.t) for _, delta in deltas)
        return Result(merged=merged)
