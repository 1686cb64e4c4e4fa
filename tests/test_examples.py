"""The recipes of examples/ are recipes, and its notebooks run."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import ties_ray
from ties_ray.recipe.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_is_one(path: Path) -> None:
    assert isinstance(ties_ray.load_recipe(path), Recipe)
    assert path.name in (FOLDER / "README.md").read_text()


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
