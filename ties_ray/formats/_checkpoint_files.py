"""Which files of a folder are one checkpoint, and every tensor in them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ties_ray.errors import Problem, enumerated
from ties_ray.formats import Folder
from ties_ray.libraries import bounded
from ties_ray.libraries.conversions import WRAPPERS
from ties_ray.libraries.downloads import unfinished
from ties_ray.libraries.weight_files import Candidate, candidates, is_weights, listed, usual
from ties_ray.stores import join, last_part
from ties_ray.tensors import TensorRef

CHOOSE = "`file: {name}` beside its `path` chooses it"
"""The remedy where a folder holds several models."""


def weight_files(folder: Folder, problems: list[Problem], notes: list[str]) -> list[str]:
    """Return the files that hold the weights, sorted; check the index, where there is one, against their headers.

    Problems and notes are added to the lists.
    """
    names = [last_part(pin.uri) for pin in folder.files]
    models = candidates(names)
    model = next((each for each in models if each.name == folder.chosen), None) or usual(models)
    weights = [name for name in names if is_weights(name)]
    if model is None:
        message = f"holds {len(models)} models: {listed(models)}"
        problems.append(Problem(folder.uri, message, CHOOSE.format(name=models[0].name), "candidates"))
        return []
    if model.index:
        wrong: list[Problem] = []
        used = _indexed_files(folder, model.index, weights, wrong)
        single = f"{model.stem}.safetensors"
        if not (single in weights and single not in used and not folder.chosen):
            problems += wrong
        else:
            message = f"has both {single} and {model.index}, which {wrong[0].what if wrong else 'does not name it'}"
            better = CHOOSE.format(name=single if wrong else model.index)
            remedy = f"remove the one that is not the model, or choose: {better}"
            problems.append(Problem(folder.uri, message, remedy, "candidates"))
    else:
        used = list(model.files)
        _check_shards(folder, model, names, problems)
    aside = [name for name in weights if name not in used]
    if aside and not problems:
        notes.append(f"left aside, not part of the model: {enumerated(aside)} ({CHOOSE.format(name=aside[0])})")
    of_adapter = [name for name in ("adapter_config.json", "adapter_model.bin") if name in names]
    if of_adapter:
        notes.append(f"is a whole model; left aside, as of an adapter: {', '.join(of_adapter)}")
    return used


def stored_tensors(folder: Folder, files: Sequence[str], problems: list[Problem]) -> dict[str, TensorRef]:
    """Return every tensor in the order of files and offsets; a name in two files is a problem."""
    stored: dict[str, TensorRef] = {}
    twice: list[str] = []
    for number, file in enumerate(files):
        for name, info in folder.headers[file].tensors.items():
            if name in stored:
                twice.append(name)
            stored[name] = TensorRef(number, info.start, info.dtype, info.shape)
    if twice:
        message = f"holds {len(twice)} tensors in more than one file: {enumerated(twice)}"
        problems.append(Problem(folder.uri, message, "save the model again"))
    return stored


def bare_names(names: Collection[str]) -> dict[str, str]:
    """Return each name without the parts that training's wrappers add; as it is where two would be one."""
    bare = {name: WRAPPERS.sub("", name) for name in names}
    return bare if len(set(bare.values())) == len(bare) else {name: name for name in names}


def json_object(folder: Folder, name: str, problems: list[Problem]) -> Mapping[str, Any]:
    """Return the JSON object in a small file; an empty one where there is no such file."""
    try:
        value = bounded.loads(folder.texts.get(name, b"{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problems.append(Problem(join(folder.uri, name), "is not a JSON object", "upload it again"))
        return {}
    return value


def _check_shards(folder: Folder, model: Candidate, names: Collection[str], problems: list[Problem]) -> None:
    """Add a problem where shards have lost their index, or the index its shards."""
    if model.missing:
        message = f"lacks {len(model.missing)} of {model.count} shards: {enumerated(model.missing)}"
        problems.append(Problem(folder.uri, message, _completing(model.missing, names)))
    elif model.count > 1 and not folder.chosen:
        message = f"has {model.count} shards and no index that says they belong together: {enumerated(model.files)}"
        remedy = f"download the index too, or read these shards as they are: {CHOOSE.format(name=model.files[0])}"
        problems.append(Problem(folder.uri, message, remedy))


def _completing(missing: Sequence[str], names: Collection[str]) -> str:
    """Return the remedy for files that are not there; it names what an unfinished download has left of them."""
    left = [part for name in missing if (part := unfinished(name, names))]
    return f"complete the download or upload{f' ({enumerated(left)} is not finished)' if left else ''}"


def _indexed_files(folder: Folder, index: str, weights: Collection[str], problems: list[Problem]) -> list[str]:
    """Return the weight files that an index names; what it says wrongly is added to the problems."""
    where = join(folder.uri, index)
    before = len(problems)
    weight_map = json_object(folder, index, problems).get("weight_map")
    if len(problems) > before:
        return []
    if not (isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())):
        problems.append(Problem(where, "has no weight_map from tensor names to file names", "save the model again"))
        return []
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if "/" in file or "\\" in file or file in ("", ".", "..")]
    if outside:
        problems.append(
            Problem(where, f"names files outside its folder: {enumerated(outside)}", "do not trust this model")
        )
    missing = [file for file in files if file not in weights and file not in outside]
    if missing:
        message = f"names {len(missing)} files that are not there: {enumerated(missing)}"
        problems.append(Problem(where, message, _completing(missing, [last_part(pin.uri) for pin in folder.files])))
    used = [file for file in files if file in weights]
    absent = [name for name, file in weight_map.items() if file in used and name not in folder.headers[file].tensors]
    if absent:
        message = f"names {len(absent)} tensors that their files lack: {enumerated(absent)}"
        problems.append(Problem(where, message, "save the model again"))
    unnamed = [name for file in used for name in folder.headers[file].tensors if name not in weight_map]
    if unnamed:
        message = f"does not name {len(unnamed)} tensors of its files: {enumerated(unnamed)}"
        problems.append(Problem(where, message, "save the model again"))
    return used
