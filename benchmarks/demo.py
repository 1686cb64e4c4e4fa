"""The demo: make a small, real-shaped family, merge it with TIES on a local Ray cluster, say what to try next.

Run it by `python -m benchmarks.demo FOLDER`.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

from benchmarks.family import write_family

RECIPE = """\
base: {folder}/base
models:
  - {folder}/model-*          # a glob: every fine-tune in the folder, in the order of their names
method: {{name: ties, density: 0.2, lambda: 1.0}}
output: {{path: {folder}/merged}}
"""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Make a family in FOLDER and merge it."""
    started = time.monotonic()
    click.echo(f"Making a base and 8 fine-tunes of 23 M parameters each (bf16, 3 files each) in {folder} ...")
    write_family(folder, "20M", 8)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    shutil.rmtree(folder / "merged", ignore_errors=True)
    click.echo(f"... done in {time.monotonic() - started:.0f} s. The recipe, {recipe}:\n\n{recipe.read_text()}")
    ties_ray = Path(sys.executable).with_name("ties-ray")
    click.echo(f"$ {ties_ray} merge {recipe}", nl=True)
    sys.exit(subprocess.run([ties_ray, "merge", recipe], check=False).returncode)


if __name__ == "__main__":
    main()
