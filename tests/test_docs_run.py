"""The code blocks of the documentation are run, page by page, as a reader would run them.

A page has a folder of its own. `ties-ray` is the real command, which merges in its own process instead of on Ray. The
buckets that the pages name lie on an S3 server of the tests. A recipe goes into `recipe.yaml`, and Python goes into the
file that the text before it names, if it does.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch

import ties_ray
from benchmarks.family import write_family
from tests.conftest import Bucket, tool
from tests.tools.adapters import make_pool
from tests.tools.families import write_checkpoint
from tests.tools.pages import PAGES, ROOT, Block, blocks
from ties_ray.reports.records import plan_record
from ties_ray.stores import Stores

RUN = {
    page for page in PAGES if any(block.language in ("bash", "python") and not block.why_not for block in blocks(page))
}
BASE, FINE_TUNES, ADAPTERS = "llama-3.1-8b", ("math", "code", *(f"team-{number:02}" for number in range(11))), 4
NAMED_FILE = re.compile(r"the file `([^`]+)`:?\s*$")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the buckets of the pages hold: a base, fine-tunes and adapters of it."""
    folder, store = tmp_path_factory.mktemp("models"), Stores({}).of("/")
    pool = make_pool(store, str(folder / "adapters"), num_adapters=ADAPTERS)
    config = (folder / "adapters/base/config.json").read_bytes()
    for file in folder.glob("adapters/*/adapter_config.json"):
        file.write_text(file.read_text().replace("tests/llama", f"meta-llama/{BASE}"))
    for number, name in enumerate((BASE, *FINE_TUNES, "team-x-draft")):
        generator = torch.Generator().manual_seed(number)
        moved = {
            key: value + (number > 0) * 1e-3 * torch.randn(value.shape, generator=generator)
            for key, value in pool.base_tensors.items()
        }
        write_checkpoint(store, str(folder / "models" / name), moved, files={"config.json": config})
    return folder


@pytest.fixture
def buckets(s3_bucket: Bucket, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill the buckets of the pages, let AWS's environment lead to them, and empty them at the end."""
    endpoint = str(s3_bucket.storage["s3"]["endpoint_url"])
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    contents = {"models": models / "models", "adapters": models / "adapters", "merged": None, "recipes": None}
    for bucket, folder in contents.items():
        client.create_bucket(Bucket=bucket)
        for file in sorted(folder.rglob("*")) if folder else ():
            name = file.relative_to(folder).as_posix().replace("adapter-", "team-", 1) if folder else ""
            if file.is_file() and not name.startswith("base/"):
                client.upload_file(str(file), bucket, name)
    yield
    for bucket in contents:
        whole = boto3.resource("s3", endpoint_url=endpoint, region_name="us-east-1").Bucket(bucket)
        whole.objects.delete()
        whole.delete()


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Return a folder of commands: `ties-ray`, whose merges run in its own process, and `python`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    local = (
        '#!/bin/sh\ncase "$1 $2" in merge*|pool\\ add|pool\\ drop) set -- "$@" --set run.executor=local;; esac\n'
        f'exec {tool("ties-ray")} "$@"\n'
    )
    (folder / "ties-ray").write_text(local)
    (folder / "ties-ray").chmod(0o755)
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    return folder


@pytest.mark.parametrize("page", sorted(RUN), ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("buckets")
def test_the_code_of_a_page_runs(page: Path, commands: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    environment = os.environ | {"PATH": f"{commands}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    recipe = next(block.code for block in blocks(ROOT / "README.md") if block.code.startswith("# recipe.yaml"))
    (folder / "recipe.yaml").write_text(recipe)
    for block in blocks(page):
        if block.code.startswith("# recipe.yaml"):
            (folder / "recipe.yaml").write_text(block.code)
        elif file := named_file(block):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(block.code)
        elif block.language in ("bash", "python") and not block.why_not:
            program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
            done = subprocess.run(
                [*program, block.code], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def named_file(block: Block) -> str | None:
    """Return the file that the text just before a block names."""
    before = "".join(block.page.read_text().splitlines(keepends=True)[: block.line - 1])
    found = NAMED_FILE.search(before)
    return found[1] if found else None


def test_the_figures_of_follow_one_parameter_are_those_of_the_demo(tmp_path: Path) -> None:
    page = " ".join((ROOT / "docs/follow-one-parameter.md").read_text().split())
    write_family(tmp_path, "20M", 8)
    recipe = {
        "base": str(tmp_path / "base"), "models": [f"{tmp_path}/model-*"], "method": {"name": "ties", "density": 0.2},
        "output": str(tmp_path / "merged"), "run": {"executor": "local"},
    }  # fmt: skip
    plan, result = plan_record(ties_ray.plan(recipe)), ties_ray.merge(recipe)
    name = "model.layers.3.mlp.up_proj.weight"
    with (tmp_path / "merged/model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
    reads = f"{plan.bytes_read:,} bytes in {plan.requests:,} requests"
    for figure in (reads, f"in {result.requests:,} requests", f"lie at {start:,} of"):
        assert figure in page
