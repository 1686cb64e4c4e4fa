"""Kubeflow Pipelines v2: components that merge and promote, on a Ray cluster by its jobs API or by a command line.

    kfp dsl compile --py nightly.py --output nightly.yaml

The components carry `ties_ray_pipelines` with them. So any image with Python and a shell will do for merges on a
cluster. Merges in the component's own pod need the image with ties_ray in it.

Kubeflow can't tell errors that are worth another try from others, so the component itself tries again. Leave
`set_retry` alone. Leave caching off, since buckets change.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import dsl, kubernetes

import ties_ray_pipelines

IMAGE = "python:3.11"


def _component(function: Callable[..., Any]) -> Any:
    """Return a component that has `ties_ray_pipelines` in it."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "ties_ray_pipelines"
        package.mkdir()
        for name in ("__init__.py", "jobs.py", "step.py"):
            shutil.copy(Path(ties_ray_pipelines.__file__).with_name(name), package)
        return dsl.component(function, base_image=IMAGE, embedded_artifact_path=folder)


def with_token(task: dsl.PipelineTask, secret: str, key: str = "token") -> dsl.PipelineTask:
    """Give a task the token of its Ray cluster from a secret of Kubernetes; return the task."""
    return kubernetes.use_secret_as_env(task, secret_name=secret, secret_key_to_env={key: "RAY_AUTH_TOKEN"})


def _merge(
    recipe: str,
    model: dsl.Output[dsl.Model],
    record: dsl.OutputPath(str),  # type: ignore[valid-type]
    name: str = "",
    overrides: list[str] = [],  # noqa: B006  Kubeflow reads it from here
    result: str = "",
    address: str = "",
    program: str = "ties-ray",
    env: dict[str, str] = {},  # noqa: B006
    tries: int = 4,
    pause: float = 60.0,
) -> None:
    """Merge. `model` is the output, where it lies; recipe: a URI, or the recipe itself as JSON; so is the record."""
    import json
    import sys
    from pathlib import Path

    from ties_ray_pipelines.step import Merge, Site, compact, explain, name_of, run

    source = json.loads(recipe) if recipe.lstrip().startswith("{") else recipe
    site, command = Site(address or None, program, env), Merge(source, tuple(overrides), result or None)
    outcome = run(site, command, name_of(name or "merge"), tries=tries, pause=pause)
    if outcome.exit_code or not outcome.record:
        print(explain(outcome), file=sys.stderr)
        sys.exit(outcome.exit_code or 1)
    kept = compact(outcome.record)
    model.uri = kept["output"]
    model.metadata.update({name: value for name, value in kept.items() if isinstance(value, str | int | float)})
    Path(record).write_text(json.dumps(kept))


def _promote(
    record: str,
    pointer: str,
    name: str = "",
    evaluate: str = "",
    overrides: list[str] = [],  # noqa: B006
    address: str = "",
    program: str = "ties-ray",
    env: dict[str, str] = {},  # noqa: B006
    tries: int = 4,
    pause: float = 60.0,
) -> str:
    """Promote a merge, if it is new and the evaluation approves; return what became of it."""
    import json
    import sys

    from ties_ray_pipelines.step import Promote, Site, explain, is_new, name_of, run

    made = json.loads(record)
    if not is_new(made):
        return "nothing new"
    command = Promote(made["output"], pointer, evaluate, tuple(overrides))
    site = Site(address or None, program, env)
    outcome = run(site, command, name_of(name or "promote"), tries=tries, pause=pause)
    if outcome.exit_code:
        print(explain(outcome), file=sys.stderr)
        sys.exit(outcome.exit_code)
    return "promoted"


merge = _component(_merge)
promote = _component(_promote)
