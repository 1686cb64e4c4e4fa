"""Whole merges of LoRA adapters: what they come to, and what must not change it."""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.promises.test_same_bytes import reads_counted
from tests.tools import oracle
from tests.tools.adapters import ATTENTION, MLP, Pool, make_pool, rounding_of
from tests.tools.families import Family, Tensors, write_checkpoint
from tests.tools.merging import LOCAL, draw_sizes, merge_and_die, read_tensors
from tests.tools.oracle import Answer, Change, Rules
from ties_ray.layout.sizes import Sizes
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import RESULT_NAME, MergeResult, Progress
from ties_ray.stores import Stores

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own
    import peft
    import transformers

MakePool = Callable[..., Pool]
EVERYTHING = (*ATTENTION, *MLP)
SPREAD = (EVERYTHING, ("q_proj", "v_proj"), ("k_proj", "down_proj", "o_proj"), ("v_proj", "up_proj"))
"""Targets of which no two adapters have the same, and some modules only one."""
POOLS: dict[str, dict[str, Any]] = {
    "mixed": {"num_adapters": 4, "ranks": (8, 3, 16), "alphas": (16, 8, 3), "targets": SPREAD},
    "rslora": {"variants": ("plain", "rslora"), "dtype": "BF16", "base_dtype": "BF16", "seed": 1},
    "dora": {"variants": ("dora", "plain"), "ranks": (4, 8), "seed": 2},
    "embeddings": {"targets": (("embed_tokens", "q_proj"), ("lm_head", "embed_tokens"), ("lm_head",)), "dtype": "F16"},
    "fan_in_fan_out": {"transposed": True, "targets": SPREAD, "seed": 3},
}
RULES: dict[str, Rules] = {
    "ties": Rules("ties", 0.2, 0.7),
    "ties union": Rules("ties", 0.2, union=True),
    "ties tensor": Rules("ties", 0.3, tensor=True),
    "ties majority": Rules("ties", 0.2, zero_sum="majority", merge="max"),
    "ties sum, untrimmed": Rules("ties", 1.0, merge="sum"),
    "average": Rules("average"),
    "average skip": Rules("average", skip=True),
    "task_arithmetic": Rules("task_arithmetic", lambda_=0.3),
    "dare": Rules("dare", 0.4, seed=5),
    "dare ties": Rules("dare", 0.4, 1.5, elects=True),
    "consensus": Rules("consensus", lambda_=0.5),
}


def method_of(rules: Rules) -> dict[str, Any]:
    """Return the recipe's method of the oracle's rules."""
    name = rules.method
    method: dict[str, Any] = {"name": name}
    if name != "average":
        method["lambda"] = rules.lambda_
    if name == "average":
        method["missing_module"] = "skip" if rules.skip else "zero"
    if name == "ties":
        method |= {"density": rules.density, "trim": "tensor" if rules.tensor else "global", "merge": rules.merge}
        method |= {"denominator": "union" if rules.union else "adapter", "zero_sum": rules.zero_sum}
    if name == "dare":
        method |= {"density": rules.density, "seed": rules.seed, "combine": "ties" if rules.elects else "linear"}
    return method


@pytest.fixture(scope="session")
def pool_of(tmp_path_factory: pytest.TempPathFactory) -> MakePool:
    """Return `make_pool` on this disk, which makes each pool once; the tests that share it only read it."""
    root, store, made = tmp_path_factory.mktemp("pools"), Stores({}).of("/"), dict[str, Pool]()

    def make(**how: Any) -> Pool:
        key = hashlib.sha256(repr(sorted(how.items())).encode()).hexdigest()[:8]
        if key not in made:
            made[key] = make_pool(store, str(root / key), **how)
        return made[key]

    return make


def recipe_of(
    pool: Pool,
    output: Path,
    method: object,
    kind: str = "delta",
    *,
    models: Sequence[Mapping[str, object]] = (),
    base: bool = True,
    settings: Mapping[str, object] | None = None,
    **more: Any,
) -> Recipe:
    """Return the recipe of a pool's adapters (or `models`); settings: further ones of the output."""
    data: dict[str, Any] = {
        "models": list(models or [{"path": uri} for uri in pool.adapters]),
        "method": method,
        "output": {"path": str(output), "kind": kind, **(settings or {})},
        "run": LOCAL,
    }
    return validate(data | ({"base": pool.base} if base else {}) | more)


def merged(pool: Pool, output: Path, method: object, kind: str = "delta", **more: Any) -> MergeResult:
    return merging.merge(recipe_of(pool, output, method, kind, **more))


def tensors_of(folder: Path) -> Tensors:
    """Return all tensors of an output of any kind."""
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


def digests_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of all weight files, and of the file by which a loader finds them."""
    names = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
    paths = [path for name in names for path in folder.glob(name)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def changes_of(pool: Pool) -> list[Change]:
    return [
        Change(
            {name: each.flatten() for name, each in delta.items()}, {n: e.flatten() for n, e in error.items()}, False
        )
        for delta, error in zip(pool.deltas, pool.errors, strict=True)
    ]


def check_delta(answer: Answer, found: Tensors, shapes: Tensors) -> None:
    """Assert that a merged change is the oracle's."""
    assert {name: each.shape for name, each in found.items()} == {name: shapes[name].shape for name in answer.value}
    zeros = {name: torch.zeros(shapes[name].shape) for name in answer.value}
    oracle.check(Family("", (), zeros, ()), answer, found)


def check_trims(result: MergeResult, answer: Answer) -> None:
    """Assert that thresholds, sizes and kept counts are the oracle's: the threshold to rounding."""
    assert {(trim.model, trim.parameter) for trim in result.trims} == answer.trims.keys()
    for trim in result.trims:
        wanted = answer.trims[trim.model, trim.parameter]
        assert trim.threshold == pytest.approx(wanted.threshold, rel=1e-4), trim
        assert (trim.size, trim.kept) == (wanted.size, wanted.kept), trim


# What adapters merge to.


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("pool_name", POOLS)
def test_the_merged_change_is_the_dense_oracles(pool_name: str, rules: str, pool_of: MakePool, tmp_path: Path) -> None:
    pool = pool_of(**POOLS[pool_name])
    answer = oracle.merge_changes(changes_of(pool), RULES[rules])
    result = merged(pool, tmp_path / "out", method_of(RULES[rules]))
    check_delta(answer, tensors_of(tmp_path / "out"), pool.base_tensors)
    check_trims(result, answer)


@pytest.mark.parametrize("pool_name", POOLS)
def test_a_checkpoint_is_the_base_plus_the_merged_change(pool_name: str, pool_of: MakePool, tmp_path: Path) -> None:
    pool = pool_of(**POOLS[pool_name])
    merged(pool, tmp_path / "out", "ties", "checkpoint")
    answer = oracle.merge_changes(changes_of(pool), Rules("ties", 0.2))
    oracle.check(Family("", (), pool.base_tensors, ()), answer, read_tensors(tmp_path / "out"))
    merged(pool, tmp_path / "delta", "ties")
    found = read_tensors(tmp_path / "out")
    for name, change in tensors_of(tmp_path / "delta").items():
        base = pool.base_tensors[name]
        assert torch.equal(found[name], (base.float() + change).to(base.dtype)), name


@pytest.mark.parametrize("rules", ["ties", "ties union", "ties tensor", "average", "average skip", "dare ties"])
def test_weights_and_densities_of_single_adapters_count(rules: str, pool_of: MakePool, tmp_path: Path) -> None:
    pool, own = pool_of(**POOLS["mixed"]), RULES[rules]
    weights, densities = [1.0, 0.25, 0.0, 2.5], [None, 1.0, 0.5, 0.05]
    models: list[dict[str, object]] = [
        {"path": uri, "weight": weight} for uri, weight in zip(pool.adapters, weights, strict=True)
    ]
    if own.method != "average":
        for model, density in zip(models, densities, strict=True):
            model |= {} if density is None else {"density": density}
    answer = oracle.merge_changes(changes_of(pool), own, weights=weights, densities=densities)
    result = merged(pool, tmp_path / "out", method_of(own), models=models)
    found = tensors_of(tmp_path / "out")
    only_dropped = {name: each for name, each in found.items() if name not in answer.value}
    assert all(not each.any() for each in only_dropped.values())
    check_delta(answer, {name: each for name, each in found.items() if name in answer.value}, pool.base_tensors)
    check_trims(result, answer)


@pytest.mark.parametrize("rules", ["ties", "ties union", "ties tensor", "average", "average skip", "consensus"])
def test_adapters_and_checkpoints_merge_in_one_recipe_each_with_the_size_of_its_kind(
    rules: str, pool_of: MakePool, tmp_path: Path
) -> None:
    pool = pool_of(**POOLS["mixed"])
    noise = torch.Generator().manual_seed(9)
    wholes = [
        {name: each + 0.02 * torch.randn(each.shape, generator=noise) for name, each in pool.base_tensors.items()}
        for _ in range(2)
    ]
    for number, whole in enumerate(wholes):
        write_checkpoint(Stores({}).of("/"), str(tmp_path / f"whole-{number}"), whole)
    of_wholes = [
        Change({name: (whole[name] - base).flatten() for name, base in pool.base_tensors.items()}) for whole in wholes
    ]
    first, *others = changes_of(pool)
    answer = oracle.merge_changes([of_wholes[0], first, of_wholes[1], *others], RULES[rules])
    paths = [str(tmp_path / "whole-0"), pool.adapters[0], str(tmp_path / "whole-1"), *pool.adapters[1:]]
    models = [{"path": path} for path in paths]
    result = merged(pool, tmp_path / "out", method_of(RULES[rules]), "checkpoint", models=models)
    oracle.check(Family("", (), pool.base_tensors, ()), answer, read_tensors(tmp_path / "out"))
    check_trims(result, answer)
    if rules == "ties union":
        sizes = {trim.model: trim.size for trim in result.trims}
        everything = sum(each.numel() for each in pool.base_tensors.values())
        of_layers = sum(each.numel() for name, each in pool.base_tensors.items() if "_proj" in name)
        assert sizes == {"0": everything, "2": everything, **dict.fromkeys(("1", "3", "4", "5"), of_layers)}


def test_without_a_base_the_change_is_the_same_to_the_byte(pool_of: MakePool, tmp_path: Path) -> None:
    pool = pool_of(**POOLS["embeddings"])
    merged(pool, tmp_path / "with", "ties")
    merged(pool, tmp_path / "without", "ties", base=False)
    with_base, without = tensors_of(tmp_path / "with"), tensors_of(tmp_path / "without")
    assert with_base.keys() == without.keys()
    assert all(torch.equal(with_base[name], without[name]) for name in with_base)


# One adapter is what PEFT merges.


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=48, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=48, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(config)


PATTERNS = {"rank_pattern": {"layers.0.self_attn.q_proj": 7}, "alpha_pattern": {".*.(up|down)_proj": 3}}
OF_PEFT: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "plain": (llama, {"r": 4, "lora_alpha": 6, "target_modules": [*EVERYTHING]}),
    "rslora, patterns": (llama, {"r": 4, "target_modules": [*EVERYTHING], "use_rslora": True, **PATTERNS}),
    "dora": (llama, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "embedding": (llama, {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "fan_in_fan_out": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


def written_by_peft(make: Callable[[], torch.nn.Module], config: Mapping[str, Any], folder: Path) -> Any:
    """Save a base and an adapter whose numbers have all moved; return the adapted model."""
    torch.manual_seed(0)
    model: Any = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "base")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) / 16)
        adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return adapted


@pytest.mark.parametrize("variant", OF_PEFT)
def test_one_adapter_at_density_1_and_lambda_1_is_what_peft_merges(variant: str, tmp_path: Path) -> None:
    adapted = written_by_peft(*OF_PEFT[variant], tmp_path)
    merging.merge(validate({
        "base": str(tmp_path / "base"), "models": [str(tmp_path / "adapter")],
        "method": {"name": "ties", "density": 1, "lambda": 1}, "output": str(tmp_path / "out"), "run": LOCAL,
    }))  # fmt: skip
    found, base = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = adapted.merge_and_unload().state_dict()
    assert found.keys() == base.keys() <= wanted.keys()
    moved = [name for name in found if not torch.equal(found[name], base[name])]
    assert len(moved) >= 3
    for name, each in found.items():
        torch.testing.assert_close(each, wanted[name], rtol=1e-6, atol=1e-6, msg=name)


# What must not change a byte.

LARGE = {"hidden": 256, "layers": 4, "ranks": (8, 64, 512), "num_adapters": 4, "dtype": "BF16",
         "targets": (EVERYTHING, ("q_proj", "v_proj"), ("k_proj",), ("gate_proj",))}  # fmt: skip
"""A change of 9.5 MB, two parts of the smallest size; the ranks reach beyond the width."""


@pytest.fixture(scope="session")
def wanted(pool_of: MakePool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Return the digests of the large pool's merges by kind of output: one worker, one part a file."""
    folder = tmp_path_factory.mktemp("wanted")
    pool = pool_of(**LARGE)
    for kind in KINDS:
        merged(pool, folder / kind, METHOD, kind, settings={"part_size": "64MiB", **KINDS[kind]})
    assert (folder / "delta" / "delta.safetensors").stat().st_size > 9 * 2**20
    return {kind: digests_of(folder / kind) for kind in KINDS}


KINDS: dict[str, dict[str, object]] = {"checkpoint": {}, "delta": {}, "adapter": {"rank": "auto", "energy": 0.5}}
METHOD = {"name": "ties", "density": 0.3}


@pytest.mark.parametrize(
    ("part_size", "workers", "memory", "cache"),
    [("5MiB", 1, "512MiB", "64MB"), ("7MiB", 2, "256MiB", 0), ("64MiB", 3, "1GiB", 0), ("5MiB", 3, "256MiB", "2MB")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_workers_memory_and_cache_change_no_byte(
    kind: str,
    part_size: str,
    workers: int,
    memory: str,
    cache: object,
    pool_of: MakePool,
    wanted: dict[str, dict[str, str]],
    tmp_path: Path,
) -> None:
    run = {**LOCAL, "workers": workers, "memory": memory, "cache": cache}
    settings = {"part_size": part_size, **KINDS[kind]}
    merged(pool_of(**LARGE), tmp_path / "out", METHOD, kind, settings=settings, run=run)
    assert digests_of(tmp_path / "out") == wanted[kind]


def in_float32(pool: Pool, folder: Path) -> Pool:
    """Return a copy of a pool whose factors are stored in F32, with the same values."""
    uris = []
    for uri in pool.adapters:
        copy = folder / Path(uri).name
        shutil.copytree(uri, copy)
        tensors = {name: each.float() for name, each in load_file(copy / "adapter_model.safetensors").items()}
        save_file(tensors, copy / "adapter_model.safetensors")
        uris.append(str(copy))
    return replace(pool, adapters=tuple(uris))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_factors_give_equal_bytes_whatever_they_are_stored_in(
    kind: str, pool_of: MakePool, wanted: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    pool = in_float32(pool_of(**LARGE), tmp_path)
    merged(pool, tmp_path / "out", METHOD, kind, settings=KINDS[kind])
    assert digests_of(tmp_path / "out") == wanted[kind]


def test_another_cpu_gives_the_same_bytes(pool_of: MakePool, wanted: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """Neither what numba compiles for nor what MKL dispatches to; the adapter goes through LAPACK and may differ."""
    recipes = [recipe_of(pool_of(**LARGE), tmp_path / kind, METHOD, kind) for kind in ("checkpoint", "delta")]
    (tmp_path / "recipes").write_text(
        "\n".join(one.model_dump_json(exclude_unset=True, by_alias=True) for one in recipes)
    )
    script = "import sys; from ties_ray.operations import merging; from ties_ray.recipe.parse import parse\n"
    script += "for line in open(sys.argv[1]): merging.merge(parse(line))"
    other = {"NUMBA_CPU_NAME": "generic", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "default"}
    environment = os.environ | other | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", script, str(tmp_path / "recipes")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind in ("checkpoint", "delta"):
        assert digests_of(tmp_path / kind) == wanted[kind]


@pytest.mark.parametrize("seed", range(8))
def test_any_sizes_any_interruption_and_any_number_of_workers_give_the_same_bytes(
    seed: int, pool_of: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes below which a cut is invisible, drawn at random and small; rows and factors are cut anywhere."""
    draw = random.Random(seed)
    pool = pool_of(**POOLS[draw.choice([*POOLS])])
    method = method_of(RULES[draw.choice([*RULES])])
    kind = draw.choice(["delta", "adapter", "adapter"])
    settings = {"rank": draw.choice([8, "auto"]), "energy": 0.8} if kind == "adapter" else {}
    whole = merged(pool, tmp_path / "whole", method, kind, settings=settings)

    sizes = draw_sizes(draw)
    run = {**LOCAL, "workers": draw.choice([1, 2, 3]), "cache": draw.choice([0, 3000, "64MB"])}
    recipe = recipe_of(pool, tmp_path / "cut", method, kind, settings=settings, run=run)

    events = draw.randint(1, 60)
    result = interrupted_after(events, recipe, sizes) or merging.merge(recipe, sizes=sizes)
    assert digests_of(tmp_path / "cut") == digests_of(tmp_path / "whole")
    assert result.trims == whole.trims
    assert result.truncation == whole.truncation


def interrupted_after(events: int, recipe: Recipe, sizes: Sizes) -> MergeResult | None:
    """Merge until so many events have been seen; return the result if there were fewer."""
    seen = itertools.count(1)

    def watch(progress: Progress) -> None:
        if next(seen) == events:
            raise KeyboardInterrupt

    try:
        return merging.merge(recipe, watch=watch, sizes=sizes)
    except KeyboardInterrupt:
        return None


# Kill anything, lose nothing.

AUTO = {"rank": "auto", "energy": 0.6, "max_rank": 16}
DEATHS: dict[str, dict[str, object]] = {
    "before the first matrix is in scratch": {"what": "put", "uri": "*/scratch/*"},
    "between scratch and record": {"when": "after", "what": "put", "uri": "*/scratch/*", "count": 5},
    "before the record of the matrices": {"what": "put", "uri": "*/records/2/*"},
    "before the barrier of the matrices": {"what": "put", "uri": "*/folded/2/*"},
    "after the barrier of the matrices": {"when": "after", "what": "put", "uri": "*/folded/2/*"},
    "before the settled rank is stored": {"what": "put", "uri": "*/plan-2.json.gz"},
    "after the settled rank is stored": {"when": "after", "what": "put", "uri": "*/plan-2.json.gz"},
    "while the adapter is assembled": {"what": "write_part"},
    "after the record of the adapter": {"when": "after", "what": "put", "uri": "*/records/3/*"},
    "after the upload is complete": {"when": "after", "what": "complete_upload"},
    "before the config": {"what": "put", "uri": "*/adapter_config.json"},
    "before the result record": {"what": "put", "uri": f"*/{RESULT_NAME}"},
}


def frail_recipe(pool: Pool, folder: Path, point: Mapping[str, object], kind: str = "adapter", **more: Any) -> Recipe:
    """Return a recipe whose output kills the process that touches it at a point, once."""
    storage = {"frail": {**point, "marker": str(folder / "died")}}
    made = recipe_of(pool, folder / "out", "ties", kind, storage=storage, **more)
    return made.model_copy(update={"output": made.output.model_copy(update={"path": f"frail://{folder / 'out'}"})})


@pytest.fixture(scope="session")
def whole_adapter(pool_of: MakePool, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], MergeResult]:
    """Return what an uninterrupted merge writes, and its result."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = merged(pool_of(**POOLS["mixed"]), folder, "ties", "adapter", settings=AUTO)
    assert result.truncation
    assert result.truncation.rank == 8, "the rank is settled below the largest"
    return digests_of(folder), result


@pytest.mark.parametrize("name", DEATHS)
def test_the_same_command_continues_an_adapter_wherever_the_run_was_killed(
    name: str, pool_of: MakePool, whole_adapter: tuple[dict[str, str], MergeResult], tmp_path: Path, plugged: Path
) -> None:
    recipe = frail_recipe(pool_of(**POOLS["mixed"]), tmp_path, DEATHS[name], settings=AUTO)
    assert merge_and_die(recipe, plugged) == -9
    seen = {path.name for path in (tmp_path / "out").glob("*")}
    assert RESULT_NAME not in seen
    assert ("adapter_config.json" in seen) == (name == "before the result record")

    result = merging.merge(recipe)
    assert digests_of(tmp_path / "out") == whole_adapter[0]
    assert (result.resumed, result.truncation) == (True, whole_adapter[1].truncation)
    assert not list((tmp_path / "out").glob(".ties-ray/*/*/scratch/*")), "scratch is gone when nobody needs it"
    assert merging.merge(recipe).reused


DEATHS_OF_A_SURVEY: dict[str, dict[str, object]] = {
    "before the record of the survey": {"what": "put", "uri": "*/records/0/*"},
    "after the barrier of the survey": {"when": "after", "what": "put", "uri": "*/folded/0/*"},
    "before the smaller plan is stored": {"what": "put", "uri": "*/plan-1.json.gz"},
    "after the smaller plan is stored": {"when": "after", "what": "put", "uri": "*/plan-1.json.gz"},
    "before the thresholds are known": {"what": "put", "uri": "*/folded/2/*"},
    "inside the merge": {"what": "write_part"},
    "before the index": {"what": "put", "uri": "*/delta.safetensors.index.json"},
}


def scaled_copy(uri: str, folder: Path, factor: float) -> str:
    """Copy an adapter with all its B multiplied by a factor; return where it lies."""
    shutil.copytree(uri, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: each * (factor if "lora_B" in name else 1) for name, each in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return str(folder)


@pytest.mark.parametrize("name", DEATHS_OF_A_SURVEY)
def test_a_killed_run_that_dropped_an_adapter_goes_on_without_it(
    name: str, pool_of: MakePool, tmp_path: Path, plugged: Path
) -> None:
    good = pool_of(**POOLS["mixed"])
    absurd = scaled_copy(good.adapters[1], tmp_path / "absurd", 1e6)
    pool = replace(good, adapters=(good.adapters[0], absurd, *good.adapters[1:]))
    rules: dict[str, Any] = {"bounds": {"norm": [0.01, 100]}, "allow": {"refused_model": "drop"}}
    merged(good, tmp_path / "wanted", "ties")
    recipe = frail_recipe(pool, tmp_path, DEATHS_OF_A_SURVEY[name], "delta", **rules)
    assert merge_and_die(recipe, plugged) == -9
    result = merging.merge(recipe)
    assert digests_of(tmp_path / "out") == digests_of(tmp_path / "wanted")
    assert (result.resumed, list(result.refused)) == (True, [absurd])
    assert {trim.model for trim in result.trims} == {"0", "2", "3", "4"}
    assert merging.merge(recipe).reused


# The functions that adapters are, not their factors.


def turned(pool: Pool, folder: Path, how: str) -> tuple[Pool, list[Change]]:
    """Copy a pool of plain adapters with the ranks of each module reordered or rotated; return it, and its changes with
    what rounding does to both."""
    generator = torch.Generator().manual_seed(7)
    uris, changes = [], changes_of(pool)
    for number, uri in enumerate(pool.adapters):
        copy = folder / f"turned-{number}"
        shutil.copytree(uri, copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        tensors = load_file(copy / "adapter_model.safetensors")
        errors = {}
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            other, name = key.replace("lora_A", "lora_B"), key.removeprefix("base_model.model.").replace(".lora_A", "")
            a, b = tensors[key].double(), tensors[other].double()
            turn = torch.linalg.qr(torch.randn(len(a), len(a), generator=generator, dtype=torch.float64))[0]
            if how == "permuted":
                turn = torch.eye(len(a), dtype=torch.float64)[torch.randperm(len(a), generator=generator)]
            tensors[key], tensors[other] = (turn.T @ a).float().contiguous(), (b @ turn).float().contiguous()
            # once as it was, once as it is, of which the factors themselves were rounded
            error = 2 * rounding_of(tensors[key], tensors[other], config["lora_alpha"] / config["r"])
            errors[name] = changes[number].errors[name] + error.flatten()
        save_file(tensors, copy / "adapter_model.safetensors")
        uris.append(str(copy))
        changes[number] = changes[number]._replace(errors=errors)
    return replace(pool, adapters=tuple(uris)), changes


@pytest.mark.parametrize("how", ["permuted", "rotated"])
@pytest.mark.parametrize("rules", ["ties", "ties tensor", "ties majority", "consensus", "task_arithmetic", "dare ties"])
def test_reordering_or_rotating_ranks_changes_nothing_but_what_rounding_decides(
    rules: str, how: str, pool_of: MakePool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    pool = pool_of(num_adapters=4, hidden=32, ranks=(8, 3, 16), targets=SPREAD, seed=11)
    other, changes = turned(pool, tmp_path, how)
    merged(pool, tmp_path / "one", method_of(RULES[rules]))
    merged(other, tmp_path / "other", method_of(RULES[rules]))
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other")
    answer = oracle.merge_changes(changes, RULES[rules])
    undecided = differing = moved = total = 0
    for name, first in one.items():
        difference = (first.double() - two[name].double()).abs().flatten()
        size = answer.scale[name] * (len(pool.adapters) + 3)
        differs = difference > 2 * answer.slack[name] + 4 * oracle.UNIT * size
        assert not (differs & answer.sure[name]).any(), name
        undecided, differing = undecided + int((~answer.sure[name]).sum()), differing + int(differs.sum())
        moved, total = moved + int((difference > 0).sum()), total + first.numel()
    record_property("elements that rounding may decide, and that it did", f"{undecided}, {differing} of {total}")
    assert differing <= undecided <= total / 500
    assert moved > total / 100, "the factors are the same, so nothing was tested"


# What an adapter loses, and that it says so.


def products_of(folder: Path) -> Tensors:
    """Return the change that an adapter stands for, in float64, by base parameter and of its shape; alpha is r."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found: Tensors = {}
    assert {r for key, each in tensors.items() for r in [each.shape["B" in key.rpartition("lora_")[2]]]} == {
        config["r"]
    }
    for key in tensors:
        if "lora_A" in key or "lora_embedding_A" in key:
            other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            name = key.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight"
            product = tensors[other].double() @ tensors[key].double()
            found[name] = product.T if "embedding" in key or config["fan_in_fan_out"] else product
    return found


def dense(answer: Answer, pool: Pool) -> Tensors:
    """Return the oracle's merged change, of the parameters' shapes."""
    return {name: answer.ideal(name).reshape(pool.base_tensors[name].shape) for name in answer.value}


def lost(wanted: Tensors, found: Tensors) -> tuple[float, dict[str, float]]:
    """Return the relative error (Frobenius) of all modules together, and of each."""
    assert wanted.keys() == found.keys()
    errors = {name: float((each.double() - found[name]).norm()) for name, each in wanted.items()}
    norms = {name: float(each.double().norm()) for name, each in wanted.items()}
    overall = sum(error**2 for error in errors.values()) / sum(norm**2 for norm in norms.values())
    return float(overall**0.5), {name: error / (norms[name] or 1) for name, error in errors.items()}


def best(wanted: Tensors, rank: int) -> float:
    """Return the smallest relative error of any factors of a rank (Eckart and Young 1936)."""
    spectra = [torch.linalg.svdvals(each.double()) for each in wanted.values()]
    tail = sum(float((values[rank:] ** 2).sum()) for values in spectra)
    return float((tail / sum(float((values**2).sum()) for values in spectra)) ** 0.5)


LINEAR: dict[str, Rules] = {
    "average": RULES["average"], "average skip": RULES["average skip"], "task_arithmetic": RULES["task_arithmetic"]
}  # fmt: skip


@pytest.mark.parametrize("rules", LINEAR)
@pytest.mark.parametrize("pool_name", ["mixed", "rslora", "embeddings", "fan_in_fan_out"])
@pytest.mark.parametrize("hidden", [16, 48])  # the summed ranks reach beyond the narrow one's width
def test_a_linear_merge_is_exact_where_the_rank_suffices(
    hidden: int, pool_name: str, rules: str, pool_of: MakePool, tmp_path: Path
) -> None:
    pool = pool_of(**POOLS[pool_name], hidden=hidden)
    result = merged(pool, tmp_path / "out", method_of(LINEAR[rules]), "adapter", settings={"rank": 64})
    wanted = dense(oracle.merge_changes(changes_of(pool), LINEAR[rules]), pool)
    overall, each = lost(wanted, products_of(tmp_path / "out"))
    assert overall < 1e-6
    assert max(each.values()) < 2e-6
    assert result.truncation
    assert result.truncation.relative_error < 1e-6
    if hidden == 48 and pool_name == "mixed":
        assert result.bytes_read < 2 * sum(
            (Path(uri) / "adapter_model.safetensors").stat().st_size for uri in pool.adapters
        )


@pytest.mark.parametrize("rules", ["task_arithmetic", "average skip", "ties", "ties union", "consensus"])
@pytest.mark.parametrize("pool_name", ["mixed", "dora", "embeddings", "fan_in_fan_out"])
def test_a_low_rank_is_the_best_of_its_rank_and_says_what_it_lost(
    pool_name: str, rules: str, pool_of: MakePool, tmp_path: Path
) -> None:
    pool, method = pool_of(**POOLS[pool_name], hidden=48), method_of(RULES[rules])
    result = merged(pool, tmp_path / "out", method, "adapter", settings={"rank": 5})
    merged(pool, tmp_path / "delta", method)
    change = tensors_of(tmp_path / "delta")
    check_delta(oracle.merge_changes(changes_of(pool), RULES[rules]), change, pool.base_tensors)
    overall, each = lost(change, products_of(tmp_path / "out"))
    assert overall == pytest.approx(best(change, 5), rel=1e-5)
    assert overall > 0.1, "nothing was lost, so nothing was tested"
    truncation = result.truncation
    assert truncation
    assert truncation.rank == 5
    assert truncation.relative_error == pytest.approx(overall, rel=1e-5)
    assert truncation.matrices.keys() == each.keys()
    for name, error in each.items():
        assert truncation.matrices[name] == pytest.approx(error, rel=1e-4, abs=1e-6), name
    told = json.loads((tmp_path / "out" / RESULT_NAME).read_text())["truncation"]
    assert told == truncation.model_dump()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"cut to rank 5 (relative error {truncation.relative_error:.2%})" in card
    assert all(f"| `{name}` | {error:.4%} |" in card for name, error in truncation.matrices.items())


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("rules", ["ties", "task_arithmetic"])
def test_rank_auto_is_the_smallest_that_keeps_the_energy(
    rules: str, energy: float, pool_of: MakePool, tmp_path: Path
) -> None:
    pool, method = pool_of(**POOLS["mixed"], hidden=48), method_of(RULES[rules])
    settings = {"rank": "auto", "energy": energy, "max_rank": 32}
    result = merged(pool, tmp_path / "out", method, "adapter", settings=settings)
    merged(pool, tmp_path / "delta", method)
    change = tensors_of(tmp_path / "delta")
    kept = {rank: 1 - best(change, rank) ** 2 for rank in (8, 16, 32)}
    wanted = next((rank for rank, share in kept.items() if share >= energy), 32)
    assert result.truncation
    assert result.truncation.rank == wanted
    overall, _ = lost(change, products_of(tmp_path / "out"))
    assert overall == pytest.approx(best(change, wanted), rel=1e-4, abs=1e-6)
    assert result.truncation.relative_error == pytest.approx(overall, rel=1e-4, abs=1e-6)


def test_peft_loads_the_merged_adapter_and_its_products_are_ours(pool_of: MakePool, tmp_path: Path) -> None:
    pool = pool_of(num_adapters=3, targets=(EVERYTHING, ("q_proj", "embed_tokens"), ("v_proj",)), hidden=32)
    merged(pool, tmp_path / "out", "ties", "adapter", settings={"rank": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(pool.base, dtype=torch.float32)
        adapted: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    layers = {f"{name}.weight": one for name, one in adapted.base_model.model.named_modules() if hasattr(one, "lora_A")}
    products = products_of(tmp_path / "out")
    assert layers.keys() == products.keys() == set().union(*pool.deltas)
    for name, product in products.items():
        found = layers[name].get_delta_weight("default").detach().double()
        torch.testing.assert_close(found, product, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("rules", ["ties", "average"])
def test_without_a_base_the_adapter_is_the_same_to_the_byte(rules: str, pool_of: MakePool, tmp_path: Path) -> None:
    pool = pool_of(**POOLS["embeddings"])
    for name, base in (("with", True), ("without", False)):
        merged(pool, tmp_path / name, method_of(RULES[rules]), "adapter", base=base, settings={"rank": 8})
    assert digests_of(tmp_path / "with") == digests_of(tmp_path / "without")
    assert len(digests_of(tmp_path / "with")) == 2


@pytest.mark.parametrize("cache", [0, "64MB"])
@pytest.mark.parametrize("kind", ["checkpoint", "delta", "adapter"])
@pytest.mark.parametrize("rules", ["average", "consensus", "ties majority"])
@pytest.mark.parametrize("pool_name", ["mixed", "dora"])
def test_no_more_is_read_than_planned_and_of_the_base_only_what_is_needed(
    pool_name: str, rules: str, kind: str, cache: object, pool_of: MakePool, tmp_path: Path
) -> None:
    pool = pool_of(**POOLS[pool_name], hidden=48)
    run = {**LOCAL, "workers": 2, "cache": cache, "memory": "256MiB"}
    recipe = recipe_of(pool, tmp_path / "out", method_of(RULES[rules]), kind, run=run)
    made = merging.plan(recipe)
    assert min(one.block for one in made.merges[0].rounds) > 2**20, "of factors nothing is gained by less"
    with reads_counted() as counted:
        result = merging.merge(recipe)
    looks = [item for item in counted if item[1:] == (0, 8)]  # each worker sees whether it sees the inputs
    weights = [item for item in counted if item[0].endswith(".safetensors")]  # small files are read at publication
    of_inputs = [item for item in weights if item[0].startswith((pool.base, *pool.adapters)) and item not in looks]
    assert sum(size for _, _, size in of_inputs) == result.bytes_read <= made.bytes_read
    assert len(of_inputs) == result.requests <= sum(one.requests for one in made.merges[0].rounds)
    assert result.bytes_read > 0
    of_base = sum(size for uri, _, size in of_inputs if uri.startswith(pool.base))
    if kind != "checkpoint" and pool_name != "dora":
        assert of_base == 0
    elif kind == "checkpoint":
        assert of_base >= sum(each.nbytes for each in pool.base_tensors.values())
    if cache == 0 and pool_name != "dora":  # of a cache the plan knows only what is certain
        assert result.bytes_read == made.bytes_read


@pytest.mark.parametrize("num_adapters", [1, 3, 9])
def test_the_factors_of_neighbouring_matrices_are_read_at_once(
    num_adapters: int, pool_of: MakePool, tmp_path: Path
) -> None:
    pool = pool_of(num_adapters=num_adapters, targets=(EVERYTHING,) * num_adapters, hidden=48)
    recipe = recipe_of(pool, tmp_path / "out", "average", "delta", run={**LOCAL, "workers": 1, "cache": "64MB"})
    with reads_counted() as counted:
        result = merging.merge(recipe)
    made = merging.plan(recipe)
    matrices = sum(len(deltas) for deltas in pool.deltas)
    of_adapters = [item for item in counted if item[0].startswith(tuple(pool.adapters)) and item[1:] != (0, 8)]
    assert len(of_adapters) == result.requests == sum(one.requests for one in made.merges[0].rounds) <= matrices // 2
    assert len(set(of_adapters)) == len(of_adapters)
    assert result.bytes_read == made.bytes_read == sum(size for *_, size in of_adapters)
    alone = recipe_of(pool, tmp_path / "alone", "average", "delta", run={**LOCAL, "cache": 0})
    merging.merge(alone)
    assert digests_of(tmp_path / "alone") == digests_of(tmp_path / "out")
