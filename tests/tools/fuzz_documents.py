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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.tools.adapters import make_pool
from tests.tools.families import make_family
from tests.tools.hostile import TOKENS
from tests.tools.merging import LOCAL, recipe_of
from ties_ray.driver.resume import clean
from ties_ray.errors import MergeError
from ties_ray.operations import merging
from ties_ray.operations.promote import promote, rollback
from ties_ray.operations.status import status
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import Progress
from ties_ray.state import lease
from ties_ray.stores import Stores, memory

ODD = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "..", "../../home/.bashrc",
    "/etc/passwd", "a\x00b", "\ud800", "x" * 5000, [], {}, [[]], [0] * 100, {"a": 1}, "memory://home/.bashrc", "s3://b/k",
    "0123456789abcdef", "0" * 64,
]  # fmt: skip
DECIDES = ("record", "folded", "pool cache", "result")
"""Documents by which weights are decided, or that say what the output is; all others change no byte."""


@dataclass
class World:
    """A place in memory with inputs and an output, as it was when a merge ended or was stopped."""

    root: str
    recipe: Recipe
    documents: dict[str, tuple[str, ...]]
    """What is changed: by name, suffixes or parts of the URI..."""
    forget: tuple[str, ...] = ()
    """...and what is removed before, so that it is made anew from the changed ones."""
    objects: dict[str, Any] = field(default_factory=dict)
    uploads: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, bytes] = field(default_factory=dict)
    """Of the merge undisturbed."""

    @property
    def output(self) -> str:
        """Return the URI of the output."""
        return self.recipe.output.path

    def here(self) -> dict[str, Any]:
        """Return the objects under the root."""
        return {uri: one for uri, one in memory._OBJECTS.items() if uri.startswith(self.root)}

    def keep(self) -> None:
        """Note what there is, to come back to."""
        self.objects = self.here()
        self.uploads = {name: one for name, one in memory._UPLOADS.items() if one.uri.startswith(self.root)}

    def reset(self) -> None:
        """Come back to it."""
        for uri in self.here():
            memory._OBJECTS.pop(uri, None)
        memory._OBJECTS.update(self.objects)
        for name in [name for name, one in memory._UPLOADS.items() if one.uri.startswith(self.root)]:
            memory._UPLOADS.pop(name)
        memory._UPLOADS.update(copy.deepcopy(self.uploads))

    def written(self) -> dict[str, bytes]:
        """Return the weights in the output."""
        return {uri: one.data for uri, one in self.here().items() if self._is_weight(uri)}

    def _is_weight(self, uri: str) -> bool:
        return uri.startswith(self.output + "/") and uri.endswith(".safetensors")


@dataclass
class Report:
    """What a run of the fuzzer came to."""

    cases: Counter[str] = field(default_factory=Counter)
    """By document."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """By command, and whether it did its work or refused."""
    defects: list[str] = field(default_factory=list)


class Stop(Exception):
    """Ends a merge at a chosen stage."""


def stop_at(stage: str) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.stage == stage:
            raise Stop

    return watch


def worlds(name: str) -> Iterator[World]:
    """Yield the worlds: finished and stopped merges of models, and of adapters whose rank is to be settled."""
    store = Stores({}).of(f"memory://{name}")
    store.put("memory://home/.bashrc", b"mine")
    plain = {"plan": ("plan.json.gz",), "run": ("run.json",), "lease": ("lease.json",)}
    ties = {"name": "ties", "density": 0.3}
    for end, folder in ((None, "done"), ("publish", "half"), ("merge", "early")):
        root = f"memory://{name}-{folder}"
        family = make_family(store, root, num_models=2)
        recipe = recipe_of(family, {"path": f"{root}/out", "file_size": 4000}, ties)
        documents = (
            dict(plain)
            if end
            else {**plain, "result": ("ties-ray.result.json",), "index": (".index.json",), "pointer": ("pointer.json",)}
        )
        if end == "publish":
            documents |= {"record": ("/records/",), "uploads": ("uploads.json",)}
        else:
            documents |= {"folded": ("/folded/",), "seen": ("/seen/",)}
        yield made(World(root, recipe, documents), end)
    root = f"memory://{name}-counted"
    family = make_family(store, root, num_models=2)
    recipe = recipe_of(family, {"path": f"{root}/out"}, ties)
    yield made(World(root, recipe, {"record": ("/records/0/", "/records/1/")}, ("/folded/",)), "merge")
    root = f"memory://{name}-adapters"
    pool = make_pool(store, root, num_adapters=3)
    data = {
        "base": pool.base, "models": [{"path": uri} for uri in pool.adapters], "method": ties,
        "output": {"path": f"{root}/out", "kind": "adapter", "rank": "auto", "energy": 0.9, "max_rank": 8},
        "run": {**LOCAL, "pool_cache": f"{root}/cache"}, "bounds": {"norm": [1e-9, 1e9]},
        "allow": {"refused_model": "drop", "nan": "drop_model"},
    }  # fmt: skip
    documents = {**plain, "record": ("/records/",), "folded": ("/folded/",), "scratch": ("/scratch/",)}
    yield made(World(root, validate(data), documents), "publish")
    root = f"memory://{name}-cached"
    pool = make_pool(store, root, num_adapters=3)
    data |= {
        "base": pool.base, "models": [{"path": uri} for uri in pool.adapters],
        "output": {"path": f"{root}/out", "kind": "delta"}, "run": {**LOCAL, "pool_cache": f"{root}/cache"},
    }  # fmt: skip
    yield made(World(root, validate(data), {"pool cache": ("/cache/",)}, ("/out/",)), None)


def made(world: World, end: str | None) -> World:
    """Merge up to a stage, note what there is, and what the whole merge writes."""
    with contextlib.suppress(Stop):
        merging.merge(world.recipe, watch=stop_at(end) if end else lambda progress: None)
    stores = Stores({})
    if end is None:
        promote(stores, world.output, f"{world.root}/pointer.json")
    else:
        stores.of(world.output).put(f"{world.output}/.ties-ray/lease.json", LEASE)
    for uri in world.here():
        if any(part in uri for part in world.forget):
            memory._OBJECTS.pop(uri)
    world.keep()
    merging.merge(world.recipe)
    world.weights = world.written()
    world.reset()
    return world


LEASE = lease.Holder(token="0" * 32, host="there", machine="another", process="1-2").model_dump_json().encode()
DOCUMENTS = (
    "plan", "run", "lease", "uploads", "record", "folded", "seen", "result", "pointer", "pool cache", "scratch",
    "index",
)  # fmt: skip


def fuzz(name: object, documents: Sequence[str], seed: int, *, cases: int = 0, seconds: float = 0.0) -> Report:
    """Return what so many cases of each document, or so many seconds of all of them, came to."""
    report, draw, until = Report(), random.Random(seed), time.monotonic() + seconds
    there = [one for one in worlds(str(name).strip("/").replace("/", "-")) if set(documents) & set(one.documents)]
    still, lease.STILL_SECONDS, lease.BEAT_SECONDS = (lease.STILL_SECONDS, lease.BEAT_SECONDS), 0.05, 0.05
    try:
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
    for command, act in commands(world).items():
        world.reset()
        Stores({}).of(uri).put(uri, data)
        before = world.here()
        outcome = "done"
        try:
            act()
        except MergeError as error:
            outcome = "refused" if error.kind != "defect" else "defect"
            wrong = "".join(traceback.format_exception(error)) if outcome == "defect" else ""
        except Exception as error:
            outcome, wrong = "defect", "".join(traceback.format_exception(error))
        report.outcomes[f"{command}: {outcome}"] += 1
        if outcome == "defect":
            report.defects.append(f"{document} {uri} {command}\n{data[:2000]!r}\n{wrong}")
        touched = {
            one
            for one in before.keys() | world.here().keys()
            if before.get(one) != world.here().get(one)
            and not one.startswith((f"{world.root}/out/", f"{world.root}/cache/"))
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
    world.reset()


def commands(world: World) -> dict[str, Callable[[], object]]:
    """Return what reads documents of an output."""
    stores, output, pointer = Stores({}), world.output, f"{world.root}/pointer.json"
    return {
        "status": lambda: status(stores, output),
        "verify": lambda: verify(stores, output, sample=0.1, recount=0.1),
        "clean": lambda: clean(stores, output, remove=True),
        "promote": lambda: promote(stores, output, pointer),
        "rollback": lambda: rollback(stores, pointer),
        "merge": lambda: merging.merge(world.recipe),
        "fresh": lambda: merging.merge(world.recipe, fresh=True),
    }


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Return a document with something else in it: bytes, or values of its JSON."""
    packed = data[:2] == b"\x1f\x8b"
    text = gzip.decompress(data) if packed else data
    head, line, body = text.partition(b"\n") if text[:9] == b"unsigned\n" else (b"", b"", text)
    if draw.random() < 0.7:
        with contextlib.suppress(ValueError):
            value = json.loads(body)
            for _ in range(draw.randint(1, 3)):
                value = changed(value, draw)
            body = json.dumps(value).encode("utf-8", "surrogatepass")
            text = head + line + body
            return gzip.compress(text, 1) if packed else text
    content = bytearray(data if packed and draw.random() < 0.5 else text)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        content[place : place + draw.randint(0, 3)] = draw.choice(TOKENS)
    if draw.random() < 0.2:
        del content[draw.randrange(len(content) + 1) :]
    spoiled = bytes(content)
    return gzip.compress(spoiled, 1) if packed and spoiled[:2] != b"\x1f\x8b" and draw.random() < 0.9 else spoiled


def changed(value: Any, draw: random.Random) -> Any:
    """Return a JSON value with one thing in it replaced, removed, doubled, or put into something else."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        made = copy.copy(value)
        what = draw.random()
        if what < 0.75:
            made[key] = changed(value[key], draw)
        elif what < 0.85:
            del made[key]
        elif isinstance(made, list):
            made.insert(key, made[key])
        else:
            made[draw.choice(["a", "name", "size", ".."])] = made[key]
        return made
    if isinstance(value, int | float) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice([-1, 1, 2, -(2**16), 2**16, 0.5])
    if isinstance(value, str) and value and draw.random() < 0.4:
        place = draw.randrange(len(value))
        return value[:place] + draw.choice(["", "/", "..", "\0", "A", "9", "::"]) + value[place + 1 :]
    return draw.choice(ODD)


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
