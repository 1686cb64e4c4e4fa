"""A pointer to the merge that is in use. It moves in one step once the merge is approved, and can move back.

The pointer is a small JSON object anywhere a store can write. It names the current output and the previous one.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import TypeAdapter

from ties_ray.errors import InputError, Problem, UnavailableError
from ties_ray.libraries.loaders import SCORES_NAME
from ties_ray.operations.verify import Verification
from ties_ray.reports.records import MergeResult, Report, find_result
from ties_ray.state import documents
from ties_ray.stores import Pin, Stores

TRIES = 5
"""Swaps that may fail because others write the pointer, until we give up."""


class Release(Report):
    """A merge that was promoted."""

    output: str
    run_id: str
    promoted_at: str
    """UTC, ISO 8601."""


class Pointer(Report):
    """The content of a pointer: the release in use, and the one before it."""

    schema_version: Literal[1] = 1
    current: Release
    previous: Release | None = None


_POINTER = TypeAdapter(Pointer)


class Promotion(Report):
    """The outcome of a promotion or a rollback."""

    pointer: str
    """URI of the pointer."""
    changed: bool
    """Whether the pointer moved; False: it named this release already."""
    current: Release
    previous: Release | None


def promote(
    stores: Stores,
    output: str,
    pointer: str,
    evaluate: Sequence[str] = (),
    check: Callable[[], Verification] | None = None,
    scored: Callable[[str], None] | None = None,
) -> Promotion:
    """Let the pointer name a finished merge, once it is approved; keep the current release as the previous.

    evaluate: a command that approves by exit code 0. Its environment has TIES_RAY_OUTPUT (the folder's URI) and
    TIES_RAY_RESULT (a file with the result record).
    check: re-reads the output before that. scored: scores the output, and raises `InputError` where scores are bad; it
    gets the output that the pointer names, or "".
    An output that the pointer names already is neither checked nor evaluated.
    Raises `InputError` where the output holds no finished merge, the check finds problems, command or scores do not
    approve, or the folder changes meanwhile.
    """
    result, files = _finished(stores, output)
    content, _ = _read(stores, pointer)
    if content and (content.current.output, content.current.run_id) == (output, result.run_id):
        return _promotion(pointer, content, changed=False)
    if check and (problems := check().problems):
        raise InputError(reported.problem() for reported in problems)
    if evaluate:
        _evaluate(output, result, evaluate)
    if scored:
        scored(content.current.output if content else "")
    if evaluate or check or scored:
        result_after, files_after = _finished(stores, output)
        changed = sorted(name for name, pin in files.items() if files_after.get(name) != pin)
        if result_after != result or changed:
            message = f"was changed while it was evaluated: {', '.join(changed[:5]) or 'its result record'}"
            raise InputError(Problem(output, message, "promote it again, with nobody at work there", "not_approved"))
    release = Release(output=output, run_id=result.run_id, promoted_at=datetime.now(UTC).isoformat(timespec="seconds"))
    return _swap(stores, pointer, release)


def rollback(stores: Stores, pointer: str) -> Promotion:
    """Let the pointer name the previous release; the current one becomes the previous."""
    content, _ = _read(stores, pointer)
    if content is None or content.previous is None:
        raise InputError(Problem(pointer, "names no merge before the current one", "promote one"))
    previous = content.previous
    result = find_result(stores, previous.output)
    if result is None or (result.status, result.run_id) != ("done", previous.run_id):
        message = f"the merge before, run {previous.run_id} in {previous.output}, is not there any more"
        raise InputError(Problem(pointer, message, "promote another"))
    return _swap(stores, pointer, previous)


def _finished(stores: Stores, output: str) -> tuple[MergeResult, dict[str, Pin]]:
    """Return the result record of a finished merge, and the pins of its files by name."""
    result = find_result(stores, output)
    if result is None or result.status != "done":
        raise InputError(Problem(output, "holds no finished merge", "merge first"))
    pins = {pin.uri.rpartition("/")[2]: pin for pin in stores.of(output).list(output).files}
    return result, {name: pin for name, pin in pins.items() if name != SCORES_NAME}


def _evaluate(output: str, result: MergeResult, command: Sequence[str]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as record:
        record.write(result.model_dump_json(indent=2))
        record.flush()
        variables = {"TIES_RAY_OUTPUT": output, "TIES_RAY_RESULT": record.name}
        try:
            code = subprocess.run(command, env={**os.environ, **variables}, check=False).returncode
        except OSError as error:
            raise InputError(Problem("--evaluate", f"{command[0]}: {error.strerror}", "check the command")) from None
    if code:
        # The message leaves the arguments out, since they may hold a key.
        message = f"the evaluation by {command[0]} ended with {code}: {output} is not promoted"
        raise InputError(Problem("--evaluate", message, "the pointer is as it was", "not_approved"))


def _swap(stores: Stores, pointer: str, release: Release) -> Promotion:
    """Write the pointer; if others write it at the same time, read it again and retry."""
    for _ in range(TRIES):
        old, etag = _read(stores, pointer)
        if old and (old.current.output, old.current.run_id) == (release.output, release.run_id):
            return _promotion(pointer, old, changed=False)
        new = Pointer(current=release, previous=old.current if old else None)
        if stores.writer(pointer).swap(pointer, (new.model_dump_json(indent=2) + "\n").encode(), etag) is not None:
            return _promotion(pointer, new, changed=True)
    raise UnavailableError(Problem(pointer, "others keep writing it", "try again"))


def _read(stores: Stores, pointer: str) -> tuple[Pointer | None, str]:
    """Return the content of the pointer and its ETag; None and "" where there is no pointer."""
    try:
        pin, content = documents.read(
            stores.of(pointer), pointer, _POINTER, documents.SMALL, "it as a pointer", "name another object"
        )
        return content, pin.etag
    except FileNotFoundError:
        return None, ""


def _promotion(pointer: str, content: Pointer, *, changed: bool) -> Promotion:
    return Promotion(pointer=pointer, changed=changed, current=content.current, previous=content.previous)
