"""Merges of mergekit's configurations, beside what mergekit 0.1.5 makes of them, element by element.

    python -m venv .venv-mergekit && .venv-mergekit/bin/pip install torch mergekit==0.1.5

`make differential` does both. TIES_RAY_MERGEKIT names the Python of that environment.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ties_ray
from tests.tools.merging import read_tensors
from tests.tools.pages import ROOT
from tests.tools.vocabularies import BY_TOKEN, LETTERS, write_model

PYTHON = os.environ.get("TIES_RAY_MERGEKIT", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="TIES_RAY_MERGEKIT names no Python that has mergekit: `make differential`"),
    pytest.mark.filterwarnings("ignore"),
]
LAYERS = 3
WEIGHTS = {"a": 0.5, "b": 1.25, "c": 0.25}
STEPS = {"float32": 2.0**-21, "bfloat16": 2.0**-7}
"""What may be rounded, relative to the largest value of a tensor: mergekit rounds after every step."""


Tensors = dict[str, torch.Tensor]


class Case(NamedTuple):
    """A configuration, and how many elements may differ."""

    text: str
    dtype: str = "float32"
    """The dtype of the models, of mergekit's arithmetic and of the output."""
    inputs: str = ""
    """Folder of the models."""
    differ: float = 0.0
    """Largest share of elements that are further off than roundings."""


def models(weights: str = "", more: str = "", names: str = "abc") -> str:
    """Return the list of models with weights, and more parameters each."""
    lines = []
    for name in names:
        weight = weights or str(WEIGHTS[name])
        parameters = ", ".join(filter(None, [f"weight: {weight}" if weight != "none" else "", more]))
        lines.append(f"  - {{model: '@{name}', parameters: {{{parameters}}}}}")
    return "models:\n" + "\n".join(lines) + "\n"


def sums(method: str, parameters: str = "", more: str = "density: 0.4", weights: str = "") -> str:
    """Return a configuration of a method of sums."""
    return f"{models(weights, more)}base_model: '@base'\nmerge_method: {method}\nparameters: {{{parameters}}}\n"


GRADIENT = "[0.2, 1.0, 0.4]"
FILTERS = "[{filter: self_attn, value: [0.1, 0.9]}, {filter: mlp, value: 0.3}, {value: 0.7}]"
PAIR = "models: [{model: '@base'}, {model: '@a'}]\nbase_model: '@base'\n"
SLICES = """slices:
  - sources: [{model: '@base', layer_range: [0, 3]}, {model: '@a', layer_range: [0, 3]}]
"""
PARTS = """slices:
  - sources:
      - {model: '@a', layer_range: [0, 1], parameters: {weight: 0.2}}
      - {model: '@b', layer_range: [0, 1], parameters: {weight: 0.7}}
  - sources:
      - {model: '@a', layer_range: [1, 3], parameters: {weight: [0, 1]}}
      - {model: '@b', layer_range: [1, 3], parameters: {weight: 0.5}}
"""
ROWS = """tokenizer:
  source: union
  tokens:
    b: {source: {kind: zero}, force: true}
    <x>: {source: '@b', force: true}
    <only-a>: {source: {kind: model_token, model: '@base', token: a}}
    <new>: {source: {kind: model_token, model: '@a', token_id: 3}}
  pad_to_multiple_of: 16
"""
WORDS = {
    "base": ([*LETTERS, "ab", "cd"], ["<s>", "</s>"], 36),
    "a": ([*LETTERS, "ab", "cd"], ["<s>", "</s>", "<x>", "<only-a>"], 32),
    "b": ([*reversed(LETTERS[2:]), "ef", "cd", "a"], ["</s>", "<x>"], 29),
    "c": ([*LETTERS, "ab", "cd"], ["<s>", "</s>"], 30),
}
"""Ordinary tokens, added ones, and rows of the embedding."""
CASES: dict[str, Case] = {
    "linear in bf16": Case(models() + "merge_method: linear\n", "bfloat16", "bf16"),
    "slerp in bf16": Case(PAIR + "merge_method: slerp\nparameters: {t: 0.3}\n", "bfloat16", "bf16"),
    "ta in bf16": Case(sums("task_arithmetic", more=""), "bfloat16", "bf16", 0.001),
    "ties in bf16": Case(sums("ties"), "bfloat16", "bf16", 0.01),
    "dare in bf16": Case(sums("dare_ties"), "bfloat16", "bf16", 0.005),
    "linear": Case(models() + "merge_method: linear\n"),
    "linear-base": Case(models(names="ab") + "base_model: '@a'\nmerge_method: linear\n"),
    "linear-gradient": Case(models(GRADIENT) + "merge_method: linear\n"),
    "linear-filters": Case(models(FILTERS) + "merge_method: linear\n"),
    "linear-plain": Case(
        models("0.25").replace("0.25", "0.5", 1) + "merge_method: linear\nparameters: {normalize: false}\n"
    ),
    "linear-far": Case(models() + "merge_method: linear\nparameters: {normalize: false}\n"),
    "linear-parts": Case(PARTS + "merge_method: linear\n"),
    "ta": Case(sums("task_arithmetic", more="")),
    "ta-normalize": Case(sums("task_arithmetic", "normalize: true, lambda: 0.7", more="")),
    "ta-lambda-gradient": Case(sums("task_arithmetic", f"lambda: {GRADIENT}, int8_mask: true", more="")),
    "ta-negative": Case(sums("task_arithmetic", more="", weights="-0.5")),
    "ties": Case(sums("ties")),
    "ties-one": Case(sums("ties", more="density: 1.0", weights=FILTERS)),
    "ties-gradients": Case(sums("ties", "lambda: 0.8", more=f"density: {GRADIENT}", weights=FILTERS)),
    "ties-sum-negative": Case(sums("ties", "normalize: false", weights="-0.5")),
    "ties-rescale": Case(sums("ties", "rescale: true, int8_mask: true")),
    "dare-linear": Case(sums("dare_linear")),
    "dare-linear-plain": Case(sums("dare_linear", "rescale: false, normalize: true")),
    "dare-ties": Case(sums("dare_ties")),
    "dare-ties-mean": Case(sums("dare_ties", "normalize: true, lambda: 1.1", more=f"density: {FILTERS}")),
    "breadcrumbs": Case(sums("breadcrumbs", "gamma: 0.05")),
    "breadcrumbs-ties": Case(sums("breadcrumbs_ties", "rescale: true", more="density: 0.6, gamma: 0.02")),
    "breadcrumbs-mean": Case(sums("breadcrumbs_ties", "normalize: true")),
    "della": Case(sums("della", "epsilon: 0.1", more="density: 0.5")),
    "della-linear": Case(sums("della_linear", "rescale: false", more="density: 0.6, epsilon: 0.2")),
    "slerp": Case(PAIR + "merge_method: slerp\nparameters: {t: 0.3}\n"),
    "slerp-filters": Case(SLICES + f"base_model: '@base'\nmerge_method: slerp\nparameters: {{t: {FILTERS}}}\n"),
    "nuslerp": Case(models(names="ab") + "base_model: '@base'\nmerge_method: nuslerp\n"),
    "nuslerp-weights": Case(models(GRADIENT, names="ab") + "merge_method: nuslerp\n"),
    "nuslerp-rows": Case(
        models(names="ab") + "base_model: '@base'\nmerge_method: nuslerp\nparameters: {nuslerp_flatten: false}\n"
    ),
    "lora-of-base": Case(
        "models:\n  - {model: '@base+@lora', parameters: {weight: 1, density: 0.4}}\n"
        "  - {model: '@a', parameters: {weight: 0.5, density: 0.4}}\nbase_model: '@base'\nmerge_method: ties\n"
    ),
    "lora-of-another": Case(
        "models:\n  - {model: '@a+@lora', parameters: {weight: 0.7}}\n  - {model: '@b', parameters: {weight: 0.5}}\n"
        "base_model: '@base'\nmerge_method: task_arithmetic\n"
    ),
    "multislerp": Case(models() + "base_model: '@base'\nmerge_method: multislerp\n"),
    "multislerp-weights": Case(models() + "merge_method: multislerp\n"),
    "karcher": Case(models("none") + "merge_method: karcher\n"),
    "nearswap": Case(PAIR + "merge_method: nearswap\nparameters: {t: 0.004}\n"),
    "model-stock": Case(models("none") + "base_model: '@base'\nmerge_method: model_stock\n"),
    "model-stock-rows": Case(
        models("none") + "base_model: '@base'\nmerge_method: model_stock\nparameters: {filter_wise: true}\n"
    ),
    "sce": Case(models("none") + "base_model: '@base'\nmerge_method: sce\nparameters: {select_topk: 0.4}\n"),
    "sce-all": Case(models("none") + "base_model: '@base'\nmerge_method: sce\n"),
    "union": Case(sums("ties", "lambda: 0.8", more="density: 0.4") + "tokenizer_source: union\n", inputs="words"),
    "union without a base": Case(models() + "merge_method: linear\ntokenizer_source: union\n", inputs="words"),
    "tokens of the base": Case(sums("task_arithmetic", more="") + "tokenizer_source: base\n", inputs="words"),
    "tokens of a model": Case(sums("task_arithmetic", more="") + "tokenizer_source: '@b'\n", inputs="words"),
    "rows of tokens": Case(sums("task_arithmetic", more="") + ROWS, inputs="words"),
    "linear-parts of gpt2": Case(PARTS + "merge_method: linear\n", inputs="gpt2"),
    "ties-gradients of gpt2": Case(sums("ties", "lambda: 0.8", more=f"density: {GRADIENT}"), inputs="gpt2"),
    "model-stock of small changes": Case(
        models("none") + "base_model: '@base'\nmerge_method: model_stock\n", inputs="small"
    ),
    "sce of small changes": Case(models("none") + "base_model: '@base'\nmerge_method: sce\n", inputs="small"),
    "ram": Case(models("none") + "base_model: '@base'\nmerge_method: ram\nparameters: {epsilon: 0.004}\n"),
    "ramplus": Case(models("none") + "base_model: '@base'\nmerge_method: ramplus_tl\nparameters: {epsilon: 0.004}\n"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, three fine-tunes, and what mergekit makes of every configuration."""
    import peft
    import transformers

    place = tmp_path_factory.mktemp("mergekit")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(place / "base")
    base = {name: value.clone() for name, value in model.state_dict().items()}
    shared = {name: 0.005 * torch.randn_like(value) for name, value in base.items()}
    for name in WEIGHTS:
        model.load_state_dict(
            {key: value + shared[key] + 0.005 * torch.randn_like(value) for key, value in base.items()}
        )
        model.save_pretrained(place / name)
    model.load_state_dict(base)
    model.save_pretrained(place / "small/base")
    for name in WEIGHTS:
        moves = {key: 0.002 * shared[key] + 1e-5 * torch.randn_like(value) for key, value in base.items()}
        model.load_state_dict({key: value + moves[key] for key, value in base.items()})
        model.save_pretrained(place / f"small/{name}")
    model.load_state_dict(base)
    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=LAYERS, n_head=4)
    )
    start = {name: value.clone() for name, value in other.state_dict().items()}
    for name in ("base", *WEIGHTS):
        for key, parameter in other.named_parameters():
            parameter.data = start[key] + (name != "base") * 0.005 * torch.randn_like(start[key])
        other.save_pretrained(place / f"gpt2/{name}")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.02 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(place / "base")
    adapted.save_pretrained(place / "lora")
    for seed, (name, vocabulary) in enumerate(WORDS.items()):
        write_model(place / "words" / name, *vocabulary, seed=seed, layers=LAYERS)
    for name in ("base", *WEIGHTS):
        half = transformers.LlamaForCausalLM.from_pretrained(place / name).to(torch.bfloat16)
        half.save_pretrained(place / f"bf16/{name}")
    for name, case in CASES.items():
        inputs = place / case.inputs
        (place / f"{name}.yml").write_text(case.text.replace("@", f"{inputs}/") + f"dtype: {case.dtype}\n")
    command = [PYTHON, "-m", "tests.tools.mergekit_side", str(place)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_gives_mergekits_numbers(name: str, folder: Path) -> None:
    overrides = [f"output.path={folder / name}.ours", "run.executor=local"]
    ties_ray.merge(ties_ray.load_recipe(folder / f"{name}.yml", overrides))
    ours, theirs = read_tensors(f"{folder / name}.ours"), read_tensors(f"{folder / name}.mergekit")
    base, step = read_tensors(folder / CASES[name].inputs / "base"), STEPS[CASES[name].dtype]
    assert ours.keys() == theirs.keys()
    if CASES[name].inputs == "words":
        by_token(ours, theirs, base, *(f"{folder / name}.{whose}" for whose in ("ours", "mergekit")))
    unequal, far, total, worst = 0, 0, 0, 0.0
    for key, value in theirs.items():
        size = max(float((value - base[key]).abs().max()), float(base[key].abs().max()))
        apart = (ours[key].double() - value.double()).abs() / size
        unequal += int((ours[key] != value).sum())
        far += int((apart > step).sum())
        total += value.numel()
        worst = max(worst, float(apart.max()))
    print(json.dumps({"case": name, "unequal": unequal, "differ": far, "of": total, "largest": worst}))
    assert far <= CASES[name].differ * total, f"{far} of {total} elements differ, by {worst:.1e} at most"


def by_token(ours: Tensors, theirs: Tensors, base: Tensors, *folders: str) -> None:
    """Put the rows of both outputs into one order: mergekit gives the tokens of a union ids in no order."""
    import transformers

    vocabularies = [transformers.AutoTokenizer.from_pretrained(folder).get_vocab() for folder in folders]
    assert vocabularies[0].keys() == vocabularies[1].keys()
    for key in BY_TOKEN:
        assert ours[key].shape == theirs[key].shape
        for tensors, vocabulary in zip((ours, theirs), vocabularies, strict=True):
            tensors[key] = tensors[key][[vocabulary[token] for token in sorted(vocabulary)]]
        base[key] = base[key].abs().amax().expand_as(ours[key])
