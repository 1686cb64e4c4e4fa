"""Progress: a display on a terminal or in a notebook, else lines of the log."""

import html
import logging
import sys
import threading
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any, Protocol, TextIO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ties_ray.cli.screen import Screen, duration, num_bytes
from ties_ray.errors import printable
from ties_ray.kernels import code_folders
from ties_ray.reports.records import Progress

EVERY_SECONDS = 10.0
"""Seconds between two lines of progress of one stage."""
REDRAWS = 4.0
"""How often a display is drawn anew in a second."""
RATE_SECONDS = 15.0
"""Seconds over which the rate is averaged."""
COMPILES_AFTER = 5.0
"""Seconds of the start after which it is said that the first start on a machine compiles."""
NOTHING = Progress("", 0, 0, 0, 0, activity="starting")


class Shown(Protocol):
    """Takes each report of progress, from entering to leaving its context."""

    def __enter__(self) -> "Shown": ...
    def __exit__(self, *_: object) -> None: ...
    def __call__(self, progress: Progress) -> None: ...  # noqa: D102


def shown_in(file: TextIO, log: logging.Logger) -> Shown:
    """Return what shows progress here: in a notebook, on the terminal that `file` is, or as lines of the log."""
    if in_notebook():
        return Notebook()
    return Display(file) if file.isatty() else Lines(log)


def in_notebook() -> bool:
    """Return whether this process serves a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


class _State:
    """The last report, and what follows from all of them: the time that has passed, and the rate of reading."""

    def __init__(self) -> None:
        self.progress = NOTHING
        self._started = self._reported = self._stage_since = time.monotonic()
        self._samples: deque[tuple[float, int]] = deque()
        """Times and bytes read; the first sample is the one before reading began."""
        self._compiles = code_folders.are_empty()
        """Whether no kernel was compiled when this began; the first files appear long before the last."""

    def take(self, progress: Progress) -> bool:
        """Take a report; return whether a stage begins with it."""
        now = time.monotonic()
        begins = progress.stage != self.progress.stage
        if begins:
            self._stage_since = now
        if progress.bytes_read < self.progress.bytes_read:  # verify counts anew for each of its tasks
            self._samples.clear()
        self.progress, self._reported = progress, now
        if progress.bytes_read or not self._samples:
            self._samples.append((now, progress.bytes_read))
        elif len(self._samples) == 1:
            self._samples[0] = now, 0  # nothing is read yet: the start does not count
        while len(self._samples) > 2 and now - self._samples[1][0] > RATE_SECONDS:
            self._samples.popleft()
        return begins

    @property
    def rate(self) -> float:
        """Bytes read a second, over the last seconds."""
        if len(self._samples) < 2:
            return 0.0
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began) if ended > began else 0.0

    @property
    def title(self) -> str:
        """What is going on, in a word or two."""
        progress = self.progress
        text = printable(progress.activity or progress.stage)
        is_late = progress.stage == "start" and time.monotonic() - self._stage_since > COMPILES_AFTER
        if is_late and self._compiles:
            text += " (the first start on a machine compiles kernels)"
        return text

    @property
    def count(self) -> str:
        """How many shards of the stage are done."""
        return f"{self.progress.done:,} of {self.progress.total:,}" if self.progress.total > 1 else ""

    def facts(self) -> list[str]:
        """Return bytes, rate, workers, losses and times, those first that count most."""
        progress, now = self.progress, time.monotonic()
        facts = []
        if progress.bytes_planned:
            facts.append(f"{_share(progress.bytes_read, progress.bytes_planned)} read")
        if self.rate:
            facts.append(f"{num_bytes(self.rate)}/s")
        facts.append(f"after {duration(now - self._started)}")
        left = self._seconds_left(now)
        if left is not None:
            facts.append(f"{duration(left)} left")
        if progress.workers:
            here = f"{progress.workers - progress.workers_missing:,} of " if progress.workers_missing else ""
            facts.append(f"{here}{progress.workers:,} worker{'s' * (progress.workers > 1)}")
        if progress.workers_missing == progress.workers > 0:
            facts = [f"{facts.pop()}, waiting for a place for {duration(progress.waiting_seconds)}", *facts]
        if progress.workers_lost:
            facts.append(f"{progress.workers_lost:,} lost")
        if progress.bytes_written:
            facts.append(f"{num_bytes(progress.bytes_written)} written")
        return facts

    def _seconds_left(self, now: float) -> float | None:
        """Return the forecast of the merge; where there is none, the time of what is left to read at this rate."""
        progress = self.progress
        if progress.seconds_left is not None:
            overall = progress.seconds_left - (now - self._reported)
            return overall if overall > 0 else None
        left = progress.bytes_planned - progress.bytes_read
        return left / self.rate if self.rate and left > 0 else None


class Lines(AbstractContextManager["Lines"]):
    """Logs a line for each stage and each event, and one every few seconds, also where nothing is reported."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._state = _State()
        self._logged_at = time.monotonic()
        self._left = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._repeat, name="progress", daemon=True)

    def __enter__(self) -> "Lines":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def __call__(self, progress: Progress) -> None:
        """Log a line if it is time for one."""
        with self._writing:
            if progress.event:
                self._log.info("%s", printable(progress.event), extra={"facts": asdict(progress)})
            elif self._state.take(progress) or time.monotonic() - self._logged_at >= EVERY_SECONDS:
                self._write()

    def _repeat(self) -> None:
        while not self._left.wait(EVERY_SECONDS / 4):
            with self._writing:
                if time.monotonic() - self._logged_at >= EVERY_SECONDS:
                    self._write()

    def _write(self) -> None:
        self._logged_at = time.monotonic()
        state = self._state
        stage = printable(state.progress.stage) or "start"
        line = ", ".join([state.title, *filter(None, [state.count]), *state.facts()])
        self._log.info("%s: %s", stage, line, extra={"facts": asdict(state.progress)})


class Display(AbstractContextManager["Display"]):
    """Draws the current stage on a terminal: two lines, of which a narrow terminal shows the beginning."""

    def __init__(self, file: TextIO) -> None:
        self._state = _State()
        self._spinner = Spinner("dots")
        self._live = Live(
            console=Screen(file=file), transient=True, refresh_per_second=REDRAWS, get_renderable=self._draw
        )

    def __enter__(self) -> "Display":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Take a report; print an event above the display."""
        if progress.event:
            self._live.console.print(Text(printable(progress.event)), soft_wrap=True)
        else:
            self._state.take(progress)

    def _draw(self) -> RenderableType:
        state, progress = self._state, self._state.progress
        top = Table.grid(padding=(0, 1))
        many = progress.total > 1
        bar = ProgressBar(progress.total, progress.done, width=24) if many else Text("")
        top.add_row(self._spinner, Text(state.title), bar, Text(state.count))
        return Group(top, Text("  " + "  ".join(state.facts()), style="dim", no_wrap=True, overflow="ellipsis"))


class Notebook(AbstractContextManager["Notebook"]):
    """Draws the current stage below a cell of a notebook."""

    def __init__(self) -> None:
        self._state = _State()
        self._drawn_at = 0.0
        self._handle: Any = None

    def __enter__(self) -> "Notebook":
        from IPython.display import HTML, display

        self._handle = display(HTML(""), display_id=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._show("")

    def __call__(self, progress: Progress) -> None:
        """Take a report, and draw it unless the last drawing is recent."""
        if progress.event:
            progress = replace(self._state.progress, event=progress.event)
        begins = self._state.take(progress)
        now = time.monotonic()
        if begins or progress.event or now - self._drawn_at >= 1 / REDRAWS:
            self._drawn_at = now
            self._show(self._draw())

    def _draw(self) -> str:
        progress, state = self._state.progress, self._state
        bar = f'<progress value="{progress.done}" max="{progress.total}"></progress> ' if progress.total > 1 else ""
        words = [state.title, *filter(None, [state.count]), *state.facts(), printable(progress.event)]
        return bar + " · ".join(html.escape(word) for word in words if word)

    def _show(self, text: str) -> None:
        from IPython.display import HTML

        self._handle.update(HTML(text))


def _share(part: int, whole: int) -> str:
    """Return two sizes as `1.5 of 3.0 GB` where they have one unit."""
    (read, unit), (planned, of_whole) = (num_bytes(size).rsplit(" ", 1) for size in (part, whole))
    return f"{read} of {planned} {of_whole}" if unit == of_whole else f"{read} {unit} of {planned} {of_whole}"
