from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools import oracle
from tests.tools.families import Family
from tests.tools.merging import merge, read_tensors
from tests.tools.oracle import Rules
from tests.tools.oracles import families, held
from tests.tools.oracles.protocol import Merged
from ties_ray.methods.task_arithmetic import TaskArithmetic
from ties_ray.testing import MethodContract

MakeFamily = Callable[..., Family]


class TestTaskArithmetic(MethodContract):
    @pytest.fixture
    def method(self) -> TaskArithmetic:
        return TaskArithmetic(lambda_=0.3)


class TestSumOfWeights(MethodContract):
    @pytest.fixture
    def method(self) -> TaskArithmetic:
        return TaskArithmetic(lambda_=0.2, vectors="weights")


def test_whole_weights_are_summed_whatever_the_base(tmp_path: Path) -> None:
    def oracle(family: families.Family) -> Merged:
        total = {name: 0.5 * sum(model[name] for model in family.models) for name in family.base}
        return Merged({name: value - family.base[name] for name, value in total.items()})

    held.check_stored({"name": "task_arithmetic", "vectors": "weights", "lambda": 0.5}, oracle, tmp_path, count=3)


@pytest.mark.parametrize(
    ("how", "weights", "factor"),
    [
        ({"num_models": 3}, None, 0.3),
        ({"num_models": 3, "mixed": True}, (0.3, 1.7, -0.4), 1.0),
        ({"num_models": 1}, None, -1.0),
        ({"num_models": 40, "layers": 1, "hidden": 8}, None, 0.025),
        ({"num_models": 4, "mixed": True, "exact": True, "shards": 2}, (0.5, 0.0, -2.0, 1.0), 0.7),
    ],
    ids=str,
)
def test_the_scaled_sum_is_the_oracles(
    how: dict[str, Any], weights: tuple[float, ...] | None, factor: float, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(**how)
    merge(family, tmp_path / "out", {"name": "task_arithmetic", "lambda": factor}, weights=weights)
    answer = oracle.merge(family, Rules("task_arithmetic", lambda_=factor), weights=weights)
    oracle.check(family, answer, read_tensors(tmp_path / "out"), exact=how.get("exact", False))
