import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from rich.console import Console

from tests.tools.families import CONFIG, write_checkpoint
from tests.tools.merging import carried_out, digests, draw_sizes, read_tensors
from ties_ray.cli.text import of_plan
from ties_ray.errors import InputError, RecipeError
from ties_ray.formats import Account, Aside, account
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import plan_record
from ties_ray.stores import Stores


def test_an_account_adds_up_what_becomes_of_every_value() -> None:
    fates = [("merged", 90), ("equal", 3), ("tied", 5), ("excluded", 1), ("merged", 10), ("excluded", 4), ("old", 2)]
    found = account(115, fates)
    assert found == Account(115, 100, 3, 5, (Aside("excluded", 2, 5), Aside("old", 1, 2)))
    assert found.adds_up
    assert not account(116, fates).adds_up
    assert str(found) == (
        "of 115 values 100 merged, 3 equal to the base's, 5 tied, 5 left aside in 2 tensors (excluded),"
        " 2 left aside in 1 tensor (old)"
    )


def test_where_nothing_is_odd_an_account_is_short() -> None:
    assert str(account(1000, [("merged", 1000)])) == "all 1,000 values merged"


@pytest.mark.parametrize("found", [Account(), account(7, [("merged", 4), ("excluded", 3)])])
def test_an_account_survives_json(found: Account) -> None:
    form = TypeAdapter(Account)
    assert form.validate_json(form.dump_json(found)) == found


def small(folder: Path, **models: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Write checkpoints of one base; return their folders by name."""
    store = Stores({}).of(str(folder))
    for name, tensors in models.items():
        rows = len(tensors["embed_tokens.weight"])
        write_checkpoint(store, str(folder / name), tensors, config={**CONFIG, "vocab_size": rows})
    return {name: str(folder / name) for name in models}


BASE = {
    "embed_tokens.weight": torch.arange(24.0).view(8, 3), "norm.weight": torch.ones(4), "ids": torch.arange(5),
    "mask": torch.tensor([True, False]),
}  # fmt: skip
MODEL = {**BASE, "norm.weight": torch.full((4,), 3.0), "mask": torch.tensor([True, True])}


def recipe(folder: Path, base: str, *models: str, **more: object) -> Recipe:
    run = {"executor": "local", "workers": 1}
    return validate(
        {"base": base, "models": [*models], "method": "average", "output": str(folder / "out"), "run": run, **more}
    )


def test_plan_result_and_card_tell_what_became_of_every_value(tmp_path: Path) -> None:
    at = small(tmp_path, base=BASE, plain={**BASE, "norm.weight": torch.zeros(4)}, odd=MODEL)
    given = recipe(tmp_path, at["base"], at["plain"], at["odd"], exclude=["mask", "embed*"])
    told = account(35, [("merged", 4), ("equal", 5), ("excluded by the recipe", 24), ("excluded by the recipe", 2)])
    assert str(told) == (
        "of 35 values 4 merged, 5 equal to the base's, 26 left aside in 2 tensors (excluded by the recipe)"
    )
    made = merging.plan(given)
    assert [model.account for model in plan_record(made).models] == [told, told]
    console = Console(width=1000)
    with console.capture() as captured:
        console.print(*of_plan(plan_record(made)))
    assert str(told) in captured.get()
    result = merging.merge(given)
    assert result.provenance
    assert [model.account for model in result.provenance.models] == [told, told]
    assert result.provenance.base.account == account(35, [("merged", 4), ("equal", 31)])
    assert str(told) in (tmp_path / "out" / "README.md").read_text()


def test_a_model_of_which_nothing_is_merged_is_refused(tmp_path: Path) -> None:
    at = small(tmp_path, base=BASE, odd=MODEL, other=MODEL)
    with pytest.raises(
        InputError, match=r"odd: nothing of it would be merged \(of 35 values 0 merged, .*35 left aside"
    ):
        merging.plan(recipe(tmp_path, at["base"], at["odd"], exclude=["*"]))


def test_a_table_that_differs_is_refused_and_the_remedy_keeps_the_bases(tmp_path: Path) -> None:
    at = small(tmp_path, base=BASE, odd=MODEL)
    with pytest.raises(
        InputError, match=r"differ from the base's: mask; they can't be merged; `exclude: \[\"mask\"\]`"
    ):
        merging.plan(recipe(tmp_path, at["base"], at["odd"]))
    merging.merge(recipe(tmp_path, at["base"], at["odd"], exclude=["mask"]))
    got = read_tensors(tmp_path / "out")
    assert torch.equal(got["mask"], BASE["mask"])
    assert torch.equal(got["norm.weight"], MODEL["norm.weight"])


@pytest.mark.parametrize("method", ["average", {"name": "ties", "density": 0.5}])
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_a_model_lacks_keep_the_bases_and_the_plan_still_tells_all_reads(
    tmp_path: Path, method: object, seed: int
) -> None:
    sizes = draw_sizes(random.Random(seed))
    generator = torch.Generator().manual_seed(seed)
    base = {**BASE, "embed_tokens.weight": torch.randn(900, 7, generator=generator)}
    step = torch.randn(900, 7, generator=generator)
    step[700:] = 0
    whole = base["embed_tokens.weight"] + step
    other = {**base, "embed_tokens.weight": base["embed_tokens.weight"] + torch.randn(900, 7, generator=generator)}
    at = small(
        tmp_path, base=base, other=other, whole={**base, "embed_tokens.weight": whole},
        short={**base, "embed_tokens.weight": whole[:700]},
    )  # fmt: skip
    with pytest.raises(InputError, match="fewer embedding rows than the base"):
        merging.plan(recipe(tmp_path, at["base"], at["short"]))
    found = {}
    for name in ("whole", "short"):
        allow = {"missing": "zero"}
        output = str(tmp_path / f"out-{name}")
        given = recipe(tmp_path, at["base"], at[name], at["other"], method=method, allow=allow, output=output)
        result = merging.merge(given, sizes=sizes)
        assert result.requests == sum(one.requests for one in carried_out(result).merges[0].rounds)
        assert result.bytes_read == carried_out(result).bytes_read
        found[name] = digests(output)
    assert found["whole"] == found["short"]


def test_files_of_a_model_with_other_rows_are_refused_and_the_bases_load(tmp_path: Path) -> None:
    longer = {**BASE, "embed_tokens.weight": torch.arange(30.0).view(10, 3)}
    at = small(tmp_path, base=BASE, long=longer)
    allow = {"extra_rows": "drop"}
    output = {"path": str(tmp_path / "out"), "files_from": at["long"]}
    with pytest.raises(
        RecipeError, match=r"says vocab_size 10, and the output has the base's 8 rows; write `files_from"
    ):
        merging.plan(recipe(tmp_path, at["base"], at["long"], allow=allow, output=output))
    merging.merge(recipe(tmp_path, at["base"], at["long"], allow=allow, output={**output, "files_from": "base"}))
    assert len(read_tensors(tmp_path / "out")["embed_tokens.weight"]) == 8


def test_an_output_does_not_announce_quantised_weights_that_there_are_not(tmp_path: Path) -> None:
    store = Stores({}).of(str(tmp_path))
    told = {"quantization_config": {"quant_method": "awq"}}
    config = {**CONFIG, "vocab_size": 8, **told, "quantization": {"bits": 4}, "text_config": {"a": 1, **told}}
    for name in ("base", "model"):
        write_checkpoint(store, str(tmp_path / name), BASE, config=config)
    result = merging.merge(recipe(tmp_path, str(tmp_path / "base"), str(tmp_path / "model")))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        **CONFIG,
        "vocab_size": 8,
        "text_config": {"a": 1},
    }
    keys = "quantization_config, quantization, text_config.quantization_config"
    assert result.notes[0] == f"models base, model: {keys} in config.json is left over: no weight is quantised"
