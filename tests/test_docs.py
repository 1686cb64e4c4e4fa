"""What the documents say of the code is so, and they can be read."""

import ast
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from docs import generate
from tests.tools.pages import PAGES, ROOT, blocks, num_words, sentences
from tests.tools.words import faults_of
from ties_ray import plugins
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Allow, ModelEntry, Recipe, Run
from ties_ray.recipe.search import search_of
from ties_ray.recipe.settings import is_sweep, sweep_of
from ties_ray.recipe.space import SearchedModel, Space

LONGEST, MEDIAN = 25, 17
"""Words of a sentence."""


def test_the_recipe_of_the_readme_is_a_recipe() -> None:
    (recipe,) = [block.code for block in blocks(ROOT / "README.md") if block.code.startswith("# recipe.yaml")]
    parsed = validate(plain(recipe))
    assert parsed.method.name == "ties"
    assert [entry.at_least for entry in parsed.models] == [None, None, 10]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_block_is_run_by_a_test_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("bash", "python", "yaml", "text", "csv", "json"), f"{block}: what language is it?"
        if block.language == "python":
            ast.parse(block.code)
        elif block.language == "yaml" and not block.why_not:
            data = whole(plain(block.code))
            if is_sweep(data):
                sweep = sweep_of(data)
                for setting in sweep.named():
                    sweep.recipe(setting)
                    sweep.choice(setting)
            elif "search" in data:
                asked = search_of(data)
                names = [SearchedModel(entry.path or "", entry.path or "") for entry in asked.recipe().models]
                Space(asked.search, asked.recipe(), asked.common, names)
            else:
                validate(data)


def plain(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def whole(part: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe that holds a part of one."""
    return {"base": "b", "models": ["m"], "method": "average", "output": "o"} | part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_between_documents_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_test_that_a_page_names_is_there() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"\btests/[\w/]+(?:\.py)?", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in sources, f"{page.name}: {name}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs/extending").glob("*.md")), ids=lambda page: page.name)
def test_a_file_of_an_extending_page_has_the_name_that_recipes_use(page: Path) -> None:
    """`tests/test_plugins.py` drops these files into folders and merges with them."""
    for folder, name in re.findall(r"<!-- generated: file tests/plugins/(\w+)/(\w+)\.py -->", page.read_text()):
        source = (ROOT / f"tests/plugins/{folder}/{name}.py").read_text()
        assert f"`my_plugins/{folder}/{name}.py`" in page.read_text()
        assert folder == "rounds" or re.search(rf'(name|kind)\b.*= "{name}"', source)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_is_long(page: Path) -> None:
    assert not [sentence for sentence in sentences(page) if num_words(sentence) > LONGEST]


def test_most_sentences_are_short() -> None:
    assert statistics.median(num_words(sentence) for page in PAGES for sentence in sentences(page)) <= MEDIAN


@pytest.mark.parametrize("place", ["docs", *(f"pipelines/{part}/*" for part in ("core", "airflow", "dagster", "kfp"))])
def test_the_code_beside_the_package_keeps_the_rules_of_words(place: str) -> None:
    assert not [str(fault) for path in sorted(ROOT.glob(f"{place}/*.py")) for fault in faults_of(path)]


def test_the_site_fills_in_what_the_code_says(tmp_path: Path) -> None:
    generate.write_site(tmp_path / "site")
    recipe = (tmp_path / "site/reference/recipe.md").read_text()
    for prefix, section in (("", Recipe), ("models[].", ModelEntry), ("run.", Run), ("allow.", Allow)):
        for name, field in section.model_fields.items():
            assert f"| `{prefix}{field.alias or name}` |" in recipe
    methods = (tmp_path / "site/reference/methods.md").read_text()
    assert all(f"## {name}\n" in methods for name in plugins.names("methods"))
    commands = (tmp_path / "site/reference/command-line.md").read_text()
    assert "Usage: ties-ray deploy kuberay" in commands
    assert "| 5 | `UnavailableError`" in (tmp_path / "site/reference/exit-codes.md").read_text()
    for page in (tmp_path / "site").rglob("*.md"):
        assert "<!-- generated" not in page.read_text(), page
    assert not list((tmp_path / "site").rglob("*.py"))


def test_a_link_out_of_the_documents_becomes_plain_text(tmp_path: Path) -> None:
    generate.write_site(tmp_path / "site")
    assert "`deploy/iam-policy.json`" in (tmp_path / "site/guide/buckets.md").read_text()
    assert "](guide/first-merge.md)" in (tmp_path / "site/index.md").read_text()
