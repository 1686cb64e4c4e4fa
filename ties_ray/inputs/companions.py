"""What a method needs of a model beside its weights, checked against the base's parameters."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ties_ray.errors import Problem, enumerated
from ties_ray.methods import Companion
from ties_ray.stores import last_part
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from ties_ray.inputs.catalog import Model


def folder_of(model: str, pattern: str) -> str:
    """Return the folder of a companion. model: the folder of its model, which stands for `{path}` in the pattern."""
    path = model.rstrip("/")
    return pattern.replace("{path}", path).replace("{name}", last_part(path)).rstrip("/")


def misfits(
    needed: Sequence[Companion], models: Sequence["Model"], parameters: Sequence[Parameter]
) -> Iterator[Problem]:
    """Yield what is wrong with the companions' shapes, and which are missing."""
    changed = [parameter for parameter in parameters if parameter.merged and parameter.changed and parameter.numel]
    for companion in needed:
        stored = {name for model in models for name in model.companions[companion.name].sources}
        needing = [parameter for parameter in changed if companion.every or parameter.name in stored]
        for model in models:
            yield from _misfits_of(companion, model.companions[companion.name], needing)


def _misfits_of(companion: Companion, own: "Model", needing: Sequence[Parameter]) -> Iterator[Problem]:
    missing = [parameter.name for parameter in needing if parameter.name not in own.sources]
    if missing:
        message = f"has no {companion.name} of {len(missing)} parameters: {enumerated(missing)}"
        yield Problem(own.uri, message, "compute it for all models alike, or `exclude` these parameters")
    for parameter in needing:
        if companion.shape == "gram" and parameter.name in own.sources and not parameter.is_matrix:
            yield Problem(own.uri, f"{parameter.name} is no matrix, and has a {companion.name}", "drop that tensor")
        elif parameter.name in own.sources:
            shape, right = own.sources[parameter.name].tensors[0].shape, _shape(companion, parameter)
            if shape != right:
                message = f"{parameter.name} has shape {list(shape)}, and its {companion.name} is of {list(right)}"
                yield Problem(own.uri, message, "compute it for this base")


def _shape(companion: Companion, parameter: Parameter) -> tuple[int, ...]:
    if companion.shape == "same":
        return parameter.shape
    return (parameter.columns,) * 2
