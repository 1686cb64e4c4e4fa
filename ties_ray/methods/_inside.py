"""Methods that turn each matrix into other coordinates, merge there by any method, and turn the result back."""

import struct
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, SerializeAsAny, WithJsonSchema

from ties_ray import plugins
from ties_ray.errors import Problem
from ties_ray.methods import (
    Computed,
    Context,
    Deltas,
    Key,
    Member,
    Method,
    Result,
    Round,
    Slice,
    Stack,
    Threshold,
    Unit,
)
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor

TURNED = "turned"
"""The name of magnitudes in the other coordinates, among which thresholds are found."""


def method_of(value: Any) -> Any:
    """Return the method that a name or a section means, as the recipe's own `method`."""
    section = {"name": value} if isinstance(value, str) else value
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        return section
    return plugins.load("methods", section["name"], Method).model_validate(dict(section))


Inner = Annotated[
    SerializeAsAny[Method],
    BeforeValidator(method_of),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["name"]}]}),
]
"""A method by its name, or a section with its fields."""


class Turned(NamedTuple):
    """The matrices of all models in other coordinates."""

    shape: tuple[int, int]
    """The shape of each, whatever the parameter's."""
    matrices: Callable[[], Iterable[Slice]]
    """Gives them in recipe order, (rows, columns) in fp64, again and again."""
    back: Callable[["Tensor"], "Tensor"]
    """Turns a matrix (fp64) back into a change of the parameter."""


class Inside(Method):
    """A method that merges matrices in other coordinates. The inner method merges vectors as they are."""

    inner: Inner

    scales: ClassVar[Literal["sum", "mean"]] = "sum"

    @property
    def weights_are_shares(self) -> bool:
        """Return whether they are so for the inner method."""
        return self.inner.weights_are_shares

    @abstractmethod
    def turned(self, deltas: Deltas, context: Context) -> Turned:
        """Return the matrices in other coordinates; it goes through the deltas once before they are asked for."""

    @abstractmethod
    def holds(self, stack: Stack) -> int:
        """Return the bytes for each element that turning a matrix takes at most."""

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Return those of the inner method, and what it needs that other coordinates don't have."""
        problems = self.inner.problems(members)
        need, rounds = self._need(), self.inner.rounds()
        if any(round_.needs_base or round_.kind for round_ in rounds) or (need and need.exact):
            lacks = "exact ties" if need and need.exact else "the base or a kind of round of its own"
            trouble = f"{self.inner.name} needs {lacks}, which matrices in other coordinates do not have"
            problems.append(Problem("method.inner", trouble, "choose another method, or other fields of it"))
        return problems

    def rounds(self) -> tuple[Round, ...]:
        """Return the inner method's rounds, after one that finds its thresholds."""
        inner = self.inner.rounds()
        within = [replace(round_, run=partial(self._within, round_)) for round_ in inner]
        first = [Round("thresholds", self._magnitudes, ranks=self._cut)] if self._need() else []
        return tuple(
            replace(
                round_,
                unit=partial(_unit, inner[-1]),
                passes=1 + round_.passes,
                holds=partial(self._held, round_),
            )
            for round_ in (*first, *within)
        )

    def _held(self, round_: Round, stack: Stack) -> int:
        return self.holds(stack) + round_.holds(stack) + 28

    def _need(self) -> Threshold | None:
        return self.inner.needs((Member("", 1.0, None),))

    def _cut(self, key: Key, number: int) -> tuple[int, ...]:
        need = self._need()
        assert need, "only a threshold has a cut"
        return (number - min(number, max(1, int(need.densities[0] * number) + need.extra)),)

    def _magnitudes(self, deltas: Deltas, context: Context) -> Result:
        """Return the magnitudes of what any model changes."""
        need = self._need()
        if not any(context.present):
            return Result()
        matrices: Iterable[Slice] = deltas
        if context.parameter.is_matrix:
            matrices = _slices(self.turned(deltas, context))
        whole = need is not None and need.scope == "global"
        return Result(ranked={Key(TURNED, (model,), whole): matrix.abs() for model, matrix in matrices})

    def _within(self, round_: Round, deltas: Deltas, context: Context) -> Result:
        """Run a round of the inner method on a matrix in other coordinates, or on a vector as it is."""
        need, count = self._need(), len(context.members)
        if need:
            cuts = [context.ranked(TURNED, model, whole=need.scope == "global") for model in range(count)]
            context = replace(context, thresholds=tuple(_bits(cut[0]) for cut in cuts))
        if not context.parameter.is_matrix:
            return round_.run(deltas, context)
        turned = self.turned(deltas, context)
        rows, columns = turned.shape
        within = replace(
            context,
            parameter=context.parameter._replace(shape=turned.shape),
            start=0,
            stop=rows * columns,
        )
        computed = Computed(context.kernels, 0, rows * columns, partial(_slices, turned))
        result = round_.run(computed, within)
        if result.merged is None:
            return result
        merged = turned.back(result.merged.view(turned.shape).double())
        return replace(result, merged=merged.float().reshape(-1))


def between(deltas: Deltas, left: "Tensor", right: "Tensor") -> Turned:
    """Return the matrices left^T d_i right^T, for orthonormal columns `left` and rows `right` (fp64)."""
    shape = matrix_shape(left.shape[1], right.shape[0])

    def matrices() -> Iterator[Slice]:
        for model, factors, delta in deltas.factored():
            if factors:
                turned = (left.T @ factors.left.double()).mul_(factors.scale)
                yield Slice(model, turned @ (factors.right.double() @ right.T))
            elif delta is not None:
                yield Slice(model, left.T @ delta.view(len(left), -1).double() @ right.T)
            else:
                yield Slice(model, left.new_zeros(shape))

    return Turned(shape, matrices, lambda merged: left @ merged[: left.shape[1], : len(right)] @ right)


def span_bytes(stack: Stack, side: int) -> int:
    """Return the bytes for each element that a `Span` of all columns (side 0) or rows (side 1) takes."""
    if not stack.parameter.is_matrix:
        return 0
    other = stack.parameter.shape[1 - side]
    return 8 * 6 * min(stack.parameter.shape[side], stack.ranks + stack.num_whole * other) // other


def padded(matrix: "Tensor", shape: tuple[int, int]) -> "Tensor":
    """Return a matrix with zeros up to a shape."""
    from torch.nn.functional import pad

    padded: Tensor = pad(matrix, (0, shape[1] - matrix.shape[1], 0, shape[0] - matrix.shape[0]))
    return padded


def matrix_shape(rows: int, columns: int) -> tuple[int, int]:
    """Return a shape that inner methods take for a matrix, though the models span fewer directions."""
    return max(2, rows), max(2, columns)


def _slices(turned: Turned) -> Iterable[Slice]:
    return (Slice(model, padded(matrix, turned.shape).float().reshape(-1)) for model, matrix in turned.matrices())


def _unit(last: Round, parameter: Parameter) -> Unit:
    return "matrix" if parameter.is_matrix else last.unit(parameter)


def _bits(magnitude: float) -> int:
    """Return the bits of an fp32 magnitude."""
    bits: int = struct.unpack("<i", struct.pack("<f", magnitude))[0]
    return bits
