"""A merge that keeps its state can take in further models, with the bytes of one merge of all."""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools.adapters import make_pool
from tests.tools.families import Family
from tests.tools.merging import LOCAL, digests, draw_sizes
from ties_ray.errors import InputError, RecipeError
from ties_ray.layout.sizes import SIZES
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import Progress
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]
METHODS: list[dict[str, object]] = [
    {"name": "average"},
    {"name": "task_arithmetic", "lambda": 0.3},
    {"name": "ties", "density": 0.3},
    {"name": "ties", "density": 0.3, "merge": "max"},
    {"name": "ties", "density": 0.3, "zero_sum": "majority", "trim": "tensor"},
    {"name": "dare", "density": 0.5},
    {"name": "dare", "density": 0.5, "combine": "ties"},
    {"name": "emr"},
]
ALL_STATES: list[dict[str, object]] = [
    {"name": "task_arithmetic", "vectors": "weights"},
    {"name": "ties", "density": 0.3, "at_threshold": "exact"},
    {"name": "ties", "density": 0.3, "at_threshold": "exact", "vote": "plain", "rescale": "l1"},
    {"name": "ties", "density": 0.3, "vote": "count", "zero_sum": "majority"},
    {"name": "ties", "density": 0.3, "merge": "max", "zero_sum": "majority"},
    {"name": "ties", "density": 0.3, "profile": "mergekit", "rescale": "l1"},
    {"name": "dare", "rescale": "l1", "combine": "ties", "vote": "count"},
    {"name": "breadcrumbs", "gamma": 0.1, "scope": "row", "merge": "mean"},
    {"name": "breadcrumbs", "gamma": 0.1, "combine": "ties", "merge": "mean", "rescale": "l1"},
    {"name": "della"},
    {"name": "della", "combine": "linear", "rescale": "l1"},
    {"name": "fisher"},
    {"name": "fisher", "normalize": False, "floor": 0},
    {"name": "iso_c"},
    {"name": "star"},
    {"name": "twin"},
    {"name": "lines"},
    {"name": "magmax"},
    {"name": "ram"},
    {"name": "negmerge"},
    {"name": "model_stock"},
    {"name": "model_stock", "scope": "row"},
    {"name": "opcm"},
    {"name": "wudi", "steps": 5},
    {"name": "wudi", "solver": "minimum"},
]
"""Settings of methods that are tried on one kind of family."""
UNWEIGHTED = ("emr", "magmax", "model_stock", "negmerge", "opcm", "ram")
WITHOUT_LAMBDA = ("lines", "model_stock")
BF16: dict[str, object] = {"dtype": "BF16"}
MIXED: dict[str, object] = {"mixed": True, "shards": 2}


def recipe_of(base: str, models: list[object], output: Path, method: object, **more: object) -> dict[str, object]:
    written = {"path": str(output), "state": bool(more.pop("state", False)), "kind": more.pop("kind", "checkpoint")}
    return {"base": base, "models": models, "method": method, "output": written, "run": LOCAL, **more}


def weighted(uris: tuple[str, ...], method: dict[str, object]) -> list[object]:
    weights = [1] * 6 if method["name"] in UNWEIGHTED else [1, 2, 0.5, 1, 3, 1]
    if method["name"] == "lines":  # only the last models differ in weight
        weights = [1, 1, 1, 1, 3, 1]
    return [{"path": uri, "weight": weight} for uri, weight in zip(uris, weights, strict=True)]


def informed(models: list[object], family: Family, folder: Path) -> list[object]:
    """Return models with random Fisher information, some of it zero."""
    generator, made = torch.Generator().manual_seed(5), []
    for number, model in enumerate(models):
        tensors = {
            name: (torch.randn(value.shape, generator=generator).square().clamp_(min=1) - 1) * 2.0**number
            for name, value in family.base_tensors.items()
            if value.is_floating_point()
        }
        (folder / f"fisher-{number}").mkdir()
        save_file(tensors, folder / f"fisher-{number}" / "values.safetensors")
        assert isinstance(model, dict)
        made.append({**model, "with": {"fisher": str(folder / f"fisher-{number}")}})
    return made


def name_of(value: object) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(
    ("method", "how"),
    [*itertools.product(METHODS, (BF16, MIXED)), *zip(ALL_STATES, itertools.cycle((MIXED, BF16)), strict=False)],
    ids=name_of,
)
def test_three_models_then_one_then_two_are_six_at_once(
    method: dict[str, object], how: dict[str, object], family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=6, **how)
    models = weighted(family.models, method)
    if method["name"] == "fisher":
        models = informed(models, family, tmp_path)
    merging.merge(validate(recipe_of(family.base, models, tmp_path / "whole", method)))
    steps = [("a", models[:3], None), ("b", models[3:4], "a"), ("c", models[4:], "b")]
    other = method if method["name"] in WITHOUT_LAMBDA else {**method, "lambda": 0.625}
    for seed, (name, own, before) in enumerate(steps):
        more = {"continues": str(tmp_path / before)} if before else {}
        rules = method if name == "c" else other
        recipe = recipe_of(family.base, own, tmp_path / name, rules, state=name != "c", **more)
        merging.merge(validate(recipe), sizes=SIZES if name == "c" else draw_sizes(random.Random(seed)))
    assert digests(tmp_path / "c") == digests(tmp_path / "whole")
    assert verify(Stores({}), str(tmp_path / "c"), sample=1.0).problems == []


def test_models_that_are_merged_are_not_read_again(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=6)
    merging.merge(validate(recipe_of(family.base, list(family.models[:5]), tmp_path / "a", "average", state=True)))
    recipe = recipe_of(family.base, list(family.models[5:]), tmp_path / "b", "average", continues=str(tmp_path / "a"))
    plan = merging.plan(validate(recipe))
    assert [model.id for model in plan.catalog.models] == ["5"]
    assert plan.catalog.earlier
    assert [member.id for member in plan.catalog.earlier.members] == ["0", "1", "2", "3", "4"]
    pins = [pin.uri for model in plan.catalog.models for pin in model.objects]
    assert not any(uri in pin for pin in pins for uri in family.models[:5])


def test_another_lambda_is_another_output_of_the_same_state(family_of: MakeFamily, tmp_path: Path) -> None:
    family, method = family_of(num_models=4), {"name": "ties", "density": 0.3}
    first = recipe_of(family.base, list(family.models[:3]), tmp_path / "a", method, state=True)
    merging.merge(validate(first))
    half = {**method, "lambda": 0.5}
    last = recipe_of(family.base, list(family.models[3:]), tmp_path / "b", half, continues=str(tmp_path / "a"))
    merging.merge(validate(last))
    merging.merge(validate(recipe_of(family.base, list(family.models), tmp_path / "whole", half)))
    assert digests(tmp_path / "b") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ({"name": "ties", "density": 0.4}, "checkpoint"),
        ({"name": "ties", "density": 0.4}, "delta"),
        ({"name": "breadcrumbs", "gamma": 0.1}, "delta"),
        ({"name": "della", "rescale": "l1"}, "delta"),
        ({"name": "iso_c"}, "checkpoint"),
        ({"name": "model_stock"}, "checkpoint"),
        ({"name": "model_stock", "scope": "row"}, "delta"),
        ({"name": "opcm"}, "checkpoint"),
        ({"name": "wudi", "steps": 3}, "checkpoint"),
    ],
    ids=name_of,
)
def test_a_pool_of_adapters_grows_into_modules_that_none_has_changed(method: object, kind: str, tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of(str(tmp_path)), str(tmp_path / "pool"), num_adapters=5)
    adapters = [pool.adapters[number] for number in (1, 3, 0, 2, 4)]  # the first two change few modules
    merging.merge(validate(recipe_of(pool.base, adapters, tmp_path / "whole", method, kind=kind)))
    first = recipe_of(pool.base, adapters[:2], tmp_path / "a", method, kind=kind, state=True)
    merging.merge(validate(first))
    more = recipe_of(pool.base, adapters[2:], tmp_path / "b", method, kind=kind, continues=str(tmp_path / "a"))
    merging.merge(validate(more))
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("b", "whole")
    ]
    assert files[0] == files[1]


def test_models_are_numbered_on_from_all_that_are_listed(family_of: MakeFamily, tmp_path: Path) -> None:
    family, method = family_of(num_models=4), {"name": "dare", "density": 0.5}
    models = [{"path": uri, "weight": weight} for uri, weight in zip(family.models, (1, 0, 2, 1), strict=True)]
    merging.merge(validate(recipe_of(family.base, models, tmp_path / "whole", method)))
    merging.merge(validate(recipe_of(family.base, models[:3], tmp_path / "a", method, state=True)))
    merging.merge(validate(recipe_of(family.base, models[3:], tmp_path / "b", method, continues=str(tmp_path / "a"))))
    assert digests(tmp_path / "b") == digests(tmp_path / "whole")


def test_information_of_modules_that_no_earlier_adapter_changes_is_missed(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of(str(tmp_path)), str(tmp_path / "pool"), num_adapters=2)
    (tmp_path / "fisher").mkdir()
    save_file({name: value.square() for name, value in pool.base_tensors.items()}, tmp_path / "fisher/all.safetensors")
    models: list[object] = [{"path": uri, "with": {"fisher": str(tmp_path / "fisher")}} for uri in pool.adapters]
    first = recipe_of(pool.base, models[1:], tmp_path / "a", "fisher", kind="delta", state=True)
    merging.merge(validate(first))
    more = recipe_of(pool.base, models[:1], tmp_path / "b", "fisher", kind="delta", continues=str(tmp_path / "a"))
    with pytest.raises(RecipeError, match="which none of its models changes"):
        merging.plan(validate(more))


@pytest.mark.parametrize(
    ("name", "last"), [*(("ties", last) for last in range(1, 12, 2)), ("opcm", 4), ("model_stock", 5), ("opcm", 7)]
)
def test_a_merge_that_was_killed_keeps_the_whole_state(
    name: str, last: int, family_of: MakeFamily, tmp_path: Path
) -> None:
    family, method = family_of(num_models=4, shards=2), {"name": name}
    first = validate(recipe_of(family.base, list(family.models[:3]), tmp_path / "a", method, state=True))
    sizes, seen = draw_sizes(random.Random(7)), 0

    def watch(progress: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merging.merge(first, sizes=sizes, watch=watch)
    merging.merge(first, sizes=sizes)
    more = recipe_of(family.base, list(family.models[3:]), tmp_path / "b", method, continues=str(tmp_path / "a"))
    merging.merge(validate(more))
    merging.merge(validate(recipe_of(family.base, list(family.models), tmp_path / "whole", method)))
    assert digests(tmp_path / "b") == digests(tmp_path / "whole")


def test_what_does_not_go_on_is_refused(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=4)
    method = {"name": "ties", "density": 0.3}
    models = list(family.models)
    merging.merge(validate(recipe_of(family.base, models[:2], tmp_path / "a", method, state=True)))
    merging.merge(validate(recipe_of(family.base, models[:2], tmp_path / "plain", method)))
    cases: list[tuple[dict[str, object], str]] = [
        ({"method": {**method, "density": 0.4}}, "method: is not that of"),
        ({"base": models[0]}, "base: is not the base of"),
        ({"exclude": ["*norm*"]}, "exclude: is not that of"),
        ({"continues": str(tmp_path / "plain")}, "kept no state"),
        ({"continues": str(tmp_path / "nothing")}, "holds no finished merge"),
        ({"models": [{"path": models[3], "id": "1"}]}, "has a model of the id '1'"),
    ]
    for change, message in cases:
        recipe = recipe_of(family.base, models[2:], tmp_path / "b", method, continues=str(tmp_path / "a"))
        with pytest.raises((InputError, RecipeError), match=message):
            merging.plan(validate({**recipe, **change}))
    for refused in (
        {"name": "consensus"},
        {"name": "ties", "denominator": "union"},
        {"name": "average", "missing_module": "skip"},
        {"name": "emr", "part": "0"},
        {"name": "model_stock", "profile": "mergekit"},
    ):
        with pytest.raises(RecipeError, match="needs all models at once"):
            merging.plan(validate(recipe_of(family.base, models, tmp_path / "c", refused, state=True)))
    recipe = validate(recipe_of(family.base, models[2:], tmp_path / "b", method, continues=str(tmp_path / "a")))
    for path in (tmp_path / "a").rglob("state/*.safetensors"):
        save_file({name: words[:, :3].contiguous() for name, words in load_file(path).items()}, path)
    with pytest.raises(InputError, match="holds 3 words of an element"):
        merging.merge(recipe)
    for path in (tmp_path / "a").rglob("state/*.safetensors"):
        save_file({name: torch.full((len(words), 5), math.nan) for name, words in load_file(path).items()}, path)
    with pytest.raises(InputError, match="holds values that are NaN or Inf"):
        merging.merge(recipe, fresh=True)
    for path in (tmp_path / "a").rglob("state/*.safetensors"):
        tensors = load_file(path)
        del tensors[next(iter(tensors))]
        save_file(tensors, path)
    with pytest.raises(InputError, match="is not the state of that merge, or not all of it"):
        merging.plan(recipe)


def test_a_state_is_taken_up_where_lapack_computes_as_it_did(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    for name in ("opcm", "iso_c"):
        first = recipe_of(family.base, list(family.models[:2]), tmp_path / name, name, state=True)
        merging.merge(validate(first))
        (path,) = (tmp_path / name).rglob("lapack.json")
        path.write_text('"01234567"')
    more = recipe_of(family.base, list(family.models[2:]), tmp_path / "b", "opcm", continues=str(tmp_path / "opcm"))
    with pytest.raises(InputError, match="computes other bits than it did for "):
        merging.merge(validate(more))
    more = recipe_of(family.base, list(family.models[2:]), tmp_path / "c", "iso_c", continues=str(tmp_path / "iso_c"))
    merging.merge(validate(more))  # its state is a sum, and needs no LAPACK


def test_a_state_that_is_not_whole_is_refused(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    merging.merge(validate(recipe_of(family.base, list(family.models[:2]), tmp_path / "a", "opcm", state=True)))
    more = recipe_of(family.base, list(family.models[2:]), tmp_path / "b", "opcm", continues=str(tmp_path / "a"))
    planned = merging.plan(validate(more))
    (path,) = (tmp_path / "a").rglob("folded/0/0.json")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match="changed"):
        merging.carry_out(planned, started=0.0, fresh=False, watch=lambda progress: None)
    next((tmp_path / "a").rglob("state/*.safetensors")).unlink()
    with pytest.raises(InputError, match="is not the state of that merge, or not all of it"):
        merging.plan(validate(more))
