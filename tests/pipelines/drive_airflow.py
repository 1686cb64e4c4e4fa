"""A DAG file of the tests, with one DAG a case; run as a program, it runs them all and tells what came of them."""

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG

import ties_ray_airflow.nightly
from ties_ray_airflow.operators import DashboardLink, MergeOperator, VerifyOperator

CASES: list[dict[str, Any]] = json.loads(Path(os.environ["CASES"]).read_text())
HOME = Path(os.environ["AIRFLOW_HOME"])
DAGS: dict[str, DAG] = {}


def where(case: dict[str, Any]) -> dict[str, Any]:
    """Return where a case runs: on this machine, or on the cluster of a connection."""
    if "address" not in case:
        return {"program": case["program"]}
    connection = {"conn_type": "ties_ray", "host": case["address"], "password": case["token"]}
    os.environ["AIRFLOW_CONN_CLUSTER"] = json.dumps(connection)
    return {"conn_id": "cluster"}


for case in CASES:
    if case.get("nightly"):
        continue
    once = {"retries": case["retries"], "retry_delay": timedelta(seconds=0)}
    file = HOME / f"{case['id']}.yaml"
    with DAG(
        f"case_{case['id']}",
        schedule=None,
        start_date=datetime(2026, 1, 1),
        default_args=once,
        template_searchpath=str(HOME),
    ) as dag:
        recipe: Any = case["recipe"]
        if case["id"] == "reuse":  # the same recipe, as a file that is a template
            text = json.dumps(recipe, indent=2).replace(f'"{recipe["output"]["path"]}"', '"{{ params.output }}"')
            file.write_text(text)
            dag.params["output"] = recipe["output"]["path"]
            recipe = file.name
        merge = MergeOperator(task_id="merge", recipe=recipe, env=case["env"], poll=0.5, **where(case))
        if case["id"] == "reuse":
            VerifyOperator(task_id="verify", merge=merge.output, program=os.environ["TIES_RAY_PROGRAM"])
    DAGS[case["id"]] = globals()[dag.dag_id] = dag


def main(told: str) -> None:
    outcomes = {}
    for case in CASES:
        subprocess.run(case.get("before", ["true"]), check=True)
        dag = ties_ray_airflow.nightly.nightly if case.get("nightly") else DAGS[case["id"]]
        run = dag.test()
        states = {ti.task_id: str(ti.state) for ti in run.get_task_instances()}
        outcomes[case["id"]] = {
            "state": states["merge"],
            "promoted": states.get("promote"),
            "verified": states.get("verify"),
            "record": xcom(run.run_id, "return_value"),
            "link": xcom(run.run_id, DashboardLink().xcom_key),
        }
    Path(told).write_text(json.dumps(outcomes | {"provider": provider()}))


def xcom(run_id: str, key: str) -> Any:
    from airflow.models.xcom import XComModel
    from airflow.utils.session import create_session
    from sqlalchemy import select

    asked = select(XComModel).where(XComModel.run_id == run_id, XComModel.task_id == "merge", XComModel.key == key)
    with create_session() as session:
        found = session.scalars(asked).first()
        return found and XComModel.deserialize_value(found)


def provider() -> dict[str, Any]:
    """Return what Airflow knows of the provider."""
    from airflow.providers_manager import ProvidersManager

    manager = ProvidersManager()
    hook = manager.hooks["ties_ray"]
    return {
        "version": manager.providers["ties-ray-airflow"].version,
        "hook": hook and hook.hook_class_name,
        "links": list(manager.extra_links_class_names),
    }


def settle_in() -> None:
    """Make the database of this home, and the folder where Airflow looks for DAGs: it refuses to test any other."""
    folder = HOME / "dags"
    if not folder.exists():
        folder.mkdir()
        for file in (Path(__file__), Path(ties_ray_airflow.nightly.__file__)):
            (folder / file.name).symlink_to(file)
        subprocess.run([Path(sys.executable).with_name("airflow"), "db", "migrate"], check=True)


if __name__ == "__main__":
    settle_in()
    main(sys.argv[1])
