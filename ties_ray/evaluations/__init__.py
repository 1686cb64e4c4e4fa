"""The contract of an evaluation: one file here a way to score models, named as recipes write it.

An evaluation is a frozen value. `prepared` reads its data once, and the evaluator that it returns scores any number of
models. A file here can be imported without torch and transformers.
"""

import importlib.metadata
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, SerializeAsAny, model_validator

from ties_ray import plugins
from ties_ray.stores import Stores
from ties_ray.tables import Row, Tabular

if TYPE_CHECKING:
    import torch

__path__ = plugins.search_path("evaluations", list(__path__))

Json = dict[str, Any]
Better = Literal["larger", "smaller"]


class Subject(Protocol):
    """A model that is scored: a finished output, any folder, or a candidate in memory."""

    @property
    def id(self) -> str:
        """Name in messages and in tables; it differs between subjects with other values."""

    @property
    def kin(self) -> str:
        """Key that is equal for subjects which differ in the values of their tensors alone.

        It is empty where the subject has no such kin. Only kin may be loaded into each other's models.
        """

    def folder(self) -> str:
        """Return a local folder that libraries can load; it is made on the first call."""

    def base_folder(self) -> str:
        """Return the local folder of the base that an adapter changes. Raises `InputError` where it is not known."""

    def load_into(self, model: "torch.nn.Module") -> None:
        """Copy the tensors into the model of another subject with the same `kin`.

        Raises `InputError` where names or shapes are not the model's; the model then has to be loaded anew.
        """

    def record(self) -> Json:
        """Return the result record as JSON; empty where no merge made the subject."""


class DataPin(BaseModel):
    """One file of data, as it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    size: int
    """The number of bytes."""
    etag: str
    sha256: str
    """SHA-256 of the content, 64 hex digits."""


class Measured(NamedTuple):
    """What a kind of evaluation finds out of a model."""

    value: float
    """The number that counts; not a number where the model gives none."""
    metrics: Mapping[str, float]
    """All numbers by name."""
    counts: Mapping[str, int] = {}
    """Counts of what was looked at: examples, tokens, examples that were cut."""


class Score(Tabular, BaseModel):
    """The score of one model by one evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    label: str
    """Name of the evaluation in tables."""
    value: float
    """The number that counts; not a number where the model gives none, as after an overflow."""
    better: Better
    """Which values are better."""
    metrics: dict[str, float] = {}
    """All numbers by name."""
    counts: dict[str, int] = {}
    """Counts of what was looked at: examples, tokens, examples that were cut."""
    seconds: float = 0.0
    seed: int = 0
    versions: dict[str, str] = {}
    """Versions of Python, of ties_ray and of the libraries that took part."""
    pins: tuple[DataPin, ...] = ()
    """The data."""
    evaluation: Json = {}
    """The evaluation and its parameters, without what may hold a secret."""

    @property
    def merit(self) -> float:
        """Return the value as a number of which larger is better; -inf where it is not a number."""
        if math.isnan(self.value):
            return -math.inf
        return self.value if self.better == "larger" else -self.value

    def _facts(self) -> Row:
        return {"label": self.label, "value": self.value, "better": self.better, **self.counts}

    def table(self) -> list[Row]:
        """Return one row with all numbers."""
        return [{"label": self.label, **self.metrics, **self.counts}]


class Evaluation(BaseModel, ABC):
    """A way to score models, with its parameters. Subclasses add fields, among them `name: Literal["..."]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    main: ClassVar[str]
    """Name of the field that the short form `name:value` sets."""
    repeatable: ClassVar[bool] = True
    """Whether the parameters, the seed and the pins of the data decide the score, so that a stored one can be used."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Packages whose versions stand in the record."""

    name: str
    better: Better
    """Which values are better."""
    label: str = Field(default="", max_length=100)
    """Name of the score in tables. Default: the kind's name."""
    at_least: FiniteFloat | None = None
    """Smallest value that is approved."""
    at_most: FiniteFloat | None = None
    """Largest value that is approved."""

    @abstractmethod
    def prepared(self, stores: Stores, seed: int) -> "Evaluator":
        """Return what scores models. It reads and pins the data, and raises `InputError` with all that is wrong there.

        seed: decides every draw.
        """

    def shown(self) -> Json:
        """Return the parameters for a record, without what may hold a secret."""
        return self.model_dump(mode="json", exclude_defaults=True) | {"name": self.name}

    @property
    def title(self) -> str:
        """Return its name in tables."""
        return self.label or self.name

    def approves(self, score: Score) -> bool:
        """Return whether a score lies within the bounds; a value that is no number never does."""
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= score.value <= high


class Evaluator(ABC):
    """Scores models by one evaluation, whose data it holds."""

    def __init__(self, evaluation: Evaluation, seed: int, pins: Sequence[DataPin] = ()) -> None:
        self.evaluation = evaluation
        self.seed = seed
        self.pins = tuple(pins)

    def score(self, subject: Subject) -> Score:
        """Return the score of a model. Raises `InputError` where the model can't be loaded or scored."""
        started = time.perf_counter()
        measured = self.measure(subject)
        return Score(
            label=self.evaluation.title,
            value=measured.value,
            better=self.evaluation.better,
            metrics=dict(measured.metrics),
            counts=dict(measured.counts),
            seconds=round(time.perf_counter() - started, 3),
            seed=self.seed,
            versions=versions(self.evaluation.packages),
            pins=self.pins,
            evaluation=self.evaluation.shown(),
        )

    @abstractmethod
    def measure(self, subject: Subject) -> Measured:
        """Return what this kind of evaluation finds out of a model."""


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed versions of Python, ties_ray and some packages, by name."""
    import platform

    installed = {"python": platform.python_version()}
    for package in ("ties-ray", *packages):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "unknown"
    return installed


def short_form(value: Any) -> Any:
    """Return the mapping that a text `name:value` stands for, as `loss:dev.jsonl`; anything else as it is."""
    if not isinstance(value, str):
        return value
    name, _, main = value.partition(":")
    if not main or name not in plugins.names("evaluations"):
        return value
    return {"name": name, plugins.load("evaluations", name, Evaluation).main: main}


def _evaluation(value: Any) -> Any:
    return plugins.section("evaluations", "name", Evaluation, short_form(value))


AnyEvaluation = Annotated[SerializeAsAny[Evaluation], BeforeValidator(_evaluation)]
"""A field of pydantic that holds an evaluation of any kind: a mapping with `name`, or the short form."""


def _several(value: Any) -> Any:
    return [value] if isinstance(value, Mapping | str) else value


AnyEvaluations = Annotated[tuple[AnyEvaluation, ...], BeforeValidator(_several), Field(min_length=1)]
"""A field of pydantic that holds evaluations: a list, or a single one."""


class Evaluations(BaseModel):
    """Evaluations with labels of their own, and the seed of all."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    evaluate: AnyEvaluations
    """The evaluations: each `{name: loss, data: ...}` or `loss:URI`."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides every draw."""

    @model_validator(mode="after")
    def _labels(self) -> "Evaluations":
        labels = [each.title for each in self.evaluate]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two evaluations are labelled {twice[0]!r}: give each a `label` of its own")
        return self
