"""Dagster: assets that are merges, on a Ray cluster by its jobs API or by a command line of this machine.

Install this package where the code location runs. Loading it imports neither ties_ray, torch nor ray.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dagster import (
    AssetExecutionContext,
    AssetKey,
    AssetsDefinition,
    ConfigurableResource,
    Failure,
    MaterializeResult,
    MetadataValue,
    RetryRequested,
    asset,
)
from pydantic import Field

from ties_ray_pipelines.jobs import Json, Outcome
from ties_ray_pipelines.step import Command, Merge, Promote, Site, compact, explain, is_new, name_of, run, verdict


class TiesRay(ConfigurableResource):  # type: ignore[type-arg]
    """Where merges run."""

    address: str | None = None
    """The dashboard of a Ray cluster; None: this machine."""
    program: str = "ties-ray"
    env: dict[str, str] = Field(default_factory=dict)
    poll: float = 5.0
    retries: int = 5
    """How often a step is tried again, where that may help."""
    pause: float = 120.0
    """Seconds before that."""

    def run(self, context: AssetExecutionContext, command: Command) -> Outcome:
        """Return the outcome of a step that is done; raise what makes Dagster fail it, or try it again."""
        whole = context.run.root_run_id or context.run_id  # a run that is started again goes on with the same job
        name = name_of(whole, context.asset_key.to_user_string())
        site = Site(self.address or None, self.program, self.env, self.poll)
        outcome = run(site, command, name, show=context.log.info, tried_before=context.retry_number > 0)
        match verdict(outcome.exit_code):
            case "done":
                return outcome
            case "again":
                context.log.error(explain(outcome))
                raise RetryRequested(max_retries=self.retries, seconds_to_wait=self.pause)
            case "failed" | "cancelled":
                metadata = {"exit_code": outcome.exit_code, "record": MetadataValue.json(outcome.record or {})}
                raise Failure(explain(outcome), metadata=metadata, allow_retries=False)


def merge_asset(
    name: str,
    recipe: str | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    result: str | None = None,
    deps: Sequence[Any] = (),
    group_name: str | None = None,
) -> AssetsDefinition:
    """Return an asset that is a merge: its value is the output's URI, its metadata the result record."""

    @asset(name=name, deps=deps, group_name=group_name, kinds={"ray"}, description="Merged by ties_ray")
    def merged(context: AssetExecutionContext, ties_ray: TiesRay) -> MaterializeResult:  # type: ignore[type-arg]
        record = ties_ray.run(context, Merge(recipe, tuple(overrides), result)).record or {}
        return MaterializeResult(value=record["output"], metadata=_metadata(record))

    return merged


def promoted_asset(
    name: str, merge: str, pointer: str, *, evaluate: str = "", overrides: Sequence[str] = ()
) -> AssetsDefinition:
    """Return an asset that is a pointer: moved to what the asset `merge` made, if that is new and approved of."""

    @asset(name=name, deps=[AssetKey(merge)], kinds={"ray"}, output_required=False)
    def promoted(context: AssetExecutionContext, ties_ray: TiesRay):  # type: ignore[no-untyped-def]  # noqa: ANN202
        event = context.instance.get_latest_materialization_event(AssetKey(merge))
        metadata = event.asset_materialization.metadata if event and event.asset_materialization else {}
        output = str(metadata["output"].value)
        if not is_new({name: metadata[name].value for name in ("reused", "tried_before")}):
            context.log.info(f"nothing new: {output} lay there already")
            return
        ties_ray.run(context, Promote(output, pointer, evaluate, tuple(overrides)))
        yield MaterializeResult(metadata={"output": output, "pointer": pointer})

    return promoted


def _metadata(record: Json) -> dict[str, Any]:
    """Return what is shown, and kept, of a record."""
    shown = ("run_id", "reused", "resumed", "tried_before", "bytes_read", "bytes_written", "seconds")
    plain = {name: record[name] for name in shown}
    return plain | {
        "output": MetadataValue.path(record["output"]),
        "waiting": MetadataValue.json(record["waiting"]),
        "record": MetadataValue.json(compact(record)),
    }
