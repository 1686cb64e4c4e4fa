"""Prefect 3: every night, merge what is new in a bucket, and promote it if the evaluation approves.

    python nightly.py          # serves the flow, with its schedule
    python nightly.py --once   # runs it now

Variables of the environment say what to merge: TIES_RAY_RECIPE, TIES_RAY_POINTER, TIES_RAY_EVALUATE. TIES_RAY_ADDRESS
is the dashboard of a cluster. Without it, TIES_RAY_PROGRAM is a command line of this machine.
"""

import sys
from os import environ
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run, task_run
from prefect.tasks import Task

from ties_ray_pipelines.jobs import Json, Outcome
from ties_ray_pipelines.step import Command, Merge, Promote, Site, compact, explain, is_new, name_of, run, verdict

SITE = Site(environ.get("TIES_RAY_ADDRESS") or None, environ.get("TIES_RAY_PROGRAM", "ties-ray"))


class TryAgain(RuntimeError):
    """The same command continues."""


def worth_another_try(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Return whether a step that failed may succeed if it is run again."""
    return isinstance(state.result(raise_on_failure=False), TryAgain)


def done(command: Command) -> Outcome:
    """Return the outcome of a step that is done; raise what makes Prefect fail it, or try it again."""
    name = name_of(str(flow_run.name), str(flow_run.id), str(task_run.task_name))
    outcome = run(SITE, command, name, show=get_run_logger().info, tried_before=int(task_run.run_count or 1) > 1)
    if verdict(outcome.exit_code) == "again":
        raise TryAgain(explain(outcome))
    if outcome.exit_code:
        raise RuntimeError(explain(outcome))
    return outcome


@task(retries=5, retry_delay_seconds=120, retry_condition_fn=worth_another_try, persist_result=False)
def merge(recipe: str) -> Json:
    """Merge; return the result record."""
    return compact(done(Merge(recipe)).record or {})


@task(retries=5, retry_delay_seconds=120, retry_condition_fn=worth_another_try, persist_result=False)
def promote(output: str, pointer: str, evaluate: str) -> None:
    """Evaluate a merge, and let the pointer name it if it is good."""
    done(Promote(output, pointer, evaluate))


@flow(name="nightly-merge")
def nightly(
    recipe: str = environ.get("TIES_RAY_RECIPE", "s3://recipes/nightly.yaml"),
    pointer: str = environ.get("TIES_RAY_POINTER", "s3://merged/current.json"),
    evaluate: str = environ.get("TIES_RAY_EVALUATE", "python /opt/evaluate.py"),
) -> Json:
    """Merge, evaluate, promote; return the merge's record."""
    record = merge(recipe)
    if is_new(record):
        promote(record["output"], pointer, evaluate)
    return record


if __name__ == "__main__":
    if "--once" in sys.argv:
        nightly()
    else:
        nightly.serve(name="nightly-merge", cron="15 2 * * *")
