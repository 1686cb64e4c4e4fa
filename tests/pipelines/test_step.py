"""The step contract itself, in this process; the engines' tests drive it through each of them."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ties_ray_pipelines import step
from ties_ray_pipelines.jobs import Jobs, JobsError, Outcome
from ties_ray_pipelines.step import (
    Merge,
    Promote,
    Site,
    Verify,
    compact,
    explain,
    is_new,
    name_of,
    run,
    signs_of_life,
    start,
    verdict,
)

ROOT = Path(__file__).parents[2]
RECORD = {"schema_version": 1, "status": "done", "reused": False}


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Site]:
    """Return how to make a site whose command line is a shell script; $CALLS counts what was called before."""

    def make(script: str) -> Site:
        file, calls = tmp_path / "ties-ray", tmp_path / "calls"
        calls.touch()
        file.write_text(f'#!/bin/sh\nCALLS=$(wc -l < {calls})\necho "$@" >> {calls}\n{script}\n')
        file.chmod(0o755)
        return Site(program=str(file), env={"SECRETLESS": "yes"})

    return make


@pytest.mark.parametrize(
    ("codes", "meaning"),
    [((0,), "done"), ((1, 2, 3, 127), "failed"), ((4, 5, 137), "again"), ((130, 143), "cancelled")],
)
def test_an_exit_code_means_one_thing_to_every_engine(codes: tuple[int, ...], meaning: str) -> None:
    assert {verdict(code) for code in codes} == {meaning}


def test_a_step_hands_on_the_record_and_shows_the_log(program: Callable[[str], Site], tmp_path: Path) -> None:
    site = program(f"cat > {tmp_path}/given; echo $SECRETLESS >&2; cat <<'END'\n{json.dumps(RECORD, indent=2)}\nEND")
    shown: list[str] = []
    command = Merge({"base": "b"}, ("method.density=0.3",), "r.json")
    outcome = run(site, command, "n", show=shown.append)
    assert (outcome.exit_code, outcome.record) == (0, RECORD | {"tried_before": False})
    assert shown == ["yes"]
    assert json.loads((tmp_path / "given").read_text()) == {"base": "b"}
    called = "merge --json --set method.density=0.3 --result r.json -- -"
    assert (tmp_path / "calls").read_text().strip() == called


@pytest.mark.parametrize("recipe", [{"base": "b"}, "base: b\nmodels: [m]", ' {"base": "b"}'])
def test_a_recipe_itself_is_given_as_input_and_travels_with_a_job(recipe: str | dict[str, str]) -> None:
    merge = Merge(recipe)
    text = merge.stdin()
    assert text == (recipe if isinstance(recipe, str) else '{"base":"b"}')
    assert merge.words()[-2:] == ["--", "-"]
    sent, command = shlex.split(merge.entrypoint())[2:4]
    assert (sent, command) == (text, "|")


def test_a_place_is_read_where_the_command_runs() -> None:
    merge = Merge("s3://recipes/a.yaml", ("run.workers=2",))
    assert (merge.words()[-1], merge.stdin()) == ("s3://recipes/a.yaml", "")
    assert merge.entrypoint().endswith(" -- s3://recipes/a.yaml")


def test_a_verification_names_its_output_last() -> None:
    assert Verify("s3://merged/a", 0.25).words() == ["verify", "--json", "--sample", "0.25", "--", "s3://merged/a"]
    assert Verify("--help").entrypoint() == "ties-ray verify --json -- --help"


def test_the_token_of_a_site_is_not_shown() -> None:
    assert "secret" not in repr(Site("http://head:8265", token="secret"))


def test_a_client_takes_the_token_that_is_given_before_that_of_the_environment_and_of_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Jobs("http://head:8265").token is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("ray's\n")
    assert Jobs("http://head:8265").token == "ray's"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "environment's")
    assert Jobs("http://head:8265").token == "environment's"
    assert Jobs("http://head:8265", "given").token == "given"


@pytest.mark.parametrize(("ending", "calls"), [("exit 2", 1), ("exit 1", 1), ("exit 4", 3), ("exit 5", 3)])
def test_only_what_may_help_is_tried_again(
    program: Callable[[str], Site], tmp_path: Path, ending: str, calls: int
) -> None:
    outcome = run(program(f"echo because >&2; {ending}"), Merge("r.yaml"), "n", tries=3, pause=0.01, show=str)
    assert f"exit {outcome.exit_code}" == ending
    assert len((tmp_path / "calls").read_text().splitlines()) == calls
    assert explain(outcome).endswith(": because")


def test_a_killed_step_is_tried_again_and_its_record_says_so(program: Callable[[str], Site]) -> None:
    site = program(
        f"test $CALLS = 0 && kill -9 $$; cat <<'END'\n{json.dumps(RECORD | {'reused': True}, indent=2)}\nEND"
    )
    outcome = run(site, Merge("r.yaml"), "n", tries=2, pause=0.01, show=str)
    assert outcome.record
    assert is_new(outcome.record), "the first try may have ended it and told nobody"
    assert not is_new(outcome.record | {"tried_before": False})


def test_what_can_not_be_started_fails_for_good() -> None:
    outcome = run(Site(program="/no/such/program"), Promote("o", "p"), "n", show=str)
    assert (verdict(outcome.exit_code), outcome.message) == ("failed", "/no/such/program: No such file or directory")
    with pytest.raises(JobsError, match="does not answer"):
        start(Site("http://127.0.0.1:9"), Merge("r.yaml"), "n")


def test_a_cancelled_step_ends_within_three_seconds_even_if_it_does_not_listen(program: Callable[[str], Site]) -> None:
    step = start(program("trap '' TERM; echo up >&2; while :; do sleep 0.1; done"), Merge("r.yaml"), "n")
    began = 0.0

    def cancel(line: str) -> None:
        nonlocal began
        began = time.monotonic()
        step.cancel()

    outcome = step.wait(cancel)
    assert 2.5 < time.monotonic() - began < 4.5
    assert verdict(outcome.exit_code) == "again"


def test_sigterm_to_the_caller_ends_the_step(program: Callable[[str], Site], tmp_path: Path) -> None:
    site = program(f"trap 'touch {tmp_path}/ended; exit 143' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done")
    code = "import sys; from ties_ray_pipelines.step import *; run(Site(program=sys.argv[1]), Merge('r'), 'n')"
    with subprocess.Popen([sys.executable, "-S", "-c", code, site.program], cwd=ROOT / "pipelines" / "core") as caller:
        assert_comes(tmp_path / "up")
        caller.terminate()
        assert caller.wait(10) == 143
    assert_comes(tmp_path / "ended")


def test_what_ends_the_caller_before_it_waits_ends_the_step_too(
    program: Callable[[str], Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = program(f"trap 'touch {tmp_path}/ended; exit 143' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done")

    def interrupted(name: str, show: object) -> None:
        assert_comes(tmp_path / "up")
        raise SystemExit(143)

    started = step.Process(site, Merge("r"), "n")
    monkeypatch.setattr(step, "start", lambda *_: started)
    monkeypatch.setattr(step, "signs_of_life", interrupted)
    with started._process:  # whose pipes nobody closes otherwise, as we live on
        with pytest.raises(SystemExit, match="143"):
            run(site, Merge("r"), "n")
        assert_comes(tmp_path / "ended")
        started._reader.join()


def assert_comes(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def test_names_are_what_ray_takes_and_differ_where_their_parts_do() -> None:
    assert name_of("dag", "run_1", "merge") == "dag-run_1-merge"
    odd = name_of("dag", "manual__2026-11-22T02:15:00+00:00", "merge")
    assert odd.startswith("dag-manual__2026-11-22T02-15-00-00-00-merge-")
    assert len({odd, name_of("dag", "manual__2026-11-22T02:15:00-00:00", "merge"), name_of("d" * 300)}) == 3
    assert len(name_of("d" * 300)) <= 100
    assert name_of("été")[0] != "-"


def test_a_record_is_cut_to_what_a_database_takes_and_says_what_it_lacks() -> None:
    record = RECORD | {"trims": ["x" * 50] * 2000, "provenance": {"models": ["y" * 50] * 1500}}
    kept = compact(record)
    assert (kept["left_out"], kept["status"]) == (["trims", "provenance"], "done")
    assert compact(RECORD) == RECORD


def test_a_step_that_says_nothing_shows_a_sign_of_life() -> None:
    shown: list[str] = []
    with signs_of_life("n", shown.append, every=0.02):
        time.sleep(0.2)
    assert len(shown) > 2
    assert shown[0].startswith("n: 0 s")


def test_an_outcome_explains_itself_by_the_record_first() -> None:
    record = {"error": {"message": "densty: unknown key"}}
    assert explain(Outcome("n", 2, "noise", record)) == "n: failed, exit code 2: densty: unknown key"
