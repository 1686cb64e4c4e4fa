"""Elementary functions of basic operations, against the standard library."""

import math

import pytest
import torch

from ties_ray.kernels.elementary import exp, log, log_tanh


def test_exponentials_and_logarithms_are_right_to_a_few_ulps() -> None:
    below = -torch.logspace(-12, math.log10(690), 2000, dtype=torch.float64)
    assert exp(below).tolist() == pytest.approx([math.exp(x) for x in below.tolist()], rel=1e-15)
    assert exp(torch.tensor([0.0, -701.0], dtype=torch.float64)).tolist() == [1.0, 0.0]
    positive = torch.cat([torch.logspace(-300, 300, 2001, dtype=torch.float64), 1 + below / 1000])
    assert log(positive).tolist() == pytest.approx([math.log(x) for x in positive.tolist()], rel=1e-15, abs=1e-18)


def test_logarithms_of_tangents_are_right_from_the_smallest_to_the_largest() -> None:
    values = torch.logspace(-290, 10, 3001, dtype=torch.float64)
    wanted = [math.log(math.tanh(x)) for x in values.tolist()]
    assert log_tanh(values).tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_cuts_change_no_bit() -> None:
    values = torch.rand(1001, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1e-9
    for function in (log, log_tanh, lambda values: exp(-values)):
        whole = function(values)
        assert torch.equal(whole, torch.cat([function(part.clone()) for part in values.split(7)]))
