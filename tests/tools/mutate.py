"""Mutation tests: modules are changed one place at a time, and the tests where they belong should notice.

python -m tests.tools.mutate [PART OF A MODULE'S NAME ...] [--most 60] [--seed 0] [--again]

cosmic-ray makes the mutants, `mutants.py` draws a sample of them. Each is tried in a copy of the tree, by the tests
that reach its line. A process with the libraries is forked for each, so a mutant takes about a second beside its tests.
`mutants.toml` names the tests of each module, and the mutants that are equivalent, with the reason. Ends with 1 where a
tenth of a module's mutants survives.
"""

import argparse
import ast
import contextlib
import importlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PYTHON = ROOT / ".venv-mutation/bin/python"
LIBRARIES = (
    "torch", "numba", "pydantic", "boto3", "fsspec", "ruamel.yaml", "click", "rich.progress", "transformers", "peft",
)  # fmt: skip
"""What mutants need, and no mutant changes; none starts a thread when it is imported."""
IMPORTED = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
"""A warning of pytest about plugins that these libraries have imported."""
SHARE = 0.1
"""Share of a module's mutants that may survive, but for the equivalent ones."""
SECONDS = 20.0
"""Seconds that the tests of a mutant may take beside five times what they took before."""


@dataclass(frozen=True)
class Reach:
    """What the tests of a module took, and the lines of it that each reaches."""

    seconds: dict[str, float]
    lines: dict[str, frozenset[int]]
    """By test."""
    at_import: frozenset[int]

    def tests(self, lines: Sequence[int]) -> list[str]:
        """Return the tests that reach one of some lines, the fastest first; all where none is seen to."""
        wanted = set(lines)
        tests = [] if wanted & self.at_import else [test for test, own in self.lines.items() if own & wanted]
        return sorted(tests or self.seconds, key=lambda test: self.seconds[test])


class Tracer:
    """A plugin of pytest that notes which lines of a module each test reaches."""

    def __init__(self, path: str) -> None:
        self.path, self.test = path, ""
        self.lines: dict[str, set[int]] = defaultdict(set)
        self.seconds: Counter[str] = Counter()

    def pytest_configure(self) -> None:
        threading.settrace(self._called)
        sys.settrace(self._called)

    def _called(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        return self._reached if frame.f_code.co_filename == self.path else None

    def _reached(self, frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        if event == "line":
            self.lines[self.test].add(frame.f_lineno)
        return self._reached

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.test, started = item.nodeid, time.monotonic()
        sys.settrace(self._called)
        result = yield
        self.seconds[item.nodeid] += time.monotonic() - started
        return result

    def reach(self) -> Reach:
        lines = {test: frozenset(lines) for test, lines in self.lines.items() if test}
        return Reach(dict(self.seconds), lines, frozenset(self.lines.get("", ())))


class Only:
    """A plugin of pytest that runs some tests, in their order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.order = {test: number for number, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order), key=lambda item: self.order[item.nodeid]
        )


class Copy:
    """A copy of the tree, in which a module is changed."""

    def __init__(self, folder: Path, module: str, files: Sequence[str]) -> None:
        self.folder, self.files = folder, files
        self.path = folder / module
        self.source = self.path.read_text()

    def run(self, plugin: object, seconds: float, *, then: Callable[[], None] = lambda: None) -> int | None:
        """Return the exit code of pytest in a forked process; None where it took too long."""
        child = os.fork()
        if not child:
            os.setsid()
            os._exit(self._child(plugin, then))
        until = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid or time.monotonic() > until:
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # also servers that it has started
        if pid:
            return os.waitstatus_to_exitcode(status)
        os.waitpid(child, 0)
        return None

    def _child(self, plugin: object, then: Callable[[], None]) -> int:
        os.chdir(self.folder)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "ties_ray")]:
            del sys.modules[name]
        sys.path[:] = [str(self.folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
        sys.dont_write_bytecode = isinstance(plugin, Only)
        os.environ |= {"PYTHONPATH": str(self.folder), "HYPOTHESIS_STORAGE_DIRECTORY": str(self.folder / ".hypothesis")}
        log = os.open(self.folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            code = int(
                pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", IMPORTED, *self.files], plugins=[plugin])
            )
            then()
            return code
        except BaseException:
            traceback.print_exc()
            return 99
        finally:
            sys.stdout.flush()

    def reach(self) -> Reach:
        """Return what the tests reach. They have to pass."""
        tracer, notes = Tracer(str(self.path)), self.folder / "reach.pickle"
        code = self.run(tracer, 3600, then=lambda: notes.write_bytes(pickle.dumps(tracer.reach())))
        assert code == 0, (code, (self.folder / "log.txt").read_text()[-3000:])
        reach: Reach = pickle.loads(notes.read_bytes())
        return reach

    def try_out(self, mutant: Mapping[str, Any], reach: Reach) -> str:
        """Return what became of a mutant: killed, survived, or broken where it can't even be imported."""
        tests = reach.tests(lines_of(self.source, mutant["line"]))
        for compiled in self.path.parent.glob(f"__pycache__/{self.path.stem}.*"):
            compiled.unlink()
        self.path.write_text(mutant["source"])
        try:
            code = self.run(Only(tests), SECONDS + 5 * sum(reach.seconds[test] for test in tests))
        finally:
            self.path.write_text(self.source)
        return {0: "survived", 2: "broken", 4: "broken"}.get(1 if code is None else code, "killed")


def lines_of(source: str, line: int) -> range:
    """Return the lines of the innermost statement around a line; only its head where it has a body."""
    around = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            stop = max(node.lineno + 1, body[0].lineno) if body else (node.end_lineno or node.lineno) + 1
            if node.lineno <= line < stop:
                around.append(range(node.lineno, stop))
    return max(around, key=lambda lines: (lines.start, -lines.stop), default=range(line, line + 1))


def mutants_of(module: str, most: int, seed: str) -> list[dict[str, Any]]:
    """Return mutants of a module."""
    command = [str(PYTHON), str(HERE / "mutants.py"), str(ROOT / module), str(most), seed]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""})
    return [json.loads(line) for line in done.stdout.splitlines()]


def key_of(mutant: Mapping[str, Any]) -> str:
    """Return how `mutants.toml` names a mutant."""
    return f"{mutant['definition']}: {mutant['change']}"


def tested(
    module: str, own: Mapping[str, Any], everywhere: Sequence[str], most: int, seed: str, *, again: bool
) -> float:
    """Try out mutants of a module, print what became of them, and return the share that survived.

    everywhere: patterns of changes that are equivalent in any module. again: only those that survived the last time.
    """
    mutants, counts = mutants_of(module, most, seed), Counter[str]()
    notes = ROOT / "build/mutants" / f"{module.replace('/', '-')}.json"
    notes.parent.mkdir(parents=True, exist_ok=True)
    earlier: dict[str, str] = json.loads(notes.read_text()) if again and notes.exists() else {}
    outcomes: dict[str, str] = {}
    survivors = []
    with tempfile.TemporaryDirectory(prefix="ties-ray-mutants-") as folder:
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        for name in filter(None, names.decode().split("\0")):
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        copy = Copy(Path(folder).resolve(), module, own["tests"])
        reach = copy.reach()
        for mutant in mutants:
            key, outcome = key_of(mutant), earlier.get(key_of(mutant), "survived")
            if key in own.get("equivalent", {}) or any(re.search(pattern, mutant["change"]) for pattern in everywhere):
                outcome = "equivalent"
            elif outcome in ("survived", "equivalent"):
                outcome = copy.try_out(mutant, reach)
            outcomes[key] = "survived" if "survived" in (outcome, outcomes.get(key)) else outcome  # some share a key
            notes.write_text(json.dumps(earlier | outcomes, indent=1))
            counts[outcome] += 1
            if outcome == "survived":
                survivors.append(mutant)
    share = counts["survived"] / max(1, counts["survived"] + counts["killed"])
    total = f"{len(mutants) - counts['broken']} of {mutants[0]['of']}" if mutants else "0"
    print(f"{module}: {total} mutants, {counts['killed']} killed, {counts['equivalent']} equivalent, "
          f"{counts['survived']} survived ({share:.0%})", flush=True)  # fmt: skip
    for mutant in survivors:
        print(f"  line {mutant['line']}, {mutant['operator']}\n    {json.dumps(key_of(mutant))}", flush=True)
    return share


def main() -> None:
    """Test the modules, and end with 1 where too many mutants survive in one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--most", type=int, default=60)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--again", action="store_true", help="try only those that survived the last time")
    asked = parser.parse_args()
    settings = tomllib.loads((HERE / "mutants.toml").read_text())
    everywhere = settings.pop("everywhere")
    with warnings.catch_warnings(action="ignore"):  # PEFT's own
        for library in LIBRARIES:
            importlib.import_module(library)
    shares = [
        tested(module, own, list(everywhere), asked.most, asked.seed, again=asked.again)
        for module, own in settings.items()
        if not asked.modules or any(part in module for part in asked.modules)
    ]
    sys.exit(any(share >= SHARE for share in shares))


if __name__ == "__main__":
    main()
