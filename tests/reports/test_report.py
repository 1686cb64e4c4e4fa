import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import ties_ray
from tests.tools import browser
from tests.tools.adapters import make_pool, write_adapter
from tests.tools.families import make_family
from tests.tools.merging import merge
from ties_ray.errors import InputError
from ties_ray.operations.report import NEEDED
from ties_ray.reports.report import MergeReport, layer_of, module_of
from ties_ray.stores import Stores

STORE = Stores({}).of("/")
TIES = {"name": "ties", "density": 0.3}
HOSTILE = (
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "$\\frac{1}{0}$", "</svg><h1>no", "&lt;b&gt;",
    "{{ 7 * 7 }}", "ж漢🙂",
)  # fmt: skip


class Parsed(HTMLParser):
    """What a browser would make of a page: its tags, attributes and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def planted(folder: Path, num_models: int = 200) -> Path:
    """Merge a pool with a duplicate, an outlier and a conflict in it; return the output."""
    generator = torch.Generator().manual_seed(0)
    paths = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    models = []
    for _ in range(num_models):
        a, b = torch.randn(4, 48, generator=generator), torch.randn(48, 4, generator=generator)
        models.append({path: (a, b, 4.0) for path in paths})
    models[17] = models[3]
    models[60] = {path: (a, 20 * b, alpha) for path, (a, b, alpha) in models[60].items()}
    models[90] = {path: (a, -b, alpha) for path, (a, b, alpha) in models[5].items()}
    for number, each in enumerate(models):
        write_adapter(STORE, str(folder / f"team-{number:03}"), each)
    output = {"path": str(folder / "out"), "kind": "adapter", "rank": 8}
    recipe = {"models": [str(folder / "team-*")], "method": TIES, "output": output, "run": {"executor": "local"}}
    ties_ray.merge(recipe)
    return folder / "out"


def test_a_report_needs_no_weights_and_has_what_the_merge_gathered(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=3)
    result = merge(family, tmp_path / "out", TIES)
    for file in result.files:
        (tmp_path / "out" / file.name).unlink()
    report = ties_ray.report(tmp_path / "out")
    assert report.title == "ties of 3 models"
    assert [model.name for model in report.models] == ["model-0", "model-1", "model-2"]
    assert report.result == result
    effects = result.effects
    assert effects
    assert [model.effects for model in report.models] == effects.models
    assert sum(place.elements for place in report.modules) == effects.elements
    assert {place.name for place in report.layers} == {"0", "1"}
    assert report.comparison is None


def test_the_record_is_the_same_after_json(tmp_path: Path) -> None:
    pool = make_pool(STORE, str(tmp_path), num_adapters=4)
    output = {"path": str(tmp_path / "out"), "kind": "delta"}
    ties_ray.merge({"models": list(pool.adapters), "method": TIES, "output": output, "run": {"executor": "local"}})
    report = ties_ray.report(tmp_path / "out", compare=True)
    assert report.comparison
    assert sorted(name for cluster in report.clusters for name in cluster) == [model.name for model in report.models]
    assert MergeReport.model_validate(json.loads(report.model_dump_json())) == report


def test_the_first_screen_of_a_pool_names_what_was_planted(tmp_path: Path) -> None:
    report = ties_ray.report(planted(tmp_path), compare=True)
    page = report.html()
    first = Parsed(page[: page.index('id="figures"')]).text
    assert "team-003 = team-017: the same change" in first
    assert "team-005 against team-090" in first
    assert "team-060: its norm is" in first
    assert len(page) < 5e6


def test_without_a_comparison_the_merge_still_knows_outliers_and_models_alike(tmp_path: Path) -> None:
    told = {remark.kind: remark.models for remark in ties_ray.report(planted(tmp_path, 100)).remarks}
    assert told["outlier"] == ["team-060"]
    assert told["alike"] == ["team-003", "team-017"]


def test_a_page_asks_no_other_host_and_holds_no_script(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=3)
    merge(family, tmp_path / "out", TIES)
    page = ties_ray.report(tmp_path / "out", compare=True).html()
    parsed = Parsed(page)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert not [value for name, value in parsed.attributes if name in ("src", "href") and not value.startswith("#")]
    images = [value for name, value in parsed.attributes if name == "xlink:href"]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in images)
    assert "default-src 'none'" in page
    assert not re.search(r"url\((?!#)|@import", page)


def test_tables_and_figures_are_named_for_a_screen_reader(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=3)
    merge(family, tmp_path / "out", TIES)
    page = ties_ray.report(tmp_path / "out", compare=True).html()
    parsed = Parsed(page)
    assert page.count("<table>") == page.count("<caption>") == page.count("<thead>")
    assert parsed.tags.count("figure") == parsed.tags.count("figcaption") >= 3
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    labels = [value.split() for name, value in parsed.attributes if name == "aria-labelledby"]
    assert labels
    assert all(set(words) <= set(ids) for words in labels)
    assert '<html lang="en">' in page


@pytest.mark.parametrize("num_models", [7, 50])
def test_names_of_strangers_stay_text(num_models: int, tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=num_models, layers=1, hidden=8)
    names = [HOSTILE[number % len(HOSTILE)] + str(number // len(HOSTILE) or "") for number in range(num_models)]
    entries = [{"path": path, "id": name} for path, name in zip(family.models, names, strict=True)]
    recipe = {"base": family.base, "models": entries, "method": TIES, "output": str(tmp_path / "<b>out")}
    ties_ray.merge(recipe | {"run": {"executor": "local"}})
    page = ties_ray.report(tmp_path / "<b>out", compare=True).html()
    parsed = Parsed(page)
    assert not {"script", "img"} & set(parsed.tags)
    assert parsed.tags.count("h1") == 1
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert not [name for name in names if name not in parsed.text]


def test_invisible_characters_of_a_name_are_shown(tmp_path: Path) -> None:
    family = make_family(STORE, str(tmp_path), num_models=2)
    merge(family, tmp_path / "out", TIES)
    report = ties_ray.report(tmp_path / "out")
    model = report.models[0].model_copy(update={"name": "a\u202eb\x1b[31m"})
    page = report.model_copy(update={"models": [model, report.models[1]]}).html()
    assert "a\\u202eb\\x1b[31m" in page
    assert not {"\u202e", "\x1b"} & set(page)


def test_a_finished_merge_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished merge"):
        ties_ray.report(tmp_path)


def test_without_the_extra_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ties_ray.operations.report.NEEDED", (*NEEDED, "a_package_that_nobody_has"))
    with pytest.raises(InputError, match=r"needs a_package_that_nobody_has; pip install 'ties-ray\[report\]'"):
        ties_ray.report(tmp_path)


def test_layers_and_modules_are_read_from_names() -> None:
    name = "model.layers.12.self_attn.q_proj.weight"
    assert (layer_of(name), module_of(name)) == ("12", "self_attn.q_proj")
    assert (layer_of("lm_head.weight"), module_of("lm_head.weight")) == ("", "lm_head")
    assert (layer_of("h.3.attn.bias"), module_of("h.3.attn.bias")) == ("3", "attn.bias")


@pytest.mark.skipif(bool(browser.WHY_NOT), reason=browser.WHY_NOT)
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_as_it_is_meant(dark: bool, tmp_path: Path) -> None:
    output = planted(tmp_path, 100)
    page = tmp_path / "report.html"
    page.write_text(ties_ray.report(output, compare=True).html(), encoding="utf-8")
    told = browser.look(page, tmp_path / "picture.png", dark=dark)
    assert [request for request in told["requests"] if not request.startswith("data:")] == [page.as_uri()]
    assert (told["messages"], told["scripts"], told["handlers"]) == ([], 0, 0)
    assert (told["unnamed"], told["headless"], told["twice"]) == (0, 0, 0)
    assert told["width"] <= told["window"]
    assert (told["paper"] == "rgb(20, 23, 28)") == dark
    assert any("team-003 = team-017" in text for text in told["first"])
    assert any("team-005 against" in text for text in told["first"])
    assert any("team-060" in text for text in told["first"])
    assert (tmp_path / "picture.png").stat().st_size > 10_000
