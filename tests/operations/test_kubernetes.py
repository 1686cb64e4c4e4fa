"""Manifests of a plan: sizes, refusals, the printed text, and the script that decides what is repeated."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from tests.cli.test_commands import run
from tests.conftest import Bucket
from tests.deploy.examples import OPTIONS, recipe, record
from tests.deploy.rules import broken, bytes_of
from tests.deploy.test_manifests import wrong
from tests.tools.families import make_family
from ties_ray.errors import RecipeError
from ties_ray.operations import kubernetes, merging
from ties_ray.operations.kubernetes import Options, kuberay, recipe_text, size, to_yaml
from ties_ray.recipe.parse import parse
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import plan_record
from ties_ray.stores import Stores


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (chosen,) = [each for each in manifests if each["kind"] == kind]
    return chosen


def asked(**more: object) -> Recipe:
    return parse(json.dumps(yaml.safe_load(recipe_text(recipe())) | more))


# -- sizes


@settings(max_examples=50, deadline=None)
@given(
    workers=st.none() | st.integers(1, 500),
    per_pod=st.integers(1, 16),
    memory=st.integers(2**27, 2**36),
    num_models=st.integers(1, 1000),
    shards=st.integers(1, 5000),
)
def test_pods_hold_all_workers_and_what_these_need(
    workers: int | None, per_pod: int, memory: int, num_models: int, shards: int
) -> None:
    planned = record(num_models=num_models, memory=memory, shards=shards)
    chosen = size(planned, recipe(), replace(OPTIONS, workers=workers, workers_per_pod=per_pod))
    assert 1 <= chosen.workers_per_pod <= per_pod
    if workers is not None:
        assert workers <= chosen.workers < workers + chosen.pods
    else:
        assert chosen.workers < shards + chosen.pods
        assert chosen.workers < kubernetes.MAX_WORKERS + chosen.pods
    needed = chosen.workers_per_pod * (memory + kubernetes.IMPORTS) + kubernetes.NODE + kubernetes.OBJECT_STORE
    assert needed < 0.95 * chosen.memory  # from where on Ray kills workers
    assert chosen.deadline >= max(3600, 2 * chosen.seconds)


def test_a_worker_needs_no_more_for_a_hundred_times_the_models() -> None:
    few, many = (size(record(num_models=number), recipe(), replace(OPTIONS, workers=8)) for number in (10, 1000))
    assert few.memory == many.memory
    assert few.head_memory < many.head_memory < 2 * few.head_memory


def test_the_recipes_workers_count_where_the_command_names_none() -> None:
    assert size(record(), asked(run={"workers": 12}), OPTIONS).workers == 12
    assert size(record(), asked(run={"workers": 12}), replace(OPTIONS, workers=3)).workers == 3


def test_gpus_are_asked_for_by_the_pod() -> None:
    manifests = kuberay(record(), asked(run={"gpus_per_worker": 0.5}), replace(OPTIONS, workers=8))
    pod = of_kind(manifests, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert "nvidia.com/gpu" in [each["key"] for each in pod["tolerations"]]


def test_workers_that_share_a_gpu_by_the_plan_ask_for_fewer() -> None:
    planned, recipe_ = record().model_copy(update={"sharers": 4}), asked(run={"device": "cuda"})
    sizes = [size(each, recipe_, replace(OPTIONS, workers=8)) for each in (record(), planned)]
    assert [(each.workers_per_pod, each.gpus_per_pod) for each in sizes] == [(4, 4), (4, 1)]


def test_ray_finds_room_for_all_workers_by_its_own_count() -> None:
    spec = of_kind(kuberay(record(), recipe(), OPTIONS), "RayJob")["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    room = min(int(limits["cpu"]), bytes_of(limits["memory"]) // record().memory)  # what executors/ray.py divides
    assert group["replicas"] * room == size(record(), recipe(), OPTIONS).workers


# -- what is refused


def test_everything_that_is_wrong_is_told_at_once() -> None:
    options = Options(
        image="",
        ray_version="2.60.0",
        name="Merge_1",
        workers=0,
        queue="q",
        schedule="nightly",
        cluster=True,
        env={"HF_TOKEN": "x"},
    )
    local = asked(base="/models/base", run={"pool_cache": "cache"})
    with pytest.raises(RecipeError, match="--name") as refused:
        kuberay(record(), local, options)
    places = [problem.where for problem in refused.value.problems]
    assert places == [
        "--name", "--cron", "--cron", "--cluster", "--workers", "--image", "--env", "base", "run.pool_cache",
    ]  # fmt: skip
    assert "x" not in str(refused.value).split()


def test_a_recipe_too_large_for_a_configmap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "MAX_CONFIG", len(recipe_text(recipe())))
    kuberay(record(), recipe(), OPTIONS)
    with pytest.raises(RecipeError, match="put its models into a table"):
        kuberay(record(), asked(exclude=["*.bias"]), OPTIONS)


def test_a_name_of_a_nightly_job_leaves_room_for_the_minute() -> None:
    kuberay(record(), recipe(), replace(OPTIONS, name="m" * 47))
    with pytest.raises(RecipeError, match="at most 36"):
        kuberay(record(), recipe(), replace(OPTIONS, name="m" * 47, schedule="15 2 * * *"))


# -- what is printed


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.text(st.characters(codec="utf-8") | st.sampled_from("ab \n\t:#-{}[]|>&*\x85\u2028\ufeff\x00"), max_size=20)
        | st.sampled_from(["yes", "No", "on", "~", "0", "1e3", "1:30", "0o7", "null", ".NaN", "a: b", "- a", "# x"])
        | st.integers()
        | st.booleans(),
        lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=3), each, max_size=3),
        max_leaves=10,
    )
)  # fmt: skip
def test_readers_of_yaml_1_1_and_1_2_read_what_was_written(value: object) -> None:
    text = to_yaml([{"value": value}])
    assert yaml.safe_load(text) == {"value": value}
    assert YAML(typ="safe", pure=True).load(text) == {"value": value}


def test_the_printed_recipe_is_the_recipe() -> None:
    config = of_kind(kuberay(record(), recipe(), OPTIONS), "ConfigMap")
    assert parse(config["data"]["recipe.yaml"]) == recipe()


def test_a_name_follows_from_the_run_so_that_applying_twice_merges_once() -> None:
    made = of_kind(kuberay(record(), recipe(), replace(OPTIONS, name="")), "RayJob")
    assert made["metadata"]["name"] == "merge-5f0c7b1a9e"


def test_secrets_are_named_and_never_written() -> None:
    made = kuberay(record(), recipe(), replace(OPTIONS, secrets=("hub",)))
    spec = of_kind(made, "RayJob")["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        container = group["template"]["spec"]["containers"][0]
        assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert not [each for manifest in made for each in (*wrong(manifest), *broken(manifest))]


def test_without_spot_every_pod_stays() -> None:
    made = of_kind(kuberay(record(), recipe(), replace(OPTIONS, spot=False)), "RayJob")
    worker = made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert "tolerations" not in worker
    assert list(worker["affinity"]["nodeAffinity"]) == ["requiredDuringSchedulingIgnoredDuringExecution"]


# -- the script of the job


@pytest.mark.parametrize(
    ("codes", "runs", "ends"),
    [("0", 1, 0), ("2", 1, 2), ("3", 1, 3), ("4 4 0", 3, 0), ("5 3", 2, 3), ("5 4 5", 3, 5), ("143", 1, 143)],
)
def test_the_script_repeats_what_helps_and_ends_with_the_last_exit_code(
    tmp_path: Path, codes: str, runs: int, ends: int
) -> None:
    script = of_kind(kuberay(record(), recipe(), OPTIONS), "ConfigMap")["data"]["merge.sh"]
    (tmp_path / "merge.sh").write_text(script)
    for name, does in {
        "ties-ray": 'echo "$@" >> calls; set -- ' + codes + '; shift $(($(wc -l < calls) - 1)); exit "$1"',
        "sleep": 'echo "$1" >> pauses',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["sh", "merge.sh"], cwd=tmp_path, env=environment, check=False)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (len(calls), done.returncode) == (runs, ends)
    assert f"--set run.workers={size(record(), recipe(), OPTIONS).workers}" in calls[0]
    assert calls[0].endswith("--result s3://merged/teams/last.result.json")


# -- the command


@pytest.fixture
def nightly(s3_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a recipe whose family lies in a bucket; the environment names the service."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint_of(s3_bucket))
    family = make_family(Stores(s3_bucket.storage).of(s3_bucket.uri), f"{s3_bucket.uri}/family", num_models=2)
    path = tmp_path / "recipe.yaml"
    data = {"base": family.base, "models": list(family.models), "method": {"name": "ties", "density": 0.3}}
    data |= {"output": f"{s3_bucket.uri}/out", "run": {"executor": "local"}}
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ([], ["ConfigMap", "RayJob"]),
        (["--cron", "15 2 * * *", "--name", "nightly"], ["ConfigMap", "RayCronJob"]),
        (["--kueue-queue", "merges", "--role-arn", "arn:aws:iam::1:role/r"], ["ServiceAccount", "ConfigMap", "RayJob"]),
        (["--cluster", "--workers", "6", "--env", "AWS_REGION=on", "--no-spot"], ["RayCluster"]),
    ],
)
def test_the_command_prints_what_a_cluster_takes(nightly: Path, words: list[str], kinds: list[str]) -> None:
    done = run("deploy", "kuberay", nightly, "--image", "registry.example/ties-ray:0.1.0", *words)
    assert done.exit_code == 0, done.output
    printed = list(yaml.safe_load_all(done.stdout))
    assert [each["kind"] for each in printed] == kinds
    assert not [each for manifest in printed for each in (*wrong(manifest), *broken(manifest))]


def test_the_command_sizes_the_job_by_the_plan_and_sends_the_recipe_as_overridden(nightly: Path) -> None:
    words = ["deploy", "kuberay", nightly, "--image", "i", "--set", "method.density=0.5", "--json"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    sent = parse(of_kind(made, "ConfigMap")["data"]["recipe.yaml"])
    assert sent == parse(nightly.read_text(), overrides=["method.density=0.5"])
    planned = plan_record(merging.plan(sent))
    job = of_kind(made, "RayJob")
    assert job["metadata"]["annotations"]["ties-ray/run-id"] == planned.run_id
    limits = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]
    assert bytes_of(limits["limits"]["memory"]) > planned.memory + kubernetes.IMPORTS + kubernetes.NODE


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--set", "output.path=/somewhere"], "a path of this machine"),
        (["--env", "AWS_ENDPOINT_URL=http://localhost:9000"], "localhost is this machine, which a pod does not see"),
        (["--env", "PLAIN"], "not of the form NAME=VALUE"),
        (["--env", "AWS_SECRET_ACCESS_KEY=x"], "--env-from NAME"),
        (["--env", "HTTPS_PROXY=http://user:pass@proxy:3128"], "HTTPS_PROXY looks like a secret, or holds one"),
        (["--env", "SOURCE=https://acct.blob.core.windows.net/c?sig=abc"], "--env-from NAME"),
    ],
)
def test_the_command_refuses_with_exit_code_2(nightly: Path, words: list[str], says: str) -> None:
    done = run("deploy", "kuberay", nightly, "--image", "i", *words)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stdout == ""


def test_a_service_on_this_machine_is_refused_and_pods_may_have_an_address_of_their_own(
    nightly: Path, s3_bucket: Bucket
) -> None:
    words = ["deploy", "kuberay", nightly, "--image", "i"]
    done = run(*words, "--set", f"storage.s3.endpoint_url={endpoint_of(s3_bucket)}")
    assert done.exit_code == 2
    assert "storage.s3.endpoint_url: 127.0.0.1 is this machine" in done.stderr
    assert run(*words, "--env", "AWS_ENDPOINT_URL=http://minio:9000").exit_code == 0


def endpoint_of(bucket: Bucket) -> str:
    return str(bucket.storage["s3"]["endpoint_url"])


def test_manifests_need_neither_torch_nor_ray() -> None:
    check = "import sys, ties_ray.operations.kubernetes; sys.exit(bool({'torch', 'ray'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check], env=dict(os.environ), check=False).returncode == 0
