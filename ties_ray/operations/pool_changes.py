"""How the merge of a living pool is planned: from which result it goes on, and what it reads again."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ties_ray.errors import InputError, Problem, RecipeError, enumerated
from ties_ray.inputs.catalog import THREADS, Model
from ties_ray.inputs.choice import chosen
from ties_ray.inputs.expand import BASE, expand
from ties_ray.layout.footprint import formats_of
from ties_ray.operations import merging
from ties_ray.outputs import CondensingOutput
from ties_ray.planning.plan import Plan
from ties_ray.recipe.parse import validate, with_absolute_paths
from ties_ray.recipe.recipe import Coefficients, Json, ModelEntry, Recipe
from ties_ray.recipe.settings import Choice
from ties_ray.reports.living_pool import PoolChange
from ties_ray.reports.records import MergeResult
from ties_ray.state import pool_document
from ties_ray.state.manifest import STATE, Manifest, find_runs
from ties_ray.state.pool_cache import identity
from ties_ray.state.pool_document import CACHE, OF_THE_RUN, RESULTS, PoolDocument, PoolMember, PoolResult, place_of
from ties_ray.stores import Stores, join, leads_from

CHANGED = "drop it and add it again, or put it back as it was"


@dataclass(frozen=True)
class Settings:
    """What the caller says of a pool."""

    pool: str
    """URI of the folder."""
    storage: Json
    """Options of the stores by scheme."""
    run: Json
    """How the merges are done."""
    recipe: Recipe | None = None
    """The recipe that the caller has given; None where the pool is named by its folder."""

    @cached_property
    def stores(self) -> Stores:
        """Return the stores that its methods share."""
        return Stores(self.storage)

    @property
    def cache(self) -> str:
        """Return the folder of the pool cache."""
        return str(self.run.get("pool_cache") or join(self.pool, CACHE))

    def merge(self, rules: Json, entries: Sequence[ModelEntry], continues: str = "") -> Recipe:
        """Return the recipe of a merge. continues: the folder of the result from which it goes on."""
        data = {
            **rules,
            "models": [entry.model_dump(mode="json", exclude_defaults=True) for entry in entries],
            "output": {**rules["output"], "path": f"{self.pool}/{RESULTS}/{{run_id}}"},
            "storage": self.storage,
            "run": {**self.run, "pool_cache": self.cache},
            **({"continues": continues} if continues else {}),
        }
        recipe = validate(data)
        output = recipe.output.model_copy(update={"state": not stateless(recipe)})
        return recipe.model_copy(update={"output": output})


@dataclass(frozen=True)
class Change:
    """What becomes of a pool."""

    settings: Settings
    before: PoolDocument | None
    etag: str
    """ETag of the document before it; empty where there is none."""
    rules: Json
    members: tuple[PoolMember, ...]
    """The models after it, in order."""
    start: PoolResult | None
    """The result from which it goes on."""
    plan: Plan | None
    """The plan of the merge; None where a result of just these members is there."""
    again: tuple[PoolMember, ...] = ()
    """Models that were merged before, and are read again."""
    reason: str = ""
    """Why they are read again."""
    waiting: tuple[str, ...] = ()
    """Folders that wait for a later call, each with the reason."""
    present: int = 0
    """Models that were asked for, and were members already."""

    @property
    def is_nothing(self) -> bool:
        """Return whether the pool stays as it is."""
        return self.before is not None and self.before.members == self.members

    @property
    def run_id(self) -> str:
        """Return the id of the result's run."""
        if self.plan:
            return self.plan.run_id
        assert self.start, "without a merge there is a result"
        return self.start.run_id

    def record(self, result: MergeResult | None = None, *, done: bool = False) -> PoolChange:
        """Return the change as a report. result: the record of its merge."""
        before = self.before.members if self.before else ()
        numbers, earlier = {each.number for each in self.members}, {each.number for each in before}
        return PoolChange(
            pool=self.settings.pool,
            done=done,
            added=[each.uri for each in self.members if each.number not in earlier],
            dropped=[each.uri for each in before if each.number not in numbers],
            present=self.present,
            num_members=len(self.members),
            again=[each.uri for each in self.again],
            again_bytes=sum(each.size for each in self.again),
            reason=self.reason,
            bytes_read=(result.bytes_read if result else self.plan.bytes_read) if self.plan else 0,
            result=place_of(self.settings.pool, self.run_id),
            run_id=self.run_id,
            refused=dict(result.refused) if result else {},
            waiting=list(self.waiting),
        )

    def document(self, stores: Stores, result: MergeResult | None) -> PoolDocument:
        """Return the pool's document after it. result: the record of its merge, which may have left models out."""
        made, members, before = pool_document.now(), self.members, self.before
        if self.plan:
            merged = {model.id for model in result.provenance.models} if result and result.provenance else set()
            asked = {model.id for model in self.plan.catalog.models}
            members = tuple(each for each in members if each.entry.id in merged or each.entry.id not in asked)
        numbers = tuple(each.number for each in members)
        results = tuple(each for each in (before.results if before else ()) if each.run_id != self.run_id)
        state = self.start.state_bytes if self.start and not self.plan else self._state_bytes(stores)
        gone = [each for each in (before.members if before else ()) if each.number not in numbers]
        dropped = (before.dropped if before else ()) + tuple(
            pool_document.DroppedMember(member=each, dropped=made) for each in gone
        )
        return PoolDocument(
            schema_version=1,
            revision=before.revision + 1 if before else 0,
            next_number=max([*(numbers), before.next_number - 1 if before else 0]) + 1,
            recipe=self.rules,
            base=self.plan.catalog.base.pins if self.plan and self.rules.get("base") else before.base if before else (),
            members=members,
            results=(*results, PoolResult(run_id=self.run_id, members=numbers, state_bytes=state, made=made)),
            dropped=dropped,
        )

    def _state_bytes(self, stores: Stores) -> int:
        output = place_of(self.settings.pool, self.run_id)
        generation = max((number for run, number in find_runs(stores, output) if run == self.run_id), default=1)
        listing = stores.of(output).list(join(Manifest.folder_of(output, self.run_id, generation), STATE))
        return sum(pin.size for pin in listing.files)


def rules_of(recipe: Recipe) -> Json:
    """Return what of a recipe stays the same as long as the pool lives, with absolute paths."""
    data = with_absolute_paths(recipe.model_dump(mode="json"))
    output = {key: value for key, value in data["output"].items() if key not in ("path", "state", "part_size")}
    return {key: value for key, value in data.items() if key not in OF_THE_RUN} | {"output": output}


def stateless(recipe: Recipe) -> str:
    """Return why a merge keeps nothing from which a later one could go on; empty where it does."""
    if recipe.method.all_at_once:
        return f"{recipe.method.name} needs all models at once: {recipe.method.all_at_once}"
    if isinstance(recipe.output, CondensingOutput):
        return f"an output of kind {recipe.output.kind} has no state by element"
    if recipe.vocabulary is not None:
        return "`vocabulary` compares all models"
    if recipe.base is None and recipe.output.reads_base:
        return "the first model takes the place of the base"
    tables = any(
        not isinstance(each.weight, float) or isinstance(each.density, Mapping | tuple) for each in recipe.models
    )
    return "numbers differ by parameter" if tables or recipe.coefficients != Coefficients() else ""


def asked_for(
    settings: Settings, rules: Json, models: Sequence[ModelEntry]
) -> tuple[list[tuple[ModelEntry, bool]], tuple[str, ...]]:
    """Return the models that some lines mean, one line each, with whether the id is the caller's; and those that wait.

    Raises a `MergeError` as `expand` does.
    """
    recipe = settings.merge(rules, models)
    with ThreadPoolExecutor(THREADS) as threads:
        expanded = expand(recipe, settings.stores, threads)
    if not any(entry.id != BASE for entry in expanded.entries):
        return [], expanded.waiting
    own = {entry.id for entry in recipe.models if entry.id is not None}
    lines = chosen(recipe, expanded.entries, Choice(), "models").models
    return [(line, line.id in own) for line in lines], expanded.waiting


def planned(
    settings: Settings,
    before: PoolDocument | None,
    etag: str,
    rules: Json,
    members: Sequence[PoolMember],
) -> Change:
    """Return how a pool gets other members, with the plan of the merge. New members have no pins yet.

    Raises a `MergeError` where the merge can't be planned, or where base or members have changed since they were added.
    """
    numbers = tuple(member.number for member in members)
    start = before.start(numbers) if before else None
    change = Change(settings, before, etag, rules, tuple(members), start, None)
    if start and start.members == numbers:
        return change
    plan, reason = None, ""
    if start:
        place = place_of(settings.pool, start.run_id)
        try:
            plan = merging.plan(settings.merge(rules, [each.entry for each in members[len(start.members) :]], place))
        except (RecipeError, InputError) as error:
            reason, start = f"{error.problems[0].where}: {error.problems[0].what}", None
    if plan is None:
        plan = merging.plan(settings.merge(rules, [each.entry for each in members]))
    earlier = {each.number for each in before.members} if before else set()
    again = tuple(each for each in members[len(start.members) if start else 0 :] if each.number in earlier)
    pinned = _with_pins(members, plan, before)
    reason = (reason or _reason(plan, start, before, numbers)) if again else ""
    return replace(change, start=start, plan=plan, members=pinned, again=again, reason=reason)


def _reason(plan: Plan, start: PoolResult | None, before: PoolDocument | None, numbers: Sequence[int]) -> str:
    """Return why members are read again."""
    if reason := stateless(plan.recipe):
        return reason
    gone = [each.entry.id or "" for each in before.members if each.number not in numbers] if before else []
    if start or not gone:
        return f"they come after {enumerated(gone)}" if gone else "the last result keeps no state"
    return f"no result is kept that ends before {gone[0]}"


def _with_pins(members: Sequence[PoolMember], plan: Plan, before: PoolDocument | None) -> tuple[PoolMember, ...]:
    """Return the members with the pins of the plan; raise `InputError` where those of a member are others."""
    formats = formats_of(plan.catalog.models)
    models = {model.id: model for model in plan.catalog.models}
    problems, made = [], []
    if before and before.base and plan.catalog.base.pins != before.base:
        message = "has changed since the pool was made"
        problems.append(Problem(plan.catalog.base.uri, message, "put it back as it was, or make another pool"))
    for member in members:
        model = models.get(member.entry.id or "")
        if model is None:
            made.append(member)
            continue
        pins, read_as = model.pins, _read_as(model)
        if member.pins and (member.pins, member.read_as) != (pins, read_as):
            problems.append(Problem(member.uri, "has changed since it was added", CHANGED))
        cached = identity(model, formats[model.format], plan.arithmetic) or ""
        made.append(member.model_copy(update={"pins": pins, "read_as": read_as, "cached": cached}))
    if problems:
        raise InputError(problems)
    left_out = {model.id for model in plan.catalog.refused}
    return tuple(member for member in made if member.entry.id not in left_out)


def _read_as(model: Model) -> str:
    """Return the digest of how a model's files are read."""
    sources = [sorted(each.sources.items()) for each in model.inputs]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def demand_own(settings: Settings, document: PoolDocument) -> None:
    """Raise where the caller's recipe is another, or where a pool that is named by its folder leads elsewhere.

    Others may have written the document. So it may name local files only if it is local itself, unless the caller's
    recipe vouches for it.
    """
    if settings.recipe is not None:
        ours = rules_of(settings.recipe)
        theirs = rules_of(settings.merge(document.recipe, settings.recipe.models))
        remedy = "use the pool's, or make another pool"
        if other := [name for name in ours if ours[name] != theirs[name]]:
            raise RecipeError(Problem(name, f"is not that of the pool in {settings.pool}", remedy) for name in other)
    elif leading := [uri for uri in _uris(document) if not leads_from(settings.pool, uri)]:
        message = f"its document names {enumerated(leading)}, which another service holds"
        raise InputError(Problem(settings.pool, message, "give the pool's recipe file in place of its folder"))


def _uris(document: PoolDocument) -> Iterator[str]:
    """Yield every folder that a document names for reading."""
    left: list[Any] = [document.recipe.get("base"), (document.recipe.get("coefficients") or {}).get("file")]
    for member in document.members:
        left += [member.entry.path, member.entry.adapter, *member.entry.with_.values()]
    for each in left:
        uri = each.get("path") if isinstance(each, Mapping) else each
        if isinstance(uri, str):
            yield uri
