"""The orientation of matrices, by their names: for outputs that hold factors, where the models do not tell it. Pure."""

from collections.abc import Iterable, Sequence

from ties_ray.libraries.conversions import tables
from ties_ray.tensors import Kind


def word_of(path: str) -> str:
    """Return the last word of a module's path that is no number."""
    return next((word for word in reversed(path.split(".")) if not word.isdigit()), "")


def kind_of(name: str, kinds: Sequence[str]) -> Kind:
    """Return the orientation of a matrix, as the classes of transformers use it.

    name: the parameter's. kinds: what config.json calls the model (`conversions.kinds_of`).
    """
    word, content = word_of(name.removesuffix(".weight")), tables()
    if any(word in content["other_matrices"].get(kind, ()) for kind in kinds):
        return "other"
    if word in content["embeddings"]:
        return "embedding"
    return "transposed" if any(word in content["transposed"].get(kind, ()) for kind in kinds) else "linear"


def kinds_by_name(names: Iterable[str], kinds: Sequence[str]) -> dict[str, Kind]:
    """Return the orientation of each parameter that is no linear layer (out, in)."""
    every = {name: kind_of(name, kinds) for name in names}
    return {name: kind for name, kind in every.items() if kind != "linear"}
