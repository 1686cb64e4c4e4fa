"""Runs cases by Dagster's own `materialize`, and tells what came of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dagster import AssetKey, DagsterInstance, materialize

from ties_ray_pipelines.on_dagster import TiesRay, merge_asset


def main(told: str) -> None:
    outcomes: dict[str, Any] = {}
    for case in json.loads(Path(os.environ["CASES"]).read_text()):
        subprocess.run(case.get("before", ["true"]), check=True)
        if case.get("nightly"):
            from ties_ray_pipelines.nightly_dagster import definitions

            instance = DagsterInstance.ephemeral()
            done = definitions.get_job_def("nightly_merge").execute_in_process(instance=instance, raise_on_error=False)
            asset, again = "merged", "current"
        else:
            where = {name: case[name] for name in ("address", "program", "env") if name in case}
            resource = TiesRay(**where, retries=case["retries"], pause=0, poll=0.5)
            asset, again = case["id"], ""
            instance = DagsterInstance.ephemeral()
            done = materialize(
                [merge_asset(asset, case["recipe"])],
                resources={"ties_ray": resource},
                instance=instance,
                raise_on_error=False,
            )
        event = instance.get_latest_materialization_event(AssetKey(asset))
        record = event and event.asset_materialization.metadata["record"].value
        failed = {each.step_key for each in done.get_step_failure_events()}
        made = {each.node_name for each in done.get_asset_materialization_events()}
        outcomes[case["id"]] = {
            "state": "failed" if asset in failed else "success",
            "promoted": "failed" if again in failed else "success" if again in made else "skipped",
            "record": record,
        }
    Path(told).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])
