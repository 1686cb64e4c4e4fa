"""Comparison of many models with each other, before any merge: norms, cosines, signs, spectra, and what stands out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ties_ray.inputs.catalog import Model
from ties_ray.recipe.recipe import ModelEntry
from ties_ray.reports.records import Progress, Report, Watch
from ties_ray.stores import Stores, last_part

if TYPE_CHECKING:
    from ties_ray.measures.findings import Finding
    from ties_ray.measures.pairs import Matrix, Pairs
    from ties_ray.operations.task_vectors import TaskVectors

MOST = 0.99
"""The share of a squared norm that `rank_99` components hold."""
NOISE = 1e-14
"""Share of a squared norm below which a component is a rounding error."""
DIGITS = 6
"""Digits behind the point of cosines and shares in the record."""


class ComparedModel(Report):
    """One model among others."""

    name: str
    """The last part of its URI, where that is unique."""
    uri: str
    norm: float
    """Norm of its task vector."""
    mean_cosine: float
    """Mean cosine with the others."""
    nearest: str
    """The model with which it has the largest cosine; empty where there is no other."""
    nearest_cosine: float
    against: float
    """Share of its changed elements that go against the sign of the sum of all models."""
    rank: int | None = None
    """Components of its low-rank changes at most; None where it has none."""
    rank_99: int | None = None
    """Components that hold 99 % of the squared norm of its low-rank changes."""
    spectrum: list[float] = []
    """Share of each component in that squared norm, falling, over all parameters."""
    not_finite: int = 0
    """Values that are NaN or Inf. They count as no change here, and a merge refuses them."""


class Remark(Report):
    """Something that stands out."""

    kind: str
    """`dead`, `duplicate`, `near duplicate`, `conflict`, `outlier`, `against` or `stranger`."""
    models: list[str]
    value: float
    """dead and outlier: norm over the median. against: share of signs. stranger: mean cosine. Else a cosine."""
    text: str
    """The same for people."""


class PoolComparison(Report):
    """How the models of a pool relate."""

    models: list[ComparedModel]
    remarks: list[Remark]
    """What stands out, the most serious first."""
    cosines: list[list[float]]
    """Row i holds the cosines of model i with the models before it."""
    conflicts: list[list[float]]
    """Row i holds, likewise, the share of common elements that are changed in different directions."""
    parameters: int
    """Parameters that any model changes."""
    signs_of: int
    """Elements whose signs were looked at: all of whole models, some rows of low-rank changes."""
    bytes_read: int
    refused: dict[str, list[str]] = {}
    """Reasons why models were left out, by URI."""
    notes: list[str] = []


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
    return compare_vectors(vectors, watch).model_copy(update={"refused": refused, "notes": list(catalog.notes)})


def compare_vectors(vectors: "TaskVectors", watch: Watch = lambda progress: None) -> PoolComparison:
    """Return how the task vectors of a merge's models relate."""
    from ties_ray.measures.findings import findings

    pairs, num_parameters = _sums(vectors, watch)
    names = names_of(vectors.merge.models)
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


def names_of(models: Sequence[Model]) -> list[str]:
    """Return a short name of each model: its id in the recipe, or the last part of its URI, where these are unique."""
    short = [model.id if not model.id.isdecimal() else last_part(model.uri.rstrip("/")) for model in models]
    counts = Counter(short)
    return [name if counts[name] == 1 else f"{name} ({model.id})" for name, model in zip(short, models, strict=True)]


def _sums(vectors: "TaskVectors", watch: Watch) -> tuple["Pairs", int]:
    """Return the sums over all parameters that any model changes, and how many these are."""
    import torch

    from ties_ray.measures.pairs import Pairs

    members = range(len(vectors.merge.models))
    pairs = Pairs(len(members))
    changed = [number for number, parameter in vectors.parameters.items() if parameter.changed]
    for done, number in enumerate(changed):
        watch(Progress("compare", done, len(changed), vectors.bytes_read, 0))
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
    models, value = [names[number] for number in finding.models], finding.value
    first, listed = models[0], " = ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")
    if finding.kind == "conflict":
        share = pairs.conflict_shares[finding.models[0], finding.models[1]]
        text = f"{first} against {models[1]}: cosine {value:.3f}, {share:.0%} of common signs differ"
    elif finding.kind == "dead":
        text = f"{first} changes nothing" if value == 0 else f"{first} changes {value:.1e} of the median norm"
    else:
        text = {
            "duplicate": f"{listed}: the same change (cosine {value:.6f})",
            "near duplicate": f"{listed.replace(' = ', ' ~ ')}: nearly the same direction (cosine {value:.4f} or more)",
            "outlier": f"{first}: its norm is {value:.3g} times the median",
            "against": f"{first}: {value:.0%} of its changes go against the sum of all",
            "stranger": f"{first}: its mean cosine with the others is {value:.3f}",
        }[finding.kind]
    return Remark(kind=finding.kind, models=models, value=value, text=text)


def _lower(matrix: "Matrix") -> list[list[float]]:
    """Return the lower triangle of a symmetric matrix, without its diagonal."""
    return [[round(float(value), DIGITS) for value in row[:number]] for number, row in enumerate(matrix)]
