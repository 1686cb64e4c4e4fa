"""The model card of an output: Markdown with YAML front matter.

Names, licences and notes come from strangers. Only `prose` and `code` put such text into Markdown, as plain text.
"""

import io
import re
from collections.abc import Mapping, Sequence

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from ties_ray.errors import printable
from ties_ray.inputs.catalog import Model
from ties_ray.inputs.names import model_names
from ties_ray.planning.plan import Plan
from ties_ray.recipe.recipe import FoundBy
from ties_ray.reports.records import MergeResult
from ties_ray.rounds.condense import Truncation
from ties_ray.stores import hub_name

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_MARKS = re.compile(r"[\\`*\[\]|$~!]|(?<![^\W_])_|_(?![^\W_])")
"""Marks of emphasis, code, links, images, formulas and cells; an underscore inside a word is no mark."""
_TRUTH = re.compile("y|n|yes|no|on|off", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PATH = re.compile(r"(?<![\w:/])/(?:[^/\s]+/)+")
"""The folders of an absolute path on this machine."""
_OPENING = re.compile(r"(\d*)([-+#=:.)])")
"""Marks that begin a list, a heading, a rule or a table at the start of a line."""


def prose(text: str) -> str:
    """Return one line of Markdown that shows exactly this text in a paragraph, list item or table cell."""
    line = " ".join(printable(text).split())
    marked = _MARKS.sub(r"\\\g<0>", line).translate(_ENTITIES)
    return _OPENING.sub(r"\1\\\2", marked, count=1) if _OPENING.match(marked) else marked


def code(text: str) -> str:
    """Return a code span of Markdown that shows exactly this text, even in a table cell."""
    line = printable(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line[:1] in ("`", " ") or line[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def card(plan: Plan, result: MergeResult) -> str:
    """Return the model card: the inputs, the method and the licences of a merge."""
    catalog, recipe = plan.catalog, plan.recipe
    num_models = len(plan.merges[0].members) + (len(catalog.earlier.members) if catalog.earlier else 0)
    inputs = [catalog.base] * bool(catalog.base.uri) + list(catalog.models)
    names = model_names(inputs)
    rows = [_row(names[model.id], model) for model in inputs]
    sections = plain_yaml(
        recipe.model_dump(mode="json", exclude_unset=True, include={"method", "exclude", "allow"})
    ).rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", sections)), default=0))
    lines = [
        "---",
        plain_yaml(_front(plan, inputs)).rstrip(),
        "---",
        "",
        f"# Merge of {num_models} models by `{recipe.method.name}`{_cut(result.truncation)}",
        "",
        f"Merged by ties_ray, run `{plan.run_id}`, arithmetic `{plan.arithmetic}`. {recipe.method.paper}.",
        "",
        "| model | weight | density | licence | values |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "## Recipe",
        f"{fence}yaml",
        sections,
        fence,
    ]
    if result.found_by:
        lines += ["", "## Search", *_found_by(result.found_by)]
    if result.trims and len(result.trims) <= 2 * len(plan.merges[0].members):
        lines += ["", "## Trim", "| model | threshold | kept | of |", "|---|---|---|---|"]
        lines += [
            f"| {prose(names.get(t.model, t.model))} | {t.threshold:.6g} | {t.kept:,} | {t.size:,} |"
            for t in result.trims
        ]
    if result.truncation:
        lines += ["", "## What the rank cost", "| matrix | relative error |", "|---|---|"]
        lines += [f"| {code(name)} | {error:.4%} |" for name, error in result.truncation.matrices.items()]
    notes = [*catalog.notes, *(f"left out: {model.uri}" for model in catalog.refused), *result.warnings]
    if notes:
        lines += ["", "## Notes", *(f"* {prose(_without_paths(note, inputs, names))}" for note in notes)]
    return "\n".join(lines) + "\n"


def _front(plan: Plan, inputs: Sequence[Model]) -> dict[str, object]:
    """Return the hub's metadata. `base_model` names models of the hub, as it takes no others."""
    licences = {model.licence for model in inputs}
    on_hub = [hub_name(model.uri) for model in inputs if hub_name(model.uri) != model.uri]
    base = plan.catalog.facts.get("base_name", "")
    if _HUB_ID.fullmatch(base) and base not in on_hub:
        on_hub.insert(0, base)
    is_adapter = plan.library.name == "peft"
    front: dict[str, object] = {}
    if on_hub:
        front |= {"base_model": on_hub, "base_model_relation": "adapter" if is_adapter else "merge"}
    if len(licences) == 1 and "" not in licences:
        front["license"] = licences.pop()
    front["library_name"] = plan.library.name
    front["tags"] = ["merge", "ties-ray", plan.recipe.method.name, *(["lora"] if is_adapter else [])]
    return front


def _found_by(origin: FoundBy) -> list[str]:
    """Return how a search has found the numbers, with the scores before and after."""
    which = f"Candidate {origin.number} of {origin.candidates:,}" if origin.number else "The recipe as it stood"
    of = f"search {code(origin.search)} (sampler {code(origin.sampler)}, seed {origin.seed})"
    table = code("." + origin.table.rpartition("/.")[2])
    lines = [f"{which}, by {of}. Table: {table}.", ""]
    lines += ["| score | data | as it stood | found |", "|---|---|---|---|"]
    for data, before, after in (
        ("searched", origin.untuned, origin.scores),
        ("confirmed", origin.confirmed_untuned, origin.confirmed),
    ):
        lines += [
            f"| {prose(label)} | {data} | {_figure(before.get(label))} | {value:.6g} |"
            for label, value in after.items()
        ]
    return lines


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _without_paths(note: str, inputs: Sequence[Model], names: Mapping[str, str]) -> str:
    """Return a note with the names of models for their folders on this machine."""
    for model in sorted(inputs, key=lambda model: -len(model.uri)):
        if "://" not in model.uri and model.uri:
            note = note.replace(model.uri, names[model.id])
    return _PATH.sub("", note)


def _row(name: str, model: Model) -> str:
    density = "" if model.density is None else str(model.density)
    licence = prose(model.licence) or "not stated"
    shown = prose(name) if "://" not in model.uri else f"{prose(name)} ({code(model.uri)})"
    return f"| {shown} | {model.weight:g} | {density} | {licence} | {model.account} |"


def _cut(truncation: Truncation | None) -> str:
    """Return the end of the title of a merge that was cut down to a rank."""
    if truncation is None:
        return ""
    return f", cut to rank {truncation.rank} (relative error {truncation.relative_error:.2%})"


class _Representer(SafeRepresenter):
    """Quotes texts that YAML 1.1 reads as truth values, such as `no`."""


def _text(representer: SafeRepresenter, text: str) -> ScalarNode:
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _TRUTH.fullmatch(text) else None)


_Representer.add_representer(str, _text)


def plain_yaml(value: object) -> str:
    """Return a value as YAML that readers of YAML 1.1 and 1.2 read alike."""
    for letters in (True, False):
        stream, writer = io.StringIO(), YAML(typ="safe", pure=True)
        writer.Representer = _Representer
        writer.allow_unicode, writer.width = letters, 2**20  # a narrower one folds inside words
        writer.default_flow_style = False
        writer.dump(value, stream)
        if stream.getvalue().replace("\n", "").isprintable():
            break  # YAML 1.1 breaks lines at characters that 1.2 takes for letters: those are escaped
    return stream.getvalue()
