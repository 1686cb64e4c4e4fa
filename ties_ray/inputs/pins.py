"""Verifies the versions and hashes that a recipe gives, and notes pins that are too weak to notice a change."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor

from ties_ray.errors import InputError, Problem
from ties_ray.inputs.expand import Entry
from ties_ray.inputs.fetch import Problems, gather
from ties_ray.stores import Pin, Store, Stores, last_part, scheme_of, shown

HASH_BYTES = 16 * 2**20
"""A SHA-256 is computed from reads of so many bytes."""


def verify_pins(
    entries: Sequence[Entry], weight_files: Mapping[str, Sequence[Pin]], stores: Stores, threads: Executor
) -> tuple[list[str], list[Problem]]:
    """Verify the versions and hashes that entries give; return notes and problems.

    weight_files: the pins of each input's weight files, by id. A file that is pinned by `sha256` is read whole.
    """
    notes: list[str] = []
    problems: Problems = defaultdict(list)
    jobs: list[tuple[str, tuple[Pin, str]]] = []
    for entry in entries:
        pins = {last_part(pin.uri): pin for pin in weight_files[entry.id]}
        unknown = sorted({*entry.sha256, *entry.version_id} - pins.keys())
        if unknown:
            message = f"pins {', '.join(unknown)}, its weight files are {', '.join(pins)}"
            problems[entry.id].append(Problem(entry.place, message))
        for name, version in entry.version_id.items():
            if name in pins and pins[name].version != version:
                message = f"is at version {pins[name].version or 'none'}, the recipe pins {version}"
                remedy = "restore that version, or pin the current one"
                problems[entry.id].append(Problem(shown(pins[name].uri), message, remedy))
        jobs += [(entry.id, (pins[name], expected)) for name, expected in entry.sha256.items() if name in pins]
    if jobs:
        size = sum(pin.size for _, (pin, _) in jobs)
        notes.append(f"{len(jobs)} files pinned by sha256 were read whole while planning: {size:,} bytes")
    gather(lambda job: _verify_hash(stores.of(job[0].uri), *job), jobs, threads, problems)
    return notes, [problem for many in problems.values() for problem in many]


def weak_pins(pins: Iterable[Pin]) -> list[str]:
    """Return notes on pins that hold the size alone, so that a read can't be tied to the planned content."""
    weak = Counter(scheme_of(pin.uri) for pin in pins if not pin.etag)
    return [
        f"{count} files under {scheme}:// are pinned by their size alone: a change that keeps it goes unseen"
        for scheme, count in sorted(weak.items())
    ]


def _verify_hash(store: Store, pin: Pin, expected: str) -> None:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(HASH_BYTES, pin.size)))
    for start in range(0, pin.size, HASH_BYTES):
        piece = buffer[: min(HASH_BYTES, pin.size - start)]
        store.read(pin, start, piece)
        digest.update(piece)
    if digest.hexdigest() != expected.lower():
        message = f"has the SHA-256 {digest.hexdigest()}, the recipe pins {expected}"
        raise InputError(Problem(shown(pin.uri), message, "use the file that was pinned, or pin this one"))
