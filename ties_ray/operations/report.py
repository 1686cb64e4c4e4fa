"""`ties-ray report`: a finished merge as one page of HTML, and as a record of the same figures."""

import importlib.util
from collections.abc import Callable, Sequence

from ties_ray.errors import InputError, Problem
from ties_ray.libraries.loaders import RESULT_NAME
from ties_ray.operations.pool_comparison import compare_vectors
from ties_ray.planning.planner import believable
from ties_ray.reports.pool import PoolComparison
from ties_ray.reports.records import MergeResult, Watch, find_result
from ties_ray.reports.report import MergeReport, make_report
from ties_ray.state.manifest import Manifest, find_runs
from ties_ray.stores import Stores, absolute

NEEDED = ("jinja2", "matplotlib", "scipy")
"""What the extra `report` installs."""


def report(
    stores: Stores,
    output: str,
    *,
    compare: bool = False,
    watch: Watch = lambda progress: None,
    announce: Callable[[Sequence[str]], None] = lambda folders: None,
) -> MergeReport:
    """Return the report of a finished merge. It reads the result record, and no weights unless they are compared.

    compare: read all models that were merged, and tell how they relate.
    announce: gets the folders of the inputs before they are read, since the stored plan names them.
    Raises `InputError` where there is no finished merge, or where the extra `report` is not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(Problem("report", f"needs {', '.join(missing)}", "pip install 'ties-ray[report]'"))
    from ties_ray.reports.seriation import clusters_of

    result = find_result(stores, output)
    if result is None:
        raise InputError(Problem(output, f"holds no {RESULT_NAME}: no finished merge", "see `ties-ray status`"))
    comparison = _compared(stores, result, output, watch, announce) if compare else None
    clusters = clusters_of(comparison.cosines) if comparison else []
    names = [model.name for model in comparison.models] if comparison else []
    return make_report(result, comparison, [[names[number] for number in group] for group in clusters])


def _compared(
    stores: Stores, result: MergeResult, output: str, watch: Watch, announce: Callable[[Sequence[str]], None]
) -> PoolComparison:
    """Return how the models of a merge relate; its stored plan names them."""
    from ties_ray.operations.task_vectors import TaskVectors

    generations = [generation for run_id, generation in find_runs(stores, output) if run_id == result.run_id]
    for generation in reversed(generations):
        plan = Manifest(stores, Manifest.folder_of(output, result.run_id, generation)).read_last_plan()
        if plan:
            merge = believable(plan).merges[0]
            models = [merge.catalog.base, *merge.models]
            announce(sorted({pin.uri.rpartition("/")[0] for model in models for pin in model.objects}))
            return compare_vectors(TaskVectors(stores, merge), watch)
    raise InputError(Problem(output, "the plan of the merge has gone, which names its models", "leave --compare out"))


def write(stores: Stores, made: MergeReport, target: str) -> str:
    """Write a report as a page of HTML; return its URI. target: a path or a URI of a store that writes."""
    from ties_ray.reports.page import page_of

    uri = absolute(target)
    stores.writer(uri).put(uri, page_of(made).encode())
    return uri
