"""Dagster: assets that are merges, on a Ray cluster by its jobs API or by a command line of this machine.

Install this package where the code location runs. Loading it imports neither ties_ray, torch nor ray.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dagster import (
    AssetCheckResult,
    AssetCheckSpec,
    AssetExecutionContext,
    AssetKey,
    AssetRecordsFilter,
    AssetsDefinition,
    AssetSpec,
    Backoff,
    ConfigurableResource,
    Failure,
    MaterializeResult,
    MetadataValue,
    PartitionsDefinition,
    RetryPolicy,
    RetryRequested,
    asset,
    multi_asset,
)
from pydantic import Field

from ties_ray_pipelines.jobs import BAD_INPUT, Json, Outcome
from ties_ray_pipelines.step import Command, Merge, Promote, Site, compact, explain, is_new, name_of, run, verdict

Recipe = str | Mapping[str, Any]
"""A path or URI where the command runs, or the recipe itself."""
RETRIES = RetryPolicy(max_retries=5, delay=120, backoff=Backoff.EXPONENTIAL)
"""How often a step is tried again where that may help, and when. What fails for good is never tried again."""
EVALUATION = "evaluation"
"""The name of the check that an evaluation is."""
LATEST = 50
"""How many materializations of a merge are searched for that of a run."""


class Refused(Failure):
    """A command that ran and found its inputs wanting; an evaluation that does not approve is one."""


class TiesRay(ConfigurableResource):  # type: ignore[type-arg]
    """Where merges run."""

    address: str | None = None
    """The dashboard of a Ray cluster; None: this machine."""
    token: str | None = None
    """The token of that cluster, as `EnvVar(...)`; None: RAY_AUTH_TOKEN has it, where the cluster wants one."""
    program: str = "ties-ray"
    env: dict[str, str] = Field(default_factory=dict)
    poll: float = 5.0

    def run(
        self, context: AssetExecutionContext, command: Command, retry_policy: RetryPolicy | None = RETRIES
    ) -> Outcome:
        """Return the outcome of a step that is done; raise what makes Dagster fail it, or try it again.

        Dagster itself would apply a retry policy to a step that is cancelled, too. So the policy is applied here.
        """
        keys = [context.partition_key] if context.has_partition_key else []
        name = name_of(_whole_run(context), context.op_handle.name, *keys)
        site = Site(self.address or None, self.program, self.env, self.poll, token=self.token)
        outcome = run(site, command, name, show=context.log.info, tried_before=context.retry_number > 0)
        if verdict(outcome.exit_code) == "done":
            return outcome
        metadata = {"exit_code": outcome.exit_code, "record": MetadataValue.json(outcome.record or {})}
        if retry_policy and verdict(outcome.exit_code) == "again":
            context.log.error(explain(outcome))
            pause = retry_policy.calculate_delay(context.retry_number + 1)
            raise RetryRequested(max_retries=retry_policy.max_retries, seconds_to_wait=pause)
        refused = outcome.ran and outcome.exit_code == BAD_INPUT
        raise (Refused if refused else Failure)(explain(outcome), metadata=metadata, allow_retries=False)


def merge_asset(
    name: str,
    recipe: Recipe | Callable[[str], Recipe],
    *,
    overrides: Sequence[str] = (),
    result: str | Callable[[str], str] | None = None,
    deps: Sequence[Any] = (),
    group_name: str | None = None,
    partitions_def: PartitionsDefinition[Any] | None = None,
    retry_policy: RetryPolicy | None = RETRIES,
) -> AssetsDefinition:
    """Return an asset that is a merge: its value is the output's URI, its metadata the result record.

    With partitions, recipe and result may be functions of the partition key.
    """

    @asset(
        name=name,
        deps=deps,
        group_name=group_name,
        kinds={"ray"},
        description="Merged by ties_ray",
        partitions_def=partitions_def,
    )
    def merged(context: AssetExecutionContext, ties_ray: TiesRay) -> MaterializeResult:  # type: ignore[type-arg]
        command = Merge(_of_partition(context, recipe), tuple(overrides), _of_partition(context, result))
        record = ties_ray.run(context, command, retry_policy).record or {}
        return MaterializeResult(value=record["output"], metadata=_metadata(record, _whole_run(context)))

    return merged


def promoted_asset(
    name: str,
    merge: str,
    pointer: str | Callable[[str], str],
    *,
    evaluate: str = "",
    overrides: Sequence[str] = (),
    deps: Sequence[Any] = (),
    partitions_def: PartitionsDefinition[Any] | None = None,
    retry_policy: RetryPolicy | None = RETRIES,
) -> AssetsDefinition:
    """Return an asset that is a pointer: moved to what the asset `merge` made, if that is new and approved of.

    It takes the merge of its own run. Where that made none, it takes the latest one, of the same partition. The
    evaluation is a check of this asset; a merge that is not new is not evaluated.
    """
    checks = [AssetCheckSpec(EVALUATION, asset=name, description=evaluate)] if evaluate else []

    @multi_asset(
        name=name,
        specs=[AssetSpec(name, deps=[AssetKey(merge), *deps], kinds={"ray"}, skippable=True)],
        check_specs=checks,
        can_subset=True,  # else Dagster asks for the result of a check that was not made
        partitions_def=partitions_def,
    )
    def promoted(context: AssetExecutionContext, ties_ray: TiesRay) -> Iterator[Any]:
        record, where = _merge_of(context, AssetKey(merge)), _of_partition(context, pointer)
        if not is_new(record):
            context.log.info(f"nothing new: {record['output']} lay there already")
            return
        facts = {"output": record["output"], "pointer": where}
        try:
            ties_ray.run(context, Promote(record["output"], where, evaluate, tuple(overrides)), retry_policy)
        except Refused as refused:
            if checks:
                facts |= {"reason": refused.description or ""}
                yield AssetCheckResult(passed=False, asset_key=name, check_name=EVALUATION, metadata=facts)
            raise
        yield MaterializeResult(asset_key=name, metadata=facts)
        if checks:
            yield AssetCheckResult(passed=True, asset_key=name, check_name=EVALUATION, metadata=facts)

    return promoted


def _of_partition(context: AssetExecutionContext, value: Any) -> Any:
    return value(context.partition_key) if callable(value) else value


def _whole_run(context: AssetExecutionContext) -> str:
    """Return the id that a run has in common with those that start it again: they go on with the same job."""
    return context.run.root_run_id or context.run_id


def _merge_of(context: AssetExecutionContext, merge: AssetKey) -> Json:
    """Return what the metadata of a merge say: of this run's merge, else of the latest."""
    keys = [context.partition_key] if context.has_partition_key else None
    of_partition = AssetRecordsFilter(merge, asset_partitions=keys)
    made = []
    for record in context.instance.fetch_materializations(of_partition, limit=LATEST).records:
        if record.asset_materialization:
            metadata = record.asset_materialization.metadata
            made.append({name: value.value for name, value in metadata.items()})
    if not made:
        raise Failure(f"{merge.to_user_string()} was never materialized", allow_retries=False)
    return next((metadata for metadata in made if metadata.get("run") == _whole_run(context)), made[0])


def _metadata(record: Json, run: str) -> dict[str, Any]:
    """Return what is shown, and kept, of a record. run: see `_whole_run`."""
    shown = ("run_id", "reused", "resumed", "tried_before", "bytes_read", "bytes_written", "seconds")
    plain = {name: record[name] for name in shown}
    return plain | {
        "run": run,
        "output": MetadataValue.path(record["output"]),
        "waiting": MetadataValue.json(record["waiting"]),
        "record": MetadataValue.json(compact(record)),
    }
