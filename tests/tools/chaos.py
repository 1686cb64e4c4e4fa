"""A campaign against promise 6: merges as processes on a real S3 server, faults, and SIGKILL at exact points.

    python -m tests.tools.chaos --merges 300 --ray 40 --seed 1
    python -m tests.tools.chaos --only 17 --seed 1        merge 17 of that campaign again, told in full
    python -m tests.tools.chaos --prove                   with a protection off it must find wrong bytes or lost runs

A merge is the command `ties-ray merge`, a process each time, again and again until it ends with 0. Its storage is a
proxy (`fault_proxy.py`) that commits faults by a script and kills the process that makes the n-th request of a kind.
Bytes are compared with those of an undisturbed run, past the proxy. One seed is one campaign; how threads interleave is
not in our hands.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import boto3
import psutil

from tests.conftest import free_port, tool
from tests.tools.families import make_family
from tests.tools.fault_proxy import Fault, FaultProxy, Rule
from tests.tools.unprotected import PROTECTIONS
from ties_ray.cli import commands
from ties_ray.reports.records import RESULT_NAME
from ties_ray.stores import Stores

CPUS = 2
"""Of the cluster; a late node brings another one."""
UNCACHED = {"cache": 0, "disk_cache": 0}
ATTEMPTS = 6
"""Runs of one command; the last one is left alone, and must end with 0."""
SECONDS = 240.0
"""An attempt that takes longer hangs."""
LANES = 3
"""Merges at a time, and one on Ray: most of their time is waiting, between the tries of a request."""
SERVER_BYTES = 4 * 2**30
"""A server that holds more memory is replaced: moto keeps what was deleted."""
FAMILIES: dict[str, dict[str, Any]] = {
    "bf16": {"hidden": 768, "shards": 2, "seed": 1},
    "mixed": {"hidden": 512, "mixed": True, "seed": 2},
}
"""About 12 MB a model, three models and their base."""
METHODS: dict[str, object] = {
    "ties": {"name": "ties"},
    "official": {"name": "ties", "profile": "official"},
    "dare": {"name": "dare", "density": 0.4},
    "consensus": "consensus",
    "average": "average",
}
ROUNDS = ("ties", "official")
"""Methods that read their inputs more than once, with barriers between."""
WEIGHTS = "/models/*/model-?/*.safetensors"
"""Of the models, not of the base: what the base alone holds is copied, and so read once."""
PLANNED = "get-range */uploads.json"
"""From here on the run is past its planning."""
DRAWN = ("put-part", "put-part", "put", "get-range", "complete", "list", "create-upload")

COSTLY = ("forget_upload", "new_etag")
"""Faults that end an attempt: they are committed in the first two only."""

Kinds = dict[str, Callable[[random.Random], list[Rule]]]
FAULTS: Kinds = {
    "slow_down": lambda r: [Rule("slow_down", r.choice(DRAWN), count=r.randint(2, 4), probability=0.7)],
    "internal_error": lambda r: [Rule("internal_error", r.choice(DRAWN), count=r.randint(2, 4), probability=0.7)],
    "expired_token": lambda r: [Rule("expired_token", r.choice(DRAWN[:4]), nth=r.randint(1, 3))],
    "skewed": lambda r: [Rule("skewed")],  # every request, until it is signed by the service's time
    "hang_up": lambda r: [Rule("hang_up", r.choice(DRAWN), count=r.randint(1, 3), probability=0.7)],
    "drop_upload": lambda r: [Rule("drop_upload", r.choice(DRAWN[:3]), count=2, probability=0.7)],
    "forget_upload": lambda r: [Rule("forget_upload", r.choice(("put-part", "complete", "list-parts")), count=1)],
    "delay": lambda r: [Rule("delay", count=4, probability=0.3, seconds=0.3)],
    "hang": lambda r: [Rule("hang", "get-range", WEIGHTS, nth=r.randint(1, 9), seconds=1.5)],
    "cut": lambda r: [Rule("cut", "get-range", count=3, probability=0.3)],
    "short": lambda r: [Rule("short", "get-range", count=2, probability=0.3)],
    "whole": lambda r: [Rule("whole", "get-range", WEIGHTS, count=2, probability=0.3)],
    # one an attempt: a second could meet the reading again that heals the first, which is refused, and rightly
    "flip": lambda r: [Rule("flip", "get-range", WEIGHTS, nth=r.randint(1, 9), after="put */folded/0/*")],
    "flip_upload": lambda r: [Rule("flip_upload", r.choice(DRAWN[:3]), count=r.randint(1, 2))],
    "new_etag": lambda r: [Rule("new_etag", "get-range", WEIGHTS, nth=r.randint(1, 9), after=PLANNED)],
    "stale": lambda r: [Rule("stale", "get-range", "*/lease.json", count=3)],
    "error_after": lambda r: [Rule("error_after", r.choice((*DRAWN[:3], *DRAWN[4:], "delete")), count=r.randint(1, 3))],
    "error_inside": lambda r: [Rule("error_inside", "complete", count=2)],
}
ONCE: Kinds = {"flip once": lambda r: [Rule("flip", "get-range", WEIGHTS, nth=r.randint(1, 6), after=PLANNED)]}
"""What only TLS would notice, where the method reads its inputs once: no part of a campaign, counted apart."""
KILLS: Kinds = {
    "while a worker starts": lambda r: [Rule("kill", "get-range", "*/plan.json.gz", nth=1)],
    "before a read": lambda r: [Rule("kill", "get-range", WEIGHTS, nth=r.randint(1, 6), after=PLANNED)],
    "after an upload began, before it is noted": lambda r: [Rule("kill_after", "create-upload", nth=r.randint(1, 2))],
    "after a merge, before its part": lambda r: [Rule("kill", "put-part", nth=r.randint(1, 3))],
    "inside a part": lambda r: [Rule("kill_upload", "put-part", nth=r.randint(1, 3))],
    "after a part, before its record": lambda r: [Rule("kill_after", "put-part", nth=r.randint(1, 3))],
    "before a record": lambda r: [Rule("kill", "put", "*/records/*", nth=1)],
    "after a record": lambda r: [Rule("kill_after", "put", "*/records/*", nth=1)],
    "before a barrier is noted": lambda r: [Rule("kill", "put", "*/folded/*", nth=r.randint(1, 2))],
    "after a barrier is noted": lambda r: [Rule("kill_after", "put", "*/folded/*", nth=r.randint(1, 2))],
    "before Complete": lambda r: [Rule("kill", "complete", nth=r.randint(1, 2))],
    "between Complete and the result record": lambda r: [Rule("kill_after", "complete", nth=r.randint(1, 2))],
    "before the index": lambda r: [Rule("kill", "put", "/merged/*.index.json", nth=1)],
    "before the result record": lambda r: [Rule("kill", "put", f"*/{RESULT_NAME}", nth=1)],
    "after the result record": lambda r: [Rule("kill_after", "put", f"*/{RESULT_NAME}", nth=1)],
}
assert {*FAULTS, "kill", "kill_upload", "kill_after", "strike"} == {*get_args(Fault)}
STARTED = "get-range */plan.json.gz"
"""From here on a worker has started."""
STARTING = "while a worker starts"
TROUBLES: Kinds = {
    "none": lambda r: [],
    "death at start": lambda r: [],  # its kill is that of STARTING
    "loss of the head": lambda r: [Rule("strike", "get-range", WEIGHTS, nth=r.randint(1, 6), after=STARTED)],
    "late node": lambda r: [Rule("strike", "get-range", WEIGHTS, nth=r.randint(1, 3), after=STARTED)],
}
"""What happens to the cluster in the first attempt of a merge on Ray."""
SILENT_SECONDS = 25.0
"""A driver ends when the head has been silent for 20 s."""
JOIN_SECONDS = 60.0
"""A late node whose worker has not read the plan by then does not count."""


@dataclass(frozen=True)
class Case:
    """One merge of a campaign and all that is done to it."""

    number: int
    seed: int
    family: str
    method: str
    executor: str
    workers: int
    faults: tuple[str, ...]
    kill: str
    cached: bool
    """Whether workers keep what they have read; else every round reads all again."""
    trouble: str = "none"

    def script(self, attempt: int) -> tuple[list[Rule], str]:
        """Return the rules of an attempt (from 0), the kill first, and the point of that kill."""
        draw = random.Random(f"{self.seed} {self.number} {attempt}")
        first = 1 if self.trouble == "loss of the head" else 0
        kill = self.kill if attempt == first else ""
        if attempt == 1 > first and draw.random() < 0.2:
            kill = draw.choice(list(KILLS))
        rules = TROUBLES[self.trouble](draw) if attempt == 0 else []
        rules += KILLS[kill](draw) if kill else []
        faults = [one for one in self.faults if attempt < ATTEMPTS - 1 and (attempt < 2 or one not in COSTLY)]
        return rules + [rule for fault in faults for rule in (FAULTS | ONCE)[fault](draw)], kill


def cases(merges: int, on_ray: int, seed: int) -> list[Case]:
    """Return a campaign's merges: two faults each, in turn, and a kill in three of four."""
    draw = random.Random(seed)
    faults = _in_turn(list(FAULTS), draw)
    kills = _in_turn(list(KILLS), draw)
    troubles = _in_turn(list(TROUBLES), draw)
    made = []
    for number in range(merges):
        is_on_ray = (number + 1) * on_ray // merges > number * on_ray // merges
        trouble = next(troubles) if is_on_ray else "none"
        chosen = (next(faults), next(faults))
        kill = next(kills) if draw.random() < 0.75 else ""
        kill = STARTING if trouble == "death at start" else kill
        methods = ROUNDS if "flip" in chosen or "barrier" in kill else tuple(METHODS)
        made.append(
            Case(
                number=number,
                seed=seed,
                family=draw.choice(list(FAMILIES)),
                method=draw.choice(methods),
                executor="ray" if is_on_ray else "local",
                workers=CPUS + 1 if trouble == "late node" else draw.randint(1, 3),
                faults=chosen,
                kill=kill,
                cached="flip" not in chosen and draw.random() < 0.5,
                trouble=trouble,
            )
        )
    return made


def _in_turn(items: list[str], draw: random.Random) -> Iterator[str]:
    while True:
        yield from draw.sample(items, len(items))


class Ended(NamedTuple):
    """One process of `ties-ray merge`."""

    code: int | str
    """`hang` where it had to be killed by us, `no record` where it ended with 0 and printed something else."""
    result: dict[str, Any]
    """The result record on its standard output; empty where there is none."""
    errors: str
    seconds: float


PROBLEMS = (
    *("wrong bytes", "lost runs", "leaked uploads", "bad exits", "defects", "hangs"),
    *("not recognised as done", "losses untold"),
)


@dataclass
class Tally:
    """What a campaign has seen."""

    merges: int = 0
    attempts: int = 0
    resumed: int = 0
    workers_lost: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    executors: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(PROBLEMS, 0)))
    slowest: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __str__(self) -> str:
        lines = [
            f"merges {self.merges} ({_counted(self.executors)}), attempts {self.attempts}"
            f" (slowest {self.slowest:.0f} s), resumed {self.resumed}, Ray workers replaced {self.workers_lost}",
            f"exit codes: {_counted(self.codes)}",
            f"faults {self.faults.total()}: {_counted(self.faults)}",
            f"kills {self.kills.total()}: {_counted(self.kills)}",
            f"troubles of the cluster {self.troubles.total()}: {_counted(self.troubles)}",
            f"must be none: {_counted(self.problems)}",
        ]
        return "\n".join(lines)


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))


# -- servers


class Server:
    """A moto server with the families in its memory, and past the proxy what lies in it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")

    def start(self) -> None:
        """Start it anew, and put the families there: the same bytes and ETags every time."""
        self.stop()
        command = [tool("moto_server"), "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while True:
            try:
                self.client.create_bucket(Bucket="models")
                break
            except Exception:
                assert time.monotonic() < end, "moto_server does not start"
                time.sleep(0.1)
        self.client.create_bucket(Bucket="merged")
        store = Stores({"s3": {"endpoint_url": self.url}}).of("s3://models")
        for name, how in FAMILIES.items():
            make_family(store, f"s3://models/{name}", **how)

    def stop(self) -> None:
        """End it."""
        if self._process:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()

    def is_large(self) -> bool:
        """Return whether it holds more memory than it should."""
        assert self._process
        return psutil.Process(self._process.pid).memory_info().rss > SERVER_BYTES

    def digests(self, prefix: str) -> dict[str, str]:
        """Return the SHA-256 of weight files and index under a prefix."""
        return {
            key.removeprefix(prefix): hashlib.sha256(self._get(key)).hexdigest()
            for key in self._keys(prefix)
            if key.endswith((".safetensors", ".index.json"))
        }

    def uploads(self, prefix: str) -> list[tuple[str, str]]:
        """Return key and id of the unfinished uploads under a prefix."""
        found = self.client.list_multipart_uploads(Bucket="merged").get("Uploads", [])
        return [(one["Key"], one["UploadId"]) for one in found if one["Key"].startswith(prefix)]

    def clear(self, prefix: str) -> None:
        """Delete what lies under a prefix, unfinished uploads too."""
        for key, upload in self.uploads(prefix):
            self.client.abort_multipart_upload(Bucket="merged", Key=key, UploadId=upload)
        for key in self._keys(prefix):
            self.client.delete_object(Bucket="merged", Key=key)

    def _keys(self, prefix: str) -> list[str]:
        return [one["Key"] for one in self.client.list_objects_v2(Bucket="merged", Prefix=prefix).get("Contents", [])]

    def _get(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket="merged", Key=key)["Body"].read()
        return data


class Cluster:
    """A Ray node that is started anew where it was lost, and one that comes late."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._head: subprocess.Popen[bytes] | None = None
        self._late: subprocess.Popen[bytes] | None = None
        self._ending = threading.Thread(target=lambda: None)
        """Ends a head that was lost."""
        self._ending.start()
        self.address = f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start the head, if there is none."""
        if self._head is None:
            self._ending.join()
            head = ("--head", f"--port={self._port}", "--include-dashboard=false", f"--temp-dir={self._folder}")
            self._head = self._node("head", CPUS, *head)

    def lose_head(self) -> None:
        """Kill the control store of the cluster, and then all else of the head."""
        assert self._head
        [store] = [each for each in psutil.Process(self._head.pid).children() if each.name() == "gcs_server"]
        store.kill()
        self._ending = threading.Thread(target=_end, args=(self._head,))
        self._ending.start()
        self._head = None

    def join(self) -> None:
        """Start another node."""
        self._late = self._node("late", 1, f"--address={self.address}")

    def leave(self) -> None:
        """End the node that came late."""
        if self._late:
            _end(self._late)
            self._late = None

    def stop(self) -> None:
        """End all."""
        self.leave()
        if self._head:
            _end(self._head)

    def _node(self, name: str, cpus: int, *how: str) -> subprocess.Popen[bytes]:
        ports = [
            f"--{each}-port={free_port()}" for each in ("node-manager", "object-manager", "dashboard-agent-listen")
        ]
        command = [
            tool("ray"),
            "start",
            "--block",
            f"--num-cpus={cpus}",
            "--object-store-memory=100000000",
            *ports,
            *how,
        ]
        log = self._folder / f"{name}.log"
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        end = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        return process


def _end(node: "subprocess.Popen[bytes]") -> None:
    """End all processes of a node."""
    own = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    node.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.wait(10)
    for process in own:  # a raylet that goes on names a head that is gone, and `ray start` refuses to start another
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()


# -- a campaign


class Campaign:
    """Servers, undisturbed results and the tally; `run` puts merges through it."""

    def __init__(self, server: Server, folder: Path, cluster: Cluster, without: str, verbose: bool) -> None:
        """`without` names the protection that is off; none: ''."""
        self.tally = Tally()
        self._server = server
        self._folder = folder
        self._cluster = cluster
        self._without = without
        # It imports once, where a new interpreter takes seconds of CPU a merge, and starts no thread before it forks.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.tools.unprotected", "tests.conftest", "ties_ray.kernels.cpu"])
        self._verbose = verbose
        self._wanted: dict[tuple[str, str], dict[str, str]] = {}

    def run(self, planned: Sequence[Case], seconds: float = math.inf) -> None:
        """Merge them all, some at a time; begin no other twenty when `seconds` have passed."""
        started = time.monotonic()
        with ThreadPoolExecutor(LANES) as lanes, ThreadPoolExecutor(1) as ray_lane:
            kinds = sorted({(case.family, case.method) for case in planned} - self._wanted.keys())
            self._wanted |= dict(zip(kinds, lanes.map(self._undisturbed, kinds), strict=True))
            for start in range(0, len(planned), 20):
                if time.monotonic() - started > seconds:
                    return
                batch = planned[start : start + 20]
                wait([(ray_lane if case.executor == "ray" else lanes).submit(self._one, case) for case in batch])
                told = ", ".join(f"{name} {count}" for name, count in self.tally.problems.items() if count)
                print(
                    f"{time.monotonic() - started:5.0f} s: {self.tally.merges} merges, {self.tally.attempts} attempts,"
                    f" {self.tally.faults.total()} faults, {self.tally.kills.total()} kills; {told or 'all well'}",
                    flush=True,
                )
                if self._server.is_large():
                    self._server.start()

    def _undisturbed(self, kind: tuple[str, str]) -> dict[str, str]:
        prefix = f"undisturbed-{'-'.join(kind)}/"
        ended = self._merge(self._recipe(prefix, *kind, {"executor": "local"}, self._server.url))
        assert ended.code == 0, ended.errors
        found = self._server.digests(prefix)
        assert len(found) >= 3, "two weight files and their index"
        self._server.clear(prefix)
        return found

    def _one(self, case: Case) -> None:
        try:
            self._attempts(case)
        except Exception as error:
            self._problem("bad exits", case, f"the campaign itself failed: {error!r}")
        finally:
            self._server.clear(f"{case.number}/")
            if case.trouble == "late node":
                self._cluster.leave()

    def _attempts(self, case: Case) -> None:
        tally, prefix = self.tally, f"{case.number}/"
        with FaultProxy(self._server.url, seed=case.seed + case.number) as proxy:
            run = {"executor": case.executor, "workers": case.workers} | ({} if case.cached else UNCACHED)
            recipe = self._recipe(prefix, case.family, case.method, run, proxy.url)
            ended = Ended("none", {}, "", 0.0)
            proxy.strike = partial(self._strike, case, proxy)
            for attempt in range(ATTEMPTS):
                if case.executor == "ray":
                    self._cluster.start()
                killed, changed = len(proxy.killed), proxy.faults["new_etag"]
                proxy.script, point = case.script(attempt)
                ended = self._merge(recipe, self._without)
                changed = proxy.faults["new_etag"] - changed
                with tally.lock:
                    tally.attempts += 1
                    tally.codes["killed" if ended.code == -9 else str(ended.code)] += 1
                    tally.kills.update({point: len(proxy.killed) - killed} if point else {})
                    tally.slowest = max(tally.slowest, ended.seconds)
                    tally.resumed += ended.code == 0 and ended.result["resumed"]
                    tally.workers_lost += ended.code == 0 and ended.result["workers_lost"]
                if self._verbose:
                    print(f"{case}\n  attempt {attempt}: {proxy.script}\n  {ended}\n  {proxy.counts()}", flush=True)
                if ended.code == "hang":
                    self._problem("hangs", case, f"attempt {attempt}, {proxy.script}: {ended.errors}")
                elif not (
                    ended.code in (0, 4, 5)
                    or (ended.code == -9 and len(proxy.killed) > killed)
                    or (ended.code == 3 and changed)
                ):
                    kind = "defects" if ended.code == 1 else "bad exits"
                    self._problem(kind, case, f"attempt {attempt}, {proxy.script}: {ended.code}\n{ended.errors}")
                if point == STARTING and ended.code == 0 and ended.result["workers_lost"] < len(proxy.killed) - killed:
                    self._problem("losses untold", case, f"attempt {attempt}: {ended.result}")
                if ended.code == 0:
                    break
            with tally.lock:
                tally.merges += 1
                tally.executors[case.executor] += 1
                tally.faults.update(
                    {kind: n for kind, n in proxy.faults.items() if not kind.startswith(("kill", "str"))}
                )
                tally.troubles["death at start"] += case.trouble == "death at start" and len(proxy.killed) > 0
            if ended.code != 0:
                return self._problem("lost runs", case, f"after {ATTEMPTS} attempts: {ended.code}\n{ended.errors}")
            proxy.script = ()
            again = self._merge(recipe, self._without)
        if again.code != 0 or not again.result["reused"]:
            self._problem("not recognised as done", case, f"{again}")
        found, wanted = self._server.digests(prefix), self._wanted[case.family, case.method]
        if found != wanted:
            self._problem("wrong bytes", case, f"{found}, not {wanted}")
        if uploads := self._server.uploads(prefix):
            self._problem("leaked uploads", case, f"{len(uploads)} under {prefix}")
        return None

    def _strike(self, case: Case, proxy: FaultProxy) -> None:
        """Bring trouble to the cluster. The request waits for what follows, so that the merge can't end before."""
        if case.trouble == "loss of the head":
            self._cluster.lose_head()
            proxy.stopped.wait(SILENT_SECONDS)
        else:
            self._cluster.join()
            began, reads = time.monotonic(), proxy.times(STARTED)
            while proxy.times(STARTED) == reads:
                if time.monotonic() - began > JOIN_SECONDS:
                    return
                time.sleep(0.1)
        with self.tally.lock:
            self.tally.troubles[case.trouble] += 1

    def _problem(self, kind: str, case: Case, what: str) -> None:
        with self.tally.lock:
            self.tally.problems[kind] += 1
        print(f"{kind}: {case}\n  {what}", flush=True)

    def _recipe(self, prefix: str, family: str, method: str, run: Mapping[str, object], endpoint: str) -> Path:
        path = self._folder / f"{prefix.rstrip('/')}.json"
        run = {**run, "address": self._cluster.address} if run["executor"] == "ray" else run
        recipe = {
            "base": f"s3://models/{family}/base",
            "models": [f"s3://models/{family}/model-{number}" for number in range(3)],
            "method": METHODS[method],
            "output": {"path": f"s3://merged/{prefix}", "file_size": "7MB", "part_size": "5MiB"},
            "storage": {"s3": {"endpoint_url": endpoint}},
            "run": run,
        }
        path.write_text(json.dumps(recipe))
        return path

    def _merge(self, recipe: Path, without: str = "") -> Ended:
        """Run the command once; a process that outlives its deadline is killed."""
        arguments = ["merge", str(recipe), "--json", "--quiet", "--debug"]
        process = self._context.Process(target=ties_ray, args=(arguments, without))
        started = time.monotonic()
        process.start()
        process.join(SECONDS)
        code: int | str = "hang"
        if process.exitcode is not None:
            code = process.exitcode
        elif process.pid:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        out, errors = (recipe.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        seconds = time.monotonic() - started
        try:
            return Ended(code, json.loads(out) if code == 0 else {}, errors[-4000:], seconds)
        except json.JSONDecodeError:
            return Ended("no record", {}, f"{out[:2000]}\n{errors[-2000:]}", seconds)


def ties_ray(arguments: list[str], without: str) -> None:
    """Be the command line, in a process of its own; what it prints goes beside the recipe."""
    os.setsid()
    for number, suffix in ((1, ".out"), (2, ".err")):
        with Path(arguments[1]).with_suffix(suffix).open("w") as file:
            os.dup2(file.fileno(), number)
    if without:
        PROTECTIONS[without]()
    sys.argv = ["ties-ray", *arguments]
    commands.main()


PROOFS = {"ifmatch": ("new_etag", ""), "partcheck": ("flip_upload", ""), "recordorder": ("", "after a record")}
"""By protection: the fault and the kill that it protects from."""


def prove(server: Server, folder: Path, merges: int, seed: int) -> bool:
    """Run a few merges with each protection on and off; return whether off, and only off, something goes wrong."""

    def problems(fault: str, kill: str, without: str) -> Counter[str]:
        faults = (fault,) if fault else ()
        planned = [
            Case(number, seed, "bf16", "average", "local", 1, faults, kill, cached=False) for number in range(merges)
        ]
        campaign = Campaign(server, folder, Cluster(folder), without, verbose=False)
        with contextlib.redirect_stdout(None):  # each problem, which is what we want
            campaign.run(planned)
        print(f"{merges} merges, {fault or kill}, {without or 'nothing'} off: {_counted(campaign.tally.problems)}")
        return campaign.tally.problems

    good = True
    for without, (fault, kill) in PROOFS.items():
        found = problems(fault, kill, without)
        good = good and found["wrong bytes"] + found["lost runs"] > 0 and not found["defects"]  # else it proves nothing
        good = good and problems(fault, kill, "").total() == 0
    problems("flip once", "", "")
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign; return 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description="Merges under faults and kills; every byte must be right.")
    parser.add_argument("--merges", type=int, default=300)
    parser.add_argument("--ray", type=int, default=40, help="of the merges, how many on Ray; 0: no cluster is started")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no more merges after so long")
    parser.add_argument("--only", type=int, action="append", help="only the merge of this number, told in full")
    parser.add_argument("--without", choices=PROTECTIONS, default="", help="a protection to switch off")
    parser.add_argument("--prove", action="store_true", help="show that a missing protection is noticed")
    parser.add_argument("--least-faults", type=int, default=0, help="fail unless every fault was committed so often")
    parser.add_argument("--least-kills", type=int, default=0, help="and every kill point so often")
    parser.add_argument("--least-troubles", type=int, default=0, help="and every trouble of a cluster so often")
    given = parser.parse_args(arguments)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "ties-ray",
        "AWS_SECRET_ACCESS_KEY": "a password of tests",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DEDUP_LOGS": "0",  # Ray prints a page about each lost worker, which must not get into the record
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end with it
    server = Server()
    planned = cases(given.merges, given.ray, given.seed)
    planned = [case for case in planned if given.only is None or case.number in given.only]
    try:
        with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            server.start()
            if given.prove:
                return 0 if prove(server, folder, 4, given.seed) else 1
            cluster = Cluster(folder)
            try:
                campaign = Campaign(server, folder, cluster, given.without, verbose=given.only is not None)
                campaign.run(planned, given.minutes * 60)
            finally:
                cluster.stop()
    finally:
        server.stop()
    tally = campaign.tally
    print(tally)
    rare = [f"fault {kind}" for kind in FAULTS if tally.faults[kind] < given.least_faults]
    rare += [f"kill {point}" for point in KILLS if tally.kills[point] < given.least_kills]
    rare += [trouble for trouble in [*TROUBLES][1:] if tally.troubles[trouble] < given.least_troubles]
    if rare:
        print(f"seen less often than asked: {', '.join(rare)}")
    return 1 if rare or tally.problems.total() else 0


if __name__ == "__main__":
    sys.exit(main())
