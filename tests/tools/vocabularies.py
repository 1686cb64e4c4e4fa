"""Small Llamas with tokenizers of their own."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import transformers

BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")
"""Parameters that have a row for each token; the second is missing where the embeddings are tied."""
LETTERS = [chr(number) for number in range(ord("a"), ord("z") + 1)]
WIDTH = 24


def tokenizer_of(ordinary: Sequence[str], added: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with these tokens in order; ordinary ones have one letter, or two that are merged."""
    vocab = {token: number for number, token in enumerate(ordinary)}
    merges = [(token[0], token[1]) for token in ordinary if len(token) == 2]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in added])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def write_model(
    folder: Path,
    ordinary: Sequence[str],
    added: Sequence[str],
    rows: int,
    *,
    seed: int,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    layers: int = 1,
    with_tokenizer: bool = True,
) -> None:
    """Write a Llama whose embedding has so many rows, and its tokenizer."""
    tokenizer = tokenizer_of(ordinary, added)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tie,
        eos_token_id=tokenizer.convert_tokens_to_ids("</s>"), bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    if with_tokenizer:
        tokenizer.save_pretrained(folder)
