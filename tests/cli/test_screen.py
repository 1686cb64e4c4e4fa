import io

import pytest

from ties_ray.cli.screen import duration, num, num_bytes, show


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (16_060_522_000, "16.1 GB"), (3.2e15, "3,200.0 TB")],
)
def test_sizes_are_said_in_decimal_units(value: float, words: str) -> None:
    assert num_bytes(value) == words


@pytest.mark.parametrize(("value", "words"), [(4226, "4,226"), (22.7e6, "22.70 M"), (8_030_261_248, "8.03 B")])
def test_counts_are_said_in_short(value: float, words: str) -> None:
    assert num(value) == words


@pytest.mark.parametrize(("seconds", "words"), [(0.62, "0.6 s"), (61.2, "1 min 01 s"), (7503, "2 h 05 min")])
def test_time_spans_are_said_in_hours_minutes_seconds(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_long_lines_are_not_broken_and_brackets_are_no_markup_off_a_terminal() -> None:
    name, file = "[bold]" + "x" * 300, io.StringIO()
    show(f"note: {name}", file=file)
    assert file.getvalue() == f"note: {name}\n"
