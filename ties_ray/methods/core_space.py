"""Core Space (Panariello et al., NeurIPS 2025): merge adapters as small matrices between common bases."""

from typing import ClassVar, Literal

from pydantic import Field

from ties_ray.methods import Context, Deltas, Stack
from ties_ray.methods._inside import Inner, Inside, Turned, between, span_bytes


class CoreSpace(Inside):
    """Merges U^T d_i V by `inner`, with U and V the singular vectors of all B and of all A side by side.

    Nothing is lost. The small matrices are as wide as the sum of all ranks, or as the matrix itself where that is less.
    Thresholds of `inner` count over all small matrices. fp64 LAPACK, one thread.
    A method that looks at elements depends on the bases, and these on how B and A share a scale: B has it all.
    Of a whole model, the change itself stands for both B and A.
    """

    name: Literal["core_space"] = "core_space"
    inner: Inner = Field(default="tsv", validate_default=True)
    """The method that merges, with its lambda: a name, or a section with its fields."""

    paper: ClassVar[str] = "Panariello et al. 2025, Low-Rank Model Merging in Core Space (arXiv:2509.17786)"
    caveat: ClassVar[str] = (
        "The sum of ranks may reach the width of a matrix, as 64 adapters of rank 16 do at 1024. Then nothing is saved."
    )
    uses_lapack: ClassVar[bool] = True

    def holds(self, stack: Stack) -> int:
        """Return the bytes of all columns and all rows, their decompositions, and a turned matrix."""
        return 36 + span_bytes(stack, 0) + span_bytes(stack, 1)

    def turned(self, deltas: Deltas, context: Context) -> Turned:
        """Return the matrices U^T d_i V."""
        from ties_ray.kernels.linalg import Span

        rows, columns = context.parameter.shape
        left, right = (Span(side, context.kernels.device) for side in (rows, columns))
        for _, factors, delta in deltas.factored():
            if factors:
                left.add(factors.left.double().mul_(factors.scale))
                right.add(factors.right.T)
            elif delta is not None:
                left.add(delta.view(rows, columns))
                right.add(delta.view(rows, columns).T)
        return between(deltas, left.basis(), right.basis().T)
