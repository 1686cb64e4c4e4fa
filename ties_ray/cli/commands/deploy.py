"""`ties-ray deploy`."""

from collections.abc import Sequence
from typing import Any

import click

from ties_ray.cli.command import RECIPE, SET, command, load
from ties_ray.cli.console import Console
from ties_ray.errors import Problem, RecipeError


@click.group()
def deploy() -> None:
    """Print manifests that run a merge elsewhere."""


@deploy.add_command
@command
@RECIPE
@SET
@click.option("--image", required=True, help="Image that holds ties_ray, Ray and torch; deploy/Dockerfile makes one.")
@click.option("--ray-version", default="", help="Ray version of the image. Default: the version of this environment.")
@click.option("--name", default="", help="Name of all objects. Default: `merge-` and the start of the run_id.")
@click.option("--namespace", default="default", show_default=True)
@click.option(
    "--workers",
    type=int,
    help="Number of workers. Default: the recipe's, else enough to read the inputs in a quarter of an hour.",
)
@click.option(
    "--workers-per-pod", type=int, default=4, show_default=True, help="Most workers of a pod; each takes one CPU."
)
@click.option(
    "--service-account", default="ties-ray", show_default=True, help="Service account that may read and write."
)
@click.option("--role-arn", default="", help="Print that account too, bound to this IAM role (IRSA).")
@click.option("--kueue-queue", "queue", default="", help="Wait in this local queue of Kueue.")
@click.option("--cron", "schedule", default="", metavar='"M H D M W"', help="A RayCronJob that merges at these times.")
@click.option("--time-zone", default="", help="Time zone of --cron. Default: the operator's.")
@click.option("--cluster", is_flag=True, help="A RayCluster that grows and shrinks, to submit merges to.")
@click.option("--spot/--no-spot", default=True, help="Run workers on spot nodes where there are any (the default).")
@click.option("--result", default="", metavar="URI", help="Write the result record here, also on failure.")
@click.option(
    "--deadline",
    type=int,
    help="Seconds until the job is given up. Default: four times the expected time, an hour at least.",
)
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="An environment variable of all pods; no secrets.")
@click.option("--env-from", "secrets", multiple=True, metavar="SECRET", help="A Kubernetes secret, as environment.")
def kuberay(console: Console, recipe: str, overrides: Sequence[str], env: Sequence[str], **options: Any) -> int:
    """Print a RayJob for KubeRay, sized for this merge.

    The command plans the merge here, from headers only.

    \b
    Examples:
      ties-ray deploy kuberay recipe.yaml --image registry.example/ties-ray:0.1.0 | kubectl apply -f -
      ties-ray deploy kuberay recipe.yaml --image IMAGE --cron "15 2 * * *" --result s3://recipes/nightly.result.json
    """
    wrong = [setting for setting in env if "=" not in setting]
    if wrong:
        raise RecipeError(Problem("--env", f"{wrong[0]!r} is not of the form NAME=VALUE"))
    loaded = load(recipe, overrides)
    import importlib.metadata
    import json

    from ties_ray.operations import merging
    from ties_ray.operations.kubernetes import Options, kuberay, to_yaml
    from ties_ray.reports.records import plan_record

    options["ray_version"] = options["ray_version"] or importlib.metadata.version("ray")
    asked = Options(env=dict(setting.split("=", 1) for setting in env), **options)
    manifests = kuberay(plan_record(merging.plan(loaded)), loaded, asked)
    click.echo(json.dumps(manifests, indent=2) if console.json else to_yaml(manifests), nl=console.json)
    return 0
