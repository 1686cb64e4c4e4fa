"""Heads: whole tensors that adapters save and the base lacks. An adapter carries them along where all models agree."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

from ties_ray.errors import Problem, enumerated
from ties_ray.formats import Question
from ties_ray.formats._lora_refusals import LEFT_OUT, REASONS
from ties_ray.inputs.agreement import ReadModel
from ties_ray.inputs.answers import Inquiry, Stored, answer
from ties_ray.safetensors import nbytes
from ties_ray.stores import Stores
from ties_ray.tensors import TensorRef, exclusion


def disagreements(models: Sequence[ReadModel], stores: Stores, threads: Executor) -> Iterator[tuple[str, Problem]]:
    """Yield (model id, problem) of each model whose heads are not those of most models.

    Heads of the same names, dtypes and shapes are read and compared.
    """
    layouts = [_layout(model) for model in models]
    if not any(layouts):
        return
    usual, _ = Counter(layouts).most_common(1)[0]
    first = next(model for model, layout in zip(models, layouts, strict=True) if layout == usual)
    alike = [model for model, layout in zip(models, layouts, strict=True) if layout == usual and model is not first]
    asked = [
        Inquiry(model.entry.id, Question(name, name, "model"), _stored(model, ref), _stored(first, other))
        for model in alike
        for name, ref, other in _pairs(model, first)
    ]
    answered = answer(asked, stores, threads)
    for model, layout in zip(models, layouts, strict=True):
        for problem in answered.problems.get(model.entry.id, ()):
            yield model.entry.id, problem
        same = answered.same.get(model.entry.id, {})
        names = [question.mine for question, is_same in same.items() if not is_same]
        if layout != usual:
            names = [name for name, *_ in layout] or [name for name, *_ in usual]
        if names:
            yield model.entry.id, _problem(model, first, names)


def _problem(model: ReadModel, first: ReadModel, names: Sequence[str]) -> Problem:
    differs = "has another head than" if _layout(model) and _layout(first) else "does not agree on a head with"
    message = f"{differs} {first.entry.uri}, and an adapter carries along what all models share"
    others = {*model.contents.sources, *first.contents.sources}
    remedy = REASONS["head"][1].replace("{exclusion}", exclusion(names, others, LEFT_OUT))
    return Problem(model.entry.uri, f"{message}: {enumerated(list(names))}", remedy, "head")


def _layout(model: ReadModel) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    return tuple(sorted((name, ref.dtype, ref.shape) for name, ref in model.contents.heads.items()))


def _pairs(model: ReadModel, first: ReadModel) -> Iterator[tuple[str, TensorRef, TensorRef]]:
    """Yield (name, place, place in the first model) of each head."""
    for name, ref in model.contents.heads.items():
        yield name, ref, first.contents.heads[name]


def _stored(model: ReadModel, ref: TensorRef) -> Stored:
    return Stored(model.contents.objects[ref.object], ref.start, nbytes(ref.dtype, ref.shape))
