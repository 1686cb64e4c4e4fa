"""LoRA-LEGO (Zhao et al., ICLR 2025): the ranks of all adapters are units; clusters of units are the merged ranks."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Method, Result, Round, Stack, whole_matrices

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**12
"""Units whose distances are computed at a time."""


class LoraLego(Method):
    """Clusters the rank-one units of all adapters by k-means; the centroids, at the units' mean norm, are the result.

    Lambda scales the result, which is multiplied by the root of mean rank over clusters; vectors get the mean.
    All factors lie in memory. Ranks in another order change nothing, other factors of the same change do.
    Of a whole model the singular triplets are the units. Where there are fewer units than clusters, each unit stays.
    """

    name: Literal["lora_lego"] = "lora_lego"
    rank: int | None = Field(default=None, ge=1)
    """Clusters, the rank of the result. By default the mean rank of the adapters."""
    balance: bool = False
    """Whether both halves of a unit get the same norm before units are compared."""
    iterations: int = Field(default=100, ge=1)
    """The most steps of k-means."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the merged change."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Zhao et al. 2025, Merging LoRAs like Playing LEGO (arXiv:2409.16167)"
    caveat: ClassVar[str] = "Other factors of the same change give another result."
    uses_weights: ClassVar[bool] = False
    uses_lapack: ClassVar[bool] = True

    def rounds(self) -> tuple[Round, ...]:
        """Return the merge of whole matrices."""
        return (Round("merge", self._merge, unit=whole_matrices, holds=self._holds),)

    def _holds(self, stack: Stack) -> int:
        """Return the bytes of all factors, of all units, and of some in fp64; and a decomposition of whole models."""
        if not stack.parameter.is_matrix:
            return 4
        clusters = stack.columns if self.rank is None else self.rank
        units = (8 * stack.columns + 8 * min(stack.columns, CHUNK) + 24 * clusters) * sum(stack.parameter.shape)
        return 16 + 60 * (stack.num_whole > 0) + units // stack.parameter.numel

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        shape = context.parameter.shape
        if not context.parameter.is_matrix:
            total = deltas.fold(WeightedSum((Term(),) * len(context.members)))["sum"]
            return Result(merged=total.mul_(self.lambda_ / len(context.members)))
        import torch

        from ties_ray.kernels.linalg import svd

        units: list[Tensor] = []
        for _, factors, delta in deltas.factored():
            if factors:
                units.append(_units(factors.left, factors.right, factors.scale))
            elif delta is not None:
                parts = svd(delta.view(shape))
                units.append(
                    _units(parts.left.mul_(parts.values.sqrt()), parts.right.T.mul(parts.values.sqrt()).T, 1.0)
                )
        units = [each for each in units if len(each)]
        if not units:
            return Result(merged=torch.zeros(context.parameter.numel, device=context.kernels.device))
        mean = sum(map(len, units)) / len(units)
        clusters = min(round(mean) if self.rank is None else self.rank, sum(map(len, units)))
        centres = self._centres(torch.cat(units), shape[0], clusters).mul_((mean / clusters) ** 0.25)
        merged = centres[:, : shape[0]].T @ centres[:, shape[0] :]
        return Result(merged=merged.mul_(self.lambda_).float().reshape(-1).to(context.kernels.device))

    def _centres(self, units: "Tensor", rows: int, clusters: int) -> "Tensor":
        """Return the centroids (fp64) of units (fp32, a row each), at the mean norm of their units."""
        import torch

        if self.balance:
            sizes = units[:, :rows].norm(dim=1, keepdim=True), units[:, rows:].norm(dim=1, keepdim=True)
            ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), (sizes[1] / sizes[0]).sqrt(), 1.0)
            units[:, :rows] *= ratio
            units[:, rows:] /= ratio
        chunks, centres = torch.split(units, CHUNK), units[:clusters].double()
        labels = torch.full((len(units),), -1)
        for _ in range(self.iterations):
            nearest = torch.cat([_nearest(part.double(), centres) for part in chunks])
            if torch.equal(nearest, labels):
                break
            labels = nearest
            counts = torch.bincount(labels, minlength=clusters)
            sums = torch.zeros_like(centres)
            for part, own in zip(chunks, torch.split(labels, CHUNK), strict=True):
                sums.index_add_(0, own, part.double())
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        norms = torch.cat([part.double().norm(dim=1) for part in chunks])
        means = torch.zeros(clusters, dtype=torch.float64).index_add_(0, labels, norms)
        means /= torch.bincount(labels, minlength=clusters).clamp_(min=1)
        lengths = centres.norm(dim=1)
        return centres * torch.where((means > 0) & (lengths > 0), means / lengths, 1.0)[:, None]


def _units(left: "Tensor", right: "Tensor", scale: float) -> "Tensor":
    """Return column j of the left factor beside row j of the right one, each with the root of the scale (fp32, CPU)."""
    import torch

    root = abs(scale) ** 0.5
    return torch.cat((left.T * (root if scale >= 0 else -root), right * root), 1).float().cpu()


def _nearest(units: "Tensor", centres: "Tensor") -> "Tensor":
    """Return the number of the nearest centroid of each unit, the lowest of equals."""
    return (centres.square().sum(1) - 2 * (units @ centres.T)).argmin(1)
