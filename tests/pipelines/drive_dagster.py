"""Runs cases by Dagster's own `materialize`, and tells what came of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dagster import (
    AssetKey,
    AssetMaterialization,
    DagsterInstance,
    ExecuteInProcessResult,
    RetryPolicy,
    StaticPartitionsDefinition,
    asset,
    materialize,
)

from ties_ray_dagster import TiesRay, merge_asset, promoted_asset
from ties_ray_dagster.nightly import definitions


def main(told: str) -> None:
    outcomes: dict[str, Any] = {}
    for case in json.loads(Path(os.environ["CASES"]).read_text()):
        subprocess.run(case.get("before", ["true"]), check=True)
        instance = DagsterInstance.ephemeral()
        if case.get("nightly"):
            job, asset = definitions.get_job_def("nightly_merge"), "merged"
            done = job.execute_in_process(instance=instance, raise_on_error=False)
        else:
            where = {name: case[name] for name in ("address", "token", "program", "env") if name in case}
            again, asset = RetryPolicy(max_retries=case["retries"], delay=0), case["id"]
            done = materialize(
                [merge_asset(asset, case["recipe"], retry_policy=again)],
                resources={"ties_ray": TiesRay(**where, poll=0.5)},
                instance=instance,
                raise_on_error=False,
            )
        event = instance.get_latest_materialization_event(AssetKey(asset))
        record = event and event.asset_materialization.metadata["record"].value
        failed = {each.step_key for each in done.get_step_failure_events()}
        made = {each.asset_key.to_user_string() for each in done.get_asset_materialization_events()}
        outcomes[case["id"]] = {
            "state": "failed" if asset in failed else "success",
            "promoted": "failed" if "current" in failed else "success" if "current" in made else "skipped",
            "checks": checks(done),
            "record": record,
        }
    outcomes |= {"partitions": partitions(), "meanwhile": meanwhile()}
    Path(told).write_text(json.dumps(outcomes))


def checks(done: ExecuteInProcessResult) -> dict[str, bool]:
    return {each.check_name: each.passed for each in done.get_asset_check_evaluations()}


def says_done(name: str) -> tuple[TiesRay, Path]:
    """Return a site whose command line does nothing and says that it is done, and the file of its calls."""
    program, calls = Path(os.environ["HOME"], name), Path(os.environ["HOME"], f"{name}.calls")
    record = {"schema_version": 1, "status": "done", "run_id": "r", "reused": False, "resumed": False, "waiting": []}
    record |= {"bytes_read": 0, "bytes_written": 0, "seconds": 0, "output": "/merged"}
    text = json.dumps(record, indent=1)
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {calls}\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    return TiesRay(program=str(program)), calls


def partitions() -> list[str]:
    """Return what is called for one partition of two."""
    teams, (site, calls) = StaticPartitionsDefinition(["red", "blue"]), says_done("partitions")
    merged = merge_asset("merged", lambda key: f"s3://recipes/{key}.yaml", partitions_def=teams)
    current = promoted_asset("current", "merged", lambda key: f"s3://merged/{key}.json", partitions_def=teams)
    materialize([merged, current], partition_key="blue", resources={"ties_ray": site})
    return calls.read_text().splitlines()


def meanwhile() -> str:
    """Return what is promoted when another run has merged meanwhile."""
    site, calls = says_done("meanwhile")
    instance = DagsterInstance.ephemeral()

    @asset(deps=["merged"])
    def other() -> None:
        metadata = {"output": "/of another run", "run": "another", "reused": False, "tried_before": False}
        instance.report_runless_asset_event(AssetMaterialization("merged", metadata=metadata))

    current = promoted_asset("current", "merged", "/pointer", deps=[other])
    materialize([merge_asset("merged", "r.yaml"), other, current], instance=instance, resources={"ties_ray": site})
    return calls.read_text().splitlines()[-1]


if __name__ == "__main__":
    main(sys.argv[1])
