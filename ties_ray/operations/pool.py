"""Living pools: models come and go, and the pool's result has the bytes of one merge of all members.

A pool is a folder with a document (`state.pool_document`), which names the members and the results. A result goes on
from the longest result before it whose models begin the list. So a new model is read alone, and where a model is
dropped, those after it are read again. The document is replaced under a condition, so nothing that another process does
is lost.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from ties_ray.driver.resume import clean
from ties_ray.errors import InputError, InterruptedMerge, MergeError, Problem, RecipeError, UnavailableError
from ties_ray.inputs.catalog import THREADS
from ties_ray.operations import merging, recipes
from ties_ray.operations.pool_changes import (
    Change,
    Settings,
    asked_for,
    demand_own,
    planned,
    rules_of,
    stateless,
)
from ties_ray.recipe.parse import validate, with_absolute_paths
from ties_ray.recipe.recipe import Json, ModelEntry, Recipe
from ties_ray.reports.living_pool import DroppedRow, MemberRow, PoolChange, PoolCleaning, PoolRecord, ResultRow
from ties_ray.reports.records import MergeResult, Progress, Watch
from ties_ray.state import lease, pool_document
from ties_ray.state.pool_document import RESULTS, PoolDocument, PoolMember, place_of
from ties_ray.stores import Stores, absolute, last_part

TRIES = 8
"""How often a change is made anew because others have changed the pool meanwhile."""
KEEP = "keep at least one result"


class Pool:
    """A living pool."""

    def __init__(
        self,
        source: "Recipe | str",
        *,
        storage: Mapping[str, Mapping[str, object]] | None = None,
        run: Json | None = None,
    ) -> None:
        """source: the folder, or the recipe whose `output.path` it is. A recipe can make a pool, and vouches for it.

        storage, run: these sections of a recipe, for a pool that is named by its folder. Raises `RecipeError`.
        """
        if isinstance(source, Recipe):
            if source.continues is not None or "{" in source.output.path:
                message = "is not how a pool is made: each result goes on from an earlier one by itself"
                where = "output.path" if source.continues is None else "continues"
                raise RecipeError(Problem(where, message, "leave out `continues` and {run_id}"))
            run = source.run.model_dump(mode="json", exclude_unset=True)
            folder, storage = source.output.path, source.storage
        else:
            folder = source
        recipe = source if isinstance(source, Recipe) else None
        self.settings = Settings(absolute(folder).rstrip("/"), dict(storage or {}), dict(run or {}), recipe)

    @property
    def folder(self) -> str:
        """Return the URI of the pool's folder."""
        return self.settings.pool

    # -- what it holds

    def read(self) -> tuple[PoolDocument, str]:
        """Return the pool's document and its ETag. Raises `InputError` where there is none."""
        document, etag = pool_document.read(self.settings.stores, self.folder)
        if document is None:
            remedy = "`ties-ray pool add RECIPE` makes one in the recipe's output.path"
            raise InputError(Problem(self.folder, "holds no pool", remedy))
        demand_own(self.settings, document)
        return document, etag

    def record(self) -> PoolRecord:
        """Return members and results, and what adding and dropping would read."""
        document, _ = self.read()
        recipe = self._recipe(document)
        reads_all = stateless(recipe)
        if not reads_all and not document.result.state_bytes:
            reads_all = "the last result keeps no state"
        gone = {each.member.number: each.member.uri for each in document.dropped}
        results = [
            ResultRow(
                output=place_of(self.folder, each.run_id),
                run_id=each.run_id,
                num_models=len(each.members),
                state_bytes=each.state_bytes,
                made=each.made,
                holds=[gone[number] for number in each.members if number in gone],
            )
            for each in document.results
        ]
        return PoolRecord(
            pool=self.folder,
            result=results[-1].output,
            run_id=document.result.run_id,
            method=recipe.method.model_dump(mode="json"),
            base=recipe.base.path if recipe.base else "",
            members=[_row(document, member) for member in document.members],
            add_bytes=sum(each.size for each in document.members) if reads_all else document.result.state_bytes,
            reads_all=reads_all,
            results=results,
            dropped=[
                DroppedRow(id=each.member.entry.id or "", uri=each.member.uri, dropped=each.dropped)
                for each in document.dropped
            ],
            leftovers=self._leftovers(self.settings.stores, document),
        )

    def recipe(self) -> Json:
        """Return the recipe of one merge of all members, as plain data without an output's path.

        Its result has the bytes of the pool's.
        """
        document, _ = self.read()
        entries = [member.entry.model_dump(mode="json", exclude_defaults=True) for member in document.members]
        return {**document.recipe, "models": entries}

    # -- what changes it

    def plan_add(self, models: Sequence[str | Json] = ()) -> Change:
        """Return how models become members. They are paths, globs, or lines of a recipe; none: those of the recipe.

        What is a member already is left alone. Raises a `MergeError` where models can't be merged or have changed.
        """
        document, etag = pool_document.read(self.settings.stores, self.folder)
        if document is None and self.settings.recipe is not None:
            rules = rules_of(self.settings.recipe)
        else:
            document, etag = self.read()
            rules = document.recipe
        entries = self._entries(rules, models)
        lines, waiting = asked_for(self.settings, rules, entries)
        members, present = self._with(document, lines)
        before = document.members if document else ()
        if document and len(members) == len(before):
            return Change(
                self.settings, document, etag, rules, before, document.result, None, present=present, waiting=waiting
            )
        change = planned(self.settings, document, etag, rules, members)
        return replace(change, waiting=waiting, present=present)

    def plan_drop(self, names: Sequence[str]) -> Change:
        """Return how models stop to be members. names: ids, paths, or patterns of these.

        Names of models that were dropped before change nothing. Raises `InputError` for a name that means no model.
        """
        document, etag = self.read()
        before = [each.member for each in document.dropped]
        problems = [
            Problem("models", f"no member has an id or a path like {name!r}", "`ties-ray pool list` names the members")
            for name in names
            if not any(_means(name, each) for each in (*document.members, *before))
        ]
        left = [each for each in document.members if not any(_means(name, each) for name in names)]
        if not left:
            remedy = "keep one, or remove the pool's folder"
            problems.append(Problem("models", "no model is left in the pool", remedy))
        if problems:
            raise InputError(problems)
        if len(left) == len(document.members):
            return Change(self.settings, document, etag, document.recipe, document.members, document.result, None)
        return planned(self.settings, document, etag, document.recipe, left)

    def add(self, models: Sequence[str | Json] = (), watch: Watch = lambda progress: None) -> PoolChange:
        """Merge further models into the pool, as `plan_add` says; return what was done.

        Where another process changes the pool meanwhile, it goes on from there. A killed call is continued by the same
        call. Raises a `MergeError`.
        """
        return self._carry_out(lambda: self.plan_add(models), watch)

    def drop(self, names: Sequence[str], *, erase: bool = False, watch: Watch = lambda progress: None) -> PoolChange:
        """Take models out of the pool, as `plan_drop` says; return what was done, and what still holds them.

        erase: remove all results, states and findings that hold anything of them, too.
        """
        record = self._carry_out(lambda: self.plan_drop(names), watch)
        document, _ = self.read()
        gone = [each.member for each in document.dropped if any(_means(name, each.member) for name in names)]
        numbers = {member.number for member in gone}
        cached = {member.cached for member in gone} - {member.cached for member in document.members} - {""}

        def holding(document: PoolDocument) -> set[str]:
            return {each.run_id for each in document.results if numbers & set(each.members)}

        held = self._discard(holding, cached, remove=erase)
        return record.model_copy(update={"erased" if erase else "remains": held})

    def clean(self, keep: int | None = None, *, remove: bool = True) -> PoolCleaning:
        """Remove results that the pool does not list; return what was removed.

        keep: the number of the last results that stay; all that are listed where it is None.
        """
        if keep is not None and keep < 1:
            raise RecipeError(Problem("keep", f"is {keep}", KEEP))

        def old(document: PoolDocument) -> set[str]:
            return {each.run_id for each in document.results[: -keep if keep else 0]}

        return PoolCleaning(pool=self.folder, removed=remove, found=self._discard(old, set(), remove=remove))

    # -- inside

    def _recipe(self, document: PoolDocument) -> Recipe:
        return self.settings.merge(document.recipe, [member.entry for member in document.members])

    def _entries(self, rules: Json, models: Sequence[str | Json]) -> Sequence[ModelEntry]:
        """Return the lines of a recipe that name models, with absolute paths."""
        if not models and self.settings.recipe is None:
            raise RecipeError(Problem("models", "none is named", "name models, or give the pool's recipe file"))
        asked = list(models)
        if not models and self.settings.recipe:
            asked = [entry.model_dump(mode="json", exclude_defaults=True) for entry in self.settings.recipe.models]
        data = {**rules, "models": asked, "output": {**rules["output"], "path": self.folder}}
        return validate(with_absolute_paths(validate(data).model_dump(mode="json"))).models

    def _with(
        self, document: PoolDocument | None, lines: Sequence[tuple[ModelEntry, bool]]
    ) -> tuple[list[PoolMember], int]:
        """Return the members with those of some lines that are not there yet, and how many are.

        Raises `InputError` where such a model has changed, or the line gives it another weight.
        """
        members = list(document.members) if document else []
        by_place = {_key(member.entry): member for member in members}
        ids = {member.entry.id for member in members}
        present: list[PoolMember] = []
        problems: list[Problem] = []
        number = document.next_number if document else 0
        for line, has_id in lines:
            member = by_place.get(_key(line))
            if member is not None and not (has_id and line.id not in ids):
                present.append(member)
                if member.entry.model_copy(update={"id": line.id}) != line:
                    message = "is a member with other numbers than are asked for now"
                    problems.append(Problem(member.uri, message, "drop it, and add it again with these"))
                continue
            while not has_id and str(number) in ids:
                number += 1
            id_ = line.id if has_id else str(number)
            ids.add(id_)
            entry = line.model_copy(update={"id": id_})
            members.append(PoolMember(number=number, entry=entry, pins=(), added=pool_document.now()))
            number += 1
        problems += _changed(self.settings.stores, present)
        if problems:
            raise InputError(problems)
        return members, len(present)

    def _carry_out(self, plan: Callable[[], Change], watch: Watch) -> PoolChange:
        """Plan a change and carry it out; plan it anew where the pool has changed meanwhile."""
        for _ in range(TRIES):
            watch(merging.READING_HEADERS)
            change = plan()
            if change.is_nothing:
                return change.record(done=True)
            stores, result = self.settings.stores, None
            if change.plan:
                watch(Progress("plan", 0, 0, 0, 0, event=_reading(change)))
                result = self._merged(change, watch)
            if result or not change.plan:
                document = change.document(stores, result)
                if pool_document.swap(stores, self.folder, document, change.etag):
                    return change.record(result, done=True).model_copy(update={"num_members": len(document.members)})
            watch(Progress("plan", 0, 0, 0, 0, event="the pool was changed meanwhile: it goes on from there"))
            self._forget(stores, change.run_id)
        raise UnavailableError(Problem(self.folder, "others keep changing the pool", "try again"))

    def _merged(self, change: Change, watch: Watch) -> MergeResult | None:
        """Return the record of a change's merge; None where it failed and the pool has changed meanwhile."""
        assert change.plan
        try:
            return merging.carry_out(change.plan, started=time.monotonic(), fresh=False, watch=watch)
        except (InputError, InterruptedMerge):  # what it goes on from may be gone
            if pool_document.read(self.settings.stores, self.folder)[1] == change.etag:
                raise
            return None

    def _forget(self, stores: Stores, run_id: str) -> None:
        """Remove a result that nobody lists, unless another process is at work there."""
        document, _ = pool_document.read(stores, self.folder)
        if document and run_id not in {each.run_id for each in document.results}:
            with suppress(MergeError):
                self._remove(stores, place_of(self.folder, run_id))

    def _remove(self, stores: Stores, output: str) -> None:
        """Remove a result with all that belongs to it. Raises `UnavailableError` while a merge is at work there."""
        stores.of(output).list_below(self.folder, f"{RESULTS}/{last_part(output)}")  # refuses a link that leads away
        with lease.acquire(stores, output, lambda line: None):
            clean(stores, output, remove=True)
            stores.writer(output).delete_folder(output)

    def _leftovers(self, stores: Stores, document: PoolDocument) -> list[str]:
        listed = {each.run_id for each in document.results}
        folders = stores.of(self.folder).list_below(self.folder, RESULTS).folders
        return [uri for uri in folders if pool_document.is_run_id(last_part(uri)) and last_part(uri) not in listed]

    def _discard(self, choose: Callable[[PoolDocument], set[str]], cached: set[str], *, remove: bool) -> list[str]:
        """Return the results that a pool can do without, and some findings.

        remove: take them out of the document, then remove them. The current result stays. Raises `UnavailableError`
        where another process is at work in one of them.
        """
        stores = self.settings.stores
        for _ in range(TRIES):
            document, etag = self.read()
            doomed = choose(document) - {document.result.run_id}
            kept = tuple(each for each in document.results if each.run_id not in doomed)
            if not remove or not doomed:
                break
            changed = document.model_copy(update={"results": kept, "revision": document.revision + 1})
            if pool_document.swap(stores, self.folder, changed, etag):
                break
        else:
            raise UnavailableError(Problem(self.folder, "others keep changing the pool", "try again"))
        listed = document.model_copy(update={"results": kept})
        folders = sorted({*(place_of(self.folder, run_id) for run_id in doomed), *self._leftovers(stores, listed)})
        findings = [
            uri
            for uri in (pin.uri for pin in stores.of(self.settings.cache).list(self.settings.cache).files)
            if last_part(uri).partition("-")[0] in cached
        ]
        if remove:
            for folder in folders:
                self._remove(stores, folder)
            for uri in findings:
                stores.writer(uri).delete(uri)
        return [*folders, *findings]


def open_pool(
    source: "Recipe | Mapping[str, Any] | str",
    storage: Mapping[str, Mapping[str, object]] | None = None,
    run: Mapping[str, object] | None = None,
) -> Pool:
    """Return the pool of a folder, or of a recipe, its plain data or its file."""
    if isinstance(source, Mapping):
        return Pool(validate(dict(source)))
    if isinstance(source, str) and source.endswith((".yaml", ".yml", ".json")):
        return Pool(recipes.parsed(recipes.text_of(source), source))
    return Pool(source, storage=storage, run=dict(run or {}))


def _key(entry: ModelEntry) -> tuple[str | None, ...]:
    return (entry.path or "").rstrip("/"), entry.file, entry.variant, entry.adapter


def _means(name: str, member: PoolMember) -> bool:
    """Return whether a name means a member: its id, its path, its folder's name, or a pattern of these."""
    uri = member.uri.rstrip("/")
    return any(fnmatchcase(each, name.rstrip("/")) for each in (member.entry.id or "", uri, last_part(uri))) or (
        absolute(name).rstrip("/") == uri
    )


def _changed(stores: Stores, members: Iterable[PoolMember]) -> Iterator[Problem]:
    """Yield which members are not as they were added; a request a file."""

    def differs(member: PoolMember) -> bool:
        try:
            return any(stores.of(pin.uri).head(pin.uri, 0)[0] != pin for pin in member.pins)
        except FileNotFoundError:
            return True

    every = tuple(members)
    with ThreadPoolExecutor(THREADS) as threads:
        for member, other in zip(every, threads.map(differs, every), strict=True):
            if other:
                yield Problem(
                    member.uri, "has changed since it was added", "drop it and add it again, or put it back as it was"
                )


def _row(document: PoolDocument, member: PoolMember) -> MemberRow:
    rest = tuple(each.number for each in document.members if each is not member)
    start = document.start(rest) if rest else None
    begun = len(start.members) if start else 0
    sizes = {each.number: each.size for each in document.members}
    state = start.state_bytes if start and begun < len(rest) else 0
    return MemberRow(
        id=member.entry.id or "",
        uri=member.uri,
        weight=member.entry.weight if isinstance(member.entry.weight, float) else None,
        size=member.size,
        added=member.added,
        drop_reads=len(rest) - begun,
        drop_bytes=sum(sizes[number] for number in rest[begun:]) + state,
    )


def _reading(change: Change) -> str:
    """Return what a change reads, in a line for people."""
    record = change.record()
    text = (
        f"{record.num_members} models: reads {len(record.added)} new"
        if record.added
        else f"{record.num_members} models"
    )
    if record.again:
        text += f"; reads {len(record.again)} again ({record.again_bytes:,} bytes), because {record.reason}"
    return text
