from fnmatch import fnmatchcase

from hypothesis import given
from hypothesis import strategies as st

from ties_ray.tensors import LEAVE_OUT, MOST, exclusion, patterns

LAYERS = [f"model.layers.{layer}.{name}" for layer in range(40) for name in ("norm.bias", "mlp.up.weight")]
WORDS = st.lists(st.sampled_from(["layers", "0", "1", "a[0]", "*", "w?", "bias"]), min_size=1, max_size=4)
NAMES = st.sets(WORDS.map(".".join), max_size=12)


@given(NAMES, NAMES)
def test_patterns_match_all_names_and_none_of_the_others(names: set[str], others: set[str]) -> None:
    others -= names
    found = patterns(names, others)
    assert all(any(fnmatchcase(name, pattern) for pattern in found) for name in names)
    assert not [name for name in others for pattern in found if fnmatchcase(name, pattern)]


def test_layers_are_one_pattern_where_all_are_meant_and_names_where_some_are() -> None:
    every = [name for name in LAYERS if name.endswith("bias")]
    assert patterns(every, set(LAYERS) - set(every)) == ["model.layers.*.norm.bias"]
    assert patterns(every[:1], set(LAYERS) - set(every[:1])) == every[:1]


def test_whole_modules_stand_for_their_many_tensors() -> None:
    assert patterns([f"vision.part{n}.weight" for n in range(50)], LAYERS) == ["vision.*"]


def test_too_many_names_are_not_excluded_but_their_model_left_out() -> None:
    names = [f"own_{number}" for number in range(MOST + 1)]
    assert patterns(names[1:], LAYERS) == names[1:]
    assert exclusion(names, LAYERS, "copies the base's") == LEAVE_OUT
