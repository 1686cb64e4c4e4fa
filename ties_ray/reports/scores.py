"""The scores of models: those that lie beside an output, and those of one call for people and machines."""

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from ties_ray.errors import Problem, UnavailableError
from ties_ray.evaluations import Score
from ties_ray.libraries.loaders import SCORES_NAME
from ties_ray.reports.records import Report, ReportedProblem
from ties_ray.state import documents
from ties_ray.stores import Stores, join
from ties_ray.tables import Row

TRIES = 5
"""Swaps that may fail because others write the scores, until we give up."""


class StoredScores(Report):
    """The scores of one finished merge, in its output."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    schema_version: Literal[1] = 1
    run_id: str
    """The merge that was scored."""
    scores: list[Score]


_STORED = TypeAdapter(StoredScores)


class ScoredModel(Report):
    """One model and its scores."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    model: str
    """Its name in the table: a setting, or its folder."""
    uri: str
    run_id: str = ""
    """The merge that made it; empty where none did."""
    scores: list[Score] = []
    reused: int = 0
    """How many of the scores were known from an earlier call."""
    problems: list[ReportedProblem] = []
    """Why it has no score, or not all of them."""

    def row(self) -> Row:
        """Return a row of the table: a column for each score."""
        return {"model": self.model, **values(self.scores)}


class Scores(Report):
    """The scores of some models."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    models: list[ScoredModel]
    files: list[str] = []
    """URIs of what was written: the scores beside each output, and the tables of sweeps."""
    seconds: float = 0.0
    rejected: list[str] = []
    """Scores outside the bounds that their evaluation gives, as sentences."""

    def best(self, label: str) -> ScoredModel | None:
        """Return the first model with the best score of a label; None where none has one."""
        scored = [(score.merit, model) for model in self.models for score in model.scores if score.label == label]
        return max(scored, key=lambda each: each[0])[1] if scored else None


def values(scores: Iterable[Score]) -> dict[str, float | None]:
    """Return the value of each score by its label; None where it is no number."""
    return {score.label: score.value if score.value == score.value else None for score in scores}


def read(stores: Stores, output: str, run_id: str) -> list[Score]:
    """Return the scores of a merge that lie in its output; none where there are none, or they are another merge's."""
    stored, _ = _read(stores, output)
    return stored.scores if stored and stored.run_id == run_id else []


def add(stores: Stores, output: str, run_id: str, scores: Sequence[Score]) -> str:
    """Write scores into an output beside those of other labels, and return the file's URI."""
    uri, labels = join(output, SCORES_NAME), {score.label for score in scores}
    for _ in range(TRIES):
        stored, etag = _read(stores, output)
        kept = (
            [each for each in stored.scores if each.label not in labels] if stored and stored.run_id == run_id else []
        )
        new = StoredScores(run_id=run_id, scores=[*kept, *scores])
        if stores.writer(uri).swap(uri, (new.model_dump_json(indent=2) + "\n").encode(), etag) is not None:
            return uri
    raise UnavailableError(Problem(uri, "others keep writing it", "try again"))


def _read(stores: Stores, output: str) -> tuple[StoredScores | None, str]:
    """Return the scores in an output and their ETag; None and "" where there are none."""
    uri = join(output, SCORES_NAME)
    try:
        pin, stored = documents.read(
            stores.of(output), uri, _STORED, documents.LARGE, "it as scores", "remove it, and evaluate again"
        )
        return stored, pin.etag
    except FileNotFoundError:
        return None, ""
