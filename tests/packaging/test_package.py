"""The wheels hold what they should, and work in environments of their own.

They are built from copies of the tracked files, without the network. The environment of `ties-ray` is fresh. It borrows
the dependencies of this one, but not its editable ties_ray, by a line in a .pth file. That of `ties-ray-pipelines` has
the standard library alone. Whether pip can resolve the dependencies is shown by `make .venv/installed`, and of the
packages for workflow engines by `make pipelines`.
"""

import ast
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from tests.tools.families import make_family
from ties_ray.stores import Stores

ROOT = Path(__file__).parents[2]
PROVIDED_BY = {
    "azure": "adlfs", "google_crc32c": "google-crc32c", "grpc": "ray", "llvmlite": "numba", "pydantic_core": "pydantic",
    "lm_eval": "lm-eval", "re2": "google-re2", "ruamel": "ruamel.yaml", "ties_ray_pipelines": "ties-ray-pipelines",
    "typing_extensions": "pydantic",
}  # fmt: skip
"""The distributions of modules with other names. numba, pydantic, adlfs and Ray's client need what they bring."""
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
"""What a user of the package has: no PYTHONPATH."""


MADE = ("PKG-INFO", "setup.cfg")
"""Files of an sdist that setuptools makes."""


class Built(NamedTuple):
    """What a build makes."""

    sdist: Path
    wheel: Path

    def of_sdist(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def of_wheel(self) -> set[str]:
        with ZipFile(self.wheel) as archive:
            return set(archive.namelist())


def build(source: Path, folder: Path) -> Built:
    """Build an sdist of tracked files, and a wheel of that sdist."""
    copy = folder / "source"
    for name in tracked(source):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return Built(sdist, wheel)


def tracked(folder: Path) -> list[str]:
    listed = subprocess.check_output(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=folder)
    return [name for name in listed.decode().splitlines() if (folder / name).is_file()]


def environment(folder: Path, wheel: Path, *borrowed: str) -> Path:
    """Make a virtual environment with a wheel in it; return its folder of commands. borrowed: paths to import from."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    place = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(place.strip()) / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "bin"


def of_dist_info(wheel: Path, name: str) -> str:
    """Return a file of a wheel's metadata; empty where it has none."""
    with ZipFile(wheel) as archive:
        return "".join(
            archive.read(file).decode() for file in archive.namelist() if file.endswith(f".dist-info/{name}")
        )


def requirements_of(wheel: Path) -> list[Requirement]:
    metadata = email.message_from_string(of_dist_info(wheel, "METADATA"))
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def folders(files: set[str]) -> set[str]:
    """Return the folders that hold files."""
    return {str(folder) for name in files for folder in Path(name).parents} | {""}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(ROOT, tmp_path_factory.mktemp("ties-ray"))


@pytest.fixture(scope="module")
def installed(ours: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("environment"), ours.wheel, sysconfig.get_path("purelib"))


def of_engine(name: str, folder: Path) -> Built:
    """Build one of the packages in `pipelines`, and look that it holds all that is its own."""
    built = build(ROOT / "pipelines" / name, folder)
    package = {file for file in tracked(ROOT / "pipelines" / name) if file.startswith("ties_ray_")}
    beside = built.of_wheel() - package
    assert package <= built.of_wheel() & built.of_sdist()
    assert all(".dist-info/" in file for file in beside), beside
    assert any(file.endswith("licenses/LICENSE") for file in beside)
    return built


def test_the_wheel_holds_the_package_and_nothing_else(ours: Built) -> None:
    package = {name for name in tracked(ROOT) if name.startswith("ties_ray/")}
    assert {"ties_ray/py.typed", "ties_ray/libraries/conversions.json"} <= package
    beside = ours.of_wheel() - package
    assert not package - ours.of_wheel()
    assert all(".dist-info/" in name for name in beside), beside
    assert any(name.endswith("licenses/LICENSE") for name in beside)


def test_the_sdist_holds_what_the_repository_holds(ours: Built) -> None:
    files, repository = ours.of_sdist(), {name for name in tracked(ROOT) if name != ".gitignore"}
    assert {"Makefile", "constraints.txt", "docs/guide/first-merge.md", "tests/conftest.py"} <= repository
    assert not repository - files
    assert all(name.startswith("ties_ray.egg-info/") for name in files - repository - folders(files) - {*MADE})


def test_the_extras_are_there_and_take_the_versions_that_are_tested(ours: Built) -> None:
    extras = email.message_from_string(of_dist_info(ours.wheel, "METADATA")).get_all("Provides-Extra", [])
    assert {"hf", "gcs", "azure", "gpu", "report"} <= set(extras)
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    tested = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    needs = [(need.name.lower().replace("_", "-"), need.specifier) for need in requirements_of(ours.wheel)]
    assert not [(name, tested[name]) for name, range_ in needs if name in tested and tested[name] not in range_]
    assert {name for name, _ in needs if name not in tested} <= {"adlfs", "gcsfs", "lm-eval", "ties-ray-pipelines"}, (
        "never tested"
    )


def test_every_module_that_is_imported_belongs_to_a_declared_dependency() -> None:
    imported: set[str] = set()
    for file in (ROOT / "ties_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"ties_ray"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [requirement for name in extras if name != "dev" for requirement in extras[name]]
    requirements = [*project["dependencies"], *optional]
    declared = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}
    found = {PROVIDED_BY.get(module, module).lower() for module in foreign}
    assert found - declared <= {"pytest", "ipython"}, "ties_ray.testing needs pytest; a notebook has IPython"


def test_the_installed_package_merges(installed: Path, tmp_path: Path) -> None:
    where = "import ties_ray; print(ties_ray.__file__)"
    place = subprocess.check_output([installed / "python", "-c", where], cwd=tmp_path, env=ENVIRONMENT, text=True)
    assert place.startswith(str(installed.parent)), place
    told = subprocess.check_output([installed / "ties-ray", "--version"], cwd=tmp_path, env=ENVIRONMENT, text=True)
    assert told.split()[-1] == importlib.metadata.version("ties-ray")
    family = make_family(Stores({}).of("/"), str(tmp_path / "family"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{{base: {family.base}, models: [{tmp_path}/family/model-*], method: ties, output: merged}}")
    command = [installed / "ties-ray", "merge", recipe, "--set", "run.executor=local"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_the_steps_of_workflow_engines_need_the_standard_library_alone(tmp_path: Path) -> None:
    commands = environment(tmp_path / "environment", of_engine("core", tmp_path / "core").wheel)
    for module in ("step", "jobs"):
        subprocess.run([commands / "python", "-I", "-c", f"import ties_ray_pipelines.{module}"], check=True)
    assert "--address" in subprocess.check_output([commands / "ties-ray-job", "--help"], env=ENVIRONMENT, text=True)


@pytest.mark.parametrize("engine", ["airflow", "dagster", "kfp"])
def test_the_package_for_an_engine_takes_ranges_that_hold_what_is_tested(engine: str, tmp_path: Path) -> None:
    wheel = of_engine(engine, tmp_path).wheel
    needs, points = requirements_of(wheel), of_dist_info(wheel, "entry_points.txt")
    tested = dict(line.split("==") for line in (ROOT / f"pipelines/{engine}/constraints.txt").read_text().split("\n")
                  if "==" in line)  # fmt: skip
    core = tomllib.loads((ROOT / "pipelines/core/pyproject.toml").read_text())["project"]
    tested[core["name"]] = core["version"]
    assert all(need.specifier.contains(tested[need.name]) for need in needs)
    assert {need.name for need in needs if "<" not in str(need.specifier)} <= {"setuptools"}
    assert ("apache_airflow_provider" in points) == (engine == "airflow")
