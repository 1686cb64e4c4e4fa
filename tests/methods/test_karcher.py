from pathlib import Path

import pytest

from tests.tools.oracles import held
from tests.tools.oracles.spherical import karcher
from ties_ray.methods import Member
from ties_ray.methods.karcher import Karcher
from ties_ray.testing import MethodContract, held_members


class TestKarcher(MethodContract):
    @pytest.fixture
    def method(self) -> Karcher:
        return Karcher()


class TestKarcherOfTaskVectors(MethodContract):
    @pytest.fixture
    def method(self) -> Karcher:
        return Karcher(vectors="task_vectors")


def test_the_merge_of_task_vectors_is_the_oracles() -> None:
    held.check(Karcher(vectors="task_vectors"), lambda family: karcher(family.base, family.models))
    held.check(
        Karcher(vectors="task_vectors", max_iter=100, tolerance=1e-7),
        lambda family: karcher(family.base, family.models, max_iter=100, tolerance=1e-7),
        counts=(2, 5),
    )


def test_a_merge_of_weights_from_files_to_files_is_the_oracles(tmp_path: Path) -> None:
    weights = [1.0, 2.0, 0.5, 0.3, 1.2]
    oracle = held.of_weights(lambda family: karcher(None, family.models, weights=weights))
    held.check_stored("karcher", oracle, tmp_path, weights=weights)


def test_too_many_models_and_negative_weights_are_refused() -> None:
    assert [problem.where for problem in Karcher().problems(held_members(41))] == ["models"]
    (problem,) = Karcher().problems([Member("a", 1.0, None), Member("b", -0.5, None)])
    assert problem.where == "model b"
