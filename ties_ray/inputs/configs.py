"""Notes on differences between the models' configs and the base's, as far as they change the function."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ties_ray.errors import printable
from ties_ray.libraries import bounded

CONFIG = "config.json"
Config = Mapping[str, Any]

_BOOKKEEPING = (
    "_*", "transformers_version", "*_version", "architectures", "auto_map", "torch_dtype", "dtype", "use_bfloat16",
    "use_cache", "*_token_id", "*_token_ids", "*_token_index", "vocab_size", "tie_encoder_decoder", "id2label",
    "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class",
    "prefix", "quantization_config", "quantization", "compression_config", "unsloth_*", "attn_implementation",
    "use_flash_attn", "output_*", "return_dict*", "torchscript", "gradient_checkpointing", "pretraining_tp",
    "*dropout*", "*_pdrop", "*drop_path*", "layerdrop", "*_layerdrop", "initializer_*", "init_*", "*_init_std",
    "*_loss*", "router_aux*", "router_z*", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "temperature", "top_k", "top_p", "typical_p", "*_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_*", "num_return_sequences",
    "remove_invalid_values", "chunk_size_feed_forward", "mask_time_*", "mask_feature_*", "apply_spec_augment",
    "tf_*", "pruned_heads", "cross_attention_hidden_size", "is_encoder_decoder", "model_max_length", "fp16", "bf16",
    "fp32", "ctc_*",
)  # fmt: skip
"""Keys of training, storage and generation, which do not change the computed function."""
_SAME = {
    "hidden_activation": "hidden_act", "activation_function": "hidden_act", "n_positions": "max_position_embeddings",
    "n_ctx": "max_position_embeddings", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size", "n_inner": "intermediate_size", "num_experts_per_token": "num_experts_per_tok",
}  # fmt: skip
"""Keys of one meaning, which versions and architectures spell differently."""
_THETAS = ("rope_theta", "rotary_emb_base", "global_rope_theta")
_LOCAL_THETAS = ("rope_local_base_freq", "local_rope_theta")
_PARTS = ("partial_rotary_factor", "rotary_pct")
_ROPE = frozenset({*_THETAS, *_LOCAL_THETAS, *_PARTS, "rope_scaling", "rope_parameters"})
_ROPE_TYPES = {"su": "longrope", "mrope": "default"}
_ABSENT: Mapping[str, object] = {
    "rope_theta": 10000.0, "rope_type": "default", "rope_factor": 1.0, "rope_partial_rotary_factor": 1.0,
    "sliding_window": None, "attention_bias": False, "mlp_bias": False, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "logit_scale": 1.0,
}  # fmt: skip
"""The meaning of a missing key. A key that is not here, and that only one of two configs has, is a spelling of its
version."""
_UNSET: tuple[object, ...] = (None, False, 0, "", [], {})
"""Values that mean the same as leaving the key out."""
_SHOWN = 60
"""The most characters of a value that a note shows."""
_FEW = 8
"""The most differences, and models, that a note names."""


def notes(base: bytes, models: Sequence[tuple[str, bytes]], kept: str) -> list[str]:
    """Return notes on models whose configs (name, text) differ from the base's; equal differences share a note.

    kept: the owner of the output's config, as the note names it. Spellings and versions are no difference.
    """
    ours = _function(_parsed(base))
    differences: dict[bytes, str] = {}
    who: dict[str, list[str]] = {}
    for id_, text in models:
        if text not in differences:
            differences[text] = _difference(ours, _function(_parsed(text))) if text != base else ""
        if differences[text]:
            who.setdefault(differences[text], []).append(id_)
    return [
        f"{named(ids)}: {CONFIG} disagrees with the base's ({message}); the output has {kept}"
        for message, ids in who.items()
    ]


def named(names: Sequence[str]) -> str:
    """Return the models a note is about: `model math`, `models math, code and 40 more`."""
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return f"model{'s' * (len(names) > 1)} {', '.join(names[:_FEW])}{more}"


def rows(config: bytes) -> int | None:
    """Return the number of embedding rows that a config implies; None where it implies none."""
    settings = _parsed(config)
    text = settings.get("text_config")
    size = text.get("vocab_size") if isinstance(text, dict) else None
    size = settings.get("vocab_size") if size is None else size
    return size if isinstance(size, int) else None


def _parsed(text: bytes) -> Config:
    try:
        value = bounded.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}  # its format has said so
    return value if isinstance(value, dict) else {}


def _difference(base: Config, model: Config) -> str:
    differences = [
        f"{key} {_shown(theirs)} where the base has {_shown(ours)}"
        for key, ours, theirs in _pairs(base, model)
        if not _equal(ours, theirs)
    ]
    return ", ".join(differences[:_FEW]) + (f" and {len(differences) - _FEW} more" if len(differences) > _FEW else "")


def _pairs(base: Config, model: Config) -> Iterator[tuple[str, object, object]]:
    """Yield (key, value in the base, value in the model) of what both say, or one says and the other has a default."""
    for key in dict.fromkeys((*base, *model)):
        last = key.rpartition(".")[2]
        if key in base and key in model:
            yield key, base[key], model[key]
        elif last in _ABSENT and (base.get(key) or model.get(key)):
            default = _ABSENT[last]
            yield key, base.get(key, default), model.get(key, default)


def _function(config: Config) -> dict[str, Any]:
    """Return what a config says of the function, by key; keys of parts (`vision_config`) with the part before them."""
    text = config.get("text_config")
    if isinstance(text, dict):  # of a multimodal model it may stand for the whole: the other config can be its own
        config = {**{key: value for key, value in config.items() if key != "text_config"}, **text}
    settings: dict[str, Any] = {}
    for key, value in config.items():
        if key in _ROPE or any(fnmatchcase(key, pattern) for pattern in _BOOKKEEPING):
            continue
        if key.endswith("_config") and isinstance(value, dict):
            settings |= {f"{key}.{inner}": setting for inner, setting in _function(value).items()}
        elif value is not None:
            settings[_SAME.get(key, key)] = value
    return _derived(settings) | _rope(config)


def _derived(settings: dict[str, Any]) -> dict[str, Any]:
    """Add what follows from other keys where it is left out."""
    heads, hidden = settings.get("num_attention_heads"), settings.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        settings.setdefault("num_key_value_heads", heads)
        if isinstance(hidden, int):
            settings.setdefault("head_dim", hidden // heads)
    return settings


def _rope(config: Config) -> dict[str, Any]:
    """Return the rotary embedding as one spelling: `rope_theta`, `rope_type`, `rope_factor`; of each kind of layer."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and parameters and all(isinstance(layer, dict) for layer in parameters.values()):
        layers = {str(kind): dict(layer) for kind, layer in parameters.items()}
    else:
        scaling = parameters if isinstance(parameters, dict) else config.get("rope_scaling")
        flat = dict(scaling) if isinstance(scaling, dict) else {}
        _default(flat, "rope_theta", config, _THETAS)
        local = next((config[key] for key in _LOCAL_THETAS if config.get(key) is not None), None)
        layers = {"": flat}
        if local is not None:
            layers = {"full_attention": flat, "sliding_attention": {"rope_theta": local}}
    settings: dict[str, Any] = {}
    for kind, layer in layers.items():
        _default(layer, "partial_rotary_factor", config, _PARTS)
        type_ = layer.pop("rope_type", None) or layer.pop("type", None) or "default"
        layer.pop("type", None)
        layer["rope_type"] = _ROPE_TYPES.get(type_, type_) if isinstance(type_, str) else type_
        where = f"{kind}." if kind else ""
        settings |= {
            f"{where}rope_{key.removeprefix('rope_')}": value for key, value in layer.items() if value is not None
        }
    return settings


def _default(rope: dict[str, Any], key: str, config: Config, spellings: Sequence[str]) -> None:
    """Take a value of a rotary embedding from where older versions keep it."""
    for spelling in spellings:
        if rope.get(key) is None and config.get(spelling) is not None:
            rope[key] = config[spelling]


def _equal(value: object, other: object) -> bool:
    if isinstance(value, int | float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-6)  # fp32 numbers are written with all their digits by some
    return value == other or (value in _UNSET and other in _UNSET)


def _shown(value: object) -> str:
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
