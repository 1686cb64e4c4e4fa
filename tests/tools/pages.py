"""The pages of the documentation, taken apart: their code blocks and their sentences."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "pipelines").glob("*/README.md")])
NOT_RUN = re.compile(r"<!-- not run: (?P<why>.+?) -->")
"""Stands before a block that no test runs, and says why."""
_MARKDOWN = MarkdownIt("commonmark").enable("table")


class Block(NamedTuple):
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    """Empty or `text` for what is shown and not run."""
    code: str
    why_not: str
    """Why no test runs it; empty where one does."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    before = ""
    for token in _MARKDOWN.parse(page.read_text()):
        if token.type == "fence":
            assert token.map
            marker = NOT_RUN.fullmatch(before.strip())
            yield Block(page, token.map[0] + 1, token.info.strip(), token.content, marker["why"] if marker else "")
        if token.type in ("fence", "html_block", "inline"):
            before = token.content if token.type == "html_block" else ""


def sentences(page: Path) -> Iterator[str]:
    """Yield the sentences of a page: of its text, lists and cells of tables; an inline code counts as one word."""
    for token in _MARKDOWN.parse(page.read_text()):
        if token.type == "inline":
            text = "".join(_plain(child) for child in token.children or ())
            yield from filter(None, (part.strip() for part in re.split(r"(?<=[.!?])[\"')]*\s+", text)))


def _plain(token: object) -> str:
    kind, content = getattr(token, "type", ""), getattr(token, "content", "")
    return {"text": content, "code_inline": "code", "softbreak": " "}.get(kind, "")


def num_words(sentence: str) -> int:
    """Return how many words a sentence has; signs and numbers alone are none."""
    return sum(any(char.isalpha() for char in word) for word in sentence.split())
