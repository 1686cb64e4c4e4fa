from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.oracles import held, stored
from tests.tools.oracles.iso import iso_cts
from ties_ray.methods.iso_cts import IsoCts
from ties_ray.testing import MethodContract


class TestIsoCts(MethodContract):
    @pytest.fixture
    def method(self) -> IsoCts:
        return IsoCts()


def test_the_merge_is_the_oracles() -> None:
    held.check(IsoCts(), lambda family: iso_cts(family.base, family.models))
    for common in (0.3, 1.0):
        held.check(
            IsoCts(common=common, lambda_=0.3),
            lambda family, common=common: iso_cts(family.base, family.models, common=common, lambda_=0.3),
            counts=(3,),
        )


@pytest.mark.parametrize("mixed", [False, True])
def test_a_checkpoint_is_what_the_oracle_gives(mixed: bool, family_of: Callable[..., Family], tmp_path: Path) -> None:
    stored.check(family_of(num_models=3, mixed=mixed), tmp_path, {"name": "iso_cts"}, iso_cts)
