import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jinja2 import Environment

from tests.tools.families import Family
from tests.tools.merging import INDEX, digests, merge, read_tensors
from ties_ray.errors import InputError, RecipeError
from ties_ray.outputs.checkpoint import Checkpoint
from ties_ray.testing import OutputContract

MakeFamily = Callable[..., Family]


class TestCheckpoint(OutputContract):
    @pytest.fixture
    def output(self) -> Checkpoint:
        return Checkpoint(path="/out")


class TestCheckpointOfAnotherDtype(OutputContract):
    @pytest.fixture
    def output(self) -> Checkpoint:
        return Checkpoint(path="/out", dtype="float16")


def test_files_are_cut_by_size_and_the_index_says_what_is_where(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    merge(family, tmp_path / "one", "average")
    result = merge(family, {"path": str(tmp_path / "many"), "file_size": "4KB"}, "average")
    assert len(result.files) > 2
    assert all((tmp_path / "many" / file.name).stat().st_size == file.size for file in result.files)
    index = json.loads((tmp_path / "many" / INDEX).read_bytes())
    whole, cut = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert index["weight_map"].keys() == whole.keys() == cut.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    assert not (tmp_path / "one" / INDEX).exists()


def test_the_config_names_the_dtype_that_was_written(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    merge(family, tmp_path / "same", "average")
    merge(family, {"path": str(tmp_path / "other"), "dtype": "float32"}, "average")
    original = (Path(family.base) / "config.json").read_bytes()
    assert (tmp_path / "same" / "config.json").read_bytes() == original
    assert json.loads((tmp_path / "other" / "config.json").read_bytes()) == {
        **json.loads(original), "torch_dtype": "float32",
    }  # fmt: skip


def test_what_overflows_the_outputs_dtype_stops_the_merge(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3, dtype="F32", exact=True)
    with pytest.raises(InputError, match=r"merged values are finite but overflow F16; choose a wider output\.dtype"):
        merge(family, {"path": str(tmp_path / "out"), "dtype": "float16"}, {"name": "task_arithmetic", "lambda": 1e6})
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_files_come_from_the_input_that_the_recipe_names(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    merge(family, {"path": str(tmp_path / "out"), "files_from": "1"}, "average")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "ties-ray.result.json"} <= names
    copied = (Path(family.models[1]) / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == copied
    assert digests(tmp_path / "out").keys() == {"model.safetensors"}


@pytest.mark.parametrize("template", ["chatml", "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_a_chat_template_goes_to_every_file_that_may_hold_one(
    template: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    family, base = family_of(num_models=1), tmp_path / "base"
    shutil.copytree(family.base, base)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    family = replace(family, base=str(base))
    merge(family, {"path": str(tmp_path / "out"), "chat_template": template}, "average")
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    written = (tmp_path / "out/chat_template.jinja").read_text()
    assert settings["chat_template"] == written
    assert settings["eos_token"] == "<t1>"
    message = {"role": "user", "content": "hello"}
    said = Environment().from_string(written).render(messages=[message], add_generation_prompt=True)
    chatml = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert said == (chatml if template == "chatml" else "hello")
    (base / "tokenizer_config.json").unlink()
    with pytest.raises(RecipeError, match=r"needs tokenizer_config\.json, which .*base has not"):
        merge(family, {"path": str(tmp_path / "more"), "chat_template": template}, "average")


def test_auto_takes_the_chat_template_that_most_inputs_have(family_of: MakeFamily, tmp_path: Path) -> None:
    family, base = family_of(num_models=3), tmp_path / "base"
    shutil.copytree(family.base, base)
    models = [tmp_path / f"model-{number}" for number in range(3)]
    for uri, folder in zip(family.models, models, strict=True):
        shutil.copytree(uri, folder)
    usual = "{{ messages }}\n{# of two #}"
    (models[1] / "chat_template.jinja").write_text(usual + "\n")
    settings = {"chat_template": [{"name": "tools", "template": "{{ 1 }}"}, {"name": "default", "template": usual}]}
    (models[2] / "tokenizer_config.json").write_text(json.dumps(settings))
    (models[0] / "tokenizer_config.json").write_text("{}")
    family = replace(family, base=str(base), models=tuple(map(str, models)))
    result = merge(family, {"path": str(tmp_path / "out"), "chat_template": "auto"}, "average")
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert written == {"eos_token": "<t1>", "chat_template": usual}
    assert f"chat template: that of {models[1]}, which 2 of 4 inputs have" in result.notes
    for folder in (base, *models):
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            (folder / name).unlink(missing_ok=True)
    result = merge(family, {"path": str(tmp_path / "none"), "chat_template": "auto"}, "average")
    assert "chat template: no input has one" in result.notes


def test_a_name_that_is_no_template_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give `auto`, one of alpaca, .* or a template in Jinja"):
        Checkpoint(path="/out", chat_template="vicuna")
