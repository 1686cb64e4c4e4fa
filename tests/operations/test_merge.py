"""Whole merges of real, small models: what transformers loads is what was merged."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.conftest import Bucket
from tests.tools import oracle
from tests.tools.families import Family, write_checkpoint
from tests.tools.merging import INDEX, LOCAL, read_tensors, recipe_of, same_bits
from ties_ray.driver import result as result_record
from ties_ray.errors import InputError
from ties_ray.operations import merging
from ties_ray.stores import Stores, join

LLAMA = transformers.LlamaConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
TIED = transformers.LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
BERT = transformers.BertConfig(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=40,
)  # fmt: skip


def fine_tunes(
    config: transformers.PreTrainedConfig, auto: Any, folder: Path, dtype: torch.dtype, count: int = 3
) -> tuple[Family, list[Any]]:
    """Save a model of random weights and fine-tunes of it, in shards; return where they lie, and the models."""
    torch.manual_seed(0)
    base = auto.from_config(config, dtype=dtype)
    models = [base]
    for _ in range(count):
        model = auto.from_config(config, dtype=dtype)
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape).to(dtype) * parameter.abs().mean() * 0.02
        models.append(model)
    names = ["base", *(f"tune-{number}" for number in range(count))]
    for name, model in zip(names, models, strict=True):
        model.save_pretrained(folder / name, max_shard_size="30KB")
    return Family(str(folder / "base"), tuple(str(folder / name) for name in names[1:]), {}, ()), models


@pytest.mark.parametrize(
    ("config", "auto", "dtype"),
    [
        (LLAMA, transformers.AutoModelForCausalLM, torch.bfloat16),
        (TIED, transformers.AutoModelForCausalLM, torch.float32),
        (BERT, transformers.AutoModel, torch.float16),
    ],
    ids=["llama", "llama-tied", "bert"],
)
def test_transformers_loads_the_merge_and_computes_with_it(
    config: transformers.PreTrainedConfig, auto: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    family, (base, *tunes) = fine_tunes(config, auto, tmp_path, dtype)
    assert (tmp_path / "base" / INDEX).exists(), "the inputs have several weight files"
    recipe = recipe_of(family, {"path": str(tmp_path / "out"), "file_size": "50KB"}, "average")
    assert len(merging.merge(recipe).files) > 1

    loaded, record = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(record[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype
    merged = loaded.state_dict()
    assert merged.keys() == base.state_dict().keys()
    expected = {}
    for name, tensor in base.state_dict().items():
        deltas = [tune.state_dict()[name].float() - tensor.float() for tune in tunes]
        expected[name] = (tensor.float() + (deltas[0] + deltas[1] + deltas[2]) / 3).to(dtype)
        assert same_bits(merged[name], expected[name]), name
    base.load_state_dict(expected)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids)[0], base.eval()(input_ids=ids)[0])


def test_a_merge_in_another_dtype_is_loaded_in_it(tmp_path: Path) -> None:
    family, _ = fine_tunes(LLAMA, transformers.AutoModelForCausalLM, tmp_path, torch.float32)
    output = {"path": str(tmp_path / "out"), "dtype": "bfloat16"}
    merging.merge(recipe_of(family, output, {"name": "ties", "density": 0.3}))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    merged = read_tensors(tmp_path / "out")
    assert all(same_bits(tensor, loaded.state_dict()[name]) for name, tensor in merged.items())


def test_one_model_without_trim_comes_back_as_it_was(tmp_path: Path) -> None:
    family, (_, tune) = fine_tunes(LLAMA, transformers.AutoModelForCausalLM, tmp_path, torch.bfloat16, count=1)
    merging.merge(recipe_of(family, str(tmp_path / "out"), {"name": "ties", "density": 1.0}))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, tune.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_bucket_is_merged_into_and_a_death_between_upload_and_index_is_mended(
    tmp_path: Path, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _ = fine_tunes(LLAMA, transformers.AutoModelForCausalLM, tmp_path, torch.bfloat16)
    output = {"path": f"{s3_bucket.uri}/out", "file_size": "100KB"}
    recipe = recipe_of(family, output, "ties", storage=s3_bucket.storage, run={**LOCAL, "workers": 2})
    stores = Stores(s3_bucket.storage)

    def die(*_: object) -> None:
        raise KeyboardInterrupt("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(result_record, "publish_documents", die)
        with pytest.raises(KeyboardInterrupt, match="the machine is gone"):
            merging.merge(recipe)
    names = {pin.uri.rpartition("/")[2] for pin in stores.of(s3_bucket.uri).list(f"{s3_bucket.uri}/out").files}
    assert names
    assert all(name.endswith(".safetensors") for name in names), "the uploads are complete, and no loader finds them"

    result = merging.merge(recipe)
    assert result.resumed
    assert result.bytes_read == 0
    (tmp_path / "back").mkdir()
    for pin in stores.of(s3_bucket.uri).list(f"{s3_bucket.uri}/out").files:
        data = stores.of(pin.uri).get(join(f"{s3_bucket.uri}/out", pin.uri.rpartition("/")[2]), 2**30)[1]
        (tmp_path / "back" / pin.uri.rpartition("/")[2]).write_bytes(data)
    merging.merge(recipe_of(family, {"path": str(tmp_path / "local"), "file_size": "100KB"}, "ties"))
    here, there = read_tensors(tmp_path / "local"), read_tensors(tmp_path / "back")
    assert all(same_bits(tensor, there[name]) for name, tensor in here.items())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert merging.merge(recipe).reused


def test_the_result_says_what_it_is_made_of(tmp_path: Path) -> None:
    family, _ = fine_tunes(BERT, transformers.AutoModel, tmp_path, torch.float32)
    result = merging.merge(recipe_of(family, str(tmp_path / "out"), {"name": "ties"}, weights=(1.0, 0.0, 2.0)))
    record = json.loads((tmp_path / "out/ties-ray.result.json").read_bytes())
    assert record == json.loads(result.model_dump_json())
    assert (record["status"], record["output"]) == ("done", str(tmp_path / "out"))
    assert [model["uri"] for model in record["provenance"]["models"]] == list(family.models)
    sizes = {uri: size for uri, size, *_ in record["provenance"]["base"]["objects"]}
    assert sizes == {str(path): path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")}
    assert record["provenance"]["arithmetic"] == "exact-1"
    assert {trim["model"] for trim in record["trims"]} == {"0", "2"}
    assert any("weight 0" in note for note in record["notes"])
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| 2 |" in card


@pytest.mark.parametrize(
    "method", ["average", "ties", {"name": "ties", "trim": "tensor"}, {"name": "ties", "profile": "official"}], ids=str
)
def test_a_model_without_elements_is_merged_into_one(method: object, tmp_path: Path) -> None:
    store = Stores({}).of("/")
    for name in ("base", "0", "1"):
        write_checkpoint(store, str(tmp_path / name), {"model.empty": torch.empty(0, 3)})
    family = Family(str(tmp_path / "base"), (str(tmp_path / "0"), str(tmp_path / "1")), {}, ())
    merging.merge(recipe_of(family, tmp_path / "out", method))
    assert read_tensors(tmp_path / "out")["model.empty"].shape == (0, 3)


@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_what_a_model_lacks_does_not_move_if_the_recipe_allows_it(
    trim: str, family_of: Callable[..., Family], tmp_path: Path
) -> None:
    family = family_of(num_models=3)
    lacking = ("lm_head.weight", "model.norm.weight")
    kept = {name: tensor for name, tensor in family.model_tensors[1].items() if name not in lacking}
    write_checkpoint(Stores({}).of("/"), str(tmp_path / "partial"), kept)
    partial = replace(family, models=(family.models[0], str(tmp_path / "partial"), family.models[2]))
    method = {"name": "ties", "trim": trim}
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        merging.merge(recipe_of(partial, tmp_path / "out", method))
    result = merging.merge(recipe_of(partial, tmp_path / "out", method, allow={"missing": "zero"}))
    assert any("lm_head.weight" in note for note in result.notes)
    filled = family.model_tensors[1] | {name: family.base_tensors[name] for name in lacking}
    whole = replace(family, model_tensors=(family.model_tensors[0], filled, family.model_tensors[2]))
    answer = oracle.merge(whole, oracle.Rules("ties", 0.2, tensor=trim == "tensor"))
    oracle.check(whole, answer, read_tensors(tmp_path / "out"))
    merged = {(trim.model, trim.parameter): trim for trim in result.trims}
    for key, expected in answer.trims.items():
        assert (merged[key].threshold, merged[key].kept) == (expected.threshold, expected.kept), key


WITHOUT_RAY = """
import importlib.metadata, sys
sys.modules["ray"] = None
version = importlib.metadata.version
def installed(package):
    if package == "ray":
        raise importlib.metadata.PackageNotFoundError(package)
    return version(package)
importlib.metadata.version = installed
import ties_ray
print(ties_ray.merge(sys.argv[1]).provenance.ray)
"""


def test_the_local_executor_merges_where_ray_is_not_installed(tmp_path: Path) -> None:
    family, _ = fine_tunes(BERT, transformers.AutoModel, tmp_path, torch.float32)
    recipe = {"base": family.base, "models": list(family.models), "method": "average",
              "output": str(tmp_path / "out"), "run": LOCAL}  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    command = [sys.executable, "-c", WITHOUT_RAY, str(tmp_path / "recipe.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.stdout == "nothing\n", done.stderr


def test_the_line_that_opens_an_output_is_python_whatever_the_folder_is_called(
    family_of: Callable[..., Family], tmp_path: Path
) -> None:
    output = tmp_path / 'of "mine"'
    result = merging.merge(recipe_of(family_of(), output, "average"))
    imported, statement = ast.parse(result.opened_by).body
    assert isinstance(imported, ast.ImportFrom)
    assert isinstance(statement, ast.Assign)
    assert isinstance(statement.value, ast.Call)
    assert ast.literal_eval(statement.value.args[0]) == str(output)
