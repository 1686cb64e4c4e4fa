"""Operators that merge, verify and promote, and the link to their jobs."""

from collections.abc import Mapping, Sequence
from typing import Any

from airflow.configuration import conf
from airflow.sdk import BaseOperator, BaseOperatorLink, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from ties_ray_airflow.hook import TiesRayHook
from ties_ray_airflow.trigger import JobTrigger
from ties_ray_pipelines.jobs import JobsError, Json, Outcome, visible
from ties_ray_pipelines.step import (
    Command,
    Job,
    Merge,
    Promote,
    Running,
    Site,
    Verify,
    compact,
    explain,
    is_new,
    name_of,
    signs_of_life,
    start,
    verdict,
    with_tries,
)


class DashboardLink(BaseOperatorLink):
    """The page of a task's job in Ray's dashboard; empty for a command of this machine."""

    name = "Ray dashboard"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        """Return what the operator knows of its job; Airflow keeps it."""
        return getattr(operator, "job_url", "")


class _Operator(BaseOperator):
    """One command of ties_ray. `retries` and `retry_delay` of the task hold where trying again may help, else none."""

    template_fields: Sequence[str] = ("conn_id", "program", "env", "overrides")
    operator_extra_links = (DashboardLink(),)
    ui_color = "#dbe9f6"

    def __init__(
        self,
        *,
        conn_id: str | None = None,
        program: str = "ties-ray",
        env: Mapping[str, str] | None = None,
        overrides: Sequence[str] = (),
        poll: float = 5.0,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        """Take where the command runs.

        conn_id: a connection of the type `ties_ray`, which names a Ray cluster. None: `program` runs on this machine.
        env, poll: as of a `Site`. deferrable: wait for a cluster's job in the triggerer, where it takes no slot.
        """
        super().__init__(**kwargs)
        self.conn_id = conn_id
        self.program = program
        self.env = dict(env or {})
        self.overrides = list(overrides)
        self.poll = poll
        self.deferrable = deferrable
        self.job_url = ""
        self._running: Running | None = None

    def command(self) -> Command:
        """Return what is to be run."""
        raise NotImplementedError

    def execute(self, context: Context) -> Json | None:
        """Run the command and return its record, which becomes the XCom."""
        ti = context["ti"]
        mapped = [] if ti.map_index in (None, -1) else [str(ti.map_index)]
        name = name_of(ti.dag_id, ti.run_id, ti.task_id, *mapped)
        try:
            self._running = start(self._site(), self.command(), name)
            if isinstance(self._running, Job):
                self.job_url = self._running.url
                if self.deferrable:
                    trigger = JobTrigger(str(self.conn_id), self._running.attempt, self.poll)
                    self.defer(trigger=trigger, method_name="execute_complete")
                ti.xcom_push(DashboardLink().xcom_key, self.job_url)  # while it runs, too
            with signs_of_life(name, self.log.info):
                outcome = self._running.wait(self.log.info)
        except JobsError as error:
            outcome = Outcome(name, error.exit_code, str(error), None, ran=False)
        return judged(outcome, context)

    def execute_complete(self, context: Context, event: Mapping[str, str]) -> Json | None:
        """Return the record of a job that the triggerer saw end."""
        attempt = event["attempt"]
        try:
            jobs = TiesRayHook(str(self.conn_id)).get_conn()
            self.job_url = jobs.url_of(attempt)
            for line in jobs.log(attempt).splitlines():
                self.log.info(visible(line))
            outcome = jobs.outcome(attempt)
        except JobsError as error:
            outcome = Outcome(attempt, error.exit_code, str(error), None, ran=False)
        return judged(outcome, context)

    def on_kill(self) -> None:
        """Cancel what runs."""
        if self._running:
            self._running.cancel()

    def _site(self) -> Site:
        if not self.conn_id:
            return Site(None, self.program, self.env, self.poll)
        jobs = TiesRayHook(self.conn_id).get_conn()
        return Site(jobs.address, self.program, self.env, self.poll, token=jobs.token)


class MergeOperator(_Operator):
    """`ties-ray merge`; its XCom is the result record, without what makes it longer than a database likes."""

    template_fields: Sequence[str] = (*_Operator.template_fields, "recipe", "result")
    template_ext: Sequence[str] = (".yaml", ".yml")
    template_fields_renderers = {"recipe": "yaml"}  # noqa: RUF012

    def __init__(self, *, recipe: str | Mapping[str, Any], result: str | None = None, **kwargs: Any) -> None:
        """Take what a `Merge` takes.

        recipe: a relative path is a file beside the DAG, a template that travels with the job. A URI or an absolute
        path is read by the command, where it runs. Else it is the recipe itself.
        """
        super().__init__(**kwargs)
        self.recipe = recipe
        self.result = result
        if isinstance(recipe, str) and ("://" in recipe or recipe.startswith("/")):
            self.template_ext = ()

    def command(self) -> Command:
        """Return the merge."""
        return Merge(self.recipe, tuple(self.overrides), self.result)


class _OfMerge(_Operator):
    """A command about a merge that another task made."""

    template_fields: Sequence[str] = (*_Operator.template_fields, "merge")

    def __init__(self, *, merge: Mapping[str, Any], **kwargs: Any) -> None:
        """Take the record of a merge: `merge.output` of the task `merge`, which then comes before this one."""
        super().__init__(**kwargs)
        self.merge = merge


class VerifyOperator(_OfMerge):
    """`ties-ray verify` of what a task has merged."""

    def __init__(self, *, merge: Mapping[str, Any], sample: float = 0.0, **kwargs: Any) -> None:
        """Take what a `Verify` takes, and the record of the merge."""
        super().__init__(merge=merge, **kwargs)
        self.sample = sample

    def command(self) -> Command:
        """Return the verification."""
        return Verify(self.merge["output"], self.sample, tuple(self.overrides))


class PromoteOperator(_OfMerge):
    """`ties-ray promote` of what a task has merged; skipped if that was no news."""

    template_fields: Sequence[str] = (*_OfMerge.template_fields, "pointer", "evaluate")

    def __init__(self, *, merge: Mapping[str, Any], pointer: str, evaluate: str = "", **kwargs: Any) -> None:
        """Take what a `Promote` takes, and the record of the merge."""
        super().__init__(merge=merge, **kwargs)
        self.pointer = pointer
        self.evaluate = evaluate

    def execute(self, context: Context) -> Json | None:
        """Promote, unless there is nothing new."""
        if not is_new(self.merge):
            raise AirflowSkipException(f"nothing new: {self.merge['output']} lay there already")
        return super().execute(context)

    def command(self) -> Command:
        """Return the promotion."""
        return Promote(self.merge["output"], self.pointer, self.evaluate, tuple(self.overrides))


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
