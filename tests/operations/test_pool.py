"""Living pools: whatever comes, goes, is killed or happens at once, the result has the bytes of a merge of all."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ties_ray
from tests.conftest import Bucket
from tests.tools.adapters import make_pool
from tests.tools.families import Family, make_family
from tests.tools.merging import LOCAL, digests, merge_and_die
from ties_ray.errors import InputError, MergeError, RecipeError, UnavailableError
from ties_ray.operations import merging
from ties_ray.operations.pool import Pool, open_pool
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import Progress
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]
TIES = {"name": "ties", "density": 0.3}
METHODS: list[Any] = [
    TIES,
    {"name": "dare", "density": 0.5, "lambda": 0.7},
    "model_stock",
    "consensus",
]


def recipe_of(family: Family, folder: object, models: object, method: object = TIES, **more: Any) -> dict[str, Any]:
    return {"base": family.base, "models": models, "method": method, "output": str(folder), "run": LOCAL, **more}


def demand_a_merge_of_all(pool: Pool, uris: list[str], folder: Path) -> None:
    """Demand that a pool's result has the bytes of one merge of these models, in this order."""
    recipe = pool.recipe()
    assert [entry["path"] for entry in recipe["models"]] == uris
    recipe["output"]["path"], recipe["run"] = str(folder), LOCAL
    merging.merge(validate({**recipe, "storage": pool.settings.storage}))
    result = pool.record().result.removeprefix("frail://")
    files = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert files
    assert files == {path.name: path.read_bytes() for path in Path(result).glob("*.safetensors")}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method if isinstance(method, str) else method["name"])
def test_random_additions_and_drops_give_the_bytes_of_one_merge(
    method: object, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=8, dtype="BF16")
    draw, held, free = random.Random(str(method)), list(family.models[:2]), list(family.models[2:])
    pool = open_pool(recipe_of(family, tmp_path / "pool", list(held), method))
    pool.add()
    for step in range(4):
        if free and (len(held) < 3 or draw.random() < 0.6):
            new = [free.pop(draw.randrange(len(free))) for _ in range(min(len(free), draw.choice([1, 1, 2])))]
            change = pool.add(new)
            held += new
            assert bool(change.again) == (method == "consensus")
        else:
            gone = draw.sample(held, 1)
            erase = draw.random() < 0.5
            pool.drop(gone, erase=erase)
            held = [uri for uri in held if uri not in gone]
            free += gone
        demand_a_merge_of_all(pool, held, tmp_path / f"whole-{step}")
    assert verify(Stores({}), pool.record().result, sample=1.0).problems == []


@pytest.mark.parametrize("kind", ["delta", "adapter"])
def test_a_pool_of_adapters_counts_each_once(kind: str, tmp_path: Path) -> None:
    """Thresholds come from the pool's cache, also where all are merged again."""
    made = make_pool(Stores({}).of("/"), str(tmp_path / "made"), num_adapters=5, dense=False)
    output = {"path": str(tmp_path / "pool"), "kind": kind, **({"rank": 8} if kind == "adapter" else {})}
    recipe = {"base": made.base, "models": list(made.adapters[:3]), "method": TIES, "output": output, "run": LOCAL}
    pool = open_pool(recipe)
    pool.add()
    change = pool.add([made.adapters[3]])
    assert bool(change.again) == (kind == "adapter")
    assert ("no state by element" in change.reason) == (kind == "adapter")
    pool.drop([made.adapters[0]])
    uris = list(made.adapters[1:4])
    demand_a_merge_of_all(pool, uris, tmp_path / "whole")
    plan = json.loads((tmp_path / "pool" / "pool.json").read_text())
    identities = {member["cached"] for member in plan["members"]}
    assert all(any((tmp_path / "pool/cache").glob(f"{identity}-*")) for identity in identities)


def test_a_drop_goes_on_from_the_last_result_before_the_model(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=6)
    pool = open_pool(recipe_of(family, tmp_path / "pool", list(family.models[:2])))
    pool.add()
    for uri in family.models[2:5]:
        pool.add([uri])
    rows = {row.uri: row.drop_reads for row in pool.record().members}
    assert [rows[uri] for uri in family.models[:5]] == [4, 4, 2, 1, 0]
    last = pool.plan_drop([family.models[4]])
    assert last.plan is None, "the result before is there"
    change = pool.drop(["3"])
    assert (change.again, change.bytes_read > 0) == ([family.models[4]], True)
    assert change.reason == "they come after 3"
    demand_a_merge_of_all(pool, [*family.models[:3], family.models[4]], tmp_path / "whole")
    assert pool.drop(["4"]).again == []


POINTS: dict[str, dict[str, object]] = {
    "before the first record": {"what": "put", "uri": "*/records/0/*"},
    "inside the merge": {"what": "write_part"},
    "before the state": {"what": "put", "uri": "*/state/*"},
    "before the result record": {"what": "put", "uri": "*/ties-ray.result.json"},
    "before the document": {"what": "put", "uri": "*/pool.json"},
    "after the document": {"when": "after", "what": "put", "uri": "*/pool.json"},
}


@pytest.mark.parametrize(
    ("act", "name"),
    [
        ("add", "before the first record"),
        ("add", "before the state"),
        ("add", "before the document"),
        ("add", "after the document"),
        ("drop", "inside the merge"),
        ("drop", "before the result record"),
        ("drop", "after the document"),
    ],
)
def test_a_killed_command_is_continued_by_the_same_command(
    act: str, name: str, family_of: MakeFamily, tmp_path: Path, plugged: Path
) -> None:
    family = family_of(num_models=4)
    recipe = recipe_of(family, f"frail://{tmp_path}/pool", list(family.models[:3]))
    open_pool({**recipe, "storage": {"frail": {}}}).add()
    frail = {**recipe, "storage": {"frail": {**POINTS[name], "marker": str(tmp_path / "died")}}}
    names = [family.models[3]] if act == "add" else [family.models[1]]
    assert merge_and_die({"pool": frail, act: names}, plugged) == -9
    pool = open_pool(frail)
    done = pool.add(names) if act == "add" else pool.drop(names, erase=True)
    again = pool.add(names) if act == "add" else pool.drop(names, erase=True)
    assert (done.done, again.added, again.dropped, again.bytes_read) == (True, [], [], 0)
    left = [*family.models] if act == "add" else [family.models[0], family.models[2]]
    demand_a_merge_of_all(pool, left, tmp_path / "whole")
    assert pool.record().leftovers == []


@pytest.mark.parametrize("act", ["before the first record", "before the document"])
def test_a_pool_whose_first_merge_was_killed_is_made_by_the_same_command(
    act: str, family_of: MakeFamily, tmp_path: Path, plugged: Path
) -> None:
    family = family_of(num_models=3)
    frail = recipe_of(family, f"frail://{tmp_path}/pool", list(family.models))
    frail["storage"] = {"frail": {**POINTS[act], "marker": str(tmp_path / "died")}}
    assert merge_and_die({"pool": frail}, plugged) == -9
    open_pool(frail).add()
    demand_a_merge_of_all(open_pool(frail), list(family.models), tmp_path / "whole")


def meanwhile(stage: str, act: Callable[[], object]) -> Callable[[Progress], None]:
    """Return a watch that does something once, as soon as a merge reaches a stage."""
    left = [act]

    def watch(progress: Progress) -> None:
        if progress.stage == stage and left:
            left.pop()()

    return watch


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [*((first, second, "disk") for first in ("add", "drop") for second in ("add", "drop")), ("drop", "add", "bucket")],
)
def test_of_two_commands_at_once_the_second_goes_on_from_the_first(
    first: str, second: str, where: str, s3_bucket: Bucket, family_of: MakeFamily, tmp_path: Path
) -> None:
    folder, storage = (str(tmp_path / "pool"), {}) if where == "disk" else (f"{s3_bucket.uri}/pool", s3_bucket.storage)
    stores = Stores(storage)
    family = family_of(num_models=5)
    if where == "bucket":
        family = make_family(stores.of(folder), f"{s3_bucket.uri}/family", num_models=5)
    recipe = recipe_of(family, folder, list(family.models[:3]), storage=storage)
    mine, other = open_pool(recipe), open_pool(recipe)
    mine.add()

    def change(pool: Pool, act: str, number: int, **more: Any) -> object:
        if act == "add":
            return pool.add([family.models[number + 2]], **more)
        return pool.drop([family.models[number]], **more)

    change(mine, first, 1, watch=meanwhile("publish", lambda: change(other, second, 2)))
    left = set(family.models[:3])
    for number, act in ((1, first), (2, second)):
        left = left | {family.models[number + 2]} if act == "add" else left - {family.models[number]}
    record = mine.record()
    assert {row.uri for row in record.members} == left
    assert record.leftovers == []
    recipe = {**mine.recipe(), "run": LOCAL, "storage": storage}
    recipe["output"]["path"] = f"{folder}-whole"
    merging.merge(validate(recipe))
    files = [
        [stores.of(folder).get(f"{uri}/model.safetensors", 2**30)[1]] for uri in (record.result, f"{folder}-whole")
    ]
    assert files[0] == files[1]


def test_the_same_models_added_twice_at_once_are_added_once(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    recipe = recipe_of(family, tmp_path / "pool", list(family.models[:2]))
    mine, other, refused = open_pool(recipe), open_pool(recipe), list[str]()
    mine.add()
    plan = mine.plan_add([family.models[2]]).plan
    assert plan

    def same() -> None:
        with pytest.raises(UnavailableError, match="another run is at work there") as caught:
            other.add([family.models[2]])
        refused.append(str(caught.value))

    mine.add([family.models[2]], watch=meanwhile("publish", same))
    assert refused
    assert other.add([family.models[2]]).present == 1
    assert [row.uri for row in other.record().members] == list(family.models)


def test_after_an_erasing_drop_nothing_in_the_pool_holds_the_model(tmp_path: Path) -> None:
    made = make_pool(Stores({}).of("/"), str(tmp_path / "made"), num_adapters=4, dense=False)
    output = {"path": str(tmp_path / "pool"), "kind": "delta"}
    recipe = {"base": made.base, "models": list(made.adapters[:2]), "method": TIES, "output": output, "run": LOCAL}
    pool = open_pool(recipe)
    pool.add()
    pool.add([made.adapters[2]])
    pool.add([made.adapters[3]])
    withdrawn = made.adapters[2]
    cached = json.loads((tmp_path / "pool/pool.json").read_text())["members"][2]["cached"]
    change = pool.drop([withdrawn])
    assert len([each for each in change.remains if "/results/" in each]) == 2
    assert any(cached in each for each in change.remains)
    held = verify(Stores({}), change.remains[0])
    assert [problem.where for problem in held.problems] == [withdrawn]
    change = pool.drop([withdrawn], erase=True)
    assert len(change.erased) >= 3
    texts = {path: path.read_bytes() for path in (tmp_path / "pool").rglob("*") if path.is_file()}
    naming = [path.name for path, data in texts.items() if withdrawn.encode() in data or cached in path.name]
    assert naming == ["pool.json"], "its name is all that stays"
    assert not any((tmp_path / "pool/cache").glob(f"{cached}-*"))
    checked = verify(Stores({}), pool.record().result)
    assert (checked.problems, checked.absent, len(checked.members)) == ([], [withdrawn], 3)
    assert [row.num_models for row in pool.record().results] == [2, 3]
    demand_a_merge_of_all(pool, [*made.adapters[:2], made.adapters[3]], tmp_path / "whole")


def test_a_result_with_other_models_than_the_document_is_told(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    pool = open_pool(recipe_of(family, tmp_path / "pool", list(family.models)))
    pool.add()
    path = tmp_path / "pool/pool.json"
    data = json.loads(path.read_text())
    data["dropped"] = [{"member": {**data["members"][1], "number": 3}, "dropped": ""}]
    data["members"][2]["pins"][0][1] += 1
    path.write_text(json.dumps({**data, "next_number": 4}))
    checked = verify(Stores({}), pool.record().result)
    assert [(each.where, each.what) for each in checked.problems] == [
        (family.models[2], "its plan names other files for 2 than pool.json")
    ]
    data["dropped"][0]["member"]["entry"] = {"path": "/elsewhere"}
    path.write_text(json.dumps({**data, "next_number": 4}))
    checked = verify(Stores({}), pool.record().result)
    assert "/elsewhere" in {each.where for each in checked.problems}, "a copy elsewhere has the same content"


def test_results_are_removed_but_for_the_last_ones(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=4)
    pool = open_pool(recipe_of(family, tmp_path / "pool", [family.models[0]]))
    pool.add()
    for uri in family.models[1:]:
        pool.add([uri])
    (tmp_path / "pool/results/0123456789abcdef/.ties-ray").mkdir(parents=True)
    (tmp_path / "pool/results/photos").mkdir()
    assert len(pool.clean(2, remove=False).found) == 3
    assert len(list((tmp_path / "pool/results").iterdir())) == 6
    assert len(pool.clean(2).found) == 3
    assert len(pool.record().results) == 2
    assert {path.name for path in (tmp_path / "pool/results").iterdir()} == {
        "photos", *(row.run_id for row in pool.record().results)
    }  # fmt: skip
    demand_a_merge_of_all(pool, list(family.models), tmp_path / "whole")
    with pytest.raises(RecipeError, match="keep at least one"):
        pool.clean(0)


def test_what_does_not_fit_the_pool_is_refused(tmp_path: Path) -> None:
    family = make_family(Stores({}).of("/"), str(tmp_path / "family"), num_models=4)
    recipe = recipe_of(family, tmp_path / "pool", list(family.models[:2]))
    with pytest.raises(InputError, match="holds no pool; `ties-ray pool add RECIPE` makes one"):
        open_pool(str(tmp_path / "pool")).record()
    open_pool(recipe).add()
    other = {**recipe, "method": {**TIES, "density": 0.4}}
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: open_pool(other).add([family.models[2]]), "method: is not that of the pool"),
        (lambda: open_pool(recipe).drop(["9"]), "no member has an id or a path like '9'"),
        (lambda: open_pool(recipe).drop(["*"]), "no model is left in the pool"),
        (lambda: open_pool(recipe).add([{"path": family.models[0], "weight": 2}]), "a member with other numbers"),
        (lambda: open_pool(str(tmp_path / "pool")).add(), "none is named"),
        (lambda: open_pool({**recipe, "continues": str(tmp_path)}), "leave out `continues`"),
        (lambda: open_pool({**recipe, "output": f"{tmp_path}/{{run_id}}"}), r"leave out `continues` and \{run_id\}"),
        (lambda: open_pool(recipe).add([str(tmp_path / "nothing")]), "nothing"),
    ]
    before = (tmp_path / "pool/pool.json").read_bytes()
    for act, message in cases:
        with pytest.raises(MergeError, match=message):
            act()
    (Path(family.models[0]) / "model.safetensors").touch()
    for act in (lambda: open_pool(recipe).add([family.models[0]]), lambda: open_pool(recipe).drop(["1"])):
        with pytest.raises(InputError, match="has changed since it was added; drop it and add it again"):
            act()
    assert (tmp_path / "pool/pool.json").read_bytes() == before
    open_pool(recipe).drop(["0"])
    open_pool(recipe).add([family.models[0]])
    (Path(family.base) / "model.safetensors").touch()
    with pytest.raises(InputError, match="has changed since the pool was made"):
        open_pool(recipe).add([family.models[2]])


def test_in_python_a_pool_is_a_folder_a_recipe_or_its_file(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=4)
    recipe = recipe_of(family, tmp_path / "pool", list(family.models[:2]))
    (tmp_path / "pool.json").write_text(json.dumps(recipe))
    assert ties_ray.pool(recipe).add().added == list(family.models[:2])
    assert ties_ray.pool(tmp_path / "pool.json").add([family.models[2]]).added == [family.models[2]]
    pool = ties_ray.pool(tmp_path / "pool", run={"executor": "local"})
    assert pool.add([{"path": family.models[3], "id": "last"}]).added == [family.models[3]]
    assert [row.id for row in pool.record().members] == ["0", "1", "2", "last"]
    assert digests(pool.record().result)
