"""KnOTS (Stoica et al., ICLR 2025): merge all models in the directions of their common singular value decomposition."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.methods import Context, Deltas, Slice, Stack
from ties_ray.methods._inside import Inner, Inside, Turned, matrix_shape, span_bytes


class Knots(Inside):
    """Decomposes [d_1 .. d_N] = U S [V_1 .. V_N] for each matrix, merges the S V_i by `inner`, and applies U.

    Thresholds of `inner` count over all matrices. A method that is linear gives what it gives without KnOTS.
    fp64 LAPACK, one thread. Adapters are decomposed by their factors, whole models by a square matrix of a column's
    length. Where singular values are equal, a sign election depends on an arbitrary rotation.
    """

    name: Literal["knots"] = "knots"
    inner: Inner = Field(default={"name": "ties", "density": 1.0}, validate_default=True)
    """The method that merges, with its lambda: a name, or a section with its fields."""
    cut: FiniteFloat = Field(default=1e-5, ge=0)
    """Singular values up to this one count as zero."""

    paper: ClassVar[str] = "Stoica et al. 2025, Model merging with SVD to tie the KnOTS (arXiv:2410.19735)"
    caveat: ClassVar[str] = (
        "Equal singular values make an elected sign arbitrary. With many adapters the columns are as many as in "
        "the model."
    )
    uses_lapack: ClassVar[bool] = True

    def holds(self, stack: Stack) -> int:
        """Return the bytes of all columns or of a square matrix, their decomposition, and a turned matrix."""
        return 36 + span_bytes(stack, 0)

    def turned(self, deltas: Deltas, context: Context) -> Turned:
        """Return the matrices S V_i."""
        import torch

        from ties_ray.kernels.linalg import Span

        rows, columns = context.parameter.shape
        span = Span(rows, context.kernels.device)
        for _, factors, delta in deltas.factored():
            if factors:
                triangle = torch.linalg.qr(factors.right.double().T).R
                span.add(factors.left.double() @ (factors.scale * triangle.T))
            elif delta is not None:
                span.add(delta.view(rows, columns))
        basis = span.basis(cut=self.cut)
        shape = matrix_shape(basis.shape[1], columns)

        def matrices() -> Iterator[Slice]:
            for model, factors, delta in deltas.factored():
                if factors:
                    yield Slice(model, (basis.T @ factors.left.double()).mul_(factors.scale) @ factors.right.double())
                elif delta is not None:
                    yield Slice(model, basis.T @ delta.view(rows, columns).double())
                else:
                    yield Slice(model, basis.new_zeros(shape))

        return Turned(shape, matrices, lambda merged: basis @ merged[: basis.shape[1]])
