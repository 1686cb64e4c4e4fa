import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tools.families import Family
from tests.tools.merging import recipe_of
from ties_ray.errors import RecipeError
from ties_ray.inputs.agreement import RefusedModel
from ties_ray.inputs.catalog import Catalog, Model, read_catalog
from ties_ray.inputs.small_files import SmallFile
from ties_ray.layout.reads import runs_of
from ties_ray.layout.shards import Segment, elements_in
from ties_ray.layout.sizes import SIZES
from ties_ray.methods import Result, Round, whole_matrices
from ties_ray.methods.average import Average
from ties_ray.operations import merging
from ties_ray.outputs import PART_ALIGNMENT
from ties_ray.planning.plan import PLAN_FORM, Plan
from ties_ray.planning.planner import believable, make_plan
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.safetensors import DTYPE_BITS
from ties_ray.stores import Pin, Store, Stores, WritableStore
from ties_ray.stores.local import Local
from ties_ray.tensors import Parameter, Source, TensorRef

MakeFamily = Callable[..., Family]


def catalog_of(parameters: list[Parameter], num_models: int = 2) -> Catalog:
    """Return the catalog of checkpoints that hold these parameters one after the other."""
    sources, position = {}, 0
    for parameter in parameters:
        sources[parameter.name] = Source((TensorRef(0, position, parameter.dtype, parameter.shape),))
        position += parameter.numel * DTYPE_BITS[parameter.dtype] // 8
    merged = {parameter.name: sources[parameter.name] for parameter in parameters if parameter.merged}

    def model(id: str, sources: dict[str, Source]) -> Model:
        return Model(f"/m/{id}", id, "checkpoint", (Pin(f"/m/{id}/model.safetensors", position, "e"),), sources)

    models = tuple(model(str(number), merged) for number in range(num_models))
    return Catalog(model("base", sources), models, tuple(parameters), (), ())


def recipe_for(num_models: int = 2, method: object = "ties", **more: Any) -> Recipe:
    data = {"base": "/m/base", "models": [f"/m/{n}" for n in range(num_models)], "method": method, "output": "/out"}
    return validate(data | more)


def random_parameters(draw: random.Random) -> list[Parameter]:
    dtypes = ["BF16", "F16", "F32", "F64", "I64", "BOOL"]
    shapes: list[tuple[int, ...]] = [(), (1,), (0, 7), (3, 5), (1000,), (37, 411), (2048, 33)]
    parameters = []
    for number in range(draw.randint(1, 12)):
        dtype = draw.choice(dtypes)
        mergeable = dtype not in ("I64", "BOOL") and draw.random() < 0.9
        parameters.append(Parameter(f"p{number}", draw.choice(shapes), dtype, mergeable))
    return [*parameters, Parameter("last", (5, 700), draw.choice(dtypes[:4]), True)]


@pytest.mark.parametrize("seed", range(25))
def test_shards_cover_every_byte_of_every_file_and_every_element_once(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    part = PART_ALIGNMENT * draw.randint(1, 9)
    sizes = replace(
        SIZES,
        least_part=part,
        most_part=part,
        max_shard=part * draw.randint(1, 4),
        min_range=draw.choice([100, 4096, 2**20]),
        shards_at_least=draw.choice([1, 7, 50]),
    )
    parameters = random_parameters(draw)
    num_models = draw.choice([1, 2, SIZES.model_group, SIZES.model_group + 1])
    output = {"path": "/out", "file_size": draw.choice(["1KB", "40KB", "5GB"])}
    made = make_plan(recipe_for(num_models, output=output), catalog_of(parameters, num_models), sizes)
    (merge,) = made.merges
    layout, final = merge.layout, len(merge.rounds) - 1

    elements = {parameter.name: [0] * parameter.numel for parameter in parameters}
    written = {file: 0 for file in range(len(made.files))}
    for index in range(merge.rounds[final].num_shards):
        shard = merge.kind(final).shard(merge, merge.rounds[final], index)
        assert shard.models == (0, num_models)
        for number in range(*shard.parts):
            start, stop = layout.part(shard.file, number)
            assert start == written[shard.file], "parts follow one another"
            assert stop - start == part or stop == made.files[shard.file].size
            written[shard.file] = stop
            held = max(0, min(stop, 8 + len(made.files[shard.file].header)) - start)
            for placed, first, last in elements_in(layout, shard.file, number):
                held += (last - first) * DTYPE_BITS[placed.tensor.dtype] // 8
                for element in range(first, last):
                    elements[placed.tensor.parameter][element] += 1
            assert held == stop - start, "header and elements fill the part"
    assert written == {number: file.size for number, file in enumerate(made.files)}
    assert all(count == 1 for counts in elements.values() for count in counts)

    for number, round_ in enumerate(merge.rounds[:final]):
        pieces_of: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for index in range(round_.num_shards):
            shard = merge.kind(number).shard(merge, round_, index)
            assert 0 < shard.models[1] - shard.models[0] <= SIZES.model_group
            for parameter, start, stop in shard.segments:
                assert start < stop
                for model in range(*shard.models):
                    pieces_of.setdefault((model, parameter), []).append((start, stop))
        merged = [
            (n, parameter.numel) for n, parameter in enumerate(parameters) if parameter.merged and parameter.numel
        ]
        assert pieces_of.keys() == {(model, n) for model in range(num_models) for n, _ in merged}
        for (_, parameter), pieces in pieces_of.items():
            edges = [0, *itertools.chain.from_iterable(sorted(pieces)), parameters[parameter].numel]
            assert edges[::2] == edges[1::2], "the pieces of each model meet, and miss nothing"


@pytest.mark.parametrize("seed", range(25))
def test_runs_are_all_blocks_in_order_and_as_long_as_they_may_be(seed: int) -> None:
    draw = random.Random(seed)
    block, run = draw.choice([128, 4096]), draw.choice([0, 64, 1024, 4096])
    segments = [Segment(number, 3, 3 + draw.choice([0, 1, 60, 64, 500, 9000])) for number in range(30)]
    alone = set(draw.sample(range(30), 5))
    runs = list(runs_of(segments, block, run, lambda parameter: parameter not in alone))
    blocks = list(itertools.chain.from_iterable(runs))
    assert all(0 < segment.stop - segment.start <= block for segment in blocks)
    covered = [(segment.parameter, element) for segment in blocks for element in range(segment.start, segment.stop)]
    assert covered == [
        (segment.parameter, element) for segment in segments for element in range(segment.start, segment.stop)
    ]

    def filled(joined: Sequence[Segment]) -> int:
        return sum(-(-(segment.stop - segment.start) // 64) * 64 for segment in joined)

    for joined in runs:
        assert len(joined) == 1 or (filled(joined) <= run and not alone & {segment.parameter for segment in joined})
    for joined, following in itertools.pairwise(runs):
        assert filled((*joined, following[0])) > run or alone & {joined[-1].parameter, following[0].parameter}


@pytest.mark.parametrize("seed", range(10))
def test_files_are_filled_up_to_their_size(seed: int) -> None:
    draw = random.Random(seed)
    parameters = random_parameters(draw)
    limit = draw.choice([3_000, 40_000, 200_000])
    recipe = recipe_for(output={"path": "/out", "file_size": limit})
    made = make_plan(recipe, catalog_of(parameters))
    names = [placed.tensor.name for file in made.files for placed in file.tensors]
    assert sorted(names) == sorted(parameter.name for parameter in parameters)
    for number, file in enumerate(made.files, start=1):
        count = len(made.files)
        assert file.name == (f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors")
        assert (8 + len(file.header)) % PART_ALIGNMENT == 0
        sizes = [placed.stop - placed.start for placed in file.tensors]
        assert sum(sizes) <= limit or len([size for size in sizes if size]) == 1
        assert file.size == 8 + len(file.header) + sum(sizes)


def test_a_plan_survives_json(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3, shards=2)
    recipe = recipe_of(
        family, {"path": str(tmp_path / "{run_id}"), "dtype": "float16"}, {"name": "ties", "lambda": 0.3},
        weights=(1.0, 0.0, 2.5), densities=(0.5, None, 0.25), exclude=["lm_head.*"],
    )  # fmt: skip
    made = merging.plan(recipe)
    again = PLAN_FORM.validate_json(made.to_json())
    assert again == made
    assert again.to_json() == made.to_json()
    assert made.output == str(tmp_path / made.run_id)
    assert [member.id for member in made.merges[0].members] == ["0", "2"]
    assert any("weight 0, left out" in note for note in made.notes)


def test_a_plan_tells_what_it_moves_and_is_stored_in_the_words_of_recipes() -> None:
    catalog = catalog_of([Parameter("a", (30, 3), "BF16", True)])
    made = make_plan(recipe_for(2, {"name": "ties", "lambda": 0.3}, output={"path": "/out"}), catalog)
    assert repr(made).startswith(
        f"Plan(run_id='{made.run_id}', method='ties', num_models=2, output='/out', bytes_read="
    )
    assert [(row["model"], row["bytes"]) for row in made.table()] == [("/m/0", 180), ("/m/1", 180)]
    stored = json.loads(made.to_json())
    assert stored["recipe"]["method"]["lambda"] == 0.3
    assert stored["revision"] == made.revision == 0
    assert made.bytes_written == sum(file.size for file in made.files)
    assert made.bytes_again <= made.bytes_read == sum(round_.bytes_read for round_ in made.merges[0].rounds)
    assert made.num_shards == sum(round_.num_shards for round_ in made.merges[0].rounds)
    assert made.bytes_of_scratch == 0
    assert make_plan(recipe_for(2, "iso_c"), catalog).bytes_of_scratch > 0
    assert made.library == catalog.library


def test_workers_copy_from_the_page_cache_where_all_inputs_are_local_and_no_gpu_waits() -> None:
    local = catalog_of([Parameter("a", (30, 3), "BF16", True)])
    pins = tuple(pin._replace(uri=f"s3://bucket{pin.uri}") for pin in local.base.objects)
    far = replace(local, models=(local.models[0], replace(local.models[1], objects=pins)))
    assert make_plan(recipe_for(), local).copies
    assert not make_plan(recipe_for(), far).copies
    assert not make_plan(recipe_for(), replace(local, base=replace(local.base, objects=pins))).copies
    assert not make_plan(recipe_for(run={"device": "cuda"}), local).copies
    assert not make_plan(recipe_for(run={"device": "cuda"}), far).copies


def test_the_digest_of_a_plan_is_of_what_records_rest_on() -> None:
    catalog = catalog_of([Parameter("a", (30, 3), "BF16", True)])
    made = make_plan(recipe_for(), catalog)
    first, second = catalog.models
    small = SmallFile("tokenizer.json", Pin("/m/base/tokenizer.json", 9, "e"))
    same = [
        replace(catalog, base=replace(catalog.base, licence="mit")),
        replace(catalog, models=(replace(first, licence="mit"), second)),
        replace(catalog, small_files=(small,)),
        replace(catalog, notes=("a note",)),
        replace(catalog, refused=(RefusedModel("7", "/m/7", ()),)),
        replace(catalog, waiting=("/m/8",)),
    ]
    assert {replace(made, catalog=each).digest() for each in same} == {made.digest()}
    finer = make_plan(recipe_for(run={"workers": 3}), catalog, replace(SIZES, min_range=16))
    assert finer.digest() == made.digest()
    moved = {"a": Source((TensorRef(0, 8, "BF16", (30, 3)),))}
    other = [
        replace(catalog, base=replace(catalog.base, sources=moved)),
        replace(catalog, models=(first, replace(second, sources=moved))),
        replace(catalog, models=(first, replace(second, weight=2.0))),
        replace(catalog, parameters=(Parameter("a", (3, 30), "BF16", True),)),
    ]
    digests = [replace(made, catalog=each).digest() for each in other]
    digests += [replace(made, run_id="0" * 16).digest(), replace(made, results=made.results * 2).digest()]
    assert len({made.digest(), *digests}) == 1 + len(digests)


def test_planning_touches_no_store(family_of: MakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(family_of(num_models=3), "/nowhere", "ties")
    catalog = read_catalog(recipe, Stores({}))

    def refuse(*_: object) -> None:
        raise AssertionError("a store was used")

    reads, writes = ("get", "list", "head", "read"), ("put", "begin_upload")
    for store, names in ((Store, reads), (WritableStore, writes), (Local, (*reads, *writes))):
        for name in names:
            monkeypatch.setattr(store, name, refuse)
    with pytest.raises(AssertionError, match="a store was used"):
        read_catalog(recipe, Stores({}))
    assert make_plan(recipe, catalog).bytes_read > 0


def test_a_thousand_models_are_planned_in_seconds_and_cost_a_kilobyte_each() -> None:
    parameters = [Parameter(f"layer.{n}.weight", (4096, 4096), "BF16", True) for n in range(200)]
    few = make_plan(recipe_for(2), catalog_of(parameters, 2))
    catalog = catalog_of(parameters, 1000)
    started = time.monotonic()
    many = make_plan(recipe_for(1000), catalog)
    assert time.monotonic() - started < 10
    assert many.memory - few.memory <= 998 * 2**11, "only the plan itself has to be held"
    size = sum(parameter.numel * 2 for parameter in parameters)
    groups = -(-1000 // SIZES.model_group)
    assert [round_.bytes_read for round_ in many.merges[0].rounds] == [size * (1000 + groups)] * 2 + [size * 1001]
    assert len(many.to_json()) < 40 * 2**20


@pytest.mark.parametrize("memory", ["128MiB", "160MiB", "512MiB", "3GiB"])
@pytest.mark.parametrize("method", ["average", "ties", "consensus", {"name": "ties", "zero_sum": "majority"}], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F64"])
@pytest.mark.parametrize("num_models", [1, 8, 300])
def test_a_worker_never_needs_more_than_the_recipes_memory(
    num_models: int, dtype: str, method: object, memory: str
) -> None:
    method = {"name": "consensus", "agree": 1} if method == "consensus" else method
    parameters = [Parameter("a", (3000, 30_000), dtype, True), Parameter("b", (5,), "I64", False)]
    recipe = recipe_for(num_models, method, run={"memory": memory}, output={"path": "/out", "part_size": "5MiB"})
    made = make_plan(recipe, catalog_of(parameters, num_models))
    assert made.memory <= recipe.run.memory
    if num_models == 300 and made.recipe.method.name == "consensus" and memory == "128MiB":
        assert made.merges[0].rounds[-1].passes == 2, "300 slices do not fit, so they are read twice"


@pytest.mark.parametrize(("memory", "ahead"), [("380MiB", [4]), ("420MiB", range(5, 16)), ("512MiB", [16])])
def test_from_a_bucket_as_much_is_read_ahead_as_the_memory_allows(
    memory: str, ahead: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    local = catalog_of([Parameter("p", (8192, 4096), "BF16", True)], 8)
    pins = tuple(pin._replace(uri=f"s3://bucket{pin.uri}") for pin in local.base.objects)
    far = replace(local, models=tuple(replace(model, objects=pins) for model in local.models))
    recipe = recipe_for(8, "average", run={"memory": memory})
    assert make_plan(recipe, local).ahead == 4
    plan = make_plan(recipe, far)
    assert plan.ahead in ahead
    assert plan.memory <= recipe.run.memory
    assert {round_.block for round_ in plan.merges[0].rounds} == {4 * 2**20}
    shallow = make_plan(recipe, far, replace(SIZES, most_ahead=4))
    assert plan.memory - shallow.memory == (plan.ahead - 4) * 8 * 2**20


@pytest.mark.parametrize(("dtype", "width"), [("BF16", 2), ("F32", 4)])
def test_slices_of_local_files_that_are_needed_together_take_as_much_whatever_the_number_of_models(
    dtype: str, width: int
) -> None:
    parameters = [Parameter("p", (8192, 4096), dtype, True)]
    for number, together in ((2, 2), (4, 4), (8, 8), (16, 16), (300, 16)):
        ties, consensus = (
            make_plan(recipe_for(number, method), catalog_of(parameters, number)).merges[0].rounds
            for method in ("ties", {"name": "consensus", "agree": 1})
        )
        assert [round_.block for round_ in ties] == [2**20, 2**20, min(2**20, 2**23 // width // together)]
        counting, merging = ties[0].run * min(number, SIZES.model_group), ties[-1].run * number
        assert 2**21 < max(counting, merging) * width <= 2**23
        assert consensus[-1].block == max(2**17, min(2**20, 2**23 // width // number)), "it keeps all slices"


def test_blocks_of_local_files_are_small_enough_for_a_cache() -> None:
    local = catalog_of([Parameter("p", (8192, 4096), "BF16", True)], 8)
    pins = tuple(pin._replace(uri=f"s3://bucket{pin.uri}") for pin in local.base.objects)
    far = replace(local, base=replace(local.base, objects=pins))
    near, beside = (make_plan(recipe_for(8, "ties"), catalog) for catalog in (local, far))
    assert [round_.block for round_ in near.merges[0].rounds] == [2**20, 2**20, 2**19]
    assert {round_.block for round_ in beside.merges[0].rounds} == {4 * 2**20}, "one that is far is enough"
    assert near.memory < beside.memory
    on_gpu = make_plan(recipe_for(8, "ties", run={"device": "cuda"}), local)
    blocks = [round_.block for round_ in on_gpu.merges[0].rounds]
    assert all(20 * 2**20 < block <= 32 * 2**20 for block in blocks), "a GPU waits for Python once a block"
    assert on_gpu.memory <= on_gpu.recipe.run.memory + on_gpu.recipe.run.cache


def test_the_memory_of_a_gpu_is_planned_and_says_how_many_workers_share_it() -> None:
    catalog = catalog_of([Parameter("p", (8192, 4096), "BF16", True)], 8)

    def planned(method: str, **run: object) -> Plan:
        return make_plan(recipe_for(8, method, run={"device": "cuda", "memory": "1GiB", **run}), catalog)

    ties, iso_c = planned("ties"), planned("iso_c")
    assert (ties.sharers, ties.sizes.gpu_memory) == (4, 16 * 2**30)
    block = max(round_.block for round_ in ties.merges[0].rounds)
    assert 2**30 + (2 * 16 + 28) * block < ties.gpu_memory <= 4 * 2**30, "16 slices, the state, and the context"
    assert iso_c.gpu_memory > 2**30 + (60 + 28) * 2**25, "a whole matrix with its decomposition"
    assert iso_c.sharers == 16 * 2**30 // iso_c.gpu_memory < 4
    assert planned("ties", gpus_per_worker=0.5).sharers == 1, "the recipe says what each gets"
    with pytest.raises(RecipeError, match=r"run\.memory: .* is too little"):
        planned("iso_c", device="cpu")  # where a CPU would hold it
    on_cpu = make_plan(recipe_for(8, "ties"), catalog)
    assert (on_cpu.gpu_memory, on_cpu.sharers) == (0, 1)


@pytest.mark.parametrize(
    ("method", "arithmetic", "device"), [("ties", "exact", "cpu"), ("ties", "fast", "cuda"), ("iso_c", "exact", "cuda")]
)
def test_a_stored_plan_keeps_a_gpu_only_where_its_bytes_need_one(method: str, arithmetic: str, device: str) -> None:
    catalog = catalog_of([Parameter("p", (8192, 4096), "BF16", True)], 8)
    run = {"device": "cuda", "memory": "1GiB", "arithmetic": arithmetic}
    plan = make_plan(recipe_for(8, method, run=run), catalog)
    assert believable(plan).recipe.run.device == device


def test_blocks_on_a_gpu_are_powers_of_two_as_torch_pins_memory() -> None:
    catalog = catalog_of([Parameter("p", (8192, 4099), "BF16", True)], 8)
    for memory in ("300MiB", "700MiB", "2GiB"):
        plan = make_plan(recipe_for(8, "consensus", run={"device": "cuda", "memory": memory}), catalog)
        assert all(round_.block.bit_count() == 1 for round_ in plan.merges[0].rounds)


def test_blocks_that_stay_on_a_gpu_fit_its_share() -> None:
    catalog = catalog_of([Parameter("p", (8192, 4096), "BF16", True)], 600)
    plan = make_plan(recipe_for(600, "consensus", run={"device": "cuda"}), catalog)
    (round_,) = (each for each in plan.merges[0].rounds if each.kind == "merge")
    assert 600 * 2 * round_.block < 3 * 2**30 <= 2 * 600 * 2 * round_.block
    assert plan.sharers == 4


def test_too_little_memory_for_the_parts_is_refused() -> None:
    parameters = [Parameter("a", (300_000, 3000), "BF16", True)]
    with pytest.raises(RecipeError, match=r"run\.memory: .*128.* is too little beside 128 MiB of parts"):
        make_plan(recipe_for(run={"memory": "128MiB"}), catalog_of(parameters))


def test_what_decides_the_bytes_decides_the_run_id() -> None:
    parameters = [Parameter("a", (30, 3), "BF16", True)]
    catalog = catalog_of(parameters)
    plain = make_plan(recipe_for(), catalog).run_id
    same: list[dict[str, Any]] = [
        {"run": {"workers": 3, "memory": "1GiB", "executor": "local"}},
        {"output": "/elsewhere"},
        {"output": {"path": "/out", "part_size": "8MiB"}},
        {"storage": {"s3": {"endpoint_url": "http://localhost:1"}}},
    ]
    other: list[dict[str, Any]] = [
        {"method": {"name": "ties", "density": 0.21}},
        {"method": "average"},
        {"output": {"path": "/out", "dtype": "float32"}},
        {"output": {"path": "/out", "file_size": "4GB"}},
        {"exclude": ["b*"]},
        {"allow": {"nan": "zero"}},
    ]
    assert {make_plan(recipe_for(**more), catalog).run_id for more in same} == {plain}
    ids = [make_plan(recipe_for(**more), catalog).run_id for more in other]
    heavier = replace(catalog, models=(replace(catalog.models[0], weight=2.0), catalog.models[1]))
    swapped = replace(catalog, models=catalog.models[::-1])
    touched = replace(catalog.models[1], objects=(catalog.models[1].objects[0]._replace(etag="f"),))
    changed = replace(catalog, models=(catalog.models[0], touched))
    ids += [make_plan(recipe_for(), catalog).run_id for catalog in (heavier, swapped, changed)]
    assert len({plain, *ids}) == 1 + len(ids)


def test_a_merge_of_nothing_is_refused() -> None:
    parameters = [Parameter("a", (30, 3), "BF16", True)]
    catalog = catalog_of(parameters)
    weightless = replace(catalog, models=tuple(replace(model, weight=0.0) for model in catalog.models))
    with pytest.raises(RecipeError, match="models: all weights are zero; give at least one model a weight"):
        make_plan(recipe_for(), weightless)
    with pytest.raises(RecipeError, match="base: no parameter is left to merge; give the folders that hold"):
        make_plan(recipe_for(), catalog_of([Parameter("a", (30, 3), "BF16", False)]))


def test_a_base_without_elements_has_a_plan() -> None:
    made = make_plan(recipe_for(), catalog_of([Parameter("a", (0, 3), "BF16", True)]))
    assert made.bytes_read == 0


def test_a_round_that_gathers_may_need_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Round("gather", lambda deltas, context: Result(), unit=whole_matrices), *Average().rounds()
    monkeypatch.setattr(Average, "rounds", lambda self: rounds)
    parameters = [Parameter("p", (8, 4), "BF16", True), Parameter("q", (80, 4), "BF16", True)]
    (merge,) = make_plan(recipe_for(2, "average"), catalog_of(parameters, 2)).merges
    assert [round_.num_shards for round_ in merge.rounds] == [2, 1]
    first = merge.kind(0).shard(merge, merge.rounds[0], 0)
    assert first.segments == (Segment(1, 0, 320),), "the largest comes first"


def test_a_large_matrix_is_merged_model_by_model() -> None:
    parameters = [Parameter("p", (4096, 2048), "BF16", True)]
    many = make_plan(recipe_for(40, "iso_c", run={"memory": "4GiB"}), catalog_of(parameters, 40)).memory
    few = make_plan(recipe_for(2, "iso_c", run={"memory": "4GiB"}), catalog_of(parameters, 2)).memory
    assert abs(many - few) < 2**20
