from pathlib import Path
from typing import Any

import pytest

from tests.tools.oracles import held
from tests.tools.oracles.elements import ram
from ties_ray.methods import Member
from ties_ray.methods.ram import Ram
from ties_ray.testing import MethodContract


class TestRam(MethodContract):
    @pytest.fixture
    def method(self) -> Ram:
        return Ram()


class TestRamPlus(MethodContract):
    @pytest.fixture
    def method(self) -> Ram:
        return Ram(plus=True)


CHOICES: list[dict[str, Any]] = [
    {},
    {"epsilon": 0.0, "lambda_": 0.3},
    {"epsilon": 2.0**-10},
    {"epsilon": 0.001},
    {"epsilon": 0.0, "plus": True},
    {"plus": True, "scope": "model"},
    {"plus": True, "r": 0.5, "alpha": 3.0, "epsilon": 0.0012, "lambda_": 2.0},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_merge_is_the_oracles(choice: dict[str, Any]) -> None:
    held.check(Ram(**choice), lambda family: ram(family.base, family.models, **choice))


@pytest.mark.parametrize("choice", [{}, {"plus": True}, {"plus": True, "scope": "model"}], ids=str)
def test_a_merge_from_files_to_files_is_the_oracles(choice: dict[str, Any], tmp_path: Path) -> None:
    held.check_stored({"name": "ram"} | choice, lambda family: ram(family.base, family.models, **choice), tmp_path)


def test_weights_are_refused() -> None:
    (problem,) = Ram().problems([Member("a", 1.0, None), Member("b", 0.5, None)])
    assert problem.where == "model b"
