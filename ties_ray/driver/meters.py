"""What a merge under way has cost so far, and when it should end."""

import time
from collections.abc import Mapping

from ties_ray.driver.schedule import Schedule
from ties_ray.planning.forecast import Progressed, ProgressForecast
from ties_ray.reports.records import Progress, Watch
from ties_ray.worker.messages import Answer, Traffic
from ties_ray.worker.timing import ACTIVITIES, Span, Times, Trace


class Meters:
    """Adds up what workers answer, and tells whoever watches."""

    def __init__(self, watch: Watch, trace: Trace | None) -> None:
        """trace: the file of a profile, where one was asked for."""
        self.traffic = Traffic()
        self.seconds = dict.fromkeys((*ACTIVITIES, "idle"), 0.0)
        """Seconds of workers by activity."""
        self.times = Times(profiled=trace is not None)
        """The driver's own spans."""
        self.expected: float | None = None
        """When the run should end, by the monotonic clock."""
        self.bytes_planned = 0
        """Bytes that the plan says are read."""
        self.profiled = trace is not None
        """Whether each span of time is noted."""
        self._watch = watch
        self._trace = trace
        self._forecast: ProgressForecast | None = None

    def begin(self, forecast: ProgressForecast | None) -> None:
        """Let the next answers tell how long the run takes, until it is known."""
        self._forecast = forecast if self.expected is None else None

    def add(self, answer: Answer) -> None:
        """Take in what a worker has done since its last answer."""
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
        """Tell whoever watches how far a stage is: by its schedule, or `done` of so many."""
        if schedule:
            done, of = schedule.num_done, schedule.num_tasks
        brought = self.traffic.bytes_read + self.traffic.bytes_kept
        self._watch(Progress(stage, done, of, brought, self.bytes_planned))

    def end_stage(self) -> None:
        """Put the driver's own spans into the profile."""
        self._traced("stages", self.times.take()[1])

    def split_seconds(self) -> dict[str, float]:
        """Return the workers' time by what it went for; the merge itself is what no wait explains."""
        seconds: Mapping[str, float] = self.seconds
        merge = seconds["work"] - seconds["wait_read"] - seconds["wait_write"]
        return {name: round(value, 3) for name, value in {"merge": merge, **seconds}.items() if name != "work"}

    def _traced(self, worker: str, spans: tuple[Span, ...]) -> None:
        if self._trace:
            self._trace.add(worker, spans)
