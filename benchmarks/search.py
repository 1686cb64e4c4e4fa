"""What a search takes beside merging and scoring: CPU milliseconds a candidate, by sampler.

    OMP_NUM_THREADS=1 python -m benchmarks.search

The evaluation returns a number at once. The worker is a thread of its own, and the search the main one. Two budgets
are compared, so the start and the final merge do not count. The limit is 10 ms a candidate. What the samplers' own
libraries take stands beside it.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import ties_ray
from benchmarks import measure
from benchmarks.family import write_family
from ties_ray import plugins
from ties_ray.samplers import Axis, Sampler

BUDGETS = (20, 100, 600)
"""The first one warms up."""
SCORE = "def score(model):\n    return float(hash(model.id) % 997)\n"


def alone(sampler: Sampler, axes: Sequence[Axis], budget: int) -> float:
    """Return the CPU seconds that a sampler takes for some candidates."""
    began, asked, draw = time.process_time(), 0, sampler.begin(axes, 0)
    while asked < budget:
        points = draw.ask(budget - asked)
        draw.tell(points, [float(number) for number in range(len(points))])
        asked += len(points)
    return time.process_time() - began


@click.command()
@click.option("--models", default=8, show_default=True)
def main(models: int) -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as place:
        write_family(Path(place), "1M", models)
        (Path(place) / "score.py").write_text(SCORE)
        recipe: dict[str, Any] = {
            "base": f"{place}/base",
            "models": [f"{place}/model-{number}" for number in range(models)],
            "method": "task_arithmetic",
            "run": {"executor": "local", "workers": 1},
        }
        search: dict[str, Any] = {
            "space": {"models.weight": {"low": 0, "high": 1}, "method.lambda": {"low": 0.1, "high": 2}},
            "evaluate": {"name": "function", "function": f"{place}/score.py:score"},
        }
        measure.table(("sampler", "ms a candidate", "of it the sampler alone", "merging and scoring (wall)"))
        axes = [Axis()] * (models + 1)
        for name in ("random", "cma_es", "optuna"):
            beside, inside = [], []
            for budget in BUDGETS:
                section, began = {**search, "sampler": name, "budget": budget}, time.thread_time()
                result = ties_ray.search({**recipe, "output": f"{place}/{name}-{budget}", "search": section})
                beside.append(time.thread_time() - began)
                inside.append(result.evaluation_seconds)
            more = BUDGETS[2] - BUDGETS[1]
            sampler = plugins.load("samplers", name, Sampler).model_validate({"name": name})
            own = alone(sampler, axes, BUDGETS[2]) - alone(sampler, axes, BUDGETS[1])
            figures = (beside[2] - beside[1], own, inside[2] - inside[1])
            measure.row((name, *(1000 * figure / more for figure in figures)))


if __name__ == "__main__":
    main()
