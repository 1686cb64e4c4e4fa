from pathlib import Path

import pytest
import torch

from tests.tools.families import Family, write_checkpoint
from tests.tools.merging import merge, read_tensors
from tests.tools.oracles import held
from tests.tools.oracles.spherical import slerp
from ties_ray.methods import Member
from ties_ray.methods.slerp import Slerp
from ties_ray.stores import Stores
from ties_ray.testing import MethodContract, held_members


class TestSlerp(MethodContract):
    MODELS = 2

    @pytest.fixture
    def method(self) -> Slerp:
        return Slerp(t=0.3)


class TestSlerpOfTaskVectors(TestSlerp):
    @pytest.fixture
    def method(self) -> Slerp:
        return Slerp(t=0.3, vectors="task_vectors")


@pytest.mark.parametrize(("t", "threshold"), [(0.0, 0.9995), (0.3, 0.9995), (0.3, 0.5), (0.7, 0.999999), (1.0, 0.9995)])
def test_the_merge_of_task_vectors_is_the_oracles(t: float, threshold: float) -> None:
    method = Slerp(t=t, vectors="task_vectors", threshold=threshold)
    held.check(method, lambda family: slerp(family.base, family.models, t=t, threshold=threshold), counts=(2,))


@pytest.mark.parametrize("threshold", [0.9995, 0.999999])
def test_a_merge_of_weights_from_files_to_files_is_the_oracles(threshold: float, tmp_path: Path) -> None:
    oracle = held.of_weights(lambda family: slerp(None, family.models, t=0.3, threshold=threshold))
    held.check_stored({"name": "slerp", "t": 0.3, "threshold": threshold}, oracle, tmp_path, count=2)


def test_a_merge_of_task_vectors_from_files_to_files_is_the_oracles(tmp_path: Path) -> None:
    method = {"name": "slerp", "t": 0.6, "vectors": "task_vectors"}
    held.check_stored(method, lambda family: slerp(family.base, family.models, t=0.6), tmp_path, count=2)


@pytest.mark.parametrize("method", ["slerp", {"name": "karcher"}, {"name": "nuslerp", "vectors": "weights"}], ids=str)
def test_a_base_beyond_fp32_stays_what_it_is(method: object, tmp_path: Path) -> None:
    base = {"model.w": torch.tensor([1e300, 0.5, -0.25], dtype=torch.float64)}
    models = [{"model.w": base["model.w"] + torch.tensor([0.0, step, 0.0])} for step in (0.25, 0.5)]
    uris = [str(tmp_path / name) for name in ("base", "0", "1")]
    for uri, tensors in zip(uris, (base, *models), strict=True):
        write_checkpoint(Stores({}).of("/"), uri, tensors)
    merge(Family(uris[0], tuple(uris[1:]), base, ()), tmp_path / "out", method)
    assert read_tensors(tmp_path / "out")["model.w"].tolist() == [1e300, 0.875, -0.25]


def test_other_numbers_of_models_and_weights_are_refused() -> None:
    assert [problem.where for problem in Slerp().problems(held_members(3))] == ["models"]
    assert [problem.where for problem in Slerp().problems(held_members(1))] == ["models"]
    (problem,) = Slerp(t=0.5).problems([Member("a", 1.0, None), Member("b", 0.5, None)])
    assert problem.where == "model b"
    for weights in ((0.0, 0.0), (-1.0, 2.0)):
        assert Slerp().problems([Member(str(weight), weight, None) for weight in weights])
    assert not Slerp().problems([Member("a", 0.0, None), Member("b", 0.5, None)])


def test_the_weights_give_the_share_of_the_arc_where_t_does_not(tmp_path: Path) -> None:
    oracle = held.of_weights(lambda family: slerp(None, family.models, t=0.25))
    held.check_stored("slerp", oracle, tmp_path, count=2, weights=(1.5, 0.5))
