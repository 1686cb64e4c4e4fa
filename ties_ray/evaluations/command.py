"""Scores by a command of the user's."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO, ClassVar, Literal

from pydantic import Field, field_validator

from ties_ray.errors import InputError, Problem, printable, shown
from ties_ray.evaluations import Better, Evaluator, Json, Measured, Subject
from ties_ray.evaluations._numbers import OwnNumbers
from ties_ray.stores import Stores

MOST_LINE = 2**20
"""Characters of a line of output that are looked at."""


class Command(OwnNumbers):
    """The number, or the JSON mapping of numbers, in the last line that a command prints on standard output.

    Its environment has TIES_RAY_OUTPUT (a local folder), TIES_RAY_RESULT (a file with the result record) and
    TIES_RAY_SEED. All other lines go to standard error, without what looks like a secret. A command that ends with
    another code than 0 is an error.
    """

    main: ClassVar[str] = "command"
    repeatable: ClassVar[bool] = False

    name: Literal["command"] = "command"
    better: Better = "larger"
    """Which values are better."""
    command: tuple[str, ...] = Field(min_length=1)
    """Words of the command, or a line that is split as a shell does. No shell runs it."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds after which the command is ended. Default: none."""

    @field_validator("command", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        return shlex.split(value) if isinstance(value, str) else value

    def shown(self) -> Json:
        """Return the parameters for a record, without the arguments, which may hold a key."""
        return super().shown() | {"command": [self.command[0], *["..."] * (len(self.command) > 1)]}

    def prepared(self, stores: Stores, seed: int) -> Evaluator:
        """Return what runs the command."""
        return _Runs(self, seed)


class _Runs(Evaluator):
    def __init__(self, evaluation: Command, seed: int) -> None:
        super().__init__(evaluation, seed)
        self._own = evaluation

    def measure(self, subject: Subject) -> Measured:
        """Return the numbers of the last line. Raises `InputError` where the command fails or prints none."""
        own, program = self._own, self._own.command[0]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as record:
            json.dump(subject.record(), record)
            record.flush()
            variables = {
                "TIES_RAY_OUTPUT": subject.folder(), "TIES_RAY_RESULT": record.name, "TIES_RAY_SEED": str(self.seed)
            }  # fmt: skip
            code, last = run(own.command, variables, own.timeout)
        if code != 0:
            message = f"the evaluation of {subject.id} by {program} {ending(code)}"
            raise InputError(Problem("command", message, "see what it printed", "not_scored"))
        try:
            answer = json.loads(last)
        except (ValueError, RecursionError):
            answer = None
        return own.measured(answer, f"the last line of {program}")


def run(command: Sequence[str], variables: Mapping[str, str], timeout: float | None = None) -> tuple[int | None, str]:
    """Run a command; return its exit code, None after the timeout, and its last line on standard output.

    variables: what its environment has beside this process's. The other lines go to standard error, without secrets.
    Raises `InputError` where there is no such program.
    """
    try:
        process = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise InputError(Problem("command", f"{command[0]}: {error.strerror}", "check the command")) from None
    lasts: list[str] = []
    streams = [process.stdout, process.stderr]
    threads = [threading.Thread(target=_pass_on, args=(stream, kept), daemon=True)
               for stream, kept in zip(streams, (lasts, None), strict=True)]  # fmt: skip
    for thread in threads:
        thread.start()
    try:
        code: int | None = process.wait(timeout)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    for thread in threads:
        thread.join(5)  # a child of the command may hold the stream
    return code, lasts[-1] if lasts else ""


def ending(code: int | None) -> str:
    """Return how a command ended, for a message."""
    return "took longer than its timeout" if code is None else f"ended with {code}"


def _pass_on(stream: IO[str] | None, kept: list[str] | None) -> None:
    """Write lines to standard error, without secrets; of `kept` the last line with content stays back."""
    assert stream is not None
    with stream:
        for line in iter(lambda: stream.readline(MOST_LINE), ""):
            if kept is None:
                _print(line)
            elif line.strip():
                if kept:
                    _print(kept.pop())
                kept.append(line)


def _print(line: str) -> None:
    print(printable(shown(line.rstrip("\n"))), file=sys.stderr)
