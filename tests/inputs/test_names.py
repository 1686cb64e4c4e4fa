from typing import NamedTuple

import pytest

from ties_ray.inputs.names import model_names, short_names


class Model(NamedTuple):
    id: str
    uri: str


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["/m/math", "/m/code"], ["math", "code"]),
        (["/runs/1/final", "/runs/2/final", "s3://b/x/"], ["1/final", "2/final", "x"]),
        (["/a", "/a"], ["/a", "/a"]),
        (["hf://org/base@0123", "/x/base"], ["org/base", "base"]),
        (["a/b/c", "d/b/c", "e/c"], ["a/b/c", "d/b/c", "e/c"]),
        ([], []),
    ],
)
def test_a_name_is_the_shortest_end_that_no_other_has(uris: list[str], names: list[str]) -> None:
    assert short_names(uris) == names


def test_an_id_that_the_recipe_gives_is_the_name() -> None:
    models = [Model("0", "/m/math"), Model("coder", "/m/code")]
    assert model_names(models) == {"0": "math", "coder": "coder"}


def test_a_thousand_models_get_their_names_at_once() -> None:
    assert short_names([f"s3://pool/team-{n % 7}/run-{n}/final" for n in range(1000)])[999] == "run-999/final"
