import math

import pytest
import torch

from ties_ray.measures import effects
from ties_ray.measures.effects import NOTHING, Effects, ModelSums, ParameterSums, added_up, sums_of


def shard(number: int, *parameters: int, models: int = 2) -> Effects:
    sums = tuple(ParameterSums(parameter, 10, 5, 4, 3, 2, 1.5, 1, 1.0, 0.5, 0.1 * number) for parameter in parameters)
    return Effects(number, sums, (ModelSums(10.0, 1.0, 5.0, 3.0, 2.0, 0.1 * number, 1.0),) * models)


def test_a_shard_that_was_done_twice_counts_once_and_no_order_changes_a_sum() -> None:
    shards = [shard(number, number % 3, 7) for number in range(30)]
    once = added_up(shards)
    assert once == added_up([*reversed(shards), shards[4], shards[4]])
    parameters, models = once
    assert parameters[7].elements == 300
    assert parameters[0].elements == 100
    assert models[0].elements == 300
    assert models[1].aligned == math.fsum(0.1 * number for number in range(30))


def test_no_shard_has_no_sums() -> None:
    assert added_up([]) == ({}, ())


@pytest.mark.parametrize("chunk", [3, 2**17])
def test_sums_are_the_same_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas, merged = torch.randn(3, 100, generator=generator), torch.randn(100, generator=generator)
    settings = {"thresholds": (0, 0, 0), "weights": (1.0, 2.0, -1.0), "present": (True, True, True), "share": 0.5}
    whole = sums_of(4, deltas, merged, **settings)  # type: ignore[arg-type]
    monkeypatch.setattr(effects, "CHUNK", chunk)
    parts = sums_of(4, deltas, merged, **settings)  # type: ignore[arg-type]
    assert parts[0][:6] == whole[0][:6]
    assert parts[0][6:] == pytest.approx(whole[0][6:], rel=1e-12)
    for mine, other in zip(parts[1], whole[1], strict=True):
        assert mine == pytest.approx(other, rel=1e-12)
    assert whole[1][0].elements == 200


def test_what_overflows_fp32_gives_finite_sums() -> None:
    deltas = torch.full((2, 4), 3e38)
    merged = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    of_parameter, models = sums_of(
        0, deltas, merged, thresholds=(0, 0), weights=(3e38, 1.0), present=(True, True), share=1.0
    )
    assert all(map(math.isfinite, [*of_parameter, *models[0], *models[1]]))


def test_an_absent_model_and_values_below_a_threshold_add_nothing() -> None:
    deltas = torch.tensor([[1.0, 0.25, -2.0], [0.0, 0.0, 0.0]])
    half = int(torch.tensor(0.5).view(torch.int32))
    of_parameter, models = sums_of(
        0, deltas, torch.tensor([1.0, 0.0, -2.0]), thresholds=(half, 0), weights=(1.0, 1.0), present=(True, False),
        share=1.0,
    )  # fmt: skip
    assert (of_parameter.terms, of_parameter.changed, of_parameter.alone) == (2, 2, 2)
    assert models[0] == ModelSums(3.0, 5.0625, 2.0, 2.0, 0.0, 5.0, 2.0)
    assert models[1] == NOTHING
