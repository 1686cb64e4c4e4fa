from pathlib import Path

import pytest

from tests.tools.oracles import stored
from tests.tools.oracles.adapters import added, compress_merge, dense
from tests.tools.oracles.electing import ties
from tests.tools.oracles.protocol import Merged
from ties_ray.methods.compress_merge import CompressMerge
from ties_ray.testing import MethodContract

POOL = {"num_adapters": 4, "ranks": (3, 5), "hidden": 16}


class TestCompressMerge(MethodContract):
    @pytest.fixture
    def method(self) -> CompressMerge:
        return CompressMerge(rank=6)


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_the_merge_of_adapters_is_the_oracles(beta: float, tmp_path: Path) -> None:
    stored.check_adapters(
        tmp_path,
        {"name": "compress_merge", "rank": 4, "beta": beta},
        lambda adapters: compress_merge(adapters, rank=4, beta=beta),
        within=1e-5,
        **POOL,
    )


def test_signs_are_elected_in_the_shared_directions(tmp_path: Path) -> None:
    stored.check_adapters(
        tmp_path,
        {"name": "compress_merge", "rank": 4, "inner": {"name": "ties", "density": 0.5}},
        lambda adapters: compress_merge(adapters, rank=4, rule=lambda cores: ties(None, cores, density=0.5).delta),
        within=1e-4,
        **POOL,
    )


def test_a_rank_as_high_as_all_together_loses_nothing(tmp_path: Path) -> None:
    stored.check_adapters(
        tmp_path, {"name": "compress_merge", "rank": 16}, lambda adapters: Merged(added(dense(adapters))), **POOL
    )


def test_one_adapter_is_truncated(tmp_path: Path) -> None:
    stored.check_adapters(
        tmp_path,
        {"name": "compress_merge", "rank": 2},
        lambda adapters: compress_merge(adapters, rank=2),
        **{**POOL, "num_adapters": 1},
    )
