import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import tool


def completed(words: str, *, shell: str = "bash", **environment: str) -> list[str]:
    """Return what the shell is offered for the last of these words, each as `type,value`."""
    variables = {
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_TIES_RAY_COMPLETE": f"{shell}_complete",
    }
    done = subprocess.run([tool("ties-ray")], env=os.environ | variables | environment, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    "words",
    [
        "merge ", "merge rec", "plan ", "status out", "verify ", "clean ", "inspect ./m", "promote out ",
        "rollback cur", "deploy kuberay ", "merge recipe.yaml --result ", "merge recipe.yaml --profile pro",
    ],
)  # fmt: skip
def test_paths_are_left_to_the_shell(words: str) -> None:
    assert completed(f"ties-ray {words}") == [f"file,{words.rpartition(' ')[2]}"]


def test_bash_completes_files_fields_and_methods_at_the_press_of_a_key(tmp_path: Path) -> None:
    (tmp_path / "recipe-of-the-night.yaml").touch()
    environment = {"PATH": f"{Path(tool('ties-ray')).parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "PS1": "$ "}
    terminal, inside = pty.openpty()
    command = ["bash", "--norc", "--noprofile", "-i"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=inside, stdout=inside, stderr=inside, env=os.environ | environment,
        start_new_session=True,
    ) as shell:  # fmt: skip
        os.close(inside)
        os.write(terminal, b'eval "$(_TIES_RAY_COMPLETE=bash_source ties-ray)"; echo is re""ady\n')
        _read_until(terminal, b"is ready")
        os.write(terminal, b"ties-ray merge rec\t")
        _read_until(terminal, b"ties-ray merge recipe-of-the-night.yaml ")
        os.write(terminal, b"\x15ties-ray merge r.yaml --set allow.miss\t")  # the first key deletes the line
        _read_until(terminal, b"--set allow.missing=zero ")
        os.write(terminal, b"\x15ties-ray methods breadc\t")
        _read_until(terminal, b"ties-ray methods breadcrumbs ")
        os.write(terminal, b"\x15exit\n")
        shell.wait(30)
    os.close(terminal)


def _read_until(terminal: int, expected: bytes) -> None:
    output, deadline = b"", time.monotonic() + 30
    while expected not in output:
        assert time.monotonic() < deadline, output
        if select.select([terminal], [], [], 1.0)[0]:
            output += os.read(terminal, 4096)


def test_methods_complete_with_those_of_plugins() -> None:
    offered = completed("ties-ray methods ", TIES_RAY_PLUGINS=str(Path(__file__).parents[1] / "plugins"))
    assert {"plain,ties", "plain,average", "plain,plain_ties"} <= set(offered)
    assert completed("ties-ray methods da") == ["plain,dare"]


def test_fields_of_a_recipe_complete_with_their_choices_or_defaults() -> None:
    assert completed("ties-ray merge recipe.yaml --set run.dev") == ["plain,run.device=cpu", "plain,run.device=cuda"]
    assert "plain,method.density=0.2" in completed("ties-ray merge recipe.yaml --set method.dens")
    assert completed("ties-ray merge recipe.yaml --set method.at_thr") == [
        f"plain,method.at_threshold={choice}" for choice in ("drop", "exact", "keep")
    ]
    assert completed("ties-ray merge recipe.yaml --set run.disk_c") == ["plain,run.disk_cache=16.0GiB"]
    assert "plain,storage.s3.endpoint_url=" in completed("ties-ray status out --set storage.")
    assert {"plain,output.kind=adapter", "plain,output.kind=checkpoint"} <= set(completed("ties-ray plan r --set out"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: str) -> None:
    environment = os.environ | {"_TIES_RAY_COMPLETE": f"{shell}_source"}
    done = subprocess.run([tool("ties-ray")], env=environment, capture_output=True, text=True, check=True)
    assert f"_TIES_RAY_COMPLETE={shell}_complete" in done.stdout
