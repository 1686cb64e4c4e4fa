"""TIES that brings trouble to its worker at one exact place: where the first slice of a parameter is read."""

import functools
import itertools
import os
import signal
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NoReturn

import torch

from ties_ray.errors import Problem, UnavailableError
from ties_ray.methods import Context, Deltas, Result, Round
from ties_ray.methods.ties import Ties

HOUR = 3600.0


class Troubled(Ties):
    """Each trouble leaves a file 0, 1, ... in `folder`, which holds the worker's process id."""

    name: Literal["troubled"] = "troubled"
    folder: str
    trouble: Literal["kill", "stop", "hang", "raise", "unavailable", "memory"]
    """`hang`: until the file `release` is in the folder, or for an hour."""
    round: Literal["majority", "merge"] = "merge"
    parameter: str = "model.layers.1.mlp.up_proj.weight"
    """Or a pattern."""
    times: int = 1
    """Then, or when the file `mended` is in the folder, there is no more of it."""

    def rounds(self) -> tuple[Round, ...]:
        return tuple(
            replace(one, run=functools.partial(self._run, one)) if one.name == self.round else one
            for one in super().rounds()
        )

    def _run(self, own: Round, deltas: Deltas, context: Context) -> Result:
        if context.start == 0 and fnmatch(context.parameter.name, self.parameter) and self._is_due():
            getattr(self, f"_{self.trouble}")()
        return own.run(deltas, context)

    def _is_due(self) -> bool:
        folder = Path(self.folder)
        for number in itertools.count():
            if number >= self.times or (folder / "mended").exists():
                return False
            try:
                with (folder / str(number)).open("x") as file:
                    file.write(str(os.getpid()))
                return True
            except FileExistsError:
                continue
        return False

    def _kill(self) -> None:
        time.sleep(0.3)  # an answer that died with the worker would have the shard before blamed, too
        os.kill(os.getpid(), signal.SIGKILL)

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _hang(self) -> None:
        end = time.monotonic() + HOUR
        while not (Path(self.folder) / "release").exists() and time.monotonic() < end:
            time.sleep(0.02)

    def _raise(self) -> NoReturn:
        raise ValueError("this shard is not to its method's taste")

    def _unavailable(self) -> NoReturn:
        raise UnavailableError(Problem("somewhere", "does not answer", "wait"))

    def _memory(self) -> None:
        torch.empty(2**60, dtype=torch.uint8)
