"""The model card of an output: Markdown with a YAML front, in which names, licences and notes of strangers are data.

`prose` and `code` are the border: nothing else puts a text that is not ours into Markdown.
"""

import io
import re

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from ties_ray.errors import printable
from ties_ray.inputs.catalog import Model
from ties_ray.planning.plan import Plan
from ties_ray.reports.records import MergeResult, Truncation
from ties_ray.stores import hub_name

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_MARKS = re.compile(r"[\\`*\[\]|$~!]|(?<![^\W_])_|_(?![^\W_])")
"""What makes emphasis, code, links, images, formulas or cells; an underscore inside a word makes nothing."""
_TRUTH = re.compile("y|n|yes|no|on|off", re.IGNORECASE)
_OPENING = re.compile(r"(\d*)([-+#=:.)])")
"""What begins a list, a heading, a rule or a table where it stands first in a line."""


def prose(text: str) -> str:
    """Return one line of Markdown that shows just this text, in a paragraph, list item or table cell."""
    line = " ".join(printable(text).split())
    marked = _MARKS.sub(r"\\\g<0>", line).translate(_ENTITIES)
    return _OPENING.sub(r"\1\\\2", marked, count=1) if _OPENING.match(marked) else marked


def code(text: str) -> str:
    """Return a code span of Markdown that shows just this text, in a table cell too."""
    line = printable(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line[:1] in ("`", " ") or line[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def card(plan: Plan, result: MergeResult) -> str:
    """Return the model card: what was merged, how, and under which licences."""
    catalog, recipe = plan.catalog, plan.recipe
    inputs = [catalog.base] * bool(catalog.base.uri) + list(catalog.models)
    licences = {model.licence for model in inputs}
    front: dict[str, object] = {"base_model": [_short(model.uri) for model in inputs]}
    if len(licences) == 1 and "" not in licences:
        front["license"] = licences.pop()
    front["library_name"] = plan.library.name
    front["tags"] = ["merge", "ties-ray", recipe.method.name]
    rows = [_row(model.id, model) for model in inputs]
    asked = plain_yaml(
        recipe.model_dump(mode="json", exclude_unset=True, include={"method", "exclude", "allow"})
    ).rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", asked)), default=0))
    lines = [
        "---",
        plain_yaml(front).rstrip(),
        "---",
        "",
        f"# Merge of {len(plan.result.members)} models by `{recipe.method.name}`{_cut(result.truncation)}",
        "",
        f"Merged by ties_ray, run `{plan.run_id}`, arithmetic `{plan.arithmetic}`. {recipe.method.paper}.",
        "",
        "| id | model | weight | density | licence | values |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "## Recipe",
        f"{fence}yaml",
        asked,
        fence,
    ]
    if result.trims and len(result.trims) <= 2 * len(plan.result.members):
        lines += ["", "## Trim", "| model | threshold | kept | of |", "|---|---|---|---|"]
        lines += [f"| {prose(t.model)} | {t.threshold:.6g} | {t.kept:,} | {t.size:,} |" for t in result.trims]
    if result.truncation:
        lines += ["", "## What the rank cost", "| matrix | relative error |", "|---|---|"]
        lines += [f"| {code(name)} | {error:.4%} |" for name, error in result.truncation.matrices.items()]
    if result.notes:
        lines += ["", "## Notes", *(f"* {prose(note)}" for note in result.notes)]
    return "\n".join(lines) + "\n"


def _row(name: str, model: Model) -> str:
    density = "" if model.density is None else str(model.density)
    licence = prose(model.licence) or "not stated"
    return f"| {prose(name)} | {code(model.uri)} | {model.weight:g} | {density} | {licence} | {model.account} |"


def _cut(truncation: Truncation | None) -> str:
    """Return what a title must say of a merge that was cut down to a rank."""
    if truncation is None:
        return ""
    return f", cut to rank {truncation.rank} (relative error {truncation.relative_error:.2%})"


def _short(uri: str) -> str:
    """Return what names a model in a card: its name on the hub, a bucket's URI, or a folder's own name."""
    return hub_name(uri) if "://" in uri else uri.rstrip("/").rsplit("/", 1)[-1]


class _Representer(SafeRepresenter):
    """Quotes what YAML 1.1 would read as a truth value, and YAML 1.2 as a text."""


def _text(representer: SafeRepresenter, text: str) -> ScalarNode:
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _TRUTH.fullmatch(text) else None)


_Representer.add_representer(str, _text)


def plain_yaml(value: object) -> str:
    """Return a value as YAML that every reader understands alike."""
    for letters in (True, False):
        stream, writer = io.StringIO(), YAML(typ="safe", pure=True)
        writer.Representer = _Representer
        writer.allow_unicode, writer.width = letters, 2**20  # it would fold inside words
        writer.default_flow_style = False
        writer.dump(value, stream)
        if stream.getvalue().replace("\n", "").isprintable():
            break  # else by their numbers: YAML 1.1 breaks lines at characters that 1.2 takes for letters
    return stream.getvalue()
