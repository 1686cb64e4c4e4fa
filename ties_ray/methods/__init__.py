"""The contract of a merge method: the maths of one paper, one file here a method.

A method is a frozen pydantic model of its parameters. It says what it must know about whole models first (`needs`) and
in which rounds it reads them. It sees one slice of one parameter at a time, and never a store, a worker or a file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from ties_ray import plugins
from ties_ray.errors import Problem
from ties_ray.kernels import ONE, Election, Encoded, Factors, Kernels, Op, SignedSums, State, Term
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor

__path__ = plugins.search_path("methods", list(__path__))


class Member(NamedTuple):
    """One model of the recipe, as a method sees it."""

    id: str
    """The entry's `id`, else its 0-based position in the expanded list."""
    weight: float
    density: float | None
    """The entry's own density, or None."""


class Threshold(NamedTuple):
    """A need: the exact magnitude that a share of each task vector reaches or exceeds.

    The share of model i is `densities[i]`. Of d elements, k = min(d, max(1, int(density * d) + extra)) are kept. The
    threshold is the k-th largest |delta| (fp32).
    """

    densities: tuple[float, ...]
    """Density of each model; 1 means no trim."""
    scope: Literal["global", "tensor"] = "global"
    """`global`: one threshold over the whole task vector (the paper). `tensor`: one for each parameter."""
    extra: int = 0
    """Elements kept beyond the share."""
    denominator: Literal["adapter", "union"] = "adapter"
    """The elements of an adapter that d counts: those that it changes, or those that any adapter changes.

    For a whole model d counts all elements.
    """
    exact: bool = False
    """Whether k elements are kept, and no more: of those equal to the threshold the first ones, by position.

    Positions are row-major, and parameters in the catalog's order.
    """


class Slice(NamedTuple):
    """The delta of one model in a slice."""

    model: int
    """Index of the member, in recipe order."""
    delta: "Tensor"
    """1-D fp32; a buffer that the next slice overwrites."""


class Factored(NamedTuple):
    """The delta of one model of a whole matrix, as the model stores it; neither where the model does not change it."""

    model: int
    factors: Factors | None = None
    """The delta is scale * left @ right; these are the whole factors, fp32."""
    delta: "Tensor | None" = None
    """The delta itself, 1-D fp32, where it is not stored as factors; a buffer that the next one overwrites."""


class Companion(NamedTuple):
    """A further tensor for each parameter of a model, which the recipe names: `models[].with: {<name>: <folder>}`."""

    name: str
    shape: Literal["same", "gram"] = "same"
    """`same`: the parameter's, cut as it is. `gram`: (columns, columns) of a linear layer's inputs, always whole."""
    every: bool = True
    """Whether each changed parameter needs one. Otherwise it has one of all models or of none."""
    negative: bool = False
    """Whether its values may be negative."""


class Deltas(ABC):
    """The models' deltas of one slice, in recipe order. A round may read them as often as its `passes` says."""

    @abstractmethod
    def __iter__(self) -> Iterator[Slice]:
        """Yield each model's delta, which any method can use."""

    def factored(self) -> Iterator[Factored]:
        """Yield each model's delta, as factors where the model stores it so; in units of matrices alone."""
        return (Factored(model, delta=delta) for model, delta in self)

    @abstractmethod
    def fold(self, op: Op) -> State:
        """Return the op's state over all models, by a fused kernel where there is one; the bits are those of a loop."""

    @abstractmethod
    def elect(self, op: Op, election: Election) -> "Tensor":
        """Return the merged delta of the election as `Kernels.elect` gives it, by a fused kernel if there is one."""

    def companion(self, name: str) -> "Tensor | None":
        """Return a companion (1-D fp32) of the model whose delta came last, None where it has none here.

        A Gram matrix comes row by row. The round must name the companion.
        """
        raise LookupError(f"no companion {name!r} belongs to these deltas")

    def resume(self, *sums: "Tensor") -> None:  # noqa: B027
        """Write into zeros what an earlier merge has kept of these sums; nothing without one.

        A sum has one value for each element of the slice. That of a whole parameter may have any number of them.
        The round must name its `state`. It resumes and keeps the same sums, in the same order; `fold` does so itself.
        """

    def keep(self, *sums: "Tensor") -> None:  # noqa: B027
        """Keep a copy of sums over all models for later merges, where the recipe asks for it."""


class Computed(Deltas):
    """Deltas that a method makes of others, in a slice that begins at element `start` of the parameter."""

    def __init__(
        self,
        kernels: Kernels,
        start: int,
        length: int,
        slices: Callable[[], Iterable[Slice]],
        of: Deltas | None = None,
    ) -> None:
        """slices: gives all deltas (fp32, of this length) in recipe order, as often as a round reads them.

        of: the deltas of which they are made, element by element, with the state that these resume and keep.
        """
        self._kernels = kernels
        self._start = start
        self._length = length
        self._slices = slices
        self._of = of

    def __iter__(self) -> Iterator[Slice]:
        """Yield each model's delta."""
        return iter(self._slices())

    def fold(self, op: Op) -> State:
        """Return the op's state over all models."""
        import torch

        state = self._kernels.start(op, self._length)
        self.resume(*words_of(state))
        base = torch.zeros(1, device=self._kernels.device).expand(self._length)
        for model, delta in self:
            self._kernels.fold(op, state, base, [(model, Encoded(delta, "delta"))], self._start)
        self.keep(*words_of(state))
        return state

    def elect(self, op: Op, election: Election) -> "Tensor":
        """Return the merged delta of the election."""
        return self._kernels.elect(op, self.fold(op), *election)

    def resume(self, *sums: "Tensor") -> None:
        """Write into zeros what an earlier merge has kept of these sums."""
        if self._of:
            self._of.resume(*sums)

    def keep(self, *sums: "Tensor") -> None:
        """Keep a copy of sums over all models."""
        if self._of:
            self._of.keep(*sums)


def words_of(state: State) -> "list[Tensor]":
    """Return the tensors of an op's state in the order in which merges keep them."""
    return [state[name] for name in sorted(state)]


Unit = Literal["element", "row", "matrix"]
"""The least that must be whole in a slice. A row runs along the last axis; `matrix` is the whole parameter."""


class Key(NamedTuple):
    """What a sum is of."""

    name: str
    members: tuple[int, ...] = ()
    """No member for all, one member, or two for a pair."""
    whole: bool = False
    """Whether it is added up over the whole task vector. Otherwise each parameter has its own."""


@dataclass(frozen=True)
class Context:
    """The facts about a slice of one parameter that a round may use."""

    parameter: Parameter
    start: int
    stop: int
    """Elements [start, stop) of the parameter, row-major."""
    members: tuple[Member, ...]
    """The models, with weight and density as the recipe gives them for this parameter."""
    present: tuple[bool, ...]
    """Whether each member has a change for this parameter."""
    thresholds: tuple[int, ...]
    """Magnitude bits, one a model, from the method's `Threshold` need; 0 where nothing is trimmed."""
    statistics: Mapping[str, int]
    """Integers that earlier rounds of this method gathered, folded over the whole model."""
    kernels: Kernels
    sums: Mapping[Key, int] = field(default_factory=dict)
    """Sums that earlier rounds gathered: of the whole task vectors, and of this parameter."""
    base: "Tensor | None" = None
    """The base's values, 1-D fp32 or fp64, where the round asks for them."""
    ranks: "Mapping[Key, tuple[float, ...]]" = field(default_factory=dict)
    """Values that earlier rounds found by rank: among the whole task vectors', and among this parameter's."""
    tie_ends: tuple[int, ...] = ()
    """Elements of the parameter that equal a member's threshold are kept before this one, and dropped from it on.

    There is one for each member, or none: only an exact `Threshold` gives them.
    """
    keeps_state: bool = False
    """Whether the state of an op goes on from an earlier merge, or into a later one: it must then know all weights."""
    depth: float = 0.0
    """How deep the parameter lies in its stack of layers: 0 in the first and outside of layers, 1 in the last."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the weight of each member."""
        return tuple(member.weight for member in self.members)

    def sum(self, name: str, *members: int, whole: bool = False) -> float:
        """Return a sum that an earlier round gathered, rounded once to fp64; 0 where nothing was added."""
        return self.sums.get(Key(name, members, whole), 0) / ONE

    def ranked(self, name: str, *members: int, whole: bool = False) -> tuple[float, ...]:
        """Return the values at the ranks that an earlier round asked for, exactly; nothing where none were given."""
        return self.ranks.get(Key(name, members, whole), ())


@dataclass(frozen=True)
class Result:
    """The result of a round on one slice."""

    merged: "Tensor | None" = None
    """The merged delta with lambda applied, 1-D fp32. The last round must give it."""
    statistics: Mapping[str, int] = field(default_factory=dict)
    """Integers, added over all slices; they stand in the result record."""
    sums: Mapping[Key, int] = field(default_factory=dict)
    """Exact sums, added over all slices: what `kernels.exact_sums` gives, in units of 1 / `ONE`."""
    ranked: "Mapping[Key, Tensor]" = field(default_factory=dict)
    """Values among which `Round.ranks` are found over all slices: 1-D, fp32 or int32, as many as the round likes.

    The round is run twice, so they must depend on nothing but the elements.
    """
    masks: "tuple[Tensor, ...]" = ()
    """The mask of each member in packed bits (`kernels.bits.packed`), from a last round of `Method.gives_masks`."""


def every_element(parameter: Parameter) -> Unit:
    """Return that slices may be cut anywhere."""
    return "element"


def whole_matrices(parameter: Parameter) -> Unit:
    """Return that a matrix must be whole, and that other parameters may be cut anywhere."""
    return "matrix" if parameter.is_matrix else "element"


def whole_rows(parameter: Parameter) -> Unit:
    """Return that rows must be whole."""
    return "row" if len(parameter.shape) > 1 else "matrix"


def whole_parameters(parameter: Parameter) -> Unit:
    """Return that every parameter must be whole."""
    return "matrix"


class Stack(NamedTuple):
    """What all models store for a parameter."""

    num_models: int
    parameter: Parameter
    ranks: int = 0
    """The sum of the ranks of all factors."""
    num_whole: int = 0
    """How many models store it whole, or at least not as plain factors."""

    @property
    def columns(self) -> int:
        """Return the sum of the ranks that the models' changes of a matrix may have."""
        return self.ranks + self.num_whole * min(self.parameter.shape, default=1)


def nothing_more(stack: Stack) -> int:
    """Return 0: the round holds no more than what is counted for every method."""
    return 0


def bytes_each(number: int) -> Callable[[Stack], int]:
    """Return what says that a round holds so many bytes for each element, whatever the models and the parameter."""
    return lambda stack: number


def words_of_an_op(parameter: Parameter) -> int:
    """Return 5: the words that an element's state of any op has at most."""
    return 5


@dataclass(frozen=True)
class Round:
    """One reading of the models."""

    name: str
    run: Callable[[Deltas, Context], Result]
    kind: str = ""
    """Name of the kind of round that runs it: a file in `ties_ray/rounds`.

    By default the last round merges and the others gather. A last round of rows or matrices is of the kind `units`,
    and one with ranks of the kind `ranks`.
    """
    unit: Callable[[Parameter], Unit] = every_element
    """The least of a parameter that must be whole in a slice."""
    needs_base: bool = False
    """Whether `run` uses `Context.base`."""
    holds: Callable[[Stack], int] = nothing_more
    """Bytes that `run` holds for each element of the slice at most.

    The slice, its base, the state of one op, the merged delta and one fp32 tensor are counted without it.
    """
    companions: tuple[str, ...] = ()
    """Names of the companions that `run` reads; Gram matrices only in units of matrices."""
    passes: int = 1
    """How often `run` reads the deltas. Blocks become small enough to hold all slices, or the plan reads them again."""
    finish: "Callable[[Tensor, Context], Tensor] | None" = None
    """Turns the last round's merged delta into the final one (1-D fp32), once its own sums over all slices are known.

    It must go element by element.
    """
    ranks: Callable[[Key, int], tuple[int, ...]] | None = None
    """The ranks to find among the values that `run` gives as `Result.ranked`, of a key and the number of its values.

    The smallest value has rank 0. Only a round before the last has ranks; its models are read twice as often.
    """
    state: str = ""
    """Name of the state that it resumes from an earlier merge and keeps for later ones; empty for none.

    Rounds of one name resume the same state, and the last of them keeps it.
    """
    words: Callable[[Parameter], int] = words_of_an_op
    """The most fp32 words of that state for each element of a parameter."""


def unknown_part(part: str | None, members: Sequence[Member]) -> list[Problem]:
    """Return the problem of a `part`, the id of one model, that is none of the members."""
    ids = [member.id for member in members]
    if part is None or part in ids:
        return []
    return [Problem("method.part", f"no model has the id {part!r}", f"name one of them: {', '.join(ids[:8])}")]


def part_and_masks(part: str | None, masks: bool) -> list[Problem]:
    """Return the problem of a recipe that asks for one model and for the masks of all."""
    if part is None or not masks:
        return []
    return [Problem("method.part", "one model, and the masks of all, are two results", "leave one of them out")]


def elect_apart(
    deltas: Deltas, terms: tuple[Term, ...], context: Context, election: Election, *, by_count: bool
) -> "Tensor":
    """Return the merged delta of weighted terms by an election without weights; it reads the deltas twice.

    by_count: the number of models of each sign elects, not the sum of their values. A mean divides by their number.
    Weights must not be negative.
    """
    op = SignedSums(tuple(term._replace(weight=1.0) for term in terms))
    state = deltas.fold(op)
    if by_count:
        state["sum"] = ((state["counts"] & 0xFFFF) - (state["counts"] >> 16)).float()
    weighted = deltas.fold(SignedSums(terms))
    state |= {side: weighted[side] for side in ("positive", "negative")}
    return context.kernels.elect(op, state, *election)


def words_apart(parameter: Parameter) -> int:
    """Return the words that `elect_apart` keeps of an element: the sums of two folds."""
    return 8


def words_of_sides(*, apart: bool) -> Callable[[Parameter], int]:
    """Return what tells the words of `kernels.sides.Sides`: fp64 sums, of each sign apart where signs are elected."""
    return lambda parameter: 10 if apart else 2


class Method(BaseModel, ABC):
    """A merge method with its parameters. Subclasses add fields, among them `name: Literal["..."]`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True, use_attribute_docstrings=True
    )

    name: str
    scales: ClassVar[Literal["sum", "mean"]]
    """What lambda multiplies: equal lambdas of a sum and of a mean are not equal scales."""
    paper: ClassVar[str]
    caveat: ClassVar[str] = ""
    """When it goes wrong, in one or two sentences."""
    uses_weights: ClassVar[bool] = True
    """Whether weights of models count; else a weight is refused."""
    uses_lapack: ClassVar[bool] = False
    """Whether it decomposes matrices: its bytes are those of one build of the library on one type of processor."""
    state_uses_lapack: ClassVar[bool] = False
    """Whether its state does so too. Then a merge goes on from it on that type of processor alone."""
    has_density: ClassVar[bool] = False
    """Whether models may have a density of their own."""
    companions: ClassVar[tuple[Companion, ...]] = ()
    """What each model must bring beside its weights."""

    @property
    def all_at_once(self) -> str:
        """Why no further models can be merged into an earlier merge; empty where they can, with the same bytes.

        They can where rounds go through the models once, in order, and all that is left of a model lies in sums. Such
        rounds name their `state`. Exact sums of single models are known of earlier ones, too.
        """
        return "what it makes of a model depends on the others"

    @property
    def base_cancels(self) -> bool:
        """Whether merges from any two bases are the same model, up to rounding. Then a recipe needs no base."""
        return False

    @property
    def weights_are_shares(self) -> bool:
        """Whether a positive factor common to all weights changes nothing, as they are divided by their sum.

        A search then looks at the shares alone.
        """
        return False

    @property
    def gives_masks(self) -> bool:
        """Whether the result is one vector, and a mask for each model. An output of masks holds them.

        Its last round then works on elements, and gives `Result.masks` beside the vector as `Result.merged`.
        """
        return False

    def mask_factor(self, member: int, sums: Mapping[Key, int]) -> float:
        """Return what multiplies the masked vector of a member. sums: those of whole task vectors that rounds gave."""
        return 1.0

    @property
    def has_lambda(self) -> bool:
        """Whether it has a lambda, which a recipe may give by parameter."""
        return "lambda_" in type(self).model_fields

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Return what is wrong with these models' weights and densities for this method.

        It is asked for each kind of parameter where the recipe gives numbers by parameter.
        """
        weighted = () if self.uses_weights else (member for member in members if member.weight != 1)
        return [
            Problem(
                f"model {member.id}", f"weight {member.weight}: {self.name} uses no weights", "leave the weight out"
            )
            for member in weighted
        ]

    def needs(self, members: Sequence[Member]) -> Threshold | None:
        """Return the threshold that must be known before the first round, if any."""
        return None

    @abstractmethod
    def rounds(self) -> tuple[Round, ...]:
        """Return the method's rounds; the last gives the merged delta."""

    def coefficients(self, members: Sequence[Member], present: Sequence[bool]) -> tuple[float, ...] | None:
        """Return the factor of each model's delta if the method is a weighted sum, else None.

        present: of each member, whether it has a change for the parameter in question.
        """
        return None
