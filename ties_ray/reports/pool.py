"""The record of how the models of a pool relate."""

from collections.abc import Sequence

from ties_ray.reports.records import Report


class ComparedModel(Report):
    """One model among others."""

    name: str
    """A short name that no other has (`names.model_names`)."""
    uri: str
    norm: float
    """Norm of its task vector."""
    mean_cosine: float
    """Mean cosine with the others."""
    nearest: str
    """The model with which it has the largest cosine; empty where there is no other."""
    nearest_cosine: float
    against: float
    """Share of its changed elements that go against the sign of the sum of all models."""
    rank: int | None = None
    """Components of its low-rank changes at most; None where it has none."""
    rank_99: int | None = None
    """Components that hold 99 % of the squared norm of its low-rank changes."""
    spectrum: list[float] = []
    """Share of each component in that squared norm, falling, over all parameters."""
    not_finite: int = 0
    """Values that are NaN or Inf. They count as no change here, and a merge refuses them."""


class Remark(Report):
    """Something that stands out."""

    kind: str
    """`dead`, `duplicate`, `near duplicate`, `conflict`, `outlier`, `against` or `stranger`."""
    models: list[str]
    value: float
    """dead and outlier: norm over the median. against: share of signs. stranger: mean cosine. Else a cosine."""
    text: str
    """The same for people."""


class PoolComparison(Report):
    """How the models of a pool relate."""

    models: list[ComparedModel]
    remarks: list[Remark]
    """What stands out, the most serious first."""
    cosines: list[list[float]]
    """Row i holds the cosines of model i with the models before it."""
    conflicts: list[list[float]]
    """Row i holds, likewise, the share of common elements that are changed in different directions."""
    parameters: int
    """Parameters that any model changes."""
    signs_of: int
    """Elements whose signs were looked at: all of whole models, some rows of low-rank changes."""
    bytes_read: int
    refused: dict[str, list[str]] = {}
    """Reasons why models were left out, by URI."""
    notes: list[str] = []


def text_of(kind: str, models: Sequence[str], value: float, share: float = 0.0) -> str:
    """Return a remark for people. share: of the common signs of two models in conflict, how many differ."""
    first, listed = models[0], " = ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")
    if kind == "dead":
        return f"{first} changes nothing" if value == 0 else f"{first} changes {value:.1e} of the median norm"
    return {
        "duplicate": f"{listed}: the same change (cosine {value:.6f})",
        "near duplicate": f"{listed.replace(' = ', ' ~ ')}: nearly the same direction (cosine {value:.4f} or more)",
        "conflict": f"{first} against {models[-1]}: cosine {value:.3f}, {share:.0%} of common signs differ",
        "outlier": f"{first}: its norm is {value:.3g} times the median",
        "against": f"{first}: {value:.0%} of its changes go against the sum of all",
        "stranger": f"{first}: its mean cosine with the others is {value:.3f}",
    }[kind]
