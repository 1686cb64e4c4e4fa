"""Trains a small real family: a base on Python and English, a fine-tune for each topic, and held-out data.

    python -m benchmarks.topics models --steps 300

It takes a few minutes of one CPU core. The texts come with Python itself: the sources of the standard library, and the
help of `pydoc`. Nobody has trained on every tenth piece; these are `dev.jsonl` and `test.jsonl`, by turns.
"""

import json
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

VOCABULARY = 1024
LENGTH = 128
"""Tokens of an example while training."""
PIECE = 400
"""Characters of a piece of text."""
FOLDERS = {"network": ("http", "email", "urllib", "xmlrpc"), "windows": ("tkinter", "idlelib"), "tests": ("unittest",),
           "concurrent": ("asyncio", "concurrent", "multiprocessing")}  # fmt: skip
"""Folders of the standard library by topic."""
MOST = 400_000
"""Characters of a topic."""


def texts() -> dict[str, str]:
    """Return the text of each topic."""
    library = Path(sysconfig.get_path("stdlib"))
    made = {"english": "\n\n".join(pydoc_data.topics.topics.values())}
    for topic, folders in FOLDERS.items():
        files = [path for folder in folders for path in sorted((library / folder).rglob("*.py"))]
        made[topic] = "\n".join(path.read_text(errors="replace") for path in files if "test" not in path.parts)
    return {topic: text[:MOST] for topic, text in made.items()}


def pieces(text: str) -> tuple[list[str], list[str]]:
    """Return the pieces of a text to train on, and every tenth, which is held out."""
    every = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    return [piece for number, piece in enumerate(every) if number % 10], every[::10]


def make_tokenizer(every: Sequence[str]) -> Any:
    """Return a byte-level BPE tokenizer of these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(every, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "model_max_length": 256}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)  # type: ignore[no-untyped-call]


def train(model: Any, ids: torch.Tensor, steps: int, rate: float, seed: int) -> float:
    """Train a model on rows of tokens; return the mean loss of the last tenth of the steps."""
    draw, losses = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (16,), generator=draw)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def rows_of(tokenizer: Any, every: Sequence[str]) -> torch.Tensor:
    """Return the tokens of texts as rows of one length."""
    ids = [number for text in every for number in tokenizer(text, verbose=False)["input_ids"]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def write(folder: Path, steps: int) -> None:
    """Train and write the family and its data."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    split = {topic: pieces(text) for topic, text in texts().items()}
    every = [piece for trained, _ in split.values() for piece in trained]
    tokenizer = make_tokenizer(every)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    random.Random(0).shuffle(every)
    click.echo(f"base: {train(base, rows_of(tokenizer, every), steps, 3e-3, seed=0):.3f}")
    _save(base, tokenizer, folder / "base")
    for number, (topic, (trained, _)) in enumerate(split.items(), 1):
        tuned = LlamaForCausalLM.from_pretrained(folder / "base")
        loss = train(tuned, rows_of(tokenizer, trained), steps // 2, 1e-3, seed=number)
        click.echo(f"{topic}: {loss:.3f}")
        _save(tuned, tokenizer, folder / topic)
    held_out = [{"text": piece, "topic": topic} for topic, (_, rest) in split.items() for piece in rest]
    for name, rows in (("dev", held_out[::2]), ("test", held_out[1::2])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@click.command
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--steps", default=300, show_default=True, help="Steps of the base; a fine-tune takes half of them.")
def main(folder: Path, steps: int) -> None:
    """Train a base and five fine-tunes of it into FOLDER, with dev.jsonl and test.jsonl."""
    write(folder, steps)


if __name__ == "__main__":
    main()
