"""The account of one model: the fate of every value that it stores, the same in plan, result and card."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Fate = Literal["merged", "equal", "tied"]
"""The fates of stored values; any other text is the reason why they are left aside."""


class Aside(NamedTuple):
    """Stored values that the merge does not use, for one reason."""

    reason: str
    tensors: int
    elements: int


@dataclass(frozen=True)
class Account:
    """The elements of all tensors that an input stores, by their fate."""

    stored: int = 0
    merged: int = 0
    equal: int = 0
    """Elements with the base's bytes, which are copied from it; in the base's own account all copied elements."""
    tied: int = 0
    """Elements of a second name for the same bytes, which count under the first name."""
    aside: tuple[Aside, ...] = ()

    @property
    def adds_up(self) -> bool:
        """Return whether every stored element has one fate."""
        return self.stored == self.merged + self.equal + self.tied + sum(aside.elements for aside in self.aside)

    @property
    def all_merged(self) -> bool:
        """Return whether every stored element is merged."""
        return self.stored == self.merged

    def set_aside(self, reason: str, tensors: int, elements: int) -> "Account":
        """Return the account where so many merged elements are left aside instead."""
        aside = (*self.aside, Aside(reason, tensors, elements))
        return replace(self, merged=self.merged - elements, aside=aside)

    def __str__(self) -> str:
        """Return one line: `all 1,000 values merged`, or `of 1,000 values 900 merged, 60 tied, 40 left aside ...`."""
        if self.all_merged:
            return f"all {self.stored:,} values merged"
        return f"of {self.stored:,} values {', '.join(self._parts())}"

    def _parts(self) -> Iterator[str]:
        yield f"{self.merged:,} merged"
        if self.equal:
            yield f"{self.equal:,} equal to the base's"
        if self.tied:
            yield f"{self.tied:,} tied"
        for aside in self.aside:
            tensors = f"{aside.tensors} tensor{'s' * (aside.tensors != 1)}"
            yield f"{aside.elements:,} left aside in {tensors} ({aside.reason})"


def account(stored: int, fates: Iterable[tuple[Fate | str, int]]) -> Account:
    """Return the account of an input with so many stored elements; fates: (fate, elements), one or more a tensor."""
    totals = {"merged": 0, "equal": 0, "tied": 0}
    aside: dict[str, tuple[int, int]] = {}
    for fate, elements in fates:
        if fate in totals:
            totals[fate] += elements
        else:
            tensors, before = aside.get(fate, (0, 0))
            aside[fate] = tensors + 1, before + elements
    return Account(stored, **totals, aside=tuple(Aside(reason, *counts) for reason, counts in aside.items()))
