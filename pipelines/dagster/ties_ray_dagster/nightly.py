"""Dagster: every night, merge what is new in a bucket, and promote it if the evaluation approves.

    dagster dev -m ties_ray_dagster.nightly

Variables of the environment say what to merge: TIES_RAY_RECIPE, TIES_RAY_POINTER, TIES_RAY_EVALUATE. TIES_RAY_ADDRESS
is the dashboard of a cluster. Without it, TIES_RAY_PROGRAM is a command line of this machine.
"""

from os import environ

from dagster import AssetSelection, Definitions, ScheduleDefinition, define_asset_job

from ties_ray_dagster import TiesRay, merge_asset, promoted_asset

merged = merge_asset("merged", environ.get("TIES_RAY_RECIPE", "s3://recipes/nightly.yaml"))
current = promoted_asset(
    "current",
    "merged",
    environ.get("TIES_RAY_POINTER", "s3://merged/current.json"),
    evaluate=environ.get("TIES_RAY_EVALUATE", "python /opt/evaluate.py"),
)
nightly = define_asset_job("nightly_merge", AssetSelection.assets(merged, current))
definitions = Definitions(
    assets=[merged, current],
    jobs=[nightly],
    schedules=[ScheduleDefinition(job=nightly, cron_schedule="15 2 * * *")],
    resources={
        "ties_ray": TiesRay(
            address=environ.get("TIES_RAY_ADDRESS"), program=environ.get("TIES_RAY_PROGRAM", "ties-ray")
        )
    },
)
