"""The image's Dockerfile, linted and held to what the manifests ask of it; and the cluster of `ray up`."""

import json
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import ray.autoscaler
import yaml
from jsonschema import Draft7Validator

from tests.conftest import tool
from tests.deploy.dockerfile import DOCKERFILE, ROOT, arguments, copies, steps
from ties_ray.operations.kubernetes import _Manifests
from ties_ray.stores import s3


def test_the_linter_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text().replace(" --no-cache-dir", ""))
    done = subprocess.run([tool("hadolint"), str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DL3042" in done.stdout


def test_the_image_has_the_ray_that_the_tests_have() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert arguments()["RAY_VERSION"] == pinned["ray"]


def test_the_image_has_two_stages_and_ends_as_nobody_in_particular() -> None:
    names = [step.name for step in steps()]
    assert names.count("FROM") == 2
    assert "ADD" not in names
    assert [step.text for step in steps() if step.name == "USER"] == ["1000:100"]
    assert not [name for name in arguments() if any(word in name for word in ("TOKEN", "SECRET", "PASSWORD"))]


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    taken = {line[1:] for line in ignored if line.startswith("!")}
    sources = {source for step in steps() if step.name == "COPY" and "--from" not in step.text
               for source in copies(step)[0]}  # fmt: skip
    assert ignored[0] == "*"
    assert sources == taken
    assert all((ROOT / source).exists() for source in sources)


def test_image_and_pods_write_to_the_same_one_folder() -> None:
    (env,) = [step.text for step in steps() if step.name == "ENV"]
    image = dict(word.split("=", 1) for word in env.split())
    from tests.deploy.examples import OPTIONS, recipe, record
    from ties_ray.operations.kubernetes import size

    pods = _Manifests(record(), OPTIONS, size(record(), recipe(), OPTIONS))._environment()
    assert {name: pods[name] for name in image.keys() & pods.keys()} == {
        "HOME": "/tmp", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip


# -- EC2


def cluster() -> dict[str, dict[str, dict[str, object]]]:
    loaded = yaml.safe_load((ROOT / "deploy" / "aws.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_ray_takes_the_cluster_of_ray_up() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).with_name("ray-schema.json")).read_text())
    assert not list(Draft7Validator(schema).iter_errors(cluster()))
    assert list(Draft7Validator(schema).iter_errors(cluster() | {"head_node_typ": "head"}))


def test_the_head_of_ray_up_takes_no_workers_and_is_not_taken_away() -> None:
    types = cluster()["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    spot = {name for name, one in types.items() if "InstanceMarketOptions" in one["node_config"]}  # type: ignore[operator]
    assert spot == {"spot"}
    assert str(cluster()["head_node_type"]) == "head"


# -- S3

ACTIONS = {
    "s3:GetObject": ("get_object", "head_object"),
    "s3:PutObject": ("put_object", "create_multipart_upload", "upload_part", "complete_multipart_upload"),
    "s3:DeleteObject": ("delete_object", "delete_objects"),
    "s3:AbortMultipartUpload": ("abort_multipart_upload",),
    "s3:ListMultipartUploadParts": ("list_parts",),
    "s3:ListBucket": ("list_objects_v2",),
    "s3:ListBucketMultipartUploads": ("list_multipart_uploads",),
}


@pytest.mark.parametrize(("action", "calls"), ACTIONS.items())
def test_the_policy_allows_what_the_store_calls(action: str, calls: tuple[str, ...]) -> None:
    policy = json.loads((ROOT / "deploy" / "iam-policy.json").read_text())
    source = "".join(path.read_text() for path in Path(s3.__file__).parent.glob("*s3*.py"))
    allowed = {one for statement in policy["Statement"] for one in statement["Action"]}
    assert any(f'"{call}"' in source or f".{call}(" in source for call in calls), "not needed any more"
    assert action in allowed
    assert not [one for one in allowed if fnmatch(one, "*[*]*")]
