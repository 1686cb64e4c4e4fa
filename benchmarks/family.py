"""Make families shaped like real ones: Llama-style checkpoints in bf16, sharded, with fine-tunes of a few ulps.

    python -m benchmarks.family FOLDER --models 8 --size 20M

A third of the values of each fine-tune differ from the base. What is there already is not made again.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import torch

from ties_ray.safetensors import build, canonical_order


class Shape(NamedTuple):
    """What decides the tensors of a Llama-style model."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int


SHAPES = {
    "1M": Shape(64, 176, 2, 4_000),
    "20M": Shape(256, 688, 8, 32_000),
    "60M": Shape(512, 1408, 8, 32_000),
    "200M": Shape(1024, 2816, 10, 32_000),
    "1B": Shape(2048, 5632, 20, 32_000),
}
"""About so many parameters."""


def tensors_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor."""
    hidden, inner = shape.hidden, shape.intermediate
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{prefix}.self_attn.{name}.weight"] = (hidden, hidden)
        found[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        found[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        found[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        found[f"{prefix}.input_layernorm.weight"] = (hidden,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (shape.vocabulary, hidden)}


def config_of(shape: Shape) -> dict[str, object]:
    """Return a config.json that transformers understands."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 64,
        "num_key_value_heads": shape.hidden // 64,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def values(name: str, size: tuple[int, ...], model: int | None) -> torch.Tensor:
    """Return a tensor of the base (model None), or of a fine-tune: a third of its values moved by a few ulps."""
    generator = torch.Generator().manual_seed(hash_of(name))
    base = torch.randn(size, generator=generator).mul_(0.02) if len(size) > 1 else torch.ones(size)
    if model is not None:
        generator.manual_seed(hash_of(f"{name} {model}"))
        base += torch.randn(size, generator=generator).mul_(1e-4)
    return base.to(torch.bfloat16)


def hash_of(text: str) -> int:
    """Return a seed that is the same in every process."""
    return zlib.crc32(text.encode())


def write_model(folder: Path, shape: Shape, model: int | None, num_files: int) -> None:
    """Write one checkpoint: config, a toy tokenizer, weights in `num_files` files under an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nSynthetic weights for trying out a merge.\n")
    weight_map: dict[str, str] = {}
    for number, names in enumerate(dealt(shape, num_files), start=1):
        file = f"model-{number:05d}-of-{num_files:05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        sizes = tensors_of(shape)
        ordered = sorted(names, key=lambda name: canonical_order("BF16", name))
        with (folder / file).open("wb") as out:
            out.write(build([(name, "BF16", sizes[name]) for name in ordered], {"format": "pt"}))
            for name in ordered:
                out.write(values(name, sizes[name], model).view(torch.uint8).numpy().data)
    total = sum(2 * torch.Size(size).numel() for size in tensors_of(shape).values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def dealt(shape: Shape, num_files: int) -> Iterator[list[str]]:
    """Yield the names of each file: neighbours together, sizes about equal."""
    sizes = {name: torch.Size(size).numel() for name, size in tensors_of(shape).items()}
    total, filled, number = sum(sizes.values()), 0, 1
    group: list[str] = []
    for name, size in sizes.items():
        if group and filled + size / 2 > total * number / num_files and number < num_files:
            yield group
            group, number = [], number + 1
        group.append(name)
        filled += size
    yield group


def write_family(folder: Path, size: str, num_models: int, num_files: int = 3) -> list[Path]:
    """Write `base`, `model-0`, ... that are not there yet; return the models' folders."""
    torch.set_num_threads(1)
    models = [folder / f"model-{number}" for number in range(num_models)]
    for number, path in [(None, folder / "base"), *enumerate(models)]:
        if not (path / "model.safetensors.index.json").exists():
            write_model(path, SHAPES[size], number, num_files)
    return models


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--models", default=8, show_default=True)
@click.option("--size", type=click.Choice(list(SHAPES)), default="20M", show_default=True)
def main(folder: Path, models: int, size: str) -> None:
    """Write a family into FOLDER."""
    write_family(folder, size, models)


if __name__ == "__main__":
    main()
