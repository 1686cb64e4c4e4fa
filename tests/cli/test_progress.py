import io
import logging
import time

import pytest

from ties_ray.cli import progress
from ties_ray.cli.progress import Bar, Lines
from ties_ray.reports.records import Progress


def test_a_line_comes_once_a_stage_and_not_with_every_event(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("tests.progress")
    caplog.set_level(logging.INFO)
    with Lines(log) as lines:
        for done in range(50):
            lines(Progress("merge", done, 50, done * 10**9, 50 * 10**9))
        lines(Progress("publish", 0, 1, 50 * 10**9, 50 * 10**9))
    assert [message.partition(":")[0] for message in caplog.messages] == ["merge", "publish"]
    assert "0 of 50, 0 bytes of 50.0 GB read" in caplog.messages[0]
    caplog.clear()
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    with Lines(log) as lines:
        lines(Progress("merge", 1, 50, 0, 1))
        lines(Progress("merge", 2, 50, 0, 1))
    assert len(caplog.messages) == 2


def test_a_bar_shows_the_current_stage() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    with Bar(file) as bar:
        bar(Progress("merge", 3, 9, 10**9, 2 * 10**9))
        time.sleep(0.3)  # it is drawn ten times a second
    assert "merge" in file.getvalue()
    assert "3 of 9, 1.0 GB of 2.0 GB read" in file.getvalue()
