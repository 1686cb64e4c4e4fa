"""Scores by tasks of lm-evaluation-harness."""

import importlib
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from ties_ray.errors import InputError, Problem, enumerated
from ties_ray.evaluations import Better, Evaluator, Measured, Subject
from ties_ray.evaluations._models import CAUSAL, Loader, LoadsModels, brief
from ties_ray.stores import Stores


class LmEval(LoadsModels):
    """The mean of one metric over tasks of lm-evaluation-harness, for a causal model.

    The harness fetches the data of its tasks itself. So they are not pinned, and a stored score is not used again.
    """

    main: ClassVar[str] = "tasks"
    repeatable: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "lm_eval", "datasets")

    name: Literal["lm_eval"] = "lm_eval"
    better: Better = "larger"
    """Which values are better."""
    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, or one text with commas."""
    metric: str = "acc,none"
    """Metric of a task that counts, with its filter, as the harness names it: `acc_norm,none`, `exact_match,strict`."""
    include_path: str | None = None
    """Local folder of further tasks."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in each prompt. Default: those of the task."""
    limit: int | None = Field(default=None, ge=1)
    """Examples of each task. Default: all."""
    batch_size: int = Field(default=8, ge=1)
    """Examples at a time."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return [each.strip() for each in value.split(",")] if isinstance(value, str) else value

    @field_validator("include_path")
    @classmethod
    def _absolute_folder(cls, value: str | None) -> str | None:
        return None if value is None else os.path.abspath(value)

    def prepared(self, stores: Stores, seed: int) -> Evaluator:
        """Return what runs the tasks. Raises `InputError` where the harness is not installed."""
        return _Runs(self, seed, _harness())


class _Runs(Evaluator):
    def __init__(self, evaluation: LmEval, seed: int, harness: Any) -> None:
        super().__init__(evaluation, seed)
        self._own, self._harness, self._loader = evaluation, harness, Loader(evaluation)

    def measure(self, subject: Subject) -> Measured:
        """Return the metric of each task, and their mean."""
        own, seed = self._own, self.seed
        model, tokenizer = self._loader.model(subject, CAUSAL), self._loader.tokenizer(subject)
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        try:
            results = self._harness.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=own.batch_size),
                tasks=list(own.tasks), num_fewshot=own.num_fewshot, limit=own.limit, random_seed=seed,
                numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
                task_manager=TaskManager(include_path=own.include_path), log_samples=False, bootstrap_iters=0,
            )  # fmt: skip
        except Exception as error:  # a task's own code, or the fetching of its data
            message = f"the harness fails: {brief(error)}"
            raise InputError(Problem(subject.id, message, "see whether `lm_eval` alone runs these tasks")) from error
        return self._measured(results["results"])

    def _measured(self, results: Mapping[str, Mapping[str, Any]]) -> Measured:
        metric = self._own.metric
        metrics, values = dict[str, float](), list[float]()
        for task in self._own.tasks:
            numbers = {name: float(value) for name, value in results.get(task, {}).items()
                       if isinstance(value, int | float) and "stderr" not in name}  # fmt: skip
            if metric not in numbers:
                remedy = f"write `metric` with one of these: {enumerated(numbers)}"
                raise InputError(Problem(f"task {task}", f"gives no {metric!r}", remedy))
            metrics |= {f"{task}/{name.removesuffix(',none')}": value for name, value in numbers.items()}
            values.append(numbers[metric])
        return Measured(sum(values) / len(values), metrics)


def _harness() -> Any:
    try:
        return importlib.import_module("lm_eval")
    except ImportError as error:
        message = f"needs lm-evaluation-harness ({error})"
        raise InputError(Problem("lm_eval", message, "pip install 'ties-ray[lm-eval]'")) from error
