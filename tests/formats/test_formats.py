"""What a format has to say, and what it need not."""

import pytest

from ties_ray.formats import Composed, Format, Rules
from ties_ray.tensors import Read, Source

SOURCE = Source(())


class Sum(Composed):
    """The least that a composed format says."""

    name = "sum"

    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return no range."""
        return ()

    def encoded(self, source: Source, start: int, stop: int, buffers: object) -> None:  # type: ignore[override]
        """Return nothing."""


def test_a_format_must_say_what_it_recognises_wants_reads_and_makes_of_it() -> None:
    assert Format.__abstractmethods__ == {"recognises", "wanted", "read", "reads", "encoded"}
    with pytest.raises(TypeError, match="abstract"):
        Composed()  # type: ignore[abstract]


def test_what_a_format_does_not_say_costs_no_memory_and_asks_nothing() -> None:
    form = Sum()
    assert (form.rank(SOURCE), form.decoded_bytes(SOURCE), form.widened(SOURCE)) == (0, 0, 0)
    assert form.needs(SOURCE) == "slice"
    assert not form.recognises(["model.safetensors"])
    assert not form.on_any_device


def test_rules_allow_nothing_by_themselves() -> None:
    assert Rules() == Rules((), False, False, False, False, (), (), ())
