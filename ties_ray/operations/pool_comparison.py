"""Comparison of many models with each other, before any merge: norms, cosines, signs, spectra, and what stands out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ties_ray.inputs.catalog import Model
from ties_ray.inputs.names import model_names
from ties_ray.recipe.recipe import ModelEntry
from ties_ray.reports.pool import ComparedModel, PoolComparison, Remark, text_of
from ties_ray.reports.records import Progress, Watch
from ties_ray.stores import Stores

if TYPE_CHECKING:
    from ties_ray.measures import Matrix
    from ties_ray.measures.findings import Finding
    from ties_ray.measures.pairs import Pairs
    from ties_ray.operations.task_vectors import TaskVectors

MOST = 0.99
"""The share of a squared norm that `rank_99` components hold."""
NOISE = 1e-14
"""Share of a squared norm below which a component is a rounding error."""
DIGITS = 6
"""Digits behind the point of cosines and shares in the record."""


def compare_models(
    stores: Stores, models: Sequence[str], base: str | None = None, watch: Watch = lambda progress: None
) -> PoolComparison:
    """Return how some models relate. It reads each of them once, and the base of whole models.

    models: folders, or globs of folders. base: the base of whole models; adapters need none, but for DoRA.
    Raises `InputError` where no model can be compared.
    """
    from ties_ray.operations.task_vectors import open_models

    entries = [ModelEntry(path=model) for model in models]
    without_base = (base,) if base else ()
    entries = [each.model_copy(update={"not_": without_base}) if each.is_glob else each for each in entries]
    vectors, catalog = open_models(stores, base, [each.model_dump(by_alias=True) for each in entries], drop=True)
    refused = {each.uri: [str(problem) for problem in each.problems] for each in catalog.refused}
    notes = [note for note in catalog.notes if not note.startswith("left out, as allowed")]  # `refused` has these
    return compare_vectors(vectors, watch).model_copy(update={"refused": refused, "notes": notes})


def compare_vectors(vectors: "TaskVectors", watch: Watch = lambda progress: None) -> PoolComparison:
    """Return how the task vectors of a merge's models relate."""
    from ties_ray.measures.findings import findings

    pairs, num_parameters = _sums(vectors, watch)
    names = list(model_names(vectors.merge.models).values())
    not_finite = Counter[int]()
    for (member, _), count in vectors.zeroed.items():
        not_finite[member] += count
    stand_out = findings(pairs.norms, pairs.cosines, pairs.against_shares)
    return PoolComparison(
        models=_models(vectors.merge.models, names, pairs, not_finite),
        remarks=[_remark(finding, names, pairs) for finding in stand_out],
        cosines=_lower(pairs.cosines),
        conflicts=_lower(pairs.conflict_shares),
        parameters=num_parameters,
        signs_of=pairs.looked_at,
        bytes_read=vectors.bytes_read,
    )


def _sums(vectors: "TaskVectors", watch: Watch) -> tuple["Pairs", int]:
    """Return the sums over all parameters that any model changes, and how many these are."""
    import torch

    from ties_ray.measures.pairs import Pairs

    members = range(len(vectors.merge.models))
    pairs = Pairs(len(members))
    changed = [number for number, parameter in vectors.parameters.items() if parameter.changed]
    for done, number in enumerate(changed):
        watch(Progress("compare", done, len(changed), vectors.bytes_read, 0, activity="parameters"))
        if vectors.is_product(number):
            pairs.add_products(list(vectors.factors(number, members)))
        else:
            for segment, deltas in vectors.deltas([number], members):
                block = torch.empty(len(members), segment.stop - segment.start)
                for member, delta in enumerate(deltas):
                    block[member] = delta
                pairs.add_dense(block)
    return pairs, len(changed)


def _models(
    models: Sequence[Model], names: Sequence[str], pairs: "Pairs", not_finite: Mapping[int, int]
) -> list[ComparedModel]:
    from ties_ray.measures.findings import mean_cosines

    cosines, means, against = pairs.cosines, mean_cosines(pairs.cosines), pairs.against_shares
    compared = []
    for number, model in enumerate(models):
        others = [other for other in range(len(models)) if other != number]
        nearest = max(others, key=lambda other: cosines[number, other], default=None)
        compared.append(
            ComparedModel(
                name=names[number],
                uri=model.uri,
                norm=float(pairs.norms[number]),
                mean_cosine=round(float(means[number]), DIGITS),
                nearest="" if nearest is None else names[nearest],
                nearest_cosine=0.0 if nearest is None else round(float(cosines[number, nearest]), DIGITS),
                against=round(float(against[number]), DIGITS),
                not_finite=not_finite.get(number, 0),
                **_spectrum(pairs.spectrum[number]),
            )
        )
    return compared


def _spectrum(squares: "Matrix") -> dict[str, Any]:
    total = float(sum(squares))
    if not total:
        return {}
    shares = [float(square) / total for square in squares]
    while shares and shares[-1] < NOISE:
        shares.pop()
    held, rank_99 = 0.0, 0
    while held < MOST and rank_99 < len(shares):
        held += shares[rank_99]
        rank_99 += 1
    return {"rank": len(shares), "rank_99": rank_99, "spectrum": [round(share, DIGITS) for share in shares]}


def _remark(finding: "Finding", names: Sequence[str], pairs: "Pairs") -> Remark:
    models = [names[number] for number in finding.models]
    share = pairs.conflict_shares[finding.models[0], finding.models[-1]]
    return Remark(
        kind=finding.kind, models=models, value=finding.value, text=text_of(finding.kind, models, finding.value, share)
    )


def _lower(matrix: "Matrix") -> list[list[float]]:
    """Return the lower triangle of a symmetric matrix, without its diagonal."""
    return [[round(float(value), DIGITS) for value in row[:number]] for number, row in enumerate(matrix)]
