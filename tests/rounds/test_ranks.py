"""Exact ranks of values that a method computes, under any cut, worker and interruption."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tools.adapters import make_pool
from tests.tools.families import Family
from tests.tools.merging import LOCAL, digests, draw_sizes, merge, plug, read_tensors, recipe_of
from ties_ray.kernels import BINS
from ties_ray.kernels.ranks import count_high, count_low, places, value_of
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.plugins import PLUGIN_FOLDER
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import Progress
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]
PCB = {"name": "pcb", "ratio": 0.3}


def test_places_are_in_the_order_of_values_and_lead_back_to_them() -> None:
    special = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3e38, -3e38, float("inf"), float("-inf")]
    values = torch.cat([torch.tensor(special), torch.randn(1000, generator=torch.Generator().manual_seed(0))])
    ordered = values.sort().values
    assert places(ordered).diff().ge(0).all()
    assert places(ordered).diff()[ordered.diff() > 0].gt(0).all()
    assert [value_of(int(place), integer=False) for place in places(values)] == values.tolist()
    whole = torch.tensor([-(2**31), -1, 0, 1, 2**31 - 1], dtype=torch.int32)
    assert [value_of(int(place), integer=True) for place in places(whole)] == whole.tolist()


def test_two_counts_give_every_rank() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(1)).mul_(100).round().div_(64)
    of_values, ordered = places(values), values.sort().values
    high = torch.zeros(BINS, dtype=torch.int64)
    count_high(of_values, high)
    for rank in (0, 1, 250, 499):
        bin = int(np.searchsorted(high.cumsum(0).numpy(), rank, side="right"))
        low = torch.zeros(BINS, dtype=torch.int64)
        count_low(of_values, bin, low)
        rest = rank - int(high[:bin].sum())
        place = bin << 16 | int(np.searchsorted(low.cumsum(0).numpy(), rest, side="right"))
        assert value_of(place, integer=False) == ordered[rank]


@pytest.mark.parametrize("rows", [False, True])
def test_ranks_are_those_of_a_parameter_or_of_the_whole_model(
    rows: bool, family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = Path(__file__).parents[1] / "plugins"
    monkeypatch.setenv(PLUGIN_FOLDER, str(plugins))
    plug(plugins, monkeypatch.setattr)
    family = family_of(num_models=2, exact=True)
    result = merge(family, tmp_path / "out", {"name": "middles", "rows": rows})
    base, first, second = (
        {name: value.float() for name, value in tensors.items() if value.is_floating_point() and value.numel()}
        for tensors in (family.base_tensors, *family.model_tensors)
    )
    least = min(float(((second[name] - base[name]) * 1024).round().min()) for name in base)
    for name, written in read_tensors(tmp_path / "out").items():
        if name in base:
            ordered = (first[name] - base[name]).flatten().sort().values
            wanted = base[name] + ordered[len(ordered) // 2] + least / 1024
            torch.testing.assert_close(written.float(), wanted.to(written.dtype).float(), rtol=0, atol=1e-6, msg=name)
    assert result.statistics["seen"] == sum(value.numel() for value in base.values())


@pytest.mark.parametrize("seed", range(4))
def test_any_sizes_any_interruption_and_any_number_of_workers_give_the_same_bytes(
    seed: int, family_of: MakeFamily, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    family = family_of(num_models=5, mixed=True, shards=2)
    merge(family, tmp_path / "whole", PCB)
    run = {**LOCAL, "workers": draw.choice([1, 2, 3])}
    recipe, sizes = recipe_of(family, tmp_path / "cut", PCB, run=run), draw_sizes(draw)
    seen, last = 0, draw.randint(1, 60)

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


def test_a_sample_of_the_output_is_computed_anew(family_of: MakeFamily, tmp_path: Path) -> None:
    merge(family_of(num_models=3, mixed=True), tmp_path / "out", PCB)
    assert verify(Stores({}), str(tmp_path / "out"), sample=1.0).problems == []


@pytest.mark.parametrize("kind", ["checkpoint", "delta", "adapter"])
def test_adapters_are_ranked(kind: str, tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=3)
    output = {"path": str(tmp_path / "out"), "kind": kind, **({"rank": 8} if kind == "adapter" else {})}
    given = {"base": pool.base, "models": list(pool.adapters), "run": LOCAL, "output": output}
    assert merging.merge(validate({**given, "method": PCB})).status == "done"
