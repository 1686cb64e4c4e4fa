"""The licence that a model card names."""

import re

from ties_ray.errors import RecipeError
from ties_ray.recipe.parse import plain

FRONT = re.compile(r"---[^\S\n]*\n(.*?)\n---", re.DOTALL)
ENTRY = re.compile(r"^license\w*:.*(?:\n(?:[ \t]+|-).*)*", re.MULTILINE)
"""An entry of the front matter with its lines. The others are not parsed: the widgets of one card take 10 ms."""
KEYS = ("license", "license_name", "license_link")


def licence_of(readme: bytes) -> str:
    """Return the licence that the front matter of a model card names, with its own name and link if it has them."""
    front = FRONT.match(readme.decode(errors="replace").replace("\r\n", "\n"))
    text = "\n".join(ENTRY.findall(front[1])) if front else ""
    try:
        entries = plain(text, "the model card") if text else None
    except RecipeError:
        return ""
    if not isinstance(entries, dict):
        return ""
    return " ".join(shown for key in KEYS if (shown := _shown(entries.get(key))))


def _shown(value: object) -> str:
    """Return a scalar, or the scalars of a list."""
    values = value if isinstance(value, list) else [value]
    return ", ".join(str(each).strip() for each in values if isinstance(each, str | int | float) and str(each).strip())
