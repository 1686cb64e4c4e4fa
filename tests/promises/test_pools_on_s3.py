"""What a user with a bucket of adapters does: 200 of them, on Ray, from and to an S3 server, to all three outputs."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import measure
from tests.conftest import Bucket
from tests.tools.adapters import ATTENTION, MLP, make_pool
from tests.tools.families import Tensors
from tests.tools.oracle import UNIT
from ties_ray.planning.plan import Plan
from ties_ray.reports.records import MergeResult
from ties_ray.state.manifest import Manifest
from ties_ray.stores import Stores

NUM_ADAPTERS = 200
RANKS, ALPHAS = (8, 16, 24, 32, 48, 64, 8), (16, 8, 32)
NARROW = (("k_proj",), ("v_proj",), ("q_proj",), ("k_proj", "v_proj"), ("o_proj",))
TARGETS = (*NARROW * 5, (*ATTENTION, *MLP))
OUTPUTS: dict[str, dict[str, object]] = {"checkpoint": {}, "delta": {}, "adapter": {"rank": 64}}
WORKERS = {"checkpoint": 1, "delta": 2, "adapter": 1}
"""A worker's imports are a good part of what this costs."""
MODULE = "model.layers.2.self_attn.k_proj"
DENSITY = 0.2
MERGES = """
import json, sys, time, ray, ties_ray
from ties_ray import plugins
from ties_ray.executors import Executor, Needs
ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False,
         logging_level="ERROR")
idle = plugins.load("executors", "ray", Executor)()
idle.start("benchmarks.memory:Idle", "", Needs(1, 2**28))
time.sleep(1)
idle.stop()
for line in open(sys.argv[1]):
    print(ties_ray.merge(json.loads(line)).model_dump_json(), flush=True)
"""


class Done(NamedTuple):
    """Merges of one pool, by kind of output."""

    results: dict[str, MergeResult]
    plans: dict[str, Plan]
    tensors: dict[str, Tensors]
    config: dict[str, Any]
    """Of the merged adapter."""
    base: Tensors
    factors: list[tuple[dict[str, Any], Tensors]]
    """Of every adapter, its config and its tensors."""
    idle: int
    """Anonymous bytes of a worker that does nothing."""
    peaks: list[int]
    """Likewise of the workers of all merges."""


@pytest.fixture
def done(s3_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Done:
    """Make the pool in a bucket, merge it to every kind of output in a process of its own, and look at its workers."""
    stores, uri, local = Stores(s3_bucket.storage), s3_bucket.uri, tmp_path / "pool"
    store = stores.of(uri)
    pool = make_pool(
        stores.of("/"), str(local), num_adapters=NUM_ADAPTERS, hidden=512, layers=4, ranks=RANKS, alphas=ALPHAS,
        targets=TARGETS, variants=("plain", "plain", "rslora"), dtype="BF16", base_dtype="BF16", dense=False,
    )  # fmt: skip
    files = [path for path in local.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda path: store.put(f"{uri}/pool/{path.relative_to(local)}", path.read_bytes()), files))
    recipes: list[dict[str, object]] = [
        {
            "base": f"{uri}/pool/base",
            "models": [{"path": f"{uri}/pool/adapter-*/", "at_least": NUM_ADAPTERS}],
            "method": {"name": "ties", "density": DENSITY},
            "output": {"path": f"{uri}/{kind}", "kind": kind, **settings},
            "storage": s3_bucket.storage,
            "run": {"workers": WORKERS[kind]},
        }
        for kind, settings in OUTPUTS.items()
    ]
    (tmp_path / "recipes").write_text("\n".join(map(json.dumps, recipes)))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    seen = measure.run(["-c", MERGES, str(tmp_path / "recipes")], ray=True)
    results = [MergeResult.model_validate_json(line) for line in seen.output.splitlines() if line.startswith("{")]
    plans: dict[str, Plan] = {}
    tensors: dict[str, Tensors] = {}
    for kind, result in zip(OUTPUTS, results, strict=True):
        made = Manifest(stores, Manifest.folder_of(result.output, result.run_id)).read_last_plan()
        assert made
        plans[kind], tensors[kind] = made, {}
        for file in result.files:
            (tmp_path / file.name).write_bytes(store.get(f"{result.output}/{file.name}", 2**30)[1])
            tensors[kind] |= load_file(tmp_path / file.name)
    factors = [
        (json.loads((folder / "adapter_config.json").read_bytes()), load_file(folder / "adapter_model.safetensors"))
        for folder in map(Path, pool.adapters)
    ]
    config = json.loads(store.get(f"{uri}/adapter/adapter_config.json", 2**20)[1])
    idle, *peaks = (worker.anonymous for worker in seen.workers)
    by_kind = dict(zip(OUTPUTS, results, strict=True))
    return Done(by_kind, plans, tensors, config, pool.base_tensors, factors, idle, peaks)


def changes(config: Mapping[str, Any], tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (module, change in float64) of an adapter."""
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")].double()
            yield (
                key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"),
                scale * b @ tensors[key].double(),
            )


def ties_of_one_module(done: Done) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one module's merged change in float64, and where rounding can't have decided it."""
    shape = done.base[f"{MODULE}.weight"].shape
    agreeing = {sign: torch.zeros(2, *shape, dtype=torch.float64) for sign in (1, -1)}  # sum, count
    sure, size = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.float64)
    for config, tensors in done.factors:
        if f"base_model.model.{MODULE}.lora_A.weight" not in tensors:
            continue
        change = dict(changes(config, tensors))
        magnitudes = torch.cat([one.abs().flatten() for one in change.values()])
        threshold = magnitudes.kthvalue(len(magnitudes) - int(DENSITY * len(magnitudes)) + 1).values
        own = change[MODULE]
        sure &= (own.abs() - threshold).abs() > 1e-5 * threshold
        own = torch.where(own.abs() >= threshold, own, 0.0)
        size += own.abs()
        for sign, (total, count) in agreeing.items():
            total += own * (own.sign() == sign)
            count += own.sign() == sign
    balance = agreeing[1][0] + agreeing[-1][0]
    total, count = torch.where(balance > 0, agreeing[1], agreeing[-1])
    sure &= (balance.abs() > NUM_ADAPTERS * UNIT * size) | (size == 0)
    return torch.where(balance == 0, 0.0, total / count.clamp(min=1)), sure


@pytest.mark.timeout(900)  # a minute or so of two cores, which others may be using
def test_200_adapters_merge_on_ray_from_a_bucket_to_all_three_outputs_within_the_planned_memory(done: Done) -> None:
    for kind, result in done.results.items():
        plan = done.plans[kind]
        assert (result.status, result.workers_lost, result.shards_again) == ("done", 0, 0)
        assert len(plan.merges[0].members) == len(result.trims) == NUM_ADAPTERS
        assert 0 < result.bytes_read <= plan.bytes_read
        assert result.requests <= sum(one.requests for one in plan.merges[0].rounds)
    planned = {kind: plan.memory for kind, plan in done.plans.items()}
    of_whom = [kind for kind, count in WORKERS.items() for _ in range(count)]
    for kind, peak in zip(of_whom, done.peaks, strict=True):
        taken = peak - done.idle
        assert 10 * 2**20 < taken <= planned[kind], f"{kind}: {taken:,} of {planned[kind]:,} bytes"

    delta, checkpoint = done.tensors["delta"], done.tensors["checkpoint"]
    wanted, sure = ties_of_one_module(done)
    found = delta[f"{MODULE}.weight"].double()
    assert sure.double().mean() > 0.99
    assert float((found - wanted).abs()[sure].max()) < 1e-6 * float(wanted.abs().max())
    assert checkpoint.keys() == done.base.keys()
    for name, base in done.base.items():
        whole = (base.float() + delta[name]).to(base.dtype) if name in delta else base
        assert torch.equal(checkpoint[name], whole), name

    config, factors, truncation = done.config, done.tensors["adapter"], done.results["adapter"].truncation
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (64, 64, {})
    assert truncation
    products = dict(changes(config, factors))
    assert {f"{path}.weight" for path in products} == delta.keys() == truncation.matrices.keys()
    error2 = norm2 = 0.0
    for path, product in products.items():
        change = delta[f"{path}.weight"].double()
        error, norm = float((product - change).norm()), float(change.norm())
        assert truncation.matrices[f"{path}.weight"] == pytest.approx(error / norm, rel=1e-4)
        error2, norm2 = error2 + error**2, norm2 + norm**2
    assert truncation.relative_error == pytest.approx((error2 / norm2) ** 0.5, rel=1e-4)
    assert 0.1 < truncation.relative_error < 1
