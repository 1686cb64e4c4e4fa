"""Tree-structured Parzen estimators (Bergstra et al. 2011), by the library Optuna."""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ties_ray.samplers import Axis, Draw, Point, Sampler


class OptunaSampler(Sampler):
    """Models which values the good candidates have. It suits choices beside numbers, and few candidates."""

    name: Literal["optuna"] = "optuna"
    batch: int = Field(default=4, ge=1, le=1000)
    """Candidates that are asked for before their losses are known: as many can run at a time."""
    startup: int = Field(default=10, ge=1)
    """Candidates that are drawn by chance first."""

    library: ClassVar[str] = "optuna"
    extra: ClassVar[str] = "optuna"

    def begin(self, axes: Sequence[Axis], seed: int) -> Draw:
        """Return the study; it is kept in memory."""
        return _OptunaDraw(axes, seed, self.batch, self.startup)

    def batch_of(self, axes: Sequence[Axis], budget: int) -> int:
        """Return the candidates of a batch."""
        return self.batch


class _OptunaDraw(Draw):
    def __init__(self, axes: Sequence[Axis], seed: int, batch: int, startup: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=batch > 1)
        self._failed = optuna.trial.TrialState.FAIL
        self._study = optuna.create_study(sampler=sampler)
        self._batch = batch
        self._distributions = {
            str(number): optuna.distributions.CategoricalDistribution(tuple(range(axis.choices)))
            if axis.choices
            else optuna.distributions.FloatDistribution(0.0, 1.0)
            for number, axis in enumerate(axes)
        }
        self._trials: list[Any] = []

    def ask(self, most: int) -> list[Point]:
        self._trials = [self._study.ask(self._distributions) for _ in range(self._batch)]
        return [tuple(trial.params[name] for name in self._distributions) for trial in self._trials]

    def tell(self, points: Sequence[Point], losses: Sequence[float | None]) -> None:
        for trial, loss in zip(self._trials, losses, strict=True):
            self._study.tell(trial, loss, state=self._failed if loss is None else None)
