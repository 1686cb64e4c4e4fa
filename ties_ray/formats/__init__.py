"""The contract of an input format: which base parameters a model changes, and by what bytes.

A format is pure: it names files and ranges, and never reads. There is one file a format in this folder.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from ties_ray import plugins
from ties_ray.errors import Problem
from ties_ray.formats._account import Account as Account
from ties_ray.formats._account import Aside as Aside
from ties_ray.formats._account import account as account
from ties_ray.libraries.library import TRANSFORMERS, Library
from ties_ray.libraries.ties import Tie
from ties_ray.safetensors import Header, TensorInfo
from ties_ray.stores import Pin
from ties_ray.tensors import Kind, Parameter, Read, Source, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

    from ties_ray.kernels import Stored

__path__ = plugins.search_path("formats", list(__path__))

BY_RANK = "by_rank"
"""Number of a source of plain factors: the weight of a rank component. There is one for each rank, in order, or none.

`Format.encoded` then gives left @ diag(weights) @ right, with left * fp32(weights) rounded to fp32.
"""


class Rules(NamedTuple):
    """The liberties that the recipe gives a model; each use of them becomes a note."""

    exclude: tuple[str, ...] = ()
    """Patterns of parameters that stay as in the base; a model may lack them or have its own."""
    missing: bool = False
    """True: floating-point parameters and embedding rows that the model lacks have delta zero."""
    extra_rows: bool = False
    """True: rows beyond the base's are left aside."""
    saved_modules: bool = False
    """True: whole tensors that an adapter saved beside its factors are merged as dense changes."""
    heads: bool = False
    """True: tensors that an adapter saved whole and the base lacks are told, since the output may carry them along."""
    kinds: tuple[str, ...] = ()
    """The names that the base's config gives its architecture (`conversions.kinds_of`)."""
    tied: tuple[Tie, ...] = ()
    """Parameters that the base does not store, because they share the tensors of others."""
    by_token: tuple[str, ...] = ()
    """Parameters with a row for each token, where models may have other rows than the base."""

    def excludes(self, name: str) -> bool:
        """Return whether the recipe takes the parameter from the base unchanged."""
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)


class Question(NamedTuple):
    """Whether two stored tensors have the same bytes: a format asks it, and the catalog, which may read, answers it."""

    mine: str
    """A tensor of the folder, by the name that its weight files give it."""
    other: str
    """The other tensor, by the name that its weight files give it."""
    of: Literal["model", "base"]
    """The place of `other`: the same folder, or the base's."""


@dataclass(frozen=True)
class Folder:
    """The fetched part of one input: headers and small files, no weights."""

    uri: str
    files: tuple[Pin, ...]
    headers: Mapping[str, Header]
    """Headers by file name. The pin of such a file in `files` is a full one."""
    texts: Mapping[str, bytes]
    """Small files by name."""
    nested: tuple[str, ...] = ()
    """The folders inside an adapter's folder that hold further adapters."""
    answers: Mapping[Question, bool] = field(default_factory=dict)
    """Answers to the format's questions; True: the bytes are the same."""
    chosen: str = ""
    """The candidate that the recipe chooses (`Candidate.name`); `files` lacks the files of the others."""


@dataclass(frozen=True)
class Contents:
    """The model that a format finds in a folder, or its problems."""

    objects: tuple[Pin, ...] = ()
    sources: Mapping[str, Source] = field(default_factory=dict)
    """The model's sources by base parameter; the base's own hold every tensor that it stores."""
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    """Liberties taken and tensors left aside; plan and result show them."""
    extra_rows: tuple[str, ...] = ()
    """Base parameters of which the model stores more rows, or fewer. Their common rows must mean the same tokens."""
    untied: Mapping[str, str] = field(default_factory=dict)
    """Parameters that the model has of its own and the base ties: the base's parameter, by the new name."""
    excluded: tuple[str, ...] = ()
    """Tensors that the base lacks and the recipe excludes."""
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    """The orientation of base parameters that the format knows not to be `linear`."""
    heads: Mapping[str, TensorRef] = field(default_factory=dict)
    """Whole tensors that the base lacks, by name: the output carries them along, where all models have the same."""
    called: Mapping[str, str] = field(default_factory=dict)
    """The model's name of a base parameter, where it differs: checkpoints may lack a prefix."""
    library: Library = TRANSFORMERS
    """The library that opens such a model."""
    account: Account = field(default_factory=Account)
    """The fate of every element that the folder's weight files store."""
    leftovers: tuple[str, ...] = ()
    """Keys of config.json that are not true of the weights; an output that takes the config over drops them."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Facts for reports and outputs: `base_name` (the name that it gives its base), `task_type`, `rank`, ..."""


class Format(ABC):
    """Pure knowledge of one way to store a model."""

    name: ClassVar[str]
    """The name of its file, which plans hold."""
    is_model: ClassVar[bool] = True
    """Whether a folder of this format is a model. Otherwise a recipe names it beside one."""
    whole: ClassVar[bool] = True
    """Whether a model stands for all of the base's parameters; an adapter stands for those that it changes.

    The density of a trim counts over these parameters."""
    on_any_device: ClassVar[bool] = False
    """Whether `encoded` takes bytes on any device and decodes them there. Otherwise they come in the host's memory."""

    @abstractmethod
    def recognises(self, names: Sequence[str]) -> bool:
        """Return whether a folder with these file names is of this format."""

    @abstractmethod
    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return (safetensors files whose headers are needed, small files whose text is needed)."""

    def weight_files(self, folder: Folder) -> tuple[str, ...]:
        """Return the files whose tensors are the model's, so that a name in them means one tensor."""
        return tuple(folder.headers)

    def places(self, folder: Folder) -> dict[str, tuple[str, TensorInfo]]:
        """Return (file, place in it) of each tensor, by the name that questions give it."""
        files = self.weight_files(folder)
        return {name: (file, info) for file in files for name, info in folder.headers[file].tensors.items()}

    def questions(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> tuple[Question, ...]:
        """Return questions that only the bytes answer; `read` finds the answers in the folder.

        It takes the arguments of `read` and never raises. A question may cost a reading of both tensors, so ask only
        where the answer decides something.
        """
        return ()

    @abstractmethod
    def read(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> Contents:
        """Return the model, checked against the base's parameters.

        base: None for the base itself, and for a format of changes where the recipe names no base; shapes are then the
        model's own. It never raises for what an input may hold: all problems are returned.
        """

    @abstractmethod
    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return the ranges needed for elements [start, stop) of the parameter."""

    @abstractmethod
    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> "Stored":
        """Return the slice. buffers: one 1-D uint8 tensor a read, not to be written to.

        It returns `Factors` exactly where `source.encoding` is "factors", and `Encoded` elsewhere.
        Several reads of a dense source may come end to end in one tensor.
        """

    def needs(self, source: Source) -> Literal["nothing", "slice", "rows"]:
        """Return the part of the base that the change depends on: nothing, the same slice, or its rows whole."""
        return "slice"

    def shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape of the parameter; it is asked where there is no base."""
        return source.tensors[0].shape

    def rank(self, source: Source) -> int:
        """Return the rank of a change that `encoded` gives as plain factors; 0 for any other change."""
        return 0

    def decoded_bytes(self, source: Source) -> int:
        """Return an upper bound of the bytes that `encoded` holds beside the slice's own elements (decoded factors)."""
        return 0

    def widened(self, source: Source) -> int:
        """Return the bytes that `encoded` holds for each element of a dense source beside what was read."""
        return 0


class Composed(Format):
    """A format of more than a folder. The catalog composes it of what other formats have read."""

    def recognises(self, names: Sequence[str]) -> bool:
        """Return False."""
        return False

    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return nothing: the folders' own formats say what they want."""
        return (), ()

    def read(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> Contents:
        """Return an empty model."""
        return Contents()
