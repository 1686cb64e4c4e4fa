"""Small synthetic pools of LoRA adapters in PEFT's layout, with the base they change and the changes in float64."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tests.tools.families import CONFIG, DTYPES, Tensors, file_bytes, write_checkpoint
from ties_ray.stores import Store, join

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
VOCABULARY = 48
UNIT = 2.0**-24
"""Half a unit in the last place of fp32, relative."""
Module = tuple[torch.Tensor, torch.Tensor, float]
"""A (r, in), B (out, r) and alpha; of an embedding A (r, rows) and B (width, r)."""


@dataclass(frozen=True)
class Pool:
    """Where a pool lies, and what is in it."""

    base: str
    adapters: tuple[str, ...]
    base_tensors: Tensors
    deltas: tuple[Tensors, ...]
    """Of each adapter, by base parameter and of its shape: the exact change, in float64."""
    errors: tuple[Tensors, ...]
    """Likewise: by how much the change may differ when it is computed in fp32."""


def make_pool(
    store: Store,
    folder: str,
    *,
    num_adapters: int = 3,
    hidden: int = 16,
    layers: int = 2,
    ranks: Sequence[int] = (8, 16),
    alphas: Sequence[float] = (16, 8),
    targets: Sequence[Sequence[str]] = ((*ATTENTION, *MLP), ("q_proj", "v_proj")),
    variants: Sequence[str] = ("plain",),
    transposed: bool = False,
    dense: bool = True,
    dtype: str = "F32",
    base_dtype: str = "F32",
    size: float = 0.02,
    seed: int = 0,
) -> Pool:
    """Write `folder`/base, a llama that transformers loads, and `folder`/adapter-0000, ... for it.

    ranks, alphas, targets, variants: taken in turn by the adapters; `variants` are plain, rslora, dora. A target is the
    last word of a module: of ATTENTION, MLP, or `embed_tokens`, `lm_head`. size: standard deviation of a change.
    transposed: the base stores its layers as (in, out), as GPT-2 does, and the adapters say fan_in_fan_out.
    dense: form the changes; without them `deltas` and `errors` are empty, and a large pool takes no memory.
    """
    generator = torch.Generator().manual_seed(seed)
    base, config = _llama(generator, hidden, layers, base_dtype)
    if transposed:
        base = {name: each.T.contiguous() if "_proj" in name else each for name, each in base.items()}
    write_checkpoint(store, join(folder, "base"), base, config=config)
    uris, deltas, errors = [], [], []
    for number in range(num_adapters):
        rank, alpha = ranks[number % len(ranks)], alphas[number % len(alphas)]
        wanted, variant = targets[number % len(targets)], variants[number % len(variants)]
        scale = alpha / rank**0.5 if variant == "rslora" else alpha / rank
        modules: dict[str, Module] = {}
        extra: Tensors = {}
        delta: Tensors = {}
        error: Tensors = {}
        for name, weight in base.items():
            path = name.removesuffix(".weight")
            if path.rpartition(".")[2] not in wanted:
                continue
            turned = transposed or path.endswith("embed_tokens")
            a, b = _factors(generator, weight.T if turned else weight, rank, size / scale, dtype)
            modules[path] = (a, b, alpha)
            if not dense:
                continue
            product, rounding = scale * b.double() @ a.double(), rounding_of(a, b, scale)
            delta[name] = product.T.contiguous() if turned else product
            error[name] = rounding.T.contiguous() if turned else rounding
            if variant == "dora":
                norm = weight.double().norm(dim=1)
                magnitude = (norm * (1 + 0.01 * torch.randn(norm.shape, generator=generator))).float()
                extra[f"base_model.model.{path}.lora_magnitude_vector"] = magnitude
                delta[name] = dora(weight, product, magnitude)
                # c * (v + its rounding) - base, with c as far off as the norm of its row is
                moved, error[name] = weight.double() + product, rounding + UNIT * weight.double().abs()
                off = 6 * UNIT + error[name].norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
                error[name] = 2 * (error[name] + off * moved.abs())
        uris.append(join(folder, f"adapter-{number:04}"))
        flags = {"use_rslora": variant == "rslora", "use_dora": variant == "dora", "fan_in_fan_out": transposed}
        write_adapter(store, uris[-1], modules, config={"target_modules": list(wanted), **flags}, extra=extra)
        deltas.append(delta)
        errors.append(error)
    return Pool(join(folder, "base"), tuple(uris), base, tuple(deltas), tuple(errors))


def write_adapter(
    store: Store,
    folder: str,
    modules: Mapping[str, Module],
    *,
    config: Mapping[str, object] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
    prefix: str = "base_model.model.",
    adapter_name: str = "",
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write an adapter; see `adapter_files`. `files` adds to them or replaces them."""
    made = adapter_files(modules, config=config, extra=extra, prefix=prefix, adapter_name=adapter_name)
    for name, data in {**made, **(files or {})}.items():
        store.put(join(folder, name), data)


def adapter_files(
    modules: Mapping[str, Module],
    *,
    config: Mapping[str, object] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
    prefix: str = "base_model.model.",
    adapter_name: str = "",
) -> dict[str, bytes]:
    """Return an adapter's files as PEFT would write them.

    modules: by path; factors keep their dtype. The first one's rank and alpha are the config's, others go into its
    patterns. config: replaces fields of it. extra: further tensors by their full key. adapter_name: left in the keys.
    """
    inner = f".{adapter_name}" if adapter_name else ""
    tensors: Tensors = dict(extra or {})
    for path, (a, b, _) in modules.items():
        if path.endswith(("embed_tokens", "wte")):
            tensors[f"{prefix}{path}.lora_embedding_A{inner}"] = a
            tensors[f"{prefix}{path}.lora_embedding_B{inner}"] = b
        else:
            tensors[f"{prefix}{path}.lora_A{inner}.weight"] = a
            tensors[f"{prefix}{path}.lora_B{inner}.weight"] = b
    settings = {**config_of(modules), **(config or {})}
    return {
        "adapter_config.json": json.dumps(settings, indent=2).encode(),
        "adapter_model.safetensors": file_bytes(tensors),
        "README.md": b"---\nlibrary_name: peft\n---\n# An adapter\n",
    }


def config_of(modules: Mapping[str, Module]) -> dict[str, object]:
    """Return the adapter_config.json of modules, as PEFT writes it where nothing special is used."""
    ranks = {path: a.shape[0] for path, (a, _, _) in modules.items()}
    alphas = {path: alpha for path, (_, _, alpha) in modules.items()}
    r, alpha = next(iter(ranks.values()), 8), next(iter(alphas.values()), 8)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tests/llama",
        "peft_version": "0.21.2", "inference_mode": True, "r": r, "lora_alpha": alpha, "lora_dropout": 0.0,
        "bias": "none", "lora_bias": False, "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted({path.rpartition(".")[2] for path in modules}), "modules_to_save": None,
        "layer_replication": None, "trainable_token_indices": None, "target_parameters": None,
    }  # fmt: skip


def dora(weight: torch.Tensor, product: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Return the exact change of a DoRA module (Liu et al. 2024): rows of weight + product, scaled to `magnitude`."""
    moved = weight.double() + product
    norm: torch.Tensor = moved.norm(dim=1, keepdim=True)
    return magnitude.double()[:, None] / norm * moved - weight.double()


def rounding_of(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return by how much each element of scale * B @ A may be off in fp32: a rounding a rank, of the largest sum."""
    bound: torch.Tensor = (a.shape[0] + 3) * UNIT * abs(scale) * b.double().abs() @ a.double().abs()
    return bound


def _factors(
    generator: torch.Generator, weight: torch.Tensor, rank: int, size: float, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B for a weight (out, in), whose product has elements of about `size`, in the storage dtype."""
    out, width = weight.shape
    a = torch.randn(rank, width, generator=generator) / rank**0.5
    b = torch.randn(out, rank, generator=generator) * size
    return a.to(DTYPES[dtype]), b.to(DTYPES[dtype])


def _llama(generator: torch.Generator, hidden: int, layers: int, dtype: str) -> tuple[Tensors, dict[str, object]]:
    """Return the tensors and the config of a small llama; hidden: a multiple of 4."""
    inner, half = 2 * hidden + 4, hidden // 2
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    for layer in range(layers):
        widths = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (half, hidden),
            "self_attn.v_proj": (half, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in widths.items()}
    tensors = {
        name: ((1 if len(shape) == 1 else 0) + torch.randn(shape, generator=generator) / 8).to(DTYPES[dtype])
        for name, shape in shapes.items()
    }
    config = {
        **CONFIG,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": half, "max_position_embeddings": 64, "vocab_size": VOCABULARY,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }  # fmt: skip
    return tensors, config
