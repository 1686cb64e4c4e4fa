"""Kubeflow Pipelines v2: every night, merge what is new in a bucket, and promote it if the evaluation approves.

Compile it, upload it, and let a recurring run start it. `create_recurring_run` of the client takes a cron expression.
If TIES_RAY_TOKEN_SECRET names a secret of Kubernetes when it is compiled, the key `token` of it is the cluster's token.
"""

from os import environ

from kfp import dsl

from ties_ray_kfp import merge, promote, with_token

TOKEN_SECRET = environ.get("TIES_RAY_TOKEN_SECRET", "")


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
    merged = merge(recipe=recipe, address=address, program=program, name=f"merge-{run}")
    promoted = promote(
        record=merged.outputs["record"],
        pointer=pointer,
        evaluate=evaluate,
        address=address,
        program=program,
        name=f"promote-{run}",
    )
    for task in (merged, promoted):
        task.set_caching_options(False)
        if TOKEN_SECRET:
            with_token(task, TOKEN_SECRET)
