"""Every manifest of deploy/, and the rules that they keep."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.deploy import examples, rules
from tests.deploy.rules import broken

DEPLOY = Path(__file__).parents[2] / "deploy"
SCHEMA = Draft202012Validator(json.loads((DEPLOY / "schemas" / "kubernetes.json").read_text()))
Json = dict[str, Any]


def documents() -> list[Any]:
    return [
        pytest.param(document, id=f"{path.name}-{number}")
        for path in sorted(DEPLOY.glob("kuberay/*.yaml"))
        for number, document in enumerate(yaml.safe_load_all(path.read_text()))
    ]


def wrong(manifest: Json) -> list[str]:
    """Return what the schema finds wrong with a manifest."""
    return [f"{error.json_path}: {error.message}" for error in SCHEMA.iter_errors(manifest)]


@pytest.mark.parametrize("manifest", documents())
def test_every_manifest_keeps_schema_and_rules(manifest: Json) -> None:
    assert not wrong(manifest)
    assert not broken(manifest)


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_an_example_is_what_the_command_prints_today(name: str) -> None:
    assert (DEPLOY / "kuberay" / name).read_text() == examples.example(name), "python -m tests.deploy.examples"


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA.schema)


def named(name: str, kind: str) -> Json:
    found = [one for one in yaml.safe_load_all((DEPLOY / "kuberay" / name).read_text()) if one["kind"] == kind]
    return found[0]


def job() -> Json:
    return named("rayjob.yaml", "RayJob")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda spec: spec.update(shutdownAfterJobFinish=True), "shutdownAfterJobFinish"),
        (lambda spec: spec.update(backoffLimit="0"), "backoffLimit"),
        (lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("minReplicas"), "minReplicas"),
        (lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "num-cpus"),
        (lambda spec: spec.update(activeDeadlineSeconds=0), "activeDeadlineSeconds"),
    ],
)
def test_the_schema_finds_what_is_misspelt_of_the_wrong_type_or_missing(
    change: Callable[[Json], object], where: str
) -> None:
    manifest = job()
    change(manifest["spec"])
    found = wrong(manifest)
    assert len(found) == 1, found
    assert where in found[0]


def _head(manifest: Json) -> Json:
    return rules.cluster_of(manifest)["headGroupSpec"]


def _worker(manifest: Json) -> Json:
    return rules.cluster_of(manifest)["workerGroupSpecs"][0]


def _ray(group: Json) -> Json:
    return group["template"]["spec"]["containers"][0]


QUEUED = ("rayjob-kueue.yaml", "RayJob")
BREAKS: list[tuple[str, tuple[str, str], Callable[[Json], object]]] = [
    ("names_are_short_labels", ("rayjob.yaml", "RayJob"), lambda m: m["metadata"].update(name="m" * 48)),
    ("names_are_short_labels", ("rayjob.yaml", "ConfigMap"), lambda m: m["metadata"].update(name="Merge")),
    ("names_are_short_labels", ("raycronjob.yaml", "RayCronJob"), lambda m: m["metadata"].update(name="m" * 37)),
    ("start_parameters_leave_resources_to_the_container", QUEUED,
     lambda m: _worker(m)["rayStartParams"].update({"num-cpus": "4"})),
    ("start_parameters_leave_resources_to_the_container", QUEUED,
     lambda m: _head(m)["rayStartParams"].update(labels="a=b")),
    ("the_head_takes_no_workers", QUEUED, lambda m: _head(m)["rayStartParams"].pop("num-cpus")),
    ("the_object_store_is_small_and_large_enough_for_ray", QUEUED,
     lambda m: _worker(m)["rayStartParams"].pop("object-store-memory")),
    ("tokens_need_a_ray_that_knows_them", QUEUED, lambda m: rules.cluster_of(m).update(rayVersion="2.51.0")),
    ("tokens_need_a_ray_that_knows_them", ("raycluster.yaml", "RayCluster"),
     lambda m: m["spec"]["authOptions"].update(mode="disabled")),
    ("cleaning_up_needs_the_shutdown", QUEUED, lambda m: m["spec"].update(shutdownAfterJobFinishes=False)),
    ("groups_have_the_bounds_of_their_kind", QUEUED, lambda m: _worker(m).update(maxReplicas=9)),
    ("groups_have_the_bounds_of_their_kind", ("raycluster.yaml", "RayCluster"),
     lambda m: _worker(m).update(replicas=9)),
    ("pods_of_an_autoscaler_are_not_restarted", ("raycluster.yaml", "RayCluster"),
     lambda m: _worker(m)["template"]["spec"].update(restartPolicy="Always")),
    ("pods_of_an_autoscaler_are_not_restarted", ("raycluster.yaml", "RayCluster"),
     lambda m: (m["spec"].update(enableInTreeAutoscaling=False), _worker(m).update(minReplicas=2, replicas=2))),
    ("the_entrypoint_is_read_alike_by_every_shell", QUEUED,
     lambda m: m["spec"].update(entrypoint="sh -c 'ties-ray merge r.yaml; exit $?'")),
    ("a_schedule_has_five_fields_and_no_zone", ("raycronjob.yaml", "RayCronJob"),
     lambda m: m["spec"].update(schedule="TZ=Europe/Berlin 15 2 * * *")),
    ("what_waits_in_a_queue_is_suspended_and_of_fixed_size", QUEUED, lambda m: m["spec"].pop("suspend")),
    ("what_waits_in_a_queue_is_suspended_and_of_fixed_size", QUEUED,
     lambda m: rules.cluster_of(m).update(enableInTreeAutoscaling=True)),
    ("what_waits_in_a_queue_is_suspended_and_of_fixed_size", QUEUED,
     lambda m: rules.cluster_of(m).update(workerGroupSpecs=[_worker(m)] * 8)),
    ("no_cluster_is_built_again_for_a_typo", QUEUED, lambda m: m["spec"].update(backoffLimit=1)),
    ("limits_are_requests", QUEUED, lambda m: _ray(_worker(m))["resources"]["limits"].update(memory="9000Mi")),
    ("what_is_mounted_is_there", QUEUED, lambda m: _head(m)["template"]["spec"]["volumes"].pop()),
    ("disk_is_bounded_and_asked_for", QUEUED,
     lambda m: _worker(m)["template"]["spec"]["volumes"][0]["emptyDir"].pop("sizeLimit")),
    ("disk_is_bounded_and_asked_for", QUEUED,
     lambda m: _worker(m)["template"]["spec"]["volumes"][0]["emptyDir"].update(sizeLimit="6000Mi")),
    ("a_read_only_root_leaves_one_writable_folder", QUEUED,
     lambda m: _ray(_worker(m))["securityContext"].pop("readOnlyRootFilesystem")),
    ("a_read_only_root_leaves_one_writable_folder", QUEUED,
     lambda m: _ray(_worker(m))["env"][0].update(value="/home/ray")),
    ("no_secret_is_written_down", QUEUED,
     lambda m: _ray(_worker(m))["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"})),
    ("no_secret_is_written_down", ("rayjob.yaml", "ConfigMap"),
     lambda m: m["data"].update(more="aws_secret_access_key = x")),
    ("heads_stay_and_workers_only_wish_for_spot", QUEUED,
     lambda m: _head(m)["template"]["spec"].update(affinity=_worker(m)["template"]["spec"]["affinity"])),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "place", "change"), BREAKS)
def test_a_rule_can_be_broken(rule: str, place: tuple[str, str], change: Callable[[Json], object]) -> None:
    manifest = copy.deepcopy(named(*place))
    assert not broken(manifest)
    change(manifest)
    assert {one.partition(":")[0] for one in broken(manifest)} == {rule}


def test_every_rule_is_broken_by_something() -> None:
    assert {rule for rule, _, _ in BREAKS} == {rule.__name__ for rule in rules.RULES}
