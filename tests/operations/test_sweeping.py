"""Sweeps: each setting gets the bytes and the record that it gets alone, from one reading, whatever happens between."""

import csv
import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

import ties_ray
from tests.tools.adapters import make_pool
from tests.tools.families import Family, make_family
from tests.tools.merging import merge_and_die, read_tensors
from ties_ray.errors import InputError, RecipeError
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.operations import merging, sweeping
from ties_ray.planning.together import NOTHING
from ties_ray.recipe.settings import sweep_of
from ties_ray.reports import sweep as tables
from ties_ray.stores import Pin, Stores
from ties_ray.stores.local import Local

MakeFamily = Callable[..., Family]
LOCAL = {"executor": "local", "workers": 2}
TIES = {"name": "ties", "density": 0.2}
GRID = {"method.lambda": [0.3, 1.0], "method.density": [0.1, 0.5]}
SETTINGS: list[dict[str, Any]] = [
    {"name": "majority", "set": {"method.zero_sum": "majority"}},
    {"name": "sum", "set": {"method": {"name": "task_arithmetic", "lambda": 0.7}}},
    {"name": "random", "set": {"method": {"name": "dare", "density": 0.5, "lambda": 0.4}}},
    {"name": "matrices", "set": {"method": "iso_c"}},
    {"name": "twice", "set": {"method": "model_stock"}},
    {"name": "few", "set": {"models": {"not": ["1"], "weights": {"model-2": 0.5}}}},
    {"name": "wide", "set": {"output.dtype": "float32"}},
]


def digests(folder: Path | str) -> dict[str, str]:
    """Return the SHA-256 of every weight file, by name."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    assert paths
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def sweep_data(family: Family, folder: object, **more: Any) -> dict[str, Any]:
    return {
        "base": family.base,
        "models": list(family.models),
        "method": TIES,
        "output": {"path": f"{folder}/{{setting}}"},
        "run": LOCAL,
        **more,
    }


def demand_as_alone(data: dict[str, Any], folder: Path, alone: Path, sizes: Sizes = SIZES) -> None:
    """Merge each setting alone, elsewhere, and demand the bytes and the findings of the sweep."""
    planned = sweeping.plan(sweep_of(data))
    for setting, plan in zip(planned.settings, planned.plans, strict=True):
        output = plan.recipe.output.model_copy(update={"path": str(alone / setting.name)})
        one = merging.merge(plan.recipe.model_copy(update={"output": output}), sizes=sizes)
        assert digests(alone / setting.name) == digests(folder / setting.name), setting.name
        same = merging.merge(plan.recipe)
        assert same.reused, setting.name
        for field in ("effects", "trims", "statistics", "zeroed", "run_id"):
            assert getattr(same, field) == getattr(one, field), (setting.name, field)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_every_setting_has_the_bytes_and_the_findings_that_it_has_alone(
    dtype: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=4, hidden=48, dtype=dtype, smooth=dtype == "F32")
    data = sweep_data(family, tmp_path / "swept", grid=GRID, settings=SETTINGS)
    result = sweeping.sweep(sweep_of(data))
    assert len(result.rows) == 11
    demand_as_alone(data, tmp_path / "swept", tmp_path / "alone")


def test_a_sweep_of_one_method_reads_as_much_as_its_densest_merge(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=4, hidden=48, dtype="F32", smooth=True)
    grid = {"method.lambda": [0.1, 0.3, 1.0]}
    settings = [
        {"name": "sum", "set": {"method": {"name": "task_arithmetic"}}},
        {"name": "few", "set": {"models": {"not": ["0"]}}},
    ]
    data = sweep_data(family, tmp_path / "swept", settings=settings, grid=grid)
    result = sweeping.sweep(sweep_of(data))
    assert [row.setting for row in result.rows] == ["sum", "few", "lambda-0.1", "lambda-0.3", "lambda-1.0"]
    alone = merging.merge(sweeping.plan(sweep_of({**data, "output": f"{tmp_path}/alone/{{setting}}"})).plans[-1].recipe)
    assert result.bytes_read == alone.bytes_read > 0


@pytest.mark.parametrize("seed", range(3))
def test_random_settings_under_random_cuts(seed: int, family_of: MakeFamily, tmp_path: Path) -> None:
    draw = random.Random(seed)
    family = family_of(num_models=5, hidden=32)
    settings = draw.sample(SETTINGS, 3)
    grid = {"method.lambda": [draw.uniform(0.1, 1)], "method.density": draw.sample([0.05, 0.1, 0.4, 0.9, 1], 2)}
    data = sweep_data(family, tmp_path / "swept", settings=settings, grid=grid)
    sizes = Sizes(least_part=2**12, most_part=2**draw.randrange(12, 15), max_shard=2**14, max_range=2**12,
                  min_range=2**10, model_group=draw.choice([2, 32]), max_block=2**11, least_block=2**8,
                  max_local_block=2**11, least_local_block=2**8)  # fmt: skip
    sweeping.sweep(sweep_of(data), sizes=sizes)
    demand_as_alone(data, tmp_path / "swept", tmp_path / "alone")


def test_values_that_are_not_finite_count_in_every_setting(tmp_path: Path) -> None:
    family = make_family(Stores({}).of("/"), str(tmp_path / "family"), num_models=3)
    path = Path(family.models[1]) / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in family.model_tensors[1].items()}
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() > 4)
    tensors[name].view(-1)[:3] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    grid = {"method.lambda": [0.3, 1.0], "method.density": [0.1, 1.0]}
    data = sweep_data(family, tmp_path / "swept", grid=grid, allow={"nan": "zero"}, settings=[SETTINGS[1]])
    sweeping.sweep(sweep_of(data))
    demand_as_alone(data, tmp_path / "swept", tmp_path / "alone")
    result = merging.merge(sweeping.plan(sweep_of(data)).plans[-1].recipe)
    assert list(result.zeroed.values()) == [3]


def test_controls_leave_models_out_and_draw_subsets_by_seed(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=4, hidden=32)
    controls = {"leave_one_out": True, "subsets": {"k": 2, "n": 2, "seed": 7}}
    data = sweep_data(family, tmp_path / "swept", controls=controls)
    result = sweeping.sweep(sweep_of(data))
    assert [row.setting for row in sorted(result.rows, key=lambda row: row.setting)] == [
        "all", "subset-0", "subset-1", "without-0", "without-1", "without-2", "without-3",
    ]  # fmt: skip
    assert {row.setting: row.num_models for row in result.rows}["without-0"] == 3
    demand_as_alone(data, tmp_path / "swept", tmp_path / "alone")
    again = [setting.set for setting in sweep_of(data).all(["0", "1", "2", "3"])]
    other = sweep_of({**data, "controls": {"subsets": {"k": 2, "n": 2, "seed": 8}}}).all(["0", "1", "2", "3"])
    assert again == [setting.set for setting in sweep_of(data).all(["0", "1", "2", "3"])]
    assert [setting.set for setting in other][1:] != again[5:]


@pytest.mark.parametrize("kind", ["delta", "adapter"])
def test_adapters_are_swept_into_deltas_and_adapters(kind: str, tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path / "pool"), num_adapters=4, dense=False)
    data = {
        "models": list(pool.adapters),
        "method": TIES,
        "output": {"kind": kind, "path": f"{tmp_path}/swept/{{setting}}", **({"rank": 4} if kind == "adapter" else {})},
        "grid": GRID,
        "run": LOCAL,
    }
    sweeping.sweep(sweep_of(data))
    demand_as_alone(data, tmp_path / "swept", tmp_path / "alone")


def test_weights_of_rank_components_are_not_shared(tmp_path: Path) -> None:
    """Both settings read the same files, and their changes differ."""
    pool = make_pool(Stores({}).of("/"), str(tmp_path / "pool"), num_adapters=2, ranks=(4,), dense=False)
    for name, second in (("first", 0.25), ("second", 1.0)):
        names = {"models": json.dumps(["0"]), "patterns": json.dumps(["*"])}
        save_file({"ranks": torch.tensor([[[1.0, second, second, 2.0]]])}, tmp_path / f"{name}.safetensors", names)
    settings = [{"name": name, "set": {"coefficients.file": f"{tmp_path}/{name}.safetensors"}}
                for name in ("first", "second")]  # fmt: skip
    data = {
        "models": list(pool.adapters),
        "method": TIES,
        "output": {"kind": "delta", "path": f"{tmp_path}/swept/{{setting}}"},
        "settings": settings,
        "run": LOCAL,
    }
    sweeping.sweep(sweep_of(data))
    assert digests(tmp_path / "swept/first") != digests(tmp_path / "swept/second")
    demand_as_alone(data, tmp_path / "swept", tmp_path / "alone")


POINTS: dict[str, dict[str, object]] = {
    "before the first record": {"what": "put", "uri": "*/records/0/*"},
    "between two barriers": {"when": "after", "what": "put", "uri": "*/folded/0/*", "count": 2},
    "inside the merge": {"what": "write_part", "count": 3},
    "between two records": {"when": "after", "what": "put", "uri": "*/records/2/*", "count": 2},
    "between two results": {"when": "after", "what": "put", "uri": "*/ties-ray.result.json", "count": 1},
}


@pytest.mark.parametrize("name", POINTS)
def test_a_killed_sweep_goes_on_and_has_the_same_bytes(
    name: str, family_of: MakeFamily, tmp_path: Path, plugged: Path
) -> None:
    family = family_of(num_models=3, hidden=48, dtype="F32", smooth=True)
    grid = {"method.lambda": [0.3, 1.0], "method.density": [0.1, 0.4]}
    whole = sweep_data(family, tmp_path / "whole", grid=grid)
    sweeping.sweep(sweep_of(whole))
    point = {**POINTS[name], "marker": str(tmp_path / "died")}
    frail = sweep_data(family, f"frail://{tmp_path}/swept", grid=grid, storage={"frail": point})
    assert merge_and_die(frail, plugged) == -9
    result = sweeping.sweep(sweep_of(frail))
    assert (tmp_path / "died").exists()
    for row in result.rows:
        assert digests(tmp_path / "swept" / row.setting) == digests(tmp_path / "whole" / row.setting), row.setting
    assert sum(row.reused for row in result.rows) == (1 if name == "between two results" else 0)
    assert all(row.reused for row in sweeping.sweep(sweep_of(frail)).rows)


def test_a_table_that_cant_be_read_is_made_anew_by_sweeping_again(family_of: MakeFamily, tmp_path: Path) -> None:
    data = sweep_data(family_of(num_models=2), tmp_path / "swept", grid={"method.density": [0.1, 0.5]})
    rows = sweeping.sweep(sweep_of(data)).rows
    whole = (tmp_path / "swept/results.json").read_text()
    for fresh, text in ((False, "[]"), (True, re.sub('"seconds": [0-9.]+', '"seconds": NaN', whole))):
        (tmp_path / "swept/results.json").write_text(text)
        with pytest.raises(InputError, match=r"can't read the results of a sweep .*sweep again"):
            tables.read(Stores({}), str(tmp_path / "swept"))
        sweeping.sweep(sweep_of(data), fresh=fresh)
        table = tables.read(Stores({}), str(tmp_path / "swept"))
        assert [row.run_id for row in table.rows] == [row.run_id for row in rows]


@pytest.mark.parametrize(
    "point", [{"what": "complete_upload"}, {"when": "after", "what": "put", "uri": "*/records/0/*"}]
)
def test_a_setting_that_was_begun_alone_is_finished_by_the_sweep(
    point: dict[str, object], family_of: MakeFamily, tmp_path: Path, plugged: Path
) -> None:
    family = family_of(hidden=724, shards=3, dtype="F32", smooth=True)
    grid = {"method.lambda": [0.3, 1.0]}
    data = sweep_data(family, f"frail://{tmp_path}/swept", grid=grid)
    frail = {**data, "storage": {"frail": {**point, "marker": str(tmp_path / "died")}}}
    first = sweeping.plan(sweep_of(frail)).plans[0]
    assert merge_and_die(first.recipe, plugged) == -9
    result = sweeping.sweep(sweep_of(frail))
    whole = sweeping.sweep(sweep_of(sweep_data(family, tmp_path / "whole", grid=grid)))
    for row, other in zip(result.rows, whole.rows, strict=True):
        assert digests(tmp_path / "swept" / row.setting) == digests(other.output)
    records = [merging.merge(plan.recipe) for plan in sweeping.plan(sweep_of(frail)).plans]
    assert records[0].trims == records[1].trims


def test_too_little_memory_to_hold_slices_changes_no_byte_and_is_said(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=4, hidden=400)
    run = {**LOCAL, "workers": 1, "memory": "128MiB", "cache": 0}
    data = sweep_data(family, tmp_path / "swept", grid=GRID, run=run)
    planned = sweeping.plan(sweep_of(data))
    starved = [plan.recipe.run.memory - plan.memory for plan in planned.plans]
    result = sweeping.sweep(sweep_of(data))
    assert min(starved) >= 0
    assert planned.record().memory <= 128 * 2**20
    assert result.bytes_read >= planned.record().bytes_read
    demand_as_alone(data, tmp_path / "swept", tmp_path / "alone")


def test_nothing_held_gives_the_same_bytes(
    family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(num_models=3, hidden=32)
    for folder in ("held", "not-held"):
        sweeping.sweep(sweep_of(sweep_data(family, tmp_path / folder, grid=GRID)))
        monkeypatch.setattr(sweeping, "room_for", lambda plans: (NOTHING, 0))
    for path in (tmp_path / "held").iterdir():
        if path.is_dir():
            assert digests(path) == digests(tmp_path / "not-held" / path.name)


def test_workers_on_ray_sweep_too(family_of: MakeFamily, tmp_path: Path, ray_cluster: None) -> None:
    family = family_of(num_models=3, hidden=48)
    data = sweep_data(family, tmp_path / "swept", grid=GRID, run={"executor": "ray", "workers": 2})
    sweeping.sweep(sweep_of(data))
    demand_as_alone({**data, "run": LOCAL}, tmp_path / "swept", tmp_path / "alone")


def test_the_table_has_a_row_a_setting_in_all_its_forms(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    settings = [{"name": "soft", "set": {"method.lambda": 0.5}}, {"name": "few", "set": {"models": {"only": ["0"]}}}]
    result = ties_ray.sweep(sweep_data(family, tmp_path / "swept", settings=settings))
    assert result == tables.read(Stores({}), str(tmp_path / "swept"))
    assert [Path(uri).name for uri in result.table_files] == ["results.csv", "results.parquet", "results.json"]
    with (tmp_path / "swept/results.csv").open() as file:
        rows = {row["setting"]: row for row in csv.DictReader(file)}
    assert rows["soft"]["method.lambda"] == "0.5"
    assert rows["few"]["method.lambda"] == ""
    assert json.loads(rows["few"]["models"]) == {"only": ["0"]}
    columns = parquet.read_table(tmp_path / "swept/results.parquet").to_pydict()
    assert sorted(columns["setting"]) == ["few", "soft"]
    assert dict(zip(columns["setting"], columns["num_models"], strict=True)) == {"few": 1, "soft": 3}
    assert len(result.to_dataframe()) == 2
    norms = {row.setting: row.norm for row in result.rows}
    of_base = read_tensors(family.base)
    changes = [
        (tensor.double() - of_base[name].double()).norm() ** 2
        for name, tensor in read_tensors(tmp_path / "swept/few").items()
    ]
    assert norms["few"] == pytest.approx(float(torch.stack(changes).sum().sqrt()), rel=0.05)


def test_a_setting_that_overflows_is_named(tmp_path: Path) -> None:
    family = make_family(Stores({}).of("/"), str(tmp_path / "family"), dtype="F16")
    settings = [{"name": "small", "set": {"method.lambda": 0.1}}, {"name": "huge", "set": {"method.lambda": 1e30}}]
    data = sweep_data(family, tmp_path / "swept", settings=settings, method="task_arithmetic")
    with pytest.raises(InputError, match=r"swept/huge: .*overflow"):
        sweeping.sweep(sweep_of(data))


def test_settings_that_cannot_be_are_all_named_before_anything_is_written(
    family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=3)
    settings = [
        {"name": "a", "set": {"method.densty": 0.5}},
        {"name": "b", "set": {"models": {"not": ["nobody"]}}},
        {"name": "c", "set": {"models": {"not": ["*"]}}},
        {"name": "d", "set": {"run.workers": 3}},
    ]
    with pytest.raises(RecipeError) as caught:
        sweeping.plan(sweep_of(sweep_data(family, tmp_path / "swept", settings=settings)))
    text = str(caught.value)
    for expected in ("settings.a: method.densty", "'nobody'", "no model is left", "settings.d: sets `run`"):
        assert expected in text
    assert not (tmp_path / "swept").exists()


def test_no_setting_writes_into_an_input(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=2)
    folder, _, name = family.models[1].rpartition("/")
    settings = [{"name": "fine", "set": {}}, {"name": name, "set": {"method.lambda": 0.5}}]
    data = sweep_data(family, tmp_path / "swept", settings=settings) | {"output": f"{folder}/{{setting}}"}
    with pytest.raises(RecipeError, match=f"{name} and the input .*lie in each other"):
        sweeping.plan(sweep_of(data))


def test_settings_of_other_models_ask_for_each_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path / "pool"), num_adapters=6, dense=False)
    asked: list[str] = []
    head = Local.head

    def noted(store: Local, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        asked.append(uri)
        return head(store, uri, nbytes)

    monkeypatch.setattr(Local, "head", noted)
    data = {
        "base": pool.base,
        "models": list(pool.adapters),
        "method": TIES,
        "output": {"path": f"{tmp_path}/swept/{{setting}}"},
        "controls": {"leave_one_out": True},
        "run": LOCAL,
    }
    assert len(sweeping.plan(sweep_of(data)).plans) == 7
    weights = [uri for uri in asked if uri.endswith(".safetensors")]
    assert sorted(weights) == sorted(set(weights))
    assert len(weights) == 7
