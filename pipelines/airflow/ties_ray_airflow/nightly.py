"""Airflow: every night, merge what is new in a bucket, and promote it if the evaluation approves.

Copy this file into the folder of DAGs. Variables of the environment of Airflow's components say what to merge:
TIES_RAY_RECIPE, TIES_RAY_POINTER, TIES_RAY_EVALUATE. It runs on the cluster that the connection `ties_ray_default`
names. If TIES_RAY_PROGRAM is set, it runs by that command line of this machine.
"""

from datetime import datetime, timedelta
from os import environ
from typing import Any

from airflow.sdk import DAG, dag, get_current_context, task

from ties_ray_airflow.hook import TiesRayHook
from ties_ray_airflow.operators import MergeOperator, PromoteOperator, judged
from ties_ray_pipelines.step import Merge, Site, name_of, run

PROGRAM = environ.get("TIES_RAY_PROGRAM", "")
WHERE: dict[str, Any] = {"program": PROGRAM} if PROGRAM else {"conn_id": TiesRayHook.default_conn_name}
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
        merge=merge.output,
        pointer=environ.get("TIES_RAY_POINTER", "s3://merged/current.json"),
        evaluate=environ.get("TIES_RAY_EVALUATE", "python /opt/evaluate.py"),
        **WHERE,
    )


@dag(schedule=None, start_date=datetime(2026, 1, 1))
def merge_in_a_task() -> None:
    """Merge from a function; a task that is killed leaves its job on the cluster, and the next try joins it."""

    @task(retries=5, retry_delay=timedelta(minutes=2))
    def merge_adapters() -> Any:
        context = get_current_context()
        jobs = None if PROGRAM else TiesRayHook().get_conn()
        site = Site(jobs.address, token=jobs.token) if jobs else Site(program=PROGRAM)
        name = name_of(context["ti"].dag_id, context["ti"].run_id, context["ti"].task_id)
        return judged(run(site, Merge(RECIPE), name), context)

    merge_adapters()


merge_in_a_task()
