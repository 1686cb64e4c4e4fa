"""Log likelihoods and labels that models give, in batches that do not decide the numbers.

Each example's tokens are summed in float64, in their own order. Batches hold examples of like length.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ties_ray.errors import InputError, Problem

if TYPE_CHECKING:
    import torch

Padding = Literal["right", "left", "none"]
LOGIT_BYTES = 2**29
"""Bytes of the logits of one batch (fp32) at most, whatever the batch size."""
ROW_VALUES = 2**22
"""Logits that are summed in float64 at a time."""


class Tokens(NamedTuple):
    """The tokens of an example, of which [first, stop) are scored."""

    ids: Sequence[int]
    first: int
    """The first scored token; at least 1, as nothing stands before token 0."""
    types: Sequence[int] = ()
    """The segment of each token, where the model has segments."""

    @property
    def num_scored(self) -> int:
        """Return the number of scored tokens."""
        return len(self.ids) - self.first


def log_likelihoods(model: Any, examples: Sequence[Tokens], batch_size: int, padding: Padding) -> list[float]:
    """Return ln p(scored tokens | tokens before) of each example by a causal model, in the order of the examples."""
    import torch

    sums = [0.0] * len(examples)
    with torch.inference_mode():
        for numbers in _batches(examples, batch_size, padding, _vocabulary(model)):
            rows = [examples[number] for number in numbers]
            logits, starts = _logits(model, rows, padding)
            for place, (number, row, start) in enumerate(zip(numbers, rows, starts, strict=True)):
                own = logits[place, start + row.first - 1 : start + len(row.ids) - 1]
                sums[number] = _sum(own, torch.tensor(row.ids[row.first :], device=own.device))
    return sums


def label_logits(model: Any, examples: Sequence[Tokens], batch_size: int, padding: Padding) -> "list[torch.Tensor]":
    """Return the logits of all labels (1-D float64, on the CPU) of each example, in the order of the examples."""
    import torch

    logits: list[torch.Tensor] = [torch.empty(0)] * len(examples)
    if getattr(model.config, "pad_token_id", None) is None:
        batch_size = 1  # a decoder with a head finds an example's end by that token
    with torch.inference_mode():
        for numbers in _batches(examples, batch_size, padding, 1):
            made, _ = _logits(model, [examples[number] for number in numbers], padding)
            for number, row in zip(numbers, made.double().cpu(), strict=True):
                logits[number] = row
    return logits


def _batches(examples: Sequence[Tokens], batch_size: int, padding: Padding, values_a_token: int) -> Iterator[list[int]]:
    """Yield the numbers of the examples of each batch, the longest first."""
    order = sorted(range(len(examples)), key=lambda number: -len(examples[number].ids))
    batch: list[int] = []
    for number in order:
        longest = len(examples[batch[0]].ids) if batch else 0
        full = len(batch) >= batch_size or 4 * (len(batch) + 1) * longest * values_a_token > LOGIT_BYTES
        if batch and (full or (padding == "none" and len(examples[number].ids) != longest)):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _logits(model: Any, rows: Sequence[Tokens], padding: Padding) -> "tuple[torch.Tensor, list[int]]":
    """Return the logits of a batch, and the place of each example's first token in it."""
    import torch

    longest = max(len(row.ids) for row in rows)
    starts = [longest - len(row.ids) if padding == "left" else 0 for row in rows]
    pad = getattr(model.config, "pad_token_id", None) or 0
    ids = torch.full((len(rows), longest), pad)
    mask, types = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[place, start : start + len(row.ids)] = torch.tensor(row.ids)
        mask[place, start : start + len(row.ids)] = 1
        if row.types:
            types[place, start : start + len(row.ids)] = torch.tensor(row.types)
    takes = inspect.signature(model.forward).parameters
    tensors = {"input_ids": ids, "attention_mask": mask}
    if any(row.types for row in rows) and "token_type_ids" in takes:
        tensors["token_type_ids"] = types
    if padding == "left" and any(starts):
        if "position_ids" not in takes:
            message = f"{type(model).__name__} takes no positions, which padding on the left moves"
            raise InputError(Problem("padding", message, "write `padding: right`"))
        tensors["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)
    if "use_cache" in takes:
        return model(**_on(model, tensors), use_cache=False).logits, starts
    return model(**_on(model, tensors)).logits, starts


def _on(model: Any, tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    return {name: tensor.to(model.device) for name, tensor in tensors.items()}


def _sum(logits: "torch.Tensor", targets: "torch.Tensor") -> float:
    """Return the sum over rows of the log softmax at a target, in float64."""
    rows = max(1, ROW_VALUES // logits.shape[-1])
    parts = []
    for start in range(0, len(targets), rows):
        exact, own = logits[start : start + rows].double(), targets[start : start + rows]
        parts.append(float((exact.gather(-1, own[:, None])[:, 0] - exact.logsumexp(-1)).sum()))
    return math.fsum(parts) if all(map(math.isfinite, parts)) else math.nan


def _vocabulary(model: Any) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(getattr(config, "vocab_size", 1) or 1)


def longest(asked: int | None, tokenizer: Any, model: Any) -> int:
    """Return the most tokens of an example: what is asked for, and what tokenizer and model can take."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limits = (asked, getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None))
    return min(int(limit) for limit in (*limits, 2**20) if limit)
