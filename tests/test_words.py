from pathlib import Path

import pytest

from tests.tools.words import faults_of, files


def test_the_rooms_that_hold_the_rules_of_words_have_no_fault() -> None:
    assert not [str(fault) for path in files([]) for fault in faults_of(path)]


LONG = "word " * 25 + "word."


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        (f'"""{LONG}"""', "long"),
        (f'def f() -> None:\n    """Short. {LONG}"""', "long"),
        (f"x = 1  # {LONG}", "long"),
        (f"# {LONG[:60]}\n# {LONG[60:]}\nx = 1", "long"),
        (f'option("--x", help="{LONG}")', "long"),
        ('SIZE = 3\n"""Of a worker."""', "preposition"),
        ('option("--x", help="Of all that is made.")', "preposition"),
        ('SIZE = 3\n"""... and of a pod."""', "continued"),
        ("def f(what: str) -> None: ...", "name"),
        ("for one in range(3): ...", "name"),
    ],
)
def test_a_fault_is_named_by_its_rule(code: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(code)
    assert [fault.rule for fault in faults_of(tmp_path / "code.py")] == [rule]


@pytest.mark.parametrize(
    "code",
    [
        f'"""{LONG[:-6]}. {LONG[:-6]}."""',
        f'"""Short.\n\nText.\n\n    {LONG}\n"""',
        f'"""Short.\n\n\\b\n{LONG}\n"""',
        "# Of a worker, in bytes\nsize = 3",
        "class Finding:\n    what: str",
    ],
)
def test_short_sentences_examples_and_fields_are_no_fault(code: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(code)
    assert not list(faults_of(tmp_path / "code.py"))
