"""An example of ranks: each parameter becomes the middle value of one model plus the smallest of another."""

from typing import ClassVar, Literal

import torch

from ties_ray.methods import Context, Deltas, Key, Method, Result, Round, every_element, whole_rows


class Middles(Method):
    """Sets every element to the median of the first model's parameter plus the least value of the second model."""

    name: Literal["middles"] = "middles"
    rows: bool = False
    """Whether the values are ranked in whole rows."""

    scales: ClassVar[Literal["sum", "mean"]] = "sum"
    paper: ClassVar[str] = "none"

    def rounds(self) -> tuple[Round, ...]:
        unit = whole_rows if self.rows else every_element
        return Round("rank", self._rank, ranks=self._ranks, unit=unit), Round("merge", self._merge)

    def _ranks(self, key: Key, number: int) -> tuple[int, ...]:
        return (number // 2, 0) if key.name == "middle" else (0,)

    def _rank(self, deltas: Deltas, context: Context) -> Result:
        first, second = (delta.clone() for _, delta in deltas)
        steps = (second * 1024).round().int()
        return Result(
            ranked={Key("middle"): first, Key("least", (1,), whole=True): steps}, statistics={"seen": len(first)}
        )

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        middle, least = context.ranked("middle"), context.ranked("least", 1, whole=True)
        value = middle[0] + least[0] / 1024 if context.statistics["seen"] else 0.0
        return Result(merged=torch.full((context.stop - context.start,), value))
