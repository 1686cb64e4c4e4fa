"""What a method says that it holds is measured by the contract suite."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from tests.tools.families import Family
from tests.tools.merging import merge
from ties_ray import plugins
from ties_ray.methods import Context, Deltas, Method, Result, Round, Stack, nothing_more
from ties_ray.testing import MethodContract
from ties_ray.worker import worker

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


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_a_method_that_decomposes_matrices_says_so(name: str) -> None:
    method = plugins.load("methods", name, Method)
    assert method.uses_lapack == ("kernels.linalg" in inspect.getsource(sys.modules[method.__module__]))


@pytest.mark.parametrize(
    ("name", "returns"), [("average", False), ("magmax", False), ("sce", True), ("pcb", True), ("star", True)]
)
def test_workers_return_large_memory_where_large_tensors_come_and_go(
    name: str, returns: bool, family_of: Callable[..., Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(worker, "return_large_memory", lambda: calls.append(name))
    merge(family_of(num_models=2), tmp_path / "out", name)
    assert bool(calls) == returns


def test_a_method_that_holds_more_than_it_says_fails() -> None:
    contract = MethodContract()
    with pytest.raises(AssertionError, match="round merge"):
        contract.test_no_round_holds_more_than_it_says(Hoarder())
    contract.test_no_round_holds_more_than_it_says(Hoarder(honest=True))
