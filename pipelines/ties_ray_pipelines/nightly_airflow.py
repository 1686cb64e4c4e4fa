"""Airflow: every night, merge what is new in a bucket, and promote it if the evaluation approves.

Copy this file into the folder of DAGs. Variables of the environment of Airflow's components say what to merge:
TIES_RAY_RECIPE, TIES_RAY_POINTER, TIES_RAY_EVALUATE. TIES_RAY_ADDRESS is the dashboard of a cluster. Without it,
TIES_RAY_PROGRAM is a command line of this machine.
"""

from datetime import datetime, timedelta
from os import environ
from typing import Any

from airflow.sdk import DAG, dag, get_current_context, task

from ties_ray_pipelines.on_airflow import MergeOperator, PromoteOperator, judged
from ties_ray_pipelines.step import Merge, Site, name_of, run

WHERE: dict[str, Any] = {
    "address": environ.get("TIES_RAY_ADDRESS"),
    "program": environ.get("TIES_RAY_PROGRAM", "ties-ray"),
}
RECIPE = environ.get("TIES_RAY_RECIPE", "s3://recipes/nightly.yaml")

nightly = DAG(
    "nightly_merge",
    schedule="15 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 5, "retry_delay": timedelta(minutes=2), "retry_exponential_backoff": True},
)
with nightly:
    merge = MergeOperator(task_id="merge", recipe=RECIPE, deferrable=True, **WHERE)
    promote = PromoteOperator(
        task_id="promote",
        merge="merge",
        pointer=environ.get("TIES_RAY_POINTER", "s3://merged/current.json"),
        evaluate=environ.get("TIES_RAY_EVALUATE", "python /opt/evaluate.py"),
        **WHERE,
    )
    merge >> promote


@dag(schedule=None, start_date=datetime(2026, 1, 1))
def merge_in_a_task() -> None:
    """Merge from a function; a task that is killed leaves its job on the cluster, and the next try joins it."""

    @task(retries=5, retry_delay=timedelta(minutes=2))
    def merge_adapters() -> Any:
        context = get_current_context()
        name = name_of(context["ti"].dag_id, context["ti"].run_id, context["ti"].task_id)
        return judged(run(Site(**WHERE), Merge(RECIPE), name), context)

    merge_adapters()


merge_in_a_task()
