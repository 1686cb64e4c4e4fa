"""What PEFT's `adapter_config.json` says of the scale, and which configs are refused."""

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from ties_ray.formats import Folder
from ties_ray.formats._lora_experts import Factors, parameters_of
from ties_ray.formats._lora_refusals import CONFIG, Refusals
from ties_ray.libraries import bounded
from ties_ray.libraries.patterns import UnfitKey, resolve

_VARIANTS: Mapping[str, str] = {
    "use_qalora": "variant",
    "use_bdlora": "variant",
    "megatron_config": "variant",
    "alora_invocation_tokens": "conditional",
    "arrow_config": "conditional",
}
"""Keys of adapters whose change is not scale * B @ A, with the code of the reason."""
_HARMLESS = frozenset({
    "use_dora", "use_rslora", "velora_config", "monteclora_config", "kasa_config", "eva_config", "corda_config",
    "lora_ga_config", "loftq_config", "runtime_config", *_VARIANTS,
})  # fmt: skip
"""`use_...` and `..._config` keys that are handled here, or only describe the training.

Any other such key that is set may announce a variant unknown here, and is refused."""
_UNCHANGED_BASE = frozenset({"true", "false", "gaussian", "orthogonal", "eva", "mica"})
"""Values of `init_lora_weights` that leave the base alone; PEFT writes true when it converts another one."""
_REPEATED = ("pissa", "olora", "loftq")
"""Initialisations that change the base by its own values, so that PEFT repeats them when it loads the adapter."""
_FROM_DATA = ("corda", "lora_ga")
"""Initialisations that change the base by data or gradients, which nobody can repeat."""
_WITHOUT_CHANGE = frozenset({
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT",
    "POLY", "XLORA", "LILY", "SHADOW",
})  # fmt: skip
"""`peft_type`s that PEFT can't merge into the base."""

_LARGEST = 2**31
"""The largest rank or alpha that is accepted: a larger one is an attack."""


class Settings(NamedTuple):
    """The settings of a config that decide scales and layouts."""

    r: int | None
    """The rank; None where the config gives none that can be used."""
    alpha: float
    ranks: Mapping[str, int]
    """The ranks of modules that have one of their own, by path."""
    alphas: Mapping[str, float]
    """The alphas of modules that have one of their own, by path."""
    rslora: bool
    transposed: bool
    dora: bool
    base_name: str
    task_type: str
    modules_to_save: tuple[str, ...] = ()
    """The modules that were trained whole, as the config names them."""
    target_parameters: tuple[str, ...] = ()
    """The ends of names of parameters that have factors of their own, apart from modules."""

    def scale(self, path: str, rank: int) -> float:
        """Return the factor of a module's B @ A."""
        alpha = self.alphas.get(path, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def config_of(folder: Folder, refused: Refusals) -> Mapping[str, Any]:
    """Return the config; it is empty, and refused, where there is none or it belongs to another kind of adapter."""
    if CONFIG not in folder.texts:
        refused.add("config_missing")
        return {}
    try:
        config = bounded.loads(folder.texts[CONFIG])
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        refused.add("config_json")
        return {}
    kind = config.get("peft_type")
    if kind != "LORA":
        refused.add("prompt" if isinstance(kind, str) and kind in _WITHOUT_CHANGE else "peft_type", _shown(kind))
        return config  # its other keys mean something else
    if config.get("layer_replication"):
        refused.add("layer_replication")
    if config.get("trainable_token_indices"):
        refused.add("trainable_tokens")
    initialised = "kasa" if config.get("kasa_config") else config.get("init_lora_weights", True)
    code = _of_initialisation(initialised)
    if code:
        refused.add(code, _shown(initialised))
    for key, value in config.items():
        may_be_variant = (key.startswith("use_") or key.endswith("_config")) and key not in _HARMLESS
        if value and (may_be_variant or key in _VARIANTS):
            refused.add(_VARIANTS.get(key, "variant"), key)
    return config


def _of_initialisation(value: object) -> str | None:
    """Return the code of an initialisation that changes the base; None where it leaves the base alone."""
    name = str(value).lower() if isinstance(value, bool | str) else ""
    if value is None or name in _UNCHANGED_BASE:
        return None
    if name.startswith(_REPEATED) or name == "kasa":
        return "mutated_base"
    return "residual_base" if name in _FROM_DATA else "unknown_initialisation"


def settings_of(config: Mapping[str, Any], factors: Factors, modules: Collection[str], refused: Refusals) -> Settings:
    """Return a config's settings; a value that can't be used is refused, and the default replaces it.

    factors: those of `modules` that have both, by path.
    """

    def value(key: str, default: Any, usable: Callable[[Any], bool]) -> Any:
        setting = config.get(key, default)
        if usable(setting):
            return setting
        refused.add("config_value", f"{key}: {_shown(setting)}")
        return default

    def pattern(key: str, usable: Callable[[Any], bool]) -> Any:
        setting = value(key, None, lambda it: it is None or (isinstance(it, dict) and all(map(usable, it.values()))))
        try:
            return resolve(setting or {}, modules)
        except UnfitKey as error:
            refused.add("pattern", _shown(str(error)))
            return {}

    def flag(key: str) -> bool:
        return bool(value(key, False, lambda it: it is None or isinstance(it, bool)))

    def text(key: str) -> str:
        return str(value(key, None, lambda it: it is None or isinstance(it, str)) or "")

    targets = tuple(value("target_parameters", None, _is_list_of_names) or ())
    parameters = parameters_of(factors, targets)
    modules = [parameters.get(module, module) for module in modules]
    unknown = [target for target in targets if not any(name.endswith(target) for name in parameters.values())]
    if unknown:
        refused.add("target_parameters", ", ".join(unknown))
    r = value("r", 8, _is_rank)  # 8 and 8 are PEFT's own defaults
    alpha = value("lora_alpha", 8, _is_alpha)
    ranks, alphas = pattern("rank_pattern", _is_rank), pattern("alpha_pattern", _is_alpha)
    usable = bool(config) and "pattern" not in refused and "config_value" not in refused
    return Settings(
        r=r if usable else None,
        alpha=float(alpha),
        ranks=ranks,
        alphas=alphas,
        rslora=flag("use_rslora"),
        transposed=flag("fan_in_fan_out"),
        dora=flag("use_dora"),
        base_name=text("base_model_name_or_path"),
        task_type=text("task_type"),
        target_parameters=targets,
        modules_to_save=tuple(value("modules_to_save", None, _is_list_of_names) or ()),
    )


def _is_list_of_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < _LARGEST


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # type: ignore[arg-type]  # nan compares false


def _shown(value: object) -> str:
    """Return a short text of anything that JSON may hold."""
    return reprlib.repr(value)
