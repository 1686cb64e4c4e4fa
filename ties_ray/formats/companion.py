"""Further tensors of a model, such as its Fisher information: safetensors files with the names of its parameters."""

import math
from collections.abc import Mapping, Sequence

from ties_ray.errors import Problem
from ties_ray.formats import Contents, Folder, Rules, account
from ties_ray.formats import _checkpoint_files as files_of
from ties_ray.formats.checkpoint import Checkpoint
from ties_ray.safetensors import MERGEABLE
from ties_ray.stores import last_part
from ties_ray.tensors import Parameter, Source


class Companion(Checkpoint):
    """One tensor for each parameter, by the same name; its values are used as they are."""

    name = "companion"
    is_model = False

    def recognises(self, names: Sequence[str]) -> bool:
        """Return whether there are safetensors files."""
        return any(name.endswith(".safetensors") for name in names)

    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return all safetensors files."""
        return tuple(name for name in names if name.endswith(".safetensors")), ()

    def read(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> Contents:
        """Return a source for each tensor that has the name of a parameter; the others are left aside."""
        problems: list[Problem] = []
        names = sorted(folder.headers)
        tensors = files_of.stored_tensors(folder, names, problems)
        bare = files_of.bare_names(tensors)
        stored = {bare[name]: ref for name, ref in tensors.items()}
        own = {name: ref for name, ref in stored.items() if base is None or name in base}
        if not own and not problems:
            remedy = "name its tensors as the base's parameters are named"
            problems.append(Problem(folder.uri, "has a tensor of no parameter of the base", remedy))
        problems += [
            Problem(folder.uri, f"{name} has dtype {ref.dtype}", "store it as F32")
            for name, ref in own.items()
            if ref.dtype not in MERGEABLE
        ]
        if problems:
            return Contents(problems=tuple(problems))
        pins = {last_part(pin.uri): pin for pin in folder.files}
        sizes = {name: math.prod(ref.shape) for name, ref in stored.items()}
        fates = [("merged" if name in own else "the base has no such parameter", sizes[name]) for name in stored]
        return Contents(
            tuple(pins[name] for name in names),
            {name: Source((ref,)) for name, ref in own.items()},
            account=account(sum(sizes.values()), fates),
        )
