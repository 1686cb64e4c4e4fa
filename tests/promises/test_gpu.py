"""Merges whose workers compute on a GPU; without one, by the same kernels in Triton's interpreter."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")

from benchmarks import gpu as benchmark
from tests.tools.adapters import make_pool
from tests.tools.families import make_family
from tests.tools.gpu_traffic import traffic_counted
from tests.tools.interpreter import interpret
from tests.tools.merging import digests, merge, recipe_of
from ties_ray import kernels
from ties_ray.errors import InputError, MergeError, RecipeError
from ties_ray.executors import WorkerDied
from ties_ray.kernels.cuda import Cuda
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import MergeResult
from ties_ray.stores import Stores

ROOT = Path(__file__).parents[2]
ON_GPU = {"executor": "local", "device": "cuda"}
TIES = {"name": "ties", "density": 0.3}
MERGES: dict[str, object] = {
    "ties": TIES,
    "ties by tensor, majority, weights": TIES | {"trim": "tensor", "zero_sum": "majority"},
    "dare": {"name": "dare", "density": 0.4, "combine": "ties"},
    "consensus": {"name": "consensus"},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for a GPU where there is none; return what was loaded so far."""
    loaded: list[str] = []
    load = kernels.load

    def instead(name: Any, arithmetic: Any = "exact") -> kernels.Kernels:
        loaded.append(name)
        if name != "cuda" or torch.cuda.is_available():
            return load(name, arithmetic)
        return Cuda(torch.device("cpu"), fast=arithmetic == "fast")

    monkeypatch.setattr(kernels, "load", instead)
    if not torch.cuda.is_available():
        interpret(monkeypatch)
    return loaded


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_of_checkpoints_on_a_gpu_has_the_bytes_of_one_without(
    name: str, gpu: list[str], tmp_path: Path
) -> None:
    family = make_family(Stores({}).of("/"), str(tmp_path / "in"), mixed=True)
    weights = [1.0, 0.5, 2.0] if "weights" in name else None
    merge(family, tmp_path / "cpu", MERGES[name], weights=weights)
    merge(family, tmp_path / "gpu", MERGES[name], weights=weights, run=ON_GPU)
    assert gpu == ["cpu", "cuda"]
    assert digests(tmp_path / "cpu") == digests(tmp_path / "gpu")
    assert not verify(Stores({}), str(tmp_path / "gpu"), sample=1.0).problems
    assert gpu[2:] == ["cpu"], "a sample needs no GPU"


def merge_pool(folder: Path, name: str, method: object, kind: str, **run: object) -> MergeResult:
    pool = make_pool(Stores({}).of("/"), str(folder / "pool"), variants=("dora", "plain"), layers=1)
    models = [{"path": uri} for uri in pool.adapters]
    output = {"path": str(folder / name), "kind": kind}
    data = {"base": pool.base, "models": models, "method": method, "output": output, "run": {**ON_GPU, **run}}
    return merging.merge(validate(data))


@pytest.mark.parametrize(("name", "kind"), [("ties", "checkpoint"), ("dare", "delta"), ("ties", "adapter")])
def test_a_merge_of_adapters_on_a_gpu_has_the_bytes_of_one_without(
    name: str, kind: str, gpu: list[str], tmp_path: Path
) -> None:
    for device in ("cpu", "cuda"):
        merge_pool(tmp_path, device, MERGES[name], kind, device=device)
    assert gpu == ["cpu", "cuda"]
    (path,) = (tmp_path / "cpu").glob("*.safetensors")
    assert path.read_bytes() == (tmp_path / "cuda" / path.name).read_bytes()


def test_fast_arithmetic_is_another_run(gpu: list[str], tmp_path: Path) -> None:
    exact = merge_pool(tmp_path, "exact", "average", "delta")
    fast = merge_pool(tmp_path, "fast", "average", "delta", arithmetic="fast")
    assert (exact.provenance.arithmetic, fast.provenance.arithmetic) == ("exact-1", "fast-1")
    assert exact.run_id != fast.run_id
    with pytest.raises(MergeError, match="holds the result of another merge"):
        merge_pool(tmp_path, "fast", "average", "delta")


RANKS = (8, 8, 256, 8)
"""One large rank, which must not make groups small for all."""


def test_what_a_pool_costs_beside_its_kernels_goes_by_groups_and_not_by_adapters(
    gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, matrices = 40, 2
    pool = make_pool(
        Stores({}).of("/"), str(tmp_path / "pool"), num_adapters=number, layers=1, ranks=RANKS, dtype="BF16",
        targets=(("q_proj", "v_proj"),), dense=False,
    )  # fmt: skip
    data = {"base": pool.base, "models": [{"path": uri} for uri in pool.adapters], "method": TIES}
    output = {"path": str(tmp_path / "out"), "kind": "delta"}
    with traffic_counted(monkeypatch) as traffic:
        merging.merge(validate({**data, "output": output, "run": {**ON_GPU, "workers": 1}}))
    groups, pairs = matrices * 2, matrices * number  # of at most 32 adapters
    for round_ in (0, 1):
        assert traffic.launches[round_] == groups, "one launch counts a group"
        assert traffic.waits[round_] <= 2 * groups, "one wait a group, and one a record"
        assert traffic.copies[round_] == pairs + groups, "factors lie together, and one table of facts is a group's"
    assert traffic.launches[2] == groups + 2 * matrices, "a group is one launch, and a block is elected and applied"
    assert traffic.waits[2] <= groups + matrices
    assert traffic.copies[2] == pairs + groups
    assert all(traffic.arrivals[round_] <= pairs + matrices for round_ in range(3)), "a wait for all of a slice"


def test_what_slices_cost_beside_their_kernels_goes_by_reads_and_groups(
    gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 20
    family = make_family(Stores({}).of("/"), str(tmp_path / "in"), num_models=number, layers=1)
    with traffic_counted(monkeypatch) as traffic:
        merge(family, tmp_path / "out", TIES, run={**ON_GPU, "workers": 1})
    blocks = traffic.launches[0] // 2  # groups of 16 and 4
    assert traffic.launches[0] == 2 * blocks > 0
    assert traffic.waits[0] <= 4 * blocks, "a wait a group, one for the base, and one a record"
    reads = number + 1  # of all blocks together, since they are small
    assert traffic.copies[0] == reads + 2 * blocks, "what a request reads, and a table of facts a group"


def test_all_that_the_benchmark_times_can_be_called(gpu: list[str]) -> None:
    cuda, length = kernels.load("cuda"), 3 * benchmark.COLUMNS
    cases = [*benchmark.dense_cases(cuda, torch.bfloat16, length, [2])]
    cases += benchmark.factor_cases(cuda, "exact", 4, length, [2])
    for case in cases:
        case.run()
        assert case.elements == length
    of_dense = ["delta", "count_high", "count_low", "fold", "fold+dropout", "elect", "apply"]
    assert [case.name for case in cases] == [*of_dense, "count_high", "fold"]


ALONE = """
import sys
for name in ("ray", "pydantic", "fsspec", "s3fs", "botocore", "click", "psutil", "google_crc32c"):
    sys.modules[name] = None
from benchmarks import gpu
sys.argv[1:] = ["--ranks", "2", "--length", "8192", "--models", "2"]
gpu.main()
"""


def test_the_benchmark_runs_where_only_the_kernels_can_and_says_so_without_a_gpu() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert ("There is no GPU here" in done.stdout) == (not torch.cuda.is_available())


# What goes wrong.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_there_is_no_gpu_nothing_is_begun(tmp_path: Path) -> None:
    family = make_family(Stores({}).of("/"), str(tmp_path / "in"))
    with pytest.raises(InputError, match=r"run\.device: cuda .*no CUDA GPU is visible to torch.*run\.device: cpu"):
        merge(family, tmp_path / "out", TIES, run=ON_GPU)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("run", "wrong"),
    [
        ({"arithmetic": "fast"}, "tensor cores: give device: cuda"),
        ({"device": "cuda", "gpus_per_worker": 0}, "give gpus_per_worker above 0"),
        ({"device": "rocm"}, "run.device"),
    ],
)
def test_devices_that_cannot_work_are_refused_with_the_recipe(run: dict[str, object], wrong: str) -> None:
    data = {"base": "b", "models": ["m"], "method": "ties", "output": "o", "run": run}
    with pytest.raises(RecipeError, match=wrong):
        validate(data)


def test_ray_keeps_a_gpu_for_each_worker_that_computes_on_one() -> None:
    data = {"base": "b", "models": ["m"], "method": "ties", "output": "o"}
    asked = [{}, {"device": "cuda"}, {"device": "cuda", "gpus_per_worker": 0.25}]
    assert [validate(data | {"run": run}).run.gpus for run in asked] == [0, 1, 0.25]


@pytest.fixture
def failing(gpu: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Exception], None]:
    """Return what merges while each `apply` fails."""
    family = make_family(Stores({}).of("/"), str(tmp_path / "in"))

    def run(error: Exception) -> None:
        def fail(*_: object) -> int:
            raise error

        monkeypatch.setattr(Cuda, "apply", fail)
        monkeypatch.setattr("ties_ray.worker.worker.Worker._on_gpu", True)
        monkeypatch.setattr("ties_ray.kernels.buffers.Buffers._take", take)
        merging.merge(recipe_of(family, tmp_path / "out", "average", run=ON_GPU))

    from ties_ray.kernels.buffers import Buffers

    unpinned = Buffers._take

    def take(self: Any, wanted: int) -> Any:
        self._pinned = False  # which needs a driver
        return unpinned(self, wanted)

    return run


def test_a_gpu_with_too_little_memory_is_told_by_what_to_lower(failing: Callable[[Exception], None]) -> None:
    error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. And more.")
    with pytest.raises(InputError, match=r"run\.memory: the GPU has too little memory: .*lower run\.memory"):
        failing(error)


def test_a_gpu_that_has_died_costs_the_worker(failing: Callable[[Exception], None]) -> None:
    with pytest.raises(MergeError, match=f"{WorkerDied.__name__}: its GPU is of no use any more: CUDA error: illegal"):
        failing(RuntimeError("CUDA error: illegal address"))
