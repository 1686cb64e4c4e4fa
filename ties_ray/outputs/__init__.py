"""The contract of an output kind: which tensors are written, from what, and which files make them loadable.

A kind is a frozen pydantic model of the recipe's `output` section. It is pure: it names tensors and turns bytes into
bytes; the worker writes them and `driver/publish.py` publishes them. There is one file a kind in this folder.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from ties_ray import plugins
from ties_ray.errors import Problem
from ties_ray.kernels import Factors, Kernels
from ties_ray.libraries.library import Library
from ties_ray.stores import Uri
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor

__path__ = plugins.search_path("outputs", list(__path__))

PART_ALIGNMENT = 4096
"""Parts and the first tensor byte of a file are multiples of this, so that a cut never splits an element."""
DEFAULT_PART = 64 * 2**20
MIN_PART = 5 * 2**20
"""Smallest part that S3 accepts (but the last)."""
MAX_SIZE_LETTERS = 100
"""Letters of a size in a recipe at most."""
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The dtypes that a recipe may ask for, with their names in safetensors."""
SHORT_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Short names of dtypes, which a recipe may use too."""
CHAT_TEMPLATE = "chat_template"
"""The fact that holds the chat template which most inputs have."""


def _short(value: object) -> object:
    """Refuse a text that no size needs: pydantic, but the newest, fails on a number that no float holds."""
    if isinstance(value, str) and len(value) > MAX_SIZE_LETTERS:
        raise PydanticCustomError("byte_size", "could not parse value and unit from byte string")
    return value


Size = Annotated[ByteSize, BeforeValidator(_short)]
"""A number of bytes of a recipe, as 512MiB."""


def _part_size(value: ByteSize | None) -> ByteSize | None:
    if value is None:
        return value
    if value < MIN_PART or value % PART_ALIGNMENT:
        raise ValueError(f"should be at least 5MiB and a multiple of {PART_ALIGNMENT} bytes")
    return value


PartSize = Annotated[Size | None, AfterValidator(_part_size)]


class OutputTensor(NamedTuple):
    """One tensor to be written."""

    name: str
    dtype: str
    """The name that safetensors gives it."""
    shape: tuple[int, ...]
    parameter: str
    """The base parameter it comes from. Unless it comes from scratch, it has the same elements in the same order."""
    origin: Literal["merged", "base", "scratch", "mask", "factor"] = "merged"
    """merged: the last round computes it. base: the base's bytes are copied. scratch: an earlier round left it.

    mask: a member's mask in packed bits, a byte for 8 elements. factor: what multiplies the vector for a member.
    """
    member: int = 0
    """Index of the member whose mask or factor it is."""


class Product(NamedTuple):
    """A file of one member beside the merged tensors."""

    name: str
    metadata: Mapping[str, str]
    """What its header says beside the tensors."""
    tensors: tuple[OutputTensor, ...]


class Placed(NamedTuple):
    """A tensor at its place in a file."""

    tensor: OutputTensor
    start: int
    """First byte in the file."""
    stop: int


@dataclass(frozen=True)
class OutputFile:
    """One weight file, complete but for the weights themselves."""

    name: str
    header: str
    """ASCII: the file's first bytes after the length prefix."""
    tensors: tuple[Placed, ...]
    size: int


def weight_map(files: Sequence[OutputFile]) -> bytes:
    """Return the index that tells a loader in which file each tensor is, as transformers writes it."""
    placed = sorted((tensor.tensor.name, file.name) for file in files for tensor in file.tensors)
    total = sum(tensor.stop - tensor.start for file in files for tensor in file.tensors)
    content = {"metadata": {"total_size": total}, "weight_map": dict(placed)}
    return (json.dumps(content, indent=2) + "\n").encode()


class Condensed(NamedTuple):
    """One merged matrix as factors of few columns, and the error of each rank."""

    data: "Tensor"
    """fp32, 1-D: the data from which `CondensingOutput.assemble` makes tensors."""
    norm2: float
    """Squared Frobenius norm of the matrix; not finite where an element is not, and then the rest means nothing."""
    errors2: tuple[float, ...]
    """Squared Frobenius norm of the error at each of `CondensingOutput.ranks`."""


class Output(BaseModel, ABC):
    """The `output` section of a recipe: the part of the contract that all kinds share.

    A kind is an `ElementwiseOutput` or a `CondensingOutput`. It adds fields, among them `kind: Literal["..."]`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True, use_attribute_docstrings=True
    )

    path: Uri
    """Folder to write; may hold `{run_id}`."""
    kind: str
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """The dtype of the merged tensors. None: each tensor has the base's."""
    file_size: Size = Field(default=ByteSize(5_000_000_000), gt=0)
    """Largest weight file (a larger tensor gets a file of its own)."""
    part_size: PartSize = None
    """The size of an upload part, which changes no byte of the result. None: 64MiB, less for a small output."""
    state: bool = False
    """True: what later merges need to go on from this one stays beside the output, up to 20 bytes a merged element."""
    files_from: str = "base"
    """The input that gives config, tokenizer and chat template: `base`, or a model's id or path."""

    @field_validator("dtype", mode="before", json_schema_input_type=Literal[*DTYPES, *SHORT_DTYPES] | None)
    @classmethod
    def _dtype(cls, value: object) -> object:
        return SHORT_DTYPES.get(value, value) if isinstance(value, str) else value

    writes: ClassVar[bool] = True
    """Whether it writes weights. If not, the last round only looks at what the merge does."""
    reads_base: ClassVar[bool] = True
    """Whether the output holds values of the base. If not, and no model needs it, a recipe may leave the base out."""
    carries_heads: ClassVar[bool] = False
    """Whether it writes tensors that the base lacks and all models share (`Parameter.carried`)."""
    holds_masks: ClassVar[bool] = False
    """Whether it takes a method's vector with a mask for each model (`Method.gives_masks`), and nothing else."""

    @property
    def required_files(self) -> tuple[str, ...]:
        """Return the small files that the input of `files_from` must have."""
        return ()

    @property
    def most_frequent_template(self) -> bool:
        """Return whether the output takes the chat template that most inputs have: the fact `chat_template`."""
        return False

    def problems(self, parameters: Sequence[Parameter]) -> list[Problem]:
        """Return why these parameters can't be written as this kind."""
        return []

    @abstractmethod
    def tensors(self, parameters: Sequence[Parameter]) -> tuple[OutputTensor, ...]:
        """Return the tensors to write, in the order in which files are filled."""

    def products(self, parameters: Sequence[Parameter], ids: Sequence[str]) -> tuple[Product, ...]:
        """Return the files beside those of `tensors`, one for each member. ids: those of the members."""
        return ()

    @abstractmethod
    def library(self, inputs: Library) -> Library:
        """Return the library that opens the output; it decides names and number of the weight files.

        inputs: the library of the input that `files_from` names.
        """

    @abstractmethod
    def index(
        self, files: Sequence[OutputFile], parameters: Sequence[Parameter], facts: Mapping[str, str], library: Library
    ) -> tuple[str, bytes] | None:
        """Return name and content of the file that leads a loader to the weights (an index, a config), if any.

        parameters: the arguments of `tensors`. facts: the facts that all models share (`base_name`, `task_type`), and
        `base`, the base's name or URI.
        """

    @abstractmethod
    def rewrite(self, name: str, data: bytes, facts: Mapping[str, str]) -> bytes | None:
        """Return the content of a small file of `files_from` in the output; None leaves it out.

        facts: those of `index`, `untied`, the parameters of the output that the base's config ties, and
        `chat_template`, the template that most inputs have.
        """

    @abstractmethod
    def entry_point_file(self, files: Sequence[OutputFile], library: Library) -> str:
        """Return the file by which a loader finds the weights; it is published last, before the result record."""


class ElementwiseOutput(Output):
    """A kind that writes each element from the base's and the merged one, slice by slice, in any cut."""

    @abstractmethod
    def values(self, base: "Tensor", merged: "Tensor", out: "Tensor", kernels: Kernels) -> int:
        """Write the output's elements of one slice into `out`; return how many finite ones overflow its dtype.

        base: 1-D fp32 or fp64, of any content where `reads_base` is False. merged: 1-D fp32. out: 1-D, in the dtype of
        the output tensor.
        """


class CondensingOutput(Output):
    """A kind that condenses whole matrices into factors of few columns.

    A round of its own condenses one matrix a shard and leaves the factors in scratch. The last round assembles every
    tensor from there.
    """

    reads_base: ClassVar[bool] = False

    @property
    @abstractmethod
    def ranks(self) -> tuple[int, ...]:
        """Return the ranks at which the error is measured, ascending.

        Scratch holds factors of the last one. Until `choose` settles the rank, `tensors` plans for the last one too.
        """

    @abstractmethod
    def condense(self, parameter: Parameter, matrix: "Tensor") -> Condensed:
        """Return the best factors of a merged matrix (fp32, of the parameter's shape), which may be overwritten."""

    @abstractmethod
    def combine(self, parameter: Parameter, factors: "Sequence[tuple[float, Factors]]") -> Condensed:
        """Return the best factors of sum(coefficient * change), without forming a matrix of the parameter's shape."""

    @abstractmethod
    def condense_bytes(self, parameter: Parameter) -> int:
        """Return an upper bound of the bytes that `condense` holds beside its matrix, the result among them."""

    @abstractmethod
    def combine_bytes(self, parameter: Parameter, rank_sum: int) -> int:
        """Return an upper bound of the bytes that `combine` holds beside its factors, the result among them."""

    @abstractmethod
    def choose(self, norms2: Sequence[float], errors2: Sequence[Sequence[float]]) -> "CondensingOutput":
        """Return this output with one rank, settled by the norms and errors of all matrices (one entry a matrix)."""

    @abstractmethod
    def assemble(self, tensor: OutputTensor, parameter: Parameter, data: "Tensor") -> "Tensor":
        """Return the elements (1-D, in the tensor's dtype) of a tensor from the scratch of its parameter."""
