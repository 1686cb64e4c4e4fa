"""A checkpoint with a LoRA adapter added to it: the adapter is applied slice by slice, and no such model is written.

No folder is of this format. The recipe names both, and `combined` makes one model of what their formats found.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ties_ray.errors import Problem, enumerated
from ties_ray.formats import Account, Composed, Contents
from ties_ray.formats.dcp import Dcp
from ties_ray.formats.lora import Lora
from ties_ray.kernels import Encoded, Factors, Kernels, load
from ties_ray.tensors import Read, Source

if TYPE_CHECKING:
    from torch import Tensor

DENSE = "dense_tensors"
"""Number of a source: how many of its tensors are the checkpoint's. Those of the adapter come after them."""
_CHECKPOINT, _LORA = Dcp(), Lora()


class Adapted(Composed):
    """A model whose values are those of a checkpoint plus scale * B @ A, rounded once to fp32."""

    name = "adapted"

    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return the ranges of the checkpoint's values, then those of the factors."""
        values, factors = _parts(source)
        return _CHECKPOINT.reads(values, start, stop) + (_LORA.reads(factors, start, stop) if factors else ())

    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> Encoded:
        """Return the values as stored, or with the adapter's change as fp32 (fp64 where they are stored in F64)."""
        import torch  # here, so that planning does not wait for it

        values, factors = _parts(source)
        if factors is None or start == stop:
            return _CHECKPOINT.encoded(values, start, stop, buffers)
        sizes = [read.stop - read.start for read in self.reads(source, start, stop)]
        pieces = torch.split(torch.cat(list(buffers)), sizes)
        of_values = len(_CHECKPOINT.reads(values, start, stop))
        stored = _CHECKPOINT.encoded(values, start, stop, pieces[:of_values]).data
        change = _LORA.encoded(factors, start, stop, pieces[of_values:])
        assert isinstance(change, Factors)
        product = torch.empty(stop - start)
        _kernels().delta(change, product, product)
        return Encoded(product + stored)  # in fp32, or in fp64 where one side is

    def decoded_bytes(self, source: Source) -> int:
        """Return the bytes of the factors as read, aligned and decoded."""
        _, factors = _parts(source)
        return _LORA.decoded_bytes(factors) if factors else 0

    def widened(self, source: Source) -> int:
        """Return the bytes of the sum and of the change in fp32, for each element."""
        return 8 if DENSE in dict(source.numbers) else 0


@functools.cache
def _kernels() -> Kernels:
    return load("cpu")


def _parts(source: Source) -> tuple[Source, Source | None]:
    """Return the checkpoint's source, and the adapter's where it changes the parameter."""
    numbers = dict(source.numbers)
    if DENSE not in numbers:
        return source, None
    count = int(numbers.pop(DENSE))
    return Source(source.tensors[:count]), Source(source.tensors[count:], tuple(numbers.items()), "factors")


def combined(checkpoint: Contents, adapter: Contents, uri: str) -> Contents:
    """Return the model of a checkpoint and an adapter of it. uri: the adapter's, for messages.

    Its problems name what can't be added slice by slice.
    """
    if problems := (*checkpoint.problems, *adapter.problems, *_problems(checkpoint, adapter, uri)):
        return Contents(problems=tuple(problems))
    sources, shift = dict(checkpoint.sources), len(checkpoint.objects)
    for name, factors in adapter.sources.items():
        values = sources[name]
        moved = tuple(ref._replace(object=ref.object + shift) for ref in factors.tensors)
        numbers = (*factors.numbers, (DENSE, float(len(values.tensors))))
        sources[name] = Source(values.tensors + moved, numbers, "dense")
    return replace(
        checkpoint,
        objects=checkpoint.objects + adapter.objects,
        sources=sources,
        notes=(*checkpoint.notes, *adapter.notes, f"{uri}: this adapter is added to it"),
        facts={**checkpoint.facts, "adapter": uri},
        account=_sum(checkpoint.account, adapter.account),
    )


def _problems(checkpoint: Contents, adapter: Contents, uri: str) -> Iterator[Problem]:
    """Yield why the adapter can't be added slice by slice."""
    if checkpoint.problems or adapter.problems:
        return
    whole = [name for name, source in adapter.sources.items() if source.encoding == "dense"]
    scaled = [name for name, source in adapter.sources.items() if len(source.tensors) > 2]
    lacking = [
        name
        for name, source in adapter.sources.items()
        if name not in checkpoint.sources or not _fits(checkpoint.sources[name], source)
    ]
    aside = [name for name in adapter.sources if checkpoint.sources.get(name, Source(())).numbers]
    for names, message in (
        (aside, "changes tensors that its model stores in parts"),
        ([*whole, *adapter.untied], "saves whole tensors"),
        (scaled, "is DoRA, which scales the rows of its model"),
        (lacking, "changes tensors that its model lacks, or that have other rows there"),
    ):
        if names:
            remedy = "merge it into its model first (merge_and_unload), and give that model"
            yield Problem(uri, f"{message}: {enumerated(names)}", remedy, "not_added")


def _fits(values: Source, factors: Source) -> bool:
    """Return whether the checkpoint stores as many elements as the factors change."""
    return sum(math.prod(ref.shape) for ref in values.tensors) == math.prod(_LORA.shape(factors))


def _sum(first: Account, second: Account) -> Account:
    """Return the account of what two folders store."""
    return Account(
        first.stored + second.stored,
        first.merged + second.merged,
        first.equal + second.equal,
        first.tied + second.tied,
        first.aside + second.aside,
    )
