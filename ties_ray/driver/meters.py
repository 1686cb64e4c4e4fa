"""Measures a merge under way: its traffic, its seconds, and when it should end."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from ties_ray import runtime
from ties_ray.driver.places import Places
from ties_ray.driver.schedule import Schedule
from ties_ray.planning.forecast import Progressed, ProgressForecast
from ties_ray.reports.records import Progress, Watch
from ties_ray.worker.messages import Answer, Traffic
from ties_ray.worker.timing import ACTIVITIES, Span, Times, Trace


class Foreseen(NamedTuple):
    """A forecast of a run's end. Both times are those of the monotonic clock."""

    at: float
    """When it was made."""
    end: float
    """When the run should end."""


REFRESH_SECONDS = 2.0
"""Seconds between two forecasts of a run's end."""


class Meters:
    """Adds up the workers' answers, and reports progress."""

    def __init__(self, watch: Watch, trace: Trace | None) -> None:
        """watch: takes each report of progress. trace: the file of a profile, None without one."""
        self.traffic = Traffic()
        self.seconds = dict.fromkeys((*ACTIVITIES, "idle"), 0.0)
        """Seconds of all workers by activity."""
        self.times = Times(profiled=trace is not None)
        """The driver's own spans."""
        self.first: Foreseen | None = None
        """The first forecast of the run's end; None while there is none."""
        self.places = Places(0)
        self.shards_again = 0
        """Shards that were done again."""
        self.bytes_planned = 0
        """Bytes that the plan reads."""
        self.profiled = trace is not None
        """Whether each span of time is kept."""
        self._latest: Foreseen | None = None
        self._watch = watch
        self._trace = trace
        self._forecast: ProgressForecast | None = None

    def begin(self, forecast: ProgressForecast | None) -> None:
        """Forecast the end of the run by the answers of a round; None: by none."""
        self._forecast = forecast

    def add(self, answer: Answer) -> None:
        """Add a worker's answer."""
        self.traffic = self.traffic.plus(answer.traffic)
        self._traced(answer.worker, answer.spans)
        for name, value in answer.seconds.items():
            self.seconds[name] += value
        if self._forecast:
            self._foresee(self._forecast, answer)

    def _foresee(self, forecast: ProgressForecast, answer: Answer) -> None:
        seconds, traffic = answer.seconds, answer.traffic
        waited = seconds.get("wait_read", 0.0) + seconds.get("wait_write", 0.0)
        bytes_read = traffic.bytes_read + traffic.bytes_kept
        forecast.add(Progressed(1, bytes_read, traffic.bytes_written, seconds.get("work", 0.0), waited))
        now = runtime.monotonic()
        if self._latest and now - self._latest.at < REFRESH_SECONDS:
            return
        left = forecast.seconds_left()
        if left is not None:
            left *= max(1, self.places.size) / max(1, self.places.size - len(self.places.empty))
            self._latest = Foreseen(now, now + left)
            self.first = self.first or self._latest

    def tell(
        self, stage: str, schedule: Schedule | None = None, *, done: int = 0, of: int = 0, activity: str = ""
    ) -> None:
        """Report how far a stage is: by its schedule, or as `done` shards of `of`."""
        if schedule:
            done, of = schedule.num_done, schedule.num_tasks
        self._watch(self._progress(stage, done, of, activity))

    def announce(self, line: str) -> None:
        """Report an event that is told once."""
        self._watch(replace(self._progress("", 0, 0, ""), event=line))

    def _progress(self, stage: str, done: int, of: int, activity: str) -> Progress:
        traffic, now = self.traffic, runtime.monotonic()
        return Progress(
            stage,
            done,
            of,
            traffic.bytes_read + traffic.bytes_kept,
            self.bytes_planned,
            bytes_written=traffic.bytes_written,
            activity=activity,
            workers=self.places.size,
            workers_missing=len(self.places.empty),
            workers_lost=self.places.losses,
            waiting_seconds=self.places.waiting_seconds,
            seconds_left=max(0.0, self._latest.end - now) if self._latest else None,
        )

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
