"""The console of a command: the record on standard output, the log on standard error, and the exit code."""

import contextlib
import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from ties_ray.cli.signals import received
from ties_ray.errors import Cancelled, MergeError, Problem, printable, printable_lines

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ties_ray.reports.records import Watch

log = logging.getLogger("ties_ray")
"""Progress, notes and errors of a command."""
_ERRORS_SHOWN = 50


class Console:
    """Prints a command's record, log and errors, for people or for machines."""

    def __init__(self, *, json: bool, quiet: bool, debug: bool, json_log: bool = False) -> None:
        """json: print the record. json_log: each line of the log is a JSON object."""
        self.json, self.quiet, self.debug, self.json_log = json, quiet, debug, json_log
        self.started = time.monotonic()
        self.on_failure: Callable[[MergeError], None] = self.print_error
        self.place: Callable[[Problem], Problem] = lambda problem: problem
        """Adds file and line of the recipe to a problem of an input."""

    def run(self, command: Callable[[], int]) -> int:
        """Return the command's exit code; log every failure, one line a problem."""
        with _logging(logging.ERROR if self.quiet else logging.INFO, _JsonLines() if self.json_log else _Lines()):
            try:
                return command()
            except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
                raise
            except (Exception, KeyboardInterrupt) as caught:
                error = _as_merge_error(caught)
                if self.debug:
                    traceback.print_exception(caught)
                for problem in error.problems[:_ERRORS_SHOWN]:
                    complain(self.place(problem))
                if len(error.problems) > _ERRORS_SHOWN:
                    complain(Problem("", f"and {len(error.problems) - _ERRORS_SHOWN:,} more problems"))
                self._report_failure(error, cancelled=isinstance(caught, KeyboardInterrupt))
                return error.exit_code

    def _report_failure(self, error: MergeError, *, cancelled: bool) -> None:
        """Call `on_failure`. A signal may have cut an import in half, and then there is nobody to tell."""
        try:
            self.on_failure(error)
        except Exception:
            if not cancelled:
                raise

    def print_error(self, error: MergeError) -> None:
        """Print the error as a record, where JSON is asked for."""
        if self.json:
            from ties_ray.reports.records import Failure

            print_json(json.dumps({"error": Failure.of(error).model_dump(mode="json")}, indent=2))

    def show(self, record: "BaseModel", *things: Any) -> None:
        """Print the record for machines, or the texts and tables for people."""
        if self.json:
            print_json(record.model_dump_json(indent=2))
        elif not self.quiet:
            from ties_ray.cli.screen import show

            show(*things)

    @contextlib.contextmanager
    def progress(self, *, json_lines: bool = False) -> "Iterator[Watch]":
        """Yield what takes each `Progress`; json_lines: from here on, each line of the log is a JSON object."""
        if json_lines:
            log.setLevel(logging.INFO)
            for handler in log.handlers:
                handler.setFormatter(_JsonLines())
        elif self.quiet:
            yield lambda progress: None
            return
        from ties_ray.cli.progress import Lines, shown_in

        with Lines(log) if json_lines or self.json_log else shown_in(sys.stderr, log) as watch:
            yield watch


@contextlib.contextmanager
def showing(progress: bool | None) -> "Iterator[Watch]":
    """Yield what shows the progress of a call in Python. None: show it in a notebook only."""
    from ties_ray.cli.progress import in_notebook, shown_in

    if not progress and not (progress is None and in_notebook()):
        yield lambda progress: None
        return
    with _logging(logging.INFO, _Lines()), shown_in(sys.stderr, log) as watch:
        yield watch


def complain(problem: Problem) -> None:
    """Log a problem as one line that no file name or header can break or colour."""
    line = printable(str(problem).replace("\n", " "))
    log.error("%s", line, extra={"facts": problem._asdict()})


def print_json(text: str) -> None:
    """Print JSON; characters that a terminal might act on are escaped in its strings."""
    if not text.isascii():
        text = "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)
    click.echo(text)


@contextlib.contextmanager
def _logging(level: int, formatter: logging.Formatter) -> Iterator[None]:
    """Write the log to standard error."""
    handler = _StandardError()
    handler.setFormatter(formatter)
    before, log.propagate = log.propagate, False
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
        log.propagate = before


class _StandardError(logging.Handler):
    """Writes to the current standard error, which a progress bar replaces to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "error: " if record.levelno >= logging.ERROR else ""
        return prefix + printable_lines(record.getMessage())


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {})
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps(line | facts)


def _as_merge_error(caught: BaseException) -> MergeError:
    if isinstance(caught, MergeError):
        if caught.kind != "defect":
            return caught
        error = MergeError(map(_defect, caught.problems))
        error.shard = caught.shard
        return error
    if isinstance(caught, KeyboardInterrupt):
        number = received[0] if received else signal.SIGINT
        message = f"cancelled by {signal.Signals(number).name}"
        cancelled = Cancelled(Problem("", message, "what is done is kept, and the same command continues"))
        cancelled.exit_code = 128 + number
        return cancelled
    return MergeError(_defect(Problem("", f"{type(caught).__name__}: {caught}")))


def _defect(problem: Problem) -> Problem:
    return problem._replace(remedy="a defect of ties_ray: run again with --debug, and please report it")
