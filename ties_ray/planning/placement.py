"""Where a merge is carried out: in this process, or on Ray."""

import os
import sys
from typing import NamedTuple

from ties_ray.planning.plan import Plan
from ties_ray.stores import scheme_of

SMALL = 16 * 10**9
"""The most bytes that a merge in this process reads and writes, unless the recipe asks for it."""
MOST_WORKERS = 4
"""The most workers in this process, unless the recipe asks for more. Each may hold `run.memory`."""


class Placement(NamedTuple):
    """Where a merge runs."""

    executor: str
    workers: int | None
    """None: as many as the executor has room for."""
    chosen: bool
    """Whether it was chosen here; False where the recipe names the executor."""


def placed(plan: Plan) -> Placement:
    """Return where a plan is carried out.

    `run.executor: auto` means this process for a small merge of local files on CPUs, unless the caller uses a cluster.
    """
    run = plan.recipe.run
    if run.executor != "auto":
        return Placement(run.executor, run.workers, chosen=False)
    uses_cluster = run.address or os.environ.get("RAY_ADDRESS") or _is_connected()
    is_small = plan.bytes_read + plan.bytes_written <= SMALL
    if uses_cluster or run.device != "cpu" or not is_small or not _is_local(plan):
        return Placement("ray", run.workers, chosen=True)
    return Placement("local", run.workers or min(MOST_WORKERS, len(os.sched_getaffinity(0))), chosen=True)


def _is_connected() -> bool:
    """Return whether this process has called `ray.init`, or is a process of Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _is_local(plan: Plan) -> bool:
    """Return whether all files of a plan lie on this machine."""
    folders = [plan.output, plan.recipe.run.pool_cache or plan.output]
    files = [pin.uri for model in (plan.catalog.base, *plan.catalog.models) for pin in model.objects]
    return all(scheme_of(uri) == "local" for uri in (*folders, *files))
