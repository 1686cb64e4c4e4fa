"""Methods of whole matrices and of exact sums, through storage, shards, workers and kills."""

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools.adapters import make_pool
from tests.tools.families import Family
from tests.tools.merging import LOCAL, digests, draw_sizes, merge, read_tensors, recipe_of
from tests.tools.oracles.iso import iso_c
from tests.tools.oracles.model_stock import model_stock
from tests.tools.oracles.protocol import Merged
from ties_ray.errors import Cancelled, InputError, RecipeError
from ties_ray.kernels import ONE
from ties_ray.kernels.exact_sums import dot, total
from ties_ray.kernels.linalg import code_path
from ties_ray.layout.sizes import SIZES
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import Progress
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]
ORACLES = {"iso_c": iso_c, "model_stock": model_stock}


def wanted(family: Family, method: str) -> Merged:
    """Return what the oracle makes of the floating-point tensors of a family."""
    names = [name for name, tensor in family.base_tensors.items() if tensor.is_floating_point()]
    base, *models = (
        {name: tensors[name].double().numpy() if name in tensors else None for name in names}
        for tensors in (family.base_tensors, *family.model_tensors)
    )
    present = [{name: value for name, value in model.items() if value is not None} for model in models]
    return ORACLES[method](base, present)


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("how", [{"num_models": 3}, {"num_models": 5, "mixed": True, "shards": 2}], ids=str)
def test_a_checkpoint_is_what_the_oracle_gives(
    method: str, how: dict[str, object], family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(**how)
    merge(family, tmp_path / "out", method)
    written = read_tensors(tmp_path / "out")
    for name, value in wanted(family, method).weights.items():
        step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(written[name].dtype, 2**-20)
        ours = written[name].double().numpy()
        np.testing.assert_allclose(ours, value, rtol=2 * step, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("seed", range(4))
def test_any_sizes_any_interruption_and_any_number_of_workers_give_the_same_bytes(
    seed: int, method: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    family = family_of(num_models=5, mixed=True, shards=2)
    merge(family, {"path": str(tmp_path / "whole"), "file_size": "9KB"}, method)
    sizes, last = draw_sizes(draw), draw.randint(1, 40)
    run = {**LOCAL, "workers": draw.choice([1, 2, 3])}
    recipe = recipe_of(family, {"path": str(tmp_path / "cut"), "file_size": "9KB"}, method, run=run)
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
    assert not list(tmp_path.glob("cut/.ties-ray/*/*/scratch/*")), "nothing needs it once the result is there"


@pytest.mark.parametrize("method", ORACLES)
def test_a_sample_of_the_output_is_computed_anew(method: str, family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3, mixed=True)
    sizes = replace(SIZES, max_block=SIZES.max_block // 4, least_part=SIZES.least_part // 2)
    merge(family, tmp_path / "out", method, sizes=sizes)
    assert verify(Stores({}), str(tmp_path / "out"), sample=1.0).problems == []
    path = tmp_path / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert verify(Stores({}), str(tmp_path / "out"), sample=1.0).problems


@pytest.mark.parametrize("kind", ["checkpoint", "delta", "adapter"])
def test_adapters_are_merged_as_matrices(kind: str, tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=3)
    output = {"path": str(tmp_path / "out"), "kind": kind, **({"rank": 8} if kind == "adapter" else {})}
    given = {"base": pool.base, "models": list(pool.adapters), "run": LOCAL, "output": output}
    assert merging.merge(validate({**given, "method": "iso_c"})).status == "done"


def test_a_matrix_that_does_not_fit_is_refused_before_anything_is_read(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(hidden=724, layers=1)
    with pytest.raises(RecipeError, match=r"run\.memory"):
        merging.plan(recipe_of(family, tmp_path / "out", "iso_c", run={**LOCAL, "memory": "100MiB"}))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_sum_of_values_that_are_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        total(torch.tensor([1.0, value]))
    with pytest.raises(ValueError, match="not finite"):
        dot(torch.tensor([value, 1.0]), torch.tensor([2.0, 1.0]))


def test_sums_are_exact_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.arange(5000).remainder(60).sub(30)
    left, right = torch.randn(2, 5000, generator=generator) * scales
    order = torch.randperm(5000, generator=generator)
    slices = [slice(start, start + 7) for start in range(0, 5000, 7)]
    assert dot(left, right) == dot(left[order], right[order]) == sum(dot(left[cut], right[cut]) for cut in slices)
    pairs = zip(left.tolist(), right.tolist(), strict=True)
    assert Fraction(dot(left, right), ONE) == sum(Fraction(one) * Fraction(other) for one, other in pairs)
    assert total(torch.tensor([3.0e38, 1.0e-45, -3.0e38])) / ONE == float(torch.tensor(1.0e-45))


@pytest.mark.parametrize("kind", ["survey", "threshold", "tied", "gather", "ranks", "condense", "merge", "units"])
def test_a_kind_of_round_is_imported_without_torch(kind: str) -> None:
    code = f"import sys, ties_ray.rounds.{kind}; sys.exit(bool({{'torch', 'ray', 'numba'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["adapter", "delta"])
def test_values_that_count_as_zero_in_scratch_are_told(kind: str, tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=3)
    path = Path(pool.adapters[1]) / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0] = float("nan")
    save_file(tensors, path)
    output = {"path": str(tmp_path / "out"), "kind": kind, **({"rank": 8} if kind == "adapter" else {})}
    given = {"base": pool.base, "models": list(pool.adapters), "run": LOCAL, "output": output, "allow": {"nan": "zero"}}
    result = merging.merge(validate({**given, "method": "iso_c"}))
    assert len(result.zeroed) == 1
    assert sum(result.zeroed.values()) > 0


def test_a_worker_whose_lapack_computes_other_bits_is_refused(
    family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(num_models=2)

    def stop(progress: Progress) -> None:
        if progress.stage in ("merge", "assemble"):
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Cancelled)):
        merging.merge(recipe_of(family, tmp_path / "out", "iso_c"), watch=stop)
    monkeypatch.setattr("ties_ray.worker.worker.code_path", lambda device: "00000000")
    with pytest.raises(InputError, match=r"LAPACK.*computes other bits than it does for the rest of this merge"):
        merging.merge(recipe_of(family, tmp_path / "out", "iso_c"))
    merging.merge(recipe_of(family, tmp_path / "out", "iso_c"), fresh=True)
    monkeypatch.undo()
    (problem,) = verify(Stores({}), str(tmp_path / "out"), sample=1.0).problems
    assert "LAPACK" in problem.where
    merge(family, tmp_path / "sum", "task_arithmetic")
    assert not list(tmp_path.glob("sum/.ties-ray/**/lapack.json")), "a sum needs no LAPACK"


def test_lapack_computes_the_same_bits_again() -> None:
    assert code_path(torch.device("cpu")) == code_path(torch.device("cpu"))
