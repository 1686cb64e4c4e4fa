from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.tools import families as made
from tests.tools.oracles import held, stored
from tests.tools.oracles.breadcrumbs import breadcrumbs
from tests.tools.oracles.electing import elected
from tests.tools.oracles.families import Family
from tests.tools.oracles.protocol import Merged
from ties_ray.methods import Member
from ties_ray.methods.breadcrumbs import Breadcrumbs
from ties_ray.testing import MethodContract

SCOPES = pytest.mark.parametrize("scope", ["tensor", "row"])


class TestBreadcrumbs(MethodContract):
    @pytest.fixture
    def method(self) -> Breadcrumbs:
        return Breadcrumbs(density=0.3, gamma=0.2)


class TestBreadcrumbsByRow(MethodContract):
    @pytest.fixture
    def method(self) -> Breadcrumbs:
        return Breadcrumbs(scope="row", density=0.5, gamma=0.1)


class TestBreadcrumbsThatElects(MethodContract):
    @pytest.fixture
    def method(self) -> Breadcrumbs:
        return Breadcrumbs(density=0.5, combine="ties", merge="mean", rescale="l1", zero_sum="positive")


@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_an_election_and_l1_norms_are_those_of_mergekit(merge: str, rescale: str) -> None:
    def oracle(family: Family) -> Merged:
        flags = breadcrumbs(family.base, family.models, density=0.4, gamma=0.1).products["kept"]
        terms = []
        for model, delta in enumerate(family.deltas):
            kept = {name: np.where(flags[name][model], tau, 0.0) for name, tau in delta.items()}
            sizes = {name: (np.abs(delta[name]).sum(), np.abs(tau).sum()) for name, tau in kept.items()}
            own = {
                name: before / after if min(before, after) >= 1e-7 else 1.0 for name, (before, after) in sizes.items()
            }
            terms.append({name: tau * (own[name] if rescale == "l1" else 1.0) for name, tau in kept.items()})
        return Merged(elected(terms, None, zero_sum="positive", merge=merge)[0], family.base)

    method = Breadcrumbs(density=0.4, gamma=0.1, combine="ties", merge=merge, rescale=rescale, zero_sum="positive")
    held.check(method, oracle, counts=(1, 5))


def test_negative_weights_are_refused_where_a_mean_divides_by_them() -> None:
    assert not Breadcrumbs().problems([Member("a", -1.0, None)])
    assert Breadcrumbs(merge="mean").problems([Member("a", -1.0, None)])


@SCOPES
@pytest.mark.parametrize(("density", "gamma"), [(0.6, 0.1), (0.2, 0.5), (0.9, 0.3), (1.0, 0.2)])
def test_the_merge_is_the_oracles(scope: str, density: float, gamma: float) -> None:
    held.check(
        Breadcrumbs(density=density, gamma=gamma, scope=scope, lambda_=0.3),
        lambda family: breadcrumbs(family.base, family.models, density=density, gamma=gamma, scope=scope, lambda_=0.3),
        counts=(1, 40),
    )


@SCOPES
@pytest.mark.parametrize(("mixed", "weights"), [(False, (1.0, 1.0, 1.0)), (True, (0.5, -2.0, 1.0))])
def test_a_checkpoint_is_what_the_oracle_gives(
    scope: str, mixed: bool, weights: tuple[float, ...], family_of: Callable[..., made.Family], tmp_path: Path
) -> None:
    stored.check(
        family_of(num_models=3, mixed=mixed),
        tmp_path,
        {"name": "breadcrumbs", "scope": scope, "density": 0.5, "gamma": 0.1},
        lambda base, models: breadcrumbs(base, models, density=0.5, gamma=0.1, scope=scope, weights=weights),
        weights=weights,
    )
