"""Plans, results and problems as text for people."""

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from rich.console import RenderableType
from rich.table import Table

from ties_ray.cli.method_docs import MethodDoc
from ties_ray.cli.screen import duration, fact_table, new_table, num, num_bytes
from ties_ray.errors import enumerated, printable
from ties_ray.inputs.names import model_names
from ties_ray.operations.inspection import Inspection, Inspections, Pool
from ties_ray.operations.promote import Promotion
from ties_ray.operations.push import Push
from ties_ray.operations.status import RunStatus, Status
from ties_ray.operations.verify import Verification
from ties_ray.planning.forecast import Forecast
from ties_ray.reports.records import Cleaning, MergeResult, PlannedInput, PlanRecord
from ties_ray.rounds.condense import Truncation
from ties_ray.rounds.threshold import TrimReport
from ties_ray.state.lease import Holder

WORKERS = {"merge": "merging", "wait_read": "waiting to read", "wait_write": "waiting to write", "idle": "idle"}
"""Words for the keys of `MergeResult.worker_seconds` that add up to a worker's time."""
FEW = 8
"""Models or files that are listed; further ones are counted."""


# -- plan


def of_plan(plan: PlanRecord) -> Iterator[RenderableType]:
    """Yield what a merge will do."""
    table = fact_table()
    table.add_row(
        "base", f"{plan.base.uri}  ({_content(plan.base)})" if plan.base.uri else "none: shapes come from the factors"
    )
    for position, model in enumerate(plan.models[:FEW]):
        table.add_row(f"models ({len(plan.models)})" if position == 0 else "", _input(model))
    if len(plan.models) > FEW:
        table.add_row("", f"and {len(plan.models) - FEW} more")
    table.add_row("method", f"{_settings(plan.method)}  [{plan.paper}; lambda scales a {plan.scales}]")
    smallest, largest = plan.task_vectors
    each = num(largest) if smallest == largest else f"{num(smallest)} to {num(largest)}"
    table.add_row("merged", f"{each} elements of each model")
    table.add_row("output", f"{plan.output}  ({_files(len(plan.files), plan.bytes_written)})")
    for file in plan.files[:FEW] if len(plan.files) > 1 else ():
        table.add_row("", f"{file.name}: {num_bytes(file.size)}, {file.tensors} tensors")
    if len(plan.files) > FEW:
        table.add_row("", f"and {len(plan.files) - FEW} more")
    table.add_row("memory", f"{num_bytes(plan.memory)} a worker, beyond its imports")
    if plan.gpu_memory:
        table.add_row("GPU", f"{num_bytes(plan.gpu_memory)} a worker; at most {plan.sharers} share one")
    table.add_row("run", f"{plan.run_id}, arithmetic {plan.arithmetic}")
    yield table
    yield _rounds(plan)
    reread = sum(round_.bytes_again for round_ in plan.rounds)
    if reread:
        yield f"{num_bytes(reread)} of these are read a second time; workers' caches spare what they hold"
    if plan.forecast:
        yield from _forecast(plan.forecast)
    yield from _notes(plan.notes)


def _rounds(plan: PlanRecord) -> Table:
    table = new_table("round", "shards >", "reads >", "requests >", "")
    for round_ in plan.rounds:
        remark = f"each model {round_.passes} times" if round_.passes > 1 else round_.remark
        table.add_row(round_.name, f"{round_.shards:,}", num_bytes(round_.bytes_read), f"{round_.requests:,}", remark)
    table.add_row("together", f"{plan.shards:,}", num_bytes(plan.bytes_read), f"{plan.requests:,}", "")
    return table


def _forecast(forecast: Forecast) -> Iterator[RenderableType]:
    """Yield how long the merge takes with some numbers of workers, and the rates behind the figures."""
    rounds = forecast.predictions[0].rounds
    table = new_table("workers >", "takes >", *(f"{round_.name} >" for round_ in rounds), "limited by")
    for prediction in forecast.predictions:
        limits = dict.fromkeys(round_.bound for round_ in prediction.rounds)
        times = (duration(round_.seconds) for round_ in prediction.rounds)
        table.add_row(f"{prediction.workers:,}", duration(prediction.seconds), *times, ", ".join(limits))
    yield table
    rates = forecast.rates
    ns = [*rates.dense.values(), *rates.factors.values()] or [0.0]
    yield (
        f"measured from here: {num_bytes(rates.read)}/s read, {rates.request * 1e3:.1f} ms a request, "
        f"{min(ns):.2f} to {max(ns):.2f} ns an element of a model; assumed as fast: writing, and further workers"
    )


def _input(model: PlannedInput) -> str:
    settings = [f"weight {model.weight:g}"] if model.weight != 1 else []
    settings += [f"density {model.density:g}"] if model.density is not None else []
    settings += [f"{name} by parameter" for name in model.by_parameter]
    settings += [] if model.account.all_merged else [str(model.account)]
    return f"{model.uri}  ({', '.join([_content(model), *settings])})"


def _content(model: PlannedInput) -> str:
    return f"{num(model.parameters)} parameters, {', '.join(model.dtypes)}, {num_bytes(model.size)}"


def _settings(method: Mapping[str, object]) -> str:
    return ", ".join([str(method["name"]), *(f"{key} {value}" for key, value in method.items() if key != "name")])


# -- result


def of_result(result: MergeResult, recipe: str) -> Iterator[RenderableType]:
    """Yield the outcome of a merge; recipe: the file's name, for the commands to try next."""
    size = sum(file.size for file in result.files)
    if result.reused:
        yield f"done before: {result.output} holds this very merge ({_files(len(result.files), size)}); nothing to do"
    else:
        predicted = result.predicted_seconds
        took = duration(result.seconds) + (f" ({duration(predicted)} predicted)" if predicted is not None else "")
        continued = ", continued" if result.resumed else ""
        yield f"done: {result.output} ({_files(len(result.files), size)}) in {took}{continued}"
        yield "  " + _effort(result)
        yield from _times(result)
    names = model_names(result.provenance.models) if result.provenance else {}
    if result.trims:
        method = result.provenance.method if result.provenance else {}
        yield from _trims(result.trims, names, at_threshold=str(method.get("at_threshold")))
    if result.truncation:
        yield from _truncation(result.truncation)
    for name, value in result.statistics.items():
        yield f"  {name}: {value:,}"
    yield from _left_out(result, names)
    yield from _notes(result.notes)
    yield from (f"warning: {printable(warning)}" for warning in result.warnings)
    yield from _next(result, recipe)


def _left_out(result: MergeResult, names: Mapping[str, str]) -> Iterator[str]:
    """Yield what the recipe let the merge leave out."""
    if result.refused:
        yield f"  left out, as the recipe allows: {', '.join(list(result.refused)[:FEW])}"
        if len(result.refused) > FEW:
            yield f"    and {len(result.refused) - FEW} more"
    for place, count in list(result.zeroed.items())[:FEW]:
        model, _, parameter = place.partition(": ")
        yield f"  not finite, counted as zero: {count:,} values of {names.get(model, model)}: {parameter}"
    yield from (f"  waits for a later merge: {uri}" for uri in result.waiting[:FEW])
    if len(result.waiting) > FEW:
        yield f"    and {len(result.waiting) - FEW} more"


def _truncation(truncation: Truncation) -> Iterator[RenderableType]:
    """Yield the error of writing the merge as factors, and the matrices with the largest errors."""
    yield f"  rank {truncation.rank}: the adapter differs from the merge by {truncation.relative_error:.2%} of its norm"
    worst = sorted(truncation.matrices.items(), key=lambda item: -item[1])[:3]
    if truncation.relative_error > 0.005:
        yield f"  most in {', '.join(f'{name} ({error:.1%})' for name, error in worst)}"


def _effort(result: MergeResult) -> str:
    effort = [f"read {num_bytes(result.bytes_read)} in {result.requests:,} requests"]
    if result.bytes_kept:
        effort.append(f"{num_bytes(result.bytes_kept)} more came from caches")
    effort.append(f"wrote {num_bytes(result.bytes_written)}")
    effort.append(f"{result.shards:,} shards")
    if result.shards_done_before:
        effort.append(f"{result.shards_done_before:,} of them done by the interrupted run")
    for count, events in (
        (result.shards_again, "shards done again"),
        (result.workers_lost, "workers lost"),
        (result.retries, "requests repeated"),
    ):
        if count:
            effort.append(f"{count:,} {events}")
    return ", ".join(effort)


def _times(result: MergeResult) -> Iterator[str]:
    """Yield the share of the workers' time that each activity took."""
    seconds = {activity: result.worker_seconds.get(key, 0.0) for key, activity in WORKERS.items()}
    total = sum(seconds.values())
    if total:
        yield "  workers: " + ", ".join(f"{value / total:.0%} {activity}" for activity, value in seconds.items())


def _trims(trims: Sequence[TrimReport], names: Mapping[str, str], *, at_threshold: str) -> Iterator[RenderableType]:
    """Yield a row a model; where trim goes by tensor, a row sums up the model's tensors.

    names: the models' names by id. at_threshold: the rule for values at the threshold. A threshold of zero drops none:
    `kept` never counts zeros.
    """
    drop = at_threshold == "drop"
    by_model: dict[str, list[TrimReport]] = {}
    for trim in trims:
        by_model.setdefault(trim.model, []).append(trim)
    table = new_table("model", "threshold >", "kept >", "at the threshold >")
    for model, of_model in list(by_model.items())[:FEW]:
        low, high = min(trim.threshold for trim in of_model), max(trim.threshold for trim in of_model)
        size, tied = sum(trim.size for trim in of_model), sum(trim.tied for trim in of_model)
        kept = sum(trim.kept - (trim.tied if drop and trim.threshold else 0) for trim in of_model)
        threshold = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        table.add_row(names.get(model, model), threshold, f"{kept / max(1, size):.2%}", f"{tied / max(1, size):.2%}")
    yield table
    if len(by_model) > FEW:
        yield f"  and {len(by_model) - FEW} more models"
    if at_threshold == "keep" and any(trim.tied > trim.size // 100 for trim in trims):
        rule = "at_threshold: drop keeps none, exact keeps the first"
        yield f"  all values at the threshold are kept, hence more than the density says; {rule}"


def _next(result: MergeResult, recipe: str) -> Iterator[str]:
    """Yield the commands that a user may want next."""
    output = shlex.quote(result.output)
    yield "next:"
    yield f"  ties-ray verify {output}"
    if result.effects:
        yield f"  ties-ray report {output}"
    yield from (f"  {line}" for line in (result.download_command, result.opened_by) if line)
    if result.provenance and "density" in result.provenance.method:
        other = "0.3" if result.provenance.method["density"] != 0.3 else "0.2"
        options = f"--set method.density={other} --set output.path={shlex.quote(result.output + '-' + other)}"
        yield f"  another density: ties-ray merge {shlex.quote(recipe)} {options}"


def of_promotion(promotion: Promotion) -> Iterator[str]:
    """Yield the outputs that a pointer names."""
    yield f"{promotion.pointer} {'now names' if promotion.changed else 'already names'} {promotion.current.output}"
    yield f"  before: {promotion.previous.output}" if promotion.previous else "  nothing before it"


def of_push(push: Push) -> Iterator[str]:
    """Yield what was published."""
    yield f"{len(push.files):,} files, {num_bytes(push.num_bytes)}: {push.uri}"
    if push.removed:
        yield f"  removed from the repository: {printable(', '.join(push.removed))}"


# -- folders


def of_status(status: Status) -> Iterator[RenderableType]:
    """Yield what an output folder holds."""
    if status.result:
        size = sum(file.size for file in status.result.files)
        yield f"finished: {status.output}, run {status.result.run_id} ({_files(len(status.result.files), size)})"
    if status.holder:
        yield _holder(status.holder, status.last_sign, is_gone=status.is_gone)
    for run in status.runs:
        if not status.result or run.run_id != status.result.run_id:
            yield from _unfinished(status.output, run)
    if not status.result and not status.runs:
        yield f"{status.output} holds no merge"


def _holder(holder: Holder, last_sign: float | None, *, is_gone: bool) -> str:
    """Return who holds the output, whether that one lives, and what it does."""
    since = f"the last sign of life is of {_ago(last_sign)}" if last_sign else "nothing says when it last lived"
    state = "which has ended" if is_gone else since
    doing = f"; it was at: {printable(holder.doing)}" if holder.doing else ""
    return f"held by process {holder.process.partition('-')[0]} on {printable(holder.host)}, {state}{doing}"


def _ago(seconds: float) -> str:
    """Return a time of the past, with how long ago it was."""
    at = datetime.fromtimestamp(seconds, UTC)
    return f"{at:%Y-%m-%d %H:%M:%S} UTC, {duration(max(0.0, time.time() - seconds))} ago"


def _unfinished(output: str, run: RunStatus) -> Iterator[RenderableType]:
    """Yield how far an unfinished run is, and what the same command will do."""
    yield f"unfinished: {output}, run {run.run_id}, generation {run.generation}"
    if run.problem:
        yield f"  {run.problem}"
    elif not run.rounds:
        yield "  no plan is stored: nothing was begun"
    else:
        table = new_table("round", "shards done >", "of >", "")
        for round_ in run.rounds:
            whole = "whole" if round_.done == round_.shards else ""
            table.add_row(round_.name, f"{round_.done:,}", f"{round_.shards:,}", whole)
        yield table
        last = f"; the last record is of {_ago(run.last_record)}" if run.last_record else ""
        if run.stopped_in:
            left = next(round_.shards - round_.done for round_ in run.rounds if round_.name == run.stopped_in)
            named = ", ".join(map(str, run.open_shards)) + (", ..." if left > len(run.open_shards) else "")
            yield f"  it is in round {run.stopped_in}: {_count(left, 'shard')} left ({named}){last}"
        else:
            yield f"  all rounds are done, and only the publication is left{last}"
        done = sum(round_.done for round_ in run.rounds)
        share = f"{num_bytes(run.bytes_done)} of {num_bytes(run.bytes_planned)}"
        yield f"  {len(run.uploads)} uploads begun; the same merge command goes on there, and --fresh begins anew"
        yield f"  {_count(done, 'shard')} ({share} to read) will not be done again"


def of_verification(verification: Verification) -> Iterator[RenderableType]:
    """Yield what the verification of an output shows."""
    table = new_table("file", "bytes >", "tensors >", "parts proved >", "CRC32C", "NaN >", "infinite >")
    for file in verification.files:
        parts = f"{file.parts_proved} of {file.parts}"
        table.add_row(
            file.name, num_bytes(file.size), f"{file.tensors:,}", parts, file.crc32c, f"{file.nan:,}",
            f"{file.infinite:,}",
        )  # fmt: skip
    yield table
    if sample := verification.sample:
        share = f"{sample.elements / max(1, sample.of):.2%}"
        yield f"merged again: {sample.elements:,} of {sample.of:,} elements ({share}), in {sample.tensors:,} tensors"
    if verification.recounted:
        yield f"thresholds counted anew: of {len(verification.recounted):,} models"
    if verification.members:
        yield f"pool: its plan names the files of {_count(len(verification.members), 'member')}, each as it was pinned"
    if verification.absent:
        yield f"pool: it names no file of {_count(len(verification.absent), 'dropped model')}: " + enumerated(
            verification.absent
        )
    if verification.sums:
        yield f"wrote {verification.sums}"
    yield from _notes(verification.notes)
    count = len(verification.problems)
    yield f"{verification.output}: {_count(count, 'problem') if count else 'whole'}"


def of_cleaning(cleaning: Cleaning) -> Iterator[str]:
    """Yield what interrupted merges left."""
    yield from _notes(cleaning.notes)
    yield from (f"{'removed' if cleaning.removed else 'there is'}: {remnant}" for remnant in cleaning.found)
    if not cleaning.found:
        yield f"{cleaning.output}: nothing to clean"


def of_inspections(inspections: Inspections) -> Iterator[RenderableType]:
    """Yield what input folders hold: one folder in full, several a line each, a pool of adapters by its counts."""
    folders = inspections.folders
    if inspections.pool:
        yield _pool(inspections.pool)
        return
    if len(folders) == 1:
        yield _inspection(folders[0])
        yield from _notes(folders[0].notes)
        return
    table = new_table("folder", "format", "architecture", "parameters >", "dtypes", "bytes >", "licence", "problems >")
    for folder in folders:
        table.add_row(
            folder.uri, folder.format or "none", folder.architecture, num(folder.parameters),
            ", ".join(folder.dtypes), num_bytes(folder.size), folder.licence, str(len(folder.problems) or ""),
        )  # fmt: skip
    yield table
    yield f"{len(folders)} folders, {num_bytes(sum(folder.size for folder in folders))}"


def _pool(pool: Pool) -> Table:
    table = fact_table()
    table.add_row("adapters", f"{pool.adapters}, of which {pool.usable} can be used as they are")
    for name, counts in (
        ("rank", pool.ranks), ("scale", pool.scales), ("targets", pool.targets), ("base", pool.base_names),
        ("refused", pool.refused),
    ):  # fmt: skip
        for number, (value, count) in enumerate(list(counts.items())[:FEW]):
            table.add_row(name if number == 0 else "", f"{count:>5} x {value}")
        if len(counts) > FEW:
            table.add_row("", f"and {len(counts) - FEW} more kinds")
    table.add_row("weights", f"{num(pool.parameters)} parameters, {num_bytes(pool.size)}")
    if pool.norms:
        smallest, median, largest = pool.norms
        table.add_row("norms", f"{smallest:.4g} to {largest:.4g}, median {median:.4g}")
    for uris in pool.duplicates[:FEW]:
        table.add_row("the same", ", ".join(uris[:FEW]))
    return table


def _inspection(folder: Inspection) -> Table:
    table = fact_table()
    table.add_row("folder", folder.uri)
    table.add_row("format", folder.format or "none that is known")
    table.add_row("architecture", folder.architecture or "not stated")
    table.add_row("parameters", f"{folder.parameters:,} in {folder.tensors:,} tensors")
    for dtype, count in folder.dtypes.items():
        table.add_row("", f"{dtype}: {count:,}")
    table.add_row("weight files", _files(len(folder.files), folder.size))
    for name in folder.files[:FEW]:
        table.add_row("", name)
    table.add_row("tokenizer", ", ".join(folder.tokenizer) or "none")
    table.add_row("licence", folder.licence or "not stated")
    for name, value in folder.facts.items():
        if value:
            table.add_row(name.replace("_", " "), value)
    if folder.norm is not None:
        table.add_row("norm", f"{folder.norm:.6g}")
    return table


# -- methods


def of_methods(methods: Sequence[MethodDoc]) -> Iterator[RenderableType]:
    """Yield one line a method."""
    table = new_table("method", "lambda scales", "works on", "does", "paper")
    for method in methods:
        first = method.description.partition("\n")[0]
        table.add_row(method.name, f"a {method.scales}", method.works_on, first, method.paper)
    yield table


def of_method(method: MethodDoc) -> Iterator[RenderableType]:
    """Yield one method's description and parameters."""
    for paragraph in method.description.split("\n\n"):
        yield " ".join(paragraph.split())
    if method.caveat:
        yield f"When it goes wrong: {method.caveat}"
    yield " ".join((f"Lambda scales a {method.scales}.", *method.facts, growth_of(method)))
    yield f"{method.paper}."
    table = new_table("parameter", "default", "allowed", "meaning")
    for parameter in method.parameters:
        table.add_row(parameter.name, parameter.default, parameter.allowed, parameter.description)
    yield table


def growth_of(method: MethodDoc) -> str:
    """Return whether a merge by a method takes in further models later."""
    if not method.continues:
        return f"It needs all models at once: {method.all_at_once[0]}."
    exceptions = (f"One setting needs all models at once: {reason}." for reason in method.all_at_once)
    return " ".join(["Further models can be merged into an earlier merge.", *exceptions])


# -- parts


def _files(count: int, size: int) -> str:
    return f"{_count(count, 'file')}, {num_bytes(size)}" if count else "figures alone"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _notes(notes: Sequence[str]) -> Iterator[str]:
    yield from (f"note: {printable(note)}" for note in notes)
