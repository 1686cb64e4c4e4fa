from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import held, stored
from tests.tools.oracles.adapters import Rule, added, dense, knots
from tests.tools.oracles.electing import ties
from ties_ray.methods import Member
from ties_ray.methods.knots import Knots
from ties_ray.testing import MethodContract

SUM = {"name": "task_arithmetic"}


class TestKnots(MethodContract):
    @pytest.fixture
    def method(self) -> Knots:
        return Knots()


class TestKnotsWithTrim(MethodContract):
    @pytest.fixture
    def method(self) -> Knots:
        return Knots(inner={"name": "ties", "density": 0.4, "zero_sum": "majority"})


def trimmed(density: float) -> Rule:
    return lambda deltas: ties(None, deltas, density=density).delta


def test_a_sum_is_what_it_is_without_knots() -> None:
    held.check(Knots(inner=SUM), lambda family: knots(family.base, family.models, rule=added))


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_the_merge_of_adapters_is_the_oracles(density: float, tmp_path: Path) -> None:
    # The oracle counts the signs of noise where an adapter lacks a module, so all have the same modules here.
    alike = {"hidden": 16, "targets": (("q_proj", "gate_proj"),)}
    for name, pool in {
        "several": {"num_adapters": 3, "ranks": (2, 3)},
        "one": {"num_adapters": 1, "ranks": (4,)},
        "saturated": {"num_adapters": 5, "ranks": (8,)},
    }.items():
        stored.check_adapters(
            tmp_path / name,
            {"name": "knots", "inner": {"name": "ties", "density": density}},
            lambda adapters: knots(None, dense(adapters), rule=trimmed(density)),
            within=1e-5,
            **pool,
            **alike,
        )


def test_the_merge_of_checkpoints_is_the_oracles(family_of: Callable[..., Family], tmp_path: Path) -> None:
    stored.check(
        family_of(num_models=3),
        tmp_path,
        {"name": "knots", "inner": {"name": "ties", "density": 1.0}},
        lambda base, models: knots(base, models, rule=trimmed(1.0)),
    )


def test_a_method_that_needs_the_base_or_exact_ties_is_refused() -> None:
    members = [Member("a", 1.0, None), Member("b", 1.0, None)]
    assert not Knots().problems(members)
    for inner in ({"name": "slerp"}, {"name": "ties", "at_threshold": "exact"}):
        assert [problem.where for problem in Knots(inner=inner).problems(members)] == ["method.inner"]


def test_what_the_inner_method_refuses_is_refused() -> None:
    (problem,) = Knots(inner="pcb").problems([Member("a", 2.0, None)])
    assert problem.where == "model a"
