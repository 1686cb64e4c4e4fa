"""The SHA-256 of what some 40 small recipes give: it stays the same as long as the arithmetic is called `exact-1`.

Integers make the inputs, so that they have the same bits on every machine. Outputs in which LAPACK takes part are not
here: their bits belong to one library build. `python -m tests.promises.test_golden` writes the digests anew. Do that
for new recipes only, and look at the change of `golden.json`: no line that exists may change.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tools.adapters import write_adapter
from tests.tools.families import CONFIG, DTYPES, Tensors, write_checkpoint
from ties_ray.kernels import ARITHMETICS
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores

DIGESTS = Path(__file__).with_name("golden.json")
SHAPES = {
    "model.embed_tokens.weight": (48, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (8, 16),
    "model.layers.0.mlp.up_proj.weight": (33, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 33),
    "model.layers.0.norm.weight": (16,),
    "model.still.weight": (16, 3),
    "model.temperature": (),
    "model.empty": (0, 16),
    "lm_head.weight": (48, 16),
}
MODULES = ("q_proj", "k_proj", "up_proj", "down_proj", "embed_tokens")


def fractions(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return fp64 numbers in [-0.5, 0.5) with 24 bits each, the same on every machine."""
    raw = np.random.PCG64(seed).random_raw(max(1, int(np.prod(shape)))) >> np.uint64(40)
    return torch.from_numpy(raw.astype(np.float64)[: int(np.prod(shape))] * 2.0**-24 - 0.5).reshape(shape)


def write_family(folder: Path, dtypes: tuple[str, ...], model_dtypes: tuple[str, ...], num_models: int) -> None:
    """Write a base and its fine-tunes; the dtypes are taken in turn by the tensors."""
    base: Tensors = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        base[name] = fractions(number, shape).to(DTYPES[dtypes[number % len(dtypes)]])
    stores = Stores({})
    store = stores.of(str(folder))
    buffers = {"model.mask": torch.arange(16) % 3 == 0, "model.positions": torch.arange(16).reshape(1, -1)}
    write_checkpoint(store, str(folder / "base"), {**base, **buffers})
    for model in range(num_models):
        tensors = dict(buffers)
        for number, (name, value) in enumerate(base.items()):
            stored = DTYPES[model_dtypes[number % len(model_dtypes)]]
            moved = fractions(1000 * (model + 1) + number, SHAPES[name])
            unit = 2.0**-6 if model % 2 else 2.0**-9  # multiples of it tie at thresholds and cancel between models
            step = (moved * 8).round() * unit if name != "model.still.weight" else torch.zeros_like(moved)
            tensors[name] = (value.double() + step).to(stored)
        write_checkpoint(store, str(folder / f"model-{model:02}"), tensors)


def write_pool(folder: Path, variant: str, dtype: str) -> None:
    """Write a base in float32 and four adapters of it; `variant` is plain, rslora or dora."""
    base = {name: fractions(number, shape).float() for number, (name, shape) in enumerate(SHAPES.items())}
    store = Stores({}).of(str(folder))
    write_checkpoint(store, str(folder / "base"), base)
    for number in range(4):
        rank, modules, extra = (4, 8)[number % 2], {}, {}
        for place, name in enumerate(sorted(base)):
            path = name.removesuffix(".weight")
            word = path.rpartition(".")[2]
            if word not in MODULES[: 5 - number] or (variant == "dora" and word == "embed_tokens"):
                continue
            out, width = SHAPES[name] if word != "embed_tokens" else SHAPES[name][::-1]
            a = fractions(10_000 * (number + 1) + place, (rank, width)).to(DTYPES[dtype])
            b = (fractions(20_000 * (number + 1) + place, (out, rank)) / 8).to(DTYPES[dtype])
            modules[path] = (a, b, 16.0)
            if variant == "dora":
                magnitude = 1 + fractions(30_000 * (number + 1) + place, (out,)).float() / 4
                extra[f"base_model.model.{path}.lora_magnitude_vector"] = magnitude
        config = {"use_rslora": variant == "rslora", "use_dora": variant == "dora"}
        write_adapter(store, str(folder / f"model-{number:02}"), modules, config=config, extra=extra)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "bf16": lambda folder: write_family(folder, ("BF16",), ("BF16",), 5),
    "fp16": lambda folder: write_family(folder, ("F16",), ("F16",), 4),
    "fp32": lambda folder: write_family(folder, ("F32",), ("F32",), 4),
    "fp64": lambda folder: write_family(folder, ("F64",), ("F64",), 3),
    "mixed": lambda folder: write_family(
        folder, ("BF16", "F32", "F16", "F64"), ("F32", "BF16", "F64", "F16", "F32"), 4
    ),
    "many": lambda folder: write_family(folder, ("BF16",), ("BF16",), 35),
    "lora": lambda folder: write_pool(folder, "plain", "BF16"),
    "rslora": lambda folder: write_pool(folder, "rslora", "F32"),
    "dora": lambda folder: write_pool(folder, "dora", "F32"),
}
TIES: dict[str, Any] = {"name": "ties", "density": 0.2, "lambda": 1.5}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("bf16", {"method": "average"}),
    "average of weights": ("fp16", {"method": "average", "weights": [1, 0.5, 2, -0.25]}),
    "average in float32": ("fp32", {"method": "average"}),
    "average in float64": ("fp64", {"method": "average"}),
    "average of mixed dtypes": ("mixed", {"method": "average"}),
    "average of many": ("many", {"method": "average"}),
    "average written as float32": ("bf16", {"method": "average", "output": {"dtype": "float32"}}),
    "average written as float16": ("fp32", {"method": "average", "output": {"dtype": "float16"}}),
    "average in small files": ("bf16", {"method": "average", "output": {"file_size": 2000}}),
    "average as a delta": ("mixed", {"method": "average", "output": {"kind": "delta"}}),
    "task arithmetic": ("bf16", {"method": {"name": "task_arithmetic", "lambda": 0.3}}),
    "task arithmetic of weights": ("mixed", {"method": "task_arithmetic", "weights": [0.5, -0.5, 0.25, 0]}),
    "task arithmetic in float64": ("fp64", {"method": {"name": "task_arithmetic", "lambda": 0.3}}),
    "ties": ("bf16", {"method": TIES}),
    "ties in float16": ("fp16", {"method": TIES}),
    "ties in float32": ("fp32", {"method": TIES}),
    "ties in float64": ("fp64", {"method": TIES}),
    "ties of mixed dtypes": ("mixed", {"method": TIES}),
    "ties of many": ("many", {"method": TIES}),
    "ties of many, weighted": ("many", {"method": TIES, "weights": [1 + n / 16 for n in range(35)]}),
    "ties without a trim": ("bf16", {"method": {**TIES, "density": 1}}),
    "ties, one threshold a tensor": ("bf16", {"method": {**TIES, "trim": "tensor"}}),
    "ties, tied values dropped": ("bf16", {"method": {**TIES, "at_threshold": "drop"}}),
    "ties, zero sums by majority": ("bf16", {"method": {**TIES, "zero_sum": "majority", "density": 0.7}}),
    "ties, zero sums positive": ("fp32", {"method": {**TIES, "zero_sum": "positive", "density": 0.7}}),
    "ties, summed": ("bf16", {"method": {**TIES, "merge": "sum"}, "weights": [1, -1, 0.5, 2, 1]}),
    "ties, largest value": ("mixed", {"method": {**TIES, "merge": "max"}}),
    "ties as its authors' code": ("bf16", {"method": {**TIES, "profile": "official"}}),
    "ties with densities": ("fp16", {"method": TIES, "densities": [0.1, 0.5, 1, None]}),
    "ties with exclusions": ("bf16", {"method": TIES, "exclude": ["*embed*", "*norm*"]}),
    "ties as a delta": ("bf16", {"method": TIES, "output": {"kind": "delta", "dtype": "bfloat16"}}),
    "dare": ("bf16", {"method": {"name": "dare", "density": 0.3, "lambda": 0.5}}),
    "dare with another seed": ("bf16", {"method": {"name": "dare", "density": 0.3, "seed": 7}}),
    "dare with an election": ("mixed", {"method": {"name": "dare", "density": 0.6, "combine": "ties"}}),
    "consensus": ("bf16", {"method": "consensus"}),
    "consensus of three": ("fp32", {"method": {"name": "consensus", "bound": 0.2, "agree": 3, "lambda": 0.4}}),
    "consensus of many": ("many", {"method": {"name": "consensus", "bound": 0.01, "agree": 1}}),
    "adapters, average": ("lora", {"method": "average"}),
    "adapters, average of those that have a module": (
        "lora", {"method": {"name": "average", "missing_module": "skip"}, "weights": [1, 2, 0.5, 1]}
    ),
    "adapters, ties": ("lora", {"method": TIES}),
    "adapters, ties over the union": ("lora", {"method": {**TIES, "denominator": "union"}}),
    "adapters, ties as a delta": ("rslora", {"method": TIES, "output": {"kind": "delta"}}),
    "adapters, dare": ("rslora", {"method": {"name": "dare", "density": 0.4}}),
    "adapters with magnitudes, ties": ("dora", {"method": TIES}),
    "adapters with magnitudes, consensus": ("dora", {"method": "consensus"}),
}  # fmt: skip


def merged(folder: Path, place: Path, *, weights: Any = None, densities: Any = None, **more: Any) -> dict[str, str]:
    """Merge a family; return the SHA-256 of each weight file and of the index."""
    entries: list[dict[str, Any]] = [{"path": str(path)} for path in sorted(folder.glob("model-*"))]
    for key, values in (("weight", weights), ("density", densities)):
        for entry, value in zip(entries, values or (), strict=bool(values)):
            entry[key] = value
    written = {"path": str(place), **more.pop("output", {})}
    merging.merge(
        validate(
            {"base": str(folder / "base"), "models": entries, "output": written, "run": {"executor": "local"}} | more
        )
    )
    paths = [*place.glob("*.safetensors"), *place.glob("*.safetensors.index.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


@cache
def family(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="golden-"))
    FAMILIES[name](folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _remove_families() -> Iterator[None]:
    yield
    for name in FAMILIES:
        shutil.rmtree(family(name), ignore_errors=True)
    family.cache_clear()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_the_recorded_bytes(name: str, tmp_path: Path) -> None:
    source, recipe = RECIPES[name]
    assert merged(family(source), tmp_path / "out", **recipe) == json.loads(DIGESTS.read_text())[name]


def test_the_digests_belong_to_this_arithmetic() -> None:
    assert ARITHMETICS["exact"] == json.loads(DIGESTS.read_text())["arithmetic"]
    assert CONFIG["torch_dtype"] == "bfloat16"


def main() -> None:
    """Write the digests."""
    digests: dict[str, Any] = {"arithmetic": ARITHMETICS["exact"]}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (source, recipe)) in enumerate(RECIPES.items()):
            digests[name] = merged(family(source), Path(scratch) / str(number), **recipe)
    DIGESTS.write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
