"""The recipes of examples/ are recipes, and its notebooks run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import ties_ray
from tests.tools import scored
from tests.tools.families import make_family
from tests.tools.merging import read_tensors
from ties_ray.layers import layer_of
from ties_ray.operations import recipes
from ties_ray.recipe.recipe import Recipe
from ties_ray.recipe.space import SearchedModel, Space
from ties_ray.stores import Stores

FOLDER = Path(__file__).parents[1] / "examples"
MERGES = [path for path in FOLDER.glob("*.yaml") if "\nsearch:" not in path.read_text()]


@pytest.mark.parametrize("path", sorted(MERGES), ids=lambda path: path.name)
def test_a_recipe_is_one(path: Path) -> None:
    assert isinstance(ties_ray.load_recipe(path), Recipe)
    assert path.name in (FOLDER / "README.md").read_text()


def test_layer_swapping_swaps_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make_family(Stores({}).of("/"), str(tmp_path / "models"), num_models=2, layers=32, hidden=4, dtype="F32")
    (tmp_path / "models" / "model-0").rename(tmp_path / "models" / "math")
    (tmp_path / "models" / "model-1").rename(tmp_path / "models" / "japanese")
    monkeypatch.chdir(tmp_path)
    recipe = ties_ray.load_recipe(FOLDER / "layer_swapping.yaml").model_dump(mode="json", by_alias=True)
    recipe["output"]["dtype"] = "float32"
    ties_ray.merge({**recipe, "run": {"executor": "local"}})
    written, (math, language) = read_tensors(tmp_path / "merged" / "math-in-japanese"), family.model_tensors
    halves = set()
    for name, base in family.base_tensors.items():
        layer = layer_of(name)
        if not base.is_floating_point() or not base.numel() or name not in math:
            continue
        if layer and layer.number in (5, 29):
            wanted = (math[name].double() + language[name].double()) / 2
            halves.add(layer.number)
        else:
            wanted = (math if layer and 5 < layer.number < 29 else language)[name].double()
        torch.testing.assert_close(written[name].double(), wanted, rtol=1e-6, atol=1e-6, msg=name)
    assert halves == {5, 29}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER.parent}:{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are made by who runs it"
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    tables = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert any("dataframe" in table for table in tables)
    assert path.name in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", ["search.yaml", "lorahub.yaml", "recycling.yaml"])
def test_a_recipe_of_a_search_is_one(name: str) -> None:
    search = recipes.parsed_search((FOLDER / name).read_text(), name)
    weight = 0.01 if name == "lorahub.yaml" else 1.0
    models = [SearchedModel(str(number), f"adapters/{number}", weight) for number in range(5)]
    space = Space(search.search, search.recipe(), search.common, models)
    start = space.values(tuple(axis.start for axis in space.axes))
    weights = {"search.yaml": 0.2, "lorahub.yaml": 0.01, "recycling.yaml": 0.2}[name]
    assert start["models"]["weights"] == dict.fromkeys("01234", weights)
    assert name in (FOLDER / "README.md").read_text()


def test_ray_tune_drives_candidates(tmp_path: Path) -> None:
    base = scored.causal(tmp_path / "base")
    for number in range(2):
        for parameter in base.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
        base.save_pretrained(tmp_path / f"model-{number}")
    recipe = {"base": str(tmp_path / "base"), "models": [f"{tmp_path}/model-{number}" for number in range(2)],
              "method": "ties", "output": str(tmp_path / "out"), "run": {"executor": "local"}}  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "dev.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("the cat sat", "a dog")))
    home = {"HOME": str(tmp_path), "PYTHONPATH": str(FOLDER.parent), "RAY_ADDRESS": "local"}  # it writes ~/ray_results
    words = [sys.executable, str(FOLDER / "ray_tune.py"), "recipe.json", "dev.jsonl", "2"]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, **home}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "method.density" in done.stdout
    assert (tmp_path / "out/model.safetensors").exists()
