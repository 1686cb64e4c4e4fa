"""Scores a model by the share of examples that it answers right."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ties_ray.errors import InputError, Problem, RecipeError, enumerated
from ties_ray.evaluations import DataPin, Evaluator, Json, Measured, Subject
from ties_ray.evaluations._data import ReadsData, fields_of, text_of
from ties_ray.evaluations._likelihood import Padding, Tokens, label_logits, log_likelihoods, longest
from ties_ray.evaluations._models import CAUSAL, CLASSIFICATION, Loader, LoadsModels
from ties_ray.evaluations._texts import of_completion
from ties_ray.stores import Stores

MOST_CHOICES = 100
"""Choices of an example."""


class Accuracy(ReadsData, LoadsModels):
    """The share of examples that are answered right.

    Examples with `label` are for a model with a head that classifies. It gets `text`, and `text_pair` if there is one.
    Its answer is the label with the largest logit. Examples with `choices` are for a causal model. Its answer is the
    choice that is likeliest after `prompt`, and `answer` is the number of the right one, counted from 0. Of equal
    answers the first one counts. A model that gives no numbers for an example is wrong there.
    """

    main: ClassVar[str] = "data"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers")

    name: Literal["accuracy"] = "accuracy"
    better: Literal["larger"] = "larger"
    """Which values are better."""
    by: Literal["sum", "byte"] = "sum"
    """The choice with the largest log likelihood, or with the largest for each of its UTF-8 bytes."""
    batch_size: int = Field(default=16, ge=1, le=4096)
    """Examples or choices at a time. A batch takes fewer where its logits would exceed 512 MiB."""
    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of an example. Default: what the tokenizer and the model can take.

    A longer text loses its end. A longer prompt loses its beginning.
    """
    padding: Padding = "right"
    """Side on which shorter examples of a batch are filled up. `none`: batches hold examples of equal length.

    Examples with labels can't be filled up on the left: a head may look for its token at the first place.
    """

    def prepared(self, stores: Stores, seed: int) -> Evaluator:
        """Return what counts right answers. It reads the data, and raises `InputError` with all that is wrong in it."""
        rows, pins = self.examples(stores, seed)
        chooses = "choices" in rows[0]
        fault_of = _fault_of_choices if chooses else _fault_of_label
        problems = [f"example {number:,} {fault}" for number, row in enumerate(rows, 1) if (fault := fault_of(row))]
        if problems:
            raise self.refused(problems)
        if not chooses and self.padding == "left":
            message = "left moves the token at which a head looks"
            raise RecipeError(Problem("padding", message, "write `padding: right`"))
        return (_Choices if chooses else _Labels)(self, rows, seed, pins)


class _Answers(Evaluator):
    def __init__(self, evaluation: Accuracy, rows: Sequence[Json], seed: int, pins: Sequence[DataPin]) -> None:
        super().__init__(evaluation, seed, pins)
        self._own, self._rows, self._loader = evaluation, rows, Loader(evaluation)


class _Labels(_Answers):
    """Right answers of a model with a head that classifies."""

    def measure(self, subject: Subject) -> Measured:
        """Return accuracy, its standard error, and the mean cross entropy (nats)."""
        model, tokenizer = self._loader.model(subject, CLASSIFICATION), self._loader.tokenizer(subject)
        labels = _numbers(model.config, self._rows, subject.id)
        most = longest(self._own.max_length, tokenizer, model)
        made = [_tokens(tokenizer, row, most) for row in self._rows]
        logits = label_logits(model, [tokens for tokens, _ in made], self._own.batch_size, self._own.padding)
        finite = [bool(row.isfinite().all()) for row in logits]
        right = [is_finite and int(row.argmax()) == label
                 for row, label, is_finite in zip(logits, labels, finite, strict=True)]  # fmt: skip
        losses = [float(row.logsumexp(0) - row[label]) for row, label in zip(logits, labels, strict=True)]
        loss = math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan
        counts = {"examples": len(right), "cut": sum(cut for _, cut in made), "not_finite": finite.count(False)}
        return Measured(_share(right), _accuracy("accuracy", right) | {"loss": loss}, counts)


class _Choices(_Answers):
    """Right answers of a causal model among choices."""

    def measure(self, subject: Subject) -> Measured:
        """Return the accuracy by sums and by bytes, and the standard error of the one that counts."""
        model, tokenizer = self._loader.model(subject, CAUSAL), self._loader.tokenizer(subject)
        most = longest(self._own.max_length, tokenizer, model)
        made = [
            of_completion(tokenizer, row["prompt"], choice, most) for row in self._rows for choice in row["choices"]
        ]
        sums = iter(log_likelihoods(model, [each.tokens for each in made], self._own.batch_size, self._own.padding))
        likelihoods = [[next(sums) for _ in row["choices"]] for row in self._rows]
        pairs = list(zip(likelihoods, self._rows, strict=True))
        right = {by: [_first_best(each, row, by) == row["answer"] for each, row in pairs] for by in ("sum", "byte")}
        counts = {
            "examples": len(self._rows),
            "cut": sum(each.cut for each in made),
            "not_finite": sum(not all(map(math.isfinite, each)) for each in likelihoods),
        }
        own = right[self._own.by]
        metrics = {"accuracy": _share(right["sum"]), "accuracy_by_byte": _share(right["byte"])}
        return Measured(_share(own), metrics | {"standard_error": _standard_error(own)}, counts)


def _first_best(likelihoods: Sequence[float], row: Mapping[str, Any], by: str) -> int:
    """Return the first choice with the best likelihood; -1 where one is not finite."""
    if not all(map(math.isfinite, likelihoods)):
        return -1
    sizes = [len(choice.encode()) if by == "byte" else 1 for choice in row["choices"]]
    scores = [value / size for value, size in zip(likelihoods, sizes, strict=True)]
    return scores.index(max(scores))


def _accuracy(name: str, right: Sequence[bool]) -> dict[str, float]:
    return {name: _share(right), "standard_error": _standard_error(right)}


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def _standard_error(right: Sequence[bool]) -> float:
    """Return the standard error of a share of independent examples."""
    share = _share(right)
    return math.sqrt(share * (1 - share) / len(right))


def _tokens(tokenizer: Any, row: Mapping[str, Any], most: int) -> tuple[Tokens, bool]:
    """Return the tokens of an example with a label, and whether some were left out."""
    pair = row.get("text_pair")
    whole = tokenizer(row["text"], pair, verbose=False)
    cut = len(whole["input_ids"]) > most
    made = tokenizer(row["text"], pair, truncation=True, max_length=most, verbose=False) if cut else whole
    return Tokens(made["input_ids"], 1, made.get("token_type_ids", ())), cut


def _numbers(config: Any, rows: Sequence[Mapping[str, Any]], model: str) -> list[int]:
    """Return the number of each example's label. Raises `InputError` for labels that the model does not have."""
    by_name = {str(name): int(number) for name, number in (getattr(config, "label2id", None) or {}).items()}
    numbers = [by_name.get(row["label"], -1) if isinstance(row["label"], str) else row["label"] for row in rows]
    strange = sorted({str(row["label"]) for row, number in zip(rows, numbers, strict=True)
                      if not 0 <= number < config.num_labels})  # fmt: skip
    if strange:
        own = enumerated(sorted(by_name, key=by_name.__getitem__))
        message = f"has {config.num_labels} labels ({own}), and examples have {enumerated(strange)}"
        raise InputError(Problem(model, message, "write the model's own names or numbers of the labels"))
    return numbers


def _fault_of_label(row: Mapping[str, Any]) -> str:
    label = row.get("label")
    if text_of(row, "text") is None or not (isinstance(label, str) or type(label) is int):
        return f"needs a `text` and a `label`, or `prompt`, `choices` and `answer`, and has {fields_of(row)}"
    pair = row.get("text_pair")
    return "" if pair is None or isinstance(pair, str) else "has a `text_pair` that is no text"


def _fault_of_choices(row: Mapping[str, Any]) -> str:
    return next(_faults_of_choices(row), "")


def _faults_of_choices(row: Mapping[str, Any]) -> Iterator[str]:
    choices, answer = row.get("choices"), row.get("answer")
    if text_of(row, "prompt") is None:
        yield f"needs `prompt`, `choices` and `answer`, and has {fields_of(row)}"
    if not (isinstance(choices, list) and 1 < len(choices) <= MOST_CHOICES):
        yield f"needs a list of 2 to {MOST_CHOICES} `choices`"
    elif not all(isinstance(choice, str) and choice.strip() for choice in choices):
        yield "has an empty choice, or one that is no text"
    elif not (type(answer) is int and 0 <= answer < len(choices)):
        yield f"needs the number of the right choice as `answer`, from 0 to {len(choices) - 1}"
