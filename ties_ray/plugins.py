"""Find an extension by its name: the file of that name in its folder is the extension.

`load("methods", "ties", Method)` imports `ties_ray/methods/ties.py` and returns the only subclass of `Method` that the
file defines. The folder that `TIES_RAY_PLUGINS` names is searched too, as in `$TIES_RAY_PLUGINS/methods/mine.py`. So
are entry points of installed packages (group `ties_ray.methods`). No other file is imported.
"""

import difflib
import functools
import importlib
import inspect
import os
import pkgutil
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from ties_ray.errors import Problem, RecipeError

PLUGIN_FOLDER = "TIES_RAY_PLUGINS"
"""Environment variable that names the user's folder of extensions, laid out as `ties_ray` itself: methods/, stores/.

Workers need the folder too.
"""

T = TypeVar("T")


def search_path(folder: str, own: list[str]) -> list[str]:
    """Return the `__path__` of an extension package: its own folder, then the user's."""
    extra = os.environ.get(PLUGIN_FOLDER)
    return [*own, str(Path(extra) / folder)] if extra else own


def names(folder: str) -> list[str]:
    """Return the names that a recipe may use, sorted, without importing the extensions."""
    package = importlib.import_module(f"ties_ray.{folder}")
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    files = {name for name in modules if not name.startswith("_")}  # a name with _ is a helper of several files
    return sorted(files | _entry_points(folder).keys())


def load(folder: str, name: str, contract: type[T]) -> type[T]:
    """Return the extension called `name`; raise `RecipeError` with all names if there is none."""
    if name not in names(folder):
        raise RecipeError(
            Problem(
                "",
                unknown(name, names(folder), folder.removesuffix("s")),
                "see `ties-ray methods`" if folder == "methods" else "",
            )
        )
    if name in _entry_points(folder):
        extension = _entry_points(folder)[name].load()
        if not (inspect.isclass(extension) and issubclass(extension, contract)):
            raise TypeError(f"the entry point {name} of ties_ray.{folder} is not a {contract.__name__}")
        return extension
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


def section(folder: str, key: str, contract: type[T], value: Any) -> Any:
    """Return what the extension that `value[key]` names makes of a section of a recipe; a text is the name alone.

    The contract is a model of pydantic. Raises `ValueError` with all names where the section names none of them.
    """
    if isinstance(value, str):
        value = {key: value}
    if not isinstance(value, Mapping):
        return value
    if not isinstance(value.get(key), str):
        raise ValueError(f"needs `{key}`: one of {', '.join(names(folder))}")
    try:
        extension: Any = load(folder, value[key], contract)
    except RecipeError as error:
        raise ValueError(str(error)) from error
    return extension.model_validate(value)


@functools.cache
def _entry_points(folder: str) -> dict[str, EntryPoint]:
    """Return the entry points of installed packages by name. The answer is cached, since a search reads them all."""
    return {point.name: point for point in entry_points(group=f"ties_ray.{folder}")}


def unknown(name: str, choices: list[str], noun: str) -> str:
    """Return the message that `name` is none of `choices`, with the closest of them."""
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {noun} {name!r}; {hint}known: {', '.join(choices)}"
