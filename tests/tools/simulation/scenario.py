"""One seed: a command, perhaps started twice, in its weather, and what must hold."""

import gc
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from tests.tools.families import make_family
from tests.tools.simulation.executor import Simulated
from tests.tools.simulation.s3 import Client, Dialect, Network, Server
from tests.tools.simulation.weather import Calm, Rough
from tests.tools.simulation.world import Endless, World
from ties_ray import plugins, runtime
from ties_ray.errors import MergeError
from ties_ray.layout.sizes import SIZES
from ties_ray.libraries.loaders import CARD_NAME, RESULT_NAME
from ties_ray.operations import merging
from ties_ray.planning.plan import Plan
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.state import lease
from ties_ray.state.manifest import FOLDER
from ties_ray.stores import Store, _s3_service
from ties_ray.stores._s3_client import Connection

TINY = replace(
    SIZES, least_part=1024, most_part=1024, max_shard=2048, max_range=2048, min_range=512, max_block=1024,
    least_block=256, model_group=2, min_resident_block=256, shards_at_least=4, record_shards=2, gap=256,
)  # fmt: skip
"""Sizes by which a merge of a few KB has the parts, shards, groups and records of a large one."""
OUTPUT = "merged/out/"
INDEX = f"{OUTPUT}model.safetensors.index.json"
RESULT = f"{OUTPUT}{RESULT_NAME}"
LEASE = f"{OUTPUT}{FOLDER}/{lease.NAME}"
ABORT = "abort_multipart_upload"
OF_UPLOADS = ("create_multipart_upload", ABORT, "complete_multipart_upload")
METHODS: dict[str, object] = {
    "ties": {"name": "ties"},
    "official": {"name": "ties", "profile": "official"},
    "consensus": "consensus",
    "dare": {"name": "dare", "density": 0.4},
    "average": "average",
}
VOLATILE = frozenset(
    ("resumed", "reused", "seconds", "predicted_seconds", "worker_seconds", "shards_done_before", "shards_again",
     "workers_lost", "bytes_read", "requests", "bytes_kept", "bytes_compared", "bytes_written", "retries", "notes",
     "documents")
)  # fmt: skip
"""Fields of a result record that may differ between two runs of one merge."""
ALLOWED = (0, 4, 5)
"""The exits of a command whose inputs do not change."""
CHANGED = 3
"""The exit of one whose inputs do."""
COLLECTED = 20
"""Seeds between two collections of garbage: one takes as long as a seed."""
SOON = 3600.0
"""Seconds after the end of the weather within which each command must have ended with 0."""
LIMIT = 4 * 3600.0
"""Seconds of simulated time within which all must have ended."""


_names, _version = cache(plugins.names), cache(metadata.version)
"""They do not change, and to look them up takes a third of the time."""


PLAIN = Dialect()


@dataclass(frozen=True)
class Case:
    """What is merged, and where."""

    method: str = "ties"
    workers: int = 2
    cached: bool = True
    dialect: Dialect = PLAIN
    second: float | None = None
    """When the same command is started once more, in seconds."""
    changes: float | None = None
    """When a model changes, in seconds; not before the plan is made."""
    plans: bool = True
    """Whether each command reads the inputs and makes its plan. Else it begins with the plan of an undisturbed one."""


@dataclass(frozen=True)
class Outcome:
    """What a seed has shown."""

    problems: tuple[str, ...]
    digest: str
    """Digest of all events."""
    seconds: float
    """Simulated time."""
    requests: int
    runs: int
    """How often the command was started."""
    case: str
    struck: Counter[str]
    """How often each fault and trouble has struck."""


@cache
def family() -> dict[str, bytes]:
    """Return the objects of a base and three models, by key."""
    objects: dict[str, bytes] = {}

    def put(uri: str, data: bytes) -> None:
        objects[uri.removeprefix("s3://b/")] = data

    make_family(cast(Store, SimpleNamespace(put=put)), "s3://b/family", hidden=16, layers=1, num_models=3)
    return objects


def recipe_of(case: Case) -> Recipe:
    """Return the recipe of a case."""
    cached = {} if case.cached else {"cache": 0, "disk_cache": 0}
    run = {"executor": "simulated", "workers": case.workers, "patience": 15, "deadline": 60, **cached}
    return validate(
        {
            "base": "s3://b/family/base",
            "models": [f"s3://b/family/model-{number}" for number in range(3)],
            "method": METHODS[case.method],
            "output": {"path": f"s3://b/{OUTPUT.rstrip('/')}", "file_size": "5KB"},
            "run": run,
        }
    )


@cache
def reference(case: Case) -> tuple[dict[str, bytes], Plan]:
    """Return what an undisturbed merge leaves in the output, without its manifest, and its plan."""
    seed = Seed(0, case, Calm)
    outcome = seed.run()
    assert not outcome.problems, outcome
    assert seed.plan
    return {key: each.data for key, each in seed.server.objects.items() if _is_visible(key)}, seed.plan


def _is_visible(key: str) -> bool:
    return key.startswith(OUTPUT) and not key.startswith(f"{OUTPUT}{FOLDER}/")


def _fixed(result: bytes) -> dict[str, Any]:
    """Return the fields of a result record that every run of a merge must give."""
    return {name: value for name, value in json.loads(result).items() if name not in VOLATILE}


def drawn(world: World) -> Case:
    """Return the case of a seed."""
    draw = world.draw
    return Case(
        method=draw.choice(list(METHODS)),
        workers=draw.randint(1, 3),
        cached=draw.random() < 0.5,
        dialect=Dialect(
            is_aws=(is_aws := draw.random() < 0.5),
            completes_twice=draw.random() < 0.5,
            page=draw.choice((3, 1000)),
            lag=draw.choice((0.0, 0.0, 3.0)),
            conditional=is_aws or draw.random() < 0.8,
        ),
        second=draw.uniform(0, draw.choice((0.1, 5.0, 60.0))) if draw.random() < 0.5 else None,
        changes=draw.uniform(0, 5.0) if draw.random() < 0.05 else None,
        plans=draw.random() < 0.25,  # planning takes half of the CPU of a seed
    )


def _untold(*_: object) -> str:
    """Tell nothing of this machine."""
    return ""


class Seed:
    """All that happens under one seed."""

    def __init__(
        self,
        seed: int,
        case: Case | None = None,
        weather: type[Calm] = Rough,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        """case, weather: by default they are drawn. trace: takes a line for each event."""
        self.problems: list[str] = []
        self._world = World(seed, trace, LIMIT)
        self._weather = weather(self._world)
        self._case = case or drawn(self._world)
        self.server = Server(self._world, self._case.dialect)
        self.server.watch = self._look
        self._network = Network(self._world, self.server, self._weather.fate)
        self._network.listen = self._overhear
        self._world.strike = self._weather.strike
        self._wanted: dict[str, bytes] = {}
        self.plan: Plan | None = None
        """What is merged, once it is planned."""
        if weather is not Calm:
            undisturbed = replace(self._case, dialect=PLAIN, second=None, changes=None, plans=True)
            self._wanted, self.plan = reference(undisturbed)
        self._runs = 0
        self._to_come = 0
        self._has_changed = False
        self._last: dict[str, tuple[str, str]] = {}
        """What each driver has done to an upload since it asked for the lease."""
        self._looked = 0.0, 0.0
        """When uploads were listed last before the merge was done, and of when that listing tells."""
        self._recipe = recipe_of(self._case)

    def run(self) -> Outcome:
        """Let it happen, and look at what is left."""
        world = self._world
        for key, data in family().items():
            self.server.put(key, data)
        with self._installed():
            try:
                for user, begins in (("a", 0.0), ("b", self._case.second)):
                    if begins is not None:
                        self._to_come += 1
                        world.at(begins, lambda user=user: self._command(user))  # type: ignore[misc]
                if self._case.changes is not None:
                    world.at(self._case.changes, self._change)
                if isinstance(self._weather, Rough) and "forgotten" in self._weather.troubles:
                    world.at(world.draw.uniform(0, self._weather.end), self._forget)
                world.run()
                self._check_end()
            except Endless as error:
                self.problems.append(str(error))
            finally:
                world.close()
        case = f"{self._case}; {self._weather}"
        return Outcome(
            tuple(self.problems),
            world.digest.hexdigest(),
            world.now,
            self._network.num_requests,
            self._runs,
            case,
            self._weather.struck,
        )

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """Put clock, threads, executor and client in the place of the real ones."""
        Simulated.weather, Simulated.complain = self._weather, self.problems.append
        plugins._entry_points("executors")["simulated"] = metadata.EntryPoint(
            "simulated", f"{Simulated.__module__}:Simulated", "ties_ray.executors"
        )

        def connect(*_: object, **__: object) -> Connection:
            return Connection(Client(self._network), self._case.dialect.is_aws, "", ("", ""))

        with (
            self._world.installed(),
            mock.patch.object(_s3_service, "connect", connect),
            mock.patch.object(lease, "_machine", _untold),
            mock.patch.object(plugins, "names", _names),
            mock.patch.object(metadata, "version", _version),
            mock.patch.object(lease, "_process", _untold),
            mock.patch.object(sys, "unraisablehook", _untold),  # generators of killed threads complain
        ):
            yield

    # -- what happens

    def _command(self, user: str) -> None:
        """Run the command; run it again when it has ended, until it ends with 0."""
        self._runs += 1
        code: list[int] = []

        def drive() -> None:
            code.append(self._drive())

        def ended() -> None:
            self._world.note(f"run {process.name} ended: {code[0] if code else 'killed'}")
            if code and (code[0] == 0 or (code[0] == CHANGED and self._has_changed)):
                self._to_come -= 1
            elif not code or code[0] in ALLOWED:
                self._world.at(self._world.draw.uniform(0.5, self._world.draw.choice((2.0, 60.0))), again)

        def again() -> None:
            if isinstance(self._weather, Rough) and self._world.now > self._weather.end + SOON:
                self.problems.append(f"not done {SOON:.0f} s after the end of the weather")
            else:
                self._command(user)

        process = self._world.start(f"{user}{self._runs}", drive)
        process.on_death.append(ended)

    def _drive(self) -> int:
        """Return the exit code of the command."""
        try:
            if self._case.plans or self._has_changed or not self.plan:
                self.plan = merging.plan(self._recipe, TINY)
            merging.carry_out(self.plan, started=runtime.monotonic(), fresh=False, watch=lambda _: None)
        except MergeError as error:
            self._world.note(f"error {error.exit_code}: {error}")
            if error.exit_code not in ALLOWED and not (error.exit_code == CHANGED and self._has_changed):
                self.problems.append(f"exit {error.exit_code}: {error}")
            return error.exit_code
        except Exception:
            self.problems.append(traceback.format_exc())
            return 1
        return 0

    def _change(self) -> None:
        """Replace a model, once the plan is made."""
        if not any(key.endswith("/run.json") for key in self.server.objects):
            self._world.at(0.1, self._change) if self._to_come else None
            return
        key = "family/model-1/model.safetensors"
        data = self.server.objects[key].data
        self.server.put(key, data[:-64] + bytes(64))
        self._has_changed = True
        self._world.note("changed: a model")

    def _forget(self) -> None:
        """Let the service lose an unfinished upload."""
        names = list(self.server.open_uploads())
        if names:
            name = self._world.draw.choice(names)
            self._world.note(f"forgotten: {name}")
            self._weather.struck["forgotten"] += 1
            self.server.uploads[name].ended = self._world.now

    # -- what must hold

    def _look(self, key: str) -> None:
        """Look at the output as a loader would, whenever it changes."""
        if not self._wanted or not _is_visible(key):
            return
        objects = self.server.objects
        if key == RESULT and not self._looked[0]:
            self._looked = self.server.looked or (self._world.now, self._world.now)
        if key in objects and key.endswith(".safetensors") and objects[key].data != self._wanted[key]:
            self.problems.append(f"wrong bytes: {key}")
        weights = [name for name in self._wanted if name.endswith(".safetensors")]
        others = [name for name in self._wanted if name not in (*weights, INDEX, RESULT)]
        needed = (*weights, *others) if INDEX in objects else ()
        needed = (*weights, *others, INDEX) if RESULT in objects else needed
        missing = [name for name in needed if name not in objects]
        if missing:
            self.problems.append(f"half-made is visible: {key} without {', '.join(missing)}")

    def _overhear(self, sender: str, operation: str, asked: Mapping[str, Any]) -> None:
        """Demand that a driver asks for the lease before it begins or completes an upload, or aborts another's."""
        key, upload = asked.get("Key", ""), self.server.uploads.get(asked.get("UploadId", ""))
        if key == LEASE:
            self._last.pop(sender, None)
        if operation not in OF_UPLOADS or "." in sender or (operation == ABORT and upload and upload.by == sender):
            return
        if self._last.setdefault(sender, (operation, key)) != (operation, key):  # the same once more is a repetition
            self.problems.append(f"{sender}: {operation} of {key} without a look at the lease")

    def _check_end(self) -> None:
        """Look at what all runs have left."""
        left = {key: each.data for key, each in self.server.objects.items() if _is_visible(key)}
        if not self._wanted:
            return
        if self._to_come:
            self.problems.append(f"{self._to_come} commands did not end with 0")
        if self._has_changed and RESULT not in left:
            return
        if left.keys() != self._wanted.keys():
            self.problems.append(f"other files: {sorted(left.keys() ^ self._wanted.keys())}")
        elif _fixed(left[RESULT]) != _fixed(self._wanted[RESULT]):
            self.problems.append("the result record says otherwise")
        same = [key for key in left if key not in (RESULT, f"{OUTPUT}{CARD_NAME}")]
        self.problems += [f"wrong bytes in the end: {key}" for key in same if left[key] != self._wanted.get(key)]
        for name, upload in self.server.open_uploads().items():
            looked, seen = self._looked
            if upload.begun < seen or (upload.asked > looked and upload.is_known):  # else nobody can know it
                self.problems.append(f"upload left: {name} of {upload.key}, begun by {upload.by} at {upload.begun:.3f}")


def outcomes(
    seeds: Iterable[int], switch: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Iterator[tuple[int, Outcome]]:
    """Yield each seed with its outcome. switch: around each seed."""
    for count, seed in enumerate(seeds):
        prepared = Seed(seed)
        with switch():
            outcome = prepared.run()
        if not count:
            gc.collect()
            gc.freeze()  # what is there now is passed over
            gc.disable()
        elif count % COLLECTED == 0:
            gc.collect()
        yield seed, outcome
