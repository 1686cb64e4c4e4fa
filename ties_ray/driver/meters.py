"""Measures a merge under way: its traffic, its seconds, and when it should end."""

import time
from collections.abc import Mapping

from ties_ray.driver.schedule import Schedule
from ties_ray.planning.forecast import Progressed, ProgressForecast
from ties_ray.reports.records import Progress, Watch
from ties_ray.worker.messages import Answer, Traffic
from ties_ray.worker.timing import ACTIVITIES, Span, Times, Trace


class Meters:
    """Adds up the workers' answers, and reports progress."""

    def __init__(self, watch: Watch, trace: Trace | None) -> None:
        """watch: takes each report of progress. trace: the file of a profile, None without one."""
        self.traffic = Traffic()
        self.seconds = dict.fromkeys((*ACTIVITIES, "idle"), 0.0)
        """Seconds of all workers by activity."""
        self.times = Times(profiled=trace is not None)
        """The driver's own spans."""
        self.expected: float | None = None
        """When the run should end, by the monotonic clock; None while that is unknown."""
        self.bytes_planned = 0
        """Bytes that the plan reads."""
        self.profiled = trace is not None
        """Whether each span of time is kept."""
        self._watch = watch
        self._trace = trace
        self._forecast: ProgressForecast | None = None

    def begin(self, forecast: ProgressForecast | None) -> None:
        """Forecast the end of the run by the next answers, unless it is known already."""
        self._forecast = forecast if self.expected is None else None

    def add(self, answer: Answer) -> None:
        """Add a worker's answer."""
        self.traffic = self.traffic.plus(answer.traffic)
        self._traced(answer.worker, answer.spans)
        for name, value in answer.seconds.items():
            self.seconds[name] += value
        if self._forecast:
            seconds = answer.seconds
            waited = seconds.get("wait_read", 0.0) + seconds.get("wait_write", 0.0)
            traffic = answer.traffic
            done = Progressed(1, traffic.bytes_read, traffic.bytes_written, seconds.get("work", 0.0), waited)
            if (left := self._forecast.add(done)) is not None:
                self._forecast, self.expected = None, time.monotonic() + left

    def tell(self, stage: str, schedule: Schedule | None = None, *, done: int = 0, of: int = 0) -> None:
        """Report how far a stage is: by its schedule, or as `done` shards of `of`."""
        if schedule:
            done, of = schedule.num_done, schedule.num_tasks
        brought = self.traffic.bytes_read + self.traffic.bytes_kept
        self._watch(Progress(stage, done, of, brought, self.bytes_planned))

    def end_stage(self) -> None:
        """Write the driver's own spans into the profile."""
        self._traced("stages", self.times.take()[1])

    def split_seconds(self) -> dict[str, float]:
        """Return the workers' seconds by activity. Time that no wait explains counts as merging."""
        seconds: Mapping[str, float] = self.seconds
        merge = seconds["work"] - seconds["wait_read"] - seconds["wait_write"]
        return {name: round(value, 3) for name, value in {"merge": merge, **seconds}.items() if name != "work"}

    def _traced(self, worker: str, spans: tuple[Span, ...]) -> None:
        if self._trace:
            self._trace.add(worker, spans)
