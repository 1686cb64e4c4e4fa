"""Waits for a job of a Ray cluster in the triggerer, where that takes no slot of a worker."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from ties_ray_airflow.hook import TiesRayHook, jobs_of
from ties_ray_pipelines.jobs import UNAVAILABLE, Jobs, JobsError

PATIENCE = 600.0
"""Seconds in which a cluster may be out of the triggerer's reach; then the task is woken, and tries again."""


class JobTrigger(BaseTrigger):
    """Fires when a job of a cluster is over."""

    def __init__(self, conn_id: str, attempt: str, poll: float) -> None:
        super().__init__()
        self.conn_id = conn_id
        self.attempt = attempt
        self.poll = poll

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what makes this trigger again; the connection is looked up in the triggerer, with its token."""
        return f"{__name__}.JobTrigger", {"conn_id": self.conn_id, "attempt": self.attempt, "poll": self.poll}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait until the job is over, or its cluster is lost."""
        jobs, last_answer = await self._jobs(), time.monotonic()
        while True:
            try:
                if (await asyncio.to_thread(jobs.info, self.attempt)).ended:
                    break
                last_answer = time.monotonic()
            except JobsError as error:
                if error.exit_code != UNAVAILABLE or time.monotonic() - last_answer > PATIENCE:
                    break  # the task finds out why
            await asyncio.sleep(self.poll)
        yield TriggerEvent({"attempt": self.attempt})

    async def on_kill(self) -> None:
        """Stop the job, since a person ended the task while it was deferred."""
        await asyncio.to_thread((await self._jobs()).stop, self.attempt)

    async def _jobs(self) -> Jobs:
        return jobs_of(await TiesRayHook.aget_connection(self.conn_id))
