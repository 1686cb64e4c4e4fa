"""SLERP (Shoemake 1985, as mergekit applies it to models): go from one model to another along an arc."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.methods import Context, Deltas, Member, Method, Result, Round, bytes_each
from ties_ray.methods._spherical import pair_of, pair_sums, weighted


class Slerp(Method):
    """Goes the share `t` of the arc from the first of two models to the second, parameter by parameter; two passes.

    It is linear where both point nearly the same or the opposite way, or where one is zero. Whole weights of two
    fine-tunes of one base are nearly parallel, so there SLERP is mostly a plain average.
    """

    name: Literal["slerp"] = "slerp"
    t: FiniteFloat | None = Field(default=None, ge=0, le=1)
    """Share of the arc: 0 gives the first model, 1 the second. Default: by the weights, w2 / (w1 + w2)."""
    vectors: Literal["weights", "task_vectors"] = "weights"
    """What lies on the arc: the models' weights, as in mergekit, or what they changed of the base."""
    threshold: FiniteFloat = Field(default=0.9995, ge=0, le=1)
    """Linear where the magnitude of the cosine is above this."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Shoemake 1985, Animating Rotation with Quaternion Curves (SIGGRAPH)"
    caveat: ClassVar[str] = "Two fine-tunes of one base are nearly parallel, so it is a plain average."

    @property
    def weights_are_shares(self) -> bool:
        """Return that weights are divided by their sum."""
        return True

    @property
    def base_cancels(self) -> bool:
        """Return whether it joins the weights themselves."""
        return self.vectors == "weights"

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse any number of models but two, and weights beside `t` or of no share."""
        if len(members) != 2:
            return [Problem("models", f"slerp takes two models, not {len(members)}", "use multislerp or karcher")]
        if self.t is None:
            wrong = any(member.weight < 0 for member in members) or not sum(member.weight for member in members)
            trouble = "the weights give no share of the arc between 0 and 1"
            return [Problem("models", trouble, "change a weight")] if wrong else []
        return [
            Problem(
                f"model {member.id}",
                f"weight {member.weight} stands beside method.t, which gives the share of the arc",
                "leave the weight out, or method.t",
            )
            for member in members
            if member.weight != 1
        ]

    def rounds(self) -> tuple[Round, ...]:
        """Return the angles and the merge."""
        needs_base = self.vectors == "weights"
        return (
            Round("angles", pair_sums, needs_base=needs_base, holds=bytes_each(8)),
            Round("merge", self._merge, needs_base=needs_base, holds=bytes_each(16)),
        )

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        *factors, of_base = self._factors(context)
        return Result(merged=weighted(deltas, context, factors, of_base).float())

    def _factors(self, context: Context) -> tuple[float, float, float]:
        """Return what the two changes and the base are multiplied by. The sums are exact, and so is the sine."""
        square, other, dot = pair_of(context)
        both = square * other
        cosine = math.copysign(math.sqrt(dot * dot / both), dot) if both else 1.0
        sine = math.sqrt((both - dot * dot) / both) if both else 0.0
        share = context.weights[1] / sum(context.weights) if self.t is None else self.t
        if not sine or abs(cosine) > self.threshold:
            return 1 - share, share, 0.0
        angle = math.atan2(sine, cosine)
        back, forth = (1 - share) * angle, share * angle
        of_base = 2 * math.sin(back / 2) * math.sin(forth / 2) / math.cos(angle / 2)  # the other two factors' sum - 1
        return math.sin(back) / sine, math.sin(forth) / sine, of_base
