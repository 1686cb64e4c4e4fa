"""Airflow 3: operators that merge and promote, on a Ray cluster by its jobs API or by a command line of this machine.

Install this package where scheduler, workers and triggerer run. Parsing a DAG imports neither ties_ray, torch nor ray.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from airflow.triggers.base import BaseTrigger, TriggerEvent

from ties_ray_pipelines.jobs import UNAVAILABLE, Jobs, JobsError, Json, Outcome, visible
from ties_ray_pipelines.step import (
    Command,
    Job,
    Merge,
    Promote,
    Running,
    Site,
    compact,
    explain,
    is_new,
    name_of,
    signs_of_life,
    start,
    verdict,
    with_tries,
)

PATIENCE = 600.0
"""Seconds in which a cluster may be out of the triggerer's reach; then the task is woken, and tries again."""


class _Operator(BaseOperator):
    """One command of ties_ray. `retries` and `retry_delay` of the task hold where trying again may help, else none."""

    template_fields: Sequence[str] = ("address", "program", "env", "overrides")

    def __init__(
        self,
        *,
        address: str | None = None,
        program: str = "ties-ray",
        env: Mapping[str, str] | None = None,
        overrides: Sequence[str] = (),
        poll: float = 5.0,
        deferrable: bool = False,
        **kwargs: Any,
    ) -> None:
        """Take what a `Site` takes. deferrable: wait for a cluster's job in the triggerer, where it takes no slot."""
        super().__init__(**kwargs)
        self.address = address
        self.program = program
        self.env = dict(env or {})
        self.overrides = list(overrides)
        self.poll = poll
        self.deferrable = deferrable
        self._running: Running | None = None

    def command(self) -> Command:
        """Return what is to be run."""
        raise NotImplementedError

    def execute(self, context: Context) -> Json | None:
        """Run the command and return its record, which becomes the XCom."""
        site = Site(self.address or None, self.program, self.env, self.poll)
        ti = context["ti"]
        mapped = [] if ti.map_index in (None, -1) else [str(ti.map_index)]
        name = name_of(ti.dag_id, ti.run_id, ti.task_id, *mapped)
        try:
            self._running = start(site, self.command(), name)
            if self.deferrable and isinstance(self._running, Job):
                self.defer(
                    trigger=JobTrigger(site.address, self._running.attempt, self.poll), method_name="execute_complete"
                )
            with signs_of_life(name, self.log.info):
                outcome = self._running.wait(self.log.info)
        except JobsError as error:
            outcome = Outcome(name, error.exit_code, str(error), None)
        return judged(outcome, context)

    def execute_complete(self, context: Context, event: Mapping[str, str]) -> Json | None:
        """Return the record of a job that the triggerer saw end."""
        jobs = Jobs(event["address"])
        try:
            for line in jobs.log(event["attempt"]).splitlines():
                self.log.info(visible(line))
            outcome = jobs.outcome(event["attempt"])
        except JobsError as error:
            outcome = Outcome(event["attempt"], error.exit_code, str(error), None)
        return judged(outcome, context)

    def on_kill(self) -> None:
        """Cancel what runs."""
        if self._running:
            self._running.cancel()


class MergeOperator(_Operator):
    """`ties-ray merge`; its XCom is the result record, without what makes it longer than a database likes."""

    template_fields: Sequence[str] = (*_Operator.template_fields, "recipe", "result")

    def __init__(self, *, recipe: str | Mapping[str, Any], result: str | None = None, **kwargs: Any) -> None:
        """Take what a `Merge` takes: recipe is a path or URI where the command runs, or the recipe itself."""
        super().__init__(**kwargs)
        self.recipe = recipe
        self.result = result

    def command(self) -> Command:
        """Return the merge."""
        return Merge(self.recipe, tuple(self.overrides), self.result)


class PromoteOperator(_Operator):
    """`ties-ray promote` of what the task `merge` made; skipped if that was no news."""

    template_fields: Sequence[str] = (*_Operator.template_fields, "pointer", "evaluate")

    def __init__(self, *, merge: str, pointer: str, evaluate: str = "", **kwargs: Any) -> None:
        """Take what a `Promote` takes, and the task_id of the merge."""
        super().__init__(**kwargs)
        self.merge = merge
        self.pointer = pointer
        self.evaluate = evaluate
        self._output = ""

    def execute(self, context: Context) -> Json | None:
        """Promote, unless there is nothing new."""
        record = context["ti"].xcom_pull(task_ids=self.merge)
        if not is_new(record):
            raise AirflowSkipException(f"nothing new: {record['output']} lay there already")
        self._output = record["output"]
        return super().execute(context)

    def command(self) -> Command:
        """Return the promotion."""
        return Promote(self._output, self.pointer, self.evaluate, tuple(self.overrides))


class JobTrigger(BaseTrigger):
    """Fires when a job of a cluster is over."""

    def __init__(self, address: str, attempt: str, poll: float) -> None:
        super().__init__()
        self.address = address
        self.attempt = attempt
        self.poll = poll

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what makes this trigger again, in the triggerer; the token is in its environment."""
        return f"{__name__}.JobTrigger", {"address": self.address, "attempt": self.attempt, "poll": self.poll}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait until the job is over, or its cluster is lost."""
        jobs, last_answer = Jobs(self.address), time.monotonic()
        while True:
            try:
                if (await asyncio.to_thread(jobs.info, self.attempt)).ended:
                    break
                last_answer = time.monotonic()
            except JobsError as error:
                if error.exit_code != UNAVAILABLE or time.monotonic() - last_answer > PATIENCE:
                    break  # the task finds out why
            await asyncio.sleep(self.poll)
        yield TriggerEvent({"address": self.address, "attempt": self.attempt})

    async def on_kill(self) -> None:
        """Stop the job, for a person ended the task while it was deferred."""
        await asyncio.to_thread(Jobs(self.address).stop, self.attempt)


def judged(outcome: Outcome, context: Context) -> Json | None:
    """Return the record of a step that is done, for XCom; raise what makes Airflow fail the task, or try it again."""
    match verdict(outcome.exit_code):
        case "done":
            record = with_tries(outcome, context["ti"].try_number > 1).record
            return record and compact(record)
        case "again":
            raise AirflowException(explain(outcome))
        case "failed" | "cancelled":
            raise AirflowFailException(explain(outcome))
