"""Patterns for `exclude` that leave out some parameters and no others, as a remedy prints them."""

import json
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from glob import escape

MOST = 32
"""The most patterns that a remedy lists; a model that needs more is better left out."""
COPIES = "copies the base's, without what the models trained in them"
"""The effect of `exclude` on parameters of the base."""
LEAVE_OUT = "leave it out (`allow: {refused_model: drop}` does)"


def exclusion(names: Collection[str], others: Iterable[str], effect: str) -> str:
    """Return a remedy: `exclude: [...]` with its effect, or to leave the model out where the list would be long.

    names: the parameters to exclude. others: all other parameters of the base, which no pattern may match.
    """
    listed = patterns(names, set(others) - set(names))
    return f"`exclude: {json.dumps(listed)}` {effect}" if listed else LEAVE_OUT


def either(remedies: Iterable[str]) -> str:
    """Return the remedies that are not empty as alternatives."""
    return ", or ".join(filter(None, remedies))


def patterns(names: Collection[str], others: Collection[str]) -> list[str]:
    """Return patterns that match all of `names` and none of `others`; empty where more than `MOST` would be needed."""
    layered: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        layered.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", escape(name)), []).append(name)
    either = [listed for listed in (_listed(layered, others), _whole_modules(names, others)) if listed]
    shorter = min(either, key=len, default=[])
    return shorter if len(shorter) <= MOST else []


def _listed(layered: dict[str, list[str]], others: Collection[str]) -> list[str]:
    """Return patterns that stand for all layers where that is right, and names elsewhere."""
    if len(layered) > MOST:
        return []
    listed: list[str] = []
    for pattern, names in layered.items():
        wrong = "*" in pattern and any(fnmatchcase(other, pattern) for other in others)
        listed += map(escape, names) if wrong else [pattern]
    return listed


def _whole_modules(names: Collection[str], others: Collection[str]) -> list[str]:
    """Return `module.*` of the largest modules that hold none of `others`, and names elsewhere."""
    holding = {other[: dot.end()] for other in others for dot in re.finditer(r"\.", other)}
    modules: dict[str, None] = {}
    for name in names:
        starts = (name[: dot.end()] for dot in re.finditer(r"\.", name))
        start = next((start for start in starts if start not in holding), "")
        modules[f"{escape(start)}*" if start else escape(name)] = None
    return list(modules)
