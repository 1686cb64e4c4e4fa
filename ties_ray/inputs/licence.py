"""The licence that a model card names."""

import re


def licence_of(readme: bytes) -> str:
    """Return the licence that the front matter of a model card names, with its own name and link if it has them."""
    front = re.match(r"---[^\S\n]*\n(.*?)\n---", readme.decode(errors="replace").replace("\r\n", "\n"), re.DOTALL)
    if not front:
        return ""
    entries: dict[str, str] = {}
    # A plain scalar or a list; a YAML parser takes 10 ms for the widgets of one card.
    for key, scalar, items in re.findall(r"^(license\w*):[ \t]*(.*)((?:\n[ \t]*- .*)*)", front[1], re.MULTILINE):
        values = [scalar, *(item.strip().removeprefix("- ") for item in items.split("\n"))]
        entries[key] = ", ".join(value.strip(" '\"[]") for value in values if value.strip())
    return " ".join(entries[key] for key in ("license", "license_name", "license_link") if entries.get(key))
