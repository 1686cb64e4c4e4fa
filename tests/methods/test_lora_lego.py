from pathlib import Path

import pytest

from tests.tools.oracles import stored
from tests.tools.oracles.adapters import added, dense
from tests.tools.oracles.lora_lego import lora_lego
from tests.tools.oracles.protocol import Merged
from ties_ray.methods import Member
from ties_ray.methods.lora_lego import LoraLego
from ties_ray.testing import MethodContract

ROOT = {"share": lambda scale: scale**0.5}


class TestLoraLego(MethodContract):
    @pytest.fixture
    def method(self) -> LoraLego:
        return LoraLego(rank=6)


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_the_merge_of_adapters_is_the_oracles(rank: int, balance: bool, tmp_path: Path) -> None:
    stored.check_adapters(
        tmp_path,
        {"name": "lora_lego", "rank": rank, "balance": balance},
        lambda adapters: lora_lego(adapters, clusters=rank, balance=balance),
        **ROOT,
        num_adapters=4,
        ranks=(4, 8),
    )


def test_one_adapter_of_its_own_rank_stays(tmp_path: Path) -> None:
    stored.check_adapters(
        tmp_path, {"name": "lora_lego"}, lambda adapters: Merged(added(dense(adapters))), num_adapters=1, ranks=(4,)
    )


def test_more_clusters_than_units_leave_each_unit(tmp_path: Path) -> None:
    stored.check_adapters(
        tmp_path,
        {"name": "lora_lego", "rank": 40},
        lambda adapters: lora_lego(adapters, clusters=8),
        **ROOT,
        num_adapters=2,
        ranks=(4,),
        targets=(("q_proj",),),
    )


def test_weights_are_refused() -> None:
    (problem,) = LoraLego().problems([Member("a", 1.0, None), Member("b", 0.5, None)])
    assert problem.where == "model b"
