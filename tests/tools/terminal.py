"""A terminal in memory, and the text that it shows."""

import io
import re


class Terminal(io.StringIO):
    """Takes what is drawn on a terminal."""

    def isatty(self) -> bool:
        return True


def plain(drawn: str) -> list[str]:
    """Return all lines that were ever drawn, without the codes that colour them and move the cursor."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.replace("\r", "\n"))
    return [line for line in text.split("\n") if line.strip()]
