"""A report as one HTML file, which asks nobody for anything: no script, no font, no image from elsewhere."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ties_ray.errors import printable
from ties_ray.reports.figures import figures_of
from ties_ray.reports.pool import Remark
from ties_ray.reports.report import MergeReport, joined

if TYPE_CHECKING:
    import jinja2

FOLDER = Path(__file__).parent
"""The folder of the templates."""
OF_A_KIND = 3
"""Remarks of one kind that stand on the first screen."""
PAIRS = 20
"""Pairs that are listed at either end of the cosines."""


def environment() -> "jinja2.Environment":
    """Return what fills in the templates of pages. It escapes every text."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "share": lambda value: "" if value is None else f"{value:.2%}",
        "number": lambda value: "" if value is None else f"{value:.4g}",
        "cosine": lambda value: "" if value is None else f"{value:.4f}",
        "plain": lambda value: printable(str(value)),
    }
    return made


def page_of(report: MergeReport) -> str:
    """Return the page. Every text that comes from a model, a file or a recipe is escaped."""
    figures = {figure.key: figure for figure in figures_of(report)}
    lowest, highest = _ends(report)
    effects = report.result.effects
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            result=report.result,
            overall=joined("", effects.parameters) if effects else None,
            figures=figures,
            first_remarks=_first(report.remarks),
            lowest=lowest,
            highest=highest,
        )
    )


def _first(remarks: Sequence[Remark]) -> list[Remark]:
    """Return a few remarks of each kind, which fit a first screen."""
    shown = Counter[str]()
    first = []
    for remark in remarks:
        shown[remark.kind] += 1
        if shown[remark.kind] <= OF_A_KIND:
            first.append(remark)
    return first


def _ends(report: MergeReport) -> tuple[list[tuple[str, str, float]], list[tuple[str, str, float]]]:
    """Return the pairs of models with the lowest cosines, and those with the highest."""
    if report.comparison is None:
        return [], []
    names = [model.name for model in report.comparison.models]
    pairs = sorted(
        (value, number, other)
        for number, row in enumerate(report.comparison.cosines)
        for other, value in enumerate(row)
    )
    pairs_of_names = [(names[other], names[number], value) for value, number, other in pairs]
    return pairs_of_names[:PAIRS], pairs_of_names[::-1][:PAIRS]
