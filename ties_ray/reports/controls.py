"""The record of controls: what a merge would be without each model, and with signs drawn by chance."""

from ties_ray.reports.records import Report


class LeftOut(Report):
    """The merge without one model."""

    name: str
    """The model's short name."""
    change: float
    """Norm of the difference between the merged changes with and without it, over the norm of the one with it."""
    cosine: float
    """Cosine of the merged changes with and without it."""


class ByChance(Report):
    """Merges of the same models, where each element's changes have their signs drawn by chance."""

    draws: int
    norm: float
    """Mean norm of the merged change over these draws, relative to that of the merge."""
    least: float
    most: float
    """The smallest and the largest of them."""


class Controls(Report):
    """Merges beside the one that was made, of the elements that it looked at."""

    left_out: list[LeftOut]
    """One entry a model, the largest change first; empty for a single model."""
    by_chance: ByChance
    elements: int
    """Elements that were merged again."""
