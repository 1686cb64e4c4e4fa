"""The hot loops behind one signature: `definition.py` (torch, readable), `cpu.py` (compiled), `cuda.py` (Triton).

This folder runs alone: it imports torch, numpy, numba or triton, and nothing else of ours. All implementations give the
same bits: fp32, no contraction, no fast maths, models in the order of `terms`.

A *delta* is fp32(model) - fp32(base). A *term* t = weight * scale * kept(delta) is what one model adds to the sums,
rounded to fp32 after each multiplication. Its *magnitude bits* are the 31 bits of |delta| as an integer.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import Tensor

ARITHMETICS = {"exact": "exact-1", "fast": "fast-1"}
"""Name and version of each arithmetic, part of the run_id. A version changes whenever any result bit may change.

`fast` lets the tensor cores of a GPU multiply factors (`cuda.Cuda`). A CPU has none. Its chain of fused multiply-adds
takes no longer than a BLAS, and from rank 32 on less (benchmarks/gpu.py).
"""
BINS = 65_536
"""Bins of either level of a threshold search.

The first level goes by the high 15 of the 31 magnitude bits m. Bin 2b holds just m = b << 16. Bin 2b + 1 holds all
between that and the next, so the bin is (m >> 16) + ((m + 0xFFFF) >> 16). The second level goes by the low 16 bits. The
deltas of 16-bit models have so few significant bits that nearly all lie in even bins, which need no second level.
"""
SUM_BITS = 350
"""Places behind the point of an exact sum: the smallest product of two fp32 numbers is 2**-298, and has 52 more."""
ONE = 1 << SUM_BITS
"""The integer that stands for 1 in an exact sum."""


class Dropout(NamedTuple):
    """Random dropping of elements (Yu et al. 2024, DARE). Philox4x32-10 decides by position, not by order."""

    key: tuple[int, int]
    """Two uint32. Element e of the parameter has word e % 4 of the counter (low32(e // 4), high32(e // 4), 0, 0)."""
    bound: int
    """floor(density * 2**32). An element is kept iff its word is below; 2**32 keeps all."""
    scale: float
    """1 / density, rounded to fp32, which multiplies the kept elements."""


class Term(NamedTuple):
    """How one model's delta becomes its term: trim or dropout, then times weight. Each step rounds once to fp32."""

    weight: float = 1.0
    """The model's weight, rounded to fp32."""
    threshold: int = 0
    """The smallest magnitude bits that are kept. 0 keeps all, whatever `strict` says."""
    strict: bool = False
    """Whether elements at the threshold itself are dropped as well."""
    dropout: Dropout | None = None

    @property
    def lowest(self) -> int:
        """The smallest magnitude bits that survive the trim."""
        return self.threshold + (self.strict and self.threshold > 0)


@dataclass(frozen=True)
class WeightedSum:
    """Sums the terms. state["sum"] (fp32) is their running sum in model order."""

    terms: tuple[Term, ...]


@dataclass(frozen=True)
class SignedSums:
    """The sums that TIES elects and merges from: 16 or 20 bytes an element for up to 65,535 models.

    state["sum"] sums all terms, ["positive"] and ["negative"] those of each sign (fp32, running sums in model order).
    Unweighted, ["counts"] (int32) counts models with a positive term in the low 16 bits, with a negative one in the
    high 16. Weighted, ["positive_weight"] and ["negative_weight"] (fp32) sum `weight` over the models with such a term.
    """

    terms: tuple[Term, ...]
    weighted: bool = False


@dataclass(frozen=True)
class Extremes:
    """The sum and the extreme terms, all fp32.

    state["highest"] is the largest positive term or 0, ["lowest"] the smallest negative term or 0.
    """

    terms: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Agreement:
    """Counts models with |t| > bound * |total - t| in state["count"] (int32); each operation is rounded to fp32."""

    terms: tuple[Term, ...]
    total: "Tensor"
    """The sum of all terms (fp32), as long as the slice."""
    bound: float


Op = WeightedSum | SignedSums | Extremes | Agreement
State = dict[str, "Tensor"]


def state_dtypes(op: Op) -> Mapping[str, Literal["float32", "int32"]]:
    """Return the names and dtypes of an op's state. Every entry takes 4 bytes an element."""
    match op:
        case WeightedSum():
            return {"sum": "float32"}
        case SignedSums(weighted=True):
            floats = ("sum", "positive", "negative", "positive_weight", "negative_weight")
            return dict.fromkeys(floats, "float32")
        case SignedSums():
            return {"sum": "float32", "positive": "float32", "negative": "float32", "counts": "int32"}
        case Extremes():
            return {"sum": "float32", "highest": "float32", "lowest": "float32"}
        case Agreement():
            return {"count": "int32"}


class Encoded(NamedTuple):
    """One model's slice as it was read: values of the model (`dense`), or a finished fp32 delta (`delta`)."""

    data: "Tensor"
    """1-D, contiguous, never written to. Dense data is bf16, fp16, fp32 or fp64; a delta is fp32."""
    kind: Literal["dense", "delta"] = "dense"


class Factors(NamedTuple):
    """One model's slice as rows of a low-rank change: delta = scale * left @ right, by the canonical product.

    acc = +0; for k = 0..r-1: acc = fma(left[i, k], right[k, j], acc) in fp32; then acc * fp32(scale), rounded once. No
    BLAS computes it, since its bits depend on shape and CPU. The slice is elements [start, start + length) of these
    rows, row-major.

    `magnitude` makes it a slice of DoRA (Liu et al. 2024). With v = fp32(base) + delta, its change is
    delta' = c * v - fp32(base), each operation rounded to fp32. c is magnitude divided by the norm of the row of v;
    `row_scales` gives c.
    """

    left: "Tensor"
    """fp32, (rows, r), contiguous: the rows of the parameter that the slice touches."""
    right: "Tensor"
    """fp32, (r, columns), contiguous."""
    scale: float
    start: int
    """The column of the slice's first element, which lies in the first of the rows."""
    magnitude: "Tensor | None" = None
    """fp32, (rows,), of DoRA."""
    scales: "Tensor | None" = None
    """c as fp32, (rows,). `delta`, `fold` and the counts need it where there is a magnitude."""


Stored = Encoded | Factors
"""A slice as a format makes it from the bytes it has read."""


class Count(NamedTuple):
    """Asks for the counts of one model's slice."""

    source: Stored
    table: "Tensor"
    """int64, (BINS,), which the counts are added to."""
    high: int | None = None
    """The high 15 bits of the elements whose low 16 bits are counted. None: all elements are, by their high bits."""


class Election(NamedTuple):
    """How TIES makes a delta from the sums; see `Kernels.elect`."""

    zero_sign: int = 0
    factor: float = 1.0
    merge: Literal["mean", "sum", "max"] = "mean"


class Arrival:
    """Brings slices to the kernels' device, in any thread. Within `with` they are on their way, and after it there.

    This one leaves them where they are.
    """

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def bytes(self, data: "Tensor") -> "Tensor":
        """Return bytes as they were read (1-D uint8) on the device; a slice is decoded there."""
        return data

    def slice(self, source: Stored) -> Stored:
        """Return a slice on the device, as the kernels take it."""
        return source


class Kernels(ABC):
    """The operations on slices. `base` is decoded and 1-D: fp32, or fp64 where the base is stored in F64.

    A delta that is not finite is counted and taken as +0; the caller decides what follows from the count. With F64 on
    either side the subtraction is done in fp64 and rounded once to fp32. A source of kind `delta`, or factors without
    magnitude, need only the length of the base. Tensors are contiguous. Threads may call at once, with outputs of their
    own.
    """

    @property
    def device(self) -> "torch.device":
        """The device of the kernels and of all tensors; only the `out` of `apply` may lie elsewhere."""
        import torch

        return torch.device("cpu")

    asynchronous: ClassVar[bool] = False
    """True: calls return before the work is done. Then few large calls are faster than many small ones."""

    def arrival(self) -> Arrival:
        """Return what brings slices to the kernels' device."""
        return Arrival()

    def decode(self, stored: "Tensor", out: "Tensor") -> int:
        """Write a base's stored values into `out` (fp32, or fp64 of fp64); return how many aren't finite.

        NaN and Inf are written as they are.
        """
        import torch

        out.copy_(stored)
        if torch.isfinite(torch.stack(torch.aminmax(stored))).all():  # both show NaN and Inf, and nothing is copied
            return 0
        return int((~torch.isfinite(stored)).sum())

    @abstractmethod
    def delta(self, source: Stored, base: "Tensor", out: "Tensor") -> int:
        """Write the fp32 delta into `out`; return how many elements were not finite."""

    @abstractmethod
    def row_scales(self, source: Factors, rows: "Tensor") -> "Tensor":
        """Return c = fp32(magnitude / norm) of each row (fp32, (rows,)). rows: whole rows of the base, 1-D.

        The norm is the root of the sum of v * v over the row, with v as in `Factors`, in fp32. Squares and sums are
        fp64. Each of 256 lanes (column mod 256) is summed in order, then the lanes in order. c is not finite where the
        norm is 0.
        """

    @abstractmethod
    def start(self, op: Op, length: int) -> State:
        """Return a zeroed state for `length` elements."""

    @abstractmethod
    def fold(self, op: Op, state: State, base: "Tensor", group: Sequence[tuple[int, Stored]], offset: int) -> list[int]:
        """Add a group of models, given as (index into op.terms, slice), in that order; return non-finite counts.

        offset: the position of the slice's first element in its parameter, for dropout.
        """

    def count(self, asked: Sequence[Count], base: "Tensor") -> list[int]:
        """Count the slices of several models, each in a table of its own; return the non-finite counts."""
        return [
            self.count_high(source, base, table) if high is None else self.count_low(source, base, high, table)
            for source, table, high in asked
        ]

    @abstractmethod
    def count_high(self, source: Stored, base: "Tensor", table: "Tensor") -> int:
        """Add to `table` (int64, BINS) the first-level bins of the slice; return the non-finite count."""

    @abstractmethod
    def count_low(self, source: Stored, base: "Tensor", high: int, table: "Tensor") -> int:
        """Add to `table` (int64, BINS) the low 16 bits of elements whose high 15 bits are `high`; see `count_high`."""

    @abstractmethod
    def elect(
        self, op: Op, state: State, zero_sign: int, factor: float, merge: Literal["mean", "sum", "max"]
    ) -> "Tensor":
        """Return the merged fp32 delta of TIES from the state of `SignedSums` (mean, sum) or `Extremes` (max).

        The elected sign is that of state["sum"] (Yadav et al. 2023, section 3.2). Where that is zero, `zero_sign` (-1,
        0 or 1) is elected. `sum` takes the sum of the elected sign. `mean` divides it by the count, or the weights, of
        the models of that sign. The division is IEEE's, and 0 without any model. `max` takes the extreme of that sign.
        The result is multiplied by fp32(factor). A sum that has overflowed to NaN gives NaN, so that `apply` counts it.
        """

    def merge(
        self, op: Op, base: "Tensor", group: Sequence[tuple[int, Stored]], offset: int, election: Election
    ) -> "tuple[Tensor, list[int]]":
        """Return the merged delta and the non-finite counts of a group that holds all models: start, fold and elect."""
        state = self.start(op, len(base))
        counts = self.fold(op, state, base, group, offset)
        return self.elect(op, state, *election), counts

    @abstractmethod
    def apply(self, base: "Tensor", merged: "Tensor", out: "Tensor") -> int:
        """Write cast(base + merged) into `out` (fp32, fp16, bf16 or fp64), cast(base) where merged is zero.

        The sum is fp64 where `base` or `out` is fp64, else fp32. The cast rounds once, to nearest even. Returns how
        many results are not finite although `base` is; they include sums that have overflowed earlier.
        """


def load(name: Literal["definition", "cpu", "cuda"], arithmetic: Literal["exact", "fast"] = "exact") -> Kernels:
    """Return the implementation of that name. It imports torch, and for `cpu` numba, which may compile for 10 s.

    `cuda` works on the first visible GPU, and compiles when it is first used. Its code is kept beside the CPU's. Raises
    `LookupError`, saying what is missing, where there is no GPU or no Triton.
    """
    if name == "definition":
        from ties_ray.kernels.definition import Definition

        return Definition()
    if name == "cpu":
        from ties_ray.kernels.cpu import Cpu

        return Cpu()
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise LookupError("no CUDA GPU is visible to torch")
        try:
            from ties_ray.kernels import gpu_code
            from ties_ray.kernels.cuda import Cuda
        except ImportError as error:
            raise LookupError(f"Triton is not installed ({error})") from error
        gpu_code.be_used()
        return Cuda(torch.device("cuda", 0), fast=arithmetic == "fast")
    raise ValueError(f"unknown kernels {name!r}; known: definition, cpu, cuda")


def flushes_to_zero() -> bool:
    """Return whether this thread's floating-point unit takes or gives zero for denormal numbers.

    The mode belongs to a thread, so ask on the thread that works. Libraries built with fast maths may set it.
    """
    smallest_normal, smallest = sys.float_info.min, math.ulp(0.0)
    return smallest_normal * 0.5 == 0.0 or smallest * 2.0**60 == 0.0
