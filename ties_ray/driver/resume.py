"""Decides how a merge begins, by what its output holds: nothing, this merge, another merge, or other files."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from ties_ray.driver.publish import demand_no_foreign, foreign_files, listed, own_names
from ties_ray.errors import InputError, Problem
from ties_ray.layout.sizes import comparable
from ties_ray.libraries.loaders import LOADED_FOLDERS, RESULT_NAME, SUMS_NAME, is_loaded
from ties_ray.planning.plan import Plan
from ties_ray.planning.planner import make_plan
from ties_ray.reports.records import MergeResult, find_result
from ties_ray.state.manifest import FOLDER, Manifest, Start, find_runs
from ties_ray.stores import Pin, Stores, join, within


def finished(planned: Plan, stores: Stores) -> MergeResult | None:
    """Return the result record if the output holds the whole result of this very merge, None otherwise."""
    result = find_result(stores, planned.output)
    if result is None or result.run_id != planned.run_id:
        return None
    _demand_files(stores, planned.output, result)
    return result.model_copy(update={"reused": True})


def open_run(planned: Plan, stores: Stores, *, fresh: bool) -> tuple[Plan, Manifest, bool]:
    """Return (plan, manifest, whether it is continued) of a run. Raises `InputError` where the output holds another.

    fresh: remove what earlier runs have left, and begin a new generation, which their workers can't write to.
    """
    output = planned.output
    runs = find_runs(stores, output)
    mine = [generation for run_id, generation in runs if run_id == planned.run_id]
    removed: list[str] = []
    if fresh:
        removed = _forget(planned, stores, runs)
    else:
        _refuse_others(planned, stores, runs)
        if mine:
            manifest = Manifest(stores, Manifest.folder_of(output, planned.run_id, mine[-1]))
            start = manifest.read_start()
            if start:
                return _continued(planned, manifest, start), manifest, True
    manifest = Manifest(stores, Manifest.folder_of(output, planned.run_id, max(mine, default=0) + 1))
    if removed:
        note = f"--fresh has removed what a loader might have taken for this model: {listed(removed)}"
        planned = replace(planned, notes=(*planned.notes, note))
    manifest.write_start(Start(digest=planned.digest(), part_size=planned.recipe.output.part_size, sizes=planned.sizes))
    return planned, manifest, False


def clean(stores: Stores, output: str, *, remove: bool) -> list[str]:
    """Return the uploads and manifests that interrupted merges have left in an output.

    remove: remove them, too. The manifest of a finished merge stays, since `verify` reads it, and so does every visible
    file. Nothing is removed from a folder that no merge has used. Call it while holding the lease.
    """
    result, runs, store = find_result(stores, output), find_runs(stores, output), stores.writer(output)
    if result is None and not runs:
        return []
    remnants = []
    for uri, upload in store.list_uploads(output):  # they go first: without a run, no call would look for them
        remnants.append(f"unfinished upload of {uri.rsplit('/', 1)[-1]} ({upload[:16]})")
        if remove:
            store.abort_upload(uri, upload)
    kept = max((run for run in runs if result and run[0] == result.run_id), default=None)
    for run in runs:
        if run != kept:
            remnants.append(f"unfinished run {run[0]}, generation {run[1]}")
            if remove:
                store.delete_folder(Manifest.folder_of(output, *run))
    return remnants


def _refuse_others(planned: Plan, stores: Stores, runs: list[tuple[str, int]]) -> None:
    output = planned.output
    result = find_result(stores, output)
    others = [run for run in runs if run[0] != planned.run_id]
    remedy = "choose another folder (a path with {run_id} gives each merge its own), or replace it with --fresh"
    message = ""
    if result is not None and result.run_id != planned.run_id:  # else this very merge was finished just now
        message = f"holds the result of another merge, run {result.run_id}"
    elif others:
        changed = _what_changed(planned, _claim(stores, output, others[-1]))
        message = f"holds an unfinished merge, run {others[-1][0]}, which differs from this one: {changed}"
    elif not runs:
        listing = stores.of(output).list(output)
        names = [uri.rsplit("/", 1)[-1] for uri in (*(pin.uri for pin in listing.files), *listing.folders)]
        foreign = [name for name in names if name != FOLDER]
        message = f"holds something else: {', '.join(foreign[:5])}" if foreign else ""
    if message:
        _demand_no_folders(stores, output, own_names(planned) | _written(_claims(stores, output, runs)))
        raise InputError(Problem(output, message, remedy))
    demand_no_foreign(planned, stores, own_names(planned))


def _forget(planned: Plan, stores: Stores, runs: list[tuple[str, int]]) -> list[str]:
    """Remove earlier runs, and files that a loader would open; return the names of those that no run has written.

    The files that make an earlier result look whole go first, then weights, uploads and manifests. Weights go as well:
    without an ETag, an old file could pass for one that this run has completed. A plan that can't be read goes, too.

    Only files that a listing of the folder shows are removed. In subfolders, only files that an earlier run has written
    are removed. The plan of another run may be anybody's, so only those of its names count that a loader would open.
    """
    output, store = planned.output, stores.writer(planned.output)
    claims = _claims(stores, output, runs)
    written = _written(claims)
    own = own_names(planned) | written
    _demand_no_folders(stores, output, own)
    present = {pin.uri.rpartition("/")[2] for pin in store.list(output).files}
    entry_point_files = {plan.recipe.output.entry_point_file(plan.files, plan.library) for plan in (planned, *claims)}
    loadable = [name for name in sorted(present) if name in own or is_loaded(name)]
    first = [RESULT_NAME, SUMS_NAME, *sorted(entry_point_files & own)]
    for name in (*(name for name in first if name in present), *(name for name in loadable if name not in first)):
        store.delete(join(output, name))
    folders = {name.partition("/")[0] for name in own if "/" in name}
    for folder in folders & {uri.rpartition("/")[2] for uri in store.list(output).folders}:
        store.list_below(output, folder)  # refuses a link that leads out of the output
        for name in sorted(name for name in own if name.startswith(f"{folder}/")):
            store.delete(within(output, name))
    for uri, upload in store.list_uploads(output):
        store.abort_upload(uri, upload)
    for run in runs:
        store.delete_folder(Manifest.folder_of(output, *run))
    return [name for name in loadable if name not in written and name not in (RESULT_NAME, SUMS_NAME)]


def _demand_no_folders(stores: Stores, output: str, own: Collection[str]) -> None:
    """Raise `InputError` where subfolders hold files that --fresh leaves and a loader would open."""
    inside = [name for name in foreign_files(stores, output, own) if "/" in name]
    if inside:
        message = (
            f"holds folders with files of another model, which a loader would take for this one's: {listed(inside)}"
        )
        raise InputError(
            Problem(output, message, "remove these folders yourself and run it with --fresh, or choose another output")
        )


def _claims(stores: Stores, output: str, runs: Sequence[tuple[str, int]]) -> list[Plan]:
    """Return the plans in the folders of earlier runs. Anybody may have written them."""
    return [claim for run in runs if (claim := _claim(stores, output, run))]


def _written(claims: Sequence[Plan]) -> set[str]:
    """Return the names that earlier runs claim to publish and a loader would open."""
    return {name for claim in claims for name in _names(claim) if _may_be_ours(name)}


def _demand_files(stores: Stores, output: str, result: MergeResult) -> None:
    sizes = {pin.uri.rsplit("/", 1)[-1]: pin.size for pin in stores.of(output).list(output).files}
    gone = [file.name for file in result.files if sizes.get(file.name) != file.size]
    gone += [file.name for file in result.documents if "/" not in file.name and file.name not in sizes]
    if gone:
        message = f"the result record is there, but not as it says: {', '.join(gone[:5])}"
        raise InputError(Problem(output, message, "put the files back, or merge again with --fresh"))


def _what_changed(planned: Plan, stored: Plan | None) -> str:
    if stored is None:
        return "its plan is not there, or can't be read"
    changes = []
    if stored.arithmetic != planned.arithmetic:
        changes.append(f"arithmetic {stored.arithmetic} there, {planned.arithmetic} here")
    fields = ("method", "exclude", "allow", "output")
    changes += [f"`{field}`" for field in fields if getattr(stored.recipe, field) != getattr(planned.recipe, field)]
    before, now = ({pin.uri: pin for pin in _pins(plan)} for plan in (stored, planned))
    changes += [f"input {uri}" for uri in sorted(before.keys() | now.keys()) if before.get(uri) != now.get(uri)][:3]
    return "; ".join(changes) or "models, weights or ids"


def _pins(plan: Plan) -> Iterator[Pin]:
    """Yield the pins of all files that decide the result."""
    for model in (plan.catalog.base, *plan.catalog.models):
        for each in model.inputs:
            yield from each.objects
    yield from plan.catalog.earlier.pins if plan.catalog.earlier else ()
    for small in plan.catalog.small_files:
        yield small.pin


def _may_be_ours(name: str) -> bool:
    """Return whether a name in a stored plan is one that merges publish for loaders."""
    folder, _, last = name.rpartition("/")
    return is_loaded(last) or folder in LOADED_FOLDERS


def _names(claim: Plan) -> set[str]:
    """Return the names that another run's plan claims to publish, none where it contradicts itself."""
    with suppress(ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return own_names(claim)
    return set()


def _claim(stores: Stores, output: str, run: tuple[str, int]) -> Plan | None:
    """Return the plan in another run's folder, None where none can be read. Anybody may have written it."""
    with suppress(InputError):
        return Manifest(stores, Manifest.folder_of(output, *run)).read_plan()
    return None


def _continued(planned: Plan, manifest: Manifest, start: Start) -> Plan:
    """Return the plan of a continued run: this call's own, cut into the parts that the run began with.

    The stored plan plays no role. Raises `InputError` where the records rest on other inputs than this plan.
    """
    if planned.digest() != start.digest:
        message = "the unfinished merge there read its inputs in another way, though their content is the same"
        remedy = "put the configs of the inputs back as they were, or merge again with --fresh"
        raise InputError(Problem(manifest.folder, message, remedy))
    if (planned.recipe.output.part_size, planned.sizes) == (start.part_size, start.sizes):
        return planned
    if not comparable(start.sizes):
        message = "the unfinished merge there is cut by sizes that no version of ties_ray has"
        raise InputError(Problem(manifest.folder, message, "merge again with --fresh"))
    output = planned.recipe.output.model_copy(update={"part_size": start.part_size})
    made = make_plan(planned.recipe.model_copy(update={"output": output}), planned.catalog, start.sizes)
    if planned.recipe.output.part_size == start.part_size:
        return made
    note = "continued with the parts of the run that began: output.part_size of this call is ignored"
    return replace(made, notes=(*made.notes, note))
