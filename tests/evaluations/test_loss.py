"""`loss` against a float64 computation by hand, one example at a time."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools import scored
from tests.tools.scored import Folder
from ties_ray.errors import InputError
from ties_ray.evaluations import Score
from ties_ray.evaluations.loss import Loss
from ties_ray.stores import Stores

TOLERANCE = 1e-6
"""What batches may change, relative, in fp32."""
TEXTS = [
    "the cat sat on a mat",
    "red",
    "a dog ran to the warm house and the cold river, quick",
    "one two three four five",
    "good small stone",
    "the light tree",
    "dark",
    "happy and sad, large and slow",
]
ROWS: list[dict[str, Any]] = [
    *({"text": text} for text in TEXTS),
    {"prompt": "the cat sat on", "completion": " a mat"},
    {"prompt": "one two", "completion": " three four five"},
    {"prompt": "", "completion": "green"},
    {"input_ids": [1, 40, 50, 60, 70]},
]


def score(folder: Path, data: str, **settings: Any) -> Score:
    return Loss(data=data, **settings).prepared(Stores({}), seed=3).score(Folder(folder))


def by_hand(model: Any, ids: Sequence[int], first: int) -> list[float]:
    """Return -ln p of each token from `first` on, in float64."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([list(ids)])).logits[0]
    return [-math.log(float(torch.exp(logits[at - 1] - logits[at - 1].max())[ids[at]]
                            / torch.exp(logits[at - 1] - logits[at - 1].max()).sum()))
            for at in range(first, len(ids))]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("causal")
    return folder, scored.causal(folder)


@pytest.fixture(scope="module")
def wanted(model: tuple[Path, Any]) -> tuple[float, int]:
    """Return the loss by hand and the number of scored tokens."""
    encode = scored.tokenizer()
    losses: list[float] = []
    for row in ROWS:
        if "text" in row:
            ids, first = encode(row["text"])["input_ids"], 1
        elif "prompt" in row:
            ids = encode(row["prompt"] + row["completion"])["input_ids"]
            first = len(encode(row["prompt"])["input_ids"])  # these prompts end where a token ends
            assert ids[:first] == encode(row["prompt"])["input_ids"]
        else:
            ids, first = row["input_ids"], 1
        losses += by_hand(model[1], ids, first)
    return math.fsum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_loss_is_that_of_float64_whatever_the_batches(
    model: tuple[Path, Any], wanted: tuple[float, int], tmp_path: Path, batch_size: int, padding: str
) -> None:
    made = score(model[0], scored.lines(tmp_path / "d.jsonl", ROWS), batch_size=batch_size, padding=padding)
    assert made.value == pytest.approx(wanted[0], rel=TOLERANCE)
    assert made.metrics == {"loss": made.value, "perplexity": pytest.approx(math.exp(wanted[0]), rel=1e-5)}
    assert made.counts == {"examples": 12, "tokens": wanted[1], "cut": 0, "without_tokens": 0}
    assert (made.better, made.seed, len(made.pins)) == ("smaller", 3, 1)


def test_a_model_that_knows_nothing_has_the_loss_of_its_vocabulary(model: tuple[Path, Any], tmp_path: Path) -> None:
    blank = scored.causal(tmp_path / "blank")
    torch.nn.init.zeros_(blank.lm_head.weight)
    blank.save_pretrained(tmp_path / "blank")
    made = score(tmp_path / "blank", scored.lines(tmp_path / "d.jsonl", ROWS))
    assert made.value == pytest.approx(math.log(320), rel=1e-12)
    assert made.metrics["perplexity"] == pytest.approx(320, rel=1e-12)


def test_a_token_across_the_end_of_the_prompt_is_scored(model: tuple[Path, Any], tmp_path: Path) -> None:
    ids = scored.tokenizer()("the cat")["input_ids"]
    halved = {"prompt": "the ca", "completion": "t"}
    places = scored.tokenizer()("the cat", return_offsets_mapping=True)["offset_mapping"]
    first = next(number for number, (_, stop) in enumerate(places) if stop > 6)
    assert places[first][0] < 6, "a token that begins in the prompt"
    made = score(model[0], scored.lines(tmp_path / "d.jsonl", [halved]))
    assert made.value == pytest.approx(by_hand(model[1], ids, first)[0], rel=TOLERANCE)


def test_long_texts_lose_their_end_and_long_prompts_their_beginning(model: tuple[Path, Any], tmp_path: Path) -> None:
    encode = scored.tokenizer()
    text, prompt = " ".join(TEXTS), " ".join(TEXTS[:5])
    made = score(model[0], scored.lines(tmp_path / "t.jsonl", [{"text": text}]), max_length=10)
    assert made.value == pytest.approx(
        math.fsum(by_hand(model[1], encode(text)["input_ids"][:10], 1)) / 9, rel=TOLERANCE
    )
    assert made.counts["cut"] == 1
    rows = [{"prompt": prompt, "completion": " warm"}]
    made = score(model[0], scored.lines(tmp_path / "p.jsonl", rows), max_length=8)
    ids = encode(prompt + " warm")["input_ids"]
    own = len(ids) - len(encode(prompt)["input_ids"])
    assert made.value == pytest.approx(math.fsum(by_hand(model[1], ids[-8:], 8 - own)) / own, rel=TOLERANCE)
    assert made.counts == {"examples": 1, "tokens": own, "cut": 1, "without_tokens": 0}


def test_a_sample_is_drawn_by_the_seed(model: tuple[Path, Any], tmp_path: Path) -> None:
    data = scored.lines(tmp_path / "d.jsonl", ROWS)
    one, same, other = (
        Loss(data=data, sample=3).prepared(Stores({}), seed).score(Folder(model[0])) for seed in (1, 1, 2)
    )
    assert one.value == same.value != other.value
    assert one.counts["examples"] == 3


def test_a_model_that_overflows_has_a_loss_that_is_no_number(model: tuple[Path, Any], tmp_path: Path) -> None:
    broken = scored.causal(tmp_path / "broken")
    torch.nn.init.constant_(broken.model.norm.weight, math.inf)
    broken.save_pretrained(tmp_path / "broken")
    made = score(tmp_path / "broken", scored.lines(tmp_path / "d.jsonl", ROWS))
    assert math.isnan(made.value)
    assert made.merit == -math.inf


def test_a_model_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    scored.classifier(tmp_path / "classifier")
    data = scored.lines(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(InputError, match="AutoModelForCausalLM needs weights that are not there: cls"):
        score(tmp_path / "classifier", data)


def test_bfloat16_changes_the_loss_a_little_and_batches_change_it_less(model: tuple[Path, Any], tmp_path: Path) -> None:
    data = scored.lines(tmp_path / "d.jsonl", ROWS)
    exact = score(model[0], data).value
    coarse = score(model[0], data, dtype="bfloat16").value
    assert 0 < abs(coarse / exact - 1) < 0.05
    assert score(model[0], data, dtype="auto").value == exact


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "x"}, "example 2 has neither `text` nor `prompt` and `completion` as texts, but txt"),
        ({"input_ids": [1, -1]}, "example 2 has `input_ids` that are no list of token numbers"),
        ({"prompt": "x", "completion": 3}, "example 2 has neither"),
    ],
)
def test_examples_of_another_form_are_refused_before_a_model_is_loaded(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    data = scored.lines(tmp_path / "d.jsonl", [{"text": "x"}, row])
    with pytest.raises(InputError, match=message):
        Loss(data=data).prepared(Stores({}), 0)


def test_fields_may_have_other_names(model: tuple[Path, Any], tmp_path: Path) -> None:
    own = scored.lines(tmp_path / "own.jsonl", [{"text": text} for text in TEXTS])
    other = scored.lines(tmp_path / "other.jsonl", [{"content": text, "text": None} for text in TEXTS])
    assert score(model[0], other, fields={"text": "content"}).value == score(model[0], own).value
