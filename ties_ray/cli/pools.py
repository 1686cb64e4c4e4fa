"""Living pools as text for people, and how commands find one."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ties_ray.cli.screen import fact_table, new_table, num_bytes
from ties_ray.errors import Problem, RecipeError, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ties_ray.operations.pool import Pool
    from ties_ray.reports.living_pool import PoolChange, PoolCleaning, PoolRecord

FEW = 40
"""Models that are listed; further ones are counted."""


def pool_at(source: str, overrides: Sequence[str]) -> "Pool":
    """Return the pool of a folder or of a recipe's file. Raises `RecipeError`."""
    from ties_ray.cli.command import load
    from ties_ray.operations.pool import Pool
    from ties_ray.recipe.parse import override

    if source == "-" or source.endswith((".yaml", ".yml", ".json")):
        return Pool(load(source, overrides))
    data: dict[str, Any] = {}
    override(data, overrides)
    if wrong := sorted(data.keys() - {"storage", "run"}):
        message = f"`{wrong[0]}` is a rule of the pool"
        raise RecipeError(Problem("--set", message, "set `storage` and `run` only, or give the pool's recipe file"))
    return Pool(source, storage=data.get("storage"), run=data.get("run"))


def of_pool(record: "PoolRecord") -> "Iterator[RenderableType]":
    """Yield what a pool holds."""
    facts = fact_table()
    facts.add_row("result", record.result)
    facts.add_row("method", " ".join(f"{name}={value}" for name, value in record.method.items()))
    if record.base:
        facts.add_row("base", record.base)
    if record.reads_all:
        facts.add_row("to add", f"all models are read again ({num_bytes(record.add_bytes)}): {record.reads_all}")
    else:
        facts.add_row("to add", f"reads the new model, the base, and {num_bytes(record.add_bytes)} of the last state")
    yield facts
    table = new_table("id", "model", "bytes >", "weight >", "since", "dropping it reads again >")
    for each in record.members[:FEW]:
        weight = "" if each.weight is None else f"{each.weight:g}"
        again = f"{each.drop_reads:,} models, {num_bytes(each.drop_bytes)}" if each.drop_bytes else "nothing"
        table.add_row(each.id, each.uri, num_bytes(each.size), weight, each.added[:10], again)
    yield table
    yield from _more(len(record.members))
    if len(record.results) > 1:
        yield f"{len(record.results) - 1:,} earlier results are kept: dropping goes on from them"
    for row in record.dropped[-FEW:]:
        yield f"dropped {row.dropped[:10]}: {printable(row.uri)}"
    yield from (f"still holds {printable(uri)}: {each.output}" for each in record.results for uri in each.holds)
    yield from (f"left over: {printable(uri)}" for uri in record.leftovers)


def of_change(change: "PoolChange") -> "Iterator[RenderableType]":
    """Yield what a command does to a pool, or did."""
    facts = fact_table()
    for name, uris in (("adds", change.added), ("drops", change.dropped)):
        for position, uri in enumerate(uris[:FEW]):
            facts.add_row(f"{name} ({len(uris):,})" if position == 0 else "", uri)
    if change.again:
        facts.add_row("reads again", f"{len(change.again):,} models ({num_bytes(change.again_bytes)}): {change.reason}")
    facts.add_row("members", f"{change.num_members:,}")
    facts.add_row("read" if change.done else "reads", num_bytes(change.bytes_read))
    facts.add_row("result", change.result)
    yield facts
    if change.present:
        yield f"{change.present:,} of the models were members already"
    yield from (f"left out: {printable(uri)}: {'; '.join(reasons)}" for uri, reasons in change.refused.items())
    yield from (f"waits: {printable(each)}" for each in change.waiting)
    yield from (f"removed: {printable(each)}" for each in change.erased)
    if change.remains:
        yield "what was dropped is still in these; --erase removes them:"
        yield from map(printable, change.remains)


def of_cleaning(cleaning: "PoolCleaning") -> "Iterator[RenderableType]":
    """Yield what is removed from a pool."""
    yield from (f"{'removed' if cleaning.removed else 'there is'}: {printable(each)}" for each in cleaning.found)
    if not cleaning.found:
        yield f"{cleaning.pool}: nothing to clean"


def lines_of(models: Sequence[str], weight: float | None, id_: str | None) -> list[Any]:
    """Return lines of a recipe for models that share a weight."""
    more = {"weight": weight, "id": id_}
    numbers = {name: value for name, value in more.items() if value is not None}
    return [{"path": model, **numbers} for model in models] if numbers else list(models)


def recipe_text(recipe: dict[str, Any]) -> str:
    """Return a recipe as JSON, which is YAML too."""
    return json.dumps(recipe, indent=2)


def _more(number: int) -> Iterator[str]:
    if number > FEW:
        yield f"and {number - FEW:,} more"
