"""Kubeflow Pipelines v2: every night, merge what is new in a bucket, and promote it if the evaluation approves.

Compile it, upload it, and let a recurring run start it. `create_recurring_run` of the client takes a cron expression.
"""

from os import environ

from kfp import dsl

from ties_ray_pipelines.on_kfp import merge, promote


@dsl.pipeline(name="nightly-merge")
def nightly(
    recipe: str = environ.get("TIES_RAY_RECIPE", "s3://recipes/nightly.yaml"),
    pointer: str = environ.get("TIES_RAY_POINTER", "s3://merged/current.json"),
    evaluate: str = environ.get("TIES_RAY_EVALUATE", "python /opt/evaluate.py"),
    address: str = environ.get("TIES_RAY_ADDRESS", ""),
    program: str = environ.get("TIES_RAY_PROGRAM", "ties-ray"),
) -> None:
    """Merge, evaluate, promote; the id of the run names the job, so that a step that is started again joins it."""
    run = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    merged = merge(recipe=recipe, address=address, program=program, name=f"merge-{run}").set_caching_options(False)
    promote(
        record=merged.outputs["record"],
        pointer=pointer,
        evaluate=evaluate,
        address=address,
        program=program,
        name=f"promote-{run}",
    ).set_caching_options(False)
