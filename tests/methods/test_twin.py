from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family as Stored
from tests.tools.oracles import held, stored
from tests.tools.oracles.adapters import dense
from tests.tools.oracles.families import Family
from tests.tools.oracles.protocol import Merged
from tests.tools.oracles.twin import twin
from ties_ray.methods import Member
from ties_ray.methods.twin import Twin
from ties_ray.testing import MethodContract


class TestTheSharedChange(MethodContract):
    @pytest.fixture
    def method(self) -> Twin:
        return Twin()


class TestAPart(MethodContract):
    @pytest.fixture
    def method(self) -> Twin:
        return Twin(part="1", mask_rate=0.5)


def part(family: Family, model: int, **more: float) -> Merged:
    """Return the exclusive part of a model as the oracle has it."""
    products = twin(family.base, family.models, **more).products
    pairs = {name: left @ right for name, (left, right) in products["exclusive"][model].items()}
    return Merged({**pairs, **products["vectors"][model]})


def test_the_shared_change_is_the_oracles() -> None:
    held.check(Twin(), lambda family: twin(family.base, family.models))


@pytest.mark.parametrize("more", [{}, {"mask_rate": 0.4}, {"rank": 3}, {"rank": 100}], ids=str)
def test_a_part_is_the_oracles(more: dict[str, float]) -> None:
    held.check(Twin(part="0", **more), lambda family: part(family, 0, **more))
    held.check(Twin(part="2", lambda_=1.0, **more), lambda family: part(family, 2, lambda_=1.0, **more), counts=(3,))


def test_the_part_of_the_only_model_is_zero_at_lambda_one() -> None:
    held.check(Twin(part="0", lambda_=1.0), lambda family: part(family, 0, lambda_=1.0), counts=(1,))


def test_a_checkpoint_is_what_the_oracle_gives(family_of: Callable[..., Stored], tmp_path: Path) -> None:
    stored.check(family_of(num_models=3, mixed=True), tmp_path, {"name": "twin"}, twin)


def test_a_part_of_adapters_is_the_oracles(tmp_path: Path) -> None:
    stored.check_adapters(
        tmp_path,
        {"name": "twin", "part": "1", "rank": 4},
        lambda adapters: part(Family(None, tuple(dense(adapters))), 1, rank=4),
        targets=(("q_proj", "up_proj"),),
    )


def test_a_part_of_a_model_that_is_not_merged_is_refused() -> None:
    (problem,) = Twin(part="c").problems([Member("a", 1.0, None), Member("b", 1.0, None)])
    assert str(problem) == "method.part: no model has the id 'c'; name one of them: a, b"
