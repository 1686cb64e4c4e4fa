"""Names of models as people read them: without the path of a machine, and as short as they differ."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from ties_ray.stores import hub_name


class Named(Protocol):
    """A model of a merge."""

    @property
    def id(self) -> str:
        """The recipe's id; by default the position."""

    @property
    def uri(self) -> str:
        """The folder."""


def model_names(models: Sequence[Named]) -> dict[str, str]:
    """Return a name for each model by its id: the id that the recipe gives, or the shortest end of the URI."""
    short = short_names([model.uri for model in models])
    return {model.id: name if model.id.isdigit() else model.id for model, name in zip(models, short, strict=True)}


def short_names(uris: Sequence[str]) -> list[str]:
    """Return the shortest ends of folders' URIs that no other of them has; a model of the hub is `org/name`."""
    names = [""] * len(uris)
    paths = [uri.rstrip("/").split("/") for uri in uris]
    left = {number for number, uri in enumerate(uris) if hub_name(uri) == uri}
    for number in set(range(len(uris))) - left:
        names[number] = hub_name(uris[number])
    depth = 1
    while left:
        ends = {number: "/".join(paths[number][-depth:]) for number in left}
        counts = Counter(ends.values())
        for number in list(left):
            if counts[ends[number]] == 1 or depth >= len(paths[number]):
                names[number] = ends[number]
                left.discard(number)
        depth += 1
    return names
