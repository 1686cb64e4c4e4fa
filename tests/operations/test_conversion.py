"""Configurations of mergekit on real folders: converted, planned, merged, or refused for what the folders hold."""

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

import ties_ray
from tests.tools.families import tokenizer_json, write_checkpoint
from tests.tools.merging import digests
from ties_ray.cli.commands import commands
from ties_ray.errors import MergeError, RecipeError
from ties_ray.recipe.parse import parse
from ties_ray.stores import Stores

LOCAL = ["run.executor=local"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, with a base of three layers and two fine-tunes of it."""
    import torch

    names = [
        f"model.layers.{layer}.{part}.weight" for layer in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")
    ]
    base = {name: torch.randn(8, 8, generator=torch.Generator().manual_seed(7)) for name in names}
    base["model.embed_tokens.weight"] = torch.ones(48, 8)
    config = {"model_type": "llama", "num_hidden_layers": 3, "vocab_size": 48}
    for number, name in enumerate(("base", "a", "b")):
        moved = {key: value + number * 0.25 for key, value in base.items()}
        write_checkpoint(Stores({}).of("/"), str(tmp_path / name), moved, config=config)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configuration(layers: int = 3, more: str = "") -> str:
    return (
        f"slices: [{{sources: [{{model: base, layer_range: [0, {layers}]}}, "
        f"{{model: a, layer_range: [0, {layers}]}}]}}]\n"
        "merge_method: slerp\nbase_model: base\n"
        f"parameters: {{t: [{{filter: mlp, value: [0, 0.4, 1]}}, {{value: 0.5}}]}}\n{more}"
    )


def test_the_printed_recipe_merges_to_the_bytes_of_the_configuration(folder: Path) -> None:
    Path("m.yml").write_text(configuration(more="dtype: bfloat16\n"))
    printed = CliRunner().invoke(commands, ["convert", "m.yml", "--set", "output.path=from-recipe"])
    assert printed.exit_code == 0, printed.output
    assert "# * dtype bfloat16 is that of the output" in printed.output
    recipe = parse(printed.output, "printed", LOCAL)
    ties_ray.merge(recipe)
    ties_ray.merge(ties_ray.load_recipe("m.yml", ["output=from-configuration", *LOCAL]))
    assert digests(folder / "from-recipe") == digests(folder / "from-configuration")
    assert recipe.output.dtype == "bfloat16"


def test_the_record_of_a_conversion_holds_recipe_and_notes(folder: Path) -> None:
    Path("m.yml").write_text(configuration())
    printed = CliRunner().invoke(commands, ["convert", "m.yml", "--json"])
    assert json.loads(printed.output)["recipe"]["base"] == "base"


def test_the_log_tells_what_is_different(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("m.yml").write_text(configuration(more="dtype: bfloat16\n"))
    with caplog.at_level(logging.INFO):
        ties_ray.load_recipe("m.yml", ["output.path=out"])
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["m.yml"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (configuration(2), RecipeError, r"m\.yml, line 1: slices\.0: ends at layer 2, and the base has 3 layers"),
        (configuration(), RecipeError, "add `-o FOLDER`"),
    ],
)
def test_what_a_configuration_lacks_is_said(text: str, error: type[MergeError], message: str, folder: Path) -> None:
    Path("m.yml").write_text(text)
    with pytest.raises(error, match=message):
        ties_ray.load_recipe("m.yml")


def test_vocabularies_that_differ_are_matched_by_token(folder: Path) -> None:
    Path("m.yml").write_text(configuration(more="tokenizer_source: union\n"))
    assert ties_ray.load_recipe("m.yml", ["output.path=out"]).vocabulary is None
    Path("a/tokenizer.json").write_bytes(tokenizer_json(48, prefix="u"))
    united = ties_ray.load_recipe("m.yml", ["output.path=out"]).vocabulary
    assert united
    assert (united.tokens, united.missing, united.pad_to_multiple_of) == ("union", "base", 1)
    Path("a/tokenizer.json").unlink()
    assert ties_ray.load_recipe("m.yml", ["output.path=out"]).vocabulary is None


def test_a_recipe_is_no_configuration(folder: Path) -> None:
    Path("r.yaml").write_text("base: base\nmodels: [a]\nmethod: average\noutput: out\n")
    refused = CliRunner().invoke(commands, ["convert", "r.yaml"])
    assert (refused.exit_code, "has no merge_method" in refused.output) == (2, True)
