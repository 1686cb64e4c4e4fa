"""Weights, densities and lambda that differ by parameter: each parameter is merged with its own numbers."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.tools.adapters import make_pool
from tests.tools.families import Family, Tensors
from tests.tools.merging import LOCAL, carried_out, digests, merge, read_tensors, recipe_of, same_bits
from ties_ray.cli.text import of_plan
from ties_ray.errors import InputError, RecipeError
from ties_ray.layers import depths
from ties_ray.operations import merging
from ties_ray.recipe.parse import parse, validate
from ties_ray.reports.records import plan_record
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]
WEIGHTS = [{"*.self_attn.*": 0.5, "*.mlp.*": 2.0}, [0.0, 1.0], 1.5]
DENSITIES = [{"*q_proj*": 0.9}, None, [0.1, 0.5, 0.3]]


def numbers(name: str, depth: float) -> tuple[list[float], list[float | None], float]:
    """Return the weights, densities and lambda that the recipes of these tests give to a parameter."""
    first = 0.5 if ".self_attn." in name else 2.0 if ".mlp." in name else 1.0
    third = 0.1 + 0.8 * depth if depth <= 0.5 else 0.5 - 0.4 * (depth - 0.5)
    return [first, depth, 1.5], [0.9 if "q_proj" in name else None, None, third], 0.25 if "norm" in name else 1.0


@pytest.mark.parametrize(
    "method",
    [
        {"name": "ties", "trim": "tensor", "density": 0.4},
        {"name": "ties", "trim": "tensor", "density": 0.4, "merge": "sum", "zero_sum": "positive"},
        {"name": "dare", "density": 0.6},
        {"name": "breadcrumbs", "density": 0.6},
        {"name": "della", "density": 0.6, "epsilon": 0.05},
    ],
    ids=lambda method: "-".join(map(str, method.values())),
)
def test_each_parameter_has_the_bits_of_a_merge_with_its_own_numbers(
    method: dict[str, object], family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=3, mixed=True, layers=3)
    given = {**method, "lambda": {"*norm*": 0.25}}
    merge(family, tmp_path / "out", given, weights=WEIGHTS, densities=DENSITIES)
    written = read_tensors(tmp_path / "out")
    layered, alone = depths(family.base_tensors), dict[str, dict[str, torch.Tensor]]()
    for name in family.base_tensors:
        weights, densities, scale = numbers(name, layered.get(name, 0.0))
        key = str((weights, densities, scale))
        if key not in alone:
            folder = tmp_path / str(len(alone))
            merge(family, folder, {**method, "lambda": scale}, weights=weights, densities=densities)
            alone[key] = read_tensors(folder)
        assert same_bits(written[name], alone[key][name]), name
    assert len(alone) > 4


def test_gradients_and_tables_are_the_sums_that_they_say(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3, dtype="F32", layers=3, smooth=True)
    method = {"name": "task_arithmetic", "lambda": {"*.layers.*": [0.2, 0.8], "*": 0.5}}
    merge(family, tmp_path / "out", method, weights=WEIGHTS)
    written, layered = read_tensors(tmp_path / "out"), depths(family.base_tensors)
    for name, base in family.base_tensors.items():
        if not base.is_floating_point():
            continue
        scale = 0.2 + 0.6 * layered[name] if name in layered else 0.5
        weights, _, _ = numbers(name, layered.get(name, 0.0))
        deltas = [tensors.get(name, base).double() - base.double() for tensors in family.model_tensors]
        wanted = base.double() + scale * sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
        np.testing.assert_allclose(written[name].double(), wanted, rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_file_of_coefficients_comes_first(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3, layers=2)
    table = tmp_path / "numbers.csv"
    rows = ["model,pattern,weight,density,lambda", "1,*.mlp.*,0.25,,", ",*norm*,0.5,0.9,", ",*,,,0.3", "b,*,2,,"]
    table.write_text("\n".join(rows))
    method = {"name": "ties", "trim": "tensor", "density": 0.4}
    recipe = recipe_of(
        family, tmp_path / "out", method, weights=[1.0, 4.0, 1.0], coefficients={"file": str(table)}
    ).model_dump(mode="json", by_alias=True)
    recipe["models"][2]["id"] = "b"
    merging.merge(validate(recipe))
    tables = [{"*norm*": 0.5}, {"*.mlp.*": 0.25, "*norm*": 0.5, "*": 4.0}, {"*norm*": 0.5, "*": 2.0}]
    recipe["coefficients"] = {}
    recipe["output"]["path"] = str(tmp_path / "same")
    recipe["method"] = {**method, "lambda": {"*": 0.3}, "density": {"*norm*": 0.9, "*": 0.4}}
    for entry, table in zip(recipe["models"], tables, strict=True):
        entry["weight"] = table
    merging.merge(validate(recipe))
    assert digests(tmp_path / "out") == digests(tmp_path / "same")


def test_what_has_weight_0_is_neither_read_nor_counted_as_merged(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=2, layers=2)
    result = merge(family, tmp_path / "out", "average", weights=[{"*.layers.*": 0.0}, 1.0])
    plan = carried_out(result)
    first = plan.catalog.models[0]
    assert not any(".layers." in name for name in first.sources)
    assert first.account.adds_up
    assert "weight 0 in the recipe" in str(first.account)
    merge(family, tmp_path / "one", "average", weights=[0.0, 1.0])
    written, alone = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "one")
    assert all(same_bits(written[name], alone[name]) for name in written if ".layers." in name)


def test_adapters_have_weights_by_parameter_as_adapter_and_as_checkpoint(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of(str(tmp_path)), str(tmp_path / "pool"), num_adapters=3)
    recipe = {
        "base": pool.base,
        "models": [
            {"path": uri, "weight": {"*q_proj*": 0.0, "*": float(n + 1)}} for n, uri in enumerate(pool.adapters)
        ],
        "method": "average",
        "run": LOCAL,
    }
    for kind in ("checkpoint", "adapter"):
        merging.merge(validate({**recipe, "output": {"path": str(tmp_path / kind), "kind": kind}}))
    written = read_tensors(tmp_path / "checkpoint")
    touched = {name for deltas in pool.deltas for name in deltas}
    assert any("q_proj" in name for name in touched)
    for name, base in pool.base_tensors.items():
        changes = [(n + 1) * deltas[name] for n, deltas in enumerate(pool.deltas) if name in deltas]
        wanted = base.double() if "q_proj" in name or not changes else base.double() + sum(changes) / 6
        np.testing.assert_allclose(written[name].double(), wanted, rtol=1e-6, atol=1e-6, err_msg=name)
    assert not any("q_proj" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"name": "ties", "density": {"*norm*": 0.5}}}, "trim: tensor"),
        ({"method": {"name": "lines", "lambda": [0, 1]}}, "has no lambda"),
        ({"method": {"name": "task_arithmetic", "density": [0.1, 1]}}, "has no density"),
        ({"method": {"name": "task_arithmetic", "lambda": {"*nrom*": 0.5}}}, "no merged parameter is called '.nrom.'"),
        ({"method": {"name": "task_arithmetic", "lambda": {"*embed*": [0, 1]}}}, "has a gradient over layers"),
        ({"method": {"name": "ties", "trim": "tensor", "density": {"*": 1.5}}}, "less than or equal to 1, not 1.5"),
        ({"method": {"name": "task_arithmetic", "lambda": []}}, "at least 1 item"),
        ({"method": {"name": "task_arithmetic", "lambda": {"*": "much"}}}, "coefficients.lambda.*: .*number"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    change: dict[str, object], message: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=2)
    with pytest.raises(RecipeError, match=message):
        merge(family, tmp_path / "out", change["method"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("model,pattern,weight\n7,*,1\n", "names a model that the recipe does not: '7'"),
        ("model,pattern,weight\n,,1\n", ":2: has no pattern"),
        ("pattern,weight\n*,nan\n", ":2: the weight 'nan' is no finite number"),
        ("pattern,density\n*,2\n", ":2: the density 2 is no share"),
        ("model,pattern,lambda\n0,*,2\n", ":2: gives a lambda to one model"),
        ("pattern,value\n*,2\n", "columns: model, pattern, weight, density, lambda"),
    ],
)
def test_a_wrong_file_of_coefficients_is_refused_with_its_line(
    rows: str, message: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=2)
    (tmp_path / "numbers.csv").write_text(rows)
    method, numbers_ = {"name": "ties", "trim": "tensor"}, {"file": str(tmp_path / "numbers.csv")}
    with pytest.raises((RecipeError, InputError), match=message):
        merge(family, tmp_path / "out", method, coefficients=numbers_)


def test_a_plan_says_which_numbers_differ(family_of: MakeFamily, tmp_path: Path) -> None:
    recipe = recipe_of(family_of(num_models=2), tmp_path / "out", "average", weights=[{"*norm*": 0.5}, 1.0])
    record = plan_record(merging.plan(recipe))
    assert [model.by_parameter for model in record.models] == [["weight"], []]
    with io.StringIO() as screen:
        Console(file=screen, width=200).print(*of_plan(record))
        assert screen.getvalue().count("weight by parameter") == 1


def test_a_recipe_with_tables_survives_its_json_form() -> None:
    text = "models: [{path: /m, weight: {'*.mlp.*': [0, 1], '*': 2}}]\nbase: /b\noutput: /o\n"
    recipe = parse(text + "method: {name: dare, lambda: [0.5, 1], density: {a*: 0.5}}")
    assert validate(recipe.model_dump(mode="json", by_alias=True)) == recipe
    assert recipe.coefficients.lambda_ == (0.5, 1.0)


# -- files of safetensors

NAN = float("nan")


def write_numbers(
    path: Path, models: Sequence[str], patterns: Sequence[str], tensors: Mapping[str, object], dtype: str = "float32"
) -> dict[str, str]:
    """Write a file of coefficients; return the recipe's section."""
    metadata = {"models": json.dumps(models), "patterns": json.dumps(patterns)}
    save_file({name: torch.tensor(each, dtype=getattr(torch, dtype)) for name, each in tensors.items()}, path, metadata)
    return {"file": str(path)}


def test_a_file_of_tensors_says_what_a_table_says(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=2, layers=2)
    method = {"name": "ties", "trim": "tensor", "density": 0.5}
    rows = ["model,pattern,weight,density,lambda", "1,*.mlp.*,0.25,,", ",*.mlp.*,2,0.75,", ",*,,,0.5", "0,*,4,,"]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    written = write_numbers(
        tmp_path / "numbers.safetensors", ["", "1", "0"], ["*.mlp.*", "*"],
        {
            "weight": [[2.0, NAN], [0.25, NAN], [NAN, 4.0]],
            "density": [[0.75, NAN], [NAN, NAN], [NAN, NAN]],
            "lambda": [NAN, 0.5],
        },
        "float64",
    )  # fmt: skip
    merge(family, tmp_path / "tensors", method, coefficients=written)
    merge(family, tmp_path / "table", method, coefficients={"file": str(tmp_path / "table.csv")})
    assert digests(tmp_path / "tensors") == digests(tmp_path / "table")


def pool_weighed_by_rank(tmp_path: Path, dtype: str) -> tuple[dict[str, object], list[Tensors], Tensors]:
    """Return a recipe of two adapters, of rank 4 and 8, with weights by rank, and their exact changes."""
    targets = [("q_proj", "v_proj", "down_proj", "embed_tokens"), ("q_proj", "down_proj")]
    pool = make_pool(
        Stores({}).of(str(tmp_path)), str(tmp_path / "pool"), num_adapters=2, ranks=(4, 8), targets=targets, dtype=dtype
    )
    ranks = torch.tensor(
        [[[0.5, -1, 0, 2, NAN, NAN, NAN, NAN], [NAN] * 8], [[NAN] * 8, [3, 1, 0.25, 0, -2, 1, 1, 0.5]]]
    )
    numbers = write_numbers(tmp_path / "c.safetensors", ["0", "1"], ["*q_proj*", "*"], {"ranks": ranks.tolist()})
    changes = []
    for number, uri in enumerate(pool.adapters):
        stored, scale = load_file(Path(uri) / "adapter_model.safetensors"), (16 / 4, 8 / 8)[number]
        own: dict[str, torch.Tensor] = {}
        for name in pool.deltas[number]:
            key = "base_model.model." + name.removesuffix(".weight")
            embedded = f"{key}.lora_embedding_A" in stored
            a, b = (stored[f"{key}.lora_embedding_{x}" if embedded else f"{key}.lora_{x}.weight"] for x in "AB")
            weights = [ranks[0, 0, :4], ranks[1, 1]][number].double()
            if number == 0 and "q_proj" not in name:
                weights = torch.ones(4).double()
            product = scale * (b.double() * weights) @ a.double()
            own[name] = product.T if embedded else product
        changes.append(own)
    recipe: dict[str, object] = {"base": pool.base, "models": list(pool.adapters), "run": LOCAL}
    recipe["coefficients"] = numbers
    return recipe, changes, pool.base_tensors


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_rank_components_of_adapters_have_weights_of_their_own(dtype: str, tmp_path: Path) -> None:
    recipe, changes, base = pool_weighed_by_rank(tmp_path, dtype)
    for method in ("task_arithmetic", "emr", "iso_c"):
        merging.merge(validate({**recipe, "method": method, "output": {"path": str(tmp_path / method)}}))
    output = {"path": str(tmp_path / "adapter"), "kind": "adapter", "rank": 16}
    merging.merge(validate({**recipe, "method": "task_arithmetic", "output": output}))
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, value in base.items():
        deltas = [own.get(name, torch.zeros(value.shape).double()) for own in changes]
        total = torch.stack(deltas).sum(0)
        wanted = {"task_arithmetic": total, "emr": largest_of_the_sign(deltas), "iso_c": flat(total)}
        for method, change in wanted.items():
            written = read_tensors(tmp_path / method)[name].double()
            np.testing.assert_allclose(
                written, value.double() + change, rtol=1e-5, atol=1e-6, err_msg=f"{method} {name}"
            )
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in factors:
            product = factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
            np.testing.assert_allclose(product, total, rtol=1e-4, atol=1e-6, err_msg=name)
    assert max(float(each.abs().max()) for own in changes for each in own.values()) > 0.02


def largest_of_the_sign(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the largest change of the elected sign, element by element."""
    stacked = torch.stack(list(deltas))
    sign = torch.where(stacked.sum(0) > 0, 1.0, -1.0).double()
    return sign * (stacked * sign).clamp(min=0).amax(0)


def flat(total: torch.Tensor) -> torch.Tensor:
    """Return a matrix with its singular values above noise replaced by their mean, and a vector as half of it."""
    if total.ndim < 2 or not total.any():
        return total / 2
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    rank = int((values > values[0] * 1e-5).sum())
    polar: torch.Tensor = left[:, :rank] @ right[:rank]
    return float(values[:rank].mean()) * polar


def test_a_merge_with_weights_by_rank_is_another_merge_and_says_so(tmp_path: Path) -> None:
    recipe, _, _ = pool_weighed_by_rank(tmp_path, "F32")
    given = {**recipe, "method": "average", "output": {"path": str(tmp_path / "out")}}
    with_ranks, without = merging.plan(validate(given)), merging.plan(validate({**given, "coefficients": {}}))
    assert with_ranks.run_id != without.run_id
    assert [model.by_parameter for model in plan_record(with_ranks).models] == [["rank components"]] * 2
    assert with_ranks.memory >= without.memory


@pytest.mark.parametrize(
    ("variants", "ranks", "message"),
    [
        (("plain",), [[[1.0, 2.0]]], "gives 2 weights by rank, and the rank is 4: .*q_proj"),
        (("dora",), [[[1.0, 2.0, 3.0, 4.0]]], "gives 4 weights by rank, and the change is stored as no plain factors"),
        (("plain",), [[[1.0, NAN, 3.0, 4.0]]], "NaN before a number"),
    ],
)
def test_weights_by_rank_that_fit_no_factors_are_refused(
    variants: Sequence[str], ranks: object, message: str, tmp_path: Path
) -> None:
    store = Stores({}).of(str(tmp_path))
    pool = make_pool(store, str(tmp_path / "pool"), num_adapters=1, ranks=(4,), variants=variants)
    numbers = write_numbers(tmp_path / "c.safetensors", ["0"], ["*q_proj*"], {"ranks": ranks})
    recipe = {"base": pool.base, "models": list(pool.adapters), "method": "average", "coefficients": numbers}
    with pytest.raises((RecipeError, InputError), match=message):
        merging.plan(validate({**recipe, "output": str(tmp_path / "out")}))


def test_whole_models_have_no_ranks(family_of: MakeFamily, tmp_path: Path) -> None:
    numbers = write_numbers(tmp_path / "c.safetensors", [""], ["*norm*"], {"ranks": [[[1.0, 2.0]]]})
    with pytest.raises(
        RecipeError, match=r"model 0: coefficients\.file gives 2 weights by rank, and the change is stored"
    ):
        merge(family_of(num_models=2), tmp_path / "out", "average", coefficients=numbers)


@pytest.mark.parametrize(
    ("models", "patterns", "tensors", "message"),
    [
        (["0"], ["*"], {"weight": [[float("inf")]]}, "model '0', pattern '.': has an infinite number"),
        (["7"], ["*"], {"weight": [[1.0]]}, "names a model that the recipe does not: '7'"),
        (["0"], ["*"], {"weight": [[1.0, 2.0]]}, "weight has the shape .1, 2., and is .models, patterns."),
        (["0"], ["*"], {"value": [[1.0]]}, "holds 'value' in F32, and may hold weight, density, lambda, ranks"),
        (["0"], [""], {"weight": [[1.0]]}, "empty pattern"),
        (["0"], ["*"], {"density": [[2.0]]}, "the density 2 is no share"),
        ("0", ["*"], {"weight": [[1.0]]}, "no list `models`"),
        (["0"], ["*nrom*"], {"weight": [[1.0]]}, "no merged parameter is called '.nrom.'"),
        (["0"] * 300, ["*"] * 300, {"weight": [[1.0] * 300] * 300}, "300 models times 300 patterns, above 40,000"),
    ],
)
def test_a_wrong_file_of_tensors_is_refused(
    models: Sequence[str],
    patterns: Sequence[str],
    tensors: Mapping[str, object],
    message: str,
    family_of: MakeFamily,
    tmp_path: Path,
) -> None:
    numbers = write_numbers(tmp_path / "c.safetensors", models, patterns, tensors)
    with pytest.raises((RecipeError, InputError), match=message):
        merge(family_of(num_models=2), tmp_path / "out", {"name": "ties", "trim": "tensor"}, coefficients=numbers)


def test_a_file_that_is_no_safetensors_is_refused(family_of: MakeFamily, tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_bytes(b"not that")
    for path, message in (
        (tmp_path / "c.safetensors", "safetensors"),
        (tmp_path / "d.safetensors", "there is no file"),
    ):
        with pytest.raises(InputError, match=message):
            merge(family_of(num_models=2), tmp_path / "out", "average", coefficients={"file": str(path)})
