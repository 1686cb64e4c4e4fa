import logging
import time
from pathlib import Path

import pytest

from tests.tools.terminal import Terminal, plain
from ties_ray.cli import progress
from ties_ray.cli.progress import Display, Lines, Notebook, shown_in
from ties_ray.kernels import code_folders
from ties_ray.reports.records import Progress

LOG = logging.getLogger("tests.progress")


def test_a_line_comes_once_a_stage_and_not_with_every_report(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    with Lines(LOG) as lines:
        for done in range(50):
            lines(Progress("merge", done, 50, done * 10**9, 50 * 10**9, activity="merging"))
        lines(Progress("publish", 0, 1, 50 * 10**9, 50 * 10**9))
    assert [message.partition(":")[0] for message in caplog.messages] == ["merge", "publish"]
    assert caplog.messages[0].startswith("merge: merging, 0 of 50, 0 bytes of 50.0 GB read, after ")
    caplog.clear()
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    with Lines(LOG) as lines:
        lines(Progress("merge", 1, 50, 0, 1))
        lines(Progress("merge", 2, 50, 0, 1))
    assert sum("of 50" in message for message in caplog.messages) >= 2


def test_lines_go_on_where_nothing_is_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.05)
    with Lines(LOG) as lines:
        lines(Progress("start", 0, 0, 0, 9, activity="starting"))
        deadline = time.monotonic() + 20
        while len(caplog.messages) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert all(message.startswith("start: starting, 0 of 9 bytes read, after ") for message in caplog.messages)


def test_an_event_is_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Lines(LOG) as lines:
        lines(Progress("merge", 0, 9, 0, 0))
        lines(Progress("", 0, 0, 0, 0, event="worker 3 was lost: \x1b[31mkilled"))
        lines(Progress("merge", 1, 9, 0, 0))
    assert caplog.messages[1:] == ["worker 3 was lost: \\x1b[31mkilled"]


def test_the_rate_does_not_count_the_start(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    state = progress._State()
    for now[0], report in (
        (0.0, Progress("start", 0, 0, 0, 10**9)),
        (1000.0, Progress("merge", 0, 4, 0, 10**9)),
        (1001.0, Progress("merge", 1, 4, 10**8, 10**9)),
    ):
        state.take(report)
    assert state.rate == 10**8
    assert "9.0 s left" in state.facts()


def test_a_long_start_says_that_kernels_are_compiled_where_none_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "COMPILES_AFTER", 0.0)
    monkeypatch.setattr(code_folders, "own", lambda: tmp_path)
    monkeypatch.setattr(code_folders, "BESIDE", tmp_path)
    for title in ("starting (the first start on a machine compiles kernels)", "starting"):
        state = progress._State()
        state.take(Progress("start", 0, 0, 0, 0, activity="starting"))
        (tmp_path / "cpu._product-1.compiled").touch()  # the first of many
        time.sleep(0.01)
        assert state.title == title


def test_a_merge_without_a_worker_says_first_how_long_it_has_waited_for_a_place() -> None:
    state = progress._State()
    state.take(Progress("merge", 3, 9, 10, 20, workers=2, workers_missing=1, workers_lost=1))
    assert "1 of 2 workers" in state.facts()
    state.take(Progress("merge", 3, 9, 10, 20, workers=2, workers_missing=2, workers_lost=2, waiting_seconds=75.0))
    assert state.facts()[0] == "0 of 2 workers, waiting for a place for 1 min 15 s"
    assert "2 lost" in state.facts()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_terminal_shows_the_stage_in_two_lines_that_fit(columns: int) -> None:
    file = Terminal()
    full = Progress(
        "threshold, high bits", 31_234, 99_999, 10**12, 2 * 10**12, bytes_written=10**9, activity="counting",
        workers=128, workers_lost=3, seconds_left=4000.0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        with Display(file) as display:
            display(full)
            display(Progress("", 0, 0, 0, 0, event="worker 3 was lost"))
            time.sleep(0.6)  # it is drawn four times a second
    lines = plain(file.getvalue())
    assert all(len(line) <= columns for line in lines)
    assert any("counting" in line for line in lines)
    assert "worker 3 was lost" in [line.strip() for line in lines]
    if columns >= 80:
        assert any("31,234 of 99,999" in line for line in lines)
        assert any("1.0 of 2.0 TB read" in line and "1 h 06 min left" in line for line in lines)
    if columns == 200:
        assert any("128 workers" in line and "3 lost" in line and "1.0 GB written" in line for line in lines)


def test_a_notebook_shows_the_stage_as_text_that_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(Notebook, "_show", lambda self, text: shown.append(text))
    notebook = Notebook()
    notebook(Progress("merge", 3, 9, 10**9, 2 * 10**9, activity="merging"))
    notebook(Progress("", 0, 0, 0, 0, event="worker <script> was lost"))
    assert shown[0].startswith('<progress value="3" max="9"></progress> merging · 3 of 9 · 1.0 of 2.0 GB read')
    assert "worker &lt;script&gt; was lost" in shown[1]


def test_what_is_no_terminal_gets_lines(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        assert isinstance(shown_in(file, LOG), Lines)
    assert isinstance(shown_in(Terminal(), LOG), Display)
