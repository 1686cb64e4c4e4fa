"""Survey: look at the factors of each adapter before anything is merged, and leave out or refuse what is not right."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from ties_ray.errors import FRESH_THEN, InputError, Problem
from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Shard
from ties_ray.rounds import Bench, Conclusion, Listed, Merge, PlannedRound, Pool, Recalled, RoundKind


class Survey(NamedTuple):
    """What the factors of one model are."""

    member: int
    norm2: float
    """Squared Frobenius norm of its low-rank changes."""
    not_finite: int
    """Elements of its factors that are NaN or Inf."""


SURVEY = TypeAdapter(Survey)
Surveys = tuple[Survey, ...]


class SurveyRound(RoundKind[Surveys, Surveys]):
    """Finds norms and values that are not finite; a shard is one model."""

    activity = "measuring norms"
    finding = Surveys
    folded = Surveys
    keeps_checksums = False  # it reads factors alone, each model by itself

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield the survey, where the recipe bounds norms or drops models for values that are not finite."""
        recipe = merge.recipe
        if recipe.bounds.norm or recipe.allow.nan == "drop_model":
            num_bytes, requests, _ = cost.surveying()
            block = merge.sizes.max_block
            yield PlannedRound("survey", "survey", 0, len(merge.models), 1, block, num_bytes, requests)

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return one model."""
        return Shard(models=(index, index + 1))

    def first_range(self, merge: Merge, round_: PlannedRound, index: int) -> None:
        """Return None: a model is no range."""

    def relative_cost(self, round_: PlannedRound) -> float:
        """Return 0: the time goes into reading."""
        return 0.0

    def tally(self, bench: Bench) -> Listed:
        """Return an empty list."""
        return Listed()

    def work(self, bench: Bench, index: int, shard: Shard, tally: Listed, zeroed: Counter[tuple[int, str]]) -> None:
        """Look at all factors of one model."""
        from ties_ray.kernels.lowrank import norm2_of

        (member,) = range(*shard.models)
        parameters = [parameter for parameter in bench.merge.catalog.parameters if parameter.merged]
        norm2, not_finite = 0.0, 0
        for factors in bench.factors((member, parameter) for parameter in parameters):
            if factors is not None:
                norm2 += norm2_of(factors)
                stored = [each for each in (factors.left, factors.right, factors.magnitude) if each is not None]
                not_finite += sum(int((~each.isfinite()).sum()) for each in stored)
        survey = Survey(member, norm2 if math.isfinite(norm2) else 0.0, not_finite)
        tally.values.append(survey)
        identity = bench.pool.identity(bench.merge.models[member]) if bench.pool else None
        if bench.pool and identity:
            bench.pool.write(identity, "survey", SURVEY, survey)

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[Surveys]) -> Surveys:
        """Return all surveys in the order of the members."""
        return tuple(sorted(survey for finding in findings for survey in finding))

    def misfit(self, merge: Merge, index: int, finding: Surveys) -> Iterator[str]:
        """Yield what is out of range."""
        if any(survey.member not in range(len(merge.members)) for survey in finding):
            yield "a model"
        if not all(map(_is_possible, finding)):
            yield "a norm"

    misfit_folded = misfit

    def conclude(self, merge: Merge, index: int, folded: Mapping[int, Surveys]) -> Conclusion:
        """Refuse models for what was found of them, or leave them out where the recipe allows it."""
        recipe = merge.recipe
        wrong = {survey.member: problem for survey in folded[0] for problem in self._problem(merge, survey)}
        drops = recipe.allow.refused_model == "drop"
        fatal = [
            problem for problem in wrong.values() if not drops and (problem.code == "norm" or recipe.allow.nan is None)
        ]
        if fatal or len(wrong) == len(folded[0]):
            raise InputError(fatal or wrong.values())
        return Conclusion(refused=wrong)

    def _problem(self, merge: Merge, survey: Survey) -> Iterator[Problem]:
        """Yield what is wrong with a model, one problem at most."""
        uri, norm = merge.models[survey.member].uri, math.sqrt(survey.norm2)
        least, most = merge.recipe.bounds.norm or (0.0, math.inf)
        if survey.not_finite:
            message = f"{survey.not_finite:,} values of its factors are NaN or Inf"
            yield Problem(uri, message, f"repair or drop it, or `allow: {{nan: drop_model}}`; {FRESH_THEN}", "nan")
        elif not least <= norm <= most:
            message = f"its change has the norm {norm:.6g}, outside bounds.norm ({least:g} to {most:g})"
            yield Problem(uri, message, f"drop it, or `allow: {{refused_model: drop}}`; {FRESH_THEN}", "norm")

    def recall(self, merge: Merge, index: int, before: Mapping[int, Any], pool: Pool) -> list[Recalled]:
        """Return the surveys that are in the pool cache; a shard is a model."""
        named = [(member, name) for member, model in enumerate(merge.models) if (name := pool.identity(model))]
        read = pool.read_each([(identity, "survey") for _, identity in named], SURVEY)
        surveys: list[Survey] = []
        for (member, identity), survey in zip(named, read, strict=True):
            if survey and _is_possible(survey):
                surveys.append(survey._replace(member=member))
            elif survey:
                pool.refuse(identity, "survey")
        return [Recalled(0, tuple(surveys), tuple(survey.member for survey in surveys))] if surveys else []


def _is_possible(survey: Survey) -> bool:
    return math.isfinite(survey.norm2) and survey.norm2 >= 0
