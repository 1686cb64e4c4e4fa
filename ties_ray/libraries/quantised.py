"""Quantised weights, recognised by the tensors themselves: a config may be missing, or left over."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

Stored = Mapping[str, tuple[str, tuple[int, ...]]]
"""(dtype, shape) of each tensor, with safetensors' names of dtypes."""

CONFIG_KEYS = ("quantization_config", "quantization", "compression_config")
"""Keys of config.json that announce quantised weights to a loader."""
FILES = frozenset({
    "quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json",
})  # fmt: skip
"""Files beside the weights that announce them."""
REMEDY = "give the unquantised model, or dequantise this one and save it again"
"""The remedy for quantised weights."""

_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "I64", "U64")


class _Method(NamedTuple):
    name: str
    roles: frozenset[str]
    """The tensors that a module of this method stores, at least."""
    weight: tuple[str, ...] = ()
    """The dtypes of its `weight`, where `roles` hold one."""


_METHODS = (
    _Method("GPTQ", frozenset({"qweight", "g_idx"})),
    _Method("FP-Quant", frozenset({"qweight", "forward_hadamard_matrix"})),
    _Method("AWQ", frozenset({"qweight", "qzeros"})),
    _Method("GPTQ", frozenset({"qweight"})),
    _Method("Marlin", frozenset({"B", "s"})),
    _Method("bitsandbytes (4 bit)", frozenset({"absmax"})),
    _Method("bitsandbytes (4 bit)", frozenset({"quant_state"})),
    _Method("bitsandbytes (8 bit)", frozenset({"SCB"})),
    _Method("HQQ or SINQ", frozenset({"W_q"})),
    _Method("AQLM", frozenset({"codes", "codebooks"})),
    _Method("SpQR", frozenset({"dense_weights", "row_offsets"})),
    _Method("VPTQ", frozenset({"indices", "centroids"})),
    _Method("Quanto", frozenset({"_data", "_scale"})),
    _Method("compressed-tensors", frozenset({"weight_packed"})),
    _Method("compressed-tensors (sparse)", frozenset({"compressed", "bitmask"})),
    _Method("torchao", frozenset({"_weight_qdata"})),
    _Method("EXL2", frozenset({"q_weight", "q_scale"})),
    _Method("EXL3", frozenset({"trellis"})),
    _Method("QuIP#", frozenset({"Qidxs"})),
    _Method("HIGGS", frozenset({"weight", "tables"})),
    _Method("MXFP4", frozenset({"blocks", "scales"})),
    _Method("NVFP4", frozenset({"weight", "weight_scale_2"}), ("U8",)),
    _Method("MLX", frozenset({"weight", "scales"}), ("U32",)),
    _Method("EETQ", frozenset({"weight", "weight_scales"}), ("I8",)),
    _Method("BitNet", frozenset({"weight", "weight_scale"}), ("U8",)),
    _Method("INT8 with scales", frozenset({"weight", "weight_scale"}), ("I8",)),
    _Method("FP8 with scales", frozenset({"weight", "weight_scale"}), _FLOAT8),
    _Method("FP8 with scales", frozenset({"weight", "weight_scale_inv"}), _FLOAT8),
)
_COMPANION = re.compile(
    r"(?:q?weight_?|w_|q_?|act_|input_|_)?"
    r"(?:scales?(?:_inv|_\d)?|zero_?points?|q?zeros?|absmax|codebooks?|centroids|quant_map|quant_state|scale_and_zero)",
    re.IGNORECASE,
)
"""The last words of names beside packed weights, in any method."""


def packed(stored: Stored) -> dict[str, list[str]]:
    """Return, by method, the names of all tensors of modules whose weights are quantised.

    Known methods are recognised by the tensors of a module. Other modules count if they hold integers called a weight,
    or integers or 8-bit floats beside scales; their method's name is empty.
    """
    modules: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in stored:
        module, role = _split(name)
        modules[module].setdefault(role, name)
    tensors: defaultdict[str, list[str]] = defaultdict(list)
    for roles in modules.values():
        dtypes = {role: stored[name][0] for role, name in roles.items()}
        method = next((each.name for each in _METHODS if _is_of(each, dtypes)), None)
        if method:
            tensors[method] += roles.values()
        elif unknown := list(_unknown(roles, stored)):
            tensors[""] += unknown
    return dict(tensors)


def refusals(stored: Stored, excluded: Collection[str]) -> Iterator[tuple[str, list[str], bool]]:
    """Yield (problem, names, whether the method is known) of the tensors that the recipe does not exclude."""
    for method, names in packed(stored).items():
        left = [name for name in names if name not in excluded]
        if left:
            how = f"holds weights quantised by {method}" if method else "holds integers or 8-bit floats as weights"
            yield f"{how}, {len(left)} tensors", left, bool(method)


def keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of config.json that announce quantised weights; `text_config.<key>` for its text part."""
    text = config.get("text_config")
    inner = [f"text_config.{key}" for key in CONFIG_KEYS if text.get(key)] if isinstance(text, dict) else []
    return (*(key for key in CONFIG_KEYS if config.get(key)), *inner)


def announced(config: Mapping[str, Any], files: Collection[str]) -> str:
    """Return the announcement of quantised weights, in config.json or by a file; empty where there is none."""
    for key in CONFIG_KEYS:
        section = config.get(key)
        if section:
            method = section.get("quant_method") if isinstance(section, dict) else None
            return f"config.json has a {key}" + (f" ({method})" if isinstance(method, str) else "")
    return "".join(f"{name} lies beside the weights" for name in sorted(FILES & set(files))[:1])


def _split(name: str) -> tuple[str, str]:
    """Return (module, role) of a tensor: `q.weight.absmax` and `q.qweight` both belong to `q`."""
    module, inside, role = name.rpartition(".weight.")
    if inside:
        return module, role.partition(".")[0]
    module, _, role = name.rpartition(".")
    if role == "weight" and module.endswith(".centroids"):
        return module.removesuffix(".centroids"), "centroids"
    for kind in ("blocks", "scales"):
        if role.endswith(f"_proj_{kind}"):  # experts are parameters of their own, without a module
            return name.removesuffix(f"_{kind}"), kind
    return module, role


def _is_of(method: _Method, dtypes: Mapping[str, str]) -> bool:
    return method.roles <= dtypes.keys() and (not method.weight or dtypes["weight"] in method.weight)


def _unknown(roles: Mapping[str, str], stored: Stored) -> Iterator[str]:
    """Yield a module's packed tensors and their companions, where its integers or 8-bit floats can only be weights."""
    companions = [name for role, name in roles.items() if _COMPANION.fullmatch(role)]
    whole = [
        name
        for role, name in roles.items()
        if (stored[name][0] in _FLOAT8 and companions)
        or (stored[name][0] in _INTEGERS and math.prod(stored[name][1]) > 1 and (companions or "weight" in role))
    ]
    if whole:
        yield from dict.fromkeys(whole + companions)
