"""Methods of rows, of whole parameters and of several passes, through storage: nothing depends on cuts and workers."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tools.adapters import make_pool
from tests.tools.families import Family
from tests.tools.merging import LOCAL, digests, draw_sizes, merge, recipe_of
from ties_ray.layout.sizes import SIZES
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import Progress
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]
METHODS = pytest.mark.parametrize(
    "method",
    [
        {"name": "breadcrumbs", "scope": "row", "density": 0.5},
        {"name": "della"},
        {"name": "sce", "select_topk": 0.4},
        {"name": "iso_cts"},
        {"name": "knots", "inner": {"name": "ties", "density": 0.4}},
        {"name": "core_space"},
        {"name": "compress_merge", "rank": 4},
        {"name": "lora_lego", "rank": 4},
        {"name": "opcm"},
    ],
    ids=lambda method: str(method["name"]),
)


@METHODS
@pytest.mark.parametrize("seed", range(2))
def test_any_sizes_any_interruption_and_any_number_of_workers_give_the_same_bytes(
    seed: int, method: Mapping[str, object], family_of: MakeFamily, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    family = family_of(num_models=5, mixed=True, shards=2)
    merge(family, tmp_path / "whole", method)
    sizes, last = draw_sizes(draw), draw.randint(1, 10)
    run = {**LOCAL, "workers": draw.choice([1, 2, 3])}
    recipe = recipe_of(family, tmp_path / "cut", method, run=run)
    calls = 0

    def watch(progress: Progress) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt

    try:
        merging.merge(recipe, sizes=sizes, watch=watch)
    except KeyboardInterrupt:
        merging.merge(recipe, sizes=sizes)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


@METHODS
def test_a_sample_of_the_output_is_computed_anew(
    method: Mapping[str, object], family_of: MakeFamily, tmp_path: Path
) -> None:
    sizes = replace(SIZES, max_block=SIZES.max_block // 4, least_part=SIZES.least_part // 2)
    merge(family_of(num_models=3, mixed=True), tmp_path / "out", method, sizes=sizes)
    assert verify(Stores({}), str(tmp_path / "out"), sample=1.0).problems == []


@METHODS
@pytest.mark.parametrize("kind", ["checkpoint", "delta", "adapter"])
def test_adapters_are_merged(kind: str, method: Mapping[str, object], tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=3)
    output = {"path": str(tmp_path / "out"), "kind": kind, **({"rank": 8} if kind == "adapter" else {})}
    recipe = {"base": pool.base, "models": list(pool.adapters), "method": method, "run": LOCAL, "output": output}
    assert merging.merge(validate(recipe)).status == "done"
