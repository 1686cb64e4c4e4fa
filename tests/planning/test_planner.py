"""Which rounds a recipe needs, what is refused before any of them, and what barriers change."""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.planning.test_plan import catalog_of, recipe_for
from tests.tools.adapters import ATTENTION, MLP, make_pool
from tests.tools.families import Family
from tests.tools.merging import recipe_of
from ties_ray.errors import InputError, Problem, RecipeError
from ties_ray.layout.sizes import SIZES
from ties_ray.operations import merging
from ties_ray.planning.planner import believable, concluded, make_plan
from ties_ray.recipe.coefficients import Rule
from ties_ray.recipe.parse import validate
from ties_ray.rounds import Conclusion
from ties_ray.stores import Stores
from ties_ray.tensors import Parameter

PARAMETERS = [Parameter("a", (30, 3), "BF16", True), Parameter("b", (4,), "BF16", True)]


@pytest.mark.parametrize(
    ("method", "kind", "rounds"),
    [
        ("average", "checkpoint", ["merge"]),
        ("ties", "checkpoint", ["threshold", "threshold", "merge"]),
        ("iso_c", "checkpoint", ["units", "merge"]),
        ("opcm", "checkpoint", ["gather", "units", "merge"]),
        ("pcb", "checkpoint", ["ranks", "ranks", "ranks", "ranks", "merge"]),
        ("average", "metrics", ["measure"]),
        ({"name": "emr", "masks": True}, "masks", ["units", "merge"]),
    ],
    ids=str,
)
def test_a_method_and_an_output_have_their_kinds_of_rounds(method: object, kind: str, rounds: list[str]) -> None:
    made = make_plan(recipe_for(2, method, output={"path": "/out", "kind": kind}), catalog_of(PARAMETERS))
    assert [round_.kind for round_ in made.merges[0].rounds] == rounds


@pytest.mark.parametrize(
    ("method", "output", "message"),
    [
        ("pcb", {"state": True}, "output.state: pcb needs all models at once: .*; leave it out, and merge all models"),
        ("average", {"state": True, "kind": "metrics"}, "output.state: an output of kind metrics has no state by"),
        ("average", {"state": True, "kind": "adapter"}, "output.state: an output of kind adapter has no state by"),
        ("ties", {"kind": "masks"}, "output.kind: ties with these settings gives no masks; use `masks: true` of emr"),
        ({"name": "emr", "masks": True}, {}, "method.masks: an output of kind checkpoint holds no masks; write `kind"),
        ("opcm", {"kind": "metrics"}, "output.kind: what opcm adds is final once all of it is merged, so it has no"),
        ("average", {"kind": "adapter"}, "an adapter holds matrices of linear layers and embeddings; the models also"),
    ],
    ids=str,
)
def test_what_a_method_and_an_output_can_not_do_together_is_refused(
    method: object, output: Mapping[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message.replace(".*", "ANY").replace(".", r"\.").replace("ANY", ".*")):
        make_plan(recipe_for(2, method, output={"path": "/out", **output}), catalog_of(PARAMETERS))


def test_what_a_method_and_an_output_can_do_together_is_planned() -> None:
    for method, output in (
        ("average", {"state": True}),
        ("pcb", {}),
        ({"name": "emr", "masks": True}, {"kind": "masks"}),
        ("average", {"kind": "metrics"}),
        ("opcm", {}),
    ):
        assert make_plan(recipe_for(2, method, output={"path": "/out", **output}), catalog_of(PARAMETERS)).files or (
            output == {"kind": "metrics"}
        )


def test_numbers_that_a_method_does_not_know_are_refused() -> None:
    catalog = catalog_of(PARAMETERS)
    heavier = replace(catalog, models=(replace(catalog.models[0], weight=2.0), catalog.models[1]))
    with pytest.raises(RecipeError, match=r"model 0: weight 2\.0: profile official knows no weights"):
        make_plan(recipe_for(2, {"name": "ties", "profile": "official"}), heavier)
    scaled = replace(catalog, lambdas=(Rule("a", (0.5,)),))
    assert make_plan(recipe_for(2, "task_arithmetic"), scaled).files
    masks = recipe_for(2, {"name": "emr", "masks": True}, output={"path": "/out", "kind": "masks"})
    with pytest.raises(RecipeError, match=r"method\.lambda: a mask has one factor, and lambda differs by parameter"):
        make_plan(masks, scaled)


def test_all_is_excluded() -> None:
    nothing = catalog_of([Parameter("a", (30, 3), "BF16", False)])
    with pytest.raises(RecipeError, match="base: no parameter is left to merge; narrow `exclude`"):
        make_plan(recipe_for(exclude=["*"]), nothing)


@pytest.mark.parametrize("cache", [0, "8MiB"])
def test_memory_that_is_raised_as_the_message_says_suffices(cache: object) -> None:
    """The plan takes all of it, and a byte less is refused."""
    catalog = catalog_of([Parameter("p", (4096, 4096), "BF16", True)])
    least = {"memory": "500MiB", "cache": cache}
    with pytest.raises(RecipeError, match=r"500.* is too little: the largest matrix alone takes a worker") as raised:
        make_plan(recipe_for(2, "iso_c", run=least), catalog)
    by = re.search(r"raise it by ([\d,]+) bytes", str(raised.value))
    assert by
    enough = 500 * 2**20 + int(by[1].replace(",", ""))
    assert f"takes a worker {enough + recipe_for(run=least).run.cache:,} bytes" in str(raised.value)
    made = make_plan(recipe_for(2, "iso_c", run={**least, "memory": enough}), catalog)
    assert made.memory == enough + made.recipe.run.cache
    with pytest.raises(RecipeError, match="raise it by 1 bytes"):
        make_plan(recipe_for(2, "iso_c", run={**least, "memory": enough - 1}), catalog)


def test_larger_blocks_take_more_memory() -> None:
    catalog = catalog_of([Parameter("p", (4096, 4096), "F32", True)])
    memory = [
        make_plan(recipe_for(2, "average"), catalog, replace(SIZES, max_local_block=2**size)).memory
        for size in (17, 18, 19, 20)
    ]
    assert memory == sorted(set(memory))
    assert memory[0] > SIZES.overhead


def test_the_cache_counts_where_there_are_factors(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=2, layers=1)
    whole = shutil.copytree(pool.base, tmp_path / "whole")
    for models, counts in ((list(pool.adapters), True), ([str(whole)], False)):
        data = {"base": pool.base, "models": models, "method": "average", "output": str(tmp_path / "out")}
        small, large = (merging.plan(validate({**data, "run": {"cache": size}})).memory for size in ("1MiB", "9MiB"))
        assert large - small == 8 * 2**20 * counts


def test_a_task_vector_holds_what_an_adapter_changes_or_what_any_does(tmp_path: Path) -> None:
    targets = ((*ATTENTION, *MLP), ("q_proj",))
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=3, targets=targets, layers=1)
    wide = sum(delta.numel() for delta in pool.deltas[0].values())
    data = {"base": pool.base, "models": list(pool.adapters), "output": str(tmp_path / "out")}
    for denominator, sizes in (("adapter", (wide, 16 * 16, wide)), ("union", (wide, wide, wide))):
        method = {"name": "ties", "profile": "official", "denominator": denominator}
        made = merging.plan(validate({**data, "method": method}))
        assert made.merges[0].result.sizes == sizes
    narrow = merging.plan(validate({**data, "method": "average", "exclude": ["*o_proj*"]}))
    assert narrow.merges[0].result.sizes[:2] == (wide - 16 * 16, 16 * 16)
    whole = str(shutil.copytree(pool.base, tmp_path / "whole"))
    with_whole = merging.plan(validate({**data, "models": [whole, pool.adapters[1]], "method": "average"}))
    assert with_whole.merges[0].result.sizes == (with_whole.merges[0].layout.num_elements, 16 * 16)


def test_numbers_by_parameter_are_part_of_the_run_id() -> None:
    catalog = catalog_of(PARAMETERS)
    rule = (Rule("a", (0.5,)),)
    other = (Rule("a", (0.25,)),)
    changes: list[dict[str, Any]] = [{}, {"weights": rule}, {"densities": rule}, {"ranks": rule}, {"ranks": other}]
    ids = []
    for change in changes:
        models = (replace(catalog.models[0], **change), catalog.models[1])
        ids.append(make_plan(recipe_for(2, "average"), replace(catalog, models=models)).run_id)
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[0-9a-f]{16}", run_id) for run_id in ids)


def test_a_stored_plan_is_believed_in_what_it_claims_of_inputs_alone() -> None:
    sizes = replace(SIZES, model_group=2)
    made = make_plan(recipe_for(run={"memory": "1GiB", "workers": 3}), catalog_of(PARAMETERS), sizes)
    claim = replace(made, run_id="0" * 16, output="/there", arithmetic="exact-7", notes=("a note",), memory=1)
    believed = believable(claim)
    assert (believed.run_id, believed.output, believed.arithmetic) == ("0" * 16, "/there", "exact-7")
    assert (believed.notes, believed.sizes) == (("a note",), sizes)
    assert (believed.results, believed.memory) == (made.results, made.memory)
    assert (believed.recipe.run.device, believed.recipe.run.workers) == ("cpu", recipe_for().run.workers)
    assert believable(replace(made, sizes=replace(SIZES, min_range=1))).sizes == SIZES
    fast = made.recipe.run.model_copy(update={"arithmetic": "fast", "device": "cuda"})
    assert believable(replace(made, recipe=made.recipe.model_copy(update={"run": fast}))).recipe.run.device == "cuda"
    on_gpu = {"device": "cuda", "arithmetic": "exact"}
    for method, device in (("ties", "cpu"), ("iso_c", "cuda")):
        claim = make_plan(recipe_for(2, method, run={**on_gpu, "memory": "4GiB"}), catalog_of(PARAMETERS))
        assert believable(claim).recipe.run.device == device, "LAPACK of a GPU has its own bytes"
    huge = made.recipe.run.model_copy(update={"memory": 2**60})
    assert believable(replace(made, recipe=made.recipe.model_copy(update={"run": huge}))).recipe.run.memory == 2**33


def test_a_stored_plan_that_contradicts_itself_is_refused() -> None:
    made = make_plan(recipe_for(), catalog_of(PARAMETERS))
    catalog = made.catalog
    for spoiled in (
        replace(catalog, models=()),
        replace(catalog, parameters=(Parameter("a", (30, 3), "B17", True),)),
        replace(catalog, models=(replace(catalog.models[0], format="nonsense"),)),
    ):
        with pytest.raises(InputError, match=r"the stored plan: contradicts itself \(.*\); merge again with --fresh"):
            believable(replace(made, catalog=spoiled))
    for shape in ((2**45,), (2**70, 2**70)):
        with pytest.raises(InputError, match="the stored plan: claims more elements than any model has"):
            believable(replace(made, catalog=replace(catalog, parameters=(Parameter("a", shape, "BF16", True),))))


def test_a_barrier_that_changes_nothing_leaves_the_plan() -> None:
    made = make_plan(recipe_for(), catalog_of(PARAMETERS))
    assert concluded(made, 0, Conclusion()) is made
    assert concluded(made, 0, Conclusion(output=made.recipe.output)) is made
    assert made.revision == 0


def test_a_barrier_leaves_later_rounds_less_to_do() -> None:
    made = make_plan(recipe_for(), catalog_of(PARAMETERS))
    less = made.merges[0].rounds[1]._replace(bytes_read=1)
    revised = concluded(made, 0, Conclusion(rounds={1: less}))
    first, _, last = made.merges[0].rounds
    assert revised.merges[0].rounds == (first, less, last)
    assert (revised.revision, revised.run_id, len(revised.results)) == (1, made.run_id, 1)
    assert concluded(revised, 0, Conclusion(rounds={1: less})).revision == 2


def test_files_and_shards_follow_from_the_rank_that_a_barrier_settles(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=2, layers=1)
    output = {"path": str(tmp_path / "out"), "kind": "adapter", "rank": 8}
    data = {"base": pool.base, "models": list(pool.adapters), "method": "average"}
    made, wanted = (merging.plan(validate({**data, "output": {**output, "rank": rank}})) for rank in (8, 3))
    settled = concluded(made, 0, Conclusion(output=wanted.recipe.output))
    assert settled.files == wanted.files != made.files
    assert settled.merges[0].rounds[-1].num_shards == wanted.merges[0].rounds[-1].num_shards
    assert (settled.recipe, settled.run_id, settled.revision) == (wanted.recipe, made.run_id, 1)


def test_a_barrier_leaves_models_out(family_of: Callable[..., Family]) -> None:
    """The run keeps its name and its place, though another recipe would have another name."""
    recipe = recipe_of(
        family_of(num_models=4), "/out/{run_id}", "ties", bounds={"norm": [0.3, 3]}, weights=(0, 1, 1, 1)
    )
    made = merging.plan(recipe)
    problem = Problem("model 2", "its norm is far from the others'", "look at it")
    left = concluded(made, 0, Conclusion(refused={1: problem}))
    assert [member.id for member in left.merges[0].members] == ["1", "3"]
    assert [(each.id, each.problems) for each in left.catalog.refused] == [("2", (problem,))]
    assert (left.run_id, left.output, left.revision) == (made.run_id, made.output, 1)
    assert left.notes == (*made.notes, f"left out, as allowed: {problem}")
    assert len(left.merges[0].rounds) == len(made.merges[0].rounds)
