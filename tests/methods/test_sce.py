from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import held, stored
from tests.tools.oracles.sce import sce
from ties_ray.methods import Member
from ties_ray.methods.sce import Sce
from ties_ray.testing import MethodContract

EDGES = pytest.mark.parametrize("at_threshold", ["keep", "exact"])


class TestSce(MethodContract):
    @pytest.fixture
    def method(self) -> Sce:
        return Sce(select_topk=0.3)


def test_the_merge_of_all_elements_is_the_oracles() -> None:
    held.check(Sce(), lambda family: sce(family.base, family.models))


@EDGES
@pytest.mark.parametrize("select_topk", [0.001, 0.5])
def test_the_merge_is_the_oracles(select_topk: float, at_threshold: str) -> None:
    held.check(
        Sce(select_topk=select_topk, at_threshold=at_threshold, lambda_=0.3),
        lambda family: sce(family.base, family.models, select_topk=select_topk, at_threshold=at_threshold, lambda_=0.3),
    )


@EDGES
@pytest.mark.parametrize("mixed", [False, True])
def test_a_checkpoint_is_what_the_oracle_gives(
    mixed: bool, at_threshold: str, family_of: Callable[..., Family], tmp_path: Path
) -> None:
    stored.check(
        family_of(num_models=3, mixed=mixed, dtype="F32", smooth=not mixed),
        tmp_path,
        {"name": "sce", "select_topk": 0.4, "at_threshold": at_threshold},
        lambda base, models: sce(base, models, select_topk=0.4, at_threshold=at_threshold),
    )


def test_small_changes_weigh_the_same_as_in_mergekit() -> None:
    for least in (1e-6, 1.0):
        held.check(Sce(least=least), lambda family, least=least: sce(family.base, family.models, least=least))


def test_a_weight_is_refused() -> None:
    assert Sce().problems([Member("a", 1.0, None), Member("b", 0.5, None)])
    assert not Sce().problems([Member("a", 1.0, None), Member("b", 1.0, None)])
