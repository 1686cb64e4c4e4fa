"""Scores finished merges, whole sweeps and other folders, and stores the scores beside the outputs."""

import importlib.metadata
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from ties_ray.driver.tasks import Tasks
from ties_ray.errors import InputError, MergeError, Problem, printable
from ties_ray.evaluations import AnyEvaluations, Evaluation, Evaluator, Json, Score, versions
from ties_ray.executors import Needs
from ties_ray.libraries.loaders import SCORES_NAME
from ties_ray.operations.subjects import FolderSubject
from ties_ray.recipe.evaluations import Evaluating
from ties_ray.recipe.recipe import Run
from ties_ray.reports import scores as records
from ties_ray.reports import sweep as tables
from ties_ray.reports.records import Progress, ReportedProblem, Watch, find_result
from ties_ray.reports.scores import ScoredModel, Scores
from ties_ray.stores import Stores, absolute, hub_uri, join, last_part, shown

PACKAGES = ("ties-ray", "torch", "transformers")
"""Packages that must have one version on all workers, since scores rest on them."""
BESIDE = 2**30
"""Bytes of memory that a worker takes beside its model."""
WIDEST = 2
"""How many times larger a model becomes when it computes in fp32 and is stored in 16 bits."""


@dataclass(frozen=True)
class Target:
    """One model that is to be scored."""

    name: str
    uri: str
    run_id: str = ""
    """The merge that made it; empty where none did."""
    size: int = 0
    """Bytes of its weights, as far as they are known."""
    base: str = ""
    """URI of its base; empty where it is not known."""


@dataclass
class _Work:
    """A model, what is known of it, and what has to be computed."""

    target: Target
    stored: list[Score] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    """Numbers of the evaluations."""


def evaluate(
    asked: Evaluating,
    uris: Sequence[str],
    *,
    with_base: bool = False,
    base: str = "",
    fresh: bool = False,
    watch: Watch = lambda progress: None,
) -> Scores:
    """Score models, and store the scores of finished merges beside them.

    uris: outputs of merges, folders of sweeps, or any folders of models. with_base: score the bases of merges too.
    base: URI of the base that adapters change. fresh: compute scores that are known, too.
    A model that can't be scored is no error: it has `problems`. Raises a `MergeError` where data or folders are wrong.
    """
    started, stores = time.monotonic(), Stores(asked.storage)
    sweeps, targets = targets_of(stores, uris)
    if with_base or base:
        targets += _bases(targets, base)
    evaluators = [each.prepared(stores, asked.seed) for each in asked.evaluate]
    works = [_work_on(stores, target, evaluators, fresh=fresh) for target in targets]
    models = {number: ScoredModel(model=each.target.name, uri=each.target.uri, run_id=each.target.run_id,
                                  scores=each.stored, reused=len(each.stored))
              for number, each in enumerate(works)}  # fmt: skip
    files = list[str]()
    for number, answer in _carried_out(asked, evaluators, works, base, watch):
        target = works[number].target
        models[number] = models[number].model_copy(
            update={"scores": _in_order(asked, [*works[number].stored, *answer.scores]), "problems": answer.problems}
        )
        if target.run_id and answer.scores:
            records.add(stores, target.uri, target.run_id, answer.scores)
    files += [join(each.uri, SCORES_NAME) for each in models.values() if each.run_id and each.scores]
    files += [uri for sweep in sweeps for uri in _with_scores(stores, sweep)]
    return Scores(
        models=list(models.values()),
        files=files,
        seconds=round(time.monotonic() - started, 3),
        rejected=list(_rejected(asked.evaluate, models.values())),
    )


def approve(asked: Evaluating, output: str, current: str = "", watch: Watch = lambda progress: None) -> Scores:
    """Score an output, and store the scores beside it. Raises `InputError` where they are not approved.

    A score has to be within the bounds of its evaluation. current: an output than which no score may be worse.
    """
    scores = evaluate(asked, [output, *filter(None, [current])], watch=watch)
    own = scores.models[0]
    problems = [each.problem() for each in own.problems]
    remedy, code = "the pointer is as it was", "not_approved"
    problems += [Problem(output, sentence, remedy, code) for sentence in _rejected(asked.evaluate, [own])]
    before = {score.label: score for model in scores.models[1:] for score in model.scores}
    for score in own.scores:
        if score.label in before and score.merit < before[score.label].merit:
            message = f"{score.label} is {score.value:.6g}, and {before[score.label].value:.6g} in {current}"
            problems.append(Problem(output, message, remedy, code))
    if problems:
        raise InputError(problems)
    return scores


def targets_of(stores: Stores, uris: Sequence[str]) -> tuple[list[str], list[Target]]:
    """Return the folders of sweeps among some folders, and all models: each setting of a sweep is one.

    Raises `InputError` for an output without a finished merge.
    """
    sweeps, targets = list[str](), list[Target]()
    for uri in (absolute(hub_uri(each)).rstrip("/") for each in uris):
        if (table := tables.find(stores, uri)) is not None:
            sweeps.append(uri)
            if outside := [row.output for row in table.rows if not row.output.startswith(f"{uri}/")]:
                message = f"its table names {shown(outside[0])}, which lies outside of it"
                raise InputError(Problem(shown(uri), message, "score that folder by its own name"))
            targets += [_of_output(stores, row.output, row.setting) for row in table.rows]
        else:
            targets.append(_of_output(stores, uri, last_part(uri)))
    names = [each.name for each in targets]
    unlike = [each.name if names.count(each.name) == 1 else shown(each.uri) for each in targets]
    return sweeps, [Target(name, *_rest(each)) for name, each in zip(unlike, targets, strict=True)]


def _rest(target: Target) -> tuple[str, str, int, str]:
    return target.uri, target.run_id, target.size, target.base


def _of_output(stores: Stores, uri: str, name: str) -> Target:
    result = find_result(stores, uri)
    if result is None:
        return Target(name, uri)
    if result.status != "done":
        raise InputError(Problem(shown(uri), "holds no finished merge", "merge first"))
    base = result.provenance.base.uri if result.provenance else ""
    return Target(name, uri, result.run_id, sum(file.size for file in result.files), base)


def _bases(targets: Sequence[Target], named: str) -> list[Target]:
    """Return the bases of merges, or the named one."""
    uris = [absolute(hub_uri(named))] if named else list(dict.fromkeys(each.base for each in targets if each.base))
    if not uris:
        message = "no merge among these names its base"
        raise InputError(Problem("base", message, "give its folder as one of the models"))
    return [Target("base" if len(uris) == 1 else shown(uri), uri) for uri in uris]


def _work_on(stores: Stores, target: Target, evaluators: Sequence[Evaluator], *, fresh: bool) -> _Work:
    """Return what is known of a model, and which evaluations are left."""
    work = _Work(target)
    by_label = {}
    if target.run_id and not fresh:
        by_label = {score.label: score for score in records.read(stores, target.uri, target.run_id)}
    for number, evaluator in enumerate(evaluators):
        score = by_label.get(evaluator.evaluation.title)
        if score and _is_same(score, evaluator):
            work.stored.append(score)
        else:
            work.missing.append(number)
    return work


def _is_same(score: Score, evaluator: Evaluator) -> bool:
    """Return whether a stored score is the one that an evaluator would compute."""
    own = evaluator.evaluation
    return (
        own.repeatable
        and (score.seed, _without_bounds(score.evaluation)) == (evaluator.seed, _without_bounds(own.shown()))
        and [pin.sha256 for pin in score.pins] == [pin.sha256 for pin in evaluator.pins]
        and score.versions == versions(own.packages)
    )


def _without_bounds(evaluation: Json) -> Json:
    return {name: value for name, value in evaluation.items() if name not in ("at_least", "at_most")}


# -- on the workers


class _Setup(BaseModel):
    """What a worker is told once."""

    model_config = ConfigDict(frozen=True)

    evaluate: AnyEvaluations
    seed: int
    storage: dict[str, Json]
    sha256: tuple[tuple[str, ...], ...]
    """The SHA-256 of the data of each evaluation, as the driver has read them."""


class _Task(BaseModel):
    """One model, and the numbers of the evaluations that score it."""

    model_config = ConfigDict(frozen=True)

    uri: str
    base: str
    evaluations: tuple[int, ...]


class _Answer(BaseModel):
    """The scores of one model, and why there are not all of them."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    scores: list[Score]
    problems: list[ReportedProblem]


_SETUP, _TASK, _ANSWER = TypeAdapter(_Setup), TypeAdapter(_Task), TypeAdapter(_Answer)


class ScoringHost:
    """Scores one model after the other in a worker. It reads the data once."""

    def __init__(self, setup: str) -> None:
        """Raises `InputError` where this worker reads other data than the driver."""
        own = _SETUP.validate_json(setup)
        self._stores = Stores(own.storage)
        self._evaluators = [each.prepared(self._stores, own.seed) for each in own.evaluate]
        for evaluator, expected in zip(self._evaluators, own.sha256, strict=True):
            if [pin.sha256 for pin in evaluator.pins] != list(expected):
                uris = ", ".join(pin.uri for pin in evaluator.pins)
                message = "this worker reads other data than the driver"
                raise InputError(Problem(uris, message, "keep the data unchanged, where all workers can read them"))

    def run(self, message: str) -> str:
        """Return the scores of the model that a message names."""
        task = _TASK.validate_json(message)
        scores, problems = list[Score](), list[ReportedProblem]()
        with FolderSubject(self._stores, task.uri, task.base) as subject:
            for number in task.evaluations:
                try:
                    scores.append(self._evaluators[number].score(subject))
                except MergeError as error:
                    problems += map(ReportedProblem.of, error.problems)
        return _Answer(scores=scores, problems=problems).model_dump_json()


def _carried_out(
    asked: Evaluating, evaluators: Sequence[Evaluator], works: Sequence[_Work], base: str, watch: Watch
) -> "Iterable[tuple[int, _Answer]]":
    """Yield the answers of workers as they come, by the number of the model."""
    messages = {
        number: _Task(uri=each.target.uri, base=base, evaluations=tuple(each.missing)).model_dump_json()
        for number, each in enumerate(works)
        if each.missing
    }
    if not messages:
        return
    setup = _Setup(
        evaluate=asked.evaluate,
        seed=asked.seed,
        storage=asked.storage,
        sha256=tuple(tuple(pin.sha256 for pin in each.pins) for each in evaluators),
    )
    done = 0

    def announce(line: str) -> None:
        watch(_progress(done, len(messages), event=line))

    watch(_progress(0, len(messages)))
    largest = max(works[number].target.size for number in messages)
    needs = _needs(asked.run, len(messages), largest, announce)
    with Tasks(_executor(asked.run), f"{__name__}:ScoringHost", setup.model_dump_json(), needs) as tasks:
        for turn in tasks.carry_out(messages):
            for number, answer in turn:
                done += 1
                yield number, _ANSWER.validate_json(answer)
            watch(_progress(done, len(messages), workers=tasks.size))


def _progress(done: int, total: int, *, workers: int = 0, event: str = "") -> Progress:
    return Progress("evaluate", done, total, 0, 0, activity="models", workers=workers, event=event)


def _executor(run: Run) -> str:
    """Return the executor of a section `run`; `auto` is Ray where the caller uses a cluster."""
    ray = sys.modules.get("ray")
    uses_cluster = run.address or os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized())
    if run.executor != "auto":
        return run.executor
    return "ray" if uses_cluster else "local"


def _needs(run: Run, num_models: int, largest: int, announce: Any) -> Needs:
    """Return what workers need. largest: bytes of the weights of the largest model."""
    memory = run.memory if "memory" in run.model_fields_set else WIDEST * largest + BESIDE
    local = _executor(run) == "local"
    return Needs(
        num_workers=min(run.workers, num_models) if run.workers else 1 if local else min(num_models, 4),
        memory=int(memory),
        gpus=run.gpus,
        address=run.address,
        deadline=run.deadline,
        versions=tuple((package, importlib.metadata.version(package)) for package in PACKAGES if _is_there(package)),
        announce=announce,
    )


def _is_there(package: str) -> bool:
    try:
        importlib.metadata.version(package)
        return True
    except importlib.metadata.PackageNotFoundError:
        return False


# -- what becomes of the scores


def _in_order(asked: Evaluating, scores: Iterable[Score]) -> list[Score]:
    """Return scores in the order of their evaluations."""
    by_label = {score.label: score for score in scores}
    return [by_label[each.title] for each in asked.evaluate if each.title in by_label]


def _with_scores(stores: Stores, sweep: str) -> list[str]:
    """Write all stored scores of a sweep into its table; return the URIs of the table."""
    table = tables.read(stores, sweep)
    rows = []
    for row in table.rows:
        scores = records.values(records.read(stores, row.output, row.run_id))
        rows.append(row.model_copy(update={"scores": scores}))
    return tables.write(stores, sweep, table.model_copy(update={"rows": rows})).table_files


def _rejected(evaluations: Sequence[Evaluation], models: Iterable[ScoredModel]) -> Iterable[str]:
    """Yield the scores that lie outside the bounds of their evaluation, as sentences."""
    by_label: Mapping[str, Evaluation] = {each.title: each for each in evaluations}
    for model in models:
        for score in model.scores:
            own = by_label[score.label]
            if not own.approves(score):
                low = "" if own.at_least is None else f" at_least {own.at_least:g}"
                high = "" if own.at_most is None else f" at_most {own.at_most:g}"
                yield f"{printable(model.model)}: {score.label} is {score.value:.6g}, and{low}{high} is asked for"
