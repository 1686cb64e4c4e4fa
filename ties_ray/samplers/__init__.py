"""The contract of a sampler: which candidates a search tries next, one file here a sampler.

A sampler knows axes alone: numbers from 0 to 1, and choices by their index. It asks for batches of points, and is told
the loss of each in the order in which it asked. So the same seed and losses give the same points, and a search goes on
from its table.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from ties_ray import plugins
from ties_ray.errors import Problem

__path__ = plugins.search_path("samplers", list(__path__))


class Axis(NamedTuple):
    """One coordinate of the space."""

    choices: int = 0
    """Number of choices; 0 for a number in [0, 1]."""
    start: float = 0.5
    """Where the recipe as it stands lies: a number in [0, 1], or the index of a choice."""


Point = tuple[float, ...]
"""A number in [0, 1] for each axis, or the index of a choice."""


class Draw(ABC):
    """A search under way."""

    @abstractmethod
    def ask(self, most: int) -> list[Point]:
        """Return the next batch. No point at all ends the search.

        most: points that are left of the budget. The caller drops what exceeds it, and then asks no more.
        """

    @abstractmethod
    def tell(self, points: Sequence[Point], losses: Sequence[float | None]) -> None:
        """Take the losses of a whole batch, in the order asked. The smallest is best. None means that it has none."""


class Sampler(BaseModel, ABC):
    """A sampler with its parameters. Subclasses add fields, among them `name: Literal["..."]`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True, use_attribute_docstrings=True
    )

    name: str
    library: ClassVar[str] = ""
    """The module that it needs and that not every installation has; empty for none."""
    extra: ClassVar[str] = ""
    """The extra of ties-ray that installs it."""

    @abstractmethod
    def begin(self, axes: Sequence[Axis], seed: int) -> Draw:
        """Return a search that begins. Equal seeds give equal points. seed: 0 is a seed as any other."""

    def batch_of(self, axes: Sequence[Axis], budget: int) -> int:
        """Return how many candidates can be evaluated at a time."""
        return budget

    def problems(self, axes: Sequence[Axis], budget: int) -> list[Problem]:
        """Return why it can't search these axes within a budget of candidates."""
        return []


def worst(losses: Sequence[float | None]) -> list[float]:
    """Return the losses, with the worst of them for those that are missing; 0 where all are."""
    most = max((loss for loss in losses if loss is not None), default=0.0)
    return [most if loss is None else loss for loss in losses]
