"""TIES against the dense oracle, over the whole road: what is compared is the files of the output."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools import oracle
from tests.tools.families import Family, write_checkpoint
from tests.tools.merging import merge, read_tensors, recipe_of, rounded, same_bits
from tests.tools.oracle import Rules
from tests.tools.oracles import stored
from tests.tools.oracles.electing import ties as of_oracle
from tests.tools.oracles.protocol import Merged, Tensors
from ties_ray.errors import RecipeError
from ties_ray.methods import Member
from ties_ray.methods.ties import Ties
from ties_ray.reports.records import MergeResult
from ties_ray.stores import Stores
from ties_ray.testing import MethodContract

MakeFamily = Callable[..., Family]
CASES: dict[str, tuple[dict[str, Any], Rules]] = {
    "defaults": ({}, Rules("ties", 0.2)),
    "drop": ({"at_threshold": "drop"}, Rules("ties", 0.2, strict=True)),
    "exact": ({"at_threshold": "exact"}, Rules("ties", 0.2, exact=True)),
    "exact_more": ({"at_threshold": "exact", "density": 0.6}, Rules("ties", 0.6, exact=True)),
    "exact_tensor": (
        {"at_threshold": "exact", "trim": "tensor", "zero_sum": "majority"},
        Rules("ties", 0.2, exact=True, tensor=True, zero_sum="majority"),
    ),
    "exact_max": ({"at_threshold": "exact", "merge": "max"}, Rules("ties", 0.2, exact=True, merge="max")),
    "tensor": ({"trim": "tensor"}, Rules("ties", 0.2, tensor=True)),
    "tensor_drop": (
        {"trim": "tensor", "at_threshold": "drop", "density": 0.3}, Rules("ties", 0.3, tensor=True, strict=True),
    ),
    "majority": ({"zero_sum": "majority"}, Rules("ties", 0.2, zero_sum="majority")),
    "positive": ({"zero_sum": "positive"}, Rules("ties", 0.2, zero_sum="positive")),
    "sum": ({"merge": "sum", "lambda": 0.5}, Rules("ties", 0.2, merge="sum", lambda_=0.5)),
    "max": ({"merge": "max", "lambda": -0.75}, Rules("ties", 0.2, merge="max", lambda_=-0.75)),
    "max_majority": ({"merge": "max", "zero_sum": "majority"}, Rules("ties", 0.2, merge="max", zero_sum="majority")),
    "max_positive": ({"merge": "max", "zero_sum": "positive"}, Rules("ties", 0.2, merge="max", zero_sum="positive")),
    "official": ({"profile": "official"}, Rules("ties", 0.2, zero_sum="majority", one_more=True)),
    "lambda": ({"lambda": 0.7}, Rules("ties", 0.2, lambda_=0.7)),
    "no_trim": ({"density": 1.0}, Rules("ties", 1.0)),
    "one_value": ({"density": 1e-9}, Rules("ties", 1e-9)),
    "more_than_moved": ({"density": 0.9}, Rules("ties", 0.9)),
    "more_than_moved_drop": ({"density": 0.9, "at_threshold": "drop"}, Rules("ties", 0.9, strict=True)),
}  # fmt: skip


class TestTies(MethodContract):
    @pytest.fixture
    def method(self) -> Ties:
        return Ties(density=0.3)


class TestTiesThatKeepExactlyK(MethodContract):
    @pytest.fixture
    def method(self) -> Ties:
        return Ties(at_threshold="exact", merge="sum")


class TestTiesThatCountsSigns(MethodContract):
    @pytest.fixture
    def method(self) -> Ties:
        return Ties(profile="official", trim="global")


class TestTiesByTensorAndExtremes(MethodContract):
    @pytest.fixture
    def method(self) -> Ties:
        return Ties(trim="tensor", merge="max", at_threshold="drop", lambda_=0.7)


class TestTiesOfMergekit(MethodContract):
    @pytest.fixture
    def method(self) -> Ties:
        return Ties(profile="mergekit", density=0.3, rescale="l1", merge="sum")


class TestTiesOfPeft(MethodContract):
    @pytest.fixture
    def method(self) -> Ties:
        return Ties(profile="peft", density=0.3, vote="count")


PROFILES: list[dict[str, Any]] = [
    {"profile": "mergekit"},
    {"profile": "mergekit", "merge": "sum"},
    {"profile": "mergekit", "rescale": "l1"},
    {"profile": "peft"},
    {"profile": "peft", "vote": "count"},
]


@pytest.mark.parametrize("rules", PROFILES, ids=str)
def test_a_profile_gives_what_its_oracle_gives(rules: dict[str, Any], family_of: MakeFamily, tmp_path: Path) -> None:
    asked = {
        "profile": rules["profile"],
        "normalize": rules.get("merge") != "sum",
        "rescale": rules.get("rescale") == "l1",
        "elect": "frequency" if rules.get("vote") == "count" else "total",
    }
    weights = (0.5, 2.0, 1.0)

    def oracle(base: Tensors, models: Sequence[Tensors], density: float) -> Merged:
        found, single = (
            of_oracle(base, models, density=share, weights=weights, lambda_=0.5, **asked) for share in (density, 1.0)
        )
        alone = {name: value for name, value in single.delta.items() if value.size == 1}  # PEFT keeps none, and we one
        return Merged({**found.delta, **alone}, base)

    for density in (0.4, 1.0):
        method = {"name": "ties", "density": density, "lambda": 0.5, **rules}
        folder = tmp_path / str(density)
        stored.check(
            family_of(num_models=3, dtype="F32", smooth=True),
            folder,
            method,
            partial(oracle, density=density),
            weights=weights,
        )


@pytest.mark.parametrize("case", CASES)
def test_every_rule_gives_the_oracles_bits_where_sums_are_exact(
    case: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=4, exact=True, mixed=True, shards=2)
    parameters, rules = CASES[case]
    result = merge(family, tmp_path / "out", {"name": "ties", **parameters})
    answer = oracle.merge(family, rules)
    assert_trims(result, answer)
    oracle.check(family, answer, read_tensors(tmp_path / "out"), exact=True)


@pytest.mark.parametrize("case", CASES)
def test_every_rule_gives_the_oracles_values_on_updates_like_real_ones(
    case: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=3)
    parameters, rules = CASES[case]
    result = merge(family, tmp_path / "out", {"name": "ties", **parameters})
    answer = oracle.merge(family, rules)
    assert_trims(result, answer)
    oracle.check(family, answer, read_tensors(tmp_path / "out"))


@pytest.mark.parametrize("case", ["defaults", "official", "max"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_models": 1},
        {"num_models": 2, "dtype": "F16", "model_dtype": "F32"},
        {"num_models": 3, "mixed": True},
        {"num_models": 3, "dtype": "F64"},
        {"num_models": 40, "layers": 1, "hidden": 8},
        {"num_models": 40, "layers": 1, "hidden": 8, "exact": True},
    ],
    ids=str,
)
def test_any_number_of_models_and_mixed_dtypes_are_merged_as_the_oracle_does(
    case: str, how: dict[str, Any], family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(**how)
    parameters, rules = CASES[case]
    result = merge(family, tmp_path / "out", {"name": "ties", **parameters})
    answer = oracle.merge(family, rules)
    assert_trims(result, answer)
    oracle.check(family, answer, read_tensors(tmp_path / "out"), exact=how.get("exact", False))


@pytest.mark.parametrize("merged", ["mean", "sum", "max"])
@pytest.mark.parametrize(
    ("weights", "densities"),
    [((1.0, 0.5, 2.0, 0.25), None), ((2.0, 0.0, 0.5, 1.0), None), (None, (0.1, 1.0, None, 0.6))],
    ids=["weights", "one_is_dropped", "densities"],
)
def test_weights_and_densities_are_those_of_each_model(
    merged: str,
    weights: tuple[float, ...] | None,
    densities: tuple[float | None, ...] | None,
    family_of: MakeFamily,
    tmp_path: Path,
) -> None:
    family = family_of(num_models=4, exact=True, mixed=True, shards=2)
    parameters = {"name": "ties", "density": 0.4, "merge": merged}
    result = merge(family, tmp_path / "out", parameters, weights=weights, densities=densities)
    answer = oracle.merge(family, Rules("ties", 0.4, merge=merged), weights=weights, densities=densities)  # type: ignore[arg-type]
    assert_trims(result, answer)
    oracle.check(family, answer, read_tensors(tmp_path / "out"), exact=True)
    assert any("weight 0" in note for note in result.notes) == (weights is not None and 0 in weights)


def test_negative_weights_may_be_summed(family_of: MakeFamily, tmp_path: Path) -> None:
    family, weights = family_of(num_models=3), (1.0, -0.3, 0.9)
    merge(family, tmp_path / "out", {"name": "ties", "merge": "sum"}, weights=weights)
    answer = oracle.merge(family, Rules("ties", 0.2, merge="sum"), weights=weights)
    oracle.check(family, answer, read_tensors(tmp_path / "out"))
    with pytest.raises(RecipeError, match=r"weight -0\.3 is negative, and `mean` divides by weights; use merge: sum"):
        merge(family, tmp_path / "other", {"name": "ties"}, weights=weights)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_output_is_rounded_once_to_its_dtype(dtype: str, family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=4, exact=True, mixed=True, shards=2)
    merge(family, {"path": str(tmp_path / "out"), "dtype": dtype}, {"name": "ties", "lambda": 0.7})
    answer = oracle.merge(family, Rules("ties", 0.2, lambda_=0.7))
    oracle.check(family, answer, read_tensors(tmp_path / "out"), dtype=getattr(torch, dtype), exact=True)


def test_what_is_excluded_is_the_bases_and_does_not_count(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=3)
    names = ["lm_head.weight", "model.empty", "model.temperature"]
    result = merge(family, tmp_path / "out", "ties", exclude=["lm_head.*", "model.empty", "model.temperature"])
    answer = oracle.merge(family, Rules("ties", 0.2), exclude=names)
    assert_trims(result, answer)
    assert not answer.value.keys() & set(names)
    oracle.check(family, answer, read_tensors(tmp_path / "out"))


def test_one_model_untrimmed_comes_back_whole(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=1, dtype="F32", exact=True)
    merge(family, tmp_path / "out", {"name": "ties", "density": 1.0})
    found = read_tensors(tmp_path / "out")
    for name, tensor in family.model_tensors[0].items():
        assert torch.equal(found[name], tensor), name  # but for the sign of a zero that stayed one


def test_the_planted_facts_of_real_weights_are_in_the_families(family_of: MakeFamily) -> None:
    family = family_of(num_models=3)
    answer = oracle.merge(family, Rules("ties", 0.2))
    assert all(trim.tied > 10 and trim.kept > 0.2 * trim.size for trim in answer.trims.values())
    untrimmed = oracle.merge(family, Rules("ties", 1.0, zero_sum="positive"))
    cancelled = sum(int(((value != 0) & ~untrimmed.sure[name]).sum()) for name, value in untrimmed.value.items())
    assert cancelled > 0.01 * next(iter(answer.trims.values())).size
    never = family.base_tensors["model.never_changes.weight"].reshape(-1)
    assert never[0] == 0
    assert bool(never[0].signbit())
    assert same_bits(rounded(never.double(), never.dtype), never)


@pytest.mark.parametrize("merged", ["mean", "sum", "max"])
@pytest.mark.parametrize("lead", [1, -1])
def test_a_majority_of_one_is_a_majority(merged: str, lead: int, tmp_path: Path) -> None:
    """Three elements elect a sign, two of them this one, the fourth sums to zero and follows."""
    first = torch.tensor([lead, lead, -lead, 1.0])
    models = tuple({"a.weight": values} for values in (first, first * torch.tensor([1.0, 1.0, 1.0, -1.0])))
    uris = tuple(str(tmp_path / name) for name in ("0", "1"))
    family = Family(str(tmp_path / "base"), uris, {"a.weight": torch.zeros(4)}, models)
    for uri, tensors in zip((family.base, *family.models), (family.base_tensors, *models), strict=True):
        write_checkpoint(Stores({}).of("/"), uri, tensors, config={"model_type": "llama", "vocab_size": 4})
    method = {"name": "ties", "density": 1.0, "zero_sum": "majority", "merge": merged}
    result = merge(family, tmp_path / "out", method)
    assert abs(result.statistics["positive"] - result.statistics["negative"]) == 1
    assert read_tensors(tmp_path / "out")["a.weight"][3] == lead


@pytest.mark.parametrize("merged", ["mean", "sum", "max"])
@pytest.mark.parametrize("place", [0, 14, 15, 16, 17])
def test_one_weight_among_many_counts_wherever_its_model_stands(
    place: int, merged: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=18, layers=1, hidden=8, exact=True)
    weights = tuple(2.0 if number == place else 1.0 for number in range(18))
    merge(family, tmp_path / "out", {"name": "ties", "density": 0.5, "merge": merged}, weights=weights)
    answer = oracle.merge(family, Rules("ties", 0.5, merge=merged), weights=weights)  # type: ignore[arg-type]
    oracle.check(family, answer, read_tensors(tmp_path / "out"), exact=True)
    even = oracle.merge(family, Rules("ties", 0.5, merge=merged))  # type: ignore[arg-type]
    assert any(not torch.equal(value, even.value[name]) for name, value in answer.value.items())


@pytest.mark.parametrize(("merged", "expected"), [("mean", -1.0), ("sum", -1.0), ("max", 0.0)])
@pytest.mark.parametrize(("signs", "majority"), [((1, -1), 0), ((1, 1), 1), ((-1, -1), -1)])
def test_where_no_sign_has_the_majority_zero_sums_go_as_in_the_authors_code(
    merged: str, expected: float, signs: tuple[int, int], majority: int, tmp_path: Path
) -> None:
    """Two elements elect a sign, the third sums to zero: a majority of zero keeps negative values, and none by max."""
    store, config = Stores({}).of("/"), {"model_type": "llama", "vocab_size": 3}
    first = torch.tensor([signs[0], signs[1], 1.0])
    second = torch.tensor([signs[0], signs[1], -1.0])
    models = tuple({"a.weight": values} for values in (first, second))
    family = Family(
        str(tmp_path / "base"), (str(tmp_path / "0"), str(tmp_path / "1")), {"a.weight": torch.zeros(3)}, models
    )
    for uri, tensors in zip((family.base, *family.models), (family.base_tensors, *models), strict=True):
        write_checkpoint(store, uri, tensors, config=config)
    method = {"name": "ties", "density": 1.0, "zero_sum": "majority", "merge": merged}
    result = merge(family, tmp_path / "out", method)
    found = read_tensors(tmp_path / "out")["a.weight"]
    assert found[2] == (majority or expected)
    assert result.statistics == {"positive": signs.count(1), "negative": signs.count(-1)}
    oracle.check(
        family, oracle.merge(family, Rules("ties", zero_sum="majority", merge=merged)), {"a.weight": found}, exact=True
    )  # type: ignore[arg-type]


def test_a_profile_is_not_contradicted() -> None:
    with pytest.raises(ValueError, match="profile 'official' means zero_sum: majority, yet the recipe says 'none'"):
        Ties(profile="official", zero_sum="none")
    with pytest.raises(ValueError, match="profile 'official' means at_threshold: keep, yet the recipe says 'exact'"):
        Ties(profile="official", at_threshold="exact")


def test_the_official_profile_knows_no_weights() -> None:
    problems = Ties(profile="official").problems([Member("a", 1.0, None), Member("b", 0.5, None)])
    assert [str(problem) for problem in problems] == [
        "model b: weight 0.5: profile official knows no weights; leave the weight out, or use profile paper"
    ]


def test_an_untrimmed_merge_reads_its_models_once(family_of: MakeFamily) -> None:
    family = family_of(num_models=3)
    assert Ties(density=1).needs([Member("0", 1.0, None)]) is None
    recipe = recipe_of(family, "/nowhere", {"name": "ties", "density": 1})
    assert [round_.name for round_ in recipe.method.rounds()] == ["merge"]


def assert_trims(result: MergeResult, answer: oracle.Answer) -> None:
    """Thresholds and counts are the oracle's, to the last value."""
    found = {(trim.model, trim.parameter): trim for trim in result.trims}
    assert found.keys() == answer.trims.keys()
    for key, wanted in answer.trims.items():
        trim = found[key]
        assert (trim.threshold, trim.size) == (wanted.threshold, wanted.size), key
        assert (trim.kept, trim.tied) == (wanted.kept, wanted.tied), key
