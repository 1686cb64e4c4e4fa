from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import held, stored
from tests.tools.oracles.breadcrumbs import breadcrumbs
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
    scope: str, mixed: bool, weights: tuple[float, ...], family_of: Callable[..., Family], tmp_path: Path
) -> None:
    stored.check(
        family_of(num_models=3, mixed=mixed),
        tmp_path,
        {"name": "breadcrumbs", "scope": scope, "density": 0.5, "gamma": 0.1},
        lambda base, models: breadcrumbs(base, models, density=0.5, gamma=0.1, scope=scope, weights=weights),
        weights=weights,
    )
