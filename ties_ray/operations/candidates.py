"""Candidates: merged models in memory, in a fraction of a merge, and with its bytes.

The models' slices stay in this process. A candidate counts and folds what no candidate has counted or folded yet.
"""

import os
import secrets
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from ties_ray.errors import InputError, Problem, RecipeError, enumerated
from ties_ray.inputs.catalog import THREADS, Inputs, read_inputs, with_numbers
from ties_ray.inputs.choice import chosen
from ties_ray.inputs.expand import Entry, expand
from ties_ray.inputs.fetch import EarlierInputs
from ties_ray.layout.sizes import SIZES
from ties_ray.operations import merging
from ties_ray.operations.compare import TORCH
from ties_ray.operations.sweeping import reading_of
from ties_ray.planning.plan import Plan
from ties_ray.planning.planner import concluded, make_plan
from ties_ray.planning.together import Room, whole
from ties_ray.recipe.recipe import Json, Recipe
from ties_ray.recipe.settings import Setting, Sweep
from ties_ray.reports.records import MergeResult
from ties_ray.rounds import kind_of
from ties_ray.rounds.merge import MergeRound
from ties_ray.state.manifest import Manifest
from ties_ray.stores import Stores, absolute
from ties_ray.worker.bench import WorkerBench
from ties_ray.worker.checksums import Checksums
from ties_ray.worker.messages import Setup
from ties_ray.worker.tools import Tools, make_tools

BLOCK = 2**18
"""Elements of a block at most, for all candidates: they share what is cut alike."""
WHOLE = replace(SIZES, min_range=2**40, max_range=2**40)
"""Sizes that cut every round's blocks from the start of their parameter: a slice is held once for all rounds."""
MOST = 0.5
"""The share of the machine's memory that the models may take, unless the caller says more."""


class Candidates:
    """A recipe whose models stay in memory. `merge` gives merged models for other numbers, subsets and methods."""

    def __init__(self, recipe: Recipe | Mapping[str, Any], *, memory: int | None = None) -> None:
        """memory: the most bytes for the models. Raises a `MergeError` where the recipe or its models are wrong."""
        common: Json = (
            recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
            if isinstance(recipe, Recipe)
            else dict(recipe)
        )
        common.setdefault("output", f"memory://candidates-{secrets.token_hex(6)}")
        self._sweep = Sweep(common=common, settings=(Setting(name="candidate"),))
        self._first = self._sweep.recipe(Setting(name="candidate"))
        self._stores = Stores(self._first.storage)
        self._entries: tuple[Entry, ...] = ()
        self._inputs: dict[Hashable, Inputs] = {}
        self._earlier = EarlierInputs()
        self._outcomes: dict[Hashable, dict[int, Any]] = {}
        """The findings of barriers by what they rest on."""
        plan = self._plan(self._first)
        self._tools = self._made(plan, memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tools.held.begin()

    def merge(self, values: Mapping[str, Any] | None = None) -> "Candidate":
        """Return the merged model for some values by their place in the recipe, as in `settings` of a sweep.

        `models` chooses among the models: `{"only": [...], "not": [...], "weights": {...}}`. Raises `RecipeError`.
        """
        setting = Setting(name="candidate", set=dict(values or {}))
        recipe, choice = self._sweep.recipe(setting), self._sweep.choice(setting)
        if choice is not None:
            recipe = chosen(recipe, self._all_entries(), choice, "models")
        return Candidate(self._plan(recipe), self._stores, self._tools, self._outcomes)

    def _all_entries(self) -> tuple[Entry, ...]:
        if not self._entries:
            with ThreadPoolExecutor(THREADS) as threads:
                self._entries = expand(self._first, self._stores, threads).entries
        return self._entries

    def _plan(self, recipe: Recipe) -> Plan:
        """Return the plan of a candidate. Models are read again only where other ones are asked for."""
        if recipe.continues:
            remedy = "leave it out, and merge all models in one recipe"
            raise RecipeError(Problem("continues", "candidates are merged from their models alone", remedy))
        output = recipe.output.model_copy(update={"path": absolute(recipe.output.path)})
        recipe, key = recipe.model_copy(update={"output": output}), reading_of(recipe)
        if key not in self._inputs:
            self._inputs[key] = read_inputs(recipe, self._stores, earlier=self._earlier)
        plan = make_plan(recipe, with_numbers(recipe, self._inputs[key], self._stores), WHOLE)
        results = []
        for result in plan.results:
            rounds = tuple(
                each._replace(block=min(each.block, BLOCK), run=0) if kind_of(each).blocks_are_slices else each
                for each in result.rounds
            )
            results.append(replace(result, rounds=rounds))
        return replace(plan, results=tuple(results))

    def _made(self, plan: Plan, memory: int | None) -> Tools:
        needed = whole(plan)
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        most = int(MOST * machine) if memory is None else memory
        if needed.slices > most:
            message = f"the models take {needed.slices:,} bytes of memory, and {most:,} are allowed"
            raise InputError(Problem("memory", message, "allow more, or merge with `ties-ray sweep`"))
        room = Room(needed.slices, min(needed.states, most - needed.slices))
        return make_tools(Setup("", self._first.storage, "", held=room), plan, self._stores)


class Candidate:
    """One merged model, whose tensors are made as they are asked for."""

    def __init__(self, plan: Plan, stores: Stores, tools: Tools, outcomes: dict[Hashable, dict[int, Any]]) -> None:
        self.recipe = plan.recipe
        """The recipe of the merge that gives the same bytes."""
        self._plan, self._stores, self._tools, self._outcomes = plan, stores, tools, outcomes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) for each tensor of the output, with the bytes that a merge writes.

        Raises `InputError` for values that are not finite or overflow.
        """
        held, reads = self._tools.held, self._tools.reads
        held.begin_merge()
        reads.checksums = Checksums()
        bench = self._counted()
        for file in bench.merge.result.files:
            for placed in file.tensors:
                numel = _numel(placed.tensor.shape)
                parts = MergeRound().sample(bench, placed, [(0, numel)] if numel else [])
                data = next(parts, torch.empty(0, dtype=torch.uint8))
                next(parts, None)  # what is read is judged at the end
                yield (
                    placed.tensor.name,
                    data.view(getattr(torch, TORCH[placed.tensor.dtype])).reshape(placed.tensor.shape),
                )

    def state_dict(self, like: torch.nn.Module | None = None) -> dict[str, Tensor]:
        """Return all tensors, by the names that the output has on disk, or by those of a loaded model.

        like: a model of transformers, which may hold experts together that lie one by one on disk. Raises `InputError`
        where it lacks a tensor, or has one that the merge lacks.
        """
        tensors = dict(self.tensors())
        return tensors if like is None or self._is_named_as(like) else _loaded(like, tensors)

    def load_into(self, model: torch.nn.Module) -> None:
        """Copy the tensors into a model of transformers or torch.

        Raises `InputError` where names or shapes are not the model's, and transformers does not convert them.
        """
        own = _tensors_of(model)
        tensors = self.tensors() if self._is_named_as(model) else self.state_dict(model).items()
        with torch.no_grad():
            for name, tensor in tensors:
                own[name].copy_(tensor)

    def _is_named_as(self, model: torch.nn.Module) -> bool:
        """Return whether a model has all tensors of the output by name and shape."""
        own = {name: tuple(tensor.shape) for name, tensor in _tensors_of(model).items()}
        placed = (placed.tensor for file in self._plan.files for placed in file.tensors)
        return all(own.get(tensor.name) == tensor.shape for tensor in placed)

    def save(self, folder: str) -> MergeResult:
        """Merge into a folder, with config, tokenizer and record. `/dev/shm/...` is memory that processes share."""
        output = self.recipe.output.model_copy(update={"path": absolute(folder)})
        return merging.merge(self.recipe.model_copy(update={"output": output}))

    def _counted(self) -> WorkerBench:
        """Do all rounds but the last, as far as their outcomes are not known yet."""
        plan, findings = self._plan, dict[int, dict[int, Any]]()
        bench = self._bench(plan, findings)
        for index in range(len(plan.merges[0].rounds) - 1):
            merge = bench.merge
            findings[index] = self._round(bench, index, findings.get(index - 1, {}))
            for group, finding in findings[index].items():
                bench.remember(index, group, finding)
            revised = concluded(plan, 0, merge.kind(index).conclude(merge, index, findings[index]))
            if revised is not plan:
                plan, bench = revised, self._bench(revised, findings)
        return bench

    def _bench(self, plan: Plan, findings: Mapping[int, Mapping[int, Any]]) -> WorkerBench:
        tools = self._tools
        folder = Manifest.folder_of(f"memory://candidates/{plan.run_id}", plan.run_id)
        bench = WorkerBench(
            plan.merges[0], plan.output, Manifest(self._stores, folder), tools.kernels, tools.reads, tools.writes,
            None, tools.bases, tools.held,
        )  # fmt: skip
        for index, groups in findings.items():
            for group, finding in groups.items():
                bench.remember(index, group, finding)
        return bench

    def _round(self, bench: WorkerBench, index: int, before: Mapping[int, Any]) -> dict[int, Any]:
        """Return what the barrier after a round finds, by group."""
        merge, kind = bench.merge, bench.merge.kind(index)
        settled = set(kind.settled(merge, index, before))
        shards = [number for number in range(merge.rounds[index].num_shards) if number not in settled]
        cuts = [kind.shard(merge, merge.rounds[index], number) for number in shards]
        keys = tuple(kind.work_key(bench, index, shard) for shard in cuts)
        tallies = {group: kind.tally(bench) for group in range(kind.num_groups(merge))}
        findings = self._outcomes.get(keys) if None not in keys else None
        if findings is None:
            for number, shard in zip(shards, cuts, strict=True):
                tally = kind.tally(bench)
                kind.work(bench, index, shard, tally, Counter())
                tallies[kind.group(merge, number)].absorb(tally)
            findings = {group: tally.finding() for group, tally in tallies.items()}
            if None not in keys:
                self._outcomes[keys] = findings
        return {group: kind.fold(bench, index, group, [finding]) for group, finding in findings.items()}


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _loaded(model: torch.nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names of a model, as transformers converts them on loading."""
    kind: Any = type(model)
    if not hasattr(kind, "from_pretrained"):
        raise _misfit(kind, sorted(tensors.keys() ^ _tensors_of(model).keys()))
    with _quiet():
        made, about = kind.from_pretrained(
            None, config=model.config, state_dict=tensors, dtype=model.dtype, output_loading_info=True
        )
    if wrong := sorted({*about["missing_keys"], *about["unexpected_keys"]}) or about["mismatched_keys"]:
        raise _misfit(kind, list(map(str, wrong)))
    return dict(made.state_dict())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from showing that it loads a model: candidates are many."""
    from transformers import utils

    logging: Any = utils.logging
    level, shows = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows:
            logging.enable_progress_bar()


def _misfit(kind: type, names: list[str]) -> InputError:
    message = f"{kind.__name__} and the merge differ in {enumerated(names)}"
    return InputError(Problem("model", message, "save the candidate, and load it with the class that it is for"))
