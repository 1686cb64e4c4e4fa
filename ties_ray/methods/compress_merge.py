"""Compress-then-Merge (He et al. 2026): merge adapters in a few shared directions, so that the rank stays small."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.methods import Context, Deltas, Stack
from ties_ray.methods._inside import Inner, Inside, Turned, between

if TYPE_CHECKING:
    from torch import Tensor

    Pair = tuple[Tensor, Tensor]


class CompressMerge(Inside):
    """Merges U^T d_i V by `inner`, U and V the `rank` directions that hold most of all models, and turns it back.

    The directions are those of a Tucker decomposition, by alternation. Any number of models gives this rank.
    What lies outside is lost; a rank as high as all ranks together loses nothing, and core_space does the same faster.
    The factors of all models lie in memory. Whole models are decomposed, which takes long. fp64 LAPACK, one thread.
    """

    name: Literal["compress_merge"] = "compress_merge"
    rank: int = Field(default=16, ge=1)
    """Rank of the result."""
    beta: FiniteFloat = Field(default=1.0, ge=0, le=1)
    """Share of its own norm that each model has in the search: at 0 all count as if equally long."""
    iterations: int = Field(default=1000, ge=1)
    """The most alternations."""
    tolerance: FiniteFloat = Field(default=1e-6, ge=0)
    """The alternation ends where the relative error changes by less."""
    inner: Inner = Field(default="task_arithmetic", validate_default=True)
    """The method that merges, with its lambda: a name, or a section with its fields."""

    paper: ClassVar[str] = "He et al. 2026, Compress-then-Merge (arXiv:2606.03723)"
    caveat: ClassVar[str] = "A flat spectrum loses most of itself, since only `rank` directions stay."
    uses_lapack: ClassVar[bool] = True

    def holds(self, stack: Stack) -> int:
        """Return the bytes of all factors (fp64), of their products with a basis, and of a turned matrix."""
        if not stack.parameter.is_matrix:
            return 4
        rows, columns = stack.parameter.shape
        factors = 16 * stack.columns * (rows + columns)
        stacked = 8 * 7 * sum(side * min(side, stack.num_models * self.rank) for side in (rows, columns))
        return 28 + 60 * (stack.num_whole > 0) + (factors + stacked) // (rows * columns)

    def turned(self, deltas: Deltas, context: Context) -> Turned:
        """Return the matrices U^T d_i V."""
        import torch

        from ties_ray.kernels.linalg import svd

        rows, columns = context.parameter.shape
        pairs: list[Pair] = []
        for _, factors, delta in deltas.factored():
            if factors:
                pairs.append((factors.left.double().mul_(factors.scale), factors.right.double()))
            elif delta is not None:
                parts = svd(delta.view(rows, columns))
                pairs.append((parts.left * parts.values, parts.right.clone()))
        pairs = [pair for pair in pairs if _norm2(pair)]
        if not pairs:
            none = torch.zeros(rows + columns, 0, dtype=torch.float64, device=context.kernels.device)
            return between(deltas, none[:rows], none[:columns].T)
        norms = [math.sqrt(_norm2(pair)) for pair in pairs]
        mean = sum(norms) / len(norms)
        for (left, _), norm in zip(pairs, norms, strict=True):
            left *= self.beta + (1 - self.beta) * mean / norm
        return between(deltas, *self._directions(pairs, rows, columns))

    def _directions(self, pairs: "Sequence[Pair]", rows: int, columns: int) -> "tuple[Tensor, Tensor]":
        """Return U (rows, rank) and V^T (rank, columns)."""
        import torch

        from ties_ray.kernels.linalg import Span

        def leading(side: int, blocks: "Sequence[Tensor]") -> "Tensor":
            span = Span(side, blocks[0].device)
            for block in blocks:
                span.add(block)
            return span.basis(self.rank)

        left = leading(rows, [left @ torch.linalg.qr(right.T).R.T for left, right in pairs])
        right = leading(columns, [right.T @ torch.linalg.qr(left).R.T for left, right in pairs]).T
        whole, errors = sum(map(_norm2, pairs)), list[float]()
        for _ in range(self.iterations):
            left = leading(rows, [own @ (other @ right.T) for own, other in pairs])
            right = leading(columns, [other.T @ (own.T @ left) for own, other in pairs]).T
            kept = sum(float(((left.T @ own) @ (other @ right.T)).square().sum()) for own, other in pairs)
            errors.append(math.sqrt(abs(whole - kept) / whole))
            if len(errors) > 2 and abs(errors[-2] - errors[-1]) < self.tolerance:
                break
        return left, right


def _norm2(pair: "Pair") -> float:
    """Return the squared norm of left @ right."""
    left, right = pair
    return float(((left.T @ left) * (right @ right.T)).sum())
