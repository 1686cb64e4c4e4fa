"""A report as one HTML file, which asks nobody for anything: no script, no font, no image from elsewhere."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ties_ray.errors import printable
from ties_ray.reports.figures import figures_of
from ties_ray.reports.pool import Remark
from ties_ray.reports.report import MergeReport, joined

TEMPLATE = Path(__file__).with_name("page.html.j2")
OF_A_KIND = 3
"""Remarks of one kind that stand on the first screen."""
PAIRS = 20
"""Pairs that are listed at either end of the cosines."""


def page_of(report: MergeReport) -> str:
    """Return the page. Every text that comes from a model, a file or a recipe is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "share": lambda value: "" if value is None else f"{value:.2%}",
        "number": lambda value: "" if value is None else f"{value:.4g}",
        "cosine": lambda value: "" if value is None else f"{value:.4f}",
        "plain": lambda value: printable(str(value)),
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    figures = {figure.key: figure for figure in figures_of(report)}
    lowest, highest = _ends(report)
    effects = report.result.effects
    return template.render(
        report=report,
        result=report.result,
        overall=joined("", effects.parameters) if effects else None,
        figures=figures,
        first_remarks=_first(report.remarks),
        lowest=lowest,
        highest=highest,
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
