from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import held, stored
from tests.tools.oracles.tsv import tsv
from ties_ray.methods.tsv import Tsv
from ties_ray.testing import MethodContract


class TestTsv(MethodContract):
    @pytest.fixture
    def method(self) -> Tsv:
        return Tsv()


def test_the_merge_is_the_oracles() -> None:
    held.check(Tsv(), lambda family: tsv(family.base, family.models))
    held.check(
        Tsv(rank=3, lambda_=0.3), lambda family: tsv(family.base, family.models, rank=3, lambda_=0.3), counts=(3,)
    )


def test_more_models_than_a_matrix_is_wide_keep_a_triplet_each() -> None:
    held.check(Tsv(), lambda family: tsv(family.base, family.models), counts=(300,))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_checkpoint_is_what_the_oracle_gives(mixed: bool, family_of: Callable[..., Family], tmp_path: Path) -> None:
    stored.check(family_of(num_models=3, mixed=mixed), tmp_path, {"name": "tsv"}, tsv)


def test_a_weight_multiplies_the_task_vector(family_of: Callable[..., Family], tmp_path: Path) -> None:
    stored.check(
        family_of(num_models=2),
        tmp_path,
        {"name": "tsv"},
        lambda base, models: tsv(base, [models[0], {name: -2 * value for name, value in models[1].items()}]),
        weights=(1, -2),
    )
