"""The page of a sweep: heat maps of its grid, and names of strangers that stay text."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from tests.tools.families import Family
from ties_ray.cli import commands
from ties_ray.operations import sweeping
from ties_ray.recipe.settings import sweep_of
from ties_ray.reports.sweep import SettingResult, SweepResult
from ties_ray.reports.sweep_page import maps_of, page_of

MakeFamily = Callable[..., Family]


def setting(name: str, values: dict[str, Any], **figures: Any) -> SettingResult:
    return SettingResult(setting=name, values=values, output="/o", run_id="r", num_models=2, bytes_written=1, **figures)


def grid(**places: list[Any]) -> list[SettingResult]:
    rows = [{}]
    for place, values in places.items():
        rows = [{**row, place: value} for row in rows for value in values]
    return [setting(str(number), row, norm=float(number), conflict=0.5) for number, row in enumerate(rows)]


def test_two_axes_are_a_map_and_what_does_not_differ_has_none() -> None:
    rows = grid(density=[0.1, 0.2], **{"method.lambda": [0.3, 0.5, 1.0]})
    (heat_map,) = maps_of([*rows, setting("other", {"method": {"name": "average"}}, norm=9.0)])
    assert (heat_map.measure, heat_map.rows, heat_map.columns) == ("norm", "density", "method.lambda")
    assert (heat_map.row_values, heat_map.column_values) == (["0.1", "0.2"], ["0.3", "0.5", "1.0"])
    assert [[cell.value for cell in line if cell] for line in heat_map.cells] == [[0, 1, 2], [3, 4, 5]]
    assert [[cell.heat for cell in line if cell] for line in heat_map.cells] == [[0, 20, 40], [60, 80, 100]]


def test_one_axis_is_one_line_and_a_third_axis_makes_further_maps() -> None:
    (line,) = maps_of(grid(density=[0.1, 0.2], fixed=[1]))
    assert (line.rows, line.columns, len(line.cells)) == ("", "density", 1)
    maps = list(maps_of(grid(a=[1, 2], b=[1, 2], c=["x", "y"])))
    assert [each.rest for each in maps] == ["a = 1", "a = 2"]
    assert [each.columns for each in maps] == ["c", "c"]


def test_scores_have_maps_and_a_missing_one_is_empty() -> None:
    rows = [
        row.model_copy(update={"scores": {"loss": 2.0 - row.norm if row.norm else None}}) for row in grid(a=[1, 2, 3])
    ]
    maps = {each.measure: each for each in maps_of(rows)}
    assert [cell.value for cell in maps["loss"].cells[0] if cell] == [None, 1.0, 0.0]
    assert not list(maps_of([]))
    assert not list(maps_of([setting("only", {"models": {"not": ["1"]}})]))


def test_names_of_strangers_stay_text_and_nothing_is_asked_of_others() -> None:
    evil = '<script>alert(1)</script>"\u202e'
    rows = [
        setting(evil, {evil: value}, norm=float(number), warnings=[evil]) for number, value in enumerate((evil, "b"))
    ]
    page = page_of(SweepResult(output=f"/x/{evil}", rows=rows))
    assert "<script" not in page
    assert "\u202e" not in page
    assert not re.search(r'(src|href)="(https?:)?//', page)
    assert "default-src 'none'" in page


def test_the_command_writes_the_page_of_a_sweep(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=2)
    data = {
        "base": family.base,
        "models": list(family.models),
        "method": "ties",
        "output": {"path": f"{tmp_path}/swept/{{setting}}"},
        "grid": {"method.lambda": [0.3, 1.0], "method.density": [0.1, 0.5]},
        "run": {"executor": "local"},
    }
    sweeping.sweep(sweep_of(data))
    done = CliRunner().invoke(commands.commands, ["report", f"{tmp_path}/swept", "--to", f"{tmp_path}/page.html"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    assert "Sweep of 4 settings" in page
    assert page.count('<td style="--heat:') >= 4
    assert "lambda-0.3_density-0.1" in page
