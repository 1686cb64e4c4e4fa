"""What an output folder holds already: nothing, this merge done or half-done, another one, or something else."""

from dataclasses import replace

from ties_ray.errors import InputError, Problem
from ties_ray.manifest import FOLDER, Manifest, find_runs
from ties_ray.plan import Plan
from ties_ray.report import RESULT_NAME, MergeResult, find_result
from ties_ray.stores import Stores, join


def finished(wanted: Plan, stores: Stores) -> MergeResult | None:
    """Return the result record if the output holds just this merge, whole; None if it does not hold it."""
    result = find_result(stores, wanted.output)
    if result is None or result.run_id != wanted.run_id:
        return None
    _demand_files(stores, wanted.output, result)
    return result.model_copy(update={"reused": True})


def open_run(wanted: Plan, stores: Stores, *, fresh: bool) -> tuple[Plan, Manifest, bool]:
    """Return (plan, manifest, whether it is continued) of a run; refuse a folder that holds something else.

    fresh: remove what earlier runs left, and begin a generation that nothing of theirs can reach.
    """
    output = wanted.output
    runs = find_runs(stores, output)
    mine = [generation for run_id, generation in runs if run_id == wanted.run_id]
    if fresh:
        _forget(stores, output, runs)
    else:
        _refuse_others(wanted, stores, runs)
        if mine:
            manifest = Manifest(stores, Manifest.folder_of(output, wanted.run_id, mine[-1]))
            stored = manifest.read_plan()
            if stored:
                return _with_run_settings(stored, wanted), manifest, True
    manifest = Manifest(stores, Manifest.folder_of(output, wanted.run_id, max(mine, default=0) + 1))
    manifest.write_plan(wanted)
    return wanted, manifest, False


def clean(stores: Stores, output: str, *, remove: bool) -> list[str]:
    """Return what interrupted merges left in an output, and remove it: uploads, and manifests of unfinished runs.

    The manifest of a finished merge stays (`verify` reads it). Call it while holding the lease.
    """
    result = find_result(stores, output)
    store = stores.of(output)
    found = []
    for run_id, generation in find_runs(stores, output):
        if result is None or run_id != result.run_id:
            found.append(f"unfinished run {run_id}, generation {generation}")
            if remove:
                _delete_all(stores, Manifest.folder_of(output, run_id, generation))
    for uri, upload in store.list_uploads(output):
        found.append(f"unfinished upload of {uri.rsplit('/', 1)[-1]} ({upload[:16]})")
        if remove:
            store.abort_upload(uri, upload)
    return found


def _refuse_others(wanted: Plan, stores: Stores, runs: list[tuple[str, int]]) -> None:
    output = wanted.output
    result = find_result(stores, output)
    others = [run for run in runs if run[0] != wanted.run_id]
    remedy = "choose another folder (a path with {run_id} gives each merge its own), or replace it with --fresh"
    if result is not None:
        raise InputError(Problem(output, f"holds the result of another merge, run {result.run_id}", remedy))
    if others:
        changed = _what_changed(wanted, Manifest(stores, Manifest.folder_of(output, *others[-1])).read_plan())
        what = f"holds an unfinished merge, run {others[-1][0]}, which differs from this one: {changed}"
        raise InputError(Problem(output, what, remedy))
    if not runs:
        listing = stores.of(output).list(output)
        names = [uri.rsplit("/", 1)[-1] for uri in (*(pin.uri for pin in listing.files), *listing.folders)]
        foreign = [name for name in names if name != FOLDER]
        if foreign:
            raise InputError(Problem(output, f"holds something else: {', '.join(foreign[:5])}", remedy))


def _forget(stores: Stores, output: str, runs: list[tuple[str, int]]) -> None:
    """Remove earlier runs: first what makes their result look whole, then their uploads and manifests."""
    store = stores.of(output)
    store.delete(join(output, RESULT_NAME))
    for run in runs:
        manifest = Manifest(stores, Manifest.folder_of(output, *run))
        stored = manifest.read_plan()
        if stored:
            store.delete(join(output, stored.recipe.output.door(stored.result.files)))
        for name, upload in manifest.read_uploads().items():
            store.abort_upload(join(output, name), upload)
        _delete_all(stores, manifest.folder)


def _demand_files(stores: Stores, output: str, result: MergeResult) -> None:
    sizes = {pin.uri.rsplit("/", 1)[-1]: pin.size for pin in stores.of(output).list(output).files}
    gone = [file.name for file in result.files if sizes.get(file.name) != file.size]
    if gone:
        what = f"the result record is there, but not as it says: {', '.join(gone[:5])}"
        raise InputError(Problem(output, what, "put the files back, or merge again with --fresh"))


def _delete_all(stores: Stores, folder: str) -> None:
    listing = stores.of(folder).list(folder)
    for inner in listing.folders:
        _delete_all(stores, inner)
    for pin in listing.files:
        stores.of(folder).delete(pin.uri)


def _what_changed(wanted: Plan, stored: Plan | None) -> str:
    if stored is None:
        return "its plan is not there"
    changes = []
    if stored.arithmetic != wanted.arithmetic:
        changes.append(f"arithmetic {stored.arithmetic} there, {wanted.arithmetic} here")
    fields = ("method", "exclude", "allow", "output")
    changes += [f"`{field}`" for field in fields if getattr(stored.recipe, field) != getattr(wanted.recipe, field)]
    before = {pin.uri: pin for model in (stored.catalog.base, *stored.catalog.models) for pin in model.objects}
    now = {pin.uri: pin for model in (wanted.catalog.base, *wanted.catalog.models) for pin in model.objects}
    changes += [f"input {uri}" for uri in sorted(before.keys() | now.keys()) if before.get(uri) != now.get(uri)][:3]
    return "; ".join(changes) or "models, weights or ids"


def _with_run_settings(stored: Plan, wanted: Plan) -> Plan:
    """Return the stored plan with this call's cluster settings; say which other settings are ignored."""
    ignored = [
        f"run.{name}" for name in ("memory",) if getattr(stored.recipe.run, name) != getattr(wanted.recipe.run, name)
    ]
    if stored.recipe.output.part_size != wanted.recipe.output.part_size:
        ignored.append("output.part_size")
    run = wanted.recipe.run.model_copy(update={"memory": stored.recipe.run.memory})
    recipe = stored.recipe.model_copy(update={"run": run, "storage": wanted.recipe.storage})
    notes = (*stored.notes, *(f"continued with the stored plan: {name} of this call is ignored" for name in ignored))
    return replace(stored, recipe=recipe, notes=notes)
