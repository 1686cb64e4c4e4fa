"""Scores by a function of the user's."""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import Field, field_validator

from ties_ray.errors import InputError, MergeError, Problem, RecipeError
from ties_ray.evaluations import Better, Evaluator, Json, Measured, Subject
from ties_ray.evaluations._models import CAUSAL, Loader, LoadsModels, brief, library
from ties_ray.evaluations._numbers import OwnNumbers
from ties_ray.plugins import PLUGIN_FOLDER
from ties_ray.stores import Stores


class ScoredModel:
    """What a function of the user's is given."""

    def __init__(self, subject: Subject, loader: Loader, seed: int) -> None:
        self._subject, self._loader = subject, loader
        self.id = subject.id
        """Name of the model in tables."""
        self.seed = seed
        """The seed that all draws should come from."""

    @property
    def path(self) -> str:
        """Return the model's local folder."""
        return self._subject.folder()

    @property
    def record(self) -> Json:
        """Return the result record; empty where no merge made the model."""
        return self._subject.record()

    def model(self, auto: str = CAUSAL) -> Any:
        """Return the model by a class of transformers, in evaluation mode, on the device that the recipe names."""
        if not hasattr(library(), auto):
            raise InputError(Problem(auto, "is no class of transformers", f"give a name such as {CAUSAL}"))
        return self._loader.model(self._subject, auto)

    def tokenizer(self) -> Any:
        """Return the tokenizer."""
        return self._loader.tokenizer(self._subject)


class Function(OwnNumbers, LoadsModels):
    """The number that a Python function returns, or the numbers of a mapping.

    The function is called with a `ScoredModel`: `path`, `record`, `seed`, `model()` and `tokenizer()`.
    """

    main: ClassVar[str] = "function"
    repeatable: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    name: Literal["function"] = "function"
    better: Better = "larger"
    """Which values are better."""
    function: str = Field(pattern=r"^[^:\s][^:]*:[A-Za-z_]\w*$")
    """`module:function` or `file.py:function`. Modules are looked for here, and in the folder of TIES_RAY_PLUGINS."""

    @field_validator("function")
    @classmethod
    def _absolute_file(cls, value: str) -> str:
        module, _, name = value.rpartition(":")
        return f"{os.path.abspath(module)}:{name}" if module.endswith(".py") else value

    def prepared(self, stores: Stores, seed: int) -> Evaluator:
        """Return what calls the function. Raises `RecipeError` where it can't be imported."""
        return _Calls(self, _function(self.function), seed)


class _Calls(Evaluator):
    def __init__(self, evaluation: Function, function: Callable[[ScoredModel], object], seed: int) -> None:
        super().__init__(evaluation, seed)
        self._own, self._function, self._loader = evaluation, function, Loader(evaluation)

    def measure(self, subject: Subject) -> Measured:
        """Return what the function returns. Raises `InputError` where it raises anything."""
        place = self._own.function
        try:
            answer = self._function(ScoredModel(subject, self._loader, self.seed))
        except MergeError:
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{brief(error)} (line {last.lineno} of {last.filename}), for {subject.id}"
            raise InputError(Problem(place, message, "mend it; --debug shows more")) from error
        return self._own.measured(answer, place)


def _function(place: str) -> Callable[[ScoredModel], object]:
    module, _, name = place.rpartition(":")
    remedy = "write module:function or file.py:function"
    try:
        with _own_modules():
            made = _of_file(module) if module.endswith(".py") else importlib.import_module(module)
    except (ImportError, OSError, SyntaxError) as error:
        raise RecipeError(Problem(place, f"can't be imported: {type(error).__name__}: {error}", remedy)) from error
    function = getattr(made, name, None)
    if not callable(function):
        raise RecipeError(Problem(place, f"{module} has no function {name}", remedy))
    return cast(Callable[[ScoredModel], object], function)


def _of_file(path: str) -> Any:
    """Return the module in a file; the same file is loaded anew each time."""
    spec = importlib.util.spec_from_file_location(f"ties_ray_function_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module


@contextmanager
def _own_modules() -> Iterator[None]:
    """Look for modules in the user's folders too, and last: none there takes the place of an installed one."""
    before = list(sys.path)
    sys.path += [os.getcwd(), *filter(None, [os.environ.get(PLUGIN_FOLDER)])]
    try:
        yield
    finally:
        sys.path[:] = before
