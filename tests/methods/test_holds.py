"""What a method says that it holds is measured by the contract suite."""

from collections.abc import Callable
from typing import ClassVar, Literal

import pytest
import torch

from ties_ray.methods import Context, Deltas, Method, Result, Round, Stack, nothing_more
from ties_ray.testing import MethodContract

Holds = Callable[[Stack], int]


class Hoarder(Method):
    name: Literal["hoarder"] = "hoarder"
    honest: bool = False
    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "none"

    def rounds(self) -> tuple[Round, ...]:
        holds: Holds = (lambda stack: 16 * stack.num_models) if self.honest else nothing_more
        return (Round("merge", self._merge, holds=holds),)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        return Result(merged=torch.stack([delta.double() for _, delta in deltas]).mean(0).float())


def test_a_method_that_holds_more_than_it_says_fails() -> None:
    contract = MethodContract()
    with pytest.raises(AssertionError, match="round merge"):
        contract.test_no_round_holds_more_than_it_says(Hoarder())
    contract.test_no_round_holds_more_than_it_says(Hoarder(honest=True))
