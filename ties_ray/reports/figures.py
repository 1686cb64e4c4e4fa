"""The figures of a report, as SVG that takes its colours from the page. They need Matplotlib, of the extra `report`.

Text stays text, so that a page's fonts, zoom and search work. Each figure has a title and a description, and a mark for
a model has a tooltip. Names come from strangers: they are shortened, made printable, and never read as formulas.
"""

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ties_ray.errors import printable
from ties_ray.measures import Matrix
from ties_ray.reports.report import MergeReport, joined, layer_of, module_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

WIDTH = 9.6
"""Width of a figure in inches; the page scales it."""
TALLEST = 7.6
"""Height of a matrix of cosines in inches at most."""
BARS = 40
"""The most models that are drawn as bars with names; more are dots in order of size."""
LABELS = 60
"""The most models whose names stand beside a matrix."""
LINES = 40
"""The most clusters that are separated by lines."""
MARKED = 8
"""Models that stand out and are named in a figure of many, at most."""
APART = 0.06
"""Labels of dots stand at least this share of the width apart."""
CELLS = 64
"""The most cells of a matrix that show their value."""
LONGEST = 26
"""The most characters of a name in a figure."""
COLOURS = {"#010101": "--ink", "#020202": "--muted", "#030303": "--line", "#040404": "--accent", "#050505": "--alert"}
"""Colours that stand for the page's own, which change with light and dark."""
INK, MUTED, LINE, ACCENT, ALERT = COLOURS
POSITIVE, NEGATIVE = (0.15, 0.39, 0.92), (0.85, 0.22, 0.10)
"""Colours of a matrix, which a share makes opaque: they are seen on light and dark."""
OPAQUE = 0.6
"""Opacity of the largest value: the text on it stays readable on light and dark."""
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "ties-ray", "text.parse_math": False, "font.family": "sans-serif",
    "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE, "xtick.color": MUTED,
    "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9,
    "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.5,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "figure.dpi": 72,
}  # fmt: skip


class Figure(NamedTuple):
    """A figure, and what it shows in words."""

    key: str
    """Its id in the page."""
    title: str
    caption: str
    """What it shows, and how to read it."""
    svg: str


def figures_of(report: MergeReport) -> list[Figure]:
    """Return the figures that the report has the numbers for."""
    with _drawing():
        drawn = [draw(report) for draw in (_models, _places, _cosines, _spectra, _truncation)]
    return [figure for figure in drawn if figure]


# -- models


def _models(report: MergeReport) -> Figure | None:
    models = [(model, model.effects) for model in report.models if model.effects]
    if not models:
        return None
    names = [model.name for model, _ in models]
    columns = [
        ("norm of the task vector", [effects.norm for _, effects in models]),
        ("share of the merged change", [effects.contribution for _, effects in models]),
        ("share of terms against the merged sign", [effects.against for _, effects in models]),
    ]
    marked = {name for remark in report.remarks for name in remark.models}
    many = len(models) > BARS
    drawing, axes = _subplots(1 if not many else 3, 3 if not many else 1, 1.0 + 0.22 * len(models) if not many else 5.6)
    for place, (title, values) in zip(axes, columns, strict=True):
        (_dots if many else _bars)(place, names, values, marked, title)
    if not many:
        for place in axes[1:]:
            place.set_yticklabels([])
    order = " Models stand in the order of the value." if many else ""
    caption = (
        "How large each model's change is, how much of the merged change its terms account for, and which share of "
        f"its terms goes against the merged sign.{order} Models that stand out are red."
    )
    return _figure(drawing, "models", "What each model adds", caption)


def _bars(axes: "Axes", names: Sequence[str], values: Sequence[float], marked: set[str], title: str) -> None:
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        (bar,) = axes.barh(number, value, color=ALERT if name in marked else ACCENT, height=0.7)
        bar.set_gid(_tip(f"{name}: {value:.4g}"))
    axes.set_yticks(range(len(names)), [_shown(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title(title)
    axes.grid(axis="y", visible=False)


def _dots(axes: "Axes", names: Sequence[str], values: Sequence[float], marked: set[str], title: str) -> None:
    order = sorted(range(len(names)), key=lambda number: -values[number])
    for place, number in enumerate(order):
        colour = ALERT if names[number] in marked else ACCENT
        (dot,) = axes.plot([place], [values[number]], "o", color=colour, markersize=3.2, markeredgewidth=0)
        dot.set_gid(_tip(f"{names[number]}: {values[number]:.4g}"))
    marked_places = [place for place, number in enumerate(order) if names[number] in marked]
    for level, place in enumerate(_apart(marked_places, len(order))):
        right = place > len(order) * 0.8
        axes.annotate(
            _shown(names[order[place]]),
            (place, values[order[place]]),
            xytext=(-6 if right else 6, (6, -11)[level % 2]),
            textcoords="offset points",
            fontsize=8,
            color=INK,
            ha="right" if right else "left",
        )
    axes.set_title(title)
    axes.margins(x=0.01, y=0.18)
    axes.set_xticks([])


def _apart(places: Sequence[int], length: int) -> list[int]:
    """Return places whose labels do not overlap: the two ends first come, first served."""
    chosen: list[int] = []
    for place in places:
        if len(chosen) < MARKED and all(abs(place - other) > length * APART for other in chosen[-2:]):
            chosen.append(place)
    return chosen


# -- layers and modules


def _places(report: MergeReport) -> Figure | None:
    effects = report.result.effects
    if effects is None:
        return None
    cells: dict[tuple[str, str], list[Any]] = {}
    for parameter in effects.parameters:
        if layer := layer_of(parameter.name):
            cells.setdefault((layer, module_of(parameter.name)), []).append(parameter)
    layers = sorted({layer for layer, _ in cells}, key=int)
    modules = list(dict.fromkeys(module for _, module in cells))
    if len(layers) < 2 or not modules:
        return None
    shown = [("density", "density"), ("conflict", "conflict"), ("cancelled", "cancellation"), ("alone", "alone")]
    drawing, axes = _subplots(2, 2, 2.2 + 2 * max(1.2, 0.2 * len(modules)))
    for place, (title, field) in zip(axes, shown, strict=True):
        values = np.full((len(modules), len(layers)), np.nan)
        for (layer, module), parameters in cells.items():
            values[modules.index(module), layers.index(layer)] = getattr(joined("", parameters), field)
        _matrix(place, values, title)
        place.set_yticks(range(len(modules)), [_shown(module) for module in modules])
        step = -(-len(layers) // 12)
        place.set_xticks(range(0, len(layers), step), layers[::step])
        place.set_xlabel("layer")
    for place in (axes[1], axes[3]):
        place.set_yticklabels([])
    caption = (
        "density: share of the models' elements that add a term. conflict: share of the elements with several terms "
        "whose signs differ. cancelled: share of the terms' magnitude that is lost in their sum. alone: share of the "
        "changed elements whose merged sign one model alone has. The scale of each panel ends at its largest values."
    )
    return _figure(drawing, "layers", "Where models agree, by layer and module", caption)


def _matrix(axes: "Axes", values: Matrix, title: str) -> None:
    """Draw shares as an image, as opaque as they are large."""
    finite = values[np.isfinite(values)]  # a few cells of a norm's weights, with few elements, would hide all others
    top = float(np.quantile(finite, 1.0 if values.size <= CELLS else 0.98)) if len(finite) else 0.0
    axes.imshow(_image(values / (top or 1.0)), aspect="auto", interpolation="none")
    axes.set_title(f"{title} (up to {top:.0%})" if top >= 0.01 else f"{title} (up to {top:.2%})")
    axes.grid(visible=False)
    if values.size <= CELLS:
        for row, column in np.ndindex(*values.shape):
            if np.isfinite(values[row, column]):
                axes.text(column, row, f"{values[row, column]:.1%}", ha="center", va="center", fontsize=8)


def _image(values: Matrix) -> Matrix:
    """Return RGBA of values between -1 and 1."""
    image = np.zeros((*values.shape, 4))
    image[..., :3] = np.where((values >= 0)[..., None], POSITIVE, NEGATIVE)
    image[..., 3] = OPAQUE * np.nan_to_num(np.abs(values)).clip(0, 1)
    return image


# -- pairs and spectra


def _cosines(report: MergeReport) -> Figure | None:
    comparison = report.comparison
    if comparison is None or len(comparison.models) < 2:
        return None
    names = [model.name for model in comparison.models]
    values = np.eye(len(names))
    for number, row in enumerate(comparison.cosines):
        values[number, :number] = values[:number, number] = row
    order = [names.index(name) for cluster in report.clusters for name in cluster]
    size = min(TALLEST, 3.2 + 0.13 * min(len(names), LABELS))
    drawing, (axes,) = _subplots(1, 1, size)
    axes.imshow(_image(np.asarray(values[np.ix_(order, order)])), interpolation="none")
    axes.grid(visible=False)
    if len(names) <= LABELS:
        labels = [_shown(names[number], 20) for number in order]
        axes.set_yticks(range(len(names)), labels)
        axes.set_xticks(range(len(names)), labels, rotation=90)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    if len(names) <= 8:
        for row, column in np.ndindex(len(names), len(names)):
            text = f"{values[order[row], order[column]]:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8)
    lines = np.cumsum([len(cluster) for cluster in report.clusters])[:-1] - 0.5
    for end in lines if len(lines) < LINES else ():
        axes.axhline(end, color=MUTED, linewidth=0.6)
        axes.axvline(end, color=MUTED, linewidth=0.6)
    caption = (
        "Blue pairs point in one direction, red pairs in opposite directions, and empty pairs are unrelated. "
        f"Models are in the order of their clusters ({len(report.clusters):,}), which lines separate."
    )
    return _figure(drawing, "cosines", "Cosines of all pairs of models", caption)


def _spectra(report: MergeReport) -> Figure | None:
    spectra = [model.spectrum for model in report.comparison.models if model.spectrum] if report.comparison else []
    if not spectra:
        return None
    longest = max(map(len, spectra))
    values = np.array([spectrum + [0.0] * (longest - len(spectrum)) for spectrum in spectra])
    drawing, (axes,) = _subplots(1, 1, 2.8)
    places = np.arange(1, longest + 1)
    held = values.cumsum(1)
    axes.fill_between(places, held.min(0), held.max(0), color=ACCENT, alpha=0.25, linewidth=0)
    axes.plot(places, np.median(held, axis=0), color=ACCENT)
    axes.set_xlabel("components")
    axes.set_ylabel("share of the squared norm")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=1)
    caption = (
        "How much of an adapter's squared norm its largest components hold. The line is the median of all adapters. "
        "The band reaches from the lowest to the highest."
    )
    return _figure(drawing, "spectra", "Spectra of the adapters", caption)


def _truncation(report: MergeReport) -> Figure | None:
    truncation = report.result.truncation
    if truncation is None or not truncation.matrices:
        return None
    errors = sorted(truncation.matrices.items(), key=lambda item: -item[1])
    few = len(errors) <= BARS
    drawing, (axes,) = _subplots(1, 1, 1.0 + 0.22 * len(errors) if few else 2.8)
    names, values = [name for name, _ in errors], [error for _, error in errors]
    (_bars if few else _dots)(axes, names, values, set(), "relative error")
    (axes.set_xlim if few else axes.set_ylim)(0, 1.1 * max(values) or 1.0)
    caption = (
        f"Error of writing each merged matrix at rank {truncation.rank}, the largest first. All together lose "
        f"{truncation.relative_error:.2%} of the merged norm."
    )
    return _figure(drawing, "truncation", "What the output's rank loses", caption)


# -- drawing


@contextmanager
def _drawing() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that Matplotlib's font lacks is drawn by the page's font
        yield


def _subplots(rows: int, columns: int, height: float) -> "tuple[Drawing, list[Axes]]":
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(WIDTH, height), layout="constrained")
    axes: Any = drawing.subplots(rows, columns, squeeze=False)
    return drawing, list(axes.flat)


def _figure(drawing: "Drawing", key: str, title: str, caption: str) -> Figure:
    """Return a drawing as SVG for a page: ids of its own, colours of the page, a title and tooltips."""
    file = io.StringIO()
    drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="image[0-9a-f]+"', "", svg)  # equal images have one id, which nothing refers to
    svg = re.sub(r' id="', f' id="{key}-', svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\1{key}-", svg)
    svg = re.sub(rf'<g id="{key}-tip:([0-9a-f]*)">', _with_title, svg)
    for colour, name in COLOURS.items():
        svg = svg.replace(colour, f"var({name})")
    head = f'<svg role="img" aria-labelledby="{key}-title {key}-description" '
    about = f'<title id="{key}-title">{html.escape(title)}</title><desc id="{key}-description">{html.escape(caption)}'
    svg = re.sub(r"<svg ([^>]*)>", lambda match: f"{head}{match[1]}>{about}</desc>", svg, count=1)
    return Figure(key, title, caption, re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2))


def _tip(text: str) -> str:
    """Return an id that carries a tooltip; hexadecimal, since it goes through an attribute."""
    return "tip:" + printable(text).encode().hex()


def _with_title(match: "re.Match[str]") -> str:
    return f"<g><title>{html.escape(bytes.fromhex(match[1]).decode())}</title>"


def _shown(name: str, most: int = LONGEST) -> str:
    """Return a name for a label: printable, with its middle left out where it is long."""
    name, half = printable(name), (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
