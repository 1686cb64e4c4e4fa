"""Plan, progress, result and findings as text for people."""

import json
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ties_ray.errors import printable, printable_lines
from ties_ray.operations.inspection import Inspection, Inspections, Pool
from ties_ray.operations.promote import Promotion
from ties_ray.operations.status import Status
from ties_ray.operations.verify import Verification
from ties_ray.planning.forecast import Forecast
from ties_ray.recipe.json_schema import MethodDoc
from ties_ray.reports.records import (
    Cleaning,
    MergeResult,
    PlannedInput,
    PlanRecord,
    Progress,
    TrimReport,
    Truncation,
    Watch,
)

WORKERS = {"merge": "merging", "wait_read": "waiting to read", "wait_write": "waiting to write", "idle": "idle"}
"""What workers' time goes for."""
FEW = 8
"""Models or files shown one by one; of more, the first ones and a count."""
WIDTH = 160
"""Columns where the text does not go to a terminal."""
EVERY_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""


class Screen(Console):
    """The border of all that people read: no text moves a cursor, sets a title or turns a line around."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is printed; what is not plainly visible in it escaped, but for rich's own control codes."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable_lines(segment.text))


def show(*things: RenderableType, file: TextIO | None = None) -> None:
    """Print texts and tables (to standard output); colours and folding only on a terminal."""
    stream = file or sys.stdout
    console = Screen(file=stream, width=None if stream.isatty() else WIDTH, highlight=False, soft_wrap=True)
    for thing in things:
        console.print(thing, markup=False, soft_wrap=isinstance(thing, str | Text))


def num_bytes(value: float) -> str:
    """Return a size in decimal units: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"


def num(value: float) -> str:
    """Return a count in short: 8.03 B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return a time span: 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


# -- plan


def of_plan(plan: PlanRecord) -> Iterator[RenderableType]:
    """Yield what a merge will do."""
    table = _facts()
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
    table.add_row("run", f"{plan.run_id}, arithmetic {plan.arithmetic}")
    yield table
    rounds = _table("round", "shards >", "reads >", "requests >", "")
    for one in plan.rounds:
        how = f"each model {one.passes} times" if one.passes > 1 else ""
        if one.kind == "count_low":
            how = "at most: of models whose threshold the first count leaves open"
        rounds.add_row(one.name, f"{one.shards:,}", num_bytes(one.bytes_read), f"{one.requests:,}", how)
    rounds.add_row("together", f"{plan.shards:,}", num_bytes(plan.bytes_read), f"{plan.requests:,}", "")
    yield rounds
    again = sum(one.bytes_again for one in plan.rounds)
    if again:
        yield f"of which {num_bytes(again)} were read before: caches of the workers spare what they hold of it"
    if plan.forecast:
        yield from _forecast(plan.forecast)
    yield from _notes(plan.notes)


def _forecast(forecast: Forecast) -> Iterator[RenderableType]:
    """Yield how long it takes some numbers of workers, and what that was worked out from."""
    table = _table("workers >", "takes >", *(f"{one.name} >" for one in forecast.predictions[0].rounds), "limited by")
    for one in forecast.predictions:
        limits = dict.fromkeys(round_.bound for round_ in one.rounds)
        took = (duration(round_.seconds) for round_ in one.rounds)
        table.add_row(f"{one.workers:,}", duration(one.seconds), *took, ", ".join(limits))
    yield table
    rates = forecast.rates
    ns = [*rates.dense.values(), *rates.factors.values()] or [0.0]
    yield (
        f"as measured from here: {num_bytes(rates.read)}/s read, {rates.request * 1e3:.1f} ms a request, "
        f"{min(ns):.2f} to {max(ns):.2f} ns an element of a model; writing and further workers taken to be as fast"
    )


def _input(model: PlannedInput) -> str:
    own = [f"weight {model.weight:g}"] if model.weight != 1 else []
    own += [f"density {model.density:g}"] if model.density is not None else []
    own += [] if model.account.all_merged else [str(model.account)]
    return f"{model.uri}  ({', '.join([_content(model), *own])})"


def _content(model: PlannedInput) -> str:
    return f"{num(model.parameters)} parameters, {', '.join(model.dtypes)}, {num_bytes(model.size)}"


def _settings(method: dict[str, object]) -> str:
    return ", ".join([str(method["name"]), *(f"{key} {value}" for key, value in method.items() if key != "name")])


# -- progress


class Lines(AbstractContextManager["Lines"]):
    """Progress where there is no terminal: one line a stage, and one every few seconds."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._rate = _Rate()
        self._stage = ""
        self._last = 0.0

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, progress: Progress) -> None:
        """Print a line if it is time for one."""
        rate = self._rate(progress)
        now = time.monotonic()
        if progress.stage == self._stage and now - self._last < EVERY_SECONDS:
            return
        self._stage, self._last = progress.stage, now
        print(f"{printable(progress.stage)}: {_how_far(progress, rate)}", file=self._file, flush=True)


def json_lines(file: TextIO) -> Watch:
    """Return what writes a line of JSON for each stage and every few seconds, for those who collect logs."""
    stage, last = "", 0.0

    def watch(progress: Progress) -> None:
        nonlocal stage, last
        now = time.monotonic()
        if progress.stage != stage or now - last >= EVERY_SECONDS:
            stage, last = progress.stage, now
            print(json.dumps({"time": round(time.time(), 3), **asdict(progress)}), file=file, flush=True)

    return watch


class Bar(AbstractContextManager["Bar"]):
    """Progress on a terminal: one bar, of the stage at hand."""

    def __init__(self, file: TextIO) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(30), TextColumn("{task.fields[far]}"))
        self._bars = Bars(*columns, console=Screen(file=file), transient=True)
        self._rate = _Rate()
        self._task: TaskID | None = None

    def __enter__(self) -> "Bar":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Move the bar."""
        far = _how_far(progress, self._rate(progress))
        if self._task is None:
            self._task = self._bars.add_task("", total=None, far="")
        self._bars.update(
            self._task, description=progress.stage, total=progress.total or None, completed=progress.done, far=far
        )


class _Rate:
    """Bytes a second, since the first news."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def __call__(self, progress: Progress) -> float:
        now = time.monotonic()
        if self._first is None or progress.bytes_read < self._first[1]:  # another count has begun
            self._first = now, progress.bytes_read
        seconds = now - self._first[0]
        return (progress.bytes_read - self._first[1]) / seconds if seconds > 0 else 0.0


def _how_far(progress: Progress, rate: float) -> str:
    shards = f"{progress.done:,} of {progress.total:,}, " if progress.total else ""
    read = f"{num_bytes(progress.bytes_read)} of {num_bytes(progress.bytes_planned)} read"
    return f"{shards}{read}" + (f", {num_bytes(rate)}/s" if rate else "")


# -- result


def of_result(result: MergeResult, recipe: str) -> Iterator[RenderableType]:
    """Yield what a merge came to; recipe: the file's name, for what to try next."""
    size = sum(file.size for file in result.files)
    if result.reused:
        yield f"done before: {result.output} holds this very merge ({_files(len(result.files), size)}); nothing to do"
    else:
        continued = ", continued" if result.resumed else ""
        told = f" ({duration(result.predicted_seconds)} predicted)" if result.predicted_seconds is not None else ""
        took = f"{duration(result.seconds)}{told}"
        yield f"done: {result.output} ({_files(len(result.files), size)}) in {took}{continued}"
        yield "  " + _effort(result)
        yield from _times(result)
    if result.trims:
        method = result.provenance.method if result.provenance else {}
        yield from _trims(result.trims, drop=method.get("at_threshold") == "drop")
    if result.truncation:
        yield from _truncation(result.truncation)
    for name, value in result.statistics.items():
        yield f"  {name}: {value:,}"
    if result.refused:
        yield f"  left out, as the recipe allows: {', '.join(list(result.refused)[:FEW])}"
        if len(result.refused) > FEW:
            yield f"    and {len(result.refused) - FEW} more"
    for where, count in list(result.zeroed.items())[:FEW]:
        yield f"  not finite, counted as zero: {count:,} values of {where}"
    yield from (f"  waits for a later merge: {one}" for one in result.waiting[:FEW])
    if len(result.waiting) > FEW:
        yield f"    and {len(result.waiting) - FEW} more"
    yield from _notes(result.notes)
    yield from _next(result, recipe)


def _truncation(lost: Truncation) -> Iterator[RenderableType]:
    """Yield what writing factors of one rank cost, and the matrices it cost most."""
    yield f"  rank {lost.rank}: the adapter differs from the merge by {lost.relative_error:.2%} of its norm"
    worst = sorted(lost.matrices.items(), key=lambda item: -item[1])[:3]
    if lost.relative_error > 0.005:
        yield f"  most in {', '.join(f'{name} ({error:.1%})' for name, error in worst)}"


def _effort(result: MergeResult) -> str:
    told = [f"read {num_bytes(result.bytes_read)} in {result.requests:,} requests"]
    if result.bytes_kept:
        told.append(f"{num_bytes(result.bytes_kept)} more came from caches")
    told.append(f"wrote {num_bytes(result.bytes_written)}")
    told.append(f"{result.shards:,} shards")
    if result.shards_done_before:
        told.append(f"{result.shards_done_before:,} of them done by the interrupted run")
    for count, what in (
        (result.shards_again, "shards done again"),
        (result.workers_lost, "workers lost"),
        (result.retries, "requests repeated"),
    ):
        if count:
            told.append(f"{count:,} {what}")
    return ", ".join(told)


def _times(result: MergeResult) -> Iterator[str]:
    """Yield what the workers' time went for."""
    spent = {what: result.worker_seconds.get(key, 0.0) for key, what in WORKERS.items()}
    total = sum(spent.values())
    if total:
        yield "  workers: " + ", ".join(f"{value / total:.0%} {what}" for what, value in spent.items())


def _trims(trims: Sequence[TrimReport], *, drop: bool) -> Iterator[RenderableType]:
    """Yield a row a model; where trim went by tensor, the model's tensors together.

    drop: values at the threshold were not kept. (Where it is zero, `kept` never counts them.)
    """
    by_model: dict[str, list[TrimReport]] = {}
    for trim in trims:
        by_model.setdefault(trim.model, []).append(trim)
    table = _table("model", "threshold >", "kept >", "at the threshold >")
    for model, own in list(by_model.items())[:FEW]:
        low, high = min(trim.threshold for trim in own), max(trim.threshold for trim in own)
        size, tied = sum(trim.size for trim in own), sum(trim.tied for trim in own)
        kept = sum(trim.kept - (trim.tied if drop and trim.threshold else 0) for trim in own)
        threshold = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        table.add_row(model, threshold, f"{kept / max(1, size):.2%}", f"{tied / max(1, size):.2%}")
    yield table
    if len(by_model) > FEW:
        yield f"  and {len(by_model) - FEW} more models"
    if not drop and any(trim.tied > trim.size // 100 for trim in trims):
        yield "  all values at the threshold are kept, hence more than the density says; at_threshold: drop keeps none"


def _next(result: MergeResult, recipe: str) -> Iterator[str]:
    output = shlex.quote(result.output)
    yield "next:"
    yield f"  ties-ray verify {output}"
    if "://" not in result.output and result.opened_by:
        yield f"  {result.opened_by}"
    if result.provenance and "density" in result.provenance.method:
        other = "0.3" if result.provenance.method["density"] != 0.3 else "0.2"
        told = f"--set method.density={other} --set output.path={shlex.quote(result.output + '-' + other)}"
        yield f"  another density: ties-ray merge {shlex.quote(recipe)} {told}"


def of_promotion(told: Promotion) -> Iterator[str]:
    """Yield what a pointer names now."""
    yield f"{told.pointer} {'names now' if told.changed else 'named already'} {told.current.output}"
    yield f"  before: {told.previous.output}" if told.previous else "  nothing before it"


# -- what lies in a folder


def of_status(status: Status) -> Iterator[RenderableType]:
    """Yield what an output folder holds."""
    if status.result:
        size = sum(file.size for file in status.result.files)
        yield f"finished: {status.output}, run {status.result.run_id} ({_files(len(status.result.files), size)})"
    if status.holder:
        yield f"held by {status.holder.host}, process {status.holder.process}: at work, or killed a moment ago"
    for run in status.runs:
        if status.result and run.run_id == status.result.run_id:
            continue
        yield f"unfinished: {status.output}, run {run.run_id}, generation {run.generation}"
        if run.problem:
            yield f"  {run.problem}"
            continue
        if not run.rounds:
            yield "  no plan is stored: nothing was begun"
            continue
        table = _table("round", "shards done >", "of >", "")
        for one in run.rounds:
            table.add_row(one.name, f"{one.done:,}", f"{one.shards:,}", "whole" if one.done == one.shards else "")
        yield table
        yield f"  {len(run.uploads)} uploads begun; the same merge command continues, --fresh begins anew"
    if not status.result and not status.runs:
        yield f"{status.output} holds no merge"


def of_verification(found: Verification) -> Iterator[RenderableType]:
    """Yield what a re-reading of an output found."""
    table = _table("file", "bytes >", "tensors >", "parts proved >", "CRC32C", "NaN >", "infinite >")
    for file in found.files:
        parts = f"{file.parts_proved} of {file.parts}"
        table.add_row(
            file.name, num_bytes(file.size), f"{file.tensors:,}", parts, file.crc32c, f"{file.nan:,}",
            f"{file.infinite:,}",
        )  # fmt: skip
    yield table
    if found.sample:
        taken = found.sample
        share = f"{taken.elements / max(1, taken.of):.2%}"
        yield f"merged again: {taken.elements:,} of {taken.of:,} elements ({share}), of {taken.tensors:,} tensors"
    if found.recounted:
        yield f"thresholds counted anew: of {len(found.recounted):,} models"
    if found.sums:
        yield f"wrote {found.sums}"
    yield from _notes(found.notes)
    yield f"{found.output}: {'whole' if not found.findings else f'{len(found.findings)} findings'}"


def of_cleaning(told: Cleaning) -> Iterator[str]:
    """Yield what interrupted merges left."""
    yield from _notes(told.notes)
    yield from (f"{'removed' if told.removed else 'there is'}: {one}" for one in told.found)
    if not told.found:
        yield f"{told.output}: nothing to clean"


def of_inspections(whole: Inspections) -> Iterator[RenderableType]:
    """Yield what input folders hold: one in full, several a line each, a pool of adapters by its counts."""
    found = whole.folders
    if whole.pool:
        yield _pool(whole.pool)
        return
    if len(found) == 1:
        yield _inspection(found[0])
        yield from _notes(found[0].notes)
        return
    table = _table("folder", "format", "architecture", "parameters >", "dtypes", "bytes >", "licence", "problems >")
    for one in found:
        table.add_row(
            one.uri, one.format or "none", one.architecture, num(one.parameters), ", ".join(one.dtypes),
            num_bytes(one.size), one.licence, str(len(one.problems) or ""),
        )  # fmt: skip
    yield table
    yield f"{len(found)} folders, {num_bytes(sum(one.size for one in found))}"


def _pool(pool: Pool) -> Table:
    table = _facts()
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


def _inspection(one: Inspection) -> Table:
    table = _facts()
    table.add_row("folder", one.uri)
    table.add_row("format", one.format or "none that is known")
    table.add_row("architecture", one.architecture or "not stated")
    table.add_row("parameters", f"{one.parameters:,} in {one.tensors:,} tensors")
    for dtype, count in one.dtypes.items():
        table.add_row("", f"{dtype}: {count:,}")
    table.add_row("weight files", _files(len(one.files), one.size))
    for name in one.files[:FEW]:
        table.add_row("", name)
    table.add_row("tokenizer", ", ".join(one.tokenizer) or "no file of one")
    table.add_row("licence", one.licence or "not stated")
    for name, value in one.facts.items():
        if value:
            table.add_row(name.replace("_", " "), value)
    if one.norm is not None:
        table.add_row("norm", f"{one.norm:.6g}")
    return table


# -- methods


def of_methods(methods: Sequence[MethodDoc]) -> Iterator[RenderableType]:
    """Yield one line a method."""
    table = _table("method", "lambda scales", "does", "paper")
    for method in methods:
        table.add_row(method.name, f"a {method.scales}", method.description.partition("\n")[0], method.paper)
    yield table


def of_method(method: MethodDoc) -> Iterator[RenderableType]:
    """Yield one method's description and parameters."""
    for paragraph in method.description.split("\n\n"):
        yield " ".join(paragraph.split())
    yield f"{method.paper}. Lambda scales a {method.scales}."
    table = _table("parameter", "default", "allowed", "meaning")
    for one in method.parameters:
        table.add_row(one.name, one.default, one.allowed, one.description)
    yield table


# -- parts


def _facts() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _table(*columns: str) -> Table:
    """Return an empty table; a column whose name ends in > is set to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        right = column.endswith(" >")
        table.add_column(column.removesuffix(" >"), justify="right" if right else "left", overflow="fold")
    return table


def _files(count: int, size: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}, {num_bytes(size)}"


def _notes(notes: Sequence[str]) -> Iterator[str]:
    yield from (f"note: {printable(note)}" for note in notes)
