from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

import ties_ray
from tests.tools.adapters import make_pool
from tests.tools.families import Family, make_family
from tests.tools.merging import carried_out, draw_sizes, merge, read_tensors, recipe_of
from ties_ray.kernels import Encoded, Factors, definition
from ties_ray.layout.sizes import SIZES
from ties_ray.measures import positions
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.reports.effects import MergeEffects
from ties_ray.reports.records import Progress
from ties_ray.rounds._effects import part_of
from ties_ray.state.manifest import Manifest
from ties_ray.stores import Stores

STORE = Stores({}).of("/")
TIES = {"name": "ties", "density": 0.3, "lambda": 0.8}


def effects(family: Family, output: Path, method: object, **more: object) -> MergeEffects:
    result = merge(family, output, method, **more)
    assert result.effects
    return result.effects


def dense(family: Family, output: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the deltas of all models for a parameter, and its merged change, in fp64."""
    base = family.base_tensors[name].double().flatten()
    models = torch.stack([tensors[name].double().flatten() - base for tensors in family.model_tensors])
    return models, read_tensors(output)[name].double().flatten() - base


def test_figures_of_a_small_merge_are_those_of_all_its_elements(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=4, dtype="F32", smooth=True)
    output = tmp_path / "out"
    result = merge(family, {"path": str(output), "dtype": "float64"}, TIES)
    told = result.effects
    assert told
    assert told.looked_at == told.elements
    thresholds = torch.tensor([trim.threshold for trim in result.trims], dtype=torch.float64)[:, None]
    norms2, terms_of_all, aligned, decided = (torch.zeros(4).double() for _ in range(4))
    for each in told.parameters:
        deltas, merged = dense(family, output, each.name)
        terms = torch.where(deltas.abs() >= thresholds, deltas, 0.0)
        positive, negative = (terms > 0).sum(0), (terms < 0).sum(0)
        several, changed = positive + negative > 1, positive + negative > 0
        assert each.density == pytest.approx(float((terms != 0).double().mean()), abs=1e-5)
        assert each.changed == pytest.approx(float(changed.double().mean()), abs=1e-5)
        both = (positive > 0) & (negative > 0)
        assert each.conflict == pytest.approx(float(both.sum() / several.sum().clamp(min=1)), abs=1e-5)
        chance = (1 - 2.0 ** (1 - (positive + negative).clamp(min=1))).sum() / several.sum().clamp(min=1)
        assert each.by_chance == pytest.approx(float(chance), abs=1e-5)
        lost = 1 - float(terms.sum(0).abs().sum() / terms.abs().sum().clamp(min=1e-300))
        assert each.cancellation == pytest.approx(lost if terms.any() else 0, abs=1e-5)
        assert each.norm == pytest.approx(float(merged.norm()), rel=1e-5, abs=1e-12)
        alone = ((terms.sign() == merged.sign()) & (merged != 0)).sum(0) == 1
        assert each.alone == pytest.approx(float(alone.sum() / changed.sum().clamp(min=1)), abs=1e-5)
        norms2 += deltas.square().sum(1)
        terms_of_all += (terms != 0).sum(1)
        aligned += (terms * merged).sum(1)
        sums = terms.sum(0)
        decided += (((sums - terms).sign() != sums.sign()) & (terms != 0)).sum(1)
    for number, model in enumerate(told.models):
        assert model.norm == pytest.approx(float(norms2[number].sqrt()), rel=1e-5)
        assert model.density == pytest.approx(result.trims[number].kept / result.trims[number].size, rel=1e-4)
        assert model.decides == pytest.approx(float(decided[number] / terms_of_all[number]), abs=1e-5)
        assert model.contribution == pytest.approx(float(aligned[number] / aligned.sum()), abs=1e-5)
    assert sum(model.contribution for model in told.models) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_no_cut_of_the_work_changes_a_figure(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "STRATUM", 500)
    monkeypatch.setattr(positions, "LONGEST", 70)
    positions.ranges.cache_clear()
    family = make_family(STORE, str(tmp_path), num_models=5, dtype="F32", hidden=32)
    whole = effects(family, tmp_path / "whole", TIES)
    assert whole.looked_at < whole.elements
    assert effects(family, tmp_path / "cut", TIES, sizes=draw_sizes(Random(seed))) == whole
    positions.ranges.cache_clear()


def test_a_merge_that_was_interrupted_tells_the_same_effects(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=4, hidden=32)
    sizes = replace(SIZES, least_part=4096, most_part=4096, max_shard=4096, record_shards=2)
    undisturbed = effects(family, tmp_path / "undisturbed", TIES, sizes=sizes)
    recipe = recipe_of(family, tmp_path / "out", TIES)

    def stop(progress: Progress) -> None:
        if progress.stage == "merge" and progress.done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merging.merge(recipe, sizes=sizes, watch=stop)
    continued = merging.merge(recipe, sizes=sizes)
    assert continued.resumed
    assert continued.shards_done_before
    assert continued.effects == undisturbed


def test_some_elements_stand_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make_family(STORE, str(tmp_path), num_models=4, hidden=128)
    exact = effects(family, tmp_path / "exact", TIES)
    monkeypatch.setattr(positions, "LONGEST", 1024)
    positions.ranges.cache_clear()
    estimate = effects(family, tmp_path / "estimate", TIES)
    positions.ranges.cache_clear()
    assert estimate.looked_at < exact.looked_at / 4
    assert estimate.norm == pytest.approx(exact.norm, rel=0.1)
    for mine, other in zip(estimate.models, exact.models, strict=True):
        assert mine.norm == pytest.approx(other.norm, rel=0.1)
        assert mine.density == pytest.approx(other.density, abs=0.05)
        assert mine.against == pytest.approx(other.against, abs=0.05)


@pytest.mark.parametrize("kind", ["delta", "adapter"])
def test_adapters_have_effects_whatever_is_written(kind: str, tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path), num_adapters=3)
    output = {"path": str(tmp_path / kind), "kind": kind}
    recipe = {"models": list(pool.adapters), "method": TIES, "output": output, "run": {"executor": "local"}}
    result = merging.merge(validate(recipe))
    assert result.effects
    norms = [sum(float(delta.square().sum()) for delta in deltas.values()) ** 0.5 for deltas in pool.deltas]
    assert [model.norm for model in result.effects.models] == pytest.approx(norms, rel=1e-4)
    if kind == "adapter":
        plan = carried_out(result)
        folder = Manifest.folder_of(result.output, result.run_id, 1)
        folded = Manifest(Stores({}), folder).read_folded(plan.merges[0], len(plan.merges[0].rounds) - 2, [0])
        assert [each.shard for each in folded[0].effects] == [0]
    by_name = {each.name: each for each in result.effects.parameters}
    assert set(by_name) == {name for deltas in pool.deltas for name in deltas}


def test_a_method_of_whole_rows_has_effects(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=2, dtype="F32")
    told = effects(family, tmp_path / "out", "nuslerp")
    assert len(told.models) == 2
    assert told.norm > 0


def test_combined_factors_have_none(tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path), num_adapters=2, hidden=64, ranks=(2,), targets=(("q_proj",),))
    output = {"path": str(tmp_path / "out"), "kind": "adapter"}
    recipe = {"models": list(pool.adapters), "method": "task_arithmetic", "output": output}
    assert merging.merge(validate(recipe | {"run": {"executor": "local"}})).effects is None


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 4), (2, 17), (0, 40), (39, 40)])
def test_a_part_of_a_slice_is_the_slice_cut(start: int, stop: int) -> None:
    generator, kernels = torch.Generator().manual_seed(0), definition.Definition()
    left, right = torch.randn(6, 2, generator=generator), torch.randn(2, 9, generator=generator)
    base = torch.randn(40, generator=generator)
    slices = [
        Encoded(torch.randn(40, generator=generator)),
        Factors(left, right, 0.5, 5),
        Factors(left, right, 0.5, 5, torch.ones(6), torch.rand(6, generator=generator)),
    ]
    for stored in slices:
        whole, part = torch.empty(40), torch.empty(stop - start)
        kernels.delta(stored, base, whole)
        kernels.delta(part_of(stored, start, stop), base[start:stop], part)
        assert torch.equal(part, whole[start:stop])


def test_ranges_lie_in_the_parameter_one_in_each_stratum() -> None:
    for numel in (0, 1, 5000, 10**6, 3 * 2**22 + 5):
        ranges = positions.ranges(numel, 8)
        assert all(0 <= start < stop <= numel for start, stop in ranges)
        assert len(ranges) == -(-numel // positions.STRATUM)
    assert positions.ranges_in(100, 200, 5000, 8) == [(0, 100)]
    assert positions.share_of(1000, 8) == 1
    assert len(positions.ranges(10**6, 10**5)) == 1


def test_of_very_many_models_the_parameters_have_effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make_family(STORE, str(tmp_path), num_models=3, dtype="F32")
    few = effects(family, tmp_path / "few", "task_arithmetic")
    monkeypatch.setattr(positions, "MOST_MODELS", 2)
    many = effects(family, tmp_path / "many", "task_arithmetic")
    assert (len(few.models), many.models) == (3, [])
    assert many.parameters == few.parameters
    report = ties_ray.report(tmp_path / "many")
    assert [model.effects for model in report.models] == [None] * 3
    assert report.modules
    assert "What was merged" in report.html()
