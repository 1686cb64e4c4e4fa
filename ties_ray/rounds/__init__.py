"""The contract of a kind of round: one reading of the models, shard by shard, and the barrier after it.

One file here a kind. A kind plans its rounds and states their cost. It does a shard, folds the findings at the barrier,
and says what becomes of slow shards. It reads through a `Bench`, and knows neither worker, driver nor manifest.
Importing a kind takes no torch.

A new kind defines `planned`, `shard`, `tally` and `work`; with a barrier also `fold`. The other methods have defaults.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

from ties_ray import plugins
from ties_ray.errors import Problem
from ties_ray.inputs.catalog import Catalog, Model
from ties_ray.kernels import Factors, Kernels
from ties_ray.layout.budget import Budget
from ties_ray.layout.by_parameter import ByParameter
from ties_ray.layout.footprint import Sources
from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Layout, Segment, Shard
from ties_ray.layout.sizes import Sizes
from ties_ray.measures.effects import Effects
from ties_ray.methods import Context, Deltas, Key, Member, Round
from ties_ray.outputs import Output, OutputFile
from ties_ray.recipe.recipe import Recipe
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from ties_ray.rounds._effects import Observer

__path__ = plugins.search_path("rounds", list(__path__))

F = TypeVar("F")
"""What a record holds of a kind of round."""
B = TypeVar("B")
"""What the barrier after a round of this kind makes of the records."""

Slow = Literal["repeat", "replace", "wait"]
"""What becomes of a shard that takes far longer than others did, once there are idle workers.

`repeat`: another worker does it too. `replace`: its worker is given up, once a shard, where a shard counted twice would
be wrong. `wait`: shards differ in size, so nothing is done.
"""
Zeroed = tuple[int, str, int]
"""(member, parameter, values) that were not finite and counted as zero, because the recipe allows it."""


class PlannedRound(NamedTuple):
    """One round of a merge."""

    name: str
    kind: str
    """Name of the `RoundKind`."""
    position: int
    """Index of the method's own round in `Method.rounds()`, or which of a kind's own rounds it is."""
    num_shards: int
    passes: int
    """How often each model is read: 2 where a method needs its slices again and they don't all fit in memory."""
    block: int
    """Elements of a block."""
    bytes_read: int
    requests: int
    bytes_again: int = 0
    """Bytes of `bytes_read` from buckets that an earlier round has read too; caches spare what they hold of them."""
    run: int = 0
    """Elements of consecutive blocks that are read together; 0 where each block is read by itself."""


@dataclass(frozen=True)
class PlannedResult:
    """One merged model: which models go in, and what comes out."""

    members: tuple[Member, ...]
    models: tuple[int, ...]
    """The members' indices into the catalog's models; a model of weight 0 is not a member."""
    sizes: tuple[int, ...]
    """Elements of each member's task vector, the d of a density."""
    files: tuple[OutputFile, ...]
    rounds: tuple[PlannedRound, ...]


@dataclass(frozen=True, eq=False)
class Merge:
    """One result in the making, as its rounds see it: what is asked for, what exists, how the work is cut."""

    recipe: Recipe
    catalog: Catalog
    result: PlannedResult
    sizes: Sizes
    arithmetic: str
    of_gpu: bool = False
    """Whether `budget` is that of the GPU that a worker computes on."""

    @property
    def rounds(self) -> tuple[PlannedRound, ...]:
        """Return the planned rounds in order."""
        return self.result.rounds

    @property
    def members(self) -> tuple[Member, ...]:
        """Return the models that are merged, as a method sees them."""
        return self.result.members

    @property
    def earlier(self) -> tuple[Member, ...]:
        """Return the models that an earlier merge has left a state of; a method counts them before the others."""
        return self.catalog.earlier.members if self.catalog.earlier else ()

    @cached_property
    def models(self) -> list[Model]:
        """Return the models that are merged, in the members' order."""
        return [self.catalog.models[index] for index in self.result.models]

    @cached_property
    def identities(self) -> tuple[Hashable, ...]:
        """Return what the base and each merged model are, as values: models of other merges may be equal.

        Equal ones have the same slices.
        """
        digests: dict[int, str] = {}  # models that are stored alike share their sources
        identities = []
        for model in (self.catalog.base, *self.models):
            key = id(model.sources)
            if key not in digests:
                digests[key] = hashlib.sha256(repr(sorted(model.sources.items())).encode()).hexdigest()
            identities.append((model.uri, model.objects, digests[key]))
        return tuple(identities)

    @cached_property
    def by_parameter(self) -> ByParameter:
        """Return weights, densities and lambda by parameter."""
        return ByParameter(self.recipe.method, self.catalog, self.members, self.models)

    @cached_property
    def layout(self) -> Layout:
        """Return which shard covers what."""
        return Layout(self.recipe, self.catalog, self.result.files, self.sizes)

    @cached_property
    def sources(self) -> Sources:
        """Return what base and models store."""
        return Sources(self.recipe, self.catalog, self.result.models, self.sizes)

    @cached_property
    def budget(self) -> Budget:
        """Return where a worker's memory goes."""
        return Budget(self.recipe, self.catalog, self.sources, of_gpu=self.of_gpu)

    @cached_property
    def memories(self) -> tuple["Merge", ...]:
        """Return the merge as each memory of a worker has it: the host's, and that of a GPU where one computes."""
        return (self, replace(self, of_gpu=True)) if self.sources.on_gpu else (self,)

    def kind(self, index: int) -> "RoundKind[Any, Any]":
        """Return the kind of a planned round."""
        return kind_of(self.rounds[index])

    def own_round(self, round_: PlannedRound, parameter: int | None = None) -> Round:
        """Return the method's own round behind a planned one, as it runs for a parameter."""
        method = self.recipe.method if parameter is None else self.by_parameter.method(parameter)
        return method.rounds()[round_.position]

    def first_read(self) -> int:
        """Return the index of the round that keeps checksums of what it reads, for later rounds to compare."""
        return next((index for index, round_ in enumerate(self.rounds) if kind_of(round_).keeps_checksums), 0)


class Watch(Protocol):
    """Looks at each model's slice of a block when it is first read."""

    deltas: "Tensor"
    """Its deltas in the elements that are looked at (fp32, (models, elements)), as far as slices have come."""

    def take(self, model: int, stored: Any) -> None:
        """Look at a slice. model: its position among the block's members."""


class Slices(Deltas):
    """The models' slices of one block, as they are stored; as `Deltas` they are what a method sees."""

    kept: "Sequence[Tensor]" = ()
    """Words that the round keeps for later merges. Each tensor is fp32, (elements, words); they stand side by side."""
    not_finite: list[int]
    """Values of each member that are NaN or Inf, as far as they were noticed."""
    watch: "Watch | None" = None

    @abstractmethod
    def models(self) -> Iterator[tuple[int, Any]]:
        """Yield (position among the block's members, stored slice or None) in recipe order."""

    @abstractmethod
    def groups(self) -> Iterator[list[tuple[int, Any]]]:
        """Yield the slices of `models` that there are, as many at a time as the kernels are best given."""


class Block(NamedTuple):
    """What is merged at a time: a run of elements of one parameter."""

    parameter: int
    """Index into the catalog's parameters."""
    start: int
    stop: int
    base: "Tensor"
    """1-D fp32, or fp64 where the base is stored in F64. Zeros without memory where nobody needs the base."""
    slices: Slices


class Pool(Protocol):
    """What earlier merges have found of single models, by the identity of their content."""

    def identity(self, model: Model) -> str | None:
        """Return what names a model there, None where nothing does."""

    def read_each(self, names: Sequence[tuple[str, str]], form: Any) -> list[Any]:
        """Return the findings of some (identity, name) in their pydantic form, None where there is none."""

    def write(self, identity: str, name: str, form: Any, finding: Any) -> None:
        """Keep a finding in its pydantic form."""

    def refuse(self, identity: str, name: str) -> None:
        """Note that a finding can't be what its name says."""


class Bench(Protocol):
    """What a worker gives to a round: readers, kernels, and what earlier barriers have stored."""

    merge: Merge
    kernels: Kernels
    pool: Pool | None
    recalled: frozenset[int]
    """Members whose findings of the round at hand an earlier merge has left."""
    observer: "Observer | None"
    """Looks at what the merge does to some elements of the shard at hand; None where nobody asks."""

    def blocks(
        self,
        round_: PlannedRound,
        segments: Iterable[Segment],
        members: Sequence[int],
        zeroed: Counter[tuple[int, str]],
        *,
        resident: bool = False,
        with_base: bool = False,
        own: Round | None = None,
    ) -> Generator[Block, None, None]:
        """Yield the blocks of some segments with the slices of some members; each is gone when the next comes.

        resident: keep the slices of a block for further passes. with_base: read the base even where no slice needs it.
        own: the method's round that goes through them, with its companions and state. Its models are numbered on from
        earlier ones. Raises `InputError` for values that are not finite, or adds them to `zeroed` where the recipe
        allows it.
        """

    def factors(
        self, requests: Iterable[tuple[int, Parameter]], *, on_device: bool = False
    ) -> Iterator[Factors | None]:
        """Yield what members store for whole parameters, in the order asked: (member, parameter).

        on_device: whether they come to the kernels' device, and not into the host's memory.
        """

    def barrier(self, index: int, group: int = 0) -> Any:
        """Return what the barrier after an earlier round has stored of a group of models."""

    def derived(self, index: int, group: int, make: Callable[[Any], Any]) -> Any:
        """Return what `make` makes of a barrier's finding, which is kept: blocks ask for it again and again."""

    def of_earlier(self, index: int) -> Any:
        """Return what an earlier merge's barrier has stored after round `index`; None without such a merge."""

    def remember(self, index: int, group: int, finding: Any) -> None:
        """Take a finding for what the barrier has stored, for this process alone."""

    def copy_base(self, parameter: str, first: int, last: int, out: "Tensor") -> None:
        """Write the base's bytes of elements [first, last) into `out` (1-D uint8)."""

    def part(self, size: int) -> "Tensor":
        """Return a buffer (1-D uint8) for a part of so many bytes."""

    def upload(self, file: int) -> str:
        """Return the id of the upload that a weight file's parts go into."""

    def write_part(self, data: "Tensor", file: int, number: int) -> None:
        """Write part `number` (from 0) of a weight file behind; `data` is a buffer that `part` gave."""

    def written(self) -> list[Any]:
        """Wait until all parts are durable, and return them (`merge.Written`)."""

    def write_state(self, name: str, data: bytes) -> None:
        """Keep a file of the merge's state for later merges."""

    def write_scratch(self, parameter: int, data: "Tensor") -> str:
        """Keep a tensor until the merge is done; return its CRC32C, 8 hex digits."""

    def read_scratch(self, parameter: int, crc32c: str) -> bytearray:
        """Return what was kept. Raises `InputError` where it is not what was written."""


class Tally(ABC, Generic[F]):
    """What shards of one round have found, until a record holds it."""

    @abstractmethod
    def absorb(self, shard: Any) -> None:
        """Add the tally of one finished shard."""

    @abstractmethod
    def finding(self) -> F:
        """Return all of it, as a record stores it."""


class Listed(Tally[tuple[Any, ...]]):
    """A tally of values in a row."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def absorb(self, shard: "Listed") -> None:
        """Add the values of one finished shard."""
        self.values += shard.values

    def finding(self) -> tuple[Any, ...]:
        """Return all values."""
        return tuple(self.values)


@dataclass(frozen=True)
class Record(Generic[F]):
    """One batch of a worker: shards of one round, finished."""

    round: int
    shards: tuple[int, ...]
    finding: F
    zeroed: tuple[Zeroed, ...] = ()
    effects: tuple[Effects, ...] = ()
    """What the merge has done to the elements that were looked at, by shard."""


@dataclass(frozen=True)
class Folded(Generic[B]):
    """What a barrier stores of one group of models."""

    finding: B
    zeroed: tuple[Zeroed, ...] = ()
    effects: tuple[Effects, ...] = ()


@dataclass(frozen=True)
class Conclusion:
    """What a barrier changes in the plan."""

    refused: Mapping[int, Problem] = field(default_factory=dict)
    """Members that are left out, with the reason."""
    output: Output | None = None
    """The output's section, settled by what was found."""
    rounds: Mapping[int, PlannedRound] = field(default_factory=dict)
    """Later rounds that have less to do, by index. Their shards keep their numbers, so workers need not hear of it."""


class Load(NamedTuple):
    """What a round's workers have to do, as far as a forecast needs it."""

    members: Collection[int]
    """The members whose elements its kernels go through."""
    share: float = 1.0
    """The share of the planned reads that is expected."""
    streams: int = 1
    """Slices of different models in one block."""


class Recalled(NamedTuple):
    """What earlier merges have left of one group of models."""

    group: int
    finding: Any
    shards: tuple[int, ...] = ()
    """The shards that need no work. Without any, workers leave out the members that the finding stands for."""


class RoundKind(ABC, Generic[F, B]):
    """A kind of round, found by name: the file `rounds/<name>.py` defines one subclass."""

    finding: ClassVar[Any]
    """The pydantic form of what a record holds."""
    folded: ClassVar[Any]
    """The pydantic form of what a barrier stores, None for a round without a barrier."""
    activity: ClassVar[str] = ""
    """What the round does, in a word or two, for whoever watches it: `counting`."""
    slow: ClassVar[Slow] = "wait"
    keeps_checksums: ClassVar[bool] = True
    """Whether it reads models as later rounds do, so that their reads can be compared with its own."""
    final: ClassVar[bool] = False
    """Whether it goes through the slices of which the result is made: values that it zeroes are told."""
    blocks_are_slices: ClassVar[bool] = True
    """Whether `PlannedRound.block` only says how finely slices are cut; else whole matrices must fit."""
    writes: ClassVar[bool] = False
    """Whether its shards write parts of weight files."""

    # -- planning

    @abstractmethod
    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield the rounds that the merge needs; `merge` has no rounds yet.

        cost: adds up reads; ask it round by round. position: index of the method's own round that names this kind.
        """

    @abstractmethod
    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return what shard `index` covers."""

    def memory(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes that a worker needs at most, beside `Budget.overhead`."""
        return merge.budget.blocks(round_.block)

    def scratch(self, merge: Merge, round_: PlannedRound) -> int:
        """Return about how many bytes the round keeps in scratch until the merge is done."""
        return 0

    def num_groups(self, merge: Merge) -> int:
        """Return into how many groups the barrier sorts records."""
        return 1

    def group(self, merge: Merge, shard: int) -> int:
        """Return the group of a shard; all shards of a record are of one group."""
        return 0

    def shards(self, merge: Merge, index: int) -> range:
        """Return the numbers that shards of round `index` may have."""
        return range(merge.rounds[index].num_shards)

    def shards_over(self, merge: Merge, round_: PlannedRound, shard: Shard) -> Sequence[int]:
        """Return the shards of this round that read what a shard of a later round reads."""
        return sorted(merge.layout.ranges_over(merge.layout.segments(shard)))

    def first_range(self, merge: Merge, round_: PlannedRound, index: int) -> int | None:
        """Return the first range of the merged parameters that a shard reads of, None where that tells nothing."""
        first = merge.layout.segments(self.shard(merge, round_, index))[:1]
        return min(merge.layout.ranges_over(first), default=None)

    def remark(self, round_: PlannedRound) -> str:
        """Return what a reader of the plan should know of the round's reads."""
        return ""

    # -- forecast

    def relative_cost(self, round_: PlannedRound) -> float | None:
        """Return the kernels' time for an element of a model, in units of counting high bits; None if unknown."""
        return None

    def load(self, merge: Merge, round_: PlannedRound) -> Load:
        """Return what its workers have to do."""
        return Load(range(len(merge.members)), streams=len(merge.members))

    def rehearsal(self, merge: Merge, round_: PlannedRound, sample: "Sample") -> "Trial | None":
        """Return what tries its kernels on a sample, None where there is nothing to try."""
        return None

    # -- on a worker

    @abstractmethod
    def tally(self, bench: Bench) -> Tally[F]:
        """Return an empty tally."""

    @abstractmethod
    def work(self, bench: Bench, index: int, shard: Shard, tally: Any, zeroed: Counter[tuple[int, str]]) -> None:
        """Do one shard of round `index`, and put what it finds into the tally."""

    def work_key(self, bench: Bench, index: int, shard: Shard) -> Hashable:
        """Return what the outcome of a shard rests on: merges of equal keys have the same. None where it is its own."""
        return None

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[F]) -> B:
        """Return what the records of one group of round `index` come to; they are read as they are asked for."""
        raise NotImplementedError(f"{type(self).__name__} has no barrier")

    def statistics(self, bench: Bench, index: int) -> Mapping[str, int]:
        """Return what round `index` has found for the method: `Context.statistics` of later rounds."""
        return {}

    def sums(self, bench: Bench, index: int, parameter: int) -> Mapping[Key, int]:
        """Return the exact sums that round `index` has found, of the whole and of one parameter: `Context.sums`."""
        return {}

    def ranks(self, bench: Bench, index: int, parameter: int) -> Mapping[Key, tuple[float, ...]]:
        """Return the values that round `index` has found by rank, of the whole and one parameter: `Context.ranks`."""
        return {}

    # -- stored findings

    def misfit(self, merge: Merge, index: int, finding: F) -> Iterable[str]:
        """Yield what in a stored record can't be of this merge: numbers that lead into lists must be in range."""
        return ()

    def misfit_folded(self, merge: Merge, index: int, finding: B) -> Iterable[str]:
        """Yield what in a stored barrier can't be of this merge."""
        return ()

    # -- on the driver

    def conclude(self, merge: Merge, index: int, folded: Mapping[int, B]) -> Conclusion:
        """Return what the barrier changes in the plan. folded: what it has stored, by group.

        Raises `InputError` where the findings rule the merge out.
        """
        return Conclusion()

    def settled(self, merge: Merge, index: int, before: Mapping[int, Any]) -> Collection[int]:
        """Return the shards of round `index` that need no work. before: what the barrier before it has stored."""
        return ()

    def recall(self, merge: Merge, index: int, before: Mapping[int, Any], pool: Pool) -> "list[Recalled]":
        """Return what earlier merges have left of what round `index` would find.

        before: what the barrier before it has stored, by group.
        """
        return []

    def recalled_members(self, finding: F) -> Collection[int]:
        """Return the members for which a recalled finding stands, in a record without shards."""
        return ()

    def report(self, merge: Merge, index: int, folded: Mapping[int, B]) -> Mapping[str, Any]:
        """Return fields of the result record that this round gives. folded: what its barrier has stored, by group."""
        return {}


class Sample(NamedTuple):
    """A slice of an input, on which kernels are tried."""

    stored: Any
    """The slice as a model stores it."""
    base: "Tensor"
    """1-D fp32 or fp64."""
    bits: int
    """Magnitude bits of a usual threshold of the slice."""
    deltas: Callable[[int, bool], Slices]
    """Gives the sample as the slices of several models, for so many passes, resident or not."""
    context: Context


class Trial(NamedTuple):
    """How a round's kernels are tried."""

    run: Callable[[], object]
    num_models: int
    """Models whose elements the kernels go through in one run."""


def kind_of(round_: PlannedRound) -> RoundKind[Any, Any]:
    """Return the kind of a planned round."""
    return load(round_.kind)


def load(name: str) -> RoundKind[Any, Any]:
    """Return a kind of round by its name. Raises `LookupError` where there is none."""
    if name not in _KINDS:
        _KINDS[name] = plugins.load("rounds", name, RoundKind)()
    return _KINDS[name]


_KINDS: dict[str, RoundKind[Any, Any]] = {}
