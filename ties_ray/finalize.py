"""Publish: complete the uploads, then config, tokenizer and card, then the loader's door, then the result record.

Every step may be done twice, so that a kill anywhere is mended by the same command.
"""

import io
from collections.abc import Callable, Sequence

from ruamel.yaml import YAML

from ties_ray.catalog import Model
from ties_ray.errors import InterruptedMerge, Problem
from ties_ray.manifest import Written
from ties_ray.plan import Plan
from ties_ray.report import RECIPE_NAME, RESULT_NAME, MergeResult, Truncation, WrittenFile
from ties_ray.stores import Store, Stores, crc32c_joined, join

LARGEST_SMALL_FILE = 256 * 2**20
"""Bytes: tokenizers of large vocabularies come near 40 MB."""


def complete_uploads(
    plan: Plan,
    stores: Stores,
    uploads: dict[str, str],
    parts: Sequence[Written],
    check: Callable[[], None],
) -> list[WrittenFile]:
    """Make the weight files visible, and return them. Raises `InterruptedMerge` if a part is missing.

    check: raises if another run holds the output now; asked before each file.
    """
    store = stores.of(plan.output)
    written = []
    for index, file in enumerate(plan.result.files):
        own = {one.part.number: one for one in parts if one.file == index}
        missing = plan.layout.num_parts(index) - len(own)
        if missing:
            raise InterruptedMerge(Problem(file.name, f"{missing} parts are not recorded", "run again to continue"))
        ordered = [own[number] for number in sorted(own)]
        check()
        pin = store.complete_upload(join(plan.output, file.name), uploads[file.name], [one.part for one in ordered])
        crc = crc32c_joined((one.crc32c, one.part.size) for one in ordered)
        written.append(WrittenFile(name=file.name, size=pin.size, etag=pin.etag, crc32c=crc))
    return written


def publish_documents(plan: Plan, stores: Stores, result: MergeResult) -> None:
    """Write what stands beside the weights; the file by which a loader finds them comes last."""
    output = plan.recipe.output
    store = stores.of(plan.output)
    door = output.door(plan.result.files, plan.library)
    last: bytes | None = None
    for small in plan.catalog.small_files:
        data = output.rewrite(small.name, _read(stores.of(small.pin.uri), small.pin.uri))
        if small.name == door:
            last = data
        elif data is not None:
            store.put(join(plan.output, small.name), data)
    store.put(join(plan.output, "README.md"), card(plan, result).encode())
    store.put(join(plan.output, RECIPE_NAME), _yaml(plan.recipe.model_dump(mode="json", exclude_unset=True)).encode())
    index = output.index(plan.result.files, plan.catalog.parameters, plan.catalog.facts, plan.library)
    if index and index[0] == door:
        last = index[1]
    elif index:
        store.put(join(plan.output, index[0]), index[1])
    if last is not None:
        store.put(join(plan.output, door), last)


def publish_result(plan: Plan, stores: Stores, result: MergeResult) -> None:
    """Write the result record: from now on the merge is done."""
    text = result.model_dump_json(indent=2) + "\n"
    stores.of(plan.output).put(join(plan.output, RESULT_NAME), text.encode())


def _read(store: Store, uri: str) -> bytes:
    return store.get(uri, LARGEST_SMALL_FILE)[1]


def card(plan: Plan, result: MergeResult) -> str:
    """Return the model card: what was merged, how, and under which licences."""
    catalog, recipe = plan.catalog, plan.recipe
    inputs = [catalog.base] * bool(catalog.base.uri) + list(catalog.models)
    licences = {model.licence for model in inputs}
    front: dict[str, object] = {"base_model": [_short(model.uri) for model in inputs]}
    if len(licences) == 1 and "" not in licences:
        front["license"] = licences.pop()
    front["library_name"] = plan.library.name
    front["tags"] = ["merge", "ties-ray", recipe.method.name]
    rows = [_row(model.id, model) for model in inputs]
    lines = [
        "---",
        _yaml(front).rstrip(),
        "---",
        "",
        f"# Merge of {len(plan.result.members)} models by `{recipe.method.name}`{_cut(result.truncation)}",
        "",
        f"Merged by ties_ray, run `{plan.run_id}`, arithmetic `{plan.arithmetic}`. {recipe.method.paper}.",
        "",
        "| id | model | weight | density | licence |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "## Recipe",
        "```yaml",
        _yaml(recipe.model_dump(mode="json", exclude_unset=True, include={"method", "exclude", "allow"})).rstrip(),
        "```",
    ]
    if result.trims and len(result.trims) <= 2 * len(plan.result.members):
        lines += ["", "## Trim", "| model | threshold | kept | of |", "|---|---|---|---|"]
        lines += [f"| {t.model} | {t.threshold:.6g} | {t.kept:,} | {t.size:,} |" for t in result.trims]
    if result.truncation:
        lines += ["", "## What the rank cost", "| matrix | relative error |", "|---|---|"]
        lines += [f"| `{name}` | {error:.4%} |" for name, error in result.truncation.matrices.items()]
    if plan.notes:
        lines += ["", "## Notes", *(f"* {note}" for note in plan.notes)]
    return "\n".join(lines) + "\n"


def _row(name: str, model: Model) -> str:
    density = "" if model.density is None else str(model.density)
    return f"| {name} | `{model.uri}` | {model.weight:g} | {density} | {model.licence or 'not stated'} |"


def _cut(truncation: Truncation | None) -> str:
    """Return what a title must say of a merge that was cut down to a rank."""
    if truncation is None:
        return ""
    return f", cut to rank {truncation.rank} (relative error {truncation.relative_error:.2%})"


def _short(uri: str) -> str:
    """Return what names a model in a card: a bucket's URI, or a folder's own name."""
    return uri if "://" in uri else uri.rstrip("/").rsplit("/", 1)[-1]


def _yaml(value: object) -> str:
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(value, stream)
    return stream.getvalue()
