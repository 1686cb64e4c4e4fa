"""Write the pages of the site into one folder, with what the code says of itself filled in.

    python -m docs.generate build/docs

A page holds `<!-- generated: NAME -->` where a function of `PARTS` fills in its text. So the reference can't be stale:
it exists in the site alone. README.md becomes the home page. Links to files that are no pages become plain text.
"""

import ast
import importlib
import inspect
import json
import posixpath
import re
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

import ties_ray
from ties_ray import errors, plugins
from ties_ray.cli.commands import commands
from ties_ray.cli.method_docs import method_doc
from ties_ray.cli.text import growth_of
from ties_ray.evaluations import Evaluation
from ties_ray.methods import Method
from ties_ray.recipe.json_schema import recipe_schema
from ties_ray.recipe.search import Choices, Range, Search, Selection
from ties_ray.samplers import Sampler

ROOT = Path(__file__).parent.parent
PAGES_OF_THE_ROOT = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Pages beside the folder docs/, and what the site calls them."""
SECTIONS = ("vocabulary", "coefficients", "allow", "bounds", "run")
"""Sections of a recipe whose keys do not depend on a name in it."""
_MARKER = re.compile(r"<!-- generated: (\S+)(?: (\S+))? -->")
_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


# -- pages


def pages() -> Iterator[tuple[Path, str]]:
    """Yield every source page, with its place in the site."""
    for source, place in PAGES_OF_THE_ROOT.items():
        yield ROOT / source, place
    for path in sorted((ROOT / "docs").rglob("*.md")):
        yield path, path.relative_to(ROOT / "docs").as_posix()


def images() -> Iterator[tuple[Path, str]]:
    """Yield every image that a page shows, with its place in the site."""
    for path in sorted((ROOT / "docs").rglob("*.png")):
        yield path, path.relative_to(ROOT / "docs").as_posix()


def site_page(source: Path, place: str, places: Mapping[Path, str]) -> str:
    """Return the text of one page as the site shows it."""
    text = _MARKER.sub(lambda marker: PARTS[marker[1]](*filter(None, [marker[2]])), source.read_text())

    def link(match: re.Match[str]) -> str:
        target = places.get((source.parent / match[2]).resolve())
        if target is None:
            return match[1] if "`" in match[1] else f"`{match[2].rpartition('../')[2]}`"
        return f"[{match[1]}]({posixpath.relpath(target, posixpath.dirname(place) or '.')}{match[3] or ''})"

    return _LINK.sub(link, text)


def write_site(folder: Path) -> None:
    """Write all pages into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    places = {source.resolve(): place for source, place in (*pages(), *images())}
    for source, place in images():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / place)
    for source, place in pages():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(site_page(source, place, places))


# -- parts


def recipe_keys() -> str:
    """Return one table a section of the recipe."""
    schema = recipe_schema()
    definitions = schema["$defs"]
    sections = [("Top level", "", schema)]
    sections += [("`base`", "base.", definitions["Base"]), ("`models[]`", "models[].", definitions["ModelEntry"])]
    sections += [(f"`{name}`", f"{name}.", definitions[name.capitalize()]) for name in SECTIONS]
    sections.append(("`vocabulary.rows`", "vocabulary.rows.", definitions["TokenRow"]))
    for kind in schema["properties"]["output"]["oneOf"][1:]:
        section = definitions[_name_of(kind)]
        sections.append((f"`output` of kind `{section['properties']['kind']['const']}`", "output.", section))
    for scheme, options in schema["properties"]["storage"]["properties"].items():
        section = definitions[_name_of(options)]
        if section.get("properties"):
            sections.append((f"`storage.{scheme}`", f"storage.{scheme}.", section))
    return "\n\n".join(f"## {title}\n\n{_keys(prefix, section)}" for title, prefix, section in sections)


def search_keys() -> str:
    """Return one table for the section `search`, for what is searched at a place, and for each sampler."""
    sections: list[tuple[str, str, type[BaseModel]]] = [
        ("`search`", "search.", Search),
        ("A range", "space.PLACE.", Range),
        ("Choices", "space.PLACE.", Choices),
        ("`search.select`", "search.select.", Selection),
    ]
    sections += [
        (f"`search.sampler` {name}", "search.sampler.", plugins.load("samplers", name, Sampler))
        for name in plugins.names("samplers")
    ]
    return "\n\n".join(f"### {title}\n\n{_keys(prefix, kind.model_json_schema())}" for title, prefix, kind in sections)


def _keys(prefix: str, section: Mapping[str, Any]) -> str:
    rows = [
        (
            f"`{prefix}{name}`",
            _kind(facts),
            "required" if name in section.get("required", ()) else _default(facts.get("default")),
            " ".join(facts.get("description", "").split()),
        )
        for name, facts in section["properties"].items()
        if not (name == "kind" and "const" in facts)
    ]
    head = "" if not prefix else " ".join(section.get("description", "").split()) + "\n\n"
    return head + table(("key", "value", "default", "meaning"), rows)


def _name_of(reference: Mapping[str, str]) -> str:
    return reference["$ref"].rpartition("/")[2]


def _kind(facts: Mapping[str, Any]) -> str:
    """Return in a few words what a value may be."""
    for several in ("anyOf", "oneOf"):
        if several in facts:
            return " or ".join(dict.fromkeys(filter(None, map(_kind, facts[several]))))
    if "$ref" in facts:
        return "a section"
    if "enum" in facts or "const" in facts:
        return ", ".join(f"`{value}`" for value in facts.get("enum", [facts.get("const")]))
    kind = facts.get("type", "")
    if kind == "array":
        return f"list of {_kind(facts['items'])}" if facts.get("items") else "list"
    if facts.get("pattern", "").startswith(r"^\s*(\d"):
        return "size (`512MiB`)"
    names = {"string": "text", "boolean": "`true`, `false`", "object": "mapping", "null": ""}
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {facts[key]:g}" for key, sign in signs.items() if key in facts]
    return " ".join([str(names.get(kind, kind)), *bounds]).strip()


def _default(value: object) -> str:
    if value in (None, [], {}, ""):
        return "none"
    if isinstance(value, Mapping):
        return "see below"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def merge_methods() -> str:
    """Return a section a method: what it does, its paper and its parameters."""
    sections = []
    for name in plugins.names("methods"):
        doc = method_doc(name, plugins.load("methods", name, Method))
        rows = [
            (f"`{parameter.name}`", parameter.allowed, f"`{parameter.default}`", parameter.description)
            for parameter in doc.parameters
        ]
        facts = (f"Lambda scales a {doc.scales}.", *doc.facts, growth_of(doc), f"Paper: {doc.paper}.")
        listed = "\n".join(f"* {fact}" for fact in facts)
        caveat = f"**When it goes wrong.** {doc.caveat}\n\n" if doc.caveat else ""
        parameters = table(("parameter", "value", "default", "meaning"), rows) if rows else ""
        sections.append(f"## {name}\n\n{doc.description}\n\n{caveat}{listed}\n\n{parameters}")
    return "\n\n".join(sections)


def evaluations() -> str:
    """Return a section a kind of evaluation: what it measures, and its parameters."""
    sections, shared = [], set(Evaluation.model_fields)
    for name in plugins.names("evaluations"):
        kind = plugins.load("evaluations", name, Evaluation)
        schema = kind.model_json_schema()
        own = {key: facts for key, facts in schema["properties"].items() if key not in shared or "enum" in facts}
        text = inspect.getdoc(kind) or ""
        short = f"Short form: `{name}:` and `{kind.main}`."
        sections.append(f"## {name}\n\n{text}\n\n{short}\n\n{_keys('', {**schema, 'properties': own})}")
    return "\n\n".join(sections)


def command_line() -> str:
    """Return the help of every command."""
    return "\n\n".join(f"## {path}\n\n```text\n{help_}\n```" for path, help_ in _helps(commands, "ties-ray", None))


def _helps(command: click.Command, path: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    context = click.Context(command, info_name=path.rpartition(" ")[2], parent=parent, max_content_width=90)
    yield path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from _helps(inner, f"{path} {name}", context)


def exit_codes() -> str:
    """Return the table of exit codes, from the errors."""
    rows = [
        ("0", "", "The command is done, or was done before.", ""),
        ("1", "`MergeError`", "A defect of ties_ray.", ""),
    ]
    for error in sorted(errors.MergeError.__subclasses__(), key=lambda error: error.exit_code):
        if error.__module__ == errors.__name__:
            code = "130, 143" if error is errors.Cancelled else str(error.exit_code)
            again = "yes" if error.retryable else "no"
            rows.append((code, f"`{error.__name__}`", _summary(error), again))
    return table(("code", "in Python", "meaning", "does the same command help later?"), rows)


def python_api() -> str:
    """Return a section for each public name."""
    sections = []
    for name in sorted(set(ties_ray.__all__) - {"__version__"}, key=str.lower):
        value = getattr(ties_ray, name)
        signature = "" if inspect.isclass(value) else str(inspect.signature(value)).replace("'", "")
        text = f"## {name}\n\n" + (f"```text\n{name}{signature}\n```\n\n" if signature else "")
        text += inspect.getdoc(value) or ""
        fields = dict(_fields(value)) if inspect.isclass(value) else {}
        if fields:
            text += "\n\n" + table(("field", "meaning"), [(f"`{key}`", meaning) for key, meaning in fields.items()])
        sections.append(text)
    return "\n\n".join(sections)


def _fields(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the fields of a class, each with the docstring below it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    for line, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not line.target.id.startswith("_"):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            yield line.target.id, " ".join(str(said or "").split())


def contract(place: str) -> str:
    """Return what a class of `module:Class` asks of those who implement it."""
    module, _, name = place.partition(":")
    asked = getattr(importlib.import_module(module), name)
    rows = []
    for key, value in vars(asked).items():
        plain = value.fget if isinstance(value, property) else value
        if not key.startswith("_") and inspect.isfunction(plain):
            must = "must" if getattr(value, "__isabstractmethod__", False) else "may"
            rows.append((f"`{key}`", must, (inspect.getdoc(plain) or "").split("\n\n")[0].replace("\n", " ")))
    if getattr(asked, "_is_protocol", False):  # it is handed over, and nobody implements it but its owner
        return table((name, "what it returns or does"), [(key, text) for key, _, text in rows])
    return table((name, "", "what it returns or does"), sorted(rows, key=lambda row: row[1] != "must"))


def file(path: str) -> str:
    """Return a source file as a code block."""
    return f"```python\n{(ROOT / path).read_text().rstrip()}\n```"


def decisions() -> str:
    """Return the list of decision records, the newest first."""
    rows = []
    for path in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"), reverse=True):
        title, date = path.read_text().splitlines()[0].removeprefix("# "), path.name[:10]
        rows.append((date, f"[{title}]({path.name})"))
    return table(("date", "decision"), rows)


def rooms() -> str:
    """Return the picture of the rooms, as import-linter holds them, and one row a room."""
    layers = layers_of_the_code()
    rows = [(f"`{room}`", _room(room)) for layer in layers for room in layer]
    return f"{picture(layers)}\n\n{table(('room', 'what it does'), rows)}"


def layers_of_the_code() -> list[list[str]]:
    """Return the layers of pyproject.toml, the highest first; rooms of one layer do not import each other."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return [[re.sub(r"[()\s]", "", room) for room in re.split("[|:]", layer)] for layer in layers]


def _room(name: str) -> str:
    return _summary(importlib.import_module(f"ties_ray.{name}"))


def picture(layers: Sequence[Sequence[str]]) -> str:
    """Return an SVG: one row a layer, the rooms that import others above those that are imported."""
    width, row, gap = 640, 30, 8
    height = len(layers) * (row + gap)
    name = 'role="img" aria-label="Rooms and layers" xmlns="http://www.w3.org/2000/svg"'
    lines = [f'<svg viewBox="0 0 {width} {height}" {name}>']
    for number, layer in enumerate(layers):
        box, y = (width - gap * (len(layer) - 1)) / len(layer), number * (row + gap)
        for place, room in enumerate(layer):
            x = place * (box + gap)
            fill = f'fill="currentColor" fill-opacity="{0.15 * is_extension_point(room):g}" stroke="currentColor"'
            shape = f'<rect x="{x:g}" y="{y}" width="{box:g}" height="{row}" rx="4" {fill}/>'
            label = f'<text x="{x + box / 2:g}" y="{y + 20}" text-anchor="middle" font-size="14" fill="currentColor">'
            lines.append(f"{shape}{label}{room}</text>")
    return "\n".join([*lines, "</svg>"])


def is_extension_point(room: str) -> bool:
    """Return whether plugin folders may add files to a room."""
    return "plugins.search_path" in inspect.getsource(importlib.import_module(f"ties_ray.{room}"))


def _summary(thing: object) -> str:
    """Return the first sentence or paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; a cell is one line, and `|` in it is escaped."""
    cells = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


PARTS: dict[str, Callable[..., str]] = {
    "recipe": recipe_keys,
    "search": search_keys,
    "methods": merge_methods,
    "command-line": command_line,
    "evaluations": evaluations,
    "exit-codes": exit_codes,
    "python": python_api,
    "contract": contract,
    "decisions": decisions,
    "file": file,
    "rooms": rooms,
}
"""What fills in a marker, by the name in it."""


if __name__ == "__main__":
    write_site(Path(sys.argv[1]))
