"""A client of Ray's jobs API, in this one file of the standard library: neither ray nor ties_ray need be installed.

Workflow engines import it. By hand it runs a merge on a cluster that exists already:

    ties-ray-job --address http://head:8265 --id nightly -- ties-ray merge s3://recipes/nightly.yaml --json

`python jobs.py` does the same where only this file lies. It prints the job's log as it grows and exits with the code of
the command, which `ray job submit` turns into 0 or 1. SIGINT and SIGTERM stop the job. RAY_API_SERVER_ADDRESS stands in
for `--address`. The token is RAY_AUTH_TOKEN, or stands in the file that RAY_AUTH_TOKEN_PATH names, or in
`~/.ray/auth_token`, where Ray keeps it.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import shlex
import signal
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

Json = dict[str, Any]

DONE, BAD_RECIPE, BAD_INPUT, INTERRUPTED, UNAVAILABLE, CANCELLED = 0, 2, 3, 4, 5, 143
RETRYABLE = frozenset((INTERRUPTED, UNAVAILABLE, 130, 143))
"""Exit codes after which the same command may be run again: it continues."""
_CODES = {"recipe": 2, "input": 3, "interrupted": 4, "unavailable": 5, "cancelled": 143, "defect": 1}
_NOT_STARTED = ("RUNTIME_ENV_SETUP_FAILURE", "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE")
"""What Ray calls it when the command never ran."""
INLINE_BYTES = 100_000
"""The largest recipe that stands in the command itself: Linux takes 128 KiB in one argument."""
TRIES = 12
"""How often a job is submitted while a cluster is there and none of its nodes can start it yet."""
AGENT_SECONDS = 5.0
"""The pause between two of these tries."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PASSWORD = re.compile(r"[\w+.-]+://[^/@\s]*@")
"""A user or a password in a URL."""


def visible(text: str) -> str:
    """Return a text of another machine as it may go to a terminal: without colours, and with what is invisible escaped.

    Line breaks and tabs stay.
    """
    plain = _COLOUR.sub("", text)
    if plain.isprintable():
        return plain
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in plain
    )


class JobsError(OSError):
    """The jobs API refuses, or can't be reached; `exit_code` says which."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(visible(message))
        self.exit_code = exit_code


@dataclass(frozen=True)
class Job:
    """What a cluster says of a job."""

    submission_id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None
    """The exit code of the command; None if it has not ended by itself."""
    error_type: str
    message: str

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Outcome:
    """What came of a job: all that a workflow engine has to know."""

    submission_id: str
    exit_code: int
    """The contract of the command line: 0 done, 2 bad recipe, 3 bad inputs, 4 and 5 try again, 143 cancelled."""
    message: str
    record: Json | None
    """The result record, where the command printed it (`--json`)."""
    ran: bool = True
    """Whether the exit code is the command's; False: it could not be started or followed."""

    @property
    def retryable(self) -> bool:
        """Whether the same command may succeed if it is run again."""
        return self.exit_code in RETRYABLE


class Jobs:
    """The jobs API of one cluster."""

    def __init__(self, address: str | None = None, token: str | None = None, timeout: float = 30.0) -> None:
        """Take the dashboard's address (`http://head:8265`) and the cluster's token; the environment's by default.

        timeout: seconds one request may take. A CA of one's own is named by SSL_CERT_FILE.
        """
        place = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
        self.address = (place if "://" in place else f"http://{place}").rstrip("/")
        if urllib.parse.urlsplit(self.address).scheme not in ("http", "https"):
            raise JobsError(f"{self.address} is no http address: the dashboard's is meant, usually :8265", BAD_RECIPE)
        self.token = token or os.environ.get("RAY_AUTH_TOKEN") or _token_file()
        self._timeout = timeout

    def version(self) -> str:
        """Return the version of Ray that the cluster has."""
        return str(self._call("GET", "/api/version")["ray_version"])

    def url_of(self, submission_id: str) -> str:
        """Return the page of a job in the dashboard."""
        return f"{self.address}/#/jobs/{submission_id}"

    def submit(
        self,
        entrypoint: str,
        submission_id: str,
        *,
        runtime_env: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Start a command unless it runs already; return the id of the attempt, `ID`, `ID-2`, `ID-3` ...

        An attempt that waits or runs is joined. One that is over is followed by the next: a merge that is done says so
        at once, and any other continues. So it is safe to call this again after a crash of the caller.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", submission_id):
            raise JobsError(f"{submission_id!r} is no id: letters, digits, - _ .", BAD_RECIPE)
        body = {"entrypoint": entrypoint, "runtime_env": dict(runtime_env or {}), "metadata": dict(metadata or {})}
        for _ in range(TRIES):  # somebody else may submit the same at the same moment
            attempts = self._attempts(submission_id)
            if attempts and not attempts[max(attempts)].ended:
                return attempts[max(attempts)].submission_id
            number = max(attempts, default=0) + 1
            attempt = submission_id if number == 1 else f"{submission_id}-{number}"
            try:
                self._call("POST", "/api/jobs/", body | {"submission_id": attempt})
            except JobsError as error:
                if "No available agent" in str(error):  # of a node that has just started
                    time.sleep(AGENT_SECONDS)
                elif "already exists" not in str(error):
                    raise
            else:
                return attempt
        raise JobsError(f"{submission_id} is submitted again and again by somebody else", UNAVAILABLE)

    def info(self, submission_id: str) -> Job:
        """Return how a job stands."""
        return _job(self._call("GET", f"/api/jobs/{submission_id}"))

    def log(self, submission_id: str) -> str:
        """Return what the command has printed so far, all of it."""
        return str(self._call("GET", f"/api/jobs/{submission_id}/logs")["logs"])

    def stop(self, submission_id: str) -> None:
        """Ask Ray to stop a job: SIGTERM now, SIGKILL three seconds later; returns at once."""
        self._call("POST", f"/api/jobs/{submission_id}/stop")

    def follow(self, submission_id: str, *, poll: float = 2.0, patience: float = 300.0) -> Iterator[str]:
        """Yield what the log gains until the job is over.

        patience: seconds in which the cluster may be out of reach (a dashboard that restarts) before that is an error.
        """
        shown, last_answer = 0, time.monotonic()
        while True:
            try:
                over = self.info(submission_id).ended  # before the log is read: then it is whole
                log = self.log(submission_id)
            except JobsError as error:
                if error.exit_code != UNAVAILABLE or time.monotonic() - last_answer > patience:
                    raise
            else:
                last_answer = time.monotonic()
                if len(log) > shown:
                    yield log[shown:]
                    shown = len(log)
                if over:
                    return
            time.sleep(poll)

    def outcome(self, submission_id: str) -> Outcome:
        """Return what came of a job that is over."""
        job = self.info(submission_id)
        record = record_in(self.log(submission_id))
        return Outcome(submission_id, exit_code_of(job, record), job.message, record)

    def _attempts(self, submission_id: str) -> dict[int, Job]:
        name = re.compile(re.escape(submission_id) + r"(?:-(\d+))?")
        attempts: dict[int, Job] = {}
        for listed in self._call("GET", "/api/jobs/"):
            match = name.fullmatch(listed.get("submission_id") or "")
            if match:
                attempts[int(match[1] or 1)] = _job(listed)
        return attempts

    def _call(self, method: str, path: str, body: Json | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(10_000).decode(errors="replace").strip().splitlines() or [str(error.reason)]
            raise JobsError(f"{self.address}: {error.code}: {text[-1]}", _code_of(error.code)) from None
        except (
            OSError,
            ValueError,
            RecursionError,
            http.client.HTTPException,
        ) as error:  # no answer, or one that is not the API's
            raise JobsError(f"{self.address} does not answer as Ray does: {error}", UNAVAILABLE) from None


def recipe_text(recipe: str | Mapping[str, Any]) -> str | None:
    """Return the text of a recipe that is given itself: a mapping, or its YAML or JSON. None: it is a path or URI."""
    if isinstance(recipe, str):
        return recipe if "\n" in recipe or recipe.lstrip().startswith("{") else None
    return json.dumps(recipe, separators=(",", ":"))


def merge_command(recipe: str | Mapping[str, Any], *, overrides: Sequence[str] = (), result: str | None = None) -> str:
    """Return the command that merges a recipe on the cluster it runs on and prints the result record last.

    recipe: a path or URI that the cluster can read. Or the recipe itself, a mapping or its YAML or JSON, which then
    travels in the command.
    """
    text = recipe_text(recipe)
    words = ["ties-ray", "merge", "--json"]
    words += [word for override in (*overrides, "run.address=auto") for word in ("--set", override)]
    words += ["--result", result] if result else []
    command = shlex.join([*words, "--", "-" if text is not None else str(recipe)])
    if text is None:
        return command
    if len(text) > INLINE_BYTES:
        raise JobsError(f"a recipe of {len(text):,} characters: put it where the cluster reads it", BAD_RECIPE)
    return f"printf %s {shlex.quote(text)} | {command}"


def record_in(log: str) -> Json | None:
    """Return the result record that a command printed last, or None."""
    for start in reversed([match.start() for match in re.finditer(r"^\{$", log, re.MULTILINE)]):
        with contextlib.suppress(ValueError, RecursionError):  # no JSON, or far too deep
            record: Json = json.JSONDecoder().raw_decode(log, start)[0]
            error = record.get("error") or {}
            if {"schema_version", "status"} <= record.keys() and isinstance(error, dict):
                return record
    return None


def exit_code_of(job: Job, record: Json | None) -> int:
    """Return the exit code of the contract: the command's own, else what record and cluster tell."""
    if job.status == "STOPPED":
        return CANCELLED
    if job.exit_code is not None and job.exit_code >= 0:
        return INTERRUPTED if job.exit_code == 128 + signal.SIGKILL else job.exit_code  # a shell's word for killed
    if record and record["status"] == "done":
        return DONE
    if record and record.get("error"):
        return _CODES.get(record["error"].get("kind"), 1)
    if job.exit_code == -signal.SIGTERM:
        return CANCELLED
    return UNAVAILABLE if job.error_type in _NOT_STARTED else INTERRUPTED  # killed, or lost with its node


def run(
    jobs: Jobs,
    entrypoint: str,
    submission_id: str,
    *,
    runtime_env: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    show: Callable[[str], object] = sys.stderr.write,
    poll: float = 2.0,
) -> Outcome:
    """Submit, show the log as it grows, and return the outcome; the job is stopped if this is interrupted."""
    attempt = jobs.submit(entrypoint, submission_id, runtime_env=runtime_env, metadata=metadata)
    try:
        for text in jobs.follow(attempt, poll=poll):
            show(text)
    except BaseException as error:
        if not isinstance(error, Exception):  # a signal; a cluster out of reach may well go on with the job
            with contextlib.suppress(JobsError):
                jobs.stop(attempt)
        raise
    return jobs.outcome(attempt)


def _job(answer: Json) -> Job:
    code = answer.get("driver_exit_code")
    return Job(
        submission_id=str(answer["submission_id"]),
        status=str(answer["status"]),
        exit_code=None if code is None else int(code),
        error_type=str(answer.get("error_type") or ""),
        message=str(answer.get("message") or ""),
    )


def _code_of(status: int) -> int:
    """Return the exit code for an HTTP status."""
    if status in (408, 429) or status >= 500:
        return UNAVAILABLE
    if status == 404:  # a cluster that was started again has forgotten its jobs
        return INTERRUPTED
    return BAD_INPUT if status in (401, 403) else BAD_RECIPE


def _token_file() -> str | None:
    named, own = os.environ.get("RAY_AUTH_TOKEN_PATH"), Path("~/.ray/auth_token").expanduser()
    path = Path(named) if named else own if own.is_file() else None
    return path.read_text().strip() if path else None


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise JobsError(f"{wrong[0]!r} is not of the form NAME=VALUE", BAD_RECIPE)
    variables = dict(pair.split("=", 1) for pair in pairs)
    secret = next((name for name, value in variables.items() if _PASSWORD.match(value)), None)
    if secret:
        raise JobsError(
            f"{secret} is a URL with a user or password in it, and a job's environment is public", BAD_RECIPE
        )
    return variables


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command as a job and return its exit code."""
    parser = argparse.ArgumentParser(description="Run a command as a Ray job; exit with the command's own code.")
    parser.add_argument("--address", help="the cluster's dashboard, http://head:8265")
    parser.add_argument("--id", required=True, help="name of the job; one that runs already is joined")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="environment of the command; no secrets"
    )
    parser.add_argument("command", nargs="+", help="the command, which stands after --")
    options = parser.parse_args(arguments)

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        runtime_env = {"env_vars": _environment(options.env)} if options.env else None
        done = run(
            Jobs(options.address), shlex.join(options.command), options.id, runtime_env=runtime_env, show=_flushed
        )
    except JobsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(visible(f"{done.submission_id}: exit code {done.exit_code}: {done.message}"), file=sys.stderr)
    return done.exit_code


def _flushed(text: str) -> None:
    print(visible(text), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
