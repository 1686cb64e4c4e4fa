"""`ties-ray report`: a finished merge as one page of HTML, and as a record of the same figures."""

import importlib.util
from collections.abc import Callable, Sequence

from ties_ray.errors import InputError, Problem
from ties_ray.libraries.loaders import RESULT_NAME
from ties_ray.operations.pool_comparison import compare_vectors
from ties_ray.planning.plan import Plan
from ties_ray.planning.planner import believable
from ties_ray.reports import scores, sweep
from ties_ray.reports.controls import Controls
from ties_ray.reports.pool import PoolComparison
from ties_ray.reports.records import MergeResult, Watch, find_result
from ties_ray.reports.report import MergeReport, make_report
from ties_ray.reports.sweep import SweepResult
from ties_ray.state.manifest import Manifest, find_runs
from ties_ray.stores import Stores, absolute

NEEDED = ("jinja2", "matplotlib", "scipy")
"""What the extra `report` installs."""


def report(
    stores: Stores,
    output: str,
    *,
    compare: bool = False,
    controls: bool = False,
    watch: Watch = lambda progress: None,
    announce: Callable[[Sequence[str]], None] = lambda folders: None,
) -> MergeReport:
    """Return the report of a finished merge. It reads the result record, and no weights unless that is asked for.

    compare: read all models that were merged. The report then tells how they relate.
    controls: merge some elements again, without each model, and with random signs.
    announce: gets the folders of the inputs before they are read, since the stored plan names them.
    Raises `InputError` where there is no finished merge, or where the extra `report` is not installed.
    """
    _demand_extra()
    from ties_ray.reports.seriation import clusters_of

    result = find_result(stores, output)
    if result is None:
        raise InputError(Problem(output, f"holds no {RESULT_NAME}: no finished merge", "see `ties-ray status`"))
    plan, manifest = _plan_of(stores, result, output, announce) if compare or controls else (None, None)
    comparison = _compared(stores, plan, watch) if plan and compare else None
    beside = _controls(stores, plan, manifest, watch) if plan and manifest and controls else None
    clusters = clusters_of(comparison.cosines) if comparison else []
    names = [model.name for model in comparison.models] if comparison else []
    groups = [[names[number] for number in group] for group in clusters]
    return make_report(result, comparison, groups, beside, scores.read(stores, output, result.run_id))


def _plan_of(
    stores: Stores, result: MergeResult, output: str, announce: Callable[[Sequence[str]], None]
) -> tuple[Plan, Manifest]:
    """Return the stored plan of a merge, which names its models, and the manifest that holds it."""
    generations = [generation for run_id, generation in find_runs(stores, output) if run_id == result.run_id]
    for generation in reversed(generations):
        manifest = Manifest(stores, Manifest.folder_of(output, result.run_id, generation))
        if plan := manifest.read_last_plan():
            plan = believable(plan)
            models = [plan.catalog.base, *plan.merges[0].models]
            announce(sorted({pin.uri.rpartition("/")[0] for model in models for pin in model.objects}))
            return plan, manifest
    message = "the plan of the merge has gone, which names its models"
    raise InputError(Problem(output, message, "leave --compare and --controls out"))


def _compared(stores: Stores, plan: Plan, watch: Watch) -> PoolComparison:
    """Return how the models of a merge relate."""
    from ties_ray.operations.task_vectors import TaskVectors

    return compare_vectors(TaskVectors(stores, plan.merges[0]), watch)


def _controls(stores: Stores, plan: Plan, manifest: Manifest, watch: Watch) -> Controls:
    from ties_ray.operations.controls import controls

    return controls(stores, plan, manifest, watch)


def sweep_of(stores: Stores, folder: str) -> SweepResult | None:
    """Return the results of a sweep in a folder; None where it holds a merge, or no sweep."""
    return sweep.find(stores, folder) if find_result(stores, folder) is None else None


def write(stores: Stores, made: MergeReport | SweepResult, target: str) -> str:
    """Write a report as a page of HTML; return its URI. target: a path or a URI of a store that writes.

    Raises `InputError` where the extra `report` is not installed.
    """
    _demand_extra()
    from ties_ray.reports import page, sweep_page

    uri = absolute(target)
    text = sweep_page.page_of(made) if isinstance(made, SweepResult) else page.page_of(made)
    stores.writer(uri).put(uri, text.encode())
    return uri


def _demand_extra() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(Problem("report", f"needs {', '.join(missing)}", "pip install 'ties-ray[report]'"))
