"""The methods of mergekit 0.1.5, and what each becomes in a recipe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ties_ray.recipe._mergekit_settings import Coefficient, Document, Path, Settings, Value

Json = dict[str, Any]


class Source(NamedTuple):
    """One model of the configuration."""

    entry: Json
    """Its path in a recipe, and its adapter if it has one."""
    is_base: bool
    places: tuple[Path, ...]
    """Where it stands in each block."""


@dataclass(frozen=True)
class Asked:
    """What a configuration asks of its method."""

    settings: Settings
    document: Document
    base: str | None
    sources: tuple[Source, ...]
    """The models, the base among them if it is named."""
    notes: list[str] = field(default_factory=list)

    @property
    def others(self) -> tuple[Source, ...]:
        """Return the models without the base."""
        return tuple(source for source in self.sources if not source.is_base)

    def of_model(self, name: str, source: Source, default: float | None) -> Coefficient:
        """Return a number of one model."""
        return self.settings.coefficient(name, source.places, default)

    def shared(self, name: str, default: float | None) -> Coefficient:
        """Return a number that is not of one model."""
        return self.settings.coefficient(name, None, default)

    def constant(self, name: str, default: float) -> float:
        """Return a number that is the same for all tensors."""
        return self.settings.constant(name, None, default)

    def constant_of_models(self, name: str, default: float) -> float:
        """Return a number of models that is the same for all tensors and models."""
        return self.settings.constant(name, [source.places for source in self.others], default)

    def flag(self, name: str, default: bool) -> bool:
        """Return a switch."""
        return self.settings.flag(name, default)

    def wrong(self, message: str, remedy: str) -> None:
        """Note that the method can't be converted."""
        self.document.wrong(("merge_method",), message, remedy)


class Converted(NamedTuple):
    """What a method becomes."""

    base: str
    models: list[Json]
    method: Json


class Spec(NamedTuple):
    """What mergekit's method takes, and how it is converted."""

    convert: Callable[[Asked], Converted]
    shared: tuple[str, ...] = ()
    """Parameters of the whole merge."""
    of_models: tuple[str, ...] = ()
    """Parameters that each model may have."""
    base: Literal["required", "optional", "input"] = "required"
    """input: the base is one of the models that are merged."""
    least: int = 1
    """Fewest models beside the base, or with it where it is an input."""
    most: int | None = None


def _entry(source: Source, **more: Any) -> Json:
    """Return a line of `models`; a base that is merged too gets an id, without which a recipe refuses it."""
    return {**source.entry, **({"id": "base-model"} if source.is_base else {}), **more}


def _weighted(asked: Asked, sources: tuple[Source, ...]) -> list[Json]:
    """Return the lines of models with their weights; a weight of 1 is the default."""
    weights = [asked.of_model("weight", source, None) for source in sources]
    return [
        _entry(source, **({} if weight == 1 else {"weight": weight}))
        for source, weight in zip(sources, weights, strict=True)
    ]


def _base_or_first(asked: Asked) -> str:
    """Return the base, or the first model: a base cancels out of a merge of whole weights."""
    if asked.base is not None:
        return asked.base
    asked.notes.append("the first model serves as the base: it cancels out, and gives config and tokenizer")
    return str(asked.sources[0].entry["path"])


def _as_inputs(asked: Asked, base: str) -> tuple[Source, ...]:
    """Return all models, of which the one at the base's path has an id of its own."""
    return tuple(
        source._replace(is_base=source.entry["path"] == base and "adapter" not in source.entry)
        for source in asked.sources
    )


def _linear(asked: Asked) -> Converted:
    base = _base_or_first(asked)
    models = _weighted(asked, _as_inputs(asked, base))
    if asked.flag("normalize", default=True):
        return Converted(base, models, {"name": "average"})
    return Converted(base, models, {"name": "task_arithmetic", "vectors": "weights"})


def _slerp(asked: Asked) -> Converted:
    base, second = asked.base or "", asked.others[0]
    share = asked.shared("t", None)
    first = Source({"path": base}, is_base=True, places=())
    method: Json = {"name": "slerp"}
    if isinstance(share, float):
        return Converted(base, [_entry(first), _entry(second)], {**method, "t": share})
    return Converted(base, [_entry(first, weight=_rest(share)), _entry(second, weight=share)], method)


def _rest(share: Coefficient) -> Coefficient:
    """Return 1 minus a number, a gradient or a table."""

    def rest(value: Value) -> Value:
        return [round(1 - each, 12) for each in value] if isinstance(value, list) else round(1 - value, 12)

    return {pattern: rest(value) for pattern, value in share.items()} if isinstance(share, dict) else rest(share)


def _nuslerp(asked: Asked) -> Converted:
    method: Json = {"name": "nuslerp"}
    if not asked.flag("nuslerp_flatten", default=True):
        method["arcs"] = "row"
        if asked.flag("nuslerp_row_wise", default=False):
            asked.wrong("nuslerp_row_wise joins columns by arcs, which ties_ray does not", "leave nuslerp_row_wise out")
    if asked.base is not None:
        return Converted(asked.base, _weighted(asked, asked.others), method)
    base = _base_or_first(asked)
    return Converted(base, _weighted(asked, _as_inputs(asked, base)), {**method, "vectors": "weights"})


def _multislerp(asked: Asked) -> Converted:
    base = _base_or_first(asked)
    models = _weighted(asked, asked.others if asked.base is not None else _as_inputs(asked, base))
    method: Json = {"name": "multislerp", **({} if asked.base is not None else {"vectors": "weights"})}
    weights = [model.get("weight", 1.0) for model in models]
    if not asked.flag("normalize_weights", default=True):
        numbers = [weight for weight in weights if isinstance(weight, float | int)]
        if len(numbers) < len(weights) or abs(sum(numbers) - 1) > 1e-9:
            asked.wrong("normalize_weights: false needs weights that sum to 1 here", "make the weights sum to 1")
    if asked.constant("eps", 1e-8) != 1e-8:
        asked.notes.append("eps has no counterpart: lengths are exact here")
    return Converted(base, models, method)


def _karcher(asked: Asked) -> Converted:
    base = _base_or_first(asked)
    steps, tolerance = asked.constant("max_iter", 10), asked.constant("tol", 1e-5)
    method = {"name": "karcher", "max_iter": int(steps), "tolerance": tolerance}
    return Converted(base, [_entry(source) for source in _as_inputs(asked, base)], method)


def _nearswap(asked: Asked) -> Converted:
    share = asked.shared("t", None)
    if not isinstance(share, float):
        asked.document.wrong(("parameters", "t"), "t differs by tensor, and nearswap takes one", "give one t")
    return Converted(asked.base or "", [_entry(asked.others[0])], {"name": "nearswap", "t": share})


def _plain(name: str, fields: Mapping[str, tuple[str, float]], **more: Any) -> Callable[[Asked], Converted]:
    """Return the conversion of a method whose models have no numbers.

    fields: of each of mergekit's keys the name here and the default.
    """

    def convert(asked: Asked) -> Converted:
        numbers = {key: asked.constant(theirs, default) for theirs, (key, default) in fields.items()}
        return Converted(
            asked.base or "", [_entry(source) for source in asked.others], {"name": name, **more, **numbers}
        )

    return convert


def _model_stock(asked: Asked) -> Converted:
    rows = {"scope": "row"} if asked.flag("filter_wise", default=False) else {}
    method = {"name": "model_stock", "profile": "mergekit", **rows}
    return Converted(asked.base or "", [_entry(source) for source in asked.others], method)


def _sce(asked: Asked) -> Converted:
    _note_masks(asked)
    select = asked.constant("select_topk", 1.0)
    method = {"name": "sce", "select_topk": select, "at_threshold": "exact", "least": 1e-6}
    return Converted(asked.base or "", [_entry(source) for source in asked.others], method)


def _note_masks(asked: Asked) -> None:
    if asked.flag("int8_mask", default=False):
        asked.notes.append("int8_mask is left out: it changes the dtype of a temporary mask in mergekit, and no result")


def _arithmetic(
    name: str, *, normalizes: bool = False, rescales: bool = False, drops: str = "", **fixed: Any
) -> Callable[[Asked], Converted]:
    """Return the conversion of a method of sums; normalizes, rescales: mergekit's defaults; drops: its own share."""

    def convert(asked: Asked) -> Converted:
        _note_masks(asked)
        normalize, factor = asked.flag("normalize", normalizes), asked.shared("lambda", 1.0)
        method: Json = {"name": name, **fixed, **({} if factor == 1 else {"lambda": factor})}
        models = _weighted(asked, asked.others)
        if name == "task_arithmetic":
            return Converted(asked.base or "", models, {**method, "name": "average" if normalize else name})
        rescale = "l1" if asked.flag("rescale", rescales) else "none"
        method |= {"merge": "mean" if normalize else "sum", "rescale": rescale}
        if drops:
            method[drops] = asked.constant_of_models(drops, {"gamma": 0.01, "epsilon": 0.15}[drops])
        return Converted(asked.base or "", _with_densities(asked, models, method), method)

    return convert


def _with_densities(asked: Asked, models: list[Json], method: Json) -> list[Json]:
    """Return the models with their densities; one that all share goes to the method."""
    densities = [_share(asked, source) for source in asked.others]
    if all(density == densities[0] for density in densities):
        method["density"] = densities[0]
        return models
    method["density"] = 1.0
    return [{**model, "density": density} for model, density in zip(models, densities, strict=True)]


def _share(asked: Asked, source: Source) -> Coefficient:
    """Return a density of at most 1; mergekit trims nothing above."""
    density = asked.of_model("density", source, 1.0)

    def fit(value: Value) -> Value:
        if any(each <= 0 for each in (value if isinstance(value, list) else [value])):
            asked.document.wrong(source.places[0], "has a density of 0, which keeps nothing", "give it a weight of 0")
        return [min(1.0, each) for each in value] if isinstance(value, list) else min(1.0, value)

    return {pattern: fit(value) for pattern, value in density.items()} if isinstance(density, dict) else fit(density)


_OF_SUMS = ("normalize", "rescale", "lambda", "int8_mask")
_OF_TRIMS = ("weight", "density")
METHODS: dict[str, Spec] = {
    "linear": Spec(_linear, ("normalize",), ("weight",), "input"),
    "slerp": Spec(_slerp, ("t",), most=1),
    "nuslerp": Spec(_nuslerp, ("nuslerp_flatten", "nuslerp_row_wise"), ("weight",), "optional", least=2, most=2),
    "multislerp": Spec(_multislerp, ("normalize_weights", "eps"), ("weight",), "optional"),
    "karcher": Spec(_karcher, ("max_iter", "tol"), base="input"),
    "nearswap": Spec(_nearswap, ("t",), most=1),
    "model_stock": Spec(_model_stock, ("filter_wise",), least=2),
    "sce": Spec(_sce, ("select_topk", "int8_mask")),
    "ram": Spec(_plain("ram", {"epsilon": ("epsilon", 1e-5)}), ("epsilon",)),
    "ramplus_tl": Spec(
        _plain("ram", {"epsilon": ("epsilon", 1e-5), "r": ("r", 0.1), "alpha": ("alpha", 0.2)}, plus=True),
        ("epsilon", "r", "alpha"),
    ),
    "task_arithmetic": Spec(_arithmetic("task_arithmetic"), ("normalize", "lambda", "int8_mask"), ("weight",)),
    "ties": Spec(_arithmetic("ties", normalizes=True, profile="mergekit"), _OF_SUMS, _OF_TRIMS),
    "dare_linear": Spec(_arithmetic("dare", rescales=True, combine="linear"), _OF_SUMS, _OF_TRIMS),
    "dare_ties": Spec(
        _arithmetic("dare", rescales=True, combine="ties", zero_sum="positive"), _OF_SUMS, _OF_TRIMS
    ),
    "breadcrumbs": Spec(_arithmetic("breadcrumbs", drops="gamma"), _OF_SUMS, (*_OF_TRIMS, "gamma")),
    "breadcrumbs_ties": Spec(
        _arithmetic("breadcrumbs", drops="gamma", combine="ties", zero_sum="positive"), _OF_SUMS, (*_OF_TRIMS, "gamma")
    ),
    "della": Spec(
        _arithmetic("della", normalizes=True, rescales=True, drops="epsilon", zero_sum="positive"),
        _OF_SUMS,
        (*_OF_TRIMS, "epsilon"),
    ),
    "della_linear": Spec(
        _arithmetic("della", rescales=True, drops="epsilon", combine="linear"), _OF_SUMS, (*_OF_TRIMS, "epsilon")
    ),
}  # fmt: skip
"""What can be converted, by mergekit's name."""
REFUSED = {
    "passthrough": ("passthrough stacks layers, and ties_ray merges models of one shape", "stack them with mergekit"),
    "arcee_fusion": ("arcee_fusion takes thresholds from random samples, and ties_ray has no such method", ""),
}
"""Methods that have no counterpart: why, and what to do."""
