"""Publishes a result: weights, then config, tokenizer and card, then the loader's entry point, then the result record.

Every step may be done twice, so the same command mends a kill anywhere.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ties_ray.errors import InputError, InterruptedMerge, Problem, UnavailableError, printable
from ties_ray.inputs.fetch import TEXT_BYTES
from ties_ray.inputs.small_files import SmallFile
from ties_ray.libraries.loaders import (
    CARD_NAME,
    LOADED_FOLDERS,
    RECIPE_NAME,
    RESULT_NAME,
    TEXTS,
    ModelFolder,
    strangers,
)
from ties_ray.planning.plan import Plan
from ties_ray.recipe.parse import with_absolute_paths
from ties_ray.recipe.recipe import Json
from ties_ray.reports.model_card import card, plain_yaml
from ties_ray.reports.records import MergeResult, WrittenFile
from ties_ray.rounds.merge import Written
from ties_ray.stores import Stores, absolute, crc32c, crc32c_joined, join, within

FEW = 8
"""The most names in one message. Further names are counted."""


def complete_uploads(
    plan: Plan,
    stores: Stores,
    uploads: dict[str, str],
    parts: Sequence[Written],
    check: Callable[[], None],
) -> list[WrittenFile]:
    """Make the weight files visible, and return them. Raises `InterruptedMerge` if a part is missing.

    check: raises if another run holds the output now. It is called before each file.
    """
    store = stores.writer(plan.output)
    written = []
    for index, file in enumerate(plan.files):
        own = {each.part.number: each for each in parts if each.file == index}
        missing = plan.merges[0].layout.num_parts(index) - len(own)
        if missing:
            raise InterruptedMerge(Problem(file.name, f"{missing} parts are not recorded", "run again to continue"))
        ordered = [own[number] for number in sorted(own)]
        check()
        pin = store.complete_upload(join(plan.output, file.name), uploads[file.name], [each.part for each in ordered])
        crc = crc32c_joined((each.crc32c, each.part.size) for each in ordered)
        written.append(WrittenFile(name=file.name, size=pin.size, etag=pin.etag, crc32c=crc))
    return written


def read_documents(plan: Plan, stores: Stores, *, texts: bool = False) -> dict[str, bytes]:
    """Return the files beside the weights, without the card, by relative name, in the order of writing.

    The file by which a loader finds the weights is last. texts: return only the files in `TEXTS`, which name others.
    Raises `InputError` where a small file has changed since it was planned.
    """
    output = plan.recipe.output
    contents: dict[str, bytes] = {}
    for small in plan.catalog.small_files:
        if texts and not (small.name in TEXTS and small.pin.size <= TEXT_BYTES):
            continue
        content = _changed(small, stores.of(small.pin.uri).get_pinned(small.pin))
        data = output.rewrite(small.name, content, plan.catalog.facts)
        if data is not None:
            contents[small.name] = data
    index = output.index(plan.files, plan.catalog.parameters, plan.catalog.facts, plan.library)
    if index:
        contents[index[0]] = index[1]
    entry_point_file = output.entry_point_file(plan.files, plan.library)
    if entry_point_file in contents:
        contents[entry_point_file] = contents.pop(entry_point_file)
    return contents


def as_loaded(plan: Plan, documents: Mapping[str, bytes]) -> ModelFolder:
    """Return the output as a loader will find it. documents: at least the small files in `TEXTS`."""
    small = (small.name for small in plan.catalog.small_files)
    files, files_from = plan.files, plan.recipe.output.files_from
    return ModelFolder(
        uri=plan.output,
        names=frozenset((*small, *documents, *(file.name for file in files))),
        texts={name: documents[name] for name in TEXTS if name in documents},
        shapes={placed.tensor.name: placed.tensor.shape for file in files for placed in file.tensors},
        borrowed=files_from != "base" and absolute(files_from) != plan.catalog.base.uri,
    )


def own_names(plan: Plan) -> set[str]:
    """Return the relative names that a run of the plan may publish, without card, recipe and result."""
    index = plan.recipe.output.index(plan.files, plan.catalog.parameters, plan.catalog.facts, plan.library)
    names = {small.name for small in plan.catalog.small_files} | {file.name for file in plan.files}
    return names | {index[0]} if index else names


def foreign_files(stores: Stores, output: str, own: Collection[str]) -> list[str]:
    """Return the files in an output, beside the `own` names, that a loader may take for the model's."""
    store = stores.of(output)
    listing = store.list(output)
    names = [_last(pin.uri) for pin in listing.files]
    lying = {_last(folder) for folder in listing.folders}
    inside = {name.rpartition("/")[0] for name in own if "/" in name} | set(LOADED_FOLDERS)
    for folder in sorted(inside):
        if folder.partition("/")[0] in lying:
            names += [f"{folder}/{_last(pin.uri)}" for pin in store.list_below(output, folder).files]
    return strangers(names, own)


def demand_space(plan: Plan, stores: Stores) -> None:
    """Raise `UnavailableError` where the output's disk has too little room for missing weights and scratch."""
    store = stores.writer(plan.output)
    space = store.space(plan.output)
    if space is None:
        return
    own = {file.name for file in plan.files}
    done = sum(pin.size for pin in store.list(plan.output).files if _last(pin.uri) in own)
    needed = plan.bytes_written + plan.bytes_of_scratch - space.held - done
    if needed > space.free:
        message = f"the merge needs {needed:,} bytes there, and {space.free:,} are free"
        raise UnavailableError(Problem(plan.output, message, "free space, and run the same command again"))


def demand_no_foreign(plan: Plan, stores: Stores, documents: Collection[str]) -> None:
    """Raise `InputError` where the output holds files that a loader may take for a part of this model."""
    own = {*documents, *(file.name for file in plan.files)}
    foreign = foreign_files(stores, plan.output, own)
    if foreign:
        message = f"holds files of another model, which a loader would take for this one's: {listed(foreign)}"
        raise InputError(Problem(plan.output, message, "remove them, and run the same command again"))


def publish_documents(
    plan: Plan, stores: Stores, documents: Mapping[str, bytes], result: MergeResult
) -> list[WrittenFile]:
    """Write the files beside the weights, and return them. The file by which a loader finds the weights is last."""
    store = stores.writer(plan.output)
    store.put(join(plan.output, CARD_NAME), card(plan, result).encode())
    store.put(join(plan.output, RECIPE_NAME), plain_yaml(_from_anywhere(plan)).encode())
    entry_point_file = plan.recipe.output.entry_point_file(plan.files, plan.library)
    written = []
    for name, data in documents.items():
        if name == entry_point_file:
            demand_no_foreign(plan, stores, documents)
        pin = store.put(within(plan.output, name), data)
        written.append(WrittenFile(name=name, size=pin.size, etag=pin.etag, crc32c=crc32c(memoryview(data))))
    return written


def _from_anywhere(plan: Plan) -> Json:
    """Return what the recipe asks, with absolute paths, so that it means the same in every working directory."""
    asked: Json = plan.recipe.model_dump(mode="json", exclude_unset=True)
    files_from = absolute(plan.recipe.output.files_from).rstrip("/")  # a glob may list it
    if files_from in {model.uri for model in (plan.catalog.base, *plan.catalog.models)}:
        asked["output"]["files_from"] = files_from
    return with_absolute_paths(asked)


def publish_result(plan: Plan, stores: Stores, result: MergeResult) -> None:
    """Write the result record. With it the merge is done."""
    text = result.model_dump_json(indent=2) + "\n"
    stores.writer(plan.output).put(join(plan.output, RESULT_NAME), text.encode())


def _changed(small: SmallFile, data: bytes) -> bytes:
    """Return a JSON object without some of its keys, and with others. `part.key` names a key of a part."""
    if not (small.without or small.amended):
        return data
    whole = json.loads(data)
    for key in small.without:
        *parents, last = key.split(".")
        part = whole
        for parent in parents:
            part = part[parent]
        del part[last]
    return (json.dumps(_amended(whole, small.amended), indent=2, ensure_ascii=False) + "\n").encode()


def _amended(value: Any, more: Any) -> Any:
    """Return a JSON value with more: objects are merged, lists grow at their end, and other values are replaced."""
    if isinstance(value, dict) and isinstance(more, dict):
        return {**value, **{key: _amended(value.get(key), part) for key, part in more.items()}}
    return [*value, *more] if isinstance(value, list) and isinstance(more, list) else more


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return printable(", ".join(names[:FEW])) + more


def _last(uri: str) -> str:
    return uri.rpartition("/")[2]
