import re
import time
import warnings
from contextlib import suppress

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ties_ray.libraries.patterns import MAX_KEY, UnfitKey, resolve

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft.utils.other import get_pattern_key

HOSTILE = [
    "(a*)*b", "(a|a)*c", ".*a.*a.*a.*a.*a.*ab", "(a?){64}b", "(a|a)" * 60 + "b", "a?" * 200 + "b", "(a+)+", "((a+)+)+b",
    "(?x) (a *  ) * b", "(?x)(a+ )\n+ b", "(?x:(a+) +b)", "(a{1,99}){1,99}b", "((((a*)*)*)*)*b", "(.*)*(.*)*(.*)*b",
    "(a+|b+|ab)*c", "(aa|aab?)*c", "(a|a|a|a)*$b", "(a*)(?#x)*b", "(?:a?){65535}b", "(" * 300 + "a*" + ")*" * 300 + "b",
    "[a" * 500, "(a|" * 200 + "a" + ")" * 200, "(?=(a+)+b)a", "(a*)\\1b", "a{,65535}" * 40 + "b", ".*" * 2000 + "b",
    "x" * 100_000, "(" * 5000, "(?:" * 1500 + "a" + ")*" * 1500,
    *("(?:" * depth + "a" + ")*" * depth for depth in range(200, 500, 30)),
]  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE, ids=lambda key: key[:20])
def test_a_hostile_key_takes_no_longer_than_is_allowed(key: str) -> None:
    began = time.monotonic()
    for path in ("model." + "a" * 40, "a" * 200, "a." * 2000):
        with suppress(UnfitKey):
            resolve({key: 1}, [path])
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    "key", ["(?i)a", "(?x)a", "a(?i:b)", "(?x:a)", "(?=a)", "(?<!a)b", "(a)\\1", "(?P<n>a)(?P=n)", "(?>a)", "a*+",
            "\\bq", "a\\Z", "a{,2}", "[[:alpha:]]", "(", "a)(b", "*", "[", "a{2,1}", "(?(1)a|b)", "(?L)a", "(?s:.)",
            "(?-i:a)", "x" * (MAX_KEY + 1), "a.*\ud800_"],
)  # fmt: skip
def test_what_is_not_matched_here_is_refused_and_shown(key: str) -> None:
    with pytest.raises(UnfitKey) as raised:
        resolve({key: 1}, ["model.q"])
    assert str(raised.value) == key


def test_a_class_of_characters_is_refused_for_a_path_with_other_letters() -> None:
    assert resolve({r"q\d+": 1}, ["model.q1"]) == {"model.q1": 1}
    with pytest.raises(UnfitKey):
        resolve({r"q\d+": 1}, ["model.q\u0663"])


def test_half_a_character_in_a_path_is_refused() -> None:
    assert resolve({"q": 1}, ["model.\ud800.q"]) == {"model.\ud800.q": 1}
    with pytest.raises(UnfitKey):
        resolve({"q.*": 1}, ["model.\ud800.q"])


def test_the_first_key_in_the_configs_order_counts() -> None:
    paths = ["model.layers.1.q_proj", "model.layers.10.q_proj", "model.layers.1.k_proj", "q_proj", "xq_proj", "q_projx"]
    keys = {"layers.1.q_proj": 1, ".*1.*_proj": 2, "q_proj": 3, "layers.1.k_proj": 4}
    assert resolve(keys, paths) == {paths[0]: 1, paths[1]: 2, paths[2]: 2, paths[3]: 3}
    assert resolve(dict(reversed(keys.items())), paths) == {paths[0]: 3, paths[1]: 3, paths[2]: 4, paths[3]: 3}


def test_a_path_that_matches_no_key_is_its_own() -> None:
    assert resolve({"a+b": 1}, ["a+b"]) == {"a+b": 1}


def test_an_entry_for_each_of_many_modules_is_looked_up_at_once() -> None:
    paths = [
        f"model.layers.{layer}.mlp.experts.{expert}.{name}"
        for layer in range(48)
        for expert in range(128)
        for name in ("gate_proj", "up_proj", "down_proj")
    ]
    began = time.monotonic()
    numbers = {path: number for number, path in enumerate(paths)}
    assert resolve(numbers, paths) == numbers
    assert resolve({path.replace(".", r"\."): 1 for path in paths}, paths) == dict.fromkeys(paths, 1)
    assert time.monotonic() - began < 20


TEXT = st.text(st.sampled_from("ab.10_ -"), max_size=9)
CLASS = st.sampled_from(
    ["[ab]", "[^a.]", "[0-9]", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"[\d.]", r"[^\w]", ".", r"\."]
)
ATOM = CLASS | st.sampled_from(["a", "b", "1", ".", "_", "\u00e9", "-", " "])
KEY = st.recursive(
    ATOM | st.sampled_from(["^", "$", r"\A", ""]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0}"])),
    ),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None)
@given(st.lists(KEY, min_size=1, max_size=3), st.lists(TEXT, min_size=1, max_size=4))
def test_keys_match_as_in_peft(keys: list[str], paths: list[str]) -> None:
    pattern = {key: number for number, key in enumerate(keys)}
    try:
        expected = {path: pattern.get(get_pattern_key(list(pattern), path)) for path in paths}
    except re.error:
        assume(False)
    assert resolve(pattern, paths) == {path: number for path, number in expected.items() if number is not None}
