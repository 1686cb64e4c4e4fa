"""Scores a causal language model by its loss on texts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ties_ray.evaluations import DataPin, Evaluator, Json, Measured, Subject
from ties_ray.evaluations._data import ReadsData, fields_of, text_of
from ties_ray.evaluations._likelihood import Padding, log_likelihoods, longest
from ties_ray.evaluations._models import CAUSAL, Loader, LoadsModels
from ties_ray.evaluations._texts import Cut, of_completion, of_ids, of_text
from ties_ray.stores import Stores


class Loss(ReadsData, LoadsModels):
    """The mean negative log likelihood of a token, over all scored tokens of all examples (nats).

    An example has `text`, of which all tokens but the first are scored. Or it has `prompt` and `completion`, and the
    tokens of the completion are scored. Or it has `input_ids`. Special tokens are those that the tokenizer adds.
    `perplexity` is exp(loss).
    """

    main: ClassVar[str] = "data"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")

    name: Literal["loss"] = "loss"
    better: Literal["smaller"] = "smaller"
    """Which values are better."""
    batch_size: int = Field(default=16, ge=1, le=4096)
    """Examples at a time. A batch takes fewer where its logits would exceed 512 MiB."""
    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of an example. Default: what the tokenizer and the model can take.

    A longer text loses its end. A longer prompt loses its beginning.
    """
    padding: Padding = "right"
    """Side on which shorter examples of a batch are filled up. `none`: batches hold examples of equal length."""

    def prepared(self, stores: Stores, seed: int) -> Evaluator:
        """Return what computes the loss. It reads the data, and raises `InputError` with all that is wrong in it."""
        rows, pins = self.examples(stores, seed)
        problems = [f"example {number:,} {fault}" for number, row in enumerate(rows, 1) if (fault := _fault(row))]
        if problems:
            raise self.refused(problems)
        return _Scores(self, rows, seed, pins)


class _Scores(Evaluator):
    def __init__(self, evaluation: Loss, rows: Sequence[Json], seed: int, pins: Sequence[DataPin]) -> None:
        super().__init__(evaluation, seed, pins)
        self._own, self._rows, self._loader = evaluation, rows, Loader(evaluation)

    def measure(self, subject: Subject) -> Measured:
        """Return loss and perplexity."""
        model = self._loader.model(subject, CAUSAL)
        needs_texts = any("input_ids" not in row for row in self._rows)
        tokenizer = self._loader.tokenizer(subject) if needs_texts else None
        most = longest(self._own.max_length, tokenizer, model)
        made = [_tokens(tokenizer, row, most) for row in self._rows]
        scored = [each.tokens for each in made if each.tokens.num_scored > 0]
        num_tokens = sum(tokens.num_scored for tokens in scored)
        sums = log_likelihoods(model, scored, self._own.batch_size, self._own.padding)
        loss = -math.fsum(sums) / num_tokens if num_tokens else math.nan
        counts = {
            "examples": len(scored),
            "tokens": num_tokens,
            "cut": sum(each.cut for each in made),
            "without_tokens": len(made) - len(scored),
        }
        return Measured(loss, {"loss": loss, "perplexity": perplexity(loss)}, counts)


def perplexity(loss: float) -> float:
    """Return exp(loss); infinity where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _fault(row: Mapping[str, Any]) -> str:
    """Return what is wrong with an example; empty where nothing is."""
    if "input_ids" in row:
        ids = row["input_ids"]
        right = isinstance(ids, list) and all(type(value) is int and 0 <= value < 2**31 for value in ids)
        return "" if right else "has `input_ids` that are no list of token numbers"
    if text_of(row, "prompt") is not None and text_of(row, "completion") is not None:
        return ""
    if text_of(row, "text") is not None:
        return ""
    return f"has neither `text` nor `prompt` and `completion` as texts, but {fields_of(row)}"


def _tokens(tokenizer: Any, row: Mapping[str, Any], most: int) -> Cut:
    if "input_ids" in row:
        return of_ids(row["input_ids"], most)
    if text_of(row, "prompt") is not None and text_of(row, "completion") is not None:
        return of_completion(tokenizer, row["prompt"], row["completion"], most)
    return of_text(tokenizer, row["text"], most)
