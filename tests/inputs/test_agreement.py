"""Pools of adapters: one report of all that is wrong, and merges that leave the bad ones out and say so."""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from tests.tools.adapters import Module, Pool, adapter_files, make_pool
from tests.tools.families import file_bytes, write_checkpoint
from tests.tools.merging import LOCAL, carried_out
from ties_ray.errors import InputError, MergeError, RecipeError
from ties_ray.formats.lora import REASONS
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import RESULT_NAME, MergeResult
from ties_ray.stores import Stores

Files = dict[str, bytes]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
DROP = {"allow": {"refused_model": "drop"}}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 8


def module(out: int, width: int, rank: int = 2) -> Module:
    return normal(rank, width), normal(out, rank), 4.0


def plain(config: Mapping[str, object] | None = None, extra: Mapping[str, torch.Tensor] | None = None) -> Files:
    """Return the files of an adapter of the small llama's, with something changed."""
    named = {PREFIX + key: each for key, each in (extra or {}).items()}
    return adapter_files({Q: module(16, 16), K: module(8, 16)}, config=config, extra=named)


def of(path: str, a: torch.Tensor, b: torch.Tensor) -> Files:
    return adapter_files({path: (a, b, 4.0)}, config={"r": 2})


GOOD = plain()
NAMED: dict[str, Files] = {
    "config_missing": {WEIGHTS: GOOD[WEIGHTS]},
    "config_json": {**GOOD, CONFIG: b"[1, 2"},
    "config_value": plain({"lora_alpha": "sixteen"}),
    "pattern": plain({"rank_pattern": {"(": 2}}),
    "peft_type": plain({"peft_type": "LOHA"}),
    "variant": plain({"use_qalora": True}),
    "layer_replication": plain({"layer_replication": [[0, 1], [0, 1]]}),
    "trainable_tokens": plain({"trainable_token_indices": [3]}),
    "target_parameters": plain({"target_parameters": ["experts.w1"]}),
    "mutated_base": plain({"init_lora_weights": "pissa"}),
    "pickle": {CONFIG: GOOD[CONFIG], "adapter_model.bin": b"cos\nsystem\n"},
    "weights_missing": {CONFIG: GOOD[CONFIG]},
    "nothing": adapter_files({}),
    "empty": of(Q, torch.empty(0), normal(16, 2)),
    "orphan": plain(extra={f"{UP}.lora_A.weight": normal(2, 16)}),
    "prompt": plain({"peft_type": "PROMPT_TUNING"}),
    "conditional": plain({"alora_invocation_tokens": [1]}),
    "residual_base": plain({"init_lora_weights": "corda"}),
    "unknown_initialisation": plain({"init_lora_weights": "unheard-of"}),
    "head": plain(extra={"base_model.model.score.weight": normal(2, 16)}),
    "several_adapters": plain(extra={f"{Q}.lora_A.second.weight": normal(2, 16)}),
    "duplicate": plain(extra={f"base_model.model.{Q}.lora_A.weight": normal(2, 16)}),
    "unknown_tensor": plain(extra={f"{Q}.lora_E": normal(2, 2)}),
    "dtype": of(Q, normal(2, 16).double(), normal(16, 2)),
    "rank_mismatch": plain({"r": 3}),
    "conv": of(Q, normal(2, 16, 3, 3), normal(16, 2, 1, 1)),
    "fused": of("h.mlp.experts.0.up_proj", normal(2, 4), normal(3, 2)),
    "unknown_module": of("model.layers.7.self_attn.q_proj", normal(2, 16), normal(16, 2)),
    "shape_mismatch": of(Q, normal(2, 24), normal(24, 2)),
    "ambiguous_layout": adapter_files({Q: module(16, 16), "h.c_attn": module(36, 16)}),
    "dora_mismatch": plain({"use_dora": True}),
    "dora_transposed": adapter_files(
        {"model.embed_tokens": module(16, 48)},
        config={"use_dora": True},
        extra={f"{PREFIX}model.embed_tokens.lora_magnitude_vector": normal(16)},
    ),
    "resized": plain(extra={"model.embed_tokens.weight": normal(50, 16)}),
    "saved_modules": plain(extra={"model.norm.weight": normal(16)}),
    "base_name": plain({"base_model_name_or_path": "somebody/another-model"}),
    "kind": plain(extra={"lm_head.lora_embedding_A": normal(2, 48), "lm_head.lora_embedding_B": normal(16, 2)}),
    "mlx": {"adapters.safetensors": file_bytes({f"{Q}.lora_a": normal(16, 2), f"{Q}.lora_b": normal(2, 16)})},
    "kohya": {"lora.safetensors": file_bytes({
        "lora_unet_q.lora_down.weight": normal(2, 16), "lora_unet_q.lora_up.weight": normal(16, 2),
        "lora_unet_q.alpha": normal(1),
    })},
    "diffusers": {"pytorch_lora_weights.safetensors": file_bytes({
        "unet.q.lora_A.weight": normal(2, 16), "unet.q.lora_B.weight": normal(16, 2)
    })},
}  # fmt: skip
"""One bad adapter of each reason that headers and configs tell, by its code."""
UNNAMED: dict[str, tuple[Files, str]] = {
    "damaged": ({**GOOD, WEIGHTS: GOOD[WEIGHTS][:-8]}, "offset|size|bytes"),
    "not-safetensors": ({**GOOD, WEIGHTS: b"<html>404</html>"}, "HTML page"),
    "bin-alone": ({"adapter_model.bin": b"cos\nsystem\n"}, "pickles, which can run code"),
    "no-model": ({"notes.txt": b"soon"}, "holds no safetensors file"),
}
"""Likewise what is no adapter at all."""


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """Return three good adapters, adapter-0000 to adapter-0002, of a base that has a few unusual parameters."""
    store = Stores({}).of("/")
    made = make_pool(store, str(tmp_path / "pool"), targets=(("q_proj", "k_proj", "lm_head"), ("q_proj", "v_proj")))
    more = {"h.c_attn.weight": normal(16, 36)}
    more["h.mlp.experts.gate_up_proj"] = normal(1, 6, 4)
    shutil.rmtree(made.base)
    write_checkpoint(store, made.base, {**made.base_tensors, **more}, config={"architectures": ["LlamaForCausalLM"]})
    return made


def add(pool: Pool, name: str, files: Files) -> str:
    """Put a folder between the first good adapter and the second; return its URI."""
    folder = Path(f"{pool.adapters[0]}-{name}")
    folder.mkdir()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return str(folder)


def spoilt(pool: Pool, name: str, key: str, value: float) -> str:
    """Add a copy of the first good adapter with the first value of the tensors that match replaced."""
    copy = Path(f"{pool.adapters[0]}-{name}")
    shutil.copytree(pool.adapters[0], copy)
    tensors = load_file(copy / WEIGHTS)
    for one in [one for one in tensors if one.endswith(key)]:
        tensors[one].view(-1)[0] = value
    save_file(tensors, copy / WEIGHTS)
    return str(copy)


def recipe_of(pool: Pool, folder: Path, models: object = None, **more: Any) -> Recipe:
    data = {
        "base": pool.base,
        "models": models or [f"{Path(pool.base).parent}/adapter-*/"],
        "method": {"name": "dare", "density": 0.5},  # what it keeps depends on the ids
        "output": {"path": str(folder), "kind": "delta"},
        "run": LOCAL,
    }
    return validate(data | more)


def merged(pool: Pool, folder: Path, models: object = None, **more: Any) -> MergeResult:
    return merging.merge(recipe_of(pool, folder, models, **more))


def good_ones(pool: Pool) -> list[dict[str, str]]:
    """Return the good adapters with the ids that they have among all."""
    everything = sorted(str(path) for path in Path(pool.base).parent.glob("adapter-*"))
    return [{"path": uri, "id": str(everything.index(uri))} for uri in pool.adapters]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "delta.safetensors").read_bytes()).hexdigest()


def by_place(error: MergeError) -> dict[str, set[str]]:
    """Return the codes that each adapter's folder is refused with; an empty one where there is none."""
    found: dict[str, set[str]] = {}
    for problem in error.problems:
        (name,) = {part for part in problem.where.replace(": ", "/").split("/") if part.startswith("adapter-")}
        found.setdefault(name, set()).add(problem.code)
    return found


def all_bad(pool: Pool) -> list[str]:
    added = [add(pool, code, files) for code, files in NAMED.items()]
    return added + [add(pool, name, files) for name, (files, _) in UNNAMED.items()]


# What headers and configs tell.


def test_one_bad_adapter_of_each_kind_gives_one_complete_report(pool: Pool, tmp_path: Path) -> None:
    all_bad(pool)
    with pytest.raises(InputError, match="scale is unknown") as raised:
        merged(pool, tmp_path / "out")
    assert REASONS.keys() - {"tied", "not_floating"} <= NAMED.keys()  # those depend on the base
    wanted = {f"adapter-0000-{code}": {code} for code in NAMED} | {f"adapter-0000-{name}": {""} for name in UNNAMED}
    wanted["adapter-0000-not-safetensors"] = {"download"}
    assert by_place(raised.value) == wanted
    for name, (_, words) in UNNAMED.items():
        assert [p for p in raised.value.problems if name in p.where and matches(words, p.what)], name
    assert all(problem.remedy for problem in raised.value.problems if problem.code)
    assert not (tmp_path / "out").exists()


def matches(words: str, text: str) -> bool:
    return any(word in text for word in words.split("|"))


def test_the_merge_runs_without_the_bad_ones_where_that_is_allowed_and_lists_them(pool: Pool, tmp_path: Path) -> None:
    bad = all_bad(pool)
    result = merged(pool, tmp_path / "out", **DROP)
    merged(pool, tmp_path / "good", good_ones(pool))
    assert digest(tmp_path / "out") == digest(tmp_path / "good")
    assert result.refused.keys() == set(bad)
    for code in NAMED:
        assert f"[{code}]" in " ".join(result.refused[f"{pool.adapters[0]}-{code}"])
    card = (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / RESULT_NAME).read_text())
    assert record["refused"] == result.refused
    for uri in bad:
        assert uri.rpartition("/")[2] in card
        assert [note for note in result.notes if note.startswith("left out, as allowed") and uri in note], uri
    assert result.provenance
    assert [model.uri for model in result.provenance.models] == list(pool.adapters)


def test_other_ids_are_another_merge(pool: Pool, tmp_path: Path) -> None:
    """What the test above rests on."""
    add(pool, "config_json", NAMED["config_json"])
    merged(pool, tmp_path / "out", **DROP)
    merged(pool, tmp_path / "good", list(pool.adapters))
    assert digest(tmp_path / "out") != digest(tmp_path / "good")


def test_a_pool_of_which_nothing_is_left_is_refused(pool: Pool, tmp_path: Path) -> None:
    bad = all_bad(pool)
    with pytest.raises(InputError, match="scale is unknown") as raised:
        merged(pool, tmp_path / "out", bad[:5], **DROP)
    assert len(raised.value.problems) == 5


def test_a_bad_base_is_never_dropped(pool: Pool, tmp_path: Path) -> None:
    (Path(pool.base) / "model.safetensors").write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match="base"):
        merged(pool, tmp_path / "out", **DROP)


def test_small_files_can_not_come_from_an_adapter_that_was_left_out(pool: Pool, tmp_path: Path) -> None:
    uri = add(pool, "config_json", NAMED["config_json"])
    output = {"path": str(tmp_path / "out"), "kind": "checkpoint", "files_from": uri}
    with pytest.raises(
        RecipeError,
        match=r"output\.files_from: .*config_json. is left out of the merge: adapter_config\.json is not a JSON",
    ):
        merged(pool, tmp_path, output=output, **DROP)


def test_other_names_of_the_base_are_let_through_where_the_recipe_lists_them(pool: Pool, tmp_path: Path) -> None:
    add(pool, "base_name", NAMED["base_name"])
    for number, patterns in enumerate((["tests/*", "somebody/another-*"], ["*"])):
        result = merged(pool, tmp_path / f"out-{number}", allow={"base_names": patterns})
        assert result.provenance
        assert len(result.provenance.models) == 4
    with pytest.raises(InputError, match=r"base is 'tests/llama'; is not among allow\.base_names") as raised:
        merged(pool, tmp_path / "none", allow={"base_names": ["somebody/*"]})
    assert by_place(raised.value).keys() == {Path(uri).name for uri in pool.adapters}


def named_bases(pool: Pool, *names: str) -> list[str]:
    """Let adapters of the pool call their base so; return their URIs."""
    for uri, name in zip(pool.adapters, names, strict=False):
        config = Path(uri) / CONFIG
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": name}))
    return list(pool.adapters[: len(names)])


def test_a_slash_case_and_address_are_no_other_name_of_a_base(pool: Pool, tmp_path: Path) -> None:
    models = named_bases(pool, "Org/Base", "org/base/", "https://huggingface.co/org/base")
    result = merged(pool, tmp_path / "out", models)
    assert {model.facts["base_name"] for model in carried_out(result).catalog.models} == {"Org/Base"}


def test_the_remedy_for_several_names_can_be_pasted_into_the_recipe(pool: Pool, tmp_path: Path) -> None:
    models = named_bases(pool, "org/base", "/data/[x] models/base", "unsloth/base-bnb-4bit")
    with pytest.raises(InputError, match="base_name") as raised:
        merged(pool, tmp_path / "out", models)
    (line,) = {re.search(r"allow: (\{.*\})", problem.remedy)[1] for problem in raised.value.problems}  # type: ignore[index]
    merged(pool, tmp_path / "out", models, allow=YAML(typ="safe").load(line))


def test_a_table_of_twins_gives_their_base_one_name(pool: Pool, tmp_path: Path) -> None:
    models = named_bases(pool, "org/base", "unsloth/base-bnb-4bit", "else/where")
    twins = {"base_names": {"org/base": ["unsloth/base*"]}}
    with pytest.raises(InputError, match=r"'else/where'; 2 of 3 name 'org/base'"):
        merged(pool, tmp_path / "out", models, allow=twins)
    result = merged(pool, tmp_path / "out", models[:2], allow=twins)
    assert {model.facts["base_name"] for model in carried_out(result).catalog.models} == {"org/base"}


def shortened(pool: Pool, uri: str) -> None:
    """Let an adapter spell its modules as one trained without the head does."""
    weights = Path(uri) / WEIGHTS
    tensors = load_file(weights)
    save_file({key.replace("model.model.", "model.", 1): tensor for key, tensor in tensors.items()}, weights)


def test_two_spellings_of_the_modules_are_one_with_a_base_and_refused_without(pool: Pool, tmp_path: Path) -> None:
    models = list(pool.adapters)
    adapter = {"kind": "adapter", "rank": 32}
    merged(pool, tmp_path, models, output={"path": str(tmp_path / "same"), **adapter})
    shortened(pool, models[1])
    merged(pool, tmp_path, models, output={"path": str(tmp_path / "out"), **adapter})
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    with pytest.raises(InputError, match=r"layers\.0\.self_attn.*\[spelling\]; name the `base`") as raised:
        merged(pool, tmp_path / "none", models, base=None)
    assert by_place(raised.value) == {Path(models[1]).name: {"spelling"}}


def test_without_a_base_adapters_must_agree_with_each_other_and_need_none(pool: Pool, tmp_path: Path) -> None:
    add(pool, "shape", NAMED["shape_mismatch"])
    add(pool, "kind", NAMED["kind"])
    dora = {"use_dora": True}
    extra = {f"{PREFIX}{Q}.lora_magnitude_vector": normal(16)}
    add(pool, "needs_base", adapter_files({Q: module(16, 16)}, config=dora, extra=extra))
    with pytest.raises(InputError, match="needs_base") as raised:
        merged(pool, tmp_path / "out", base=None)
    assert by_place(raised.value) == {f"adapter-0000-{code}": {code} for code in ("shape", "kind", "needs_base")}
    result = merged(pool, tmp_path / "dropped", base=None, **DROP)
    assert len(result.refused) == 3
    merged(pool, tmp_path / "good", good_ones(pool), base=None)
    assert digest(tmp_path / "dropped") == digest(tmp_path / "good")


# What only bytes tell.

BOUNDS = {"bounds": {"norm": [0.05, 50]}}


def add_unsound(pool: Pool) -> dict[str, str]:
    """Add adapters with one value each that is not finite or absurd; return their URIs by the reason's code."""
    return {
        "nan in A": spoilt(pool, "nan-a", "lora_A.weight", float("nan")),
        "inf in B": spoilt(pool, "inf-b", "lora_B.weight", float("inf")),
        "too large": spoilt(pool, "large", "lora_B.weight", 1e6),
        "too small": scaled(pool, "small", 1e-6),
    }


def scaled(pool: Pool, name: str, factor: float) -> str:
    copy = Path(f"{pool.adapters[0]}-{name}")
    shutil.copytree(pool.adapters[0], copy)
    tensors = load_file(copy / WEIGHTS)
    save_file({key: each * (factor if "lora_B" in key else 1) for key, each in tensors.items()}, copy / WEIGHTS)
    return str(copy)


def test_the_first_reading_names_every_adapter_that_is_not_finite_or_out_of_bounds(pool: Pool, tmp_path: Path) -> None:
    bad = add_unsound(pool)
    with pytest.raises(InputError, match="NaN or Inf") as raised:
        merged(pool, tmp_path / "out", **BOUNDS)
    assert {problem.where: problem.code for problem in raised.value.problems} == {
        bad["nan in A"]: "nan", bad["inf in B"]: "nan", bad["too large"]: "norm", bad["too small"]: "norm"
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == []


@pytest.mark.parametrize("kind", ["delta", "adapter", "checkpoint"])
@pytest.mark.parametrize("method", [{"name": "ties", "denominator": "union"}, {"name": "average"}], ids=str)
def test_the_merge_goes_on_without_them_where_that_is_allowed(
    method: dict[str, str], kind: str, pool: Pool, tmp_path: Path
) -> None:
    bad = add_unsound(pool)
    extra: dict[str, Any] = {"method": method, "output": {"path": str(tmp_path / "out"), "kind": kind}}
    result = merged(pool, tmp_path, **extra, **BOUNDS, **DROP)
    extra["output"] = {"path": str(tmp_path / "good"), "kind": kind}
    merged(pool, tmp_path, good_ones(pool), **extra)
    for file in (tmp_path / "good").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert result.refused.keys() == set(bad.values())
    card = (tmp_path / "out" / "README.md").read_text()
    for uri in bad.values():
        assert uri.rpartition("/")[2] in card
        assert [note for note in result.notes if uri in note]


def test_norms_are_those_of_the_whole_change(pool: Pool, tmp_path: Path) -> None:
    norms = [sum(float(each.norm() ** 2) for each in delta.values()) ** 0.5 for delta in pool.deltas]
    assert min(norms[0], norms[2]) > 1.01 * norms[1]
    inside = merged(pool, tmp_path / "in", bounds={"norm": [0.9999 * min(norms), 1.0001 * max(norms)]})
    assert not inside.refused
    with pytest.raises(InputError, match=rf"has the norm {norms[1]:.4g}") as raised:
        merged(pool, tmp_path / "out", bounds={"norm": [1.0001 * norms[1], 1.0001 * max(norms)]})
    assert [problem.where for problem in raised.value.problems] == [pool.adapters[1]]


def test_nothing_left_after_the_first_reading_is_refused(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"outside bounds\.norm") as raised:
        merged(pool, tmp_path / "out", bounds={"norm": [1e6, 1e7]}, **DROP)
    assert len(raised.value.problems) == 3


def test_adapters_that_are_not_finite_alone_may_be_dropped(pool: Pool, tmp_path: Path) -> None:
    bad = spoilt(pool, "nan", f"{K}.lora_A.weight", float("nan"))
    result = merged(pool, tmp_path / "out", allow={"nan": "drop_model"})
    assert list(result.refused) == [bad]
    merged(pool, tmp_path / "good", good_ones(pool))
    assert digest(tmp_path / "out") == digest(tmp_path / "good")


def test_without_a_first_reading_what_is_not_finite_stops_the_merge_where_it_is_read(
    pool: Pool, tmp_path: Path
) -> None:
    bad = spoilt(pool, "nan", f"{K}.lora_B.weight", float("nan"))
    for kind, method in itertools.product(("delta", "adapter"), ("average", "ties")):
        output = {"path": str(tmp_path / f"{kind}-{method}"), "kind": kind}
        with pytest.raises(InputError, match=rf"{bad}\): {K}\.weight: 16 values are NaN or Inf") as raised:
            merged(pool, tmp_path, method=method, output=output)
        assert len(raised.value.problems) == 1
        assert [path.name for path in (tmp_path / f"{kind}-{method}").glob("[!.]*")] == []


def test_a_magnitude_that_is_not_finite_is_found_in_the_first_reading_too(pool: Pool, tmp_path: Path) -> None:
    magnitude = {f"{PREFIX}{Q}.lora_magnitude_vector": torch.full((16,), float("nan"))}
    bad = add(pool, "dora", adapter_files({Q: module(16, 16)}, config={"use_dora": True}, extra=magnitude))
    result = merged(pool, tmp_path / "out", allow={"nan": "drop_model"})
    assert list(result.refused) == [bad]
    assert "16 values" in result.refused[bad][0]


def test_a_whole_tensor_that_is_not_finite_stops_the_merge_where_it_is_read(pool: Pool, tmp_path: Path) -> None:
    """The first reading is of factors alone: a saved embedding may be larger than a worker's memory."""
    saved = {f"{PREFIX}model.norm.weight": torch.full((16,), float("nan"))}
    bad = add(pool, "saved", adapter_files({Q: module(16, 16)}, extra=saved))
    with pytest.raises(InputError, match=rf"{bad}\): model\.norm\.weight: 16 values are NaN or Inf"):
        merged(pool, tmp_path / "out", allow={"nan": "drop_model", "saved_modules": "merge"})


# Which folders are a pool.


def test_trainers_checkpoints_inside_a_pool_are_no_adapters(pool: Pool, tmp_path: Path) -> None:
    nested = add(pool, "run", GOOD)
    shutil.copytree(nested, Path(nested) / "checkpoint-100")
    shutil.copytree(nested, Path(pool.base).parent / "checkpoint-200")
    models = [{"path": f"{Path(pool.base).parent}/*/", "not": ["base"], "at_least": 4}]
    result = merged(pool, tmp_path / "out", models, exclude=["*.norm.*"])
    assert list(result.refused) == []
    assert result.provenance
    assert [model.uri for model in result.provenance.models] == sorted([*pool.adapters, nested])
