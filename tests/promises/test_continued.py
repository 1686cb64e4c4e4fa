"""A merge that keeps its state can take in further models, with the bytes of one merge of all."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
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


def recipe_of(base: str, models: list[object], output: Path, method: object, **more: object) -> dict[str, object]:
    written = {"path": str(output), "state": bool(more.pop("state", False)), "kind": more.pop("kind", "checkpoint")}
    return {"base": base, "models": models, "method": method, "output": written, "run": LOCAL, **more}


def weighted(uris: tuple[str, ...], method: dict[str, object]) -> list[object]:
    weights = [1] * 6 if method["name"] == "emr" else [1, 2, 0.5, 1, 3, 1]
    return [{"path": uri, "weight": weight} for uri, weight in zip(uris, weights, strict=True)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
@pytest.mark.parametrize("how", [{"dtype": "BF16"}, {"mixed": True, "shards": 2}], ids=str)
def test_three_models_then_one_then_two_are_six_at_once(
    method: dict[str, object], how: dict[str, object], family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=6, **how)
    models = weighted(family.models, method)
    merging.merge(validate(recipe_of(family.base, models, tmp_path / "whole", method)))
    steps = [("a", models[:3], None), ("b", models[3:4], "a"), ("c", models[4:], "b")]
    for seed, (name, own, before) in enumerate(steps):
        more = {"continues": str(tmp_path / before)} if before else {}
        recipe = recipe_of(family.base, own, tmp_path / name, method, state=name != "c", **more)
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


@pytest.mark.parametrize("kind", ["checkpoint", "delta"])
def test_a_pool_of_adapters_grows(kind: str, tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of(str(tmp_path)), str(tmp_path / "pool"), num_adapters=5)
    method = {"name": "ties", "density": 0.4}
    merging.merge(validate(recipe_of(pool.base, list(pool.adapters), tmp_path / "whole", method, kind=kind)))
    first = recipe_of(pool.base, list(pool.adapters[:3]), tmp_path / "a", method, kind=kind, state=True)
    merging.merge(validate(first))
    more = recipe_of(
        pool.base, list(pool.adapters[3:]), tmp_path / "b", method, kind=kind, continues=str(tmp_path / "a")
    )
    merging.merge(validate(more))
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("b", "whole")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("last", range(1, 12, 2))
def test_a_merge_that_was_killed_keeps_the_whole_state(last: int, family_of: MakeFamily, tmp_path: Path) -> None:
    family, method = family_of(num_models=4, shards=2), {"name": "ties", "density": 0.3}
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
    for refused in ({"name": "consensus"}, {"name": "ties", "at_threshold": "exact"}, {"name": "iso_c"}):
        with pytest.raises(RecipeError, match="needs all models at once"):
            merging.plan(validate(recipe_of(family.base, models, tmp_path / "c", refused, state=True)))
    for path in (tmp_path / "a").rglob("state/*.safetensors"):
        tensors = load_file(path)
        del tensors[next(iter(tensors))]
        save_file(tensors, path)
    with pytest.raises(InputError, match="is not the state of that merge, or not all of it"):
        merging.plan(
            validate(recipe_of(family.base, models[2:], tmp_path / "b", method, continues=str(tmp_path / "a")))
        )
