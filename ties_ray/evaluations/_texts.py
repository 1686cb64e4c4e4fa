"""Examples as tokens: texts, and prompts with what follows them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ties_ray.errors import InputError, Problem
from ties_ray.evaluations._likelihood import Tokens


class Cut(NamedTuple):
    """The tokens of an example, and whether some were left out."""

    tokens: Tokens
    cut: bool


def of_ids(ids: Sequence[int], most: int) -> Cut:
    """Return tokens that are given; all but the first are scored. Of a longer list the first ones stay."""
    return Cut(Tokens(ids[:most], 1), len(ids) > most)


def of_text(tokenizer: Any, text: str, most: int) -> Cut:
    """Return the tokens of a text with the tokenizer's special ones; all but the first are scored."""
    return of_ids(tokenizer(text, verbose=False)["input_ids"], most)


def of_completion(tokenizer: Any, prompt: str, completion: str, most: int) -> Cut:
    """Return the tokens of prompt and completion as one text; those that reach into the completion are scored.

    Of a longer one, the last tokens stay. Raises `InputError` for a tokenizer that does not tell where tokens lie.
    """
    if not getattr(tokenizer, "is_fast", False):
        message = "does not tell which characters a token stands for"
        raise InputError(Problem(type(tokenizer).__name__, message, "name a folder with a tokenizer.json: `tokenizer`"))
    made = tokenizer(prompt + completion, return_offsets_mapping=True, verbose=False)
    ids, places = made["input_ids"], made["offset_mapping"]
    inside = [number for number, (_, stop) in enumerate(places) if stop > len(prompt)]
    if not inside:
        return Cut(Tokens((), 0), cut=False)
    ids, first = ids[: inside[-1] + 1], inside[0]  # a special token at the end is no part of the completion
    left_out = max(0, len(ids) - most)
    return Cut(Tokens(ids[left_out:], max(1, first - left_out)), left_out > 0)
