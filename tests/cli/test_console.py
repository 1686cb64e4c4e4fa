import json
import logging
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner, Result

from ties_ray.cli.console import Console, complain, log
from ties_ray.errors import InputError, Problem
from ties_ray.reports.records import Progress


def run(command: Callable[[Console], int], *, quiet: bool = False, json_log: bool = False) -> Result:
    """Return what a command prints that has a console of its own."""

    @click.command()
    @click.pass_context
    def main(context: click.Context) -> None:
        console = Console(json=False, quiet=quiet, debug=False, json_log=json_log)
        context.exit(console.run(lambda: command(console)))

    return CliRunner().invoke(main, [])


def merge(console: Console, *, json_lines: bool) -> int:
    with console.progress(json_lines=json_lines) as watch:
        log.info("plan: reading headers")
        watch(Progress("merge", 1, 2, 500, 1000, activity="merging"))
    raise InputError(Problem("s3://m/7", "is gone", "bring it back", "gone"))


def test_the_log_is_lines_for_people_on_standard_error() -> None:
    done = run(lambda console: merge(console, json_lines=False))
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "plan: reading headers",
        "merge: merging, 1 of 2, 500 bytes of 1.0 kB read, after 0.0 s",
        "error: s3://m/7: is gone [gone]; bring it back",
    ]
    assert done.exit_code == 3


@pytest.mark.parametrize("quiet", [False, True])
def test_the_log_is_json_lines_where_the_recipe_says_so(quiet: bool) -> None:
    done = run(lambda console: merge(console, json_lines=True), quiet=quiet)
    note, progress, error = map(json.loads, done.stderr.splitlines())
    assert (note["level"], note["message"]) == ("info", "plan: reading headers")
    assert (progress["stage"], progress["done"], progress["bytes_planned"]) == ("merge", 1, 1000)
    assert (error["level"], error["where"], error["code"]) == ("error", "s3://m/7", "gone")


def test_every_line_of_the_log_is_json_where_the_command_line_says_so() -> None:
    done = run(lambda console: merge(console, json_lines=False), json_log=True)
    note, progress, error = map(json.loads, done.stderr.splitlines())
    assert note["message"] == "plan: reading headers"
    assert (progress["stage"], progress["activity"], progress["seconds_left"]) == ("merge", "merging", None)
    assert error["remedy"] == "bring it back"
    quiet = run(lambda console: merge(console, json_lines=False), quiet=True, json_log=True)
    assert [json.loads(line)["level"] for line in quiet.stderr.splitlines()] == ["error"]


def test_a_quiet_command_logs_errors_only() -> None:
    done = run(lambda console: merge(console, json_lines=False), quiet=True)
    assert done.stderr.splitlines() == ["error: s3://m/7: is gone [gone]; bring it back"]


def test_no_text_breaks_or_colours_a_line_of_the_log() -> None:
    def command(console: Console) -> int:
        log.info("sample: \x1b[31mred")
        complain(Problem("a\nerror: b", "\x1b[31mred"))
        return 0

    assert run(command).stderr.splitlines() == ["sample: \\x1b[31mred", "error: a error: b: \\x1b[31mred"]


def test_the_log_of_a_program_is_as_before_after_a_command() -> None:
    before = (list(log.handlers), log.level, log.propagate)
    run(lambda console: merge(console, json_lines=True))
    assert (log.handlers, log.level, log.propagate) == before
    assert log.getEffectiveLevel() == logging.WARNING


def test_a_signal_that_cuts_an_import_in_half_keeps_its_exit_code() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    def broken() -> int:
        raise InputError(Problem("a", "is missing"))

    def half_imported(error: Exception) -> None:
        raise ImportError("of a module that was half imported")

    console = Console(json=False, quiet=True, debug=False)
    console.on_failure = half_imported
    assert console.run(interrupted) == 130
    with pytest.raises(ImportError):
        console.run(broken)
