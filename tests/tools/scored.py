"""Small real models with tokenizers, and their data, for evaluations."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_TEXT = """
the cat sat on a mat and dog ran to red blue green house tree river stone light dark warm cold
one two three four five good bad small large quick slow happy sad
"""
WORDS = _TEXT.split()


def tokenizer() -> Any:
    """Return a byte-level BPE tokenizer with a few merges; it puts `<s>` before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def causal(folder: Path, seed: int = 0, **config: Any) -> Any:
    """Write a Llama of 2 layers with its tokenizer, and return it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 64, "pad_token_id": 0,
             "initializer_range": 0.5}  # fmt: skip
    return _saved(LlamaForCausalLM(LlamaConfig(**sizes | config)), folder)


def classifier(folder: Path, seed: int = 0, **config: Any) -> Any:
    """Write a BERT of 2 layers with a head of 3 labels and a tokenizer, and return it."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    names = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": 320, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.5}  # fmt: skip
    return _saved(BertForSequenceClassification(BertConfig(**sizes | names | config)), folder)


def _saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model.eval()


def tuned(tmp_path: Path) -> dict[str, Any]:
    """Write a base and two fine-tunes of it; return a recipe."""
    base = causal(tmp_path / "base")
    for number in range(2):
        torch.manual_seed(number)
        model = causal(tmp_path / f"model-{number}")
        with torch.no_grad():
            for own, other in zip(model.parameters(), base.parameters(), strict=True):
                own.copy_(other + 0.1 * torch.randn_like(other))
        model.save_pretrained(tmp_path / f"model-{number}")
    models = [str(tmp_path / f"model-{number}") for number in range(2)]
    return {"base": str(tmp_path / "base"), "models": models, "method": "task_arithmetic", "run": {"executor": "local"}}


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Folder:
    """A subject whose folder lies here."""

    kin = ""

    def __init__(self, folder: Path | str, base: Path | str = "", **record: Any) -> None:
        self.id, self._base, self._record = str(folder), str(base), record

    def folder(self) -> str:
        return self.id

    def base_folder(self) -> str:
        return self._base

    def load_into(self, model: Any) -> None:
        raise AssertionError("it has no kin")

    def record(self) -> dict[str, Any]:
        return self._record
