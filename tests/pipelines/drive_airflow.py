"""A DAG file of the tests, with one DAG a case; run as a program, it runs them all and tells what came of them."""

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG

import ties_ray_pipelines.on_airflow
from ties_ray_pipelines.on_airflow import MergeOperator

CASES: list[dict[str, Any]] = json.loads(Path(os.environ["CASES"]).read_text())
DAGS: dict[str, DAG] = {}

for case in CASES:
    if case.get("nightly"):
        continue
    where = {name: case.get(name) for name in ("address", "env")} | {"program": case.get("program", "ties-ray")}
    once = {"retries": case["retries"], "retry_delay": timedelta(seconds=0)}
    with DAG(f"case_{case['id']}", schedule=None, start_date=datetime(2026, 1, 1), default_args=once) as dag:
        merge = MergeOperator(
            task_id="merge", recipe=case["recipe"], deferrable=bool(case.get("deferrable")), poll=0.5, **where
        )
    DAGS[case["id"]] = globals()[dag.dag_id] = dag


def main(told: str) -> None:
    from airflow.models.xcom import XComModel
    from airflow.utils.session import create_session
    from sqlalchemy import select

    outcomes = {}
    for case in CASES:
        subprocess.run(case.get("before", ["true"]), check=True)
        if case.get("nightly"):
            from ties_ray_pipelines.nightly_airflow import nightly as dag
        else:
            dag = DAGS[case["id"]]
        run = dag.test()
        states = {ti.task_id: str(ti.state) for ti in run.get_task_instances()}
        with create_session() as session:
            found = session.scalars(
                select(XComModel).where(
                    XComModel.run_id == run.run_id, XComModel.task_id == "merge", XComModel.key == "return_value"
                )
            ).first()
            record = found and XComModel.deserialize_value(found)
        outcomes[case["id"]] = {
            "state": states["merge"],
            "promoted": states.get("promote"),
            "record": record,
        }
    Path(told).write_text(json.dumps(outcomes))


def settle_in() -> None:
    """Make the database of this home, and the folder where Airflow looks for DAGs: it refuses to test any other."""
    folder = Path(os.environ["AIRFLOW_HOME"]) / "dags"
    if not folder.exists():
        folder.mkdir()
        for file in (Path(__file__), Path(ties_ray_pipelines.on_airflow.__file__).with_name("nightly_airflow.py")):
            (folder / file.name).symlink_to(file)
        subprocess.run([Path(sys.executable).with_name("airflow"), "db", "migrate"], check=True)


if __name__ == "__main__":
    settle_in()
    main(sys.argv[1])
