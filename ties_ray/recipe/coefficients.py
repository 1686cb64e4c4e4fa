"""Numbers of a recipe that differ by parameter: tables by pattern, and gradients over the layers."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Discriminator, Field, FiniteFloat, Tag

TAGS = frozenset({"a number", "a gradient", "a table", "a name", "a decay", "a list"})
"""Forms of a coefficient and of a schedule, as pydantic names them in the places of its errors."""


def _form(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a table"
    return "a gradient" if isinstance(value, Sequence) and not isinstance(value, str | bytes) else "a number"


N = TypeVar("N")
Level = Annotated[
    Annotated[N, Tag("a number")] | Annotated[tuple[N, ...], Tag("a gradient"), Field(min_length=1)],
    Discriminator(_form),
]
"""A number, or numbers spread evenly over the layers, the first at the first layer, the last at the last one."""
ByParameter = Annotated[
    Annotated[N, Tag("a number")]
    | Annotated[tuple[N, ...], Tag("a gradient"), Field(min_length=1)]
    | Annotated[dict[str, Level[N]], Tag("a table")],
    Discriminator(_form),
]
"""A number, a gradient, or a table of both by pattern of parameter names, where the first match counts."""
Coefficient = ByParameter[FiniteFloat]
Share = ByParameter[Annotated[FiniteFloat, Field(gt=0, le=1)]]
"""Likewise, with numbers above 0 and at most 1."""


class Rule(NamedTuple):
    """A line of a table."""

    pattern: str
    """Pattern of parameter names, as in a shell."""
    values: tuple[float, ...]
    """One number, or a gradient over the layers."""


Rules = tuple[Rule, ...]


def place_of(steps: Iterable[int | str]) -> list[str]:
    """Return the steps to a value of a recipe, without the forms of coefficients that pydantic adds."""
    return [str(step) for step in steps if step not in TAGS]


def rules_of(coefficient: "Coefficient | None") -> Rules:
    """Return the lines of a coefficient that differs by parameter; none of a plain number."""
    if coefficient is None or isinstance(coefficient, int | float):
        return ()
    table = coefficient if isinstance(coefficient, Mapping) else {"*": coefficient}
    return tuple(Rule(pattern, _values(level)) for pattern, level in table.items())


def number_of(coefficient: "Coefficient | None") -> float | None:
    """Return a plain number, None of anything else."""
    return coefficient if isinstance(coefficient, int | float) else None


def value_for(rules: Rules, name: str, depth: float) -> float | None:
    """Return what the first line that matches a parameter says, None where no line does.

    depth: how deep the parameter lies in its stack of layers, from 0 to 1; 0 outside the layers.
    """
    for pattern, values in rules:
        if fnmatch.fnmatchcase(name, pattern):
            return at_depth(values, depth)
    return None


def at_depth(values: Sequence[float], depth: float) -> float:
    """Return the value of a gradient at a depth, linear between its numbers."""
    place = depth * (len(values) - 1)
    first = int(place)
    share = place - first
    return values[first] if not share else (1 - share) * values[first] + share * values[first + 1]


def _values(level: "float | tuple[float, ...]") -> tuple[float, ...]:
    return (float(level),) if isinstance(level, int | float) else tuple(level)
