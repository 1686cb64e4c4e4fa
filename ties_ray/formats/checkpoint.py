"""A Hugging Face checkpoint: `model.safetensors`, or shards under an index, with names as in its `config.json`."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ties_ray.candidates import ADAPTER, STEMS, Candidate, candidates, is_index, is_weights, listed, usual
from ties_ray.downloads import unfinished
from ties_ray.errors import Problem, printable
from ties_ray.formats import Folder, Format, Found, Parameter, Read, Rules, Source, TensorRef
from ties_ray.kernels import Encoded
from ties_ray.libraries import CONFIGS, library_of
from ties_ray.safetensors import COPYABLE, DTYPE_BITS, MERGEABLE
from ties_ray.stores import join

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
CHOOSE = "`file: {name}` beside its `path` chooses it"
"""What a recipe may do where a folder holds several models."""

_DECODERS = (
    "model", "model.decoder", "model.language_model", "language_model.model",
)  # fmt: skip
_ENCODERS = ("albert", "bert", "distilbert", "electra", "roberta")
EMBEDDINGS: tuple[tuple[str, ...], ...] = (
    *((f"{prefix}.embed_tokens.weight",) for prefix in _DECODERS),
    *((f"{prefix}.embeddings.word_embeddings.weight",) for prefix in _ENCODERS),
    ("transformer.wte.weight",),
    ("wte.weight",),
    ("transformer.word_embeddings.weight",),
    ("gpt_neox.embed_in.weight",),
    ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
)
"""Where architectures keep their input embedding; the further names of a line always share its storage."""
HEADS = (
    "lm_head.weight",
    "language_model.lm_head.weight",
    "embed_out.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "vocab_projector.weight",
    "generator_lm_head.weight",
)
"""Output embeddings, which share the input's storage where the config ties them."""
TIED_BIASES = (
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ("lm_head.bias", "lm_head.decoder.bias"),
)
TIED_BY_DEFAULT = frozenset({
    "albert", "bart", "bert", "bloom", "cohere", "distilbert", "electra", "falcon", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gpt2", "gpt_neo", "mbart", "opt", "roberta", "t5", "xlm-roberta",
})  # fmt: skip
"""`model_type`s whose configs tie the embeddings unless they say otherwise (and then leave the key out)."""
REFUSED = {
    "F8": "8-bit floats mean nothing without the scales stored elsewhere",
    "F6": "6-bit floats mean nothing without the scales stored elsewhere",
    "F4": "4-bit floats mean nothing without the scales stored elsewhere",
    "C64": "the methods are defined on real numbers",
}
"""Why a dtype is not merged, by the start of its name."""
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Checkpoint(Format):
    """A model stored whole; its delta is its own value minus the base's."""

    name = "checkpoint"

    def recognises(self, names: Sequence[str]) -> bool:
        """Return whether there are safetensors files that are not an adapter's.

        A whole model stays one beside an `adapter_config.json` that somebody left there.
        """
        whole = [one for one in candidates(names) if one.stem != ADAPTER]
        adapter = "adapter_config.json" in names
        return f"{ADAPTER}.safetensors" not in names and any(one.stem in STEMS or not adapter for one in whole)

    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the weights and texts of the model; all weights, where an index says which are the model's."""
        every = candidates(names)
        usually = usual(every)
        weights = usually.files if usually else ()
        if usually.index if usually else any(one.index for one in every):
            weights = tuple(name for name in names if is_weights(name))
        return weights, tuple(name for name in names if name in CONFIGS or is_index(name))

    def weight_files(self, folder: Folder) -> tuple[str, ...]:
        """Return the files that the index names, or the one file; none where that is unclear."""
        problems: list[Problem] = []
        names = _weight_files(folder, problems, [])
        return () if problems else tuple(names)

    def read(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> Found:
        """Return every tensor of the base, or one source for each merged parameter that the model stores."""
        problems: list[Problem] = []
        notes: list[str] = []
        config = _object(folder, CONFIG, problems)
        if "quantization_config" in config:
            what = "is quantised (it has a quantization_config)"
            problems.append(Problem(join(folder.uri, CONFIG), what, "give the unquantised model, or dequantise it"))
        names = _weight_files(folder, problems, notes)
        library = library_of([_name(pin.uri) for pin in folder.files], names, config)
        pins = {_name(pin.uri): pin for pin in folder.files}
        objects = tuple(pins[name] for name in names)
        stored = _stored(folder, names, problems)
        if not problems:
            checked = _check_base(stored, config) if base is None else _check_model(stored, config, base, rules)
            problems += [Problem(folder.uri, what, remedy) for what, remedy in checked.problems]
            notes += checked.notes
            sources = {name: Source((ref,)) for name, ref in checked.tensors.items()}
            longer = checked.extra_rows
        if problems:
            return Found(problems=tuple(problems))
        found = Found(objects, sources, (), tuple(f"{folder.uri}: {note}" for note in notes), longer)
        return replace(found, library=library)

    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return the one range of the elements; none where there are no elements."""
        if start == stop:
            return ()
        tensor = source.tensors[0]
        width = DTYPE_BITS[tensor.dtype] // 8
        return (Read(tensor.object, tensor.start + start * width, tensor.start + stop * width),)

    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> Encoded:
        """Return the model's values as stored, without a copy where the buffer is aligned to them."""
        import torch  # here, so that planning does not wait for it

        dtype: torch.dtype = getattr(torch, _TORCH_NAMES[source.tensors[0].dtype])
        if start == stop:
            return Encoded(torch.empty(0, dtype=dtype))
        (buffer,) = buffers
        if buffer.storage_offset() % dtype.itemsize or buffer.data_ptr() % dtype.itemsize:
            buffer = buffer.clone()
        return Encoded(buffer.view(dtype))


class _Checked(NamedTuple):
    """What holds for a whole checkpoint: its tensors by base parameter, and (what, remedy) of each problem."""

    tensors: dict[str, TensorRef]
    problems: list[tuple[str, str]]
    notes: list[str]
    extra_rows: tuple[str, ...] = ()


def _check_base(stored: Mapping[str, TensorRef], config: Mapping[str, Any]) -> _Checked:
    tensors, notes = dict(stored), list[str]()
    for first, *others in _tied(config):
        for other in others:
            if first in tensors and other in tensors and tensors[other].shape == tensors[first].shape:
                del tensors[other]
                notes.append(f"{other} is tied to {first}: merged once, not written again")
    problems = [] if tensors else [("holds no tensors", "")]
    return _Checked(tensors, problems + list(_refused(tensors)), notes)


def _check_model(
    stored: Mapping[str, TensorRef], config: Mapping[str, Any], base: Mapping[str, Parameter], rules: Rules
) -> _Checked:
    tensors, notes = dict(stored), list[str]()
    problems: list[tuple[str, str]] = []
    for alias, first in _aliases(tensors, config, base):
        tied = tensors.pop(alias)
        if first in tensors:
            notes.append(f"{alias} is tied to {first}: left aside")
        else:
            tensors[first] = tied
    merged = {name: parameter for name, parameter in base.items() if parameter.merged}
    kept = {name: tensors[name] for name in merged if name in tensors}

    unknown = [name for name in tensors if name not in base]
    aside = [name for name in unknown if tensors[name].dtype in COPYABLE or rules.excludes(name)]
    if aside:
        notes.append(f"left aside, the base has no such tensors: {_listed(aside)}")
    extra = [name for name in unknown if name not in aside]
    problems += _refused({name: tensors[name] for name in (*kept, *extra)})
    extra = [name for name in extra if tensors[name].dtype in MERGEABLE]
    if extra:
        problems.append(
            (
                f"holds {len(extra)} floating-point tensors that the base lacks: {_listed(extra)}",
                "is it a fine-tune of this base? else name them in `exclude`",
            )
        )
    whole = [name for name, ref in kept.items() if ref.dtype in COPYABLE]
    if whole:
        shown = _listed(f"{name} ({kept[name].dtype} where the base has {merged[name].dtype})" for name in whole)
        problems.append((f"holds integers where the base holds floating-point numbers: {shown}", ""))
    missing = [name for name in merged if name not in tensors]
    if missing and rules.missing:
        notes.append(f"lacks {len(missing)} parameters, whose change is taken as zero: {_listed(missing)}")
    elif missing:
        problems.append(
            (
                f"lacks {len(missing)} of the base's {len(merged)} merged parameters: {_listed(missing)}",
                "is it a fine-tune of this base? `allow: {missing: zero}` takes their change as zero",
            )
        )
    longer, wrong = _compare_shapes(kept, merged, config)
    if longer and not rules.extra_rows:
        problems.append(
            (
                f"has more embedding rows than the base: {_shapes(longer, kept, merged)}",
                "`allow: {extra_rows: drop}` leaves them aside where the tokenizers agree on the common ids",
            )
        )
    elif longer:
        notes.append(f"rows beyond the base's are left aside: {_shapes(longer, kept, merged)}")
    if wrong:
        problems.append((f"has {len(wrong)} parameters of another shape: {_shapes(wrong, kept, merged)}", ""))
    return _Checked(kept, problems, notes, tuple(longer))


def _compare_shapes(
    kept: Mapping[str, TensorRef], base: Mapping[str, Parameter], config: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Return (parameters that only have more vocabulary rows, parameters of a wrong shape)."""
    differ = [name for name, ref in kept.items() if ref.shape != base[name].shape]
    rows = _setting(config, "vocab_size", None)
    longer = [
        name
        for name in differ
        if kept[name].shape[:1] == (rows,)
        and base[name].shape[:1] < (rows,)
        and kept[name].shape[1:] == base[name].shape[1:]
    ]
    return longer, [name for name in differ if name not in longer]


def _refused(tensors: Mapping[str, TensorRef]) -> Iterator[tuple[str, str]]:
    """Yield a problem for each dtype that can be neither merged nor copied."""
    for dtype in sorted({ref.dtype for ref in tensors.values()} - MERGEABLE - COPYABLE):
        reason = next(why for start, why in REFUSED.items() if dtype.startswith(start))
        names = [name for name, ref in tensors.items() if ref.dtype == dtype]
        yield f"stores {len(names)} tensors as {dtype}, and {reason}: {_listed(names)}", "give the unquantised model"


def _tied(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return groups of names that share storage in a model of this config; the first is where it is kept."""
    kind = config.get("model_type")
    default = isinstance(kind, str) and kind in TIED_BY_DEFAULT
    heads = HEADS if _setting(config, "tie_word_embeddings", default) is True else ()
    return [*((*names, *heads) for names in EMBEDDINGS), *TIED_BIASES]


def _aliases(names: Collection[str], config: Mapping[str, Any], base: Collection[str]) -> list[tuple[str, str]]:
    """Return (name the model stores and the base does not, parameter of the base that it is tied to)."""
    return [
        (other, first)
        for first, *others in _tied(config)
        for other in others
        if first in base and other in names and other not in base
    ]


def _setting(config: Mapping[str, Any], key: str, default: object) -> object:
    """Return a config's value, looked up in `text_config` too, where multimodal models keep it."""
    text = config.get("text_config")
    return config.get(key, text.get(key, default) if isinstance(text, dict) else default)


def _weight_files(folder: Folder, problems: list[Problem], notes: list[str]) -> list[str]:
    """Return the files that hold the weights, sorted; check the index, where there is one, against their headers."""
    names = [_name(pin.uri) for pin in folder.files]
    every = candidates(names)
    model = next((one for one in every if one.name == folder.chosen), None) or usual(every)
    weights = [name for name in names if is_weights(name)]
    if model is None:
        what = f"holds {len(every)} models: {listed(every)}"
        problems.append(Problem(folder.uri, what, CHOOSE.format(name=every[0].name), "candidates"))
        return []
    if model.index:
        used = _indexed_files(folder, model.index, weights, problems)
        single = f"{model.stem}.safetensors"
        if single in weights and single not in used and not folder.chosen and not problems:
            what = f"has both {single} and {model.index}, which does not name it"
            remedy = f"remove the one that is not the model, or choose: {CHOOSE.format(name=model.index)}"
            problems.append(Problem(folder.uri, what, remedy, "candidates"))
    else:
        used = list(model.files)
        _check_shards(folder, model, names, problems)
    aside = [name for name in weights if name not in used]
    if aside and not problems:
        notes.append(f"left aside, not part of the model: {_listed(aside)} ({CHOOSE.format(name=aside[0])})")
    left = [name for name in ("adapter_config.json", "adapter_model.bin") if name in names]
    if left:
        notes.append(f"is a whole model; left aside, as of an adapter: {', '.join(left)}")
    return used


def _check_shards(folder: Folder, model: Candidate, names: Collection[str], problems: list[Problem]) -> None:
    """Add a problem where shards have lost their index, or the index its shards."""
    if model.missing:
        what = f"lacks {len(model.missing)} of {model.count} shards: {_listed(model.missing)}"
        problems.append(Problem(folder.uri, what, _completing(model.missing, names)))
    elif model.count > 1 and not folder.chosen:
        what = f"has {model.count} shards and no index that says they belong together: {_listed(model.files)}"
        remedy = f"download the index too, or read these shards as they are: {CHOOSE.format(name=model.files[0])}"
        problems.append(Problem(folder.uri, what, remedy))


def _completing(missing: Sequence[str], names: Collection[str]) -> str:
    """Return the remedy for files that are not there; it names what an unfinished download has left of them."""
    left = [part for name in missing if (part := unfinished(name, names))]
    return f"complete the download or upload{f' ({_listed(left)} is not finished)' if left else ''}"


def _indexed_files(folder: Folder, index: str, weights: Collection[str], problems: list[Problem]) -> list[str]:
    where = join(folder.uri, index)
    before = len(problems)
    weight_map = _object(folder, index, problems).get("weight_map")
    if len(problems) > before:
        return []
    if not (isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())):
        problems.append(Problem(where, "has no weight_map from tensor names to file names", "save the model again"))
        return []
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if "/" in file or "\\" in file or file in ("", ".", "..")]
    if outside:
        problems.append(
            Problem(where, f"names files outside its folder: {_listed(outside)}", "do not trust this model")
        )
    missing = [file for file in files if file not in weights and file not in outside]
    if missing:
        what = f"names {len(missing)} files that are not there: {_listed(missing)}"
        problems.append(Problem(where, what, _completing(missing, [_name(pin.uri) for pin in folder.files])))
    used = [file for file in files if file in weights]
    absent = [name for name, file in weight_map.items() if file in used and name not in folder.headers[file].tensors]
    if absent:
        what = f"names {len(absent)} tensors that their files lack: {_listed(absent)}"
        problems.append(Problem(where, what, "save the model again"))
    unnamed = [name for file in used for name in folder.headers[file].tensors if name not in weight_map]
    if unnamed:
        what = f"does not name {len(unnamed)} tensors of its files: {_listed(unnamed)}"
        problems.append(Problem(where, what, "save the model again"))
    return used


def _stored(folder: Folder, files: Sequence[str], problems: list[Problem]) -> dict[str, TensorRef]:
    """Return every tensor in the order of files and offsets; a name in two files is a problem."""
    stored: dict[str, TensorRef] = {}
    twice: list[str] = []
    for number, file in enumerate(files):
        for name, info in folder.headers[file].tensors.items():
            if name in stored:
                twice.append(name)
            stored[name] = TensorRef(number, info.start, info.dtype, info.shape)
    if twice:
        what = f"holds {len(twice)} tensors in more than one file: {_listed(twice)}"
        problems.append(Problem(folder.uri, what, "save the model again"))
    return stored


def _object(folder: Folder, name: str, problems: list[Problem]) -> Mapping[str, Any]:
    """Return a small file's JSON object; empty where there is no such file."""
    try:
        value = json.loads(folder.texts.get(name, b"{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problems.append(Problem(join(folder.uri, name), "is not a JSON object", "upload it again"))
        return {}
    return value


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def _shapes(names: Sequence[str], kept: Mapping[str, TensorRef], base: Mapping[str, Parameter]) -> str:
    return _listed(f"{name} {list(kept[name].shape)} where the base has {list(base[name].shape)}" for name in names)


def _listed(names: Iterator[str] | Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    every = [printable(name) for name in names]
    return ", ".join(every[:4]) + (f" and {len(every) - 4} more" if len(every) > 4 else "")
