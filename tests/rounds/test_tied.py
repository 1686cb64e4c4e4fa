"""Trims that keep exactly k values: the same ones under any cut, any order of files and any interruption."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tools.adapters import make_pool
from tests.tools.families import Family, write_checkpoint
from tests.tools.merging import LOCAL, digests, draw_sizes, merge, read_tensors, recipe_of
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import Progress
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]
TRIMS = pytest.mark.parametrize("trim", ["global", "tensor"])


def exact(trim: str) -> dict[str, object]:
    return {"name": "ties", "at_threshold": "exact", "trim": trim, "density": 0.3}


@TRIMS
@pytest.mark.parametrize("seed", range(4))
def test_any_sizes_any_interruption_and_any_number_of_workers_give_the_same_bytes(
    seed: int, trim: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    family = family_of(num_models=5, mixed=True, shards=2)
    merge(family, tmp_path / "whole", exact(trim))
    run = {**LOCAL, "workers": draw.choice([1, 2, 3])}
    recipe, sizes, last = (
        recipe_of(family, tmp_path / "cut", exact(trim), run=run),
        draw_sizes(draw),
        draw.randint(1, 40),
    )
    seen = 0

    def watch(progress: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == last:
            raise KeyboardInterrupt

    try:
        merging.merge(recipe, sizes=sizes, watch=watch)
    except KeyboardInterrupt:
        merging.merge(recipe, sizes=sizes)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_the_first_of_equal_values_are_kept_by_the_names_of_parameters(tmp_path: Path) -> None:
    base = {"b.weight": torch.zeros(4), "a.weight": torch.zeros(6, dtype=torch.float64)}  # F64 lies first in the file
    model = {"b.weight": torch.tensor([2.0, -1.0, 1.0, 1.0]), "a.weight": torch.tensor([0.0, 1, -1, 1, 0, 0]).double()}
    store = Stores({}).of("/")
    for name, tensors in (("base", base), ("model", model)):
        write_checkpoint(store, str(tmp_path / name), tensors, config={"model_type": "llama"})
    family = Family(str(tmp_path / "base"), (str(tmp_path / "model"),), base, (model,))
    result = merge(family, tmp_path / "out", {"name": "ties", "at_threshold": "exact", "density": 0.5})
    written = read_tensors(tmp_path / "out")
    assert written["a.weight"].tolist() == [0, 1, -1, 1, 0, 0]
    assert written["b.weight"].tolist() == [2, -1, 0, 0]
    (trim,) = result.trims
    assert (trim.kept, trim.tied, trim.threshold) == (5, 6, 1.0)


@TRIMS
@pytest.mark.parametrize("kind", ["checkpoint", "delta", "adapter"])
def test_adapters_keep_exactly_k(kind: str, trim: str, tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=3, dtype="BF16")
    output = {"path": str(tmp_path / "out"), "kind": kind, **({"rank": 8} if kind == "adapter" else {})}
    given = {"base": pool.base, "models": list(pool.adapters), "run": LOCAL, "output": output}
    result = merging.merge(validate({**given, "method": exact(trim)}))
    assert all(trim.kept <= int(0.3 * trim.size) for trim in result.trims)


@TRIMS
def test_a_sample_of_the_output_is_computed_anew(trim: str, family_of: MakeFamily, tmp_path: Path) -> None:
    merge(family_of(num_models=3, mixed=True), tmp_path / "out", exact(trim))
    assert verify(Stores({}), str(tmp_path / "out"), sample=1.0).problems == []


def test_without_surplus_equals_no_model_is_read_again(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    recipe = recipe_of(family, tmp_path / "out", exact("global") | {"density": 0.99})
    planned = [round_.name for round_ in merging.plan(recipe).merges[0].rounds]
    assert planned[2:4] == ["ties, counted", "ties, placed"]
    whole = merge(family, tmp_path / "keep", exact("global") | {"density": 0.99, "at_threshold": "keep"})
    assert merging.merge(recipe).bytes_read == whole.bytes_read
