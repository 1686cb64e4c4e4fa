"""The command line. Each file here is one command, named as its file.

A command imports what it needs when it runs, so that `--help` imports neither torch nor ray.
"""

import contextlib
import importlib
import os
import pkgutil
import sys
import threading
from typing import NoReturn

import click

from ties_ray.cli import signals

EXIT_CODES = """\b
Exit codes:
  0        done (also when it was done before)
  1        a defect of ties_ray
  2        the recipe or the command line is wrong
  3        inputs or permissions are missing, incompatible, not finite, or changed
  4        interrupted or failed part-way: run the same command again, it continues
  5        cluster or storage unreachable, throttled or held by another run: retry later
  130, 143 cancelled by SIGINT, SIGTERM
"""


def main() -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    signals.listen()
    code = 0
    try:
        commands(prog_name="ties-ray")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:  # while no command runs
        code = 128 + signals.received[0]
    if threading.active_count() > 2:  # a thread that waits for storage would keep the interpreter from ending
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class _Commands(click.Group):
    """Finds a command by the name of its file."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted(module.name for module in pkgutil.iter_modules(__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a name; None where there is no such file."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(importlib.import_module(f"{__name__}.{cmd_name}"), cmd_name)
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Examples:
  ties-ray plan recipe.yaml
  ties-ray merge recipe.yaml --set method.density=0.3 --set output.path=s3://merged/d03
  ties-ray merge recipe.yaml --json --quiet --result result.json
  ties-ray inspect 's3://models/llama-*'

\b
Shell completion of commands, files, methods and fields of a recipe:
  bash   eval "$(_TIES_RAY_COMPLETE=bash_source ties-ray)"      in ~/.bashrc
  zsh    eval "$(_TIES_RAY_COMPLETE=zsh_source ties-ray)"       in ~/.zshrc
  fish   _TIES_RAY_COMPLETE=fish_source ties-ray | source       in ~/.config/fish/completions/ties-ray.fish

"""
    + EXIT_CODES,
)
@click.version_option(package_name="ties-ray")
def commands() -> None:
    """Merge many models into one, exactly as the papers define it, on a Ray cluster, at the speed of the storage.

    RECIPE is a file in YAML or JSON: a path, a URI (s3://...), or - for standard input.
    """
