"""The contract of an input format: which base parameters a model changes, and by what bytes.

A format is pure: it names files and ranges, and never reads. One file here a format.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from ties_ray import plugins
from ties_ray.account import Account
from ties_ray.errors import Problem
from ties_ray.libraries.library import TRANSFORMERS, Library
from ties_ray.libraries.ties import Tie
from ties_ray.safetensors import Header
from ties_ray.stores import Pin
from ties_ray.tensors import Kind, Parameter, Read, Source

if TYPE_CHECKING:
    from torch import Tensor

    from ties_ray.kernels import Stored

__path__ = plugins.search_path("formats", list(__path__))


class Rules(NamedTuple):
    """What the recipe lets a model leave out or bring along; all of it becomes a note."""

    exclude: tuple[str, ...] = ()
    """Patterns of parameters that are the base's business alone; a model may lack them or have its own."""
    missing: bool = False
    """A floating-point parameter that the model lacks has delta zero; so have embedding rows that it lacks."""
    extra_rows: bool = False
    """Rows beyond the base's are left aside."""
    saved_modules: bool = False
    """Whole tensors that an adapter saved beside its factors are merged as dense changes."""
    kinds: tuple[str, ...] = ()
    """What the base's config calls it (`conversions.kinds_of`), by which its names are known."""
    tied: tuple[Tie, ...] = ()
    """Parameters that the base does not store, as they share the tensors of others."""

    def excludes(self, name: str) -> bool:
        """Return whether the recipe takes the parameter from the base unchanged."""
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)


class Question(NamedTuple):
    """Whether two stored tensors have the same bytes: a format asks, and the catalog, which may read, answers."""

    mine: str
    """Of the folder; as its weight files name it, like `other`."""
    other: str
    of: Literal["model", "base"]
    """Whether `other` is of the same folder, or of the base."""


@dataclass(frozen=True)
class Folder:
    """What the catalog fetched of one input: headers and small files, no weights."""

    uri: str
    files: tuple[Pin, ...]
    headers: Mapping[str, Header]
    """By file name; the pin of the same file in `files` is then a full one."""
    texts: Mapping[str, bytes]
    """Small files by name."""
    nested: tuple[str, ...] = ()
    """Of an adapter: folders in it that hold further adapters."""
    answers: Mapping[Question, bool] = field(default_factory=dict)
    """To what the format has asked; True: the bytes are the same."""
    chosen: str = ""
    """The candidate that the recipe chooses (`candidates.Candidate.name`); what belongs to others is not in `files`."""


@dataclass(frozen=True)
class Contents:
    """What a format made of a folder."""

    objects: tuple[Pin, ...] = ()
    sources: Mapping[str, Source] = field(default_factory=dict)
    """By base parameter. For the base itself: every tensor it stores."""
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    """What was let through or left aside and belongs in plan and result."""
    extra_rows: tuple[str, ...] = ()
    """Base parameters of which the model stores more rows, or fewer; their common rows must mean the same tokens."""
    untied: Mapping[str, str] = field(default_factory=dict)
    """What the model has of its own where the base ties it to a parameter: that parameter, by the name that it gets."""
    excluded: tuple[str, ...] = ()
    """Tensors that the base lacks and the recipe excludes."""
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    """By base parameter, where the format knows it and it is not `linear`."""
    called: Mapping[str, str] = field(default_factory=dict)
    """By base parameter, what the model calls it where that differs: checkpoints may lack a prefix."""
    library: Library = TRANSFORMERS
    """What opens a model that is stored so."""
    account: Account = field(default_factory=Account)
    """What becomes of every element that the folder's weight files store."""
    leftovers: tuple[str, ...] = ()
    """Keys of config.json that are no longer true of the weights; an output that takes the config over drops them."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What a report or an output may want to know of the model: `base_name` (the base it says it was trained on),
    `task_type`, `rank`, `scale`, ..."""


class Format(ABC):
    """Pure knowledge of one way to store a model."""

    name: ClassVar[str]
    """The name of its file; stands in plans."""
    whole: ClassVar[bool] = True
    """Whether a model stands for all of the base's parameters, or (an adapter) for those alone that it changes: what
    the density of a trim counts over."""

    @abstractmethod
    def recognises(self, names: Sequence[str]) -> bool:
        """Return whether a folder with these file names is of this format."""

    @abstractmethod
    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return (safetensors files whose headers are needed, small files whose text is needed)."""

    def weight_files(self, folder: Folder) -> tuple[str, ...]:
        """Return the files whose tensors are the model's, so that a name in them means one tensor."""
        return tuple(folder.headers)

    def questions(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> tuple[Question, ...]:
        """Return what only the bytes can tell; `read` finds the answers in the folder.

        Arguments as of `read`, and like it, it never raises. Each question may cost a reading of both tensors, so ask
        only what decides something.
        """
        return ()

    @abstractmethod
    def read(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> Contents:
        """Return what the model stores, checked against the base's parameters.

        None: this is the base itself, or, for a format of changes, the recipe names no base: shapes are then the
        model's own. Never raises for what an input may hold: all its problems are returned.
        """

    @abstractmethod
    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return the ranges needed for elements [start, stop) of the parameter."""

    @abstractmethod
    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> "Stored":
        """Return the slice from what the reads brought: one 1-D uint8 tensor a read, not to be written to.

        It returns `Factors` exactly where `source.encoding` is "factors", and `Encoded` elsewhere.
        Several reads of a dense source may come end to end in one tensor.
        """

    def needs(self, source: Source) -> Literal["nothing", "slice", "rows"]:
        """Return what of the base must be known to tell the change: nothing, the same slice, or its rows whole."""
        return "slice"

    def shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape of the parameter; asked where no base tells it."""
        return source.tensors[0].shape

    def rank(self, source: Source) -> int:
        """Return the rank of a change that `encoded` gives as plain factors over the whole parameter; 0: it is none."""
        return 0

    def decoded_bytes(self, source: Source) -> int:
        """Return an upper bound of the bytes that `encoded` holds beside the slice's own elements (decoded factors)."""
        return 0
