"""One model of an output of masks: its change is factor * mask * vector, as the merge left vector and masks."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ties_ray.errors import Problem
from ties_ray.formats import Contents, Folder, Format, Rules, account
from ties_ray.formats import _checkpoint_files as files_of
from ties_ray.kernels import Encoded
from ties_ray.libraries.weight_files import candidates, is_vector, is_weights
from ties_ray.safetensors import Header
from ties_ray.stores import last_part
from ties_ray.tensors import Parameter, Read, Source, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

FACTOR = "factor"
HEAD = "mask-"
"""How the file of a model's mask begins."""


class Masked(Format):
    """A model that shares its vector with others."""

    name = "masked"
    whole = False

    def recognises(self, names: Sequence[str]) -> bool:
        """Return whether there is a vector, and a mask."""
        return any(map(is_vector, names)) and bool(_masks(names))

    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the vector's files, and the mask that the recipe chooses; none of several masks."""
        masks = _masks(names)
        vectors = (name for name in names if is_vector(name) and is_weights(name))
        return (*vectors, *(masks if len(masks) == 1 else ())), ()

    def read(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> Contents:
        """Return a source for each parameter of which the model has a mask, checked against vector and base."""
        masks = _masks([last_part(pin.uri) for pin in folder.files])
        if len(masks) > 1:
            message = f"holds the masks of {len(masks)} models"
            remedy = files_of.CHOOSE.format(name=masks[0])
            return Contents(problems=(Problem(folder.uri, message, remedy, "candidates"),))
        (mask,), vectors = masks, sorted(set(folder.headers) - set(masks))
        problems: list[Problem] = []
        stored = files_of.stored_tensors(folder, vectors, problems)
        bits = _refs(folder.headers[mask], len(vectors))
        factor = bits.pop(FACTOR, None)
        own = {name: ref for name, ref in stored.items() if base is None or name in base}
        wrong = [name for name, ref in own.items() if not _fits(ref, bits.get(name), base[name] if base else None)]
        no_factor = factor is None or (factor.dtype, factor.shape) != ("F64", (1,))
        if no_factor or wrong or len(own) < len(stored):
            culprit = ", ".join((wrong or [FACTOR if no_factor else "other parameters than the base's"])[:3])
            problems.append(Problem(folder.uri, f"vector, mask and base do not fit: {culprit}", "merge again"))
        if problems or factor is None:
            return Contents(problems=tuple(problems))
        kept = {name: ref for name, ref in own.items() if not rules.excludes(name)}
        pins = {last_part(pin.uri): pin for pin in folder.files}
        sizes = {name: math.prod(ref.shape) + math.prod(bits[name].shape) for name, ref in own.items()}
        fates = [("merged" if name in kept else "excluded by the recipe", sizes[name]) for name in own]
        fates.append(("merged", 1))  # the factor
        return Contents(
            tuple(pins[name] for name in (*vectors, mask)),
            {name: Source((ref, bits[name], factor)) for name, ref in kept.items()},
            account=account(1 + sum(sizes.values()), fates),
        )

    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return the ranges of vector, mask and factor."""
        if start == stop:
            return ()
        vector, bits, factor = source.tensors
        return (
            Read(vector.object, vector.start + 4 * start, vector.start + 4 * stop),
            Read(bits.object, bits.start + start // 8, bits.start + -(-stop // 8)),
            Read(factor.object, factor.start, factor.start + 8),
        )

    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> Encoded:
        """Return the change in fp32: the vector where the mask is set, times the factor, rounded once."""
        import torch

        from ties_ray.kernels.bits import unpacked

        if start == stop:
            return Encoded(torch.empty(0), "delta")
        sizes = [read.stop - read.start for read in self.reads(source, start, stop)]
        vector, bits, factor = torch.split(torch.cat(list(buffers)), sizes)
        change = vector.clone().view(torch.float32)
        change.masked_fill_(~unpacked(bits, start, stop), 0.0)
        return Encoded(change.mul_(float(factor.clone().view(torch.float64))), "delta")

    def needs(self, source: Source) -> Literal["nothing", "slice", "rows"]:
        """Return `nothing`: it is the change itself."""
        return "nothing"

    def widened(self, source: Source) -> int:
        """Return the bytes of a change in fp32, and of its mask."""
        return 8


def _masks(names: Sequence[str]) -> list[str]:
    return sorted(each.name for each in candidates(names) if each.stem.startswith(HEAD))


def _refs(header: Header, number: int) -> dict[str, TensorRef]:
    return {name: TensorRef(number, info.start, info.dtype, info.shape) for name, info in header.tensors.items()}


def _fits(vector: TensorRef, bits: TensorRef | None, parameter: Parameter | None) -> bool:
    numel = math.prod(vector.shape)
    same = parameter is None or parameter.shape == vector.shape
    return same and vector.dtype == "F32" and bits is not None and (bits.dtype, bits.shape) == ("U8", (-(-numel // 8),))
