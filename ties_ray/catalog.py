"""What exists: every tensor of every input, with dtype, shape, file and byte range, from headers and configs alone."""

from dataclasses import dataclass

from ties_ray.formats import Parameter, Source
from ties_ray.stores import Pin


@dataclass(frozen=True)
class SmallFile:
    """A file beside the weights that the output may take over (config, tokenizer, chat template, licence)."""

    name: str
    pin: Pin


@dataclass(frozen=True)
class Model:
    """One input, pinned."""

    uri: str
    id: str
    """The entry's `id`, else its 0-based position in the expanded list; "base" for the base."""
    format: str
    objects: tuple[Pin, ...]
    sources: dict[str, Source]
    """By base parameter; a parameter that is missing here has delta zero (the recipe allowed it)."""
    weight: float = 1.0
    density: float | None = None
    licence: str = ""
    """From the front matter of its README; empty where it says none."""


@dataclass(frozen=True)
class Catalog:
    """All inputs of a merge, checked against each other."""

    base: Model
    models: tuple[Model, ...]
    parameters: tuple[Parameter, ...]
    """Of the base, in the order of its files and offsets; a tied alias of another parameter is not among them."""
    small_files: tuple[SmallFile, ...]
    """From the input that `output.files_from` names."""
    notes: tuple[str, ...]
    """What a reader of plan and result should know: differing tokenizers, ties, tensors left aside, weak pins."""
