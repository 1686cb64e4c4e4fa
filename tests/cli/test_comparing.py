import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tests.tools.adapters import make_pool
from tests.tools.families import make_family, write_checkpoint
from tests.tools.merging import merge
from ties_ray.cli import commands
from ties_ray.cli.comparing import of_comparison, short
from ties_ray.cli.screen import show
from ties_ray.operations.compare import compare
from ties_ray.stores import Stores

STORES = Stores({})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Return two checkpoints of 30 layers with long names, which differ in 25 of them, and one more tensor in B."""
    generator = torch.Generator().manual_seed(0)
    a = {f"model.layers.{n}.a_block_of_a_long_name.weight": torch.randn(64, generator=generator) for n in range(30)}
    b = {name: tensor + (number < 25) * 1e-3 * number for number, (name, tensor) in enumerate(a.items())}
    for name, tensors in (("a", a), ("b", b | {"new": torch.zeros(1)})):
        write_checkpoint(STORES.of("/"), str(tmp_path / name), tensors)
    return str(tmp_path / "a"), str(tmp_path / "b")


def run(*words: str) -> Result:
    return CliRunner().invoke(commands.commands, ["compare", *words])


def test_the_tables_fit_80_columns(pair: tuple[str, str]) -> None:
    file = io.StringIO()
    show(*list(of_comparison(compare(STORES, *pair), "relative", every=True))[1:], file=file)
    assert max(map(len, file.getvalue().splitlines())) <= 80


def test_the_largest_differences_come_first_and_the_rest_is_counted(pair: tuple[str, str]) -> None:
    result = run(*pair)
    assert result.exit_code == 0
    assert result.output.index("layers.24.") < result.output.index("layers.7.")
    assert "layers.3." not in result.output
    assert "and 4 more tensors differ" in result.output
    assert "6 of 30 tensors have equal values" in result.output
    assert "only in B (1): new" in result.output
    assert "layers.3." in run(*pair, "--all").output


def test_the_record_for_machines_is_the_comparison(pair: tuple[str, str]) -> None:
    printed = json.loads(run(*pair, "--json", "--quiet").output)
    assert printed["only_in_b"] == ["new"]
    assert len(printed["tensors"]) == 30


@pytest.mark.parametrize(("tolerance", "code"), [(None, 0), ("0", 3), ("0.5", 3)])
def test_a_tolerance_makes_differences_an_error(pair: tuple[str, str], tolerance: str | None, code: int) -> None:
    result = run(*pair, *(["--tolerance", tolerance] if tolerance else []))
    assert result.exit_code == code
    assert ("new: only B has it [difference]" in result.stderr) == (code == 3)
    assert ("above the tolerance" in result.stderr) == (tolerance == "0")


def test_equal_models_are_within_a_tolerance_of_0(pair: tuple[str, str]) -> None:
    result = run(pair[0], pair[0], "--tolerance", "0")
    assert (result.exit_code, "same bytes" in result.output) == (0, True)


def test_inspect_compares_the_models_of_a_glob_in_one_page_of_80_columns(tmp_path: Path) -> None:
    make_pool(STORES.of("/"), str(tmp_path), num_adapters=30, hidden=8, layers=1, dense=False)
    shutil.copytree(tmp_path / "adapter-0004", tmp_path / "adapter-9999")
    words = ["inspect", str(tmp_path / "adapter-*"), "--compare"]
    result = CliRunner().invoke(commands.commands, words)
    assert result.exit_code == 0
    assert "duplicate  adapter-0004 = adapter-9999" in result.stdout
    assert len(result.stdout.splitlines()) < 40
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80
    record = json.loads(CliRunner().invoke(commands.commands, [*words, "--json", "--quiet"]).stdout)
    assert len(record["comparison"]["cosines"]) == 31


def test_report_writes_a_page_or_prints_the_record(tmp_path: Path) -> None:
    family = make_family(STORES.of("/"), str(tmp_path), num_models=2)
    merge(family, tmp_path / "out", "average")
    page = tmp_path / "page.html"
    result = CliRunner().invoke(commands.commands, ["report", str(tmp_path / "out"), "--to", str(page)])
    assert result.exit_code == 0
    assert f"wrote {page}" in result.stdout
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    page.unlink()
    words = ["report", str(tmp_path / "out"), "--compare", "--json", "--quiet", "--to", str(page)]
    record = json.loads(CliRunner().invoke(commands.commands, words).stdout)
    assert [model["name"] for model in record["models"]] == ["model-0", "model-1"]
    assert len(record["comparison"]["cosines"]) == 2
    assert not page.exists()


def test_report_of_a_folder_without_a_merge_exits_with_3(tmp_path: Path) -> None:
    result = CliRunner().invoke(commands.commands, ["report", str(tmp_path)])
    assert result.exit_code == 3
    assert "no finished merge" in result.stderr


def test_a_long_name_keeps_both_ends() -> None:
    assert short("model.layers.0.self_attn.q_proj.weight", 20) == "model.lay…oj.weight"
    assert short("short") == "short"
