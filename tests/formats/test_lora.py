import json
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.libraries.test_patterns import HOSTILE
from tests.tools.adapters import ATTENTION, MLP, Module, adapter_files, config_of, make_pool
from tests.tools.families import DTYPES, file_bytes
from ties_ray.formats import Contents, Format, Rules
from ties_ray.formats.lora import REASONS, Lora
from ties_ray.kernels import Factors
from ties_ray.kernels.definition import Definition
from ties_ray.layout.footprint import bounding_range
from ties_ray.libraries.ties import Tie
from ties_ray.stores import Stores
from ties_ray.tensors import Parameter, Read, joined
from ties_ray.testing import FormatContract, folder_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own
    import peft
    import transformers
    from peft.utils.other import get_pattern_key

Files = dict[str, bytes]
Parameters = dict[str, Parameter]
SAVED = Rules(saved_modules=True)
PREFIX = "base_model.model."


def normal(*shape: int, seed: int = 0, dtype: str = "F32") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def module(out: int, width: int, rank: int = 2, alpha: float = 4.0, dtype: str = "F32") -> Module:
    return normal(rank, width, seed=1, dtype=dtype), normal(out, rank, seed=2, dtype=dtype), alpha


def base_of(tensors: Mapping[str, torch.Tensor]) -> Parameters:
    return {name: Parameter(name, tuple(tensor.shape), "F32", True) for name, tensor in tensors.items()}


def shapes(**named: tuple[int, ...]) -> Parameters:
    names = {name: name.replace("__", ".") for name in named}
    return {names[name]: Parameter(names[name], shape, "F32", True) for name, shape in named.items()}


MODULES = {"model.a.q_proj": module(6, 4), "model.b.q_proj": module(3, 4)}
BASE = shapes(
    model__a__q_proj__weight=(6, 4),
    model__a__q_proj__bias=(6,),
    model__b__q_proj__weight=(3, 4),
    model__norm__weight=(4,),
    model__embed_tokens__weight=(9, 4),
    model__square__weight=(4, 4),
)


def read(files: Files, base: Parameters | None = BASE, rules: Rules = Rules()) -> Contents:  # noqa: B008
    return Lora().read(folder_of(Lora(), files), base, rules)


def good(files: Files, base: Parameters | None = BASE, rules: Rules = Rules()) -> Contents:  # noqa: B008
    found = read(files, base, rules)
    assert found.problems == ()
    return found


def codes(found: Contents) -> list[str]:
    return [problem.code for problem in found.problems]


def change(files: Files, found: Contents, name: str, base: torch.Tensor) -> torch.Tensor:
    """Return the change of a parameter as the kernels' definition has it, of the parameter's shape."""
    source = found.sources[name]
    data = files["adapter_model.safetensors"]
    reads = Lora().reads(source, 0, base.numel())
    buffers = [torch.frombuffer(bytearray(data[one.start : one.stop]), dtype=torch.uint8) for one in reads]
    stored = Lora().encoded(source, 0, base.numel(), buffers)
    if isinstance(stored, Factors) and stored.magnitude is not None:
        stored = stored._replace(scales=Definition().row_scales(stored, base.flatten()))
    out = torch.empty(base.numel())
    assert Definition().delta(stored, base.flatten(), out) == 0
    return out.reshape(base.shape)


# -- against PEFT


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=48, attention_bias=True, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=48, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(config)


def trained(make: Callable[[], torch.nn.Module], **config: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a PEFT model all of whose trainable numbers have moved, and the tensors of its base."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=1 / 8)
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=1 / 8)
    return adapted, base


def saved(adapted: Any, folder: Path, **how: Any) -> Files:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder, **how)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def merged(adapted: Any) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(adapted.merge_and_unload().state_dict())


LINEAR = [*ATTENTION, *MLP]
VARIANTS: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "plain": (llama, {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    "all linear": (llama, {"r": 4, "target_modules": "all-linear"}),
    "rslora": (llama, {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "patterns": (llama, {
        "r": 4, "lora_alpha": 6, "target_modules": LINEAR,
        "rank_pattern": {"layers.0.self_attn.q_proj": 7, r".*\.1\..*_proj": 3, "q_proj": 2},
        "alpha_pattern": {"^model.layers.0.mlp.(up|gate)_proj": 1, "[qk]_proj": 9, "model.layers.1.mlp.down_proj": 2},
    }),
    "rslora patterns": (llama, {
        "r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3},
    }),
    "fan_in_fan_out": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "fan_in_fan_out of square modules": (gpt2, {"r": 4, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "fan_in_fan_out beside linear": (gpt2, {"r": 4, "target_modules": ["c_proj", "lm_head"]}),
    "embedding": (llama, {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora_bias": (llama, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "dora": (llama, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_dora": True}),
    "dora rslora": (llama, {"r": 4, "target_modules": ["down_proj"], "use_dora": True, "use_rslora": True}),
    "modules_to_save": (llama, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "bias all": (llama, {"r": 4, "target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": (llama, {"r": 4, "target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
    **{how: (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": how})
       for how in ("gaussian", "orthogonal", "eva", "mica")},
    "velora": (llama, {"r": 4, "target_modules": ["q_proj"], "velora_config": {"num_groups": 4}}),
    "monteclora": (llama, {"r": 4, "target_modules": ["q_proj"], "monteclora_config": {"num_samples": 2}}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_wrote_is_read_as_the_change_that_peft_merges(variant: str, tmp_path: Path) -> None:
    make, config = VARIANTS[variant]
    adapted, base = trained(make, **config)
    files = saved(adapted, tmp_path, save_embedding_layers=False)
    found = good(files, base_of(base), SAVED)
    after = merged(adapted)
    changed = {name for name in base if not torch.equal(base[name], after[name])}
    assert changed == found.sources.keys()
    for name in changed:
        torch.testing.assert_close(
            change(files, found, name, base[name]), after[name] - base[name], rtol=1e-6, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("variant", ["plain", "rslora patterns", "patterns", "fan_in_fan_out", "embedding"])
def test_the_change_is_pefts_delta_weight_to_rounding(variant: str, tmp_path: Path) -> None:
    make, config = VARIANTS[variant]
    adapted, base = trained(make, **config)
    files = saved(adapted, tmp_path, save_embedding_layers=False)
    found = good(files, base_of(base))
    layers = {name: layer for name, layer in adapted.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    assert {f"{name}.weight" for name in layers} == found.sources.keys()
    for name, layer in layers.items():
        wanted = layer.get_delta_weight("default").detach()
        got = change(files, found, f"{name}.weight", base[f"{name}.weight"])
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-7, msg=name)


def test_an_adapter_on_a_mutated_base_is_refused_until_peft_has_converted_it(tmp_path: Path) -> None:
    adapted, base = trained(llama, r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
    start = tmp_path / "start"
    with torch.no_grad():
        moved = {name: tensor.clone() for name, tensor in adapted.named_parameters() if tensor.requires_grad}
        fresh = trained(llama, r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")[0]
        for name, tensor in fresh.named_parameters():
            if tensor.requires_grad:
                tensor.copy_(moved[name] + 0.01 * torch.ones_like(tensor))
        adapted.peft_config["default"].init_lora_weights = True
        saved(adapted, start)
        adapted.peft_config["default"].init_lora_weights = "pissa"
    refused = read(saved(adapted, tmp_path / "raw"), base_of(base))
    assert codes(refused) == ["mutated_base"]
    files = saved(fresh, tmp_path / "converted", path_initial_model_for_weight_conversion=str(start))
    found = good(files, base_of(base))
    assert found.facts["rank"] == "8"
    before, after = merged(adapted), merged(fresh)
    for name in found.sources:
        torch.testing.assert_close(
            change(files, found, name, base[name]), after[name] - before[name], rtol=0, atol=1e-5
        )


def test_an_adapter_is_known_by_its_config_or_by_its_weights() -> None:
    config, weights = "adapter_config.json", "adapter_model.safetensors"
    for names in ([config], [weights], ["README.md", weights, config]):
        assert Lora().recognises(names)
    assert Lora().wanted([weights, "other.safetensors", config, "README.md"]) == ((weights,), (config,))
    assert Lora().wanted([".hidden.safetensors", "other.safetensors", "README.md"]) == (("other.safetensors",), ())


def test_copies_of_base_layers_beside_their_factors_are_left_aside_with_a_note(tmp_path: Path) -> None:
    adapted, base = trained(llama, r=4, target_modules=["embed_tokens", "lm_head"])
    files = saved(adapted, tmp_path)
    found = good(files, base_of(base))
    assert found.sources.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert found.kinds == {"model.embed_tokens.weight": "embedding"}
    (note,) = found.notes
    assert "lm_head.base_layer.weight" in note


LETTERS = st.sampled_from(["q", "v", "k_proj", "layers", "0", "1", "mlp"])
PATHS = st.lists(LETTERS, min_size=1, max_size=5).map(".".join)
KEYS = st.lists(st.sampled_from(["q", "k_proj", ".", "layers", "0", "1", ".*", r"\.", "(q|v)", "[01]", "^", "?", "$"]),
                min_size=1, max_size=5).map("".join)  # fmt: skip


@given(st.dictionaries(KEYS, st.integers(1, 9), max_size=4), PATHS)
@settings(max_examples=200, deadline=None)
def test_patterns_resolve_as_in_peft(pattern: dict[str, int], path: str) -> None:
    config = {**config_of({}), "r": 64, "rank_pattern": pattern}
    try:
        rank = pattern.get(get_pattern_key(list(pattern), path), 64)
    except re.error:
        rank = 64
    files = adapter_files({path: module(3, 2, rank)}, config=config)
    found = read(files, shapes() | {f"{path}.weight": Parameter(f"{path}.weight", (3, 2), "F32", True)})
    assert codes(found) in ([], ["pattern"])
    if found.sources:
        assert dict(found.sources[f"{path}.weight"].numbers)["scale"] == 8 / rank


# -- the contract


class TestLora(FormatContract):
    DTYPES: ClassVar = {"model.a.q_proj": "F32", "model.b.q_proj": "BF16", "model.embed_tokens": "F16"}

    @pytest.fixture
    def format(self) -> Format:
        return Lora()

    @pytest.fixture
    def modules(self) -> dict[str, Module]:
        return {
            "model.a.q_proj": module(21, 20, 5, dtype="F32"),
            "model.b.q_proj": module(7, 33, 3, 9.0, dtype="BF16"),
            "model.embed_tokens": module(10, 13, 4, dtype="F16"),
        }

    @pytest.fixture
    def extra(self) -> dict[str, torch.Tensor]:
        return {f"{PREFIX}model.a.q_proj.lora_B.bias": normal(21, seed=5)}

    @pytest.fixture
    def files(self, modules: dict[str, Module], extra: dict[str, torch.Tensor]) -> Files:
        return adapter_files(modules, extra=extra)

    @pytest.fixture
    def parameters(self) -> Parameters:
        return shapes(model__a__q_proj__weight=(21, 20), model__a__q_proj__bias=(21,), model__b__q_proj__weight=(7, 33),
                      model__embed_tokens__weight=(13, 10))  # fmt: skip

    @pytest.fixture
    def expected(self, modules: dict[str, Module], extra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        wanted = {f"{path}.weight": alpha / len(a) * b.double() @ a.double() for path, (a, b, alpha) in modules.items()}
        wanted["model.embed_tokens.weight"] = wanted["model.embed_tokens.weight"].T
        wanted["model.a.q_proj.bias"] = 4 / 5 * extra[f"{PREFIX}model.a.q_proj.lora_B.bias"].double()
        return {name: tensor.flatten() for name, tensor in wanted.items()}


class TestLoraOfConv1D(TestLora):
    @pytest.fixture
    def files(self, modules: dict[str, Module]) -> Files:
        return adapter_files({"h.c_attn": modules["model.a.q_proj"]}, config={"fan_in_fan_out": True})

    @pytest.fixture
    def parameters(self) -> Parameters:
        return shapes(h__c_attn__weight=(20, 21))

    @pytest.fixture
    def expected(self, modules: dict[str, Module]) -> dict[str, torch.Tensor]:
        a, b, alpha = modules["model.a.q_proj"]
        return {"h.c_attn.weight": (alpha / 5 * b.double() @ a.double()).T.flatten()}


class TestDora(TestLora):
    @pytest.fixture
    def files(self, modules: dict[str, Module]) -> Files:
        extra = {f"{PREFIX}model.a.q_proj.lora_magnitude_vector": normal(21, seed=6)}
        return adapter_files({"model.a.q_proj": modules["model.a.q_proj"]}, config={"use_dora": True}, extra=extra)

    @pytest.fixture
    def expected(self, modules: dict[str, Module]) -> dict[str, torch.Tensor]:
        a, b, alpha = modules["model.a.q_proj"]
        product = normal(21, seed=6).double()[:, None] * (alpha / 5 * b.double() @ a.double())
        return {"model.a.q_proj.weight": product.flatten()}


# -- names


@pytest.mark.parametrize(
    ("prefix", "adapter_name"),
    [(PREFIX, ""), ("", ""), (PREFIX * 2, ""), (PREFIX, "default"), ("", "my-adapter")],
)
def test_prefixes_and_an_adapters_name_in_the_keys_change_nothing(prefix: str, adapter_name: str) -> None:
    modules = {**MODULES, "model.embed_tokens": module(4, 9)}
    plain = good(adapter_files(modules))
    other = good(adapter_files(modules, prefix=prefix, adapter_name=adapter_name))
    assert other.sources.keys() == plain.sources.keys() == {f"{path}.weight" for path in modules}
    assert other.facts == plain.facts


@pytest.mark.parametrize("key", ["", ".weight", ".default", ".default.weight"])
def test_a_magnitude_may_be_spelled_in_all_ways_that_peft_ever_did(key: str) -> None:
    extra = {f"{PREFIX}model.a.q_proj.lora_magnitude_vector{key}": normal(6)}
    found = good(adapter_files({"model.a.q_proj": module(6, 4)}, config={"use_dora": True}, extra=extra))
    source = found.sources["model.a.q_proj.weight"]
    assert Lora().needs(source) == "rows"
    assert found.facts["variants"] == "dora"


@pytest.mark.parametrize(
    ("inside", "outside"),
    [("model.layers.0.q_proj", "layers.0.q_proj"), ("layers.0.q_proj", "model.layers.0.q_proj"),
     ("transformer.h.0.c_fc", "h.0.c_fc")],
)  # fmt: skip
def test_a_base_with_or_without_its_leading_word_is_the_same_base(inside: str, outside: str) -> None:
    base = {name: Parameter(name, (6, 4), "F32", True) for name in (f"{outside}.weight", "lm_head.weight")}
    found = good(adapter_files({inside: module(6, 4), "lm_head": module(6, 4)}), base)
    assert found.sources.keys() == base.keys()


@pytest.mark.parametrize(("inside", "outside"), [
    ("model.language_model.layers.0", "language_model.model.layers.0"),
    ("model.language_model.layers.0", "model.layers.0"),
    ("model.vision_tower.vision_model.layers.0", "vision_tower.vision_model.layers.0"),
    ("_orig_mod.model.layers.0", "model.layers.0"),
])  # fmt: skip
def test_modules_are_known_by_the_names_that_their_class_gives_them_in_memory(inside: str, outside: str) -> None:
    base = {f"{outside}.q_proj.weight": Parameter("", (6, 4), "F32", True)}
    base["lm_head.weight"] = Parameter("", (9, 4), "F32", True)
    found = good(only(f"{inside}.q_proj", normal(2, 4), normal(6, 2)), base)
    assert found.sources.keys() == {f"{outside}.q_proj.weight"}


def test_rows_of_a_module_that_the_base_stores_in_parts_go_to_each() -> None:
    base = {f"h.mlp.{part}_proj.weight": Parameter("", (3, 4), "F32", True) for part in ("gate", "up")}
    a, b = normal(2, 4), normal(6, 2)
    files = only("h.mlp.gate_up_proj", a, b)
    found = good(files, base, Rules(kinds=("minimax_m3_vl",)))
    assert found.sources.keys() == base.keys()
    for name, rows in (("h.mlp.gate_proj.weight", b[:3]), ("h.mlp.up_proj.weight", b[3:])):
        assert found.sources[name].tensors[1].shape == rows.shape
        torch.testing.assert_close(change(files, found, name, torch.zeros(3, 4)), 2 * rows @ a)


def test_saved_modules_and_biases_are_dense_and_only_where_the_recipe_allows_them() -> None:
    extra = {
        f"{PREFIX}model.norm.modules_to_save.default.weight": normal(4),
        f"{PREFIX}model.embed_tokens.weight": normal(9, 4),
        f"{PREFIX}model.a.q_proj.base_layer.bias": normal(6),
    }
    files = adapter_files(MODULES, extra=extra)
    (problem,) = read(files).problems
    assert problem.code == "saved_modules"
    assert "allow: {saved_modules: merge}" in problem.remedy
    assert "model.norm" in problem.what
    found = good(files, rules=SAVED)
    assert found.facts["variants"] == "saved_modules"
    names = {"model.norm.weight", "model.embed_tokens.weight", "model.a.q_proj.bias"}
    assert {name for name, source in found.sources.items() if Lora().needs(source) == "slice"} == names
    assert torch.equal(
        change(files, found, "model.norm.weight", torch.ones(4)),
        extra[f"{PREFIX}model.norm.modules_to_save.default.weight"] - 1,
    )


def test_a_head_that_the_base_lacks_is_told_and_what_the_base_has_is_merged() -> None:
    extra = {f"{PREFIX}score.weight": normal(2, 4), f"{PREFIX}model.norm.weight": normal(4)}
    found = good(adapter_files(MODULES, extra=extra, config={"modules_to_save": ["score", "norm"]}),
                 rules=SAVED._replace(heads=True))  # fmt: skip
    assert found.heads.keys() == {"score.weight"}
    assert "model.norm.weight" in found.sources
    assert found.facts["modules_to_save"] == "score, norm"


def test_a_tied_parameter_gets_a_change_of_its_own_and_a_note() -> None:
    ties = (Tie("lm_head.weight", "model.embed_tokens.weight"),)
    files = only("lm_head", normal(2, 4), normal(9, 2))
    found = good(files, rules=Rules(tied=ties))
    assert found.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "model.embed_tokens.weight and lm_head.weight, which the base ties" in found.notes[0]
    assert good(files, None, Rules(tied=ties)).untied == {}


def test_the_remedy_for_a_head_names_it_and_leaves_it_out_with_a_note() -> None:
    extra = {
        f"{PREFIX}{name}": normal(4)
        for name in ("classifier.dense.weight", "classifier.out_proj.bias", "model.score[0].weight", "norm.weight")
    }
    files = adapter_files(MODULES, extra=extra)
    base = {**BASE, "norm.weight": Parameter("norm.weight", (4,), "F32", True)}
    head, saved_too = read(files, base).problems
    assert (head.code, saved_too.code) == ("head", "saved_modules")
    assert 'exclude: ["classifier.*", "model.score[[]0].*"]' in head.remedy
    assert 'exclude: ["norm.weight"]' in saved_too.remedy
    found = good(files, base, Rules(exclude=("classifier.*", "model.score[[]0].*", "norm.weight")))
    assert found.sources.keys() == {"model.a.q_proj.weight", "model.b.q_proj.weight"}
    (note,) = found.notes
    assert "classifier.dense.weight" in note


@pytest.mark.parametrize("rules", [Rules(), SAVED])
def test_the_remedy_for_a_resized_vocabulary_keeps_the_factors(rules: Rules) -> None:
    extra = {f"{PREFIX}model.embed_tokens.weight": normal(11, 4)}
    files = adapter_files(MODULES, extra=extra)
    (problem,) = read(files, rules=rules).problems
    assert (problem.code, '["model.embed_tokens.weight"]' in problem.remedy) == ("resized", True)
    found = good(files, rules=rules._replace(exclude=("model.embed_tokens.weight",)))
    assert found.sources.keys() == {"model.a.q_proj.weight", "model.b.q_proj.weight"}
    resized = {**BASE, "model.embed_tokens.weight": Parameter("", (11, 4), "F32", True)}
    assert len(good(files, resized, SAVED).sources) == 3


def test_a_whole_tensor_beside_factors_of_the_same_module_is_one_change_too_many() -> None:
    found = read(beside(f"{Q}.weight", normal(6, 4)), rules=SAVED)
    assert codes(found) == ["duplicate"]


def test_of_another_kind_of_adapter_nothing_else_is_told() -> None:
    files = {**PLAIN, "adapter_config.json": json.dumps({"peft_type": "IA3"}).encode()}
    ia3 = file_bytes({f"{PREFIX}{Q}.ia3_l": normal(6, 1)})
    assert codes(read({**files, "adapter_model.safetensors": ia3})) == ["peft_type"]


def test_adapters_that_lie_in_an_adapter_are_named() -> None:
    folder = replace(folder_of(Lora(), PLAIN), nested=("checkpoint-1", "checkpoint-2"))
    (note,) = Lora().read(folder, BASE, Rules()).notes
    assert note.endswith("each to be named by its own path: checkpoint-1, checkpoint-2")


def test_a_slice_without_elements_has_none() -> None:
    extra = {f"{PREFIX}{Q}.lora_B.bias": normal(6), f"{PREFIX}model.norm.weight": normal(4)}
    found = good(adapter_files(MODULES, extra=extra, config={"lora_bias": True}), rules=SAVED)
    for name in ("model.norm.weight", f"{Q}.bias", f"{Q}.weight"):
        stored = Lora().encoded(found.sources[name], 0, 0, [])
        assert (stored.left if isinstance(stored, Factors) else stored.data).numel() == 0


def test_a_dense_read_is_not_kept_for_other_slices() -> None:
    found = good(beside("model.norm.weight", normal(4)), rules=SAVED)
    (one,) = Lora().reads(found.sources["model.norm.weight"], 0, 4)
    assert not one.shared


def test_what_the_recipe_excludes_is_left_out_whatever_it_holds() -> None:
    modules = {**MODULES, "model.square": module(5, 4)}
    extra = {f"{PREFIX}model.norm.weight": normal(4), f"{PREFIX}model.half.lora_A.weight": normal(2, 4)}
    files = adapter_files(modules, extra=extra)
    assert codes(read(files)) == ["orphan", "shape_mismatch", "saved_modules"]
    found = good(files, rules=Rules(exclude=("model.square.*", "model.half.*", "*norm*", "model.b.*")))
    assert found.sources.keys() == {"model.a.q_proj.weight"}


def test_a_module_is_left_out_with_a_note_where_all_of_it_is_excluded() -> None:
    found = good(PLAIN, rules=Rules(exclude=("model.b.q_proj.weight",)))
    assert found.facts["modules"] == "1"
    assert "model.b.q_proj" in found.notes[0]
    extra = {f"{PREFIX}{Q}.lora_B.bias": normal(6)}
    of_bias = good(adapter_files(MODULES, extra=extra, config={"lora_bias": True}),
                   rules=Rules(exclude=(f"{Q}.weight",)))  # fmt: skip
    assert of_bias.sources.keys() == {f"{Q}.bias", "model.b.q_proj.weight"}
    assert of_bias.notes == ()


def test_without_a_base_names_and_shapes_are_the_adapters_own() -> None:
    modules = {**MODULES, "model.embed_tokens": module(4, 9)}
    found = good(adapter_files(modules), None, Rules(exclude=("model.b.*",)))
    assert found.sources.keys() == {"model.a.q_proj.weight", "model.embed_tokens.weight"}
    assert found.kinds == {"model.embed_tokens.weight": "embedding"}
    assert found.facts == {
        "base_name": "tests/llama", "task_type": "CAUSAL_LM", "rank": "2", "scale": "2", "modules": "2",
        "targets": "embed_tokens, q_proj", "variants": "",
    }  # fmt: skip
    transposed = good(adapter_files(MODULES, config={"fan_in_fan_out": True}), None)
    assert set(transposed.kinds.values()) == {"transposed"}


def test_facts_of_a_hostile_config_can_be_printed_and_stored() -> None:
    facts = good(configured(base_model_name_or_path="\ud800\x1b[31m" + "x" * 2000)).facts
    assert facts["base_name"].startswith("\\ud800\\x1b[31mxx")
    assert len(facts["base_name"]) == 1000


def test_facts_show_the_range_of_ranks_and_scales() -> None:
    modules = {
        "model.a.q_proj": module(6, 4, 2, 4),
        "model.b.q_proj": module(3, 4, 4, 2),
        "model.square": module(4, 4, 3),
    }
    facts = good(adapter_files(modules, config={"use_rslora": False})).facts
    assert (facts["rank"], facts["scale"]) == ("2..4", "0.5..2")


def test_a_config_that_names_neither_rank_nor_alpha_has_those_of_peft() -> None:
    files = adapter_files({"model.a.q_proj": module(6, 4, rank=8)})
    own = peft.LoraConfig()
    bare = json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}).encode()
    facts = good({**files, "adapter_config.json": bare}).facts
    assert (facts["rank"], facts["scale"]) == (str(own.r), f"{own.lora_alpha / own.r:g}")


# -- reading


def test_rows_of_b_and_the_whole_of_a_are_read() -> None:
    files = adapter_files({"model.a.q_proj": module(6, 4, dtype="BF16")})
    source = good(files).sources["model.a.q_proj.weight"]
    a, b = source.tensors
    whole, rows = Lora().reads(source, 9, 15)  # rows 2 and 3 of 6
    assert (whole.start, whole.stop, whole.shared) == (a.start, a.start + 2 * 2 * 4, True)
    assert (rows.start, rows.stop, rows.shared) == (b.start + 2 * 2 * 2, b.start + 4 * 2 * 2, False)


def test_factors_that_lie_together_and_are_needed_whole_come_in_one_read() -> None:
    files = adapter_files({"model.a.q_proj": module(6, 4), "model.embed_tokens": module(4, 9)})
    found = good(files)
    for name, start, stop in (("model.a.q_proj.weight", 0, 24), ("model.embed_tokens.weight", 5, 6)):
        (one,) = Lora().reads(found.sources[name], start, stop)
        assert one.shared
        assert one.stop - one.start == sum(4 * torch.Size(ref.shape).numel() for ref in found.sources[name].tensors)


def test_what_is_held_covers_the_factors_as_read_and_as_decoded() -> None:
    source = good(adapter_files({"model.a.q_proj": module(6, 4, dtype="BF16")})).sources["model.a.q_proj.weight"]
    assert Lora().decoded_bytes(source) == (2 * 4 + 6 * 2) * (2 + 2 + 4)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_pool_is_read_as_the_changes_it_was_made_of(dtype: str, tmp_path: Path) -> None:
    targets = ((*ATTENTION, *MLP, "lm_head"), ("embed_tokens", "q_proj"))
    pool = make_pool(Stores({}).of("/"), str(tmp_path), targets=targets, dtype=dtype, variants=("plain", "rslora"))
    for uri, deltas in zip(pool.adapters, pool.deltas, strict=True):
        files = {path.name: path.read_bytes() for path in Path(uri).iterdir()}
        found = good(files, base_of(pool.base_tensors))
        assert found.sources.keys() == deltas.keys()
        for name, wanted in deltas.items():
            got = change(files, found, name, pool.base_tensors[name]).double()
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


# -- refusals


def configured(**config: object) -> Files:
    return adapter_files(MODULES, config=config)


PLAIN = adapter_files(MODULES)


def without(key: str) -> Files:
    tensors: dict[str, torch.Tensor] = {}
    for path, (a, b, _) in MODULES.items():
        tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
    del tensors[key]
    return {**PLAIN, "adapter_model.safetensors": file_bytes(tensors)}


def test_factors_of_all_experts_are_the_changes_of_single_ones() -> None:
    path, experts, rank = "model.layers.0.mlp.experts", 3, 2
    factors = {
        f"{path}.base_layer": (normal(experts * rank, 4, seed=1), normal(10, experts * rank, seed=2), 3.0),
        path: (normal(experts * rank, 5, seed=3), normal(4, experts * rank, seed=4), 3.0),
    }
    files = adapter_files(
        factors, config={"r": rank, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                         "rank_pattern": {}, "alpha_pattern": {}},
    )  # fmt: skip
    shapes_of = {"gate_proj": (5, 4), "up_proj": (5, 4), "down_proj": (4, 5)}
    base = base_of({f"{path}.{e}.{name}.weight": torch.empty(shape)
                    for e in range(experts) for name, shape in shapes_of.items()})  # fmt: skip
    found = good(files, base, Rules(kinds=("Qwen3MoeForCausalLM", "qwen3_moe")))
    assert found.account.all_merged
    told = {name: found.facts[name] for name in ("rank", "modules", "targets", "variants")}
    assert told == {"rank": "2", "modules": "2", "targets": "base_layer, experts", "variants": "experts"}
    lacking = {name: parameter for name, parameter in base.items() if "down_proj" not in name}
    assert codes(read(files, lacking, Rules(kinds=("Qwen3MoeForCausalLM", "qwen3_moe")))) == ["target_parameters"]
    for e in range(experts):
        whole = {}
        for name, (a, b, alpha) in zip(("gate_up_proj", "down_proj"), factors.values(), strict=True):
            of_expert = b.reshape(len(b), rank, experts)[:, :, e].double(), a.reshape(experts, rank, -1)[e].double()
            whole[name] = alpha / rank * of_expert[0] @ of_expert[1]
        wanted = {"gate_proj": whole["gate_up_proj"][:5], "up_proj": whole["gate_up_proj"][5:],
                  "down_proj": whole["down_proj"]}  # fmt: skip
        for name, delta in wanted.items():
            got = change(files, found, f"{path}.{e}.{name}.weight", torch.zeros(delta.shape))
            torch.testing.assert_close(got.double(), delta, rtol=1e-5, atol=1e-5)


def beside(key: str, tensor: torch.Tensor, **config: object) -> Files:
    return adapter_files(MODULES, extra={PREFIX + key: tensor}, config=config)


def only(path: str, a: torch.Tensor, b: torch.Tensor, **config: object) -> Files:
    return adapter_files({path: (a, b, 4.0)}, config={"r": 2, **config})


WEIGHTS = {"adapter_model.safetensors": PLAIN["adapter_model.safetensors"]}
TEXT = {"adapter_config.json": PLAIN["adapter_config.json"]}
Q = "model.a.q_proj"
REFUSED: list[tuple[str, Files, str]] = [
    ("config_missing", WEIGHTS, "scale is unknown"),
    ("config_json", {**PLAIN, "adapter_config.json": b"[]"}, "not a JSON object"),
    ("config_value", configured(r="8"), "r: '8'"),
    ("config_value", configured(r=0), "r: 0"),
    ("config_value", configured(r=True), "r: True"),
    ("config_value", configured(r=2**31), "r: 2147483648"),
    ("config_value", configured(lora_alpha=2**31), "lora_alpha: 2147483648"),
    ("config_value", configured(lora_alpha=None), "lora_alpha: None"),
    ("config_value", configured(lora_alpha=float("nan")), "lora_alpha: nan"),
    ("config_value", configured(lora_alpha=float("inf")), "lora_alpha: inf"),
    ("config_value", configured(lora_alpha=10**400), "lora_alpha: 1000"),
    ("config_value", configured(rank_pattern=["q_proj"]), "rank_pattern"),
    ("config_value", configured(alpha_pattern={"q_proj": "2"}), "alpha_pattern"),
    ("config_value", configured(use_rslora="no"), "use_rslora: 'no'"),
    ("config_value", configured(base_model_name_or_path=[1]), "base_model_name_or_path"),
    ("pattern", configured(rank_pattern={"(?i)a": 2}), "flags.*: '\\(\\?i\\)a'"),
    ("pattern", configured(alpha_pattern={"(": 2}), "no regular expressions"),
    ("peft_type", configured(peft_type="LOHA"), "LOHA"),
    ("peft_type", configured(peft_type="LOKR"), "LOKR"),
    ("peft_type", configured(peft_type="VERA"), "VERA"),
    ("peft_type", configured(peft_type="IA3"), "IA3"),
    ("peft_type", configured(peft_type=None), "None"),
    *(("prompt", configured(peft_type=kind), kind) for kind in ("PROMPT_TUNING", "PREFIX_TUNING", "XLORA")),
    ("peft_type", configured(peft_type=["LORA"]), "LORA"),
    ("variant", configured(use_qalora=True), "use_qalora"),
    ("variant", configured(use_bdlora={"nblocks": 2}), "use_bdlora"),
    ("conditional", configured(arrow_config={"top_k": 3}), "arrow_config"),
    ("conditional", configured(alora_invocation_tokens=[1]), "alora"),
    ("variant", configured(use_tomorrows_idea=True), "tomorrow"),
    ("layer_replication", configured(layer_replication=[[0, 2]]), "more layers"),
    ("trainable_tokens", configured(trainable_token_indices=[1]), "rows"),
    ("trainable_tokens", beside("model.embed_tokens.token_adapter.trainable_tokens_delta", normal(2, 4)), "delta"),
    ("target_parameters", configured(target_parameters=["experts.w"]), "experts"),
    *(("mutated_base", configured(init_lora_weights=how), how)
      for how in ("pissa", "pissa_niter_16", "olora", "loftq")),
    *(("residual_base", configured(init_lora_weights=how), how) for how in ("corda", "lora_ga")),
    ("unknown_initialisation", configured(init_lora_weights="unheard-of"), "unheard-of"),
    ("unknown_initialisation", configured(init_lora_weights={"a": 1}), "'a': 1"),
    ("mutated_base", configured(kasa_config={"beta": 1}), "kasa"),
    ("pickle", {**TEXT, "adapter_model.bin": b"x"}, "pickle"),
    ("weights_missing", TEXT, "adapter_model.safetensors"),
    ("nothing", adapter_files({}), "no factors"),
    ("empty", only(Q, torch.empty(0), normal(6, 2)), "ZeRO-3"),
    ("empty", only(Q, normal(2, 4), torch.empty(0, 2)), "B"),
    ("orphan", without(f"{PREFIX}{Q}.lora_A.weight"), Q),
    ("orphan", without(f"{PREFIX}{Q}.lora_B.weight"), Q),
    ("orphan", beside("model.square.lora_embedding_A", normal(2, 4)), "embedding_A"),
    ("duplicate", beside(f"{PREFIX}{Q}.lora_A.weight", normal(2, 4)), Q),
    ("several_adapters", beside(f"{Q}.lora_A.other.weight", normal(2, 4)), "other"),
    ("unknown_tensor", beside(f"{Q}.lora_E", normal(2, 4)), "lora_E"),
    ("unknown_tensor", beside(f"{Q}.lora_A.bias", normal(2)), "lora_A.bias"),
    ("unknown_tensor", beside(f"{Q}.lora_diag", normal(2)), "lora_diag"),
    ("unknown_tensor", beside(f"{Q}.hada_w1_a", normal(2, 4)), "hada_w1_a"),
    ("unknown_tensor", beside(f"{Q}.default_lora_latent_mapping.weight", normal(2, 2)), "latent_mapping"),
    ("unknown_tensor", beside(f"{Q}.alpha", normal()), "alpha"),
    ("head", beside("classifier.weight", normal(2)), "classifier"),
    ("dtype", only(Q, normal(2, 4, dtype="F64"), normal(6, 2)), "F64"),
    ("dtype", only(Q, normal(2, 4), torch.ones(6, 2, dtype=torch.int32)), "I32"),
    ("rank_mismatch", configured(r=3), "r 3"),
    ("rank_mismatch", only(Q, normal(2, 4), normal(6, 3)), r"\[6, 3\]"),
    ("rank_mismatch", configured(rank_pattern={"a.q_proj": 4}), "r 4"),
    ("conv", only(Q, normal(2, 4, 3, 3), normal(6, 2, 1, 1)), "convolutions"),
    ("fused", only("h.mlp.experts.0.up_proj", normal(2, 4), normal(3, 2)), "experts.0.up_proj"),
    ("tied", only("shared", normal(2, 4), normal(9, 2)), "shared.weight"),
    ("unknown_module", only("model.c.q_proj", normal(2, 4), normal(6, 2)), "model.c.q_proj.weight"),
    ("unknown_module", beside("model.b.q_proj.lora_B.bias", normal(3)), "model.b.q_proj.bias"),
    ("not_floating", only("ids", normal(2, 4), normal(6, 2)), "I64"),
    ("shape_mismatch", only(Q, normal(2, 5), normal(6, 2)), r"\[6, 5\] where the base has \[6, 4\]"),
    ("shape_mismatch", beside(f"{Q}.lora_B.bias", normal(5)), r"\[5\] where the base has \[6\]"),
    ("shape_mismatch", beside(f"{Q}.lora_B.bias", normal(1, 6)), r"\[1, 6\]"),
    ("shape_mismatch", adapter_files({Q: module(6, 4)}, config={"use_dora": True},
     extra={f"{PREFIX}{Q}.lora_magnitude_vector": normal(5)}), r"\[5\] of 6 rows"),
    ("shape_mismatch", only("model.embed_tokens", normal(2, 11), normal(4, 2)), r"\[11, 4\]"),
    ("ambiguous_layout", adapter_files({"model.square": module(4, 4), "h.c_attn": module(7, 4)}), "model.square"),
    ("dora_mismatch", configured(use_dora=True), Q),
    ("dora_mismatch", beside(f"{Q}.lora_magnitude_vector", normal(6)), Q),
    ("dora_transposed", adapter_files({"model.embed_tokens": module(4, 9)}, config={"use_dora": True},
     extra={f"{PREFIX}model.embed_tokens.lora_magnitude_vector": normal(4)}), "embed_tokens"),
    ("resized", beside("model.embed_tokens.weight", normal(11, 4)), r"\[11, 4\] where the base has \[9, 4\]"),
    ("saved_modules", beside("model.norm.weight", normal(4)), "model.norm"),
]  # fmt: skip
REFUSING_BASE = {
    **BASE,
    "ids.weight": Parameter("ids.weight", (6, 4), "I64", False),
    "h.c_attn.weight": Parameter("h.c_attn.weight", (4, 7), "F32", True),
    "shared.weight": Parameter("shared.weight", (9, 4), "F32", True),
    "h.mlp.experts.gate_up_proj": Parameter("h.mlp.experts.gate_up_proj", (1, 6, 4), "F32", True),
}


@pytest.mark.parametrize(("code", "files", "words"), REFUSED)
def test_an_adapter_is_refused_with_its_reason_and_a_remedy(code: str, files: Files, words: str) -> None:
    ties = tuple(Tie(f"{part}.embed_tokens.weight", "shared.weight") for part in ("encoder", "decoder"))
    found = read(files, REFUSING_BASE, Rules(tied=ties))
    (problem,) = found.problems
    assert problem.code == code
    assert re.search(words, problem.what)
    assert problem.remedy
    assert not found.sources


def test_every_reason_for_a_refusal_has_a_test() -> None:
    assert {code for code, _, _ in REFUSED} == REASONS.keys()


def test_all_that_is_wrong_with_an_adapter_is_told_at_once() -> None:
    extra = {
        f"{PREFIX}model.norm.weight": normal(4),
        f"{PREFIX}model.square.lora_A.weight": normal(2, 4),
        f"{PREFIX}model.odd": normal(1),
    }
    config = {"r": 3, "init_lora_weights": "olora", "layer_replication": [[0, 1]], "use_qalora": True}
    found = read(adapter_files(MODULES, config=config, extra=extra))
    wanted = {
        "variant",
        "layer_replication",
        "mutated_base",
        "orphan",
        "head",
        "rank_mismatch",
        "saved_modules",
    }
    assert set(codes(found)) == wanted


def test_a_hostile_pattern_delays_nobody() -> None:
    path = "model." + "a" * 200
    base = {f"{path}.weight": Parameter(f"{path}.weight", (3, 4), "F32", True)}
    for key in HOSTILE:
        began = time.monotonic()
        files = adapter_files({path: module(3, 4)}, config={"alpha_pattern": {key: 2}})
        assert codes(read(files, base)) in ([], ["pattern"]), key
        assert time.monotonic() - began < 10, key


def test_patterns_that_people_write_are_not_taken_for_hostile() -> None:
    paths = [f"model.layers.{number}.self_attn.{name}" for number in range(64) for name in ATTENTION]
    keys = [
        ".*layers.*attn.*q_proj",
        r"model\.layers\.(0|1|2|3|4|5|6|7|8|9|10|11)\..*v_proj",
        r"layers\.\d+\.self_attn\.k_proj",
        *paths,
    ]
    modules = {path: module(3, 4) for path in paths}
    base = {f"{path}.weight": Parameter(f"{path}.weight", (3, 4), "F32", True) for path in paths}
    found = good(adapter_files(modules, config={"alpha_pattern": dict.fromkeys(keys, 6)}), base)
    assert found.facts["scale"] == "3"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PLAUSIBLE = {
    "r": st.integers(1, 4), "lora_alpha": st.integers(1, 4), "peft_type": st.just("LORA"),
    "rank_pattern": st.dictionaries(KEYS | st.text(max_size=12), st.integers(1, 4), max_size=3),
}  # fmt: skip


@given(st.fixed_dictionaries({}, optional={key: PLAUSIBLE.get(key, JSON) | JSON for key in config_of(MODULES)}))
@settings(max_examples=300, deadline=None)
def test_no_config_makes_reading_raise(config: dict[str, object]) -> None:
    for base in (BASE, None):
        found = read(adapter_files(MODULES, config=config), base)
        assert bool(found.problems) != bool(found.sources)
        assert all(problem.code in REASONS for problem in found.problems)


SEGMENTS = st.sampled_from([
    "base_model.model.", "model.", "a.", "q_proj.", "lora_A.", "lora_B.", "default.", "weight", "bias", "x",
    "lora_embedding_A", "lora_magnitude_vector", "modules_to_save.", "base_layer.",
])  # fmt: skip
TENSORS = st.dictionaries(
    st.lists(SEGMENTS, min_size=1, max_size=6).map("".join),
    st.lists(st.integers(0, 3), max_size=4).map(tuple),
    max_size=5,
)


@given(TENSORS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_keys_and_shapes_make_reading_raise(tensors: dict[str, tuple[int, ...]], dora: bool) -> None:
    weights = file_bytes({key: torch.zeros(shape) for key, shape in tensors.items()})
    config = json.dumps({**config_of(MODULES), "use_dora": dora}).encode()
    files = {"adapter_config.json": config, "adapter_model.safetensors": weights}
    for base in (BASE, None):
        found = read(files, base, SAVED)
        assert all(problem.code in REASONS for problem in found.problems)
        for source in found.sources.values():
            assert Lora().decoded_bytes(source) >= 0


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="(peft|transformers|torch).*")
        yield


def test_reads_that_lie_back_to_back_are_joined_where_both_can_be_cut_out() -> None:
    def told(*reads: tuple[int, int, int]) -> list[tuple[int, int, int, bool]]:
        return [tuple(one) for one in map(bounding_range, joined([Read(*read) for read in reads]))]

    assert told((0, 100, 164), (0, 164, 200)) == [(0, 100, 200, False)]
    assert told((0, 164, 200), (0, 100, 164)) == [(0, 100, 200, False)]
    assert told((0, 0, 8), (0, 8, 16), (0, 16, 20)) == [(0, 0, 20, False)]
    for apart in [((0, 0, 8), (0, 9, 16)), ((0, 0, 8), (1, 8, 16)), ((0, 0, 4), (0, 4, 16))]:
        assert len(told(*apart)) == 2
    assert joined([Read(0, 0, 8, shared=True), Read(0, 8, 9)]) == [[Read(0, 0, 8, shared=True), Read(0, 8, 9)]]
    assert joined([]) == []


def test_reads_are_joined_over_gaps_as_long_as_there_is_room_for_what_nobody_needs() -> None:
    def groups(*starts: int, **how: int) -> list[int]:
        return [len(group) for group in joined([Read(0, start, start + 8) for start in starts], **how)]

    assert groups(0, 16, 40) == groups(0, 16, 40, gap=7, spare=99) == [1, 1, 1]
    assert groups(0, 16, 40, gap=8, spare=99) == [2, 1]
    assert groups(0, 16, 40, gap=16, spare=24) == [3]
    assert groups(0, 16, 40, 48, gap=16, spare=23) == [2, 2]
    assert groups(0, 10, 20, gap=16, spare=99) == [1, 1, 1]
    assert groups(0, 10, 20, gap=16, spare=99, width=2) == [3]
    assert [len(group) for group in joined([Read(0, 0, 8), Read(0, 4, 12)], gap=16, spare=99, width=1)] == [1, 1]
