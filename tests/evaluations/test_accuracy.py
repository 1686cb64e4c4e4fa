"""`accuracy` against a float64 computation by hand, one example at a time."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluations.test_loss import by_hand
from tests.tools import scored
from tests.tools.scored import Folder
from ties_ray.errors import InputError, RecipeError
from ties_ray.evaluations import Score
from ties_ray.evaluations.accuracy import Accuracy
from ties_ray.stores import Stores

WORDS = scored.WORDS
LABELLED = [{"text": " ".join(WORDS[number : number + 1 + number % 5]), "label": number % 3} for number in range(24)]
ASKED = [
    {
        "prompt": " ".join(WORDS[number : number + 2]),
        "choices": [" cat", " happy and sad", " river"],
        "answer": number % 3,
    }
    for number in range(20)
]


def score(folder: Path, data: str, **settings: Any) -> Score:
    return Accuracy(data=data, **settings).prepared(Stores({}), seed=0).score(Folder(folder))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("classifier")
    return folder, scored.classifier(folder)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("causal")
    return folder, scored.causal(folder, seed=5)


@pytest.mark.parametrize("padding", ["right", "none"])
def test_labels_are_those_of_float64_whatever_the_batches(
    classifier: tuple[Path, Any], tmp_path: Path, padding: str
) -> None:
    folder, model = classifier
    encode, right, losses = scored.tokenizer(), 0, []
    for row in LABELLED:
        logits = model.double()(torch.tensor([encode(row["text"])["input_ids"]])).logits[0].tolist()
        right += logits.index(max(logits)) == row["label"]
        losses.append(math.log(sum(math.exp(each - logits[row["label"]]) for each in logits)))
    assert 0 < right < len(LABELLED)
    data = scored.lines(tmp_path / "d.jsonl", LABELLED)
    for batch_size in (1, 3, 16):
        made = score(folder, data, batch_size=batch_size, padding=padding)
        share = right / len(LABELLED)
        assert made.value == made.metrics["accuracy"] == share
        assert made.metrics["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / len(LABELLED)))
        assert made.metrics["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
        assert made.counts == {"examples": 24, "cut": 0, "not_finite": 0}


def test_labels_are_not_padded_on_the_left(tmp_path: Path) -> None:
    data = scored.lines(tmp_path / "d.jsonl", LABELLED)
    with pytest.raises(RecipeError, match="moves the token at which a head looks; write `padding: right`"):
        Accuracy(data=data, padding="left").prepared(Stores({}), 0)


def test_a_head_on_a_decoder_gives_the_same_labels_in_batches(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=320, num_labels=3, pad_token_id=0, initializer_range=0.5)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "model")
    scored.tokenizer().save_pretrained(tmp_path / "model")
    data = scored.lines(tmp_path / "d.jsonl", LABELLED)
    alone, together = (score(tmp_path / "model", data, batch_size=size) for size in (1, 16))
    assert alone.value == together.value
    assert alone.metrics["loss"] == pytest.approx(together.metrics["loss"], rel=1e-6)


def test_labels_may_be_names_and_texts_may_be_pairs(classifier: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = classifier
    names = ("no", "maybe", "yes")
    rows = [{"text": row["text"], "text_pair": "a dog", "label": names[row["label"]]} for row in LABELLED]
    right = 0
    for row in rows:
        made = scored.tokenizer()(row["text"], "a dog", return_tensors="pt")
        assert 1 in made["token_type_ids"]
        logits = model.double()(made["input_ids"], token_type_ids=made["token_type_ids"]).logits[0]
        right += names[int(logits.argmax())] == row["label"]
    assert score(folder, scored.lines(tmp_path / "d.jsonl", rows)).value == right / len(rows)
    with pytest.raises(InputError, match=r"has 3 labels \(no, maybe, yes\), and examples have 7, perhaps"):
        score(
            folder,
            scored.lines(tmp_path / "e.jsonl", [*rows, {"text": "x", "label": 7}, {"text": "x", "label": "perhaps"}]),
        )


@pytest.mark.parametrize(("batch_size", "padding"), [(1, "right"), (3, "left"), (16, "right"), (16, "none")])
def test_choices_are_those_of_float64_whatever_the_batches(
    causal: tuple[Path, Any], tmp_path: Path, batch_size: int, padding: str
) -> None:
    folder, model = causal
    encode = scored.tokenizer()
    right = {"sum": 0, "byte": 0}
    for row in ASKED:
        first = len(encode(row["prompt"])["input_ids"])
        sums = [
            -math.fsum(by_hand(model, encode(row["prompt"] + choice)["input_ids"], first)) for choice in row["choices"]
        ]
        shares = [each / len(choice.encode()) for each, choice in zip(sums, row["choices"], strict=True)]
        right["sum"] += sums.index(max(sums)) == row["answer"]
        right["byte"] += shares.index(max(shares)) == row["answer"]
    assert right["sum"] != right["byte"]
    data = scored.lines(tmp_path / "d.jsonl", ASKED)
    made = score(folder, data, batch_size=batch_size, padding=padding)
    assert made.value == made.metrics["accuracy"] == right["sum"] / len(ASKED)
    assert made.metrics["accuracy_by_byte"] == right["byte"] / len(ASKED)
    assert score(folder, data, by="byte").value == right["byte"] / len(ASKED)


def test_examples_without_finite_scores_are_wrong_and_counted(tmp_path: Path) -> None:
    broken = scored.causal(tmp_path / "causal")
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    broken.save_pretrained(tmp_path / "causal")
    made = score(tmp_path / "causal", scored.lines(tmp_path / "c.jsonl", ASKED))
    assert (made.value, made.counts["not_finite"]) == (0.0, len(ASKED))
    broken = scored.classifier(tmp_path / "classifier")
    torch.nn.init.constant_(broken.classifier.weight, math.nan)
    broken.save_pretrained(tmp_path / "classifier")
    made = score(tmp_path / "classifier", scored.lines(tmp_path / "l.jsonl", LABELLED))
    assert (made.value, made.counts["not_finite"]) == (0.0, len(LABELLED))
    assert math.isnan(made.metrics["loss"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "x"}], "example 1 needs a `text` and a `label`, or `prompt`, `choices` and `answer`, and has text"),
        ([{"text": "x", "label": 0}, {"text": "x", "label": True}], "example 2 needs a `text` and a `label`"),
        ([{"prompt": "x", "choices": ["a"], "answer": 0}], "example 1 needs a list of 2 to 100 `choices`"),
        ([{"prompt": "x", "choices": ["a", " "], "answer": 0}], "example 1 has an empty choice"),
        ([{"prompt": "x", "choices": ["a", "b"], "answer": 2}], "as `answer`, from 0 to 1"),
    ],
)
def test_examples_of_another_form_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Accuracy(data=scored.lines(tmp_path / "d.jsonl", rows)).prepared(Stores({}), 0)
