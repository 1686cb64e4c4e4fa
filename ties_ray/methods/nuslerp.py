"""NuSLERP (mergekit): SLERP with the weights of the two models, for whole parameters or for each row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from ties_ray.errors import Problem
from ties_ray.methods import (
    Context,
    Deltas,
    Member,
    Method,
    Result,
    Round,
    bytes_each,
    whole_rows,
)
from ties_ray.methods._spherical import pair_of, pair_sums, weighted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

STRAIGHT = 1e-8
"""Where the sine of an angle is no larger than this, the arc is a straight line."""


class NuSlerp(Method):
    """Goes along the arc between two models as far as their weights say: the share w2 / (w1 + w2).

    Each arc joins whole parameters (two passes) or single rows (one pass). Between opposite or zero vectors it is a
    straight line. Nearly opposite vectors of unlike lengths give a result many times as long as either.
    """

    name: Literal["nuslerp"] = "nuslerp"
    vectors: Literal["weights", "task_vectors"] = "task_vectors"
    """What lies on the arc: what the models changed of the base, as mergekit has it with a base, or their weights."""
    arcs: Literal["tensor", "row"] = "tensor"
    """One arc for each parameter, or one for each row along the last axis."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Goddard et al. 2024, Arcee's MergeKit (arXiv:2403.13257)"
    caveat: ClassVar[str] = "Nearly opposite vectors of unlike lengths give a result many times as long as either."

    @property
    def weights_are_shares(self) -> bool:
        """Return that weights are divided by their sum."""
        return True

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse any number of models but two."""
        if len(members) == 2:
            return []
        return [Problem("models", f"nuslerp takes two models, not {len(members)}", "use multislerp or karcher")]

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of rows, or the angles and the merge of whole parameters."""
        needs_base = self.vectors == "weights"
        if self.arcs == "row":
            return (
                Round("merge", self._rows, unit=whole_rows, needs_base=needs_base, holds=bytes_each(72)),
            )  # fmt: skip
        return (
            Round("angles", pair_sums, needs_base=needs_base, holds=bytes_each(8)),
            Round("merge", self._merge, needs_base=needs_base, holds=bytes_each(16)),
        )

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        import numpy as np

        square, other, dot = pair_of(context)
        both = square * other  # these integers are exact, and so is the sine
        sine = np.array(((both - dot * dot) / both) ** 0.5 if both else 0.0)
        cosine = np.copysign((dot * dot / both) ** 0.5 if both else 1.0, float(dot > 0) - float(dot < 0))
        *factors, of_base = map(float, self._factors(context, sine, cosine))
        return Result(merged=weighted(deltas, context, factors, of_base).float())

    def _rows(self, deltas: Deltas, context: Context) -> Result:
        import numpy as np
        import torch

        width = context.parameter.shape[-1] if len(context.parameter.shape) > 1 else context.parameter.numel
        changes = [delta.double().cpu().numpy().reshape(-1, width) for _, delta in deltas]
        base = 0.0 if context.base is None else context.base.double().cpu().numpy().reshape(-1, width)
        vectors = [change + base for change in changes]
        lengths = [_lengths(vector) for vector in vectors]
        moved = (lengths[0] > 0) & (lengths[1] > 0)
        left, right = (vector / np.where(moved, size, 1.0) for vector, size in zip(vectors, lengths, strict=True))
        angle = np.where(moved, 2 * np.arctan2(_lengths(left - right), _lengths(left + right)), 0.0)
        of_first, of_second, of_base = self._factors(context, np.sin(angle), np.cos(angle))
        merged = of_first * changes[0] + of_second * changes[1] + of_base * base
        return Result(merged=torch.from_numpy(merged).reshape(-1).to(context.kernels.device).float())

    def _factors(self, context: Context, sine: "Numbers", cosine: "Numbers") -> "tuple[Numbers, Numbers, Numbers]":
        """Return what the two changes and the base are multiplied by, for each arc."""
        import numpy as np

        first, second = context.weights
        share = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
        straight = sine <= STRAIGHT
        angle = np.where(straight, 1.0, np.arctan2(sine, cosine))
        back, forth, divisor = (1 - share) * angle, share * angle, np.where(straight, 1.0, sine)
        # what the other two factors sum to beyond 1
        of_base = np.where(straight, 0.0, 2 * np.sin(back / 2) * np.sin(forth / 2) / np.cos(angle / 2))
        of_first = np.where(straight, 1 - share, np.sin(back) / divisor)
        return of_first, np.where(straight, share, np.sin(forth) / divisor), of_base


def _lengths(rows: "Numbers") -> "Numbers":
    """Return the norm of each row, (rows, 1). numpy adds up a row in one order, however many rows there are."""
    import numpy as np

    lengths: Numbers = np.sqrt(np.square(rows).sum(-1, keepdims=True))
    return lengths
