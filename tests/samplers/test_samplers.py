"""Each sampler against its library or an oracle, and what all of them promise."""

import itertools
import random
from collections.abc import Callable

import cma
import numpy as np
import optuna
import pytest

from ties_ray import plugins
from ties_ray.samplers import Axis, Draw, Point, Sampler

AXES = (Axis(start=0.3), Axis(choices=3, start=1), Axis(start=0.9))


def sampler(name: str, **fields: object) -> Sampler:
    return plugins.load("samplers", name, Sampler).model_validate({"name": name, **fields})


def loss_of(point: Point) -> float:
    return (point[0] - 0.6) ** 2 + abs(point[1] - 2) + (point[2] - 0.2) ** 2


def drawn(draw: Draw, budget: int, loss: Callable[[Point], float | None] = loss_of) -> list[tuple[Point, float | None]]:
    """Return the points and losses of a whole search, as its caller does it."""
    rows: list[tuple[Point, float | None]] = []
    while len(rows) < budget and (points := draw.ask(budget - len(rows))):
        losses = [loss(point) for point in points]
        rows += zip(points, losses, strict=True)
        if len(rows) <= budget:
            draw.tell(points, losses)
    return rows[:budget]


@pytest.mark.parametrize("name", plugins.names("samplers"))
@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_gives_the_same_points_whatever_else_draws_by_chance(name: str, seed: int) -> None:
    budget = 75 if name == "grid" else 30
    first = drawn(sampler(name).begin(AXES, seed), budget)
    np.random.seed(3)
    random.seed(3)
    second = drawn(sampler(name).begin(AXES, seed), budget, lambda point: loss_of(point) + 0 * np.random.rand())
    assert first == second
    assert len(first) == budget
    if name != "grid":
        assert drawn(sampler(name).begin(AXES, seed + 1), budget) != first


@pytest.mark.parametrize("name", plugins.names("samplers"))
def test_points_lie_on_their_axes_and_a_larger_budget_begins_alike(name: str) -> None:
    few, many = (drawn(sampler(name).begin(AXES, 0), budget) for budget in (20, 40))
    assert many[:20] == few
    for (first, choice, last), _ in many:
        assert 0 <= first <= 1
        assert 0 <= last <= 1
        assert choice in (0, 1, 2)


@pytest.mark.parametrize("name", plugins.names("samplers"))
def test_candidates_without_a_loss_are_taken_for_bad_ones(name: str) -> None:
    rows = drawn(sampler(name).begin(AXES, 0), 60, lambda point: None if point[1] == 0 else loss_of(point))
    assert len(rows) == 60
    assert drawn(sampler(name).begin(AXES, 0), 12, lambda point: None)


def test_random_points_fill_the_space() -> None:
    points = sampler("random").begin(AXES, 0).ask(3000)
    assert np.histogram([point[0] for point in points], 4, (0, 1))[0].min() > 650
    assert np.bincount([int(point[1]) for point in points]).min() > 900


def test_a_grid_has_all_combinations_once() -> None:
    points = [point for point, _ in drawn(sampler("grid", levels=3).begin(AXES, 0), 27)]
    assert points == list(itertools.product([0, 0.5, 1], [0, 1, 2], [0, 0.5, 1]))
    (problem,) = sampler("grid").problems(AXES, 70)
    assert "75 points" in problem.what


def test_cma_es_asks_what_its_library_asks() -> None:
    axes = (Axis(start=0.3), Axis(start=0.9), Axis(start=0.5))
    generator = np.random.Generator(np.random.PCG64(0))
    strategy = cma.CMAEvolutionStrategy([0.3, 0.9, 0.5], 0.25, {"bounds": [0, 1], "popsize": 6, "verbose": -9,
        "seed": np.nan, "randn": lambda *shape: generator.standard_normal(shape)})  # fmt: skip
    draw = sampler("cma_es", sigma=0.25, population=6).begin(axes, 0)
    for _ in range(5):
        asked, points = strategy.ask(), draw.ask(100)
        assert points == [tuple(map(float, each)) for each in asked]
        losses = [loss_of(point) for point in points]
        strategy.tell(asked, losses)
        draw.tell(points, losses)
    assert sampler("cma_es").batch_of(axes, 100) == strategy.opts["popsize"] + 1 == 7


def test_cma_es_finds_the_best_point_and_begins_again_once_it_has_converged() -> None:
    rows = drawn(sampler("cma_es").begin(AXES, 0), 1500)
    point, loss = min(rows, key=lambda row: row[1] or 0)
    assert (loss or 0) < 1e-8, point
    late = [point[0] for point, _ in rows[-100:]]
    assert max(late) - min(late) > 0.1
    (problem,) = sampler("cma_es").problems(AXES[:1], 10)
    assert "space has one" in problem.what


@pytest.mark.filterwarnings("ignore:Argument ``constant_liar``")
def test_optuna_asks_what_its_library_asks() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    library = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=5, constant_liar=True))
    distributions = {"0": optuna.distributions.FloatDistribution(0, 1),
                     "1": optuna.distributions.CategoricalDistribution((0, 1, 2)),
                     "2": optuna.distributions.FloatDistribution(0, 1)}  # fmt: skip
    draw = sampler("optuna", batch=3, startup=5).begin(AXES, 0)
    for _ in range(5):
        trials, points = [library.ask(distributions) for _ in range(3)], draw.ask(100)
        assert points == [tuple(trial.params[name] for name in "012") for trial in trials]
        losses = [loss_of(point) for point in points]
        for trial, loss in zip(trials, losses, strict=True):
            library.tell(trial, loss)
        draw.tell(points, losses)
