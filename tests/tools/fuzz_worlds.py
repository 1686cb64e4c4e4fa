"""Where documents are fuzzed: outputs, pools, sweeps and searches in memory, and the commands that read each."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.tools.adapters import make_pool
from tests.tools.families import make_family
from tests.tools.merging import LOCAL, Stop, recipe_of, stop_at
from ties_ray.cli import pools, scores, searches, sweeps
from ties_ray.driver.resume import clean
from ties_ray.evaluations.function import ScoredModel
from ties_ray.operations import evaluating, merging, report, searching, sweeping
from ties_ray.operations.pool import open_pool
from ties_ray.operations.promote import promote, rollback
from ties_ray.operations.status import status
from ties_ray.operations.verify import verify
from ties_ray.recipe.evaluations import Evaluating
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.recipe.search import search_of
from ties_ray.recipe.settings import sweep_of
from ties_ray.reports import sweep as tables
from ties_ray.reports import sweep_page
from ties_ray.state import lease
from ties_ray.stores import Stores, memory

TIES = {"name": "ties", "density": 0.3}
DIARY = ("diary.txt", "results/diary.txt", "results/photos/diary.txt", ".ties-ray/photos/diary.txt")
"""Files in the output of a pool, a sweep or a search that no command may touch."""
Commands = Mapping[str, Callable[[], object]]
DOCUMENTS = (
    "plan", "run", "lease", "uploads", "record", "folded", "seen", "result", "pointer", "pool cache", "scratch",
    "index", "pool", "sweep", "scores", "search",
)  # fmt: skip
DECIDES = ("record", "folded", "pool cache", "result", "pool", "search")
"""Documents by which weights are decided, or that say what the output is; all others change no byte."""
LEASE = lease.Holder(token="0" * 32, host="there", machine="another", process="1-2").model_dump_json().encode()


@dataclass
class World:
    """A place in memory with inputs and an output, as it was when a merge ended or was stopped."""

    root: str
    commands: Commands
    """What reads the documents, by name. `merge` and `fresh` write weights."""
    documents: dict[str, tuple[str, ...]]
    """What is changed: by name, suffixes or parts of the URI..."""
    forget: tuple[str, ...] = ()
    """...and what is removed before, so that it is made anew from the changed ones."""
    objects: dict[str, Any] = field(default_factory=dict)
    uploads: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, bytes] = field(default_factory=dict)
    """Of the merge undisturbed."""
    kept: frozenset[str] = frozenset()
    """Objects in the output that are not ours."""

    @property
    def output(self) -> str:
        """Return the URI of the output."""
        return f"{self.root}/out"

    def here(self) -> dict[str, Any]:
        """Return the objects under the root."""
        return {uri: one for uri, one in memory._OBJECTS.items() if uri.startswith(self.root)}

    def keep(self) -> None:
        """Note what there is, to come back to."""
        self.objects = self.here()
        self.uploads = {name: one for name, one in memory._UPLOADS.items() if one.uri.startswith(self.root)}

    def reset(self) -> None:
        """Come back to it."""
        for uri in self.here():
            memory._OBJECTS.pop(uri, None)
        memory._OBJECTS.update(self.objects)
        for name in [name for name, one in memory._UPLOADS.items() if one.uri.startswith(self.root)]:
            memory._UPLOADS.pop(name)
        memory._UPLOADS.update(copy.deepcopy(self.uploads))

    def written(self) -> dict[str, bytes]:
        """Return the weights in the output."""
        return {uri: one.data for uri, one in self.here().items() if self._is_weight(uri)}

    def _is_weight(self, uri: str) -> bool:
        return uri.startswith(self.output + "/") and uri.endswith(".safetensors")


def worlds(name: str) -> Iterator[World]:
    """Yield all worlds."""
    Stores({}).writer("memory://home").put("memory://home/.bashrc", b"mine")
    yield from _outputs(name)
    yield _pool(f"memory://{name}-pool")
    yield _sweep(f"memory://{name}-sweep")
    yield _search(f"memory://{name}-search")


def _outputs(name: str) -> Iterator[World]:
    """Yield finished and stopped merges of models, and of adapters whose rank is to be settled."""
    store = Stores({}).writer(f"memory://{name}")
    plain = {"plan": ("plan.json.gz",), "run": ("run.json",), "lease": ("lease.json",)}
    for end, folder in ((None, "done"), ("publish", "half"), ("merge", "early")):
        root = f"memory://{name}-{folder}"
        family = make_family(store, root, num_models=2)
        recipe = recipe_of(family, {"path": f"{root}/out", "file_size": 4000}, TIES)
        documents = (
            dict(plain)
            if end
            else {**plain, "result": ("ties-ray.result.json",), "index": (".index.json",), "pointer": ("pointer.json",)}
        )
        if end == "publish":
            documents |= {"record": ("/records/",), "uploads": ("uploads.json",)}
        else:
            documents |= {"folded": ("/folded/",), "seen": ("/seen/",)}
        yield made(recipe, World(root, of_output(recipe), documents), end)
    root = f"memory://{name}-counted"
    family = make_family(store, root, num_models=2)
    recipe = recipe_of(family, {"path": f"{root}/out"}, TIES)
    yield made(
        recipe, World(root, of_output(recipe), {"record": ("/records/0/", "/records/1/")}, ("/folded/",)), "merge"
    )
    root = f"memory://{name}-adapters"
    pool = make_pool(store, root, num_adapters=3)
    data = {
        "base": pool.base, "models": [{"path": uri} for uri in pool.adapters], "method": TIES,
        "output": {"path": f"{root}/out", "kind": "adapter", "rank": "auto", "energy": 0.9, "max_rank": 8},
        "run": {**LOCAL, "pool_cache": f"{root}/cache"}, "bounds": {"norm": [1e-9, 1e9]},
        "allow": {"refused_model": "drop", "nan": "drop_model"},
    }  # fmt: skip
    documents = {**plain, "record": ("/records/",), "folded": ("/folded/",), "scratch": ("/scratch/",)}
    yield made(validate(data), World(root, of_output(validate(data)), documents), "publish")
    root = f"memory://{name}-cached"
    pool = make_pool(store, root, num_adapters=3)
    data |= {
        "base": pool.base, "models": [{"path": uri} for uri in pool.adapters],
        "output": {"path": f"{root}/out", "kind": "delta"}, "run": {**LOCAL, "pool_cache": f"{root}/cache"},
    }  # fmt: skip
    yield made(validate(data), World(root, of_output(validate(data)), {"pool cache": ("/cache/",)}, ("/out/",)), None)


def made(recipe: Recipe, world: World, end: str | None) -> World:
    """Merge up to a stage, note what there is, and what the whole merge writes."""
    with contextlib.suppress(Stop):
        merging.merge(recipe, watch=stop_at(end) if end else lambda progress: None)
    stores = Stores({})
    if end is None:
        promote(stores, world.output, f"{world.root}/pointer.json")
    else:
        stores.of(world.output).put(f"{world.output}/.ties-ray/lease.json", LEASE)
    for uri in world.here():
        if any(part in uri for part in world.forget):
            memory._OBJECTS.pop(uri)
    world.keep()
    merging.merge(recipe)
    world.weights = world.written()
    world.reset()
    return world


def of_output(recipe: Recipe) -> Commands:
    """Return what reads documents of an output."""
    stores, output = Stores({}), recipe.output.path
    pointer = f"{output.removesuffix('/out')}/pointer.json"
    return {
        "status": lambda: status(stores, output),
        "verify": lambda: verify(stores, output, sample=0.1, recount=0.1),
        "clean": lambda: clean(stores, output, remove=True),
        "promote": lambda: promote(stores, output, pointer),
        "rollback": lambda: rollback(stores, pointer),
        "merge": lambda: merging.merge(recipe),
        "fresh": lambda: merging.merge(recipe, fresh=True),
    }


# -- many merges


def _pool(root: str) -> World:
    """Return a pool of three models with two results, and a model that is none of it yet."""
    family, folder = make_family(Stores({}).writer(root), root, num_models=4), f"{root}/out"
    recipe = {"base": family.base, "models": list(family.models[:2]), "method": TIES, "output": folder, "run": LOCAL}
    open_pool(recipe).add()
    open_pool(folder, run=LOCAL).add([family.models[2]])

    def listed() -> None:
        pool = open_pool(folder, run=LOCAL)
        list(pools.of_pool(pool.record()))
        pools.recipe_text(pool.recipe())

    commands: Commands = {
        "pool list": listed,
        "pool add": lambda: list(pools.of_change(open_pool(folder, run=LOCAL).add([family.models[3]]))),
        "pool add --plan": lambda: open_pool(recipe).plan_add([family.models[3]]),
        "pool drop": lambda: list(pools.of_change(open_pool(folder, run=LOCAL).drop(["1"]))),
        "pool drop --erase": lambda: open_pool(folder, run=LOCAL).drop([family.models[0]], erase=True),
        "pool clean": lambda: list(pools.of_cleaning(open_pool(folder, run=LOCAL).clean(1))),
    }
    return _made(World(root, commands, {"pool": ("/pool.json",)}))


def _sweep(root: str) -> World:
    """Return a sweep whose settings have scores."""
    family, folder, stores = make_family(Stores({}).writer(root), root, num_models=2), f"{root}/out", Stores({})
    data = {"base": family.base, "models": list(family.models), "method": TIES, "output": f"{folder}/{{setting}}",
            "run": LOCAL, "grid": {"method.density": [0.2, 0.4]}}  # fmt: skip
    asked = Evaluating.model_validate({"evaluate": [SCORE], "run": LOCAL})
    sweeping.sweep(sweep_of(data))
    evaluating.evaluate(asked, [folder])

    def page() -> None:
        if table := report.sweep_of(stores, folder):
            sweep_page.page_of(table)

    def reported() -> None:
        for row in tables.read(stores, folder).rows:
            if row.output.startswith(folder):
                report.report(stores, row.output)

    commands: Commands = {
        "results": lambda: list(sweeps.of_results(tables.read(stores, folder))),
        "report": page,
        "report of a setting": reported,
        "evaluate": lambda: list(scores.of_scores(evaluating.evaluate(asked, [folder]))),
        "evaluate --fresh": lambda: evaluating.evaluate(asked, [folder], fresh=True),
        "merge": lambda: sweeping.sweep(sweep_of(data)),
        "fresh": lambda: sweeping.sweep(sweep_of(data), fresh=True),
    }
    return _made(World(root, commands, {"sweep": ("/out/results.json",), "scores": ("/ties-ray.scores.json",)}))


def _search(root: str) -> World:
    """Return a finished search of four candidates."""
    family, folder = make_family(Stores({}).writer(root), root, num_models=2), f"{root}/out"
    section = {"space": {"method.lambda": {"low": 0.1, "high": 2}}, "sampler": "random", "budget": 3, "evaluate": SCORE}
    asked = search_of({"base": family.base, "models": list(family.models), "method": "task_arithmetic",
                       "output": folder, "run": {**LOCAL, "workers": 1}, "search": section})  # fmt: skip
    searching.search(asked)
    commands: Commands = {
        "search --plan": lambda: list(searches.of_plan(searching.plan(asked).record())),
        "merge": lambda: list(searches.of_result(searching.search(asked))),
        "status": lambda: status(Stores({}), folder),
        "clean": lambda: clean(Stores({}), folder, remove=True),
        "fresh": lambda: searching.search(asked, fresh=True),
    }
    return _made(World(root, commands, {"search": ("/search.jsonl",)}))


SCORE = {"name": "function", "function": f"{__name__}:score"}


def score(model: ScoredModel) -> float:
    """Return a number that depends on the model's name alone."""
    return float(sum(model.id.encode()) % 7)


def _made(world: World) -> World:
    """Put files of somebody else into an output, and note what there is."""
    world.kept = frozenset(f"{world.output}/{name}" for name in DIARY)
    for uri in world.kept:
        Stores({}).writer(uri).put(uri, b"mine")
    world.keep()
    world.weights = world.written()
    return world
