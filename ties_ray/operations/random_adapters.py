"""Random twins of adapters: the same modules, ranks and norms, and nothing of what was learned.

A merge of twins is a control. What it does as well as a merge of the adapters is no merit of the adapters.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ties_ray.errors import InputError, Problem
from ties_ray.formats.lora import CONFIG, WEIGHTS
from ties_ray.inputs.catalog import THREADS
from ties_ray.inputs.expand import BASE, expand
from ties_ray.kernels.randomness import MASK, key, philox
from ties_ray.libraries.loaders import CARD_NAME
from ties_ray.recipe.parse import validate, with_absolute_paths
from ties_ray.reports.records import Progress, Report, Watch
from ties_ray.safetensors import Header, TensorInfo, header_bytes, parse
from ties_ray.stores import Stores, absolute, join, last_part

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 2**33
"""The most bytes of an adapter's weights."""
CARD = """# A random adapter

Its matrices are random numbers. Each module has the norm that it has in {uri}. Seed {seed}.
It is a control for merges, made by `ties-ray randomise`.
"""


class Twin(Report):
    """A random adapter."""

    model: str
    """Folder of the adapter whose norms it has."""
    output: str
    """Its own folder."""
    modules: int
    norm: float
    """Frobenius norm of all its changes, before the scale."""


class Twins(Report):
    """Random adapters."""

    folder: str
    seed: int
    twins: list[Twin]


def randomise(
    stores: Stores, models: Sequence[str], folder: str, *, seed: int = 0, watch: Watch = lambda progress: None
) -> Twins:
    """Write a random twin of each adapter into a folder, under the name of the adapter's folder.

    models: folders or globs. The twin's factors are uniform random numbers by seed, model's name, tensor and position.
    Each second factor is scaled so that the module's norm is the adapter's. Raises `InputError` for what is no plain
    LoRA adapter.
    """
    output = absolute(folder).rstrip("/")
    data = {"models": list(models), "method": "average", "output": {"path": output, "kind": "delta"}}
    recipe = validate(with_absolute_paths(validate(data).model_dump(mode="json")))
    with ThreadPoolExecutor(THREADS) as threads:
        entries = [entry for entry in expand(recipe, stores, threads).entries if entry.id != BASE]
    names = [last_part(entry.uri) for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(Problem("models", f"two folders are called {twice[0]!r}", "randomise them in two calls"))
    twins = []
    for number, (entry, name) in enumerate(zip(entries, names, strict=True)):
        watch(Progress("randomise", number, len(entries), 0, 0, activity="adapters"))
        twins.append(_twin(stores, entry.uri, join(output, name), name, seed))
    return Twins(folder=output, seed=seed, twins=twins)


def _twin(stores: Stores, uri: str, output: str, name: str, seed: int) -> Twin:
    import torch

    store, writer = stores.of(uri), stores.writer(output)
    try:
        config, data = store.get(join(uri, CONFIG), 2**20)[1], bytearray(store.get(join(uri, WEIGHTS), LARGEST)[1])
    except FileNotFoundError:
        raise InputError(Problem(uri, f"holds no {CONFIG} and {WEIGHTS}", "give the folder of an adapter")) from None
    header = parse(bytes(data[: header_bytes(bytes(data[:8]), len(data), uri)]), len(data), uri)
    norm2 = 0.0
    pairs = _pairs(header, uri)
    for first, second in pairs:
        a, b = _values(data, header.tensors[first]), _values(data, header.tensors[second])
        wanted2 = _norm2(a.double(), b.double())
        ours = [_uniform(seed, name, each, values.shape) for each, values in ((first, a), (second, b))]
        own2 = _norm2(ours[0].to(a.dtype).double(), ours[1])
        scaled = ours[1] * math.sqrt(wanted2 / own2) if own2 else ours[1] * 0
        a.copy_(ours[0])
        b.copy_(scaled)
        norm2 += _norm2(a.double(), b.double())
        if not torch.isfinite(b).all():
            raise InputError(Problem(uri, f"the norm of {second} is not finite", "leave this adapter out"))
    writer.put(join(output, CARD_NAME), CARD.format(uri=uri, seed=seed).encode())
    writer.put(join(output, CONFIG), config)
    writer.put(join(output, WEIGHTS), bytes(data))
    return Twin(model=uri, output=output, modules=len(pairs), norm=float(f"{math.sqrt(norm2):.6g}"))


def _pairs(header: Header, uri: str) -> list[tuple[str, str]]:
    """Return the names of both factors of each module. Raises `InputError` where other tensors are stored."""
    pairs, left = [], set(header.tensors)
    for name in sorted(header.tensors):
        other = name.replace(".lora_A.", ".lora_B.")
        if other != name and other in left and len(header.tensors[name].shape) == 2:
            pairs.append((name, other))
            left -= {name, other}
    if left or not pairs:
        stored = min(left) if left else "nothing"
        message = f"stores {stored}, and only pairs of two-dimensional lora_A and lora_B have random twins"
        raise InputError(Problem(uri, message, "leave this adapter out"))
    return pairs


def _values(data: bytearray, info: TensorInfo) -> "Tensor":
    """Return the values of a tensor in the file's bytes; writing to them writes there."""
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    count = math.prod(info.shape)
    return torch.frombuffer(data, dtype=dtypes[info.dtype], count=count, offset=info.start).reshape(info.shape)


def _uniform(seed: int, name: str, tensor: str, shape: "Sequence[int]") -> "Tensor":
    """Return uniform numbers in (-1, 1), fp64, each by its position alone."""
    import torch

    count = math.prod(shape)
    positions = torch.arange(-(-count // 4))
    zero = torch.zeros_like(positions)
    words = philox((positions & MASK, positions >> 32, zero, zero), key(seed, name, tensor))
    return ((torch.stack(words, 1).flatten()[:count].double() + 0.5) / 2**31 - 1).reshape(tuple(shape))


def _norm2(a: "Tensor", b: "Tensor") -> float:
    """Return the squared Frobenius norm of b @ a (fp64), from products as wide as the rank."""
    return float(((b.T @ b) * (a @ a.T)).sum())
