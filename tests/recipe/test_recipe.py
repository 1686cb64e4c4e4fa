import json
import re
from typing import Any

import pytest

from ties_ray import plugins
from ties_ray.errors import Problem, RecipeError
from ties_ray.methods import Method
from ties_ray.recipe.parse import override, parse, validate
from ties_ray.recipe.recipe import Recipe

PLAIN: dict[str, Any] = {"base": "b", "models": ["m"], "method": {"name": "ties"}, "output": {"path": "o"}}
YAML = """
base: s3://models/base
models:
  - s3://models/math
  - {path: s3://models/code, weight: 0.7}
method: {name: ties, density: 0.2, lambda: 1.5}
output: {path: s3://merged/x, dtype: bfloat16}
"""


def refused(data: dict[str, Any]) -> dict[str, Problem]:
    """Return the problems of a recipe by their place."""
    with pytest.raises(RecipeError, match=r".") as caught:
        validate(data)
    return {problem.where: problem for problem in caught.value.problems}


# -- what is read


def test_yaml_and_json_read_alike() -> None:
    recipe = parse(YAML)
    assert recipe == parse(recipe.model_dump_json()) == parse(json.dumps(recipe.model_dump(mode="json"), indent="\t"))
    assert [model.weight for model in recipe.models] == [1.0, 0.7]
    assert recipe.method.model_dump()["lambda"] == 1.5


def test_short_forms_mean_the_long_ones() -> None:
    long = validate(PLAIN | {"models": [{"path": "m"}], "output": {"path": "o", "kind": "checkpoint"}})
    assert validate(PLAIN | {"method": "ties", "output": "o"}) == long


@pytest.mark.parametrize("name", plugins.names("methods"))
@pytest.mark.parametrize("unset", [True, False])
def test_the_json_form_is_exact_for_every_method(name: str, unset: bool) -> None:
    method = plugins.load("methods", name, Method)()
    models = [{"path": "m", "with": {companion.name: "{path}/beside" for companion in method.companions}}]
    output = {"path": "o", "file_size": "1MiB"}
    recipe = validate(PLAIN | {"models": models, "method": method.model_dump(mode="json"), "output": output})
    again = parse(recipe.model_dump_json(exclude_unset=unset))
    assert again == recipe
    assert type(again.method) is type(method)
    assert again.output.file_size == 2**20


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        validate(PLAIN).base = "other"  # type: ignore[misc]


# -- what is refused, and where


@pytest.mark.parametrize(
    ("change", "where", "meant"),
    [
        ({"modls": []}, "modls", "models"),
        ({"models": [{"path": "m", "wieght": 1}]}, "models.0.wieght", "weight"),
        ({"models": [{"path": "m", "nto": []}]}, "models.0.nto", "not"),
        ({"method": {"name": "ties", "densty": 0.1}}, "method.densty", "density"),
        ({"method": {"name": "dare", "sed": 1}}, "method.sed", "seed"),
        ({"output": {"path": "o", "file_sice": 1}}, "output.file_sice", "file_size"),
        ({"allow": {"nans": "zero"}}, "allow.nans", "nan"),
        ({"run": {"worker": 3}}, "run.worker", "workers"),
        ({"storage": {"s3": {"endpoint": "x"}}}, "storage.s3.endpoint", "endpoint_url"),
        ({"base_model": "b"}, "base_model", "base"),
        ({"merge_method": "ties"}, "merge_method", "method"),
        ({"models": [{"model": "m"}]}, "models.0.model", "path"),
        ({"density": 0.3}, "density", "method.density"),
        ({"dtype": "bf16"}, "dtype", "output.dtype"),
        ({"workers": 3}, "workers", "run.workers"),
        ({"endpoint_url": "http://h"}, "endpoint_url", "storage.s3.endpoint_url"),
        (
            {"method": {"name": "ties", "rank": 3}, "output": {"path": "o", "kind": "adapter"}},
            "method.rank",
            "output.rank",
        ),
        ({"vocabulary": {"token": "base"}}, "vocabulary.token", "tokens"),
        ({"vocabulary": {"rows": {"a": {"from": "base", "tokn": "b"}}}}, "vocabulary.rows.a.tokn", "token"),
    ],
)
def test_an_unknown_key_is_named_with_the_likely_one(change: dict[str, Any], where: str, meant: str) -> None:
    problem = refused(PLAIN | change)[where]
    assert problem.what == "unknown key"
    assert problem.remedy == f"did you mean {meant!r}?"


def test_an_unknown_key_without_a_likely_one_gets_all_that_are_known() -> None:
    problem = refused(PLAIN | {"run": {"zzz": 1}})["run.zzz"]
    assert problem.remedy.startswith("known here: address, arithmetic, cache, deadline")


def test_an_address_that_no_worker_can_join_is_refused_with_what_to_write() -> None:
    problem = refused(PLAIN | {"run": {"address": "http://head:8265"}})["run.address"]
    assert "write ray://host:10001 or host:6379" in problem.what
    assert validate(PLAIN | {"run": {"address": "ray://head:10001"}}).run.address == "ray://head:10001"


def test_every_problem_is_told_at_once_and_by_its_place() -> None:
    data = {
        "models": ["a", "b", "c", {"path": "d", "weight": "heavy"}, {"path": "e", "density": 2}],
        "method": {"name": "ties", "density": 0, "trim": "locally"},
        "output": {"path": "o", "part_size": "1MiB", "dtype": "int8"},
        "run": {"workers": 0, "memory": "1MiB"},
    }
    problems = refused(data)
    assert problems.keys() == {
        "base", "models.3.weight", "models.4.density", "method.density", "method.trim", "output.part_size",
        "output.dtype", "run.workers", "run.memory",
    }  # fmt: skip
    assert problems["base"].what == "is missing"
    assert '"heavy"' in problems["models.3.weight"].what
    assert "5MiB" in problems["output.part_size"].what


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("place", ["models.1.weight", "method.lambda", "method.density"])
def test_numbers_that_are_not_finite_are_refused(value: str, place: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(place)):
        parse(YAML, overrides=[f"{place}={value}"])


def test_no_model_at_all_is_refused() -> None:
    assert refused(PLAIN | {"models": []})["models"].what == "needs at least 1 item"


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"models": None}, "models", "should be a list, one item a line after `- `, not empty"),
        ({"exclude": "*.bias"}, "exclude", 'should be a list, one item a line after `- `, not "*.bias"'),
        ({"allow": 3}, "allow", "should be a mapping of keys, not 3"),
        ({"run": {"workers": "two"}}, "run.workers", 'should be a whole number, not "two"'),
        ({"run": {"cache": "3 cats"}}, "run.cache", 'should be a number of bytes, as 512MiB, not "3 cats"'),
        ({"output": {"path": "o", "kind": "adapter", "rank": "many"}}, "output.rank",
         'should be a whole number, not "many"; or should be \'auto\', not "many"'),
        ({"bounds": {"norm": [1]}}, "bounds.norm.1", "is missing"),
    ],
)  # fmt: skip
def test_no_message_speaks_of_the_types_of_python(change: dict[str, Any], where: str, what: str) -> None:
    assert refused(PLAIN | change)[where].what == what


@pytest.mark.parametrize(
    ("short", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("fp64", "float64")]
)
def test_short_names_of_dtypes_mean_the_long_ones(short: str, dtype: str) -> None:
    for output in ({"path": "o"}, {"path": "o", "kind": "adapter"}):
        assert validate(PLAIN | {"output": output | {"dtype": short}}).output.dtype == dtype


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("tie", "unknown method 'tie'; did you mean 'ties'?"),
        ({"density": 0.2}, "needs `name`: one of average"),
        (3, "should be a mapping of keys, not 3"),
    ],
)
def test_a_method_that_there_is_not_is_refused(method: object, message: str) -> None:
    assert message in refused(PLAIN | {"method": method})["method"].what


def test_an_output_kind_that_there_is_not_is_refused() -> None:
    assert "unknown output 'checkpont'; did you mean 'checkpoint'?" in (
        refused(PLAIN | {"output": {"path": "o", "kind": "checkpont"}})["output"].what
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": 1}, "give either `path` or `table`"),
        ({"path": "m", "table": "pool.csv"}, "give either `path` or `table`"),
        ({"path": "m", "at_least": 2}, "belong to a glob or a table"),
        ({"path": "m", "not": ["*-draft"]}, "belong to a glob or a table"),
        ({"path": "m/*", "id": "x"}, "name one model, not a glob"),
        ({"table": "pool.csv", "sha256": {"model.safetensors": "0"}}, "name one model, not a glob"),
        ({"path": "m[12]", "version_id": {"model.safetensors": "0"}}, "name one model, not a glob"),
    ],
)
def test_fields_of_one_model_and_of_many_do_not_mix(entry: dict[str, Any], message: str) -> None:
    assert message in refused(PLAIN | {"models": [entry]})["models.0"].what


def test_a_glob_and_a_table_take_what_belongs_to_many() -> None:
    entries = [{"path": "m/*", "not": ["*-draft"], "at_least": 3, "weight": 0.5}, {"table": "pool.csv", "at_least": 1}]
    recipe = validate(PLAIN | {"models": entries})
    assert recipe.models[0].not_ == ("*-draft",)
    assert recipe.model_dump(mode="json", exclude_unset=True)["models"] == entries


def test_a_density_is_refused_where_the_method_has_none() -> None:
    data = PLAIN | {"method": "average", "models": [{"path": "m", "density": 0.5}]}
    assert "the method average has no density" in next(iter(refused(data).values())).what


# -- ties


@pytest.mark.parametrize(
    ("field", "rule"), [("trim", "tensor"), ("at_threshold", "drop"), ("zero_sum", "none"), ("zero_sum", "positive")]
)
def test_contradicting_a_profile_is_refused(field: str, rule: str) -> None:
    message = refused(PLAIN | {"method": {"name": "ties", "profile": "official", field: rule}})["method"].what
    assert f"profile 'official' means {field}: " in message
    assert f"the recipe says {rule!r}" in message


def test_a_profile_sets_its_rules_and_agreeing_with_it_is_fine() -> None:
    official = validate(PLAIN | {"method": {"name": "ties", "profile": "official", "trim": "global"}}).method
    assert official.model_dump()["zero_sum"] == "majority"
    assert validate(PLAIN).method.model_dump()["zero_sum"] == "none"


# -- secrets


@pytest.mark.parametrize(
    ("options", "place", "message"),
    [
        ({"secret_access_key": "hidden"}, "storage.s3", "looks like a secret"),
        ({"aws_session_token": "hidden"}, "storage.s3", "looks like a secret"),
        ({"endpoint_url": "https://user:hidden@minio:9000"}, "storage.s3.endpoint_url", "a URL with a password"),
        ({"proxy": "http://user:hidden@proxy:3128"}, "storage.s3.proxy", "a URL with a password"),
    ],
)
def test_a_secret_in_the_storage_options_is_refused_and_not_repeated(
    options: dict[str, str], place: str, message: str
) -> None:
    problem = refused(PLAIN | {"storage": {"s3": options}})[place]
    assert message in problem.what
    assert "hidden" not in str(problem)


# -- text that is no recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [", r"r\.yaml, line 1, column 8: "),
        ("base: a\nbase: b\n", r"r\.yaml, line 2, column 1: .*duplicate key"),
        ('{"base": "a", "base": "b"}', "duplicate key"),
        ("- a\n- b\n", "not a mapping"),
        ("", "not a mapping"),
        ("base: !!python/object:os.system {}\n", r"r\.yaml"),
    ],
)
def test_a_text_that_is_no_recipe_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(text, "r.yaml")


# -- overrides


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("method.density=0.3", ("method", "density"), 0.3),
        ("method.lambda=2", ("method", "lambda"), 2.0),
        ("method=average", ("method", "name"), "average"),
        ("models.0.weight=0.25", ("models", 0, "weight"), 0.25),
        ("models.1.path=s3://models/new", ("models", 1, "path"), "s3://models/new"),
        ("exclude=['*.bias']", ("exclude", 0), "*.bias"),
        ("run.executor=local", ("run", "executor"), "local"),
        ("storage.s3.endpoint_url=http://h:9000", ("storage", "s3", "endpoint_url"), "http://h:9000"),
        ("output.path=/a=b", ("output", "path"), "/a=b"),
    ],
)
def test_an_override_sets_one_field(override: str, place: tuple[str | int, ...], value: object) -> None:
    data: Any = parse(YAML, overrides=[override]).model_dump(mode="json")
    for step in place:
        data = data[step]
    assert data == value


def test_an_override_reaches_into_the_short_forms() -> None:
    data = {"method": "ties", "output": "o"}
    override(data, ["method.density=0.4", "output.dtype=float16"])
    assert data == {"method": {"name": "ties", "density": 0.4}, "output": {"path": "o", "dtype": "float16"}}


def test_of_two_overrides_the_later_holds() -> None:
    assert parse(YAML, overrides=["method.density=0.4", "method.density=0.5"]).method.model_dump()["density"] == 0.5


@pytest.mark.parametrize(
    "override", ["method.density", "=3", "models.7.weight=1", "models.x.weight=1", "method.density.x=1"]
)
def test_an_override_without_a_place_is_refused(override: str) -> None:
    with pytest.raises(RecipeError, match=r"--set: .*"):
        parse(YAML, overrides=[override])


def test_a_wrong_override_is_refused_as_the_field_itself_would_be() -> None:
    with pytest.raises(RecipeError, match=r"method\.densty: unknown key; did you mean 'density'\?"):
        parse(YAML, overrides=["method.densty=0.4"])


def test_a_problem_tells_the_line_of_the_file_or_the_override() -> None:
    text = "base: b\nmodels:\n  - a\n  - path: c\n    wieght: 2\nmethod: ties\noutput: o\n"
    with pytest.raises(RecipeError) as refusal:
        parse(text, "r.yaml", ["run.worker=2", "method.density=3"])
    assert {problem.where for problem in refusal.value.problems} == {
        "r.yaml, line 5: models.1.wieght", "--set: run.worker", "--set: method.density",
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"r\.yaml: `base` is missing"):
        parse("models: [a]\nmethod: ties\noutput: o\n", "r.yaml")
    with pytest.raises(RecipeError, match=r"r\.json, line 2: models\.0\.path: "):
        parse('{\n\t"models": [{"path": 3}], "base": "b", "method": "ties", "output": "o"}', "r.json")


def test_recipe_is_what_parse_returns() -> None:
    assert isinstance(parse(YAML), Recipe)
