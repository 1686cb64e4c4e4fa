"""The worker of a search: it holds the models in memory, and scores one candidate after the other."""

import math
import time
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from ties_ray.errors import InputError, RecipeError
from ties_ray.evaluations import AnyEvaluations, Evaluator
from ties_ray.operations.candidates import Candidates
from ties_ray.operations.subjects import CandidateSubject
from ties_ray.recipe.recipe import Json
from ties_ray.state.search_table import Stage
from ties_ray.stores import Stores

REASON = 300
"""The most characters of the reason why a candidate has no score."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HostSetup(_Value):
    """What a worker is built from. It holds no secret but those of the user's own evaluations."""

    recipe: Json
    """The recipe as it stands, as plain data."""
    evaluate: AnyEvaluations
    confirm: AnyEvaluations | None = None
    seed: int
    memory: int | None = None
    """The most bytes for the models; half of the machine's by default."""


class Ask(_Value):
    """A candidate to score."""

    stage: Stage
    number: int
    values: Json
    """What it sets, by place in the recipe."""


class Scored(_Value):
    """The scores of a candidate."""

    merits: list[float] = []
    """One for each evaluation, larger is better; none where it has no score."""
    scores: dict[str, float] = {}
    """The value of each evaluation by its label."""
    failed: str = ""
    """Why it has no score."""
    seconds: float = 0.0


SETUP, ASK, SCORED = TypeAdapter(HostSetup), TypeAdapter(Ask), TypeAdapter(Scored)


def make_host(setup: str) -> "CandidateHost":
    """Return the worker of a setup in JSON. Executors call this factory."""
    return CandidateHost(SETUP.validate_json(setup))


class CandidateHost:
    """Scores candidates on one thread, so that the bits of a score do not depend on the machine's cores."""

    def __init__(self, setup: HostSetup) -> None:
        import torch

        torch.set_num_threads(1)
        self._setup = setup
        self._pool = Candidates(setup.recipe, memory=setup.memory)
        self._stores = Stores(setup.recipe.get("storage") or {})
        self._evaluators: dict[Stage, list[Evaluator]] = {}

    def run(self, message: str) -> str:
        """Return the scores of a candidate in JSON. A candidate that can't be merged or scored has none."""
        ask, started = ASK.validate_json(message), time.perf_counter()
        evaluators = self._prepared(ask.stage)
        try:
            scored = self._scored(ask, evaluators)
        except (InputError, RecipeError) as error:
            scored = Scored(failed=str(error)[:REASON])
        seconds = round(time.perf_counter() - started, 4)
        return scored.model_copy(update={"seconds": seconds}).model_dump_json()

    def _scored(self, ask: Ask, evaluators: list[Evaluator]) -> Scored:
        candidate = self._pool.merge(ask.values)
        with CandidateSubject(candidate, f"candidate {ask.number}", "candidates of a search") as subject:
            scores = [evaluator.score(subject) for evaluator in evaluators]
        if bad := next((score for score in scores if not math.isfinite(score.merit)), None):
            return Scored(failed=f"{bad.label} is no finite number")
        return Scored(
            merits=[score.merit for score in scores], scores={score.label: float(score.value) for score in scores}
        )

    def _prepared(self, stage: Stage) -> list[Evaluator]:
        if stage not in self._evaluators:
            confirming = self._setup.confirm if stage == "confirm" else None
            evaluations = confirming or self._setup.evaluate
            self._evaluators[stage] = [each.prepared(self._stores, self._setup.seed) for each in evaluations]
        return self._evaluators[stage]


def numbers_in(value: Any) -> list[float]:
    """Return all numbers in a value of JSON."""
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers_in(each)]
    if isinstance(value, list | tuple):
        return [number for each in value for number in numbers_in(each)]
    return [float(value)] if isinstance(value, int | float) else []
