"""Fuzzing of all documents that merges store: each is changed at random, then every command that reads it is run.

python -m tests.tools.fuzz_documents [--seconds 3600] [--seed 0] [--document plan ...]

A command may do its work or refuse; what it may not is end in a defect, touch anything but output and pool cache, or
publish other weights because of a document that decides none.
"""

import argparse
import contextlib
import copy
import gzip
import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.tools.fuzz_worlds import DECIDES, DOCUMENTS, World, worlds
from tests.tools.hostile import TOKENS
from ties_ray.errors import MergeError
from ties_ray.state import lease
from ties_ray.stores import Stores, memory

ODD = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "..", "../../home/.bashrc",
    "/etc/passwd", "a\x00b", "\ud800", "x" * 5000, [], {}, [[]], [0] * 100, {"a": 1}, "memory://home/.bashrc", "s3://b/k",
    "0123456789abcdef", "0" * 64,
]  # fmt: skip


@dataclass
class Report:
    """What a run of the fuzzer came to."""

    cases: Counter[str] = field(default_factory=Counter)
    """By document."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """By command, and whether it did its work or refused."""
    defects: list[str] = field(default_factory=list)


def fuzz(name: object, documents: Sequence[str], seed: int, *, cases: int = 0, seconds: float = 0.0) -> Report:
    """Return what so many cases of each document, or so many seconds of all of them, came to."""
    report, draw = Report(), random.Random(seed)
    still, lease.STILL_SECONDS, lease.BEAT_SECONDS = (lease.STILL_SECONDS, lease.BEAT_SECONDS), 0.05, 0.05
    try:
        there = [one for one in worlds(str(name).strip("/").replace("/", "-")) if set(documents) & set(one.documents)]
        until = time.monotonic() + seconds
        for number in range(sys.maxsize):
            if number >= cases and time.monotonic() >= until:
                return report
            for document in documents:
                world = draw.choice([one for one in there if document in one.documents])
                case(world, document, random.Random(draw.getrandbits(64)), report)
    finally:
        lease.STILL_SECONDS, lease.BEAT_SECONDS = still
    return report


def case(world: World, document: str, draw: random.Random, report: Report) -> None:
    """Change one document of its kind, run all commands, and note what is wrong."""
    uris = sorted(uri for uri in world.objects if any(part in uri for part in world.documents[document]))
    if not uris:
        return
    uri = draw.choice(uris)
    data = mutated(world.objects[uri].data, draw)
    report.cases[document] += 1
    for command, act in world.commands.items():
        world.reset()
        Stores({}).of(uri).put(uri, data)
        before = world.here()
        outcome = "done"
        try:
            act()
        except MergeError as error:
            outcome = "refused" if error.kind != "defect" else "defect"
            wrong = "".join(traceback.format_exception(error))
        except Exception as error:
            outcome, wrong = "defect", "".join(traceback.format_exception(error))
        report.outcomes[f"{command}: {outcome}"] += 1
        if outcome == "defect":
            report.defects.append(f"{document} {uri} {command}\n{data[:2000]!r}\n{wrong}")
        touched = {
            one
            for one in before.keys() | world.here().keys()
            if before.get(one) != world.here().get(one)
            and (one in world.kept or not one.startswith((f"{world.root}/out/", f"{world.root}/cache/")))
        } - {f"{world.root}/pointer.json"}
        if touched or memory._OBJECTS["memory://home/.bashrc"].data != b"mine":
            report.defects.append(f"{document} {uri} {command} touched {touched}\n{data[:2000]!r}")
        if (
            command in ("merge", "fresh")
            and outcome == "done"
            and document not in DECIDES
            and world.written() != world.weights
        ):
            report.defects.append(f"{document} {uri} {command} wrote other weights\n{data[:2000]!r}")
        if command == "fresh" and outcome == "refused":
            report.defects.append(f"{document} {uri} {command} was refused\n{data[:2000]!r}\n{wrong}")
    world.reset()


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Return a document with something else in it: bytes, or values of its JSON."""
    packed = data[:2] == b"\x1f\x8b"
    text = gzip.decompress(data) if packed else data
    head, line, body = text.partition(b"\n") if text[:9] == b"unsigned\n" else (b"", b"", text)
    if draw.random() < 0.7:
        with contextlib.suppress(ValueError):
            text = head + line + rewritten(body, draw)
            return gzip.compress(text, 1) if packed else text
    content = bytearray(data if packed and draw.random() < 0.5 else text)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        content[place : place + draw.randint(0, 3)] = draw.choice(TOKENS)
    if draw.random() < 0.2:
        del content[draw.randrange(len(content) + 1) :]
    spoiled = bytes(content)
    return gzip.compress(spoiled, 1) if packed and spoiled[:2] != b"\x1f\x8b" and draw.random() < 0.9 else spoiled


def rewritten(text: bytes, draw: random.Random) -> bytes:
    """Return JSON, or lines of it, with one to three values changed. Raises `ValueError` where it is none."""
    try:
        value, before, after = json.loads(text), b"", b""
    except ValueError:
        rows = text.splitlines(keepends=True)
        number = draw.randrange(len(rows)) if rows else 0
        value, before, after = json.loads(rows[number]) if rows else None, b"".join(rows[:number]), b""
        after = b"\n" + b"".join(rows[number + 1 :])
    own = list(leaves(value))
    for _ in range(draw.randint(1, 3)):
        value = changed(value, own, draw)
    return before + json.dumps(value).encode("utf-8", "surrogatepass") + after


def leaves(value: Any) -> Iterator[str | int | float]:
    """Yield the texts and numbers in a JSON value."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from leaves(each)
    elif isinstance(value, str | int | float):
        yield value


def changed(value: Any, own: Sequence[Any], draw: random.Random) -> Any:
    """Return a JSON value with one thing in it replaced, removed, doubled, or put into something else.

    own: the texts and numbers of the document, which may stand in each other's place.
    """
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        return _changed_inside(value, own, draw)
    alike = [each for each in own if type(each) is type(value) and each != value]
    if alike and draw.random() < 0.4:
        return draw.choice(alike)
    if isinstance(value, int | float) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice([-1, 1, 2, -(2**16), 2**16, 0.5])
    if isinstance(value, str) and value and draw.random() < 0.4:
        place = draw.randrange(len(value))
        return value[:place] + draw.choice(["", "/", "..", "\0", "A", "9", "::"]) + value[place + 1 :]
    return draw.choice(ODD)


def _changed_inside(value: Any, own: Sequence[Any], draw: random.Random) -> Any:
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    made, action = copy.copy(value), draw.random()
    if action < 0.75:
        made[key] = changed(value[key], own, draw)
    elif action < 0.85:
        del made[key]
    elif isinstance(made, list):
        made.insert(key, made[key])
    else:
        made[draw.choice(["a", "name", "size", ".."])] = made[key]
    return made


def main() -> None:
    """Fuzz for a time, print figures, and end with 1 if there is a defect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--document", action="append", choices=DOCUMENTS)
    given = parser.parse_args()
    report = fuzz(f"fuzz-{given.seed}", given.document or DOCUMENTS, given.seed, seconds=given.seconds)
    print("cases:", dict(report.cases), "in all", sum(report.cases.values()))
    print("outcomes:", dict(sorted(report.outcomes.items())))
    for defect in report.defects:
        print("DEFECT", defect)
    print(f"{len(report.defects)} defects")
    sys.exit(bool(report.defects))


if __name__ == "__main__":
    main()
