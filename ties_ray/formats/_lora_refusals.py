"""Why a PEFT adapter is refused, by code, and the remedies."""

from collections.abc import Collection, Mapping

from ties_ray.errors import Problem, enumerated
from ties_ray.tensors import LEAVE_OUT, exclusion

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_AGAIN = "save the adapter again, whole (save_pretrained)"
_OUT = LEAVE_OUT
_WHOLE = f"give the whole model that PEFT makes of it (merge_and_unload, save_pretrained) in its place, or {_OUT}"
_SAME_BASE = f"name the base that it was trained on, or {_OUT}"
_EXCLUDED = "{exclusion}"
LEFT_OUT = "leaves them out, with what was trained in them"
REASONS: Mapping[str, tuple[str, str]] = {
    "config_missing": (f"has no {CONFIG}, without which the scale is unknown", "add it beside the weights"),
    "config_json": (f"{CONFIG} is not a JSON object", "upload it again"),
    "config_value": (f"{CONFIG} has values that mean nothing", "correct them"),
    "pattern": (
        "has patterns that are no regular expressions, are too many, or hold flags, look-around or references",
        "write module names",
    ),
    "prompt": ("adds virtual tokens, a router or a model of its own to the base, and no change of its weights", _OUT),
    "peft_type": ("is no LoRA adapter", _WHOLE),
    "conditional": ("changes the base for some tokens only, or by a router, and no weights do the same", _OUT),
    "variant": ("is a variant of LoRA whose change is not scale * B @ A", _WHOLE),
    "layer_replication": ("has more layers than its base (layer_replication)", _OUT),
    "trainable_tokens": (
        "replaces rows of the embedding (trainable_token_indices), which is no low-rank change",
        _WHOLE,
    ),
    "target_parameters": (
        "has factors of parameters (target_parameters) that are not there, or that the base stores for all experts"
        " together",
        _WHOLE,
    ),
    "mutated_base": (
        "was trained on a base that its initialisation had changed",
        f"{_WHOLE}: PEFT repeats the initialisation where it loads the adapter",
    ),
    "residual_base": (
        "was trained on a base that its initialisation had changed by what it saw of the data, which the adapter does"
        " not tell",
        f"where that base was saved, name it as `base` and write init_lora_weights: true into {CONFIG}; otherwise save"
        f" it again from its training (path_initial_model_for_weight_conversion), or {_OUT}",
    ),
    "unknown_initialisation": (
        "names an initialisation that is not known here and may have changed the base",
        f"if it leaves the base alone, write init_lora_weights: true into {CONFIG}; otherwise {_WHOLE}",
    ),
    "pickle": (
        f"holds its weights as a pickle ({PICKLE}), which can run code when opened",
        "load it with PEFT where that is safe, and save it again (save_pretrained writes safetensors)",
    ),
    "weights_missing": (f"has no {WEIGHTS}", "complete the download or upload"),
    "nothing": ("holds no factors", _AGAIN),
    "empty": ("has empty or flattened tensors, as a save under ZeRO-3 or FSDP that gathered nothing leaves", _AGAIN),
    "orphan": ("has one factor of a pair without the other", _AGAIN),
    "duplicate": ("has two changes for one parameter", "keep one of them"),
    "several_adapters": ("holds several adapters in one file", "save each in a folder of its own (save_pretrained)"),
    "unknown_tensor": ("has tensors of adapters that are not known here", _WHOLE),
    "dtype": ("has tensors of a dtype that is not merged", "save it as float32, float16 or bfloat16"),
    "rank_mismatch": (f"has factors of another rank than {CONFIG} says, so the scale is unknown", "correct r"),
    "conv": ("has factors of convolutions, whose change is not a matrix", _WHOLE),
    "fused": ("changes parameters that the base stores in another layout, fused or apart", _WHOLE),
    "unknown_module": ("changes parameters that the base lacks", _SAME_BASE),
    "not_floating": ("changes parameters that are not floating-point numbers in the base", "give the unquantised base"),
    "shape_mismatch": ("has factors that do not fit the base", _SAME_BASE),
    "ambiguous_layout": (
        "has square modules of which it can't be told whether they are stored (in, out)",
        f"set fan_in_fan_out in {CONFIG} as it is for these modules, and name the others in `exclude`",
    ),
    "tied": (
        "changes one of several parameters that the base ties to each other, and only all of them can have the change",
        f"{_EXCLUDED}; or {_OUT}",
    ),
    "dora_mismatch": (f"has magnitudes where {CONFIG} says use_dora: false, or lacks them where it says true", _AGAIN),
    "dora_transposed": ("has DoRA magnitudes for modules that are not linear (out, in)", _WHOLE),
    "head": (
        "has parameters of its own that the base lacks (the head of its task)",
        "name a `base` that has them (load it by the class of the task, save_pretrained), with `allow: {saved_modules:"
        f" merge}}`; {_EXCLUDED}",
    ),
    "resized": (
        "has whole tables with another number of rows than the base's: its vocabulary was resized",
        f"name a base that was resized alike (resize_token_embeddings, save_pretrained) as `base`; {_EXCLUDED}",
    ),
    "saved_modules": (
        "has whole tensors beside its factors (modules_to_save, embeddings or biases)",
        f"`allow: {{saved_modules: merge}}` merges them as dense changes, saved minus base; {_EXCLUDED}",
    ),
}
"""(problem, remedy) by code; the modules or values follow in the message."""


class Refusals:
    """The reasons to refuse one adapter: for each code of `REASONS` the modules or values concerned."""

    def __init__(self) -> None:
        self._items: dict[str, list[str]] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, code: str, item: str = "", name: str = "") -> None:
        """Note an item; name: the parameter that `exclude` would leave out."""
        self._items.setdefault(code, []).append(item)
        self._names.setdefault(code, []).append(name)

    def __contains__(self, code: object) -> bool:
        return code in self._items

    def problems(self, where: str, others: Collection[str] = ()) -> tuple[Problem, ...]:
        """Return one problem a code, with its first few items; others: parameters that no pattern may match."""
        return tuple(
            Problem(
                where,
                message + (f": {enumerated(self._items[code])}" if any(self._items[code]) else ""),
                remedy.replace("{exclusion}", exclusion(self._names[code], others, LEFT_OUT)),
                code,
            )
            for code, (message, remedy) in REASONS.items()
            if code in self._items
        )
