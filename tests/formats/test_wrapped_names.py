"""Checkpoints whose names have the words of a wrapper in training: what is published loads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ties_ray
from ties_ray.operations.verify import verify
from ties_ray.stores import Stores


def save(folder: Path, model: LlamaForCausalLM, wrapper: str) -> None:
    """Save a model, with the words of a wrapper before each name, and the tied head as a copy."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file({f"{wrapper}{name}": tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("of_base", "of_models"), [("module.", "module."), ("_orig_mod.", ""), ("", "module.")])
def test_what_is_published_loads_and_is_the_merge(of_base: str, of_models: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=24, tie_word_embeddings=True)
    states = []
    for number, name in enumerate(("base", "first", "second")):
        torch.manual_seed(number)
        model = LlamaForCausalLM(config)
        save(tmp_path / name, model, of_models if number else of_base)
        states.append(model.state_dict())
    result = ties_ray.merge({
        "base": str(tmp_path / "base"), "models": [str(tmp_path / "first"), str(tmp_path / "second")],
        "method": "average", "output": str(tmp_path / "out"), "run": {"executor": "local"},
    })  # fmt: skip
    assert any("names of a wrapper in training" in note for note in result.notes)
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, (states[1][name] + states[2][name]) / 2)
    assert not verify(Stores({}), str(tmp_path / "out"), sample=1.0).problems
