"""Small synthetic families: a base and fine-tunes of it, with the facts of real weights that random tensors hide.

An update is sparse-ish and a few units in the last place of the base's dtype, as in real fine-tunes: so many elements
tie at the threshold, cancel exactly or never move.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ties_ray.safetensors import build, canonical_order
from ties_ray.stores import Store, join

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.complex64: "C64", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
Tensors = dict[str, torch.Tensor]
CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 48, "hidden_size": 16,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Where a family lies, and what is in it."""

    base: str
    models: tuple[str, ...]
    base_tensors: Tensors
    model_tensors: tuple[Tensors, ...]


def make_family(
    store: Store,
    folder: str,
    *,
    num_models: int = 3,
    seed: int = 0,
    dtype: str = "BF16",
    model_dtype: str | None = None,
    mixed: bool = False,
    exact: bool = False,
    smooth: bool = False,
    hidden: int = 16,
    layers: int = 2,
    shards: int = 1,
    config: Mapping[str, object] = CONFIG,
) -> Family:
    """Write `folder`/base and `folder`/model-0, ... and return their places and tensors.

    dtype, model_dtype: of the floating-point tensors, as safetensors names them (the models': the base's).
    mixed: F16, BF16, F32 and F64 tensors in turn, with other widths in the models than in the base.
    exact: small binary fractions, so that every sum and product of a merge is exact in any order.
    smooth: updates of any size: in F32 a threshold then takes two counts, elsewhere one, mostly.
    shards: weight files under an index; 1 writes `model.safetensors`.

    Every family has a 0-d, a one-element and an empty tensor, an I64 buffer that only the base holds, a BOOL one that
    all hold, a parameter that never changes and begins with -0.0, elements that cancel exactly between models 0 and 1,
    and updates of few distinct sizes (ties at any threshold).
    """
    generator = torch.Generator().manual_seed(seed)
    base = _base(generator, dtype, mixed=mixed, exact=exact, hidden=hidden, layers=layers)
    models = _models(generator, base, num_models, model_dtype, mixed=mixed, exact=exact, smooth=smooth)
    base["embed.position_ids"] = torch.arange(hidden).reshape(1, -1)
    write_checkpoint(store, join(folder, "base"), base, shards=shards, config=config)
    uris = tuple(join(folder, f"model-{number}") for number in range(num_models))
    for uri, tensors in zip(uris, models, strict=True):
        write_checkpoint(store, uri, tensors, shards=shards, config=config)
    return Family(join(folder, "base"), uris, base, models)


def write_checkpoint(
    store: Store,
    folder: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int = 1,
    config: Mapping[str, object] = CONFIG,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint with config and tokenizer; `files` adds to them or replaces them."""
    names = sorted(tensors)
    if shards == 1:
        store.put(join(folder, "model.safetensors"), file_bytes(tensors))
    else:
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
            weight_map |= dict.fromkeys(part, file)
            store.put(join(folder, file), file_bytes({name: tensors[name] for name in part}))
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        store.put(join(folder, "model.safetensors.index.json"), json.dumps(index, indent=2).encode())
    rows = config.get("vocab_size", 48)
    written = {
        "config.json": json.dumps(config, indent=2).encode(),
        "tokenizer.json": tokenizer_json(rows if isinstance(rows, int) else 48),
        "tokenizer_config.json": json.dumps({"eos_token": "<t1>", "chat_template": "{{ messages }}"}).encode(),
        "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
    }
    for name, data in {**written, **(files or {})}.items():
        store.put(join(folder, name), data)


def tokenizer_json(size: int, prefix: str = "t") -> bytes:
    """Return a tokenizer of `size` tokens `<t0>`, `<t1>`, ..."""
    vocab = {f"<{prefix}{number}>": number for number in range(size)}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab}}).encode()


def file_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return a safetensors file."""
    order = sorted(tensors, key=lambda name: canonical_order(NAMES[tensors[name].dtype], name))
    specs = [(name, NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in order]
    return build(specs, {"format": "pt"}) + b"".join(raw_bytes(tensors[name]) for name in order)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Return the elements as they are stored."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _base(generator: torch.Generator, dtype: str, *, mixed: bool, exact: bool, hidden: int, layers: int) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (48, hidden),
        "model.norm.weight": (hidden,),
        "model.never_changes.weight": (hidden, 3),
        "model.temperature": (),
        "model.single": (1,),
        "model.empty": (0, hidden),
        "lm_head.weight": (48, hidden),
    }
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = (hidden, hidden)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (2 * hidden + 1, hidden)
        shapes[f"model.layers.{layer}.norm.bias"] = (hidden,)
    widths: Sequence[str] = ("BF16", "F32", "F16", "F64") if mixed else (dtype,)
    tensors: Tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) / 8
        if exact:
            values = (values * 16).round() / 16
        tensors[name] = values.to(DTYPES[widths[number % len(widths)]])
    tensors["model.never_changes.weight"].view(-1)[0] = -0.0
    tensors["model.mask"] = torch.rand(hidden, generator=generator) < 0.5
    return tensors


def _models(
    generator: torch.Generator,
    base: Tensors,
    num_models: int,
    dtype: str | None,
    *,
    mixed: bool,
    exact: bool,
    smooth: bool,
) -> tuple[Tensors, ...]:
    models: tuple[Tensors, ...] = tuple({} for _ in range(num_models))
    widths = ("F32", "BF16", "F64", "F16", "F32")
    for number, (name, tensor) in enumerate(base.items()):
        stored = DTYPES[dtype] if dtype else DTYPES[widths[number % len(widths)]] if mixed else tensor.dtype
        steps = torch.zeros((num_models, *tensor.shape), dtype=torch.float64)
        if tensor.is_floating_point() and name != "model.never_changes.weight":
            sizes = torch.tensor([0, 0, 0, 1, 1, 2, 4], dtype=torch.float64)
            chosen = torch.randint(len(sizes), steps.shape, generator=generator)
            signs = torch.randint(2, steps.shape, generator=generator) * 2 - 1
            steps = sizes[chosen] * signs
            if smooth:
                steps *= 100_000 * torch.rand(steps.shape, generator=generator, dtype=torch.float64)
            if num_models > 1:
                cancels = torch.rand(tensor.shape, generator=generator) < 0.1
                steps[1] = torch.where(cancels, -steps[0], steps[1])
        for model, step in zip(models, steps, strict=True):
            if not tensor.is_floating_point():
                model[name] = tensor.clone()
            elif not step.any():
                model[name] = tensor.to(stored)
            else:
                unit = 1 / 16 if exact else tensor.double().abs().clamp(min=2.0**-10) * torch.finfo(tensor.dtype).eps
                model[name] = (tensor.double() + step * unit).to(stored)
    return models
