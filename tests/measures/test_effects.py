import math

import pytest
import torch

from ties_ray.measures.effects import (
    NOTHING,
    Effects,
    ModelSums,
    ParameterSums,
    added,
    added_up,
    joined,
    sums_of,
)


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
    assert joined([]) == ()
    assert ParameterSums(7) == (7, 0, 0, 0, 0, 0, 0.0, 0, 0.0, 0.0, 0.0)


def test_shards_that_are_joined_have_the_sums_of_all() -> None:
    shards = [shard(number, number % 3, 7) for number in range(30)]
    (whole,) = joined(shards)
    assert whole.shard == 0
    assert added_up([whole]) == added_up(shards)
    assert added(shards[1].models[0], shards[2].models[0]) == added_up(shards[1:3])[1][0]


def test_sums_are_those_of_a_dense_count() -> None:
    generator = torch.Generator().manual_seed(0)
    deltas, merged = torch.randn(5, 1000, generator=generator), torch.randn(1000, generator=generator)
    deltas[:, ::7], merged[::11] = 0, 0
    weights, limit = (1.0, 2.0, -1.0, 0.5, 1.0), 0.4
    bits = int(torch.tensor(limit).view(torch.int32))
    of_parameter, models = sums_of(
        4, deltas, merged, thresholds=(bits,) * 5, weights=weights, present=(True,) * 5, share=0.5
    )
    factors = torch.tensor(weights, dtype=torch.float64)[:, None]
    terms, change = torch.where(deltas.abs() >= limit, deltas, 0).double() * factors, merged.double()
    total, used = terms.sum(0), terms != 0
    count, both = used.sum(0), (terms > 0).any(0) & (terms < 0).any(0)
    agree, against = terms * change > 0, terms * change < 0
    decides = ((total - terms).sign() != total.sign()) & used
    chance = 1 - 0.5 ** (count.clamp(min=1) - 1.0)
    shares = [(count > least).sum() for least in (0, 1)]
    wanted = [4, 1000, count.sum(), *shares, both.sum(), chance.sum(), (agree.sum(0) == 1).sum()]
    wanted += [terms.abs().sum(), total.abs().sum(), change.square().sum()]
    assert list(of_parameter) == pytest.approx([float(each) for each in wanted], rel=1e-12)
    columns = [torch.full((5,), 1000.0), deltas.double().square().sum(1), used.sum(1), agree.sum(1), against.sum(1)]
    columns += [(terms * change).sum(1), decides.sum(1)]
    for model in range(5):
        scaled = [2 * float(column[model]) for column in columns]
        assert list(models[model]) == pytest.approx(scaled, rel=1e-12)


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
