import json
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.tools.adapters import make_pool
from ties_ray.kernels import Factors
from ties_ray.libraries.library import TRANSFORMERS
from ties_ray.operations import merging
from ties_ray.outputs.adapter import PEFT, Adapter
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import MergeResult
from ties_ray.stores import Stores
from ties_ray.tensors import Kind, Parameter
from ties_ray.testing import OutputContract

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

MATRICES = (
    Parameter("model.embed_tokens.weight", (50, 12), "BF16", True, kind="embedding"),
    Parameter("model.layers.0.q_proj.weight", (20, 12), "BF16", True),
    Parameter("model.layers.0.k_proj.weight", (0, 12), "BF16", True),
    Parameter("model.layers.1.q_proj.weight", (20, 12), "BF16", True, changed=False),
    Parameter("model.norm.weight", (12,), "BF16", True, changed=False),
    Parameter("ids", (9,), "I64", False),
)


class TestAdapter(OutputContract):
    @pytest.fixture
    def output(self) -> Adapter:
        return Adapter(path="/out", rank=6)

    @pytest.fixture
    def parameters(self) -> tuple[Parameter, ...]:
        return MATRICES


class TestAdapterOfAutomaticRank(TestAdapter):
    @pytest.fixture
    def output(self) -> Adapter:
        return Adapter(path="/out", rank="auto", max_rank=40, dtype="bfloat16")


def written(adapter: Adapter, folder: Path, parameters: list[Parameter], changes: Mapping[str, torch.Tensor]) -> Path:
    """Write an adapter of dense changes as the road would."""
    known = {each.name: each for each in parameters}
    scratch = {name: adapter.condense(known[name], change.clone()).data for name, change in changes.items()}
    tensors = {
        tensor.name: adapter.assemble(tensor, known[tensor.parameter], scratch[tensor.parameter]).reshape(tensor.shape)
        for tensor in adapter.tensors(parameters)
    }
    save_file(tensors, folder / adapter.library(TRANSFORMERS).file_name(1, 1), {"format": "pt"})
    name, data = adapter.index((), parameters, {"task_type": "CAUSAL_LM", "base_name": "tests/base"}, PEFT)
    (folder / name).write_bytes(data)
    return folder


def llama() -> tuple[PreTrainedModel, dict[str, Kind]]:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=60, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"embed_tokens": "embedding", "norm": "linear"}


def gpt2() -> tuple[PreTrainedModel, dict[str, Kind]]:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=16))
    return model, {"c_attn": "transposed", "c_proj": "transposed", "c_fc": "transposed", "wte": "embedding"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_peft_merges_the_adapter_to_base_plus_change(make: object, tmp_path: Path) -> None:
    assert callable(make)
    torch.manual_seed(3)
    model, kinds = make()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, changes = [], {}
    for name, tensor in base.items():
        word = name.removesuffix(".weight").rpartition(".")[2]
        changed = word.endswith(("_proj", "c_attn", "c_fc", "embed_tokens", "wte")) and name.endswith(".weight")
        # A layer without an adapter, though others have one on the same module.
        changed &= "layers.1.mlp" not in name
        parameters.append(Parameter(name, tuple(tensor.shape), "F32", True, changed, kinds.get(word, "linear")))
        if changed:
            factors = torch.randn(tensor.shape[0], 5), torch.randn(5, tensor.shape[1])
            changes[name] = 0.05 * factors[0] @ factors[1]
    adapter = Adapter(path="/out", rank=8)
    assert not adapter.problems(parameters)
    folder = written(adapter, tmp_path, parameters, changes)
    peft = PeftModel.from_pretrained(model, folder)
    modules = {name: module for name, module in peft.named_modules() if hasattr(module, "get_delta_weight")}
    for name, change in changes.items():
        delta = modules["base_model.model." + name.removesuffix(".weight")].get_delta_weight("default")
        assert (delta - change).abs().max() < 1e-5, name
    merged = peft.merge_and_unload(safe_merge=True).state_dict()
    for name, tensor in base.items():
        tied = "transformer.wte.weight" if name == "lm_head.weight" and make is gpt2 else name
        assert (merged[name] - tensor - changes.get(tied, 0)).abs().max() < 1e-5, name
    assert len(changes) > 8


@pytest.mark.parametrize(
    ("kind", "keys", "turned"),
    [
        ("linear", ("lora_A.weight", "lora_B.weight"), False),
        ("transposed", ("lora_A.weight", "lora_B.weight"), True),
        ("embedding", ("lora_embedding_A", "lora_embedding_B"), True),
    ],
)
@pytest.mark.parametrize("shape", [(20, 9), (9, 20)])
def test_the_product_of_the_tensors_is_the_change(
    shape: tuple[int, int], kind: Kind, keys: tuple[str, str], turned: bool
) -> None:
    parameter = Parameter("layer.weight", shape, "F32", True, kind=kind)
    factors = Factors(torch.randn(shape[0], 3), torch.randn(3, shape[1]), 0.5, 0)
    change = 0.5 * factors.left @ factors.right
    adapter = Adapter(path="/out", rank=16)
    a, b = adapter.tensors([parameter])
    assert (a.name, b.name) == tuple(f"base_model.model.layer.{key}" for key in keys)
    width, height = shape if turned else shape[::-1]
    assert (a.shape, b.shape) == ((16, width), (height, 16))
    for found in (adapter.condense(parameter, change.clone()), adapter.combine(parameter, [(1.0, factors)])):
        first, second = (adapter.assemble(each, parameter, found.data).view(each.shape) for each in (a, b))
        assert torch.allclose(second @ first, change.T if turned else change, atol=1e-5)


def test_a_lower_rank_is_assembled_from_the_factors_of_a_higher_one() -> None:
    parameter = Parameter("layer.weight", (40, 30), "F32", True)
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    auto, eight = Adapter(path="/out", rank="auto", max_rank=32), Adapter(path="/out", rank=8)
    many, few = auto.condense(parameter, matrix.clone()), eight.condense(parameter, matrix.clone())
    assert len(many.data) == 4 * len(few.data)
    assert many.errors2[0] == few.errors2[0]
    for tensor in eight.tensors([parameter]):
        assert torch.equal(eight.assemble(tensor, parameter, many.data), eight.assemble(tensor, parameter, few.data))


def test_auto_takes_the_smallest_rank_that_keeps_enough_over_all_modules() -> None:
    auto = Adapter(path="/out", rank="auto", energy=0.9, max_rank=64)
    assert auto.ranks == (8, 16, 32, 64)
    errors2 = [(50.0, 9.0, 4.0, 0.0), (60.0, 12.0, 5.0, 1.0)]
    assert auto.choose([100.0, 110.0], errors2).ranks == (16,)
    assert auto.model_copy(update={"energy": 0.901}).choose([100.0, 110.0], errors2).ranks == (32,)
    assert auto.model_copy(update={"energy": 1.0}).choose([100.0, 110.0], errors2).ranks == (64,)
    assert auto.choose([0.0], [(0.0, 0.0, 0.0, 0.0)]).ranks == (8,)
    assert Adapter(path="/out", rank=5).choose([1.0], [(0.9,)]).ranks == (5,)


def test_the_config_is_what_serving_engines_read() -> None:
    parameters = [*MATRICES, Parameter("net.3.to_out.0.weight", (9, 9), "F32", True)]
    name, data = Adapter(path="/out", rank=16).index((), parameters, {"base": "s3://models/base"}, PEFT)
    config = json.loads(data)
    assert name == "adapter_config.json"
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 16, 16, "none")
    assert config["target_modules"] == ["embed_tokens", "k_proj", "layers.0.q_proj", "to_out.0"]
    assert (config["base_model_name_or_path"], config["task_type"]) == ("s3://models/base", None)
    assert not any(config[key] for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"))
    named = Adapter(path="/out").index((), parameters, {"base": "s3://models/base", "base_name": "meta/llama"}, PEFT)
    assert json.loads(named[1])["base_model_name_or_path"] == "meta/llama"


def linear(*paths: str, changed: bool = True) -> list[Parameter]:
    return [Parameter(f"{path}.weight", (9, 9), "F32", True, changed) for path in paths]


def test_targets_are_the_shortest_ends_that_name_no_other_module() -> None:
    def chosen(parameters: Sequence[Parameter]) -> object:
        return json.loads(Adapter(path="/out").index((), parameters, {}, PEFT)[1])["target_modules"]

    changed = linear("decoder.layers.0.self_attn.q", "decoder.layers.1.self_attn.q")
    assert chosen(changed) == ["q"]
    assert chosen([*changed, *linear("decoder.layers.0.mlp.q", changed=False)]) == ["self_attn.q"]
    encoder = linear("encoder.layers.0.self_attn.q", "encoder.layers.1.self_attn.q", "norm", changed=False)
    assert chosen([*changed, *encoder]) == ["decoder.layers.0.self_attn.q", "decoder.layers.1.self_attn.q"]
    holds_others = linear("q.inner", "layers.q.0.v", changed=False)
    assert chosen([*changed, *holds_others]) == ["self_attn.q"]


@pytest.mark.parametrize(("task", "written"), [("SEQ_CLS", None), ("TOKEN_CLS", None), ("CAUSAL_LM", "CAUSAL_LM")])
def test_a_task_whose_head_is_not_there_is_not_named(task: str, written: str | None) -> None:
    config = json.loads(Adapter(path="/out").index((), linear("q"), {"task_type": task}, PEFT)[1])
    assert config["task_type"] == written


def test_what_an_adapter_can_not_hold_is_named() -> None:
    adapter = Adapter(path="/out")
    odd = [Parameter(f"norm{number}.weight", (4,), "F32", True) for number in range(6)]
    odd += [Parameter("table", (4, 4), "F32", True), Parameter("fine.weight", (4, 4), "F32", True)]
    (problem,) = adapter.problems(odd)
    assert "norm0.weight, norm1.weight, norm2.weight, norm3.weight and 3 more" in problem.what
    assert "exclude" in problem.remedy
    assert not adapter.problems([each._replace(changed=False) for each in odd])
    turned = Parameter("other.weight", (4, 4), "F32", True, kind="transposed")
    (problem,) = adapter.problems([odd[-1], turned])
    assert "other.weight" in problem.what
    assert not adapter.problems([turned, MATRICES[0]])


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": "most"}, {"energy": 0}, {"energy": 1.1}, {"max_rank": 4}])
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Adapter(path="/out", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["average", "ties"])
def test_a_merged_adapter_misses_the_merged_delta_by_the_error_it_states(tmp_path: Path, method: str) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), hidden=32)

    def merged(name: str, **output: object) -> MergeResult:
        recipe = {"base": pool.base, "models": list(pool.adapters), "method": method, "run": {"executor": "local"}}
        return merging.merge(validate({**recipe, "output": {"path": str(tmp_path / name), **output}}))

    result = merged("adapter", kind="adapter", rank=8, file_size="4KB")
    merged("delta", kind="delta", file_size="4KB")
    delta = {name: one for path in (tmp_path / "delta").glob("*.safetensors") for name, one in load_file(path).items()}
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    error2 = norm2 = 0.0
    for name, change in delta.items():
        path = "base_model.model." + name.removesuffix(".weight")
        a, b = (factors.pop(f"{path}.lora_{side}.weight").double() for side in "AB")
        error2 += float((change - b @ a).square().sum())
        norm2 += float(change.double().square().sum())
    assert not factors
    assert len(delta) == 14
    assert result.truncation is not None
    assert 0.1 < result.truncation.relative_error < 0.9
    assert result.truncation.relative_error == pytest.approx((error2 / norm2) ** 0.5, rel=1e-4)


def test_a_rank_that_loses_much_is_warned_of_and_the_remedy_mends_it(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), hidden=32)

    def merged(name: str, **output: object) -> MergeResult:
        recipe = {"base": pool.base, "models": list(pool.adapters), "method": "ties", "run": {"executor": "local"}}
        return merging.merge(
            validate({**recipe, "output": {"path": str(tmp_path / name), "kind": "adapter", **output}})
        )

    (warning,) = merged("eight", rank=8).warnings
    assert "of the merge's norm: output.rank: auto takes the smallest rank" in warning
    assert warning in (tmp_path / "eight" / "README.md").read_text()
    assert merged("auto", rank="auto").warnings == []
    (warning,) = merged("bounded", rank="auto", max_rank=8).warnings
    assert "output.max_rank allows no more: raise it" in warning


MEASURE = """
import sys, torch
from ties_ray.tensors import Parameter
from ties_ray.kernels import Factors
from ties_ray.outputs.adapter import Adapter

def held(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

def task(rows, columns, rank_sum):
    parameter = Parameter("a.weight", (rows, columns), "F32", True)
    if what == "condense":
        matrix = torch.randn(rows, columns)
        return lambda: adapter.condense(parameter, matrix), adapter.condense_bytes(parameter)
    each = rank_sum // 8
    terms = [(1.0, Factors(torch.randn(rows, each), torch.randn(each, columns), 1.0, 0)) for _ in range(8)]
    return lambda: adapter.combine(parameter, terms), adapter.combine_bytes(parameter, rank_sum)

torch.set_num_threads(1)
what, rows, columns, rank, rank_sum = sys.argv[1], *map(int, sys.argv[2:])
adapter = Adapter(path="/out", rank=rank)
task(80, 70, 16)[0]()  # so that libraries are loaded and kernels compiled
work, bound = task(rows, columns, rank_sum)
open("/proc/self/clear_refs", "w").write("5")
before = held("VmRSS")
work()
print(held("VmHWM") - before, bound)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("what", "rows", "columns", "rank", "rank_sum"),
    [
        ("condense", 3000, 1200, 64, 0),
        ("condense", 800, 2500, 256, 0),
        ("combine", 3000, 1200, 64, 640),
    ],
)
def test_memory_stays_below_what_was_said(what: str, rows: int, columns: int, rank: int, rank_sum: int) -> None:
    command = [sys.executable, "-c", MEASURE, what, *map(str, (rows, columns, rank, rank_sum))]
    measured, bound = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert 2**20 < measured < bound


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_modules_are_called_as_the_adapters_call_them_where_the_bases_files_lack_a_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(weights).items()}
    save_file(bare, weights, metadata={"format": "pt"})
    wanted: dict[str, torch.Tensor] = {}
    for number in range(2):
        settings = LoraConfig(r=4, target_modules=["c_attn", "wte"], fan_in_fan_out=True, init_lora_weights=False)
        adapted = get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), settings)
        adapted.save_pretrained(str(tmp_path / f"adapter-{number}"), save_embedding_layers=False)
        for name, tensor in adapted.merge_and_unload().state_dict().items():
            wanted[name] = wanted.get(name, 0) + tensor
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    data = {
        "base": str(tmp_path / "base"),
        "models": [str(tmp_path / "adapter-*")],
        "method": "task_arithmetic",
        "output": {"path": str(tmp_path / "out"), "kind": "adapter", "rank": 8},
        "run": {"executor": "local", "workers": 1},
    }
    merging.merge(validate(data))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        merged = PeftModel.from_pretrained(base, str(tmp_path / "out")).merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name] - before[name], rtol=1e-5, atol=1e-4)
