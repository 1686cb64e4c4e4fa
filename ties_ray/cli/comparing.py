"""Comparisons as text for people: tables of 80 columns."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ties_ray.cli.screen import fact_table, new_table, num, num_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ties_ray.operations.compare import Comparison, Order, TensorDifference
    from ties_ray.reports.pool import ComparedModel, PoolComparison, Remark
    from ties_ray.reports.report import MergeReport

FEW = 20
"""Tensors that are listed; further ones are counted."""
NAMES = 4
"""Names that are listed in a line."""
MATRIX = 8
"""The most models whose cosines are shown as a matrix."""
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


# -- a pool


def of_pool_comparison(comparison: "PoolComparison") -> "Iterator[RenderableType]":
    """Yield how the models of a pool relate, and what stands out, in one page."""
    models = comparison.models
    size = num_bytes(comparison.bytes_read)
    yield f"{len(models):,} models compared in {comparison.parameters:,} parameters, {size} read"
    yield from _remarks(comparison)
    yield _summary(comparison)
    if len(models) <= MATRIX:
        yield _matrix(comparison)
    yield _model_table(comparison)
    if len(models) > FEW:
        yield f"and {len(models) - FEW:,} more models; --json has them, and the cosine of every pair"
    if comparison.refused:
        yield f"left out, as a merge would refuse them ({len(comparison.refused):,}):"
        yield from (f"  {reasons[0]}" for reasons in list(comparison.refused.values())[:NAMES])
    yield from (f"note: {note}" for note in comparison.notes[:NAMES])


def _remarks(comparison: "PoolComparison") -> "Iterator[RenderableType]":
    """Yield what stands out, a few of each kind."""
    if not comparison.remarks:
        yield "nothing stands out: no duplicates, no dead models, no outliers, no conflicts"
        return
    yield _remark_table(comparison.remarks)


def _remark_table(remarks: "Sequence[Remark]") -> "Table":
    """Return what stands out, a few of each kind."""
    table, kinds = fact_table(), Counter(remark.kind for remark in remarks)
    for kind, count in kinds.items():
        texts = [remark.text for remark in remarks if remark.kind == kind]
        for number, text in enumerate(texts[:NAMES]):
            table.add_row(kind if number == 0 else "", text)
        if count > NAMES:
            table.add_row("", f"and {count - NAMES:,} more")
    return table


def _summary(comparison: "PoolComparison") -> "Table":
    models, table = comparison.models, fact_table()
    table.add_row("norms", _spread([model.norm for model in models], "{:.4g}"))
    if len(models) > 1:
        table.add_row("cosines", _spread([value for row in comparison.cosines for value in row], "{:.3f}"))
        shares = [value for row in comparison.conflicts for value in row]
        table.add_row("sign conflicts", f"{_spread(shares, '{:.1%}')} of the common changes of a pair")
    ranks = [model.rank_99 for model in models if model.rank_99]
    if ranks:
        most = max(model.rank or 0 for model in models)
        table.add_row("spectra", f"{_spread(ranks, '{:.0f}')} components of {most} hold 99 % of a change")
    return table


def _spread(values: Sequence[float], form: str) -> str:
    ordered = sorted(values)
    low, middle, high = (form.format(ordered[at]) for at in (0, len(ordered) // 2, -1))
    return low if low == high else f"median {middle} ({low} to {high})"


def _matrix(comparison: "PoolComparison") -> "Table":
    """Return the cosines of a few models, by number."""
    table = new_table("cosines", *(f"{number} >" for number in range(len(comparison.models))))
    for number, model in enumerate(comparison.models):
        row = [f"{value:.3f}" for value in comparison.cosines[number]]
        table.add_row(f"{number} {short(model.name, 24)}", *row, "1")
    return table


def _model_table(comparison: "PoolComparison") -> "Table":
    """Return the models, first those that stand out, then those with the largest norms."""
    marked = {name for remark in comparison.remarks for name in remark.models}

    def place(model: "ComparedModel") -> tuple[bool, float]:
        return model.name not in marked, -model.norm

    table = new_table("model", "norm >", "mean cos >", "nearest", "cos >", "against >")
    for model in sorted(comparison.models, key=place)[:FEW]:
        table.add_row(
            short(model.name, 22), f"{model.norm:.4g}", f"{model.mean_cosine:.3f}", short(model.nearest, 17),
            f"{model.nearest_cosine:.3f}", f"{model.against:.1%}",
        )  # fmt: skip
    return table


# -- a merge


def of_report(report: "MergeReport", written: str) -> "Iterator[RenderableType]":
    """Yield what stands out of a merge. written: the page's URI."""
    yield f"{report.title}: {report.output}"
    if report.remarks:
        yield _remark_table(report.remarks)
    else:
        yield "nothing stands out"
    if written:
        yield f"wrote {written}"


def short(name: str, most: int = WIDEST_NAME) -> str:
    """Return a name with its middle left out where it is long: both ends tell tensors apart."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
