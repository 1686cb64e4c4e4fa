"""What a reader sees of a card, by another's Markdown and YAML parsers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from ruamel.yaml import YAML

from tests.tools.families import write_checkpoint
from ties_ray.errors import printable
from ties_ray.operations import merging
from ties_ray.planning.plan import Plan
from ties_ray.recipe import parse
from ties_ray.reports.model_card import card, code, plain_yaml, prose
from ties_ray.reports.records import MergeResult, TrimReport
from ties_ray.stores import Stores

TENSORS = {"w": torch.ones(2, 2), "v": torch.zeros(3)}
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
PLAIN = {"text", "code_inline", "softbreak"}

MARKS = st.sampled_from("`|*_[]()<>&!#~$\\-+=.:0 \t\n\r\x1b\u2028\u202e")
ATTACKS = [
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](http://h/t.png)", "<img src=x onerror=y>",
    "a | b | c", "`code` ``more``", "\n# Heading", "\n\n---\nlicense: mit\n---", "<!-- ", "&lt;b&gt;",
    "__bold__ *it* ~~no~~", "<http://h>", "[x]: http://h", "1. x", "- x", "> x", "```\nx\n```", "    x", "\\", "`", "|",
    "a\\|b", "<details>", "q_proj.weight", "[^1]",
]  # fmt: skip
NASTY = st.text(st.characters() | MARKS, max_size=40) | st.sampled_from(ATTACKS)
BLOCKS = {"html_block", "heading_open", "fence", "code_block", "hr"}


def seen(tokens: list[Token]) -> str:
    return "".join(token.content if token.type != "softbreak" else " " for token in tokens)


def squeezed(text: str) -> str:
    return " ".join(printable(text).split())


@settings(max_examples=600, deadline=None)
@given(NASTY)
@example("__metadata__")
def test_prose_shows_just_the_text_wherever_it_stands(text: str) -> None:
    for written in (f"* {prose(text)}\n", f"a {prose(text)} b\n", f"| a | b |\n|---|---|\n| {prose(text)} | x |\n"):
        tokens = MARKDOWN.parse(written)
        leaves = [leaf for token in tokens for leaf in token.children or ()]
        assert {leaf.type for leaf in leaves} <= PLAIN - {"code_inline"}, written
        assert not {token.type for token in tokens} & {"html_block", "heading_open", "fence", "code_block", "hr"}, (
            written
        )
        assert squeezed(text) in seen(leaves)
        assert sum(token.type == "td_open" for token in tokens) in (0, 2)


@settings(max_examples=600, deadline=None)
@given(NASTY.filter(lambda text: printable(text).strip()))
def test_code_shows_just_the_text_in_a_cell(text: str) -> None:
    tokens = MARKDOWN.parse(f"| a | b |\n|---|---|\n| {code(text)} | x |\n")
    leaves = [leaf for token in tokens for leaf in token.children or ()]
    assert sum(token.type == "td_open" for token in tokens) == 2
    spans = [leaf.content for leaf in leaves if leaf.type == "code_inline"]
    assert len(spans) == 1
    assert spans[0].strip() == printable(text).strip()


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(NASTY, st.lists(NASTY, max_size=3), max_size=3))
@example({"a": ["s3://b/?", "s3://b/?"]})
@example({"NO": ["off"], "y": []})
@example({"a": ["x", "s3://b/000000\x1f\x1f\x1f\x1f0 0", "s3://b/000000\x1f\x1f\x1f\x1f0 0"]})
def test_readers_of_both_yamls_read_what_was_written(value: dict[str, list[str]]) -> None:
    assert yaml.safe_load(plain_yaml(value)) == value
    assert YAML(typ="safe", pure=True).load(plain_yaml(value)) == value


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("card")
    store = Stores({}).of(str(folder))
    for name in ("base", "a", "b"):
        write_checkpoint(store, f"{folder}/{name}", TENSORS)
    asked = {
        "base": f"{folder}/base",
        "models": [f"{folder}/a", f"{folder}/b"],
        "method": "ties",
        "output": f"{folder}/out",
    }
    return merging.plan(parse.validate(asked))


@settings(max_examples=150, deadline=None)
@given(NASTY, NASTY, NASTY, NASTY)
@example("\x85", "\x85", "\x85", "\x85")
@example("\u2028", "a\u2028b", "\ufeff", "\x7f")
def test_names_licences_and_notes_are_data_in_a_whole_card(
    plan: Plan, name: str, licence: str, note: str, pattern: str
) -> None:
    inputs = [replace(model, id=name, licence=licence, uri=f"s3://b/{name}") for model in plan.catalog.models]
    base = replace(plan.catalog.base, licence=licence)
    catalog = replace(plan.catalog, models=tuple(inputs), base=base)
    asked = plan.recipe.model_copy(update={"exclude": (pattern,)})
    trims = [TrimReport(model=name, parameter=None, threshold=0.5, kept=1, tied=0, size=2)]
    text = card(replace(plan, catalog=catalog, recipe=asked), MergeResult(status="done", trims=trims, warnings=[note]))
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields.keys() == {"library_name", "tags"} | ({"license"} if licence else set())
    assert fields.get("license", "") == licence
    tokens = MARKDOWN.parse(body)
    leaves = {leaf.type for token in tokens for leaf in token.children or ()}
    assert leaves <= PLAIN
    assert sum(token.type == "tr_open" for token in tokens) == 1 + 3 + 1 + 1
    assert [token.type for token in tokens].count("heading_open") == 4
    (fenced,) = [token for token in tokens if token.type == "fence"]
    assert yaml.safe_load(fenced.content)["exclude"] == [pattern]


def front_of(plan: Plan) -> dict[str, object]:
    fields: dict[str, object] = yaml.safe_load(card(plan, MergeResult(status="done")).split("---\n", 2)[1])
    return fields


def test_base_model_names_models_of_the_hub_and_no_others(plan: Plan) -> None:
    assert "base_model" not in front_of(plan)
    first, second = plan.catalog.models
    base = replace(plan.catalog.base, uri="hf://org/base@0123")
    catalog = replace(plan.catalog, base=base, models=(replace(first, uri="hf://org/math@4567"), second))
    fields = front_of(replace(plan, catalog=catalog))
    assert fields["base_model"] == ["org/base", "org/math"]
    assert fields["base_model_relation"] == "merge"
    model_card_data = pytest.importorskip("huggingface_hub").ModelCardData(**fields)
    assert model_card_data.base_model == ["org/base", "org/math"]


def test_a_card_has_names_and_no_path_of_the_machine(plan: Plan) -> None:
    folder = plan.output.rpartition("/")[0]
    catalog = replace(plan.catalog, notes=(f"{folder}/a: its config differs from {folder}/base", "see /etc/x/y.json"))
    text = card(replace(plan, catalog=catalog), MergeResult(status="done", warnings=[f"{folder}/b/model.safetensors"]))
    assert folder not in text
    assert "/etc/" not in text
    assert "| a | 1 |" in text
    assert "* a: its config differs from base" in text
    assert "* b/model.safetensors" in text


def test_a_card_is_the_same_from_run_to_run(tmp_path: Path, plan: Plan) -> None:
    """Notes on a run, such as on files that --fresh removed, stand in the result record only."""
    cards = []
    for number in (1, 2):
        asked = {
            "base": plan.catalog.base.uri, "models": [model.uri for model in plan.catalog.models], "method": "ties",
            "output": f"{tmp_path}/{number}", "run": {"executor": "local", "workers": number},
        }  # fmt: skip
        if number == 2:
            (tmp_path / "2").mkdir()
            (tmp_path / "2" / "pytorch_model.bin").write_bytes(b"old")
        result = merging.merge(parse.validate(asked), fresh=True)
        cards.append((tmp_path / str(number) / "README.md").read_text())
    assert any("--fresh has removed" in note for note in result.notes)
    assert cards[0] == cards[1]
