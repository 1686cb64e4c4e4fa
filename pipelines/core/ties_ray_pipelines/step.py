"""One command of ties_ray as a step of a workflow. It needs the standard library and `jobs.py`.

A step runs on a Ray cluster, by its jobs API, or by the command line of another environment on this machine. The
engine's own process needs neither ties_ray nor torch nor ray. What every integration keeps to:

    exit code    verdict      what an engine does
    0            done         passes the record on; `reused` in it: there was nothing to do
    1, 2, 3      failed       fails, and never tries again: a defect, the recipe, the inputs
    4, 5, 137    again        tries again later: the same command continues; 137 is a shell's word for killed
    130, 143     cancelled    stops, and does not try again by itself; whoever starts it again continues
"""

import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from os import environ
from types import FrameType
from typing import IO, Any, Literal, Protocol

from ties_ray_pipelines.jobs import (
    CANCELLED,
    INTERRUPTED,
    UNAVAILABLE,
    Jobs,
    JobsError,
    Json,
    Outcome,
    merge_command,
    recipe_text,
    record_in,
    visible,
)

Verdict = Literal["done", "failed", "again", "cancelled"]
Show = Callable[[str], object]
"""Takes one line of the log, without its end."""
KILLED = 128 + signal.SIGKILL
"""The exit code of a job whose command a shell started, when memory runs out."""
GRACE = 3.0
"""Seconds from SIGTERM to SIGKILL, as Ray has it for jobs."""
EVERY = 60.0
"""Seconds between two signs of life."""
RECORD_LIMIT = 48_000
"""Characters of a record that engines keep in their own database."""


def verdict(exit_code: int) -> Verdict:
    """Return what an exit code of ties_ray means to a workflow."""
    if exit_code == 0:
        return "done"
    if exit_code in (INTERRUPTED, UNAVAILABLE, KILLED):
        return "again"
    return "cancelled" if exit_code in (130, CANCELLED) else "failed"


@dataclass(frozen=True)
class Site:
    """Where commands run."""

    address: str | None = None
    """The dashboard of a Ray cluster, `http://head:8265`. None: this machine."""
    token: str | None = field(default=None, repr=False, kw_only=True)
    """The token of that cluster. None: RAY_AUTH_TOKEN has it, where the cluster wants one."""
    program: str = "ties-ray"
    """The command line on this machine: `/opt/ties-ray/bin/ties-ray` of another environment, for one. Clusters have
    `ties-ray` on their PATH."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment of the command, besides what is there; shown in dashboards, so no secrets."""
    poll: float = 2.0
    """Seconds between two looks at a job."""


class Command(Protocol):
    """What a step can run."""

    def words(self) -> list[str]:
        """Return the arguments of the command line."""

    def stdin(self) -> str:
        """Return its standard input."""

    def entrypoint(self) -> str:
        """Return the whole as a job of a cluster."""


@dataclass(frozen=True)
class Merge:
    """`ties-ray merge`."""

    recipe: str | Mapping[str, Any]
    """A path or URI where the command runs, or the recipe itself: a mapping, or its YAML or JSON."""
    overrides: tuple[str, ...] = ()
    """`method.density=0.3`"""
    result: str | None = None
    """Where the record is written, besides; also on failure."""

    def words(self) -> list[str]:
        """Return the arguments of the command line."""
        options = [word for override in self.overrides for word in ("--set", override)]
        options += ["--result", self.result] if self.result else []
        source = str(self.recipe) if recipe_text(self.recipe) is None else "-"
        return ["merge", "--json", *options, "--", source]

    def stdin(self) -> str:
        """Return the recipe, unless it is read from elsewhere."""
        return recipe_text(self.recipe) or ""

    def entrypoint(self) -> str:
        """Return the whole as a job of a cluster."""
        return merge_command(self.recipe, overrides=self.overrides, result=self.result)


@dataclass(frozen=True)
class Promote:
    """`ties-ray promote`: evaluate a finished merge and, if it is good, let the pointer name it."""

    output: str
    """The folder, as the merge's record names it."""
    pointer: str
    """URI of a small JSON object."""
    evaluate: str = ""
    """The user's command, run where ties_ray runs: it gets TIES_RAY_OUTPUT and TIES_RAY_RESULT, and approves by 0."""
    overrides: tuple[str, ...] = ()
    """Overrides of `storage`; others have no meaning here."""

    def words(self) -> list[str]:
        """Return the arguments of the command line."""
        options = [word for override in self.overrides for word in ("--set", override)]
        options += ["--evaluate", self.evaluate] if self.evaluate else []
        return ["promote", "--json", *options, "--", self.output, self.pointer]

    def stdin(self) -> str:
        """Return nothing: it reads none."""
        return ""

    def entrypoint(self) -> str:
        """Return the whole as a job of a cluster."""
        return shlex.join(["ties-ray", *self.words()])


@dataclass(frozen=True)
class Verify:
    """`ties-ray verify`: read a finished merge again and report damage."""

    output: str
    """The folder, as the merge's record names it."""
    sample: float = 0.0
    """The share of the elements that is merged again and compared."""
    overrides: tuple[str, ...] = ()
    """Overrides of `storage`; others have no meaning here."""

    def words(self) -> list[str]:
        """Return the arguments of the command line."""
        options = [word for override in self.overrides for word in ("--set", override)]
        options += ["--sample", str(self.sample)] if self.sample else []
        return ["verify", "--json", *options, "--", self.output]

    def stdin(self) -> str:
        """Return nothing: it reads none."""
        return ""

    def entrypoint(self) -> str:
        """Return the whole as a job of a cluster."""
        return shlex.join(["ties-ray", *self.words()])


class Running(Protocol):
    """A step at work."""

    def wait(self, show: Show) -> Outcome:
        """Show the log as it grows and return the outcome; whatever interrupts this cancels the step."""

    def cancel(self) -> None:
        """Ask it to stop, within `GRACE` seconds; returns at once and may be called from a signal handler."""


class Job:
    """A step that runs on a cluster. Started under the same name again it is joined, not doubled."""

    def __init__(self, site: Site, command: Command, name: str) -> None:
        """Submit it; `JobsError` where the cluster does not take it."""
        self._jobs, self._poll = Jobs(site.address, site.token), site.poll
        self.attempt = self._jobs.submit(command.entrypoint(), name, runtime_env={"env_vars": dict(site.env)})
        """Its id on the cluster."""
        self.url = self._jobs.url_of(self.attempt)
        """Its page in the dashboard."""

    def wait(self, show: Show) -> Outcome:
        """Show the log as it grows and return the outcome."""
        rest = ""
        try:
            for text in self._jobs.follow(self.attempt, poll=self._poll):
                *lines, rest = (rest + text).split("\n")
                for line in lines:
                    show(visible(line))
            if rest:
                show(visible(rest))
        except BaseException as error:
            if not isinstance(error, Exception):  # a cluster out of reach may well go on with it
                self.cancel()
            raise
        return self._jobs.outcome(self.attempt)

    def cancel(self) -> None:
        """Ask Ray to stop it."""
        with suppress(JobsError):
            self._jobs.stop(self.attempt)


class Process:
    """A step that runs on this machine."""

    def __init__(self, site: Site, command: Command, name: str) -> None:
        """Start it; `JobsError` where there is no such program."""
        self._name, self._out, self._tail = name, "", deque[str](maxlen=3)
        try:
            self._process = subprocess.Popen(
                [site.program, *command.words()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**environ, **site.env},
            )
        except OSError as error:
            raise JobsError(f"{site.program}: {error.strerror}", 2) from None
        self._given = command.stdin()
        assert self._process.stdout
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def wait(self, show: Show) -> Outcome:
        """Show the log as it grows and return the outcome."""
        process = self._process
        try:
            assert process.stdin
            assert process.stderr
            with suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(self._given)
            for line in process.stderr:
                self._tail.append(line)
                show(visible(line.rstrip("\n")))
        except BaseException:
            self.cancel()
            raise
        finally:
            with process:  # waits for its end
                self._reader.join()
        return Outcome(self._name, _exit_code(process.returncode), "".join(self._tail).strip(), record_in(self._out))

    def cancel(self) -> None:
        """Send SIGTERM now, SIGKILL if that is not enough."""
        self._process.terminate()
        end = threading.Timer(GRACE, self._process.kill)
        end.daemon = True
        end.start()

    def _read(self, pipe: IO[str]) -> None:
        self._out = pipe.read()


def start(site: Site, command: Command, name: str) -> Running:
    """Start a step; `JobsError` where that can't be done. See `name_of`."""
    return Job(site, command, name) if site.address else Process(site, command, name)


def run(
    site: Site,
    command: Command,
    name: str,
    *,
    show: Show = print,
    tries: int = 1,
    pause: float = 60.0,
    tried_before: bool = False,
) -> Outcome:
    """Run a step to its end and return the outcome; SIGTERM, or any exception of the caller's, cancels it.

    tries: how often at most, where the exit code says that trying again may help; for engines that can't tell.
    pause: seconds before the second try, twice as many before each further one. tried_before: the engine's own try is
    not its first. The record gets that as a field, for `is_new`.
    """
    with _signals_raise():
        for number in range(1, tries + 1):
            try:
                step = start(site, command, name)
                outcome = _watched(step, name, show)
            except JobsError as error:
                outcome = Outcome(name, error.exit_code, str(error), None, ran=False)
            if verdict(outcome.exit_code) != "again" or number == tries:
                break
            show(f"{explain(outcome)}; again in {pause:g} s")
            time.sleep(pause)
            pause *= 2
    return with_tries(outcome, tried_before or number > 1)


def _watched(step: Running, name: str, show: Show) -> Outcome:
    """Wait for a step; what ends this process ends it too, also before the step itself is being waited for."""
    try:
        with signs_of_life(name, show):
            return step.wait(show)
    except BaseException as error:
        if not isinstance(error, Exception):
            step.cancel()
        raise


def with_tries(outcome: Outcome, tried_before: bool) -> Outcome:
    """Return an outcome whose record says whether a try came before this one."""
    return replace(outcome, record=outcome.record and outcome.record | {"tried_before": tried_before})


def name_of(*parts: str) -> str:
    """Return a name for a step from the ids that the engine gives: the same in each try, and in no other run.

    It has characters that Ray takes, at most 100 of them. A digest keeps apart what would become the same.
    """
    plain = "-".join(parts)
    kept = re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-._")[:80]
    return kept if kept == plain else f"{kept}-{hashlib.sha256(plain.encode()).hexdigest()[:12]}".lstrip("-")


def explain(outcome: Outcome) -> str:
    """Return one line on what came of a step, for people."""
    error = (outcome.record or {}).get("error") or {}
    said = error.get("message") or outcome.message or "no message"
    return visible(f"{outcome.submission_id}: {verdict(outcome.exit_code)}, exit code {outcome.exit_code}: {said}")


def is_new(record: Mapping[str, Any]) -> bool:
    """Return whether a merge is to be evaluated and promoted.

    One that lay there already was, some other night: it was rejected, or is in use, or was rolled back. But if a try of
    this very step was lost, it may be that one's work, and nobody looked at it yet.
    """
    return bool(record["tried_before"] or not record["reused"])


def compact(record: Mapping[str, Any], limit: int = RECORD_LIMIT) -> Json:
    """Return a record without its longest fields, as few as make it fit; `left_out` names them."""
    kept, left_out = dict(record), list[str]()
    while len(json.dumps(kept)) > limit and len(left_out) < len(record):
        longest = max(kept.keys() - {"left_out"}, key=lambda name: len(json.dumps(kept[name])))
        del kept[longest]
        kept["left_out"] = left_out = [*left_out, longest]
    return kept


@contextmanager
def signs_of_life(name: str, show: Show, every: float = EVERY) -> Iterator[None]:
    """Show a line now and then, for a job may wait for its cluster for hours and says nothing then."""
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not over.wait(every):
            show(f"{name}: {time.monotonic() - began:.0f} s")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, unless the engine has a handler of its own."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _exit_code(code: int) -> int:
    """Return the exit code of the contract for what a process came to; one that was killed may be continued."""
    if code in (-signal.SIGINT, -signal.SIGTERM):
        return 128 - code
    return INTERRUPTED if code < 0 else code
