"""What the documents say of the code is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ties_ray.recipe.parse import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_recipe_of_the_readme_is_a_recipe() -> None:
    recipe = parse(re.findall(r"```yaml\n(# recipe.yaml.*?)```", README, re.DOTALL)[0])
    assert recipe.method.name == "ties"
    assert [entry.at_least for entry in recipe.models] == [None, None, 10]


def test_the_storage_options_of_the_readme_are_taken() -> None:
    (section,) = re.findall(r"```yaml\n(storage:.*?)```", README, re.DOTALL)
    data = {"base": "b", "models": ["m"], "method": "average", "output": "o", **yaml.safe_load(section)}
    assert parse(yaml.safe_dump(data)).storage["s3"]["profile"] == "merges"


def test_every_link_between_documents_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_method_of_the_extending_page_merges(tmp_path: Path) -> None:
    from tests.tools.families import make_family
    from ties_ray.stores import Stores

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
    (tmp_path / "plugins" / "methods").mkdir(parents=True)
    (tmp_path / "plugins" / "methods" / "unanimous.py").write_text(code)
    family = make_family(Stores({}).of(str(tmp_path)), str(tmp_path), num_models=2)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "base": family.base,
                "models": list(family.models),
                "method": "unanimous",
                "output": str(tmp_path / "out"),
                "run": {"executor": "local"},
            }
        )
    )
    command = [Path(sys.executable).with_name("ties-ray"), "merge", recipe]
    environment = {"TIES_RAY_PLUGINS": str(tmp_path / "plugins"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("page", ["design", "performance", "reliability", "extending", "follow-one-parameter"])
def test_the_documents_are_there(page: str) -> None:
    assert (ROOT / "docs" / f"{page}.md").stat().st_size > 1000
