"""The simulation repeats itself, finds nothing, and misses each protection that is switched off."""

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.tools.simulation.protections import PROTECTIONS, proof
from tests.tools.simulation.scenario import Seed, outcomes


@pytest.fixture(autouse=True)
def _collect() -> Iterator[None]:
    """Give the garbage collector back what a simulation takes from it."""
    yield
    gc.unfreeze()
    gc.enable()


def test_a_seed_gives_the_same_events_in_another_process() -> None:
    command = [sys.executable, "-m", "tests.tools.simulation", "--seed", "7"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"}).stdout
    list(outcomes(range(1, 4)))
    assert f"digest {Seed(7).run().digest[:16]}" in printed


def test_promises_hold_in_every_weather() -> None:
    assert [(seed, outcome.problems) for seed, outcome in outcomes(range(1, 101)) if outcome.problems] == []


@pytest.mark.parametrize("name", PROTECTIONS)
def test_a_protection_that_is_off_is_missed(name: str) -> None:
    assert proof(name)
