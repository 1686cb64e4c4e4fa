"""The words of the house: docstrings, comments and help texts in short sentences, and names that say what a thing is.

`python -m tests.tools.words [PATH...]` lists the faults of files and folders, by default of the rooms that have none.
CONTRIBUTING.md has the glossary.
"""

import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ties_ray

PACKAGE = Path(ties_ray.__file__).parent
NOT_YET = frozenset({"kernels/cpu.py", "kernels/cuda.py"})
"""Files and folders of the package that still have faults. Each leaves this list when it is clean, and none joins."""
MOST_WORDS = 25
"""Words of a sentence."""
PREPOSITIONS = frozenset({
    "about", "above", "after", "against", "among", "around", "as", "at", "before", "behind", "below", "beside",
    "besides", "between", "beyond", "by", "during", "for", "from", "in", "inside", "into", "of", "off", "on", "onto",
    "out", "outside", "over", "per", "since", "through", "to", "toward", "under", "until", "up", "upon", "with",
    "within", "without",
})  # fmt: skip
"""Words that no docstring and no help text begins with: most such texts have neither subject nor verb."""
VAGUE_NAMES = frozenset({"one", "found", "what", "told", "known", "some", "seen", "wanted", "given", "taken"})
"""Names of variables and arguments that do not say what the thing is."""


class Text(NamedTuple):
    """A text for people, in a source file."""

    line: int
    kind: str
    """`docstring`, `comment` or `help`."""
    text: str


class Fault(NamedTuple):
    """A rule that a file breaks."""

    path: Path
    line: int
    rule: str
    """`long`, `preposition`, `continued` or `name`."""
    text: str

    def __str__(self) -> str:
        path = self.path.relative_to(PACKAGE.parent) if self.path.is_relative_to(PACKAGE.parent) else self.path
        return f"{path}:{self.line}: {self.rule}: {self.text}"


def faults_of(path: Path) -> Iterator[Fault]:
    """Yield each rule that a file breaks."""
    tree = ast.parse(path.read_text())
    for text in sorted([*_docstrings(tree), *_helps(tree), *_comments(path)]):
        yield from (Fault(path, *fault) for fault in _faults_of_text(text))
    for line, name in _names(tree):
        if name.strip("_") in VAGUE_NAMES:
            yield Fault(path, line, "name", name)


def _faults_of_text(text: Text) -> Iterator[tuple[int, str, str]]:
    words = text.text.split()
    if text.kind != "comment" and words and words[0].lower().strip(",:") in PREPOSITIONS:
        yield text.line, "preposition", " ".join(words[:8])
    if text.text.startswith("..."):
        yield text.line, "continued", " ".join(words[:8])
    for sentence in _sentences(text.text):
        count = _count(sentence)
        if count > MOST_WORDS:
            yield text.line, "long", f"{count} words: {sentence}"


def _sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a text; examples, which are indented or marked by \\b, are none."""
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith(("    ", "\b")):
            continue
        lines = re.split(r"\n(?=[ \t]*(?:[-*|+] |`?[A-Za-z_]+: ))", paragraph)  # items of a list, and arguments
        for line in lines:
            yield from re.split(r"(?<=[.!?])(?<!e\.g\.)\s+(?=[\w`\"(])", " ".join(line.split()))


def _count(sentence: str) -> int:
    plain = re.sub(r"`[^`]*`", "code", sentence)
    return sum(any(char.isalnum() for char in word) for word in plain.split())


def _docstrings(tree: ast.Module) -> Iterator[Text]:
    """Yield the docstrings of modules, classes and functions, and the text below a constant or a field."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield Text(statement.lineno, "docstring", _dedented(text))


def _dedented(text: str) -> str:
    first, _, rest = text.partition("\n")
    margin = min((len(line) - len(line.lstrip()) for line in rest.split("\n") if line.strip()), default=0)
    return "\n".join([first, *(line[margin:] for line in rest.split("\n"))])


def _helps(tree: ast.Module) -> Iterator[Text]:
    """Yield the help texts of options."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "help" and isinstance(node.value, ast.Constant):
            yield Text(node.value.lineno, "help", str(node.value.value))


def _comments(path: Path) -> Iterator[Text]:
    """Yield comments, those on neighbouring lines as one."""
    block: list[str] = []
    start = last = 0
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type != tokenize.COMMENT or re.match(r"#\s*(noqa|type:|fmt:|!|--)", token.string):
                continue
            alone = not token.line[: token.start[1]].strip()
            if block and not (alone and token.start[0] == last + 1):
                yield Text(start, "comment", " ".join(block))
                block = []
            start = start if block else token.start[0]
            last = token.start[0]
            block.append(token.string.lstrip("# "))
    if block:
        yield Text(start, "comment", " ".join(block))


def _names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the variables that a file assigns and the arguments of its functions; fields of records are none."""
    fields = {
        statement.target
        for node in ast.walk(tree)
        for statement in (node.body if isinstance(node, ast.ClassDef) else ())
        if isinstance(statement, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in fields:
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def files(places: list[str]) -> list[Path]:
    """Return the Python files of some files and folders; by default those of the package that hold the rules."""
    paths = [Path(place) for place in places] or [PACKAGE]
    every = sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))
    return every if places else [file for file in every if not _may_have_faults(file)]


def _may_have_faults(file: Path) -> bool:
    place = file.relative_to(PACKAGE)
    return any(parent.as_posix() in NOT_YET for parent in (place, *place.parents))


if __name__ == "__main__":
    faults = [fault for path in files(sys.argv[1:]) for fault in faults_of(path.resolve())]
    print(*faults, sep="\n", end="\n" * bool(faults))
    sys.exit(bool(faults))
