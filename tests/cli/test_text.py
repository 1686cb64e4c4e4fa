import io
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import RenderableType

from ties_ray.cli import text
from ties_ray.operations.inspection import Inspection, Inspections
from ties_ray.operations.promote import Promotion, Release
from ties_ray.operations.status import RunStatus, Status
from ties_ray.reports.records import (
    Cleaning,
    InputProvenance,
    MergeResult,
    Progress,
    Provenance,
    TrimReport,
    WrittenFile,
)
from ties_ray.state.lease import Holder


def shown(*things: RenderableType) -> str:
    file = io.StringIO()
    text.show(*things, file=file)
    return file.getvalue()


def trim(model: str, kept: int, parameter: str | None = None, threshold: float = 0.5) -> TrimReport:
    return TrimReport(model=model, parameter=parameter, threshold=threshold, kept=kept, tied=1, size=100)


def result(trims: Sequence[TrimReport] = (), **more: object) -> MergeResult:
    files = [WrittenFile(name="model.safetensors", size=1500, etag="", crc32c="")]
    fields = {"status": "done", "output": "/out/merged", "files": files, "trims": list(trims), **more}
    return MergeResult.model_validate(fields)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (16_060_522_000, "16.1 GB"), (3.2e15, "3,200.0 TB")],
)
def test_sizes_are_said_in_decimal_units(value: float, words: str) -> None:
    assert text.num_bytes(value) == words


@pytest.mark.parametrize(("value", "words"), [(4226, "4,226"), (22.7e6, "22.70 M"), (8_030_261_248, "8.03 B")])
def test_counts_are_said_in_short(value: float, words: str) -> None:
    assert text.num(value) == words


@pytest.mark.parametrize(("seconds", "words"), [(0.62, "0.6 s"), (61.2, "1 min 01 s"), (7503, "2 h 05 min")])
def test_time_spans_are_said_in_hours_minutes_seconds(seconds: float, words: str) -> None:
    assert text.duration(seconds) == words


def test_of_many_models_the_first_few_are_shown_and_the_rest_counted() -> None:
    told = shown(*text.of_result(result([trim(str(number), 20 + number) for number in range(100)]), "r.yaml"))
    assert "20.00%" in told
    assert "27.00%" in told
    assert "28.00%" not in told
    assert "and 92 more models" in told


def test_thresholds_by_tensor_are_one_line_a_model() -> None:
    trims = [trim("a", 10, "x", 0.25), trim("a", 30, "y", 0.75)]
    told = shown(*text.of_result(result(trims), "r.yaml"))
    assert "0.25 to 0.75" in told
    assert "20.00%" in told


def ruled(at_threshold: str) -> Provenance:
    base = InputProvenance(id="base", uri="/base", weight=1, density=None, licence="", objects=[])
    versions = dict.fromkeys(("ties_ray", "python", "torch", "numba", "ray", "arithmetic"), "1")
    return Provenance(method={"name": "ties", "at_threshold": at_threshold}, base=base, models=[], **versions)


@pytest.mark.parametrize("rule", ["keep", "drop"])
def test_where_the_threshold_is_zero_all_but_the_zeros_are_kept_by_any_rule(rule: str) -> None:
    trims = [TrimReport(model="a", parameter=None, threshold=0, kept=55, tied=45, size=100)]
    assert "55.00%" in shown(*text.of_result(result(trims, provenance=ruled(rule)), "r.yaml"))


def test_a_summary_tells_what_was_lost_repeated_zeroed_and_noted() -> None:
    done = result(
        resumed=True, shards=9, shards_done_before=4, workers_lost=2, retries=7, zeroed={"3: a.weight": 5},
        notes=["model 2: other special tokens"], statistics={"positive": 1234},
    )  # fmt: skip
    told = shown(*text.of_result(done, "r.yaml"))
    for words in (
        "continued", "4 of them done by the interrupted run", "2 workers lost", "7 requests repeated",
        "5 values of 3: a.weight", "note: model 2: other special tokens", "positive: 1,234",
    ):  # fmt: skip
        assert words in told
    assert "nothing to do" in shown(*text.of_result(result(reused=True), "r.yaml"))


def test_a_bucket_is_not_offered_to_transformers_and_names_are_quoted_for_the_shell() -> None:
    assert "from_pretrained" not in shown(*text.of_result(result(output="s3://b/out"), "r.yaml"))
    assert "verify '/out/a b'" in shown(*text.of_result(result(output="/out/a b"), "r.yaml"))


def test_long_lines_are_not_broken_and_brackets_are_no_markup_off_a_terminal(tmp_path: Path) -> None:
    name = "[bold]" + "x" * 300
    assert shown(f"note: {name}") == f"note: {name}\n"


def test_lines_come_once_a_stage_and_not_with_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    with text.Lines(file) as lines:
        for done in range(50):
            lines(Progress("merge", done, 50, done * 10**9, 50 * 10**9))
        lines(Progress("publish", 0, 1, 50 * 10**9, 50 * 10**9))
    told = file.getvalue().splitlines()
    assert [line.partition(":")[0] for line in told] == ["merge", "publish"]
    assert "0 of 50, 0 bytes of 50.0 GB read" in told[0]
    monkeypatch.setattr(text, "EVERY_SECONDS", 0.0)
    with text.Lines(file) as lines:
        lines(Progress("merge", 1, 50, 0, 1))
        lines(Progress("merge", 2, 50, 0, 1))
    assert len(file.getvalue().splitlines()) == 4


def test_a_bar_shows_the_stage_at_hand() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    with text.Bar(file) as bar:
        bar(Progress("merge", 3, 9, 10**9, 2 * 10**9))
        time.sleep(0.3)  # it is drawn ten times a second
    assert "merge" in file.getvalue()
    assert "3 of 9, 1.0 GB of 2.0 GB read" in file.getvalue()


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eelif\r\x08 [bold]x[/bold]"


@pytest.mark.parametrize("terminal", [False, True])
def test_no_name_host_or_note_reaches_the_terminal_as_more_than_text(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Holder.model_construct(token="t", host=HOSTILE, machine="", process="")
    runs = [RunStatus.model_construct(run_id=HOSTILE, generation=1, rounds=[], uploads=[HOSTILE], problem=HOSTILE)]
    release = Release(output=HOSTILE, run_id=HOSTILE, promoted_at=HOSTILE)
    seen = inspection(HOSTILE)
    things = [
        *text.of_status(Status.model_construct(output=HOSTILE, holder=holder, result=None, runs=runs)),
        *text.of_promotion(Promotion(pointer=HOSTILE, changed=True, current=release, previous=release)),
        *text.of_cleaning(Cleaning(output=HOSTILE, removed=True, found=[HOSTILE], notes=[HOSTILE])),
        *text.of_result(result([trim(HOSTILE, 1)], notes=[HOSTILE, "a\nerror: b"], waiting=[HOSTILE]), HOSTILE),
        *text.of_inspections(Inspections(folders=[seen])),
        *text.of_inspections(Inspections(folders=[seen, seen])),
    ]

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setenv("TERM", "xterm-256color")
    file = Screen()
    text.show(*things, file=file)
    told = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()) if terminal else file.getvalue()  # rich's own bold
    assert all(line.isprintable() for line in told.split("\n"))
    assert told.count("\\x1b]0;owned") > 8
    assert "[bold]x[/bold]" in told
    assert "note: a\\nerror: b" in told


@given(st.text(st.characters() | st.sampled_from("\x1b\x9b\x07\r\u202e\u2066"), max_size=30))
def test_any_text_is_shown_in_visible_characters(name: str) -> None:
    assert all(
        line.isprintable()
        for line in shown(name, *text.of_inspections(Inspections(folders=[inspection(name)]))).split("\n")
    )


def inspection(name: str) -> Inspection:
    plain = {key: name for key in ("uri", "architecture", "licence")}
    return Inspection.model_validate(
        {**plain, "format": name, "tensors": 1, "parameters": 1, "dtypes": {name: 1}, "files": [name], "size": 1,
         "tokenizer": [name], "facts": {"base_name": name, name: name}}
    )  # fmt: skip
