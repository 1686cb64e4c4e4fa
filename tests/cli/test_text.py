import io
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import RenderableType

from ties_ray.cli import text
from ties_ray.cli.screen import show
from ties_ray.operations.inspection import Inspection, Inspections
from ties_ray.operations.promote import Promotion, Release
from ties_ray.operations.status import RunStatus, Status
from ties_ray.reports.records import (
    Cleaning,
    InputProvenance,
    MergeResult,
    Provenance,
    TrimReport,
    WrittenFile,
)
from ties_ray.state.lease import Holder


def shown(*things: RenderableType) -> str:
    file = io.StringIO()
    show(*things, file=file)
    return file.getvalue()


def trim(model: str, kept: int, parameter: str | None = None, threshold: float = 0.5) -> TrimReport:
    return TrimReport(model=model, parameter=parameter, threshold=threshold, kept=kept, tied=1, size=100)


def result(trims: Sequence[TrimReport] = (), **more: object) -> MergeResult:
    files = [WrittenFile(name="model.safetensors", size=1500, etag="", crc32c="")]
    fields = {"status": "done", "output": "/out/merged", "files": files, "trims": list(trims), **more}
    return MergeResult.model_validate(fields)


def test_of_many_models_the_first_few_are_shown_and_the_rest_counted() -> None:
    printed = shown(*text.of_result(result([trim(str(number), 20 + number) for number in range(100)]), "r.yaml"))
    assert "20.00%" in printed
    assert "27.00%" in printed
    assert "28.00%" not in printed
    assert "and 92 more models" in printed


def test_thresholds_by_tensor_are_one_line_a_model() -> None:
    trims = [trim("a", 10, "x", 0.25), trim("a", 30, "y", 0.75)]
    printed = shown(*text.of_result(result(trims), "r.yaml"))
    assert "0.25 to 0.75" in printed
    assert "20.00%" in printed


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
    printed = shown(*text.of_result(done, "r.yaml"))
    for words in (
        "continued", "4 of them done by the interrupted run", "2 workers lost", "7 requests repeated",
        "5 values of 3: a.weight", "note: model 2: other special tokens", "positive: 1,234",
    ):  # fmt: skip
        assert words in printed
    assert "nothing to do" in shown(*text.of_result(result(reused=True), "r.yaml"))


def test_an_output_in_a_bucket_is_copied_before_it_is_opened() -> None:
    done = result(output="s3://b/out", download_command="aws s3 cp --recursive s3://b/out out", opened_by='load("out")')
    lines = shown(*text.of_result(done, "r.yaml")).splitlines()
    assert lines[-2:] == ["  aws s3 cp --recursive s3://b/out out", '  load("out")']


def test_models_are_told_by_name() -> None:
    models = [
        InputProvenance(id=str(number), uri=uri, weight=1, density=None, licence="", objects=[])
        for number, uri in enumerate(("/m/math", "/m/code"))
    ]
    provenance = ruled("keep").model_copy(update={"models": models})
    done = result([trim("0", 20), trim("1", 30)], zeroed={"1: a.weight": 5}, provenance=provenance)
    printed = shown(*text.of_result(done, "r.yaml"))
    assert re.search(r"^math .*20\.00%", printed, re.MULTILINE)
    assert "5 values of code: a.weight" in printed


def test_a_bucket_is_not_offered_to_transformers_and_names_are_quoted_for_the_shell() -> None:
    assert "from_pretrained" not in shown(*text.of_result(result(output="s3://b/out"), "r.yaml"))
    assert "verify '/out/a b'" in shown(*text.of_result(result(output="/out/a b"), "r.yaml"))


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eelif\r\x08 [bold]x[/bold]"


@pytest.mark.parametrize("terminal", [False, True])
def test_no_name_host_or_note_reaches_the_terminal_as_more_than_text(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Holder.model_construct(token="t", host=HOSTILE, machine="", process="")
    runs = [RunStatus.model_construct(run_id=HOSTILE, generation=1, rounds=[], uploads=[HOSTILE], problem=HOSTILE)]
    release = Release(output=HOSTILE, run_id=HOSTILE, promoted_at=HOSTILE)
    folder = inspection(HOSTILE)
    things = [
        *text.of_status(Status.model_construct(output=HOSTILE, holder=holder, result=None, runs=runs)),
        *text.of_promotion(Promotion(pointer=HOSTILE, changed=True, current=release, previous=release)),
        *text.of_cleaning(Cleaning(output=HOSTILE, removed=True, found=[HOSTILE], notes=[HOSTILE])),
        *text.of_result(result([trim(HOSTILE, 1)], notes=[HOSTILE, "a\nerror: b"], waiting=[HOSTILE]), HOSTILE),
        *text.of_inspections(Inspections(folders=[folder])),
        *text.of_inspections(Inspections(folders=[folder, folder])),
    ]

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setenv("TERM", "xterm-256color")
    file = Screen()
    show(*things, file=file)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()) if terminal else file.getvalue()  # rich's own bold
    assert all(line.isprintable() for line in printed.split("\n"))
    assert printed.count("\\x1b]0;owned") > 8
    assert "[bold]x[/bold]" in printed
    assert "note: a\\nerror: b" in printed


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
