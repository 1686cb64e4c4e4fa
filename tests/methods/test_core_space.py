from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import held, stored
from tests.tools.oracles.adapters import Rule, added, core_space, dense
from tests.tools.oracles.electing import ties
from tests.tools.oracles.iso import iso_c
from tests.tools.oracles.tsv import tsv
from ties_ray.methods.core_space import CoreSpace
from ties_ray.testing import MethodContract

RULES: dict[str, tuple[object, Rule]] = {
    "sum": ("task_arithmetic", added),
    "tsv": ({"name": "tsv", "rank": 2}, lambda deltas: tsv(None, deltas, rank=2).delta),
    "iso_c": ("iso_c", lambda deltas: iso_c(None, deltas).delta),
    "ties": ({"name": "ties", "density": 0.4}, lambda deltas: ties(None, deltas, density=0.4).delta),
}


class TestCoreSpace(MethodContract):
    @pytest.fixture
    def method(self) -> CoreSpace:
        return CoreSpace()


@pytest.mark.parametrize("rule", RULES)
def test_the_merge_of_adapters_is_the_oracles(rule: str, tmp_path: Path) -> None:
    inner, own = RULES[rule]
    for name, pool in {
        "several": {"num_adapters": 3, "ranks": (2, 3), "hidden": 16},
        "one": {"num_adapters": 1, "ranks": (4,), "hidden": 16},
        "saturated": {"num_adapters": 5, "ranks": (8,), "hidden": 16},
    }.items():
        stored.check_adapters(
            tmp_path / name,
            {"name": "core_space", "inner": inner},
            lambda adapters: core_space(adapters, rule=own),
            within=1e-5,
            **pool,
        )


def test_nothing_is_lost(tmp_path: Path) -> None:
    stored.check_adapters(
        tmp_path,
        {"name": "core_space", "inner": {"name": "tsv", "rank": 3}},
        lambda adapters: tsv(None, dense(adapters), rank=3),
        num_adapters=3,
        ranks=(2, 3),
    )


def test_whole_models_are_merged_too(family_of: Callable[..., Family], tmp_path: Path) -> None:
    held.check(CoreSpace(inner="task_arithmetic"), lambda family: iso_like(family))
    stored.check(
        family_of(num_models=3, mixed=True),
        tmp_path,
        {"name": "core_space", "inner": {"name": "tsv", "rank": 3}},
        lambda base, models: tsv(base, models, rank=3),
    )


def iso_like(family: Family) -> object:
    from tests.tools.oracles.protocol import Merged, task_vectors

    return Merged(added(task_vectors(family.base, family.models)))
