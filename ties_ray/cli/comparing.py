"""Comparisons as text for people: tables of 80 columns."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ties_ray.cli.screen import fact_table, new_table, num

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ties_ray.operations.compare import Comparison, Order, TensorDifference

FEW = 20
"""Tensors that are listed; further ones are counted."""
NAMES = 4
"""Names that are listed in a line."""
WIDEST_NAME = 40
"""The most characters of a name in a table of 80 columns."""


def of_comparison(comparison: "Comparison", order: "Order", *, every: bool) -> "Iterator[RenderableType]":
    """Yield how model B differs from model A. every: list all tensors."""
    table = fact_table()
    table.add_row("A", comparison.a)
    table.add_row("B", comparison.b)
    if comparison.base:
        table.add_row("base", comparison.base)
    yield table
    if comparison.same_bytes:
        yield f"same bytes, by {comparison.proof}; nothing was read"
        return
    yield _sum(comparison)
    differing = [each for each in comparison.in_order(order) if each.changed or every]
    if differing:
        yield _tensors(differing if every else differing[:FEW])
    if len(differing) > FEW and not every:
        yield f"and {len(differing) - FEW:,} more tensors differ; --all lists them"
    equal = sum(not each.changed for each in comparison.tensors)
    if equal and not every:
        yield f"{equal:,} of {len(comparison.tensors):,} tensors have equal values"
    yield from _lists(comparison)


def _sum(comparison: "Comparison") -> "Table":
    total, table = comparison.total, fact_table()
    of = "change of A" if comparison.compares == "changes" else "A"
    table.add_row("compared", f"{num(total.elements)} {comparison.compares} of {len(comparison.tensors):,} tensors")
    table.add_row("changed", f"{total.share_changed:.4%} ({total.changed:,} values)")
    if total.difference is not None:
        relative = "" if total.relative_error is None else f", {total.relative_error:.4g} of the norm of {of}"
        table.add_row("difference", f"norm {total.difference:.6g}{relative}; largest {total.largest:.4g}")
        table.add_row("cosine", _cosine(total.cosine))
    if total.not_finite:
        table.add_row("not finite", f"{total.not_finite:,} values are NaN or Inf in A or B, and are left out")
    return table


def _tensors(tensors: "Sequence[TensorDifference]") -> "Table":
    table = new_table("tensor", "rel. error >", "cosine >", "changed >")
    for tensor in tensors:
        error = "" if tensor.relative_error is None else f"{tensor.relative_error:.3g}"
        table.add_row(short(tensor.name), error, _cosine(tensor.cosine), f"{tensor.share_changed:.2%}")
    return table


def _lists(comparison: "Comparison") -> Iterator[str]:
    for title, names in (("only in A", comparison.only_in_a), ("only in B", comparison.only_in_b)):
        if names:
            yield f"{title} ({len(names):,}): {_few(names)}"
    for unlike in comparison.unlike[:NAMES]:
        yield f"not comparable: {unlike.name}: {unlike.a} in A, {unlike.b} in B"
    if len(comparison.unlike) > NAMES:
        yield f"and {len(comparison.unlike) - NAMES:,} more that are not comparable"
    for change, count in comparison.dtypes.items():
        yield f"dtype {change}: {count:,} tensors"
    yield from (f"note: {note}" for note in comparison.notes)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES]) + (f" and {len(names) - NAMES:,} more" if len(names) > NAMES else "")


def _cosine(cosine: float | None) -> str:
    if cosine is None:
        return "none"
    return f"{cosine:.6f}" if abs(cosine) < 0.9999995 or abs(cosine) == 1 else f"1 - {1 - cosine:.1e}"


def short(name: str, most: int = WIDEST_NAME) -> str:
    """Return a name with its middle left out where it is long: both ends tell tensors apart."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
