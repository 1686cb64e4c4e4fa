"""A folder for a while is removed by its process, or by the next one after a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from ties_ray.operations.scratch import ScratchFolder


def test_a_folder_is_removed_with_its_lock(tmp_path: Path) -> None:
    folder = ScratchFolder(str(tmp_path))
    (Path(folder.path) / "file").touch()
    assert len(list(tmp_path.iterdir())) == 2
    folder.remove()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_has_left_is_removed_and_what_a_living_one_uses_stays(tmp_path: Path) -> None:
    text = "import sys; from ties_ray.operations.scratch import ScratchFolder; own = ScratchFolder(sys.argv[1]); "
    text += "open(own.path + '/file', 'w').close(); print(own.path, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", text, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout
        left = Path(process.stdout.readline().strip())
        used = ScratchFolder(str(tmp_path))
        assert (left / "file").exists()
        os.kill(process.pid, signal.SIGKILL)
    last = ScratchFolder(str(tmp_path))
    assert not left.exists()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {Path(used.path).name, Path(last.path).name}
    used.remove()
    last.remove()
    assert not list(tmp_path.iterdir())
