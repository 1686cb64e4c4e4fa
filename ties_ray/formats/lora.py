"""A LoRA adapter (Hu et al. 2022) as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

The change of a linear module is scale * B @ A with A (r, in) and B (out, r). The scale is alpha / r, or alpha / sqrt(r)
for rsLoRA (Kalajdzievski 2023), with the module's own r and alpha. The tensors decide the modules and their ranks, the
config decides the scale alone; a config of another rank is refused. Nothing is guessed: a tensor that is no factor and
not harmless is refused, with a reason of `REASONS`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from ties_ray.formats import BY_RANK, Account, Contents, Folder, Format, Rules, account
from ties_ray.formats._lora_config import config_of, settings_of
from ties_ray.formats._lora_experts import EXPERT
from ties_ray.formats._lora_modules import TRAINING_ONLY, Adapter, factors_of, shape_of, stored_modules
from ties_ray.formats._lora_refusals import CONFIG as CONFIG
from ties_ray.formats._lora_refusals import PICKLE, Refusals
from ties_ray.formats._lora_refusals import REASONS as REASONS
from ties_ray.formats._lora_refusals import WEIGHTS as WEIGHTS
from ties_ray.kernels import Encoded, Factors
from ties_ray.safetensors import DTYPE_BITS, TensorInfo, nbytes
from ties_ray.stores import last_part
from ties_ray.tensors import Parameter, Read, Source, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

    from ties_ray.kernels import Stored


class Lora(Format):
    """A model stored as low-rank changes of a base."""

    name = "lora"
    whole = False
    on_any_device = True

    def recognises(self, names: Sequence[str]) -> bool:
        """Return whether there is a PEFT config, or weights under PEFT's name."""
        return CONFIG in names or WEIGHTS in names

    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the weights and the config; without weights any safetensors, whose keys show another tool's work."""
        weights = [name for name in names if name == WEIGHTS] or [
            name for name in names if name.endswith(".safetensors") and not name.startswith(".")
        ]
        return tuple(weights), tuple(name for name in names if name == CONFIG)

    def read(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> Contents:
        """Return a source for each parameter that the adapter changes, checked against config and base."""
        refused = Refusals()
        config = config_of(folder, refused)
        pins = {last_part(pin.uri): pin for pin in folder.files}
        if WEIGHTS not in pins:
            refused.add("pickle" if PICKLE in pins else "weights_missing")
        if WEIGHTS not in pins or "peft_type" in refused or "prompt" in refused:  # the rest would follow from it
            return Contents(problems=refused.problems(folder.uri))
        modules, saved = stored_modules(folder.headers[WEIGHTS].tensors, refused)
        settings = settings_of(config, factors_of(modules), modules, refused)
        adapter = Adapter(settings, modules, saved, base, rules, refused)
        for path, parts in modules.items():
            adapter.add_module(path, parts)
        for key, (name, ref) in saved.items():
            adapter.add_saved(key, name, ref)
        if not modules:
            refused.add("nothing")
        problems = refused.problems(folder.uri, {*adapter.sources, *(base or ())})
        if problems:
            return Contents(problems=problems)
        notes = tuple(f"{folder.uri}: {note}" for note in adapter.notes())
        if folder.nested:
            inside = ", ".join(folder.nested)
            notes += (f"{folder.uri}: further adapters lie in it, each to be named by its own path: {inside}",)
        return Contents(
            (pins[WEIGHTS],),
            adapter.sources,
            untied=adapter.untied,
            notes=notes,
            kinds=adapter.kinds,
            called=adapter.called,
            heads=adapter.heads,
            facts=adapter.facts(),
            account=_account(folder.headers[WEIGHTS].tensors, adapter),
        )

    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return the rows of a linear module's B and its whole A; both whole where the parameter is stored transposed.

        Whole tensors that lie together come in one read.
        """
        return _joined(_pieces(source, start, stop))

    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> "Stored":
        """Return fp32 factors of the rows that the slice touches, or elements of a tensor that was saved whole."""
        import torch  # here, so that planning does not wait for it

        device = buffers[0].device if buffers else None
        dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        pieces = _pieces(source, start, stop)
        stored = []
        for ref, piece in zip(source.tensors, pieces, strict=False):
            (data,) = (
                buffer[piece.start - read.start : piece.stop - read.start]
                for read, buffer in zip(_joined(pieces), buffers, strict=True)
                if read.start <= piece.start and piece.stop <= read.stop
            )
            dtype = dtypes[ref.dtype]
            aligned = data.storage_offset() % dtype.itemsize == 0 == data.data_ptr() % dtype.itemsize
            stored.append((data if aligned else data.clone()).view(dtype))
        if source.encoding == "dense":
            return Encoded(stored[0] if stored else torch.empty(0, dtype=dtypes[source.tensors[0].dtype]))
        numbers = dict(source.numbers)
        scale = numbers["scale"]
        if len(source.tensors) == 1:  # a bias: rows of one element
            values = stored[0].float() if stored else torch.empty(0)
            return Factors(values.reshape(-1, 1), torch.ones(1, 1, device=device), scale, 0)
        rank, columns = source.tensors[0].shape[0], shape_of(source)[1]
        if not stored:
            return Factors(torch.empty(0, rank), torch.empty(rank, columns), scale, 0)
        first, last = start // columns, -(-stop // columns)
        if "transposed" in numbers:
            left = torch.empty(last - first, rank, device=device)
            left.copy_(stored[0].reshape(rank, -1)[:, first:last].T)
            right = torch.empty(rank, columns, device=device).copy_(stored[1].reshape(columns, rank).T)
            return Factors(_weighed(left, source), right, scale, start - first * columns)
        left, right = stored[1].float().reshape(-1, source.tensors[1].shape[1]), stored[0].float().reshape(rank, -1)
        if EXPERT in numbers:
            left = left.reshape(len(left), rank, -1)[:, :, int(numbers[EXPERT])].contiguous()
        left = _weighed(left, source)
        magnitude = stored[2].float() if len(stored) > 2 else None
        return Factors(left, right, scale, start - first * columns, magnitude)

    def needs(self, source: Source) -> Literal["nothing", "slice", "rows"]:
        """Return `rows` for DoRA, which scales rows by their norms, and `slice` for a tensor that was saved whole."""
        if source.encoding == "dense":
            return "slice"
        return "rows" if len(source.tensors) > 2 else "nothing"

    def shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape of the parameter that the factors change."""
        return shape_of(source)

    def rank(self, source: Source) -> int:
        """Return the rank of a module's factors; 0 for DoRA, whose change is no product, and for whole tensors."""
        plain = source.encoding == "factors" and len(source.tensors) == 2
        return source.tensors[0].shape[0] if plain else 0

    def decoded_bytes(self, source: Source) -> int:
        """Return the bytes of the factors as read, once more aligned, decoded, and weighed by rank."""
        if source.encoding == "dense":
            return 0
        weighed = 4 * math.prod(source.tensors[1].shape) if BY_RANK in dict(source.numbers) else 0
        return weighed + sum(2 * nbytes(ref.dtype, ref.shape) + 4 * math.prod(ref.shape) for ref in source.tensors)


def _weighed(left: "Tensor", source: Source) -> "Tensor":
    """Return the left factor (rows, r) with each column times the weight of its rank, if there are weights."""
    import torch

    weights = [value for name, value in source.numbers if name == BY_RANK]
    return left * torch.tensor(weights, dtype=torch.float32, device=left.device) if weights else left


def _account(stored: Mapping[str, TensorInfo], adapter: Adapter) -> Account:
    """Return the account of an adapter that is not refused."""
    merged = {ref.start for source in adapter.sources.values() for ref in source.tensors}
    heads = {ref.start for ref in adapter.heads.values()}
    fates = []
    for key, info in stored.items():
        fate = "excluded by the recipe"
        if info.start in merged:
            fate = "merged"
        elif info.start in heads:
            fate = "carried along: all models have the same"
        elif key in adapter.copies:
            fate = "copies of base layers"
        elif TRAINING_ONLY.fullmatch(key):
            fate = "used in training only"
        fates.append((fate, math.prod(info.shape)))
    return account(sum(elements for _, elements in fates), fates)


@lru_cache(4096)  # a worker asks several times, and adapters of one layout have the same
def _pieces(source: Source, start: int, stop: int) -> tuple[Read, ...]:
    """Return the range of each tensor that elements [start, stop) need."""
    if start == stop:
        return ()
    if len(source.tensors) == 1:
        return (_part(source.tensors[0], start, stop)._replace(shared=False),)
    columns = shape_of(source)[1]
    rows = (start // columns, -(-stop // columns))
    whole = tuple(_part(ref, 0, math.prod(ref.shape)) for ref in source.tensors[:2])
    if "transposed" in dict(source.numbers):
        return whole
    widths = (source.tensors[1].shape[1], 1)
    return whole[0], *(
        _part(ref, rows[0] * width, rows[1] * width) for ref, width in zip(source.tensors[1:], widths, strict=False)
    )


def _part(ref: TensorRef, start: int, stop: int) -> Read:
    """Return the read of elements [start, stop) of a tensor; a whole tensor is shared by all slices."""
    width = DTYPE_BITS[ref.dtype] // 8
    whole = (start, stop) == (0, math.prod(ref.shape))
    return Read(ref.object, ref.start + start * width, ref.start + stop * width, shared=whole)


@lru_cache(4096)
def _joined(pieces: tuple[Read, ...]) -> tuple[Read, ...]:
    """Return the pieces in the order of the file; neighbours become one, if both or neither are shared."""
    joined: list[Read] = []
    for piece in sorted(pieces):
        last = joined[-1] if joined else None
        if last and (last.object, last.stop, last.shared) == (piece.object, piece.start, piece.shared):
            joined[-1] = last._replace(stop=piece.stop)
        else:
            joined.append(piece)
    return tuple(joined)
