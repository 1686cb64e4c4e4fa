from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools import oracle
from tests.tools.families import Family
from tests.tools.merging import merge, read_tensors
from tests.tools.oracle import Rules
from tests.tools.oracles import held
from tests.tools.oracles.consensus import consensus
from tests.tools.oracles.families import Family as Held
from tests.tools.oracles.protocol import Merged
from ties_ray.errors import RecipeError
from ties_ray.methods import Member
from ties_ray.methods.consensus import Consensus
from ties_ray.testing import MethodContract

MakeFamily = Callable[..., Family]


class TestConsensus(MethodContract):
    @pytest.fixture
    def method(self) -> Consensus:
        return Consensus(lambda_=0.3)


class TestAPart(MethodContract):
    @pytest.fixture
    def method(self) -> Consensus:
        return Consensus(part="1")


class TestMasks(MethodContract):
    @pytest.fixture
    def method(self) -> Consensus:
        return Consensus(masks=True)


def part(family: Held, model: int, **more: float) -> Merged:
    return Merged(consensus(family.base, family.models, **more).products["reconstructed"][model])


def test_a_part_is_the_model_that_the_oracle_rebuilds(tmp_path: Path) -> None:
    held.check(Consensus(part="0"), lambda family: part(family, 0))
    held.check(Consensus(part="4", bound=0.2), lambda family: part(family, 4, bound=0.2), counts=(5,))
    held.check_stored({"name": "consensus", "part": "1"}, lambda family: part(family, 1), tmp_path)
    (problem,) = Consensus(part="z").problems([Member("a", 1.0, None)])
    assert str(problem) == "method.part: no model has the id 'z'; name one of them: a"


@pytest.mark.parametrize(
    ("how", "weights", "parameters"),
    [
        ({"num_models": 3}, None, {}),
        ({"num_models": 3, "mixed": True}, (0.3, 1.7, 0.4), {"lambda": 0.3, "bound": 0.2}),
        ({"num_models": 3}, None, {"agree": 0}),
        ({"num_models": 1}, None, {"agree": 1}),
        ({"num_models": 40, "layers": 1, "hidden": 8}, None, {"bound": 0.05, "lambda": 0.1}),
        ({"num_models": 4, "mixed": True, "exact": True, "shards": 2}, None, {"bound": 0.5, "lambda": 0.3}),
        ({"num_models": 4, "mixed": True, "exact": True, "shards": 2}, (0.5, 0, -2, 1), {"bound": 0.25, "agree": 1}),
        ({"num_models": 4, "mixed": True, "exact": True, "shards": 2}, None, {"bound": 0, "agree": 4}),
    ],
    ids=str,
)
def test_what_enough_models_claim_is_the_oracles(
    how: dict[str, Any],
    weights: tuple[float, ...] | None,
    parameters: dict[str, float],
    family_of: MakeFamily,
    tmp_path: Path,
) -> None:
    family = family_of(**how)
    merge(family, tmp_path / "out", {"name": "consensus", **parameters}, weights=weights)
    rules = Rules(
        "consensus",
        lambda_=parameters.get("lambda", 1.0),
        bound=parameters.get("bound", 0.4),
        agree=int(parameters.get("agree", 2)),
    )
    answer = oracle.merge(family, rules, weights=weights)
    oracle.check(family, answer, read_tensors(tmp_path / "out"), exact=how.get("exact", False))


def test_no_element_can_have_more_claims_than_models(family_of: MakeFamily, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"method\.agree: asks for 4 agreeing models of 3"):
        merge(family_of(num_models=3), tmp_path / "out", {"name": "consensus", "agree": 4})
