"""A pointer to the merge that is in use: moved in one step once the merge has proved itself, and moved back again.

The pointer is a small JSON object anywhere a store can write. It names the current output and the one before.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from ties_ray.errors import InputError, Problem, UnavailableError
from ties_ray.operations.verify import Verification
from ties_ray.reports.records import MergeResult, find_result
from ties_ray.state import documents
from ties_ray.stores import Pin, Stores

TRIES = 5
"""Swaps that may be lost to others before we give up."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Release(_Record):
    """One merge that was promoted."""

    output: str
    run_id: str
    promoted_at: str
    """UTC, ISO 8601."""


class Pointer(_Record):
    """What is in use."""

    schema_version: Literal[1] = 1
    current: Release
    previous: Release | None = None


_POINTER = TypeAdapter(Pointer)


class Promotion(_Record):
    """What a promotion or a rollback came to."""

    pointer: str
    """Its URI."""
    changed: bool
    """False: it pointed there already."""
    current: Release
    previous: Release | None


def promote(
    stores: Stores,
    output: str,
    pointer: str,
    evaluate: Sequence[str] = (),
    check: Callable[[], Verification] | None = None,
) -> Promotion:
    """Let the pointer name a finished merge, after a command has approved of it; the one before is kept.

    evaluate: a command that gets TIES_RAY_OUTPUT (the folder's URI) and TIES_RAY_RESULT (a file with the result record)
    and approves by exit code 0. check: re-reads the output before. Neither is asked again for what the pointer names
    already. Raises `InputError` where the output holds no finished merge, the check finds something, the command does
    not approve, or the folder holds something else afterwards.
    """
    result, files = _held(stores, output)
    there, _ = _read(stores, pointer)
    if there and (there.current.output, there.current.run_id) == (output, result.run_id):
        return _told(pointer, there, changed=False)
    if check and (findings := check().findings):
        raise InputError(Problem(one.where, one.what, one.remedy) for one in findings)
    if evaluate:
        _evaluate(output, result, evaluate)
    if evaluate or check:
        now, lying = _held(stores, output)
        changed = sorted(name for name, pin in files.items() if lying.get(name) != pin)
        if now != result or changed:
            what = f"was changed while it was evaluated: {', '.join(changed[:5]) or 'its result record'}"
            raise InputError(Problem(output, what, "promote it again, with nobody at work there", "not_approved"))
    release = Release(output=output, run_id=result.run_id, promoted_at=datetime.now(UTC).isoformat(timespec="seconds"))
    return _swap(stores, pointer, release)


def rollback(stores: Stores, pointer: str) -> Promotion:
    """Let the pointer name the merge before, and the present one as the one before that."""
    there, _ = _read(stores, pointer)
    if there is None or there.previous is None:
        raise InputError(Problem(pointer, "names no merge before the current one", "promote one"))
    held = find_result(stores, there.previous.output)
    if held is None or (held.status, held.run_id) != ("done", there.previous.run_id):
        what = f"the merge before, run {there.previous.run_id} in {there.previous.output}, is not there any more"
        raise InputError(Problem(pointer, what, "promote another"))
    return _swap(stores, pointer, there.previous)


def _held(stores: Stores, output: str) -> tuple[MergeResult, dict[str, Pin]]:
    """Return the result record of an output and the pins of its files; refuse one that holds no finished merge."""
    result = find_result(stores, output)
    if result is None or result.status != "done":
        raise InputError(Problem(output, "holds no finished merge", "merge first"))
    return result, {pin.uri.rpartition("/")[2]: pin for pin in stores.of(output).list(output).files}


def _evaluate(output: str, result: MergeResult, command: Sequence[str]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as record:
        record.write(result.model_dump_json(indent=2))
        record.flush()
        known = {"TIES_RAY_OUTPUT": output, "TIES_RAY_RESULT": record.name}
        try:
            code = subprocess.run(command, env={**os.environ, **known}, check=False).returncode
        except OSError as error:
            raise InputError(Problem("--evaluate", f"{command[0]}: {error.strerror}", "check the command")) from None
    if code:
        # its arguments may hold a key, and are not repeated
        what = f"the evaluation by {command[0]} ended with {code}: {output} is not promoted"
        raise InputError(Problem("--evaluate", what, "the pointer is as it was", "not_approved"))


def _swap(stores: Stores, pointer: str, release: Release) -> Promotion:
    """Write the pointer, unless somebody else does at the same time; then look again."""
    for _ in range(TRIES):
        there, etag = _read(stores, pointer)
        if there and (there.current.output, there.current.run_id) == (release.output, release.run_id):
            return _told(pointer, there, changed=False)
        wanted = Pointer(current=release, previous=there.current if there else None)
        if stores.writer(pointer).swap(pointer, (wanted.model_dump_json(indent=2) + "\n").encode(), etag) is not None:
            return _told(pointer, wanted, changed=True)
    raise UnavailableError(Problem(pointer, "others keep writing it", "try again"))


def _read(stores: Stores, pointer: str) -> tuple[Pointer | None, str]:
    """Return the pointer and its ETag; None and "" where there is none."""
    try:
        pin, found = documents.read(
            stores.of(pointer), pointer, _POINTER, documents.SMALL, "it as a pointer", "name another object"
        )
        return found, pin.etag
    except FileNotFoundError:
        return None, ""


def _told(pointer: str, now: Pointer, *, changed: bool) -> Promotion:
    return Promotion(pointer=pointer, changed=changed, current=now.current, previous=now.previous)
