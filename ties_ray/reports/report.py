"""The report of a merge: what stands out, what each model added, and where models agree. Pure."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from pydantic import ConfigDict

from ties_ray.evaluations import Score
from ties_ray.inputs.names import model_names
from ties_ray.measures.findings import findings
from ties_ray.reports.controls import Controls
from ties_ray.reports.effects import MergeEffects, ModelEffects, ParameterEffects
from ties_ray.reports.pool import ComparedModel, PoolComparison, Remark, text_of
from ties_ray.reports.records import InputProvenance, MergeResult, Report
from ties_ray.rounds.threshold import TrimReport

LARGE_ERROR = 0.05
"""A truncation error above this stands out."""
MUCH_LOST = 0.5
"""A share of magnitude that cancels above this stands out."""
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


class Place(Report):
    """What the merge did to a layer, or to all modules of one name; shares are means over elements."""

    name: str
    elements: int
    density: float
    changed: float
    conflict: float
    by_chance: float
    """The conflict that signs by chance would have."""
    cancellation: float
    alone: float
    norm: float


class ReportedModel(Report):
    """One model that was merged."""

    name: str
    id: str
    uri: str
    weight: float
    density: float | None
    """The density that the recipe gives it; None for the method's own."""
    licence: str
    account: str
    """What became of the values that it stores."""
    threshold: str = ""
    """The threshold of its trim, or the range of its tensors' thresholds; empty where nothing was trimmed."""
    kept: float | None = None
    """Share of its values that trim kept."""
    effects: ModelEffects | None = None
    compared: ComparedModel | None = None


class MergeReport(Report):
    """All that is known of a finished merge."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    output: str
    title: str
    remarks: list[Remark]
    """What stands out, the most serious first."""
    models: list[ReportedModel]
    layers: list[Place]
    modules: list[Place]
    clusters: list[list[str]] = []
    """Names of models in groups of similar directions, in the order of the figure; empty without a comparison."""
    comparison: PoolComparison | None = None
    controls: Controls | None = None
    """Merges without each model, and with signs drawn by chance; None where nobody asked for them."""
    scores: list[Score] = []
    """What `ties-ray evaluate` has stored beside the output."""
    result: MergeResult

    def html(self) -> str:
        """Return the report as one page of HTML that needs no network."""
        from ties_ray.reports.page import page_of

        return page_of(self)


def make_report(
    result: MergeResult,
    comparison: PoolComparison | None,
    clusters: list[list[str]],
    controls: Controls | None = None,
    scores: Sequence[Score] = (),
) -> MergeReport:
    """Return the report of a merge. comparison, controls: what was asked for beside the result record."""
    provenance, effects = result.provenance, result.effects
    inputs = provenance.models if provenance else []
    models = _models(inputs, result, comparison)
    method = provenance.method["name"] if provenance else "merge"
    return MergeReport(
        output=result.output,
        title=f"{method} of {len(inputs):,} model{'s' * (len(inputs) != 1)}",
        remarks=[*_remarks(result, models, comparison), *_of_controls(controls)],
        models=models,
        layers=sorted(_places(effects, layer_of), key=lambda each: int(each.name)) if effects else [],
        modules=_places(effects, module_of) if effects else [],
        clusters=clusters,
        comparison=comparison,
        controls=controls,
        scores=list(scores),
        result=result,
    )


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its first number, empty for a parameter outside of all layers."""
    match = _LAYER.search(name)
    return match[1] if match else ""


def module_of(name: str) -> str:
    """Return the module of a parameter, without its layer and without `weight`."""
    match = _LAYER.search(name)
    return (name[match.end() :] if match else name).removesuffix(".weight")


def joined(name: str, parameters: Sequence[ParameterEffects]) -> Place:
    """Return what the merge did to some parameters together."""
    elements = sum(each.elements for each in parameters)

    def mean(values: Iterable[float]) -> float:
        total = math.fsum(value * each.elements for value, each in zip(values, parameters, strict=True))
        return round(total / max(1, elements), 6)

    return Place(
        name=name,
        elements=elements,
        density=mean(each.density for each in parameters),
        changed=mean(each.changed for each in parameters),
        conflict=mean(each.conflict for each in parameters),
        by_chance=mean(each.by_chance for each in parameters),
        cancellation=mean(each.cancellation for each in parameters),
        alone=mean(each.alone for each in parameters),
        norm=math.hypot(*(each.norm for each in parameters)),
    )


def _places(effects: MergeEffects, key: Callable[[str], str]) -> list[Place]:
    """Return the parameters joined by a key of their names, in the order in which they first come."""
    groups: dict[str, list[ParameterEffects]] = {}
    for parameter in effects.parameters:
        if name := key(parameter.name):
            groups.setdefault(name, []).append(parameter)
    return [joined(name, parameters) for name, parameters in groups.items()]


def _models(
    inputs: Sequence[InputProvenance], result: MergeResult, comparison: PoolComparison | None
) -> list[ReportedModel]:
    effects = {each.id: each for each in result.effects.models} if result.effects else {}
    compared = {each.uri: each for each in comparison.models} if comparison else {}
    trims: defaultdict[str, list[TrimReport]] = defaultdict(list)
    for trim in result.trims:
        trims[trim.model].append(trim)
    return [
        ReportedModel(
            name=name,
            id=model.id,
            uri=model.uri,
            weight=model.weight,
            density=model.density,
            licence=model.licence,
            account=str(model.account),
            effects=effects.get(model.id),
            compared=compared.get(model.uri),
            **_trim(trims[model.id]),
        )
        for name, model in zip(model_names(inputs).values(), inputs, strict=True)
    ]


def _trim(trims: Sequence[TrimReport]) -> dict[str, Any]:
    if not trims:
        return {}
    low, high = min(trim.threshold for trim in trims), max(trim.threshold for trim in trims)
    kept = sum(trim.kept for trim in trims) / max(1, sum(trim.size for trim in trims))
    return {"threshold": f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}", "kept": round(kept, 6)}


# -- what stands out


def _remarks(
    result: MergeResult, models: Sequence[ReportedModel], comparison: PoolComparison | None
) -> Iterator[Remark]:
    yield from comparison.remarks if comparison else _of_effects(models)
    if comparison is None:
        yield from _alike(models)
    if (truncation := result.truncation) and truncation.relative_error > LARGE_ERROR:
        text = f"rank {truncation.rank} loses {truncation.relative_error:.0%} of the merged norm; try output.rank: auto"
        yield Remark(kind="truncation", models=[], value=truncation.relative_error, text=text)
    lost = _cancelled(result.effects)
    if lost > MUCH_LOST:
        text = f"{lost:.0%} of the models' changes cancel each other"
        yield Remark(kind="cancellation", models=[], value=lost, text=text)
    if result.zeroed:
        count, places = sum(result.zeroed.values()), len(result.zeroed)
        text = f"{count:,} values in {places:,} tensors were not finite, and count as no change"
        yield Remark(kind="not finite", models=[], value=count, text=text)
    if result.refused:
        text = f"{len(result.refused):,} models were left out, as the recipe allows"
        yield Remark(kind="left out", models=sorted(result.refused), value=len(result.refused), text=text)


def _of_effects(models: Sequence[ReportedModel]) -> Iterator[Remark]:
    """Yield the models whose norms or signs stand out, by the figures that the merge gathered."""
    gathered = [(model.name, model.effects) for model in models if model.effects]
    if not gathered:
        return
    norms = np.array([effects.norm for _, effects in gathered])
    against = np.array([effects.against for _, effects in gathered])
    for finding in findings(norms, np.eye(len(gathered)), against):
        names = [gathered[number][0] for number in finding.models]
        yield Remark(
            kind=finding.kind, models=names, value=finding.value, text=text_of(finding.kind, names, finding.value)
        )


def _alike(models: Sequence[ReportedModel]) -> Iterator[Remark]:
    """Yield the models whose figures all agree to the last digit."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for model in models:
        if model.effects and model.effects.norm:
            groups[model.effects.model_dump_json(exclude={"id"})].append(model.name)
    for names in groups.values():
        if len(names) > 1:
            listed = " = ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            text = f"{listed}: all figures are the same, so these may be the same model; --compare tells"
            yield Remark(kind="alike", models=names, value=1.0, text=text)


def _of_controls(controls: Controls | None) -> Iterator[Remark]:
    """Yield the model without which the merge changes most, and a merge that is no larger than one by chance."""
    if controls is None:
        return
    for first in controls.left_out[:1]:
        text = f"{first.name}: without it the merged change differs by {first.change:.0%} of its norm"
        yield Remark(kind="left one out", models=[first.name], value=first.change, text=text)
    chance = controls.by_chance
    if chance.most >= 1:
        text = f"with signs drawn by chance the merged change has {chance.norm:.0%} of its norm: models share little"
        yield Remark(kind="by chance", models=[], value=chance.norm, text=text)


def _cancelled(effects: MergeEffects | None) -> float:
    return joined("", effects.parameters).cancellation if effects else 0.0
