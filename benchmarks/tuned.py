"""A search on a small real family: a Llama that is trained on texts of Python, and fine-tuned on four kinds of them.

    python -m benchmarks.tuned FOLDER

It takes some minutes of one core. The texts are those of this Python: code, the help's prose, tables and tests. Other
files train, tune and confirm. The search sees the tuning texts, and the table shows the scores on both.
"""

import json
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ties_ray
from benchmarks import measure

LENGTH = 128
"""Characters of an excerpt, which are its tokens, too."""
BATCH = 16
CODE = ("asyncio", "json", "email", "http", "logging", "unittest")
SPACE: dict[str, Any] = {
    "method.lambda": {"low": 0.3, "high": 3, "log": True},
    "method.density": {"low": 0.05, "high": 1},
    "models.weight": {"low": 0, "high": 1},
}


def texts_of() -> dict[str, list[str]]:
    """Return the texts of each kind, in an order drawn by chance."""
    library = Path(sysconfig.get_path("stdlib"))
    kinds = {
        "code": [path.read_text() for name in CODE for path in sorted((library / name).glob("*.py"))],
        "prose": list(pydoc_data.topics.topics.values()),
        "tables": [path.read_text() for path in sorted((library / "encodings").glob("cp*.py"))],
        "turtles": [path.read_text() for path in sorted((library / "turtledemo").glob("*.py"))],
    }
    draw = random.Random(0)
    for texts in kinds.values():
        draw.shuffle(texts)
    return kinds


def excerpts(texts: Sequence[str], number: int, seed: int) -> list[str]:
    """Return excerpts of the texts."""
    draw = random.Random(seed)
    long = [text for text in texts if len(text) > 2 * LENGTH]
    made = []
    for _ in range(number):
        text = draw.choice(long)
        start = draw.randrange(len(text) - LENGTH)
        made.append("".join(each if each.isascii() else "?" for each in text[start : start + LENGTH]))
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={each: number for number, each in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LENGTH)  # type: ignore[no-untyped-call]


def train(model: LlamaForCausalLM, texts: Sequence[str], steps: int, rate: float, seed: int) -> float:
    """Train a model; return its last loss."""
    encode, loss = tokenizer(), torch.zeros(())
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for step in range(steps):
        ids = torch.tensor([encode(text)["input_ids"] for text in excerpts(texts, BATCH, seed + step)])
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


def make(folder: Path, steps: int) -> Iterator[str]:
    """Write base, fine-tunes and data; yield a line for each."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kinds = texts_of()
    training = {kind: texts[: len(texts) * 6 // 10] for kind, texts in kinds.items()}
    for name, part in (("dev", slice(6, 8)), ("test", slice(8, 10))):
        rows = [
            json.dumps({"text": text, "kind": kind})
            for kind, texts in kinds.items()
            for text in excerpts(texts[len(texts) * part.start // 10 : len(texts) * part.stop // 10], 24, 99)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=320, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH)  # fmt: skip
    model = LlamaForCausalLM(config)
    mixed = [text for texts in training.values() for text in texts]
    yield f"base: loss {train(model, mixed, steps, 3e-3, 0):.3f}"
    _save(model, folder / "base")
    for number, (kind, texts) in enumerate(training.items()):
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        yield f"{kind}: loss {train(model, texts, steps // 4, 3e-4, 10**6 * (number + 1)):.3f}"
        _save(model, folder / kind)


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def recipe_of(folder: Path, output: str, sampler: str, method: str, budget: int) -> dict[str, Any]:
    """Return the search."""
    space = dict(SPACE) if method == "ties" else {key: SPACE[key] for key in SPACE if key != "method.density"}
    return {
        "base": str(folder / "base"),
        "models": [str(folder / kind) for kind in texts_of()],
        "method": method,
        "output": str(folder / output),
        "run": {"executor": "local", "workers": 1},
        "search": {
            "space": space,
            "sampler": sampler,
            "budget": budget,
            "evaluate": f"loss:{folder}/dev.jsonl",
            "confirm": f"loss:{folder}/test.jsonl",
        },
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--steps", default=400, show_default=True)
@click.option("--budget", default=64, show_default=True)
def main(folder: Path, steps: int, budget: int) -> None:
    """Make the family where it is not there, search, and print what each search gave."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "turtles").exists():
        for line in make(folder, steps):
            print(line, flush=True)
    models = [str(folder / name) for name in ("base", *texts_of())]
    alone = ties_ray.evaluate(models, f"loss:{folder}/test.jsonl", run={"executor": "local"})
    print(alone.to_dataframe())
    measure.table(("method", "sampler", "tuning: as it stands", "tuning: best", "confirmed: as it stands",
                   "confirmed: best", "seconds"))  # fmt: skip
    for method in ("ties", "task_arithmetic"):
        for sampler in ("random", "cma_es"):
            result = ties_ray.search(recipe_of(folder, f"{method}-{sampler}", sampler, method, budget))
            rows = {row.number: row for row in result.rows}
            stands, best = rows[0], rows[result.chosen]
            scores = [row[label] for row in (stands.scores, best.scores, stands.confirmed, best.confirmed)
                      for label in ("loss",)]  # fmt: skip
            measure.row((method, sampler, *scores, result.seconds))


if __name__ == "__main__":
    main()
