"""A model as the changes it makes: raw fp32 numbers, and a JSON file that says which parameter begins where."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from ties_ray.errors import Problem
from ties_ray.formats import Contents, Folder, Format, Rules, account
from ties_ray.kernels import Encoded
from ties_ray.stores import join
from ties_ray.tensors import Parameter, Read, Source, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

MAP, DATA = "toy.json", "toy.bin"


class Toy(Format):
    """Deltas, ready to be merged; what it does not name it does not change."""

    name: ClassVar[str] = "toy"

    def recognises(self, names: Sequence[str]) -> bool:
        return MAP in names

    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (), (MAP,) if MAP in names else ()

    def read(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> Contents:
        pins = {pin.uri.rpartition("/")[2]: pin for pin in folder.files}
        try:
            starts = {str(name): int(start) for name, start in json.loads(folder.texts[MAP]).items()}
        except (ValueError, RecursionError, AttributeError, TypeError) as error:
            return Contents(problems=(Problem(join(folder.uri, MAP), f"is no map of names to bytes: {error}"),))
        if base is None or starts.keys() - base.keys() or DATA not in pins:
            return Contents(problems=(Problem(folder.uri, "does not belong to this base"),))
        sources = {name: Source((TensorRef(0, start, "F32", base[name].shape),)) for name, start in starts.items()}
        size = sum(base[name].numel for name in starts)
        return Contents((pins[DATA],), sources, account=account(size, [("merged", size)]))

    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        begin = source.tensors[0].start
        return (Read(0, begin + 4 * start, begin + 4 * stop),) if stop > start else ()

    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> Encoded:
        import torch

        values = buffers[0].clone().view(torch.float32) if buffers else torch.empty(0)
        return Encoded(values, "delta")
