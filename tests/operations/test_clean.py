"""`ties-ray clean`: what killed merges left goes, what is finished stays; and `--fresh` over what can't be read."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from click.testing import CliRunner, Result

from tests.conftest import Bucket
from tests.tools.families import Family, make_family
from tests.tools.merging import digests, merge, recipe_of
from ties_ray.cli import commands
from ties_ray.driver.resume import clean
from ties_ray.errors import InputError
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import RESULT_NAME, SUMS_NAME, Progress, find_result
from ties_ray.state import lease
from ties_ray.state.manifest import FOLDER, find_runs
from ties_ray.stores import Stores

DIE = """
import os, signal, sys
from ties_ray.operations import merging
from ties_ray.recipe.parse import parse

merging.merge(
    parse(sys.stdin.read()), watch=lambda now: now.stage == "publish" and os.kill(os.getpid(), signal.SIGKILL)
)
"""


def killed(recipe: Recipe) -> None:
    """Merge in a process that is killed when all parts are written and nothing is visible yet."""
    text = recipe.model_dump_json(exclude_unset=True, by_alias=True)
    done = subprocess.run([sys.executable, "-c", DIE], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr


def run(*words: object) -> Result:
    return CliRunner().invoke(commands.commands, [str(word) for word in words])


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".ties-ray-part")]


def test_a_killed_merge_is_cleaned_from_a_disk(family_of: Callable[..., Family], tmp_path: Path) -> None:
    output = tmp_path / "out"
    killed(recipe_of(family_of(num_models=2), {"path": str(output), "file_size": 3000}, "average"))
    left = len(hidden(output))
    assert left > 1

    looked = run("clean", output, "--dry-run", "--json")
    record = json.loads(looked.stdout)
    assert (looked.exit_code, record["removed"], len(record["found"])) == (0, False, left + 1)
    assert len(hidden(output)) == left

    done = run("clean", output)
    assert done.exit_code == 0
    assert done.stdout.count("removed: unfinished upload of model-0000") == left
    assert "removed: unfinished run" in done.stdout
    assert [path for path in output.rglob("*") if path.is_file()] == []
    assert "nothing to clean" in run("clean", output).stdout
    assert "holds no merge" in run("status", output).stdout


def test_a_killed_merge_is_cleaned_from_a_bucket_and_a_finished_one_stays(s3_bucket: Bucket) -> None:
    endpoint = str(s3_bucket.storage["s3"]["endpoint_url"])
    stores, storage = Stores(s3_bucket.storage), ("--set", f"storage.s3.endpoint_url={endpoint}")
    family = make_family(stores.of(s3_bucket.uri), s3_bucket.uri, num_models=2)
    whole, half = (f"{s3_bucket.uri}/{name}" for name in ("whole", "half"))
    killed(recipe_of(family, half, "average", storage=s3_bucket.storage))
    merge(family, whole, {"name": "ties"}, storage=s3_bucket.storage)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    bucket = s3_bucket.uri.removeprefix("s3://")
    client.create_multipart_upload(Bucket=bucket, Key="whole/model.safetensors")
    client.create_multipart_upload(Bucket=bucket, Key="elsewhere/model.safetensors")
    assert len(client.list_multipart_uploads(Bucket=bucket)["Uploads"]) == 3

    assert run("clean", half, *storage).exit_code == 0
    assert "removed: unfinished upload of model.safetensors" in run("clean", whole, *storage).stdout
    assert "nothing to clean" in run("clean", f"{s3_bucket.uri}/elsewhere", *storage).stdout
    assert [upload["Key"] for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == [
        "elsewhere/model.safetensors"  # no merge was ever there: it is somebody else's
    ]
    assert client.list_objects_v2(Bucket=bucket, Prefix="half/")["KeyCount"] == 0
    verification = verify(stores, whole, sample=1.0)
    assert (verification.problems, verification.notes) == ([], [])
    assert verification.files[0].parts_proved == verification.files[0].parts


def test_a_merge_at_work_is_not_cleaned(
    family_of: Callable[..., Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    killed(recipe_of(family_of(num_models=2), output, "average"))
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    with lease.acquire(Stores({}), str(output), lambda text: None):
        for words in ((), ("--dry-run",)):
            done = run("clean", output, *words)
            assert done.exit_code == 5
            assert "another run is at work there" in done.stderr
    assert hidden(output)


def test_nothing_comes_to_be_where_nothing_is(tmp_path: Path) -> None:
    assert run("clean", tmp_path / "none").exit_code == 0
    assert not (tmp_path / "none").exists()


def test_an_older_generation_of_a_finished_merge_goes(family_of: Callable[..., Family], tmp_path: Path) -> None:
    output, stores = str(tmp_path / "out"), Stores({})
    recipe = recipe_of(family_of(num_models=2), output, "average")
    merging.merge(recipe)
    merging.merge(recipe, fresh=True)
    ((run_id, generation),) = find_runs(stores, output)
    (tmp_path / "out" / FOLDER / run_id / str(generation - 1) / "records").mkdir(parents=True)  # a worker came late
    assert clean(stores, output, remove=True) == [f"unfinished run {run_id}, generation {generation - 1}"]
    assert find_runs(stores, output) == [(run_id, generation)]


def foreign_plan(path: Path) -> None:
    data = json.loads(gzip.decompress(path.read_bytes()))
    data["recipe"]["method"]["name"] = "of_a_plugin_that_is_not_here"
    path.write_bytes(gzip.compress(json.dumps(data).encode()))


@pytest.mark.parametrize(
    "spoil",
    [foreign_plan, lambda path: path.write_bytes(b"not gzip"), lambda path: path.write_bytes(path.read_bytes()[:50])],
)
def test_fresh_replaces_a_run_whose_plan_can_not_be_read(
    spoil: Callable[[Path], None], family_of: Callable[..., Family], tmp_path: Path
) -> None:
    family, output = family_of(num_models=2), tmp_path / "out"
    killed(recipe_of(family, output, "average"))
    (plan,) = output.rglob("plan.json.gz")
    spoil(plan)
    recipe = recipe_of(family, output, {"name": "ties"})
    assert run("status", output).exit_code == 0
    with pytest.raises(InputError, match="its plan is not there, or can't be read"):
        merging.merge(recipe)
    merging.merge(recipe, fresh=True)
    merge(family, tmp_path / "wanted", {"name": "ties"})
    assert digests(output) == digests(tmp_path / "wanted")
    assert hidden(output) == []
    assert not plan.exists()


def test_fresh_takes_the_sums_of_the_earlier_merge_away(family_of: Callable[..., Family], tmp_path: Path) -> None:
    family, output = family_of(num_models=2), tmp_path / "out"
    merge(family, output, "average")
    assert verify(Stores({}), str(output), sums=True).sums
    merging.merge(recipe_of(family, output, {"name": "ties"}), fresh=True)
    assert not (output / SUMS_NAME).exists()


def test_fresh_takes_the_weights_of_the_earlier_merge_away(family_of: Callable[..., Family], tmp_path: Path) -> None:
    """An old file of the same size must never pass for one of the new merge."""
    family, output = family_of(num_models=2), tmp_path / "out"
    merge(family, output, "average")
    assert len(list(output.glob("*.safetensors"))) == 1

    def stop(progress: Progress) -> None:
        if progress.stage == "merge":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merging.merge(recipe_of(family, output, {"name": "ties"}), fresh=True, watch=stop)
    assert list(output.glob("*.safetensors")) == []


def test_a_result_record_that_can_not_be_read_is_told(family_of: Callable[..., Family], tmp_path: Path) -> None:
    merge(family_of(num_models=2), tmp_path / "out", "average")
    (tmp_path / "out" / RESULT_NAME).write_text('{"status": "splendid"}')
    with pytest.raises(InputError, match=r"can't read the result record .* merge again with --fresh"):
        find_result(Stores({}), str(tmp_path / "out"))
    merging.merge(recipe_of(family_of(num_models=2), tmp_path / "out", "average"), fresh=True)
    assert os.path.getsize(tmp_path / "out" / RESULT_NAME) > 500
