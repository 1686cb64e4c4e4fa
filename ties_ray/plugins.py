"""Find an extension by its name: the file of that name in its folder is the extension.

`load("methods", "ties", Method)` imports `ties_ray/methods/ties.py` and returns the one subclass of `Method` which
that file defines. A folder named by `TIES_RAY_PLUGINS` is searched too (`$TIES_RAY_PLUGINS/methods/mine.py`), and so
are entry points of installed packages (group `ties_ray.methods`). Nothing but the named file is imported, so that
asking for one method costs the import of one.
"""

import difflib
import functools
import importlib
import inspect
import os
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TypeVar

from ties_ray.errors import Problem, RecipeError

PLUGIN_FOLDER = "TIES_RAY_PLUGINS"
"""Environment variable: a folder laid out as `ties_ray` itself (methods/, stores/, ...); workers need it as well."""

T = TypeVar("T")


def search_path(folder: str, own: list[str]) -> list[str]:
    """Return the `__path__` of an extension package: its own folder, then the user's."""
    extra = os.environ.get(PLUGIN_FOLDER)
    return [*own, str(Path(extra) / folder)] if extra else own


def names(folder: str) -> list[str]:
    """Return the names a recipe may use, sorted, without importing any of them."""
    package = importlib.import_module(f"ties_ray.{folder}")
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    found = {name for name in modules if not name.startswith("_")}  # else a helper of several files
    found.update(_entry_points(folder))
    return sorted(found)


def load(folder: str, name: str, contract: type[T]) -> type[T]:
    """Return the extension called `name`; raise `RecipeError` with the known names if there is none."""
    if name not in names(folder):
        raise RecipeError(
            Problem(
                "",
                unknown(name, names(folder), folder.removesuffix("s")),
                "see `ties-ray methods`" if folder == "methods" else "",
            )
        )
    if name in _entry_points(folder):
        found = _entry_points(folder)[name].load()
        if not (inspect.isclass(found) and issubclass(found, contract)):
            raise TypeError(f"the entry point {name} of ties_ray.{folder} is not a {contract.__name__}")
        return found
    module = importlib.import_module(f"ties_ray.{folder}.{name}")
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, contract)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    if len(own) != 1:
        raise TypeError(f"{module.__file__} should define one {contract.__name__}, not {len(own)}")
    return own[0]


@functools.cache
def _entry_points(folder: str) -> dict[str, EntryPoint]:
    """Return what installed packages offer; kept, since every look goes through all of them."""
    return {point.name: point for point in entry_points(group=f"ties_ray.{folder}")}


def unknown(name: str, known: list[str], noun: str) -> str:
    """Say that `name` is not one of `known`, with the likely intention."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {noun} {name!r}; {hint}known: {', '.join(known)}"
