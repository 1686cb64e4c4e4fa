"""deploy/Dockerfile, read; `python -m tests.deploy.dockerfile FOLDER` runs its steps without an image builder.

The base image is stood in for by a new virtual environment in FOLDER with Ray in it, and every /tmp by FOLDER/tmp.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


class Step(NamedTuple):
    """One instruction: `RUN`, and what it says in one line."""

    name: str
    text: str


def steps() -> list[Step]:
    """Return the instructions in order."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Step(*line.split(None, 1)) for line in joined.splitlines()]


def arguments() -> dict[str, str]:
    """Return the build arguments and their defaults."""
    return {name: value.strip('"') for name, _, value in (s.text.partition("=") for s in steps() if s.name == "ARG")}


def copies(step: Step) -> tuple[list[str], str]:
    """Return what a COPY takes, and where to."""
    *sources, target = (word for word in step.text.split() if not word.startswith("--"))
    return sources, target


def _commands(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield each RUN with the folder it runs in; do what the instructions between say of files."""
    inside = folder / "tmp" / "start"
    for step in steps():
        if step.name == "WORKDIR":
            inside = Path(step.text.replace("/tmp", str(folder / "tmp"), 1))
            inside.mkdir(parents=True, exist_ok=True)
        if step.name == "COPY" and "--from" not in step.text:
            sources, target = copies(step)
            into = inside / target.replace("/tmp", str(folder / "tmp"), 1)
            for source in map(ROOT.joinpath, sources):
                if source.is_dir():
                    shutil.copytree(source, into, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, into)
        if step.name == "RUN":
            yield inside, step.text.replace("/tmp/", f"{folder}/tmp/")


def main(folder: Path) -> None:
    """Run every RUN in order; raise at the first that fails."""
    venv.create(folder / "venv", with_pip=True)
    environment = os.environ | {"PATH": f"{folder}/venv/bin:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder / "venv")}
    (folder / "tmp").mkdir()
    base = f"pip install --quiet 'ray[default]=={arguments()['RAY_VERSION']}' && pip list --format=freeze | grep ^ray"
    for inside, command in [(folder, base), *_commands(folder)]:
        print(f"+ {command}", flush=True)
        subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True, cwd=inside, env=environment)
    print("left in /tmp:", sorted(path.name for path in (folder / "tmp").iterdir()))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
