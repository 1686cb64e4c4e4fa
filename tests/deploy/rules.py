"""What the fields of our manifests ask of each other: each rule here bites in a cluster, where no schema warns.

KubeRay's are in its validation (it refuses, or no pod ever comes up), Kueue's in its documentation; the last are ours.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Json = dict[str, Any]
Rule = Callable[[Json], Iterator[str]]
RULES: list[Rule] = []
LONGEST = {"RayJob": 47, "RayCluster": 53, "RayCronJob": 36}
QUEUE = "kueue.x-k8s.io/queue-name"


def rule(function: Rule) -> Rule:
    RULES.append(function)
    return function


def broken(manifest: Json) -> list[str]:
    """Return what a manifest breaks, `rule: what`."""
    return [f"{each.__name__}: {what}" for each in RULES for what in each(manifest)]


# -- the parts of a manifest


def job_of(manifest: Json) -> Json:
    spec = manifest.get("spec", {})
    return {"RayJob": spec, "RayCronJob": spec.get("jobTemplate", {})}.get(manifest["kind"], {})


def cluster_of(manifest: Json) -> Json:
    found = manifest["spec"] if manifest["kind"] == "RayCluster" else job_of(manifest).get("rayClusterSpec", {})
    assert isinstance(found, dict)
    return found


def groups(manifest: Json) -> Iterator[tuple[str, Json]]:
    cluster = cluster_of(manifest)
    if cluster:
        yield "head", cluster["headGroupSpec"]
        yield from ((group["groupName"], group) for group in cluster["workerGroupSpecs"])


def pods(manifest: Json) -> Iterator[tuple[str, Json]]:
    yield from ((name, group["template"]["spec"]) for name, group in groups(manifest))
    if "submitterPodTemplate" in job_of(manifest):
        yield "submitter", job_of(manifest)["submitterPodTemplate"]["spec"]


def containers(manifest: Json) -> Iterator[tuple[str, Json]]:
    for name, pod in pods(manifest):
        yield from ((name, container) for container in pod["containers"])


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(\D*)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"": 1, "Mi": 2**20, "Gi": 2**30}[unit]


# -- KubeRay


@rule
def names_are_short_labels(manifest: Json) -> Iterator[str]:
    name = manifest["metadata"]["name"]
    if len(name) > LONGEST.get(manifest["kind"], 63) or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"{name!r} of a {manifest['kind']}"


@rule
def start_parameters_leave_resources_to_the_container(manifest: Json) -> Iterator[str]:
    for name, group in groups(manifest):
        given = group["rayStartParams"].keys() & {"num-gpus", "memory", "resources", "labels"}
        given |= group["rayStartParams"].keys() & {"num-cpus"} if name != "head" else set()
        yield from (f"{each} of {name}" for each in given)


@rule
def the_head_takes_no_workers(manifest: Json) -> Iterator[str]:
    for name, group in groups(manifest):
        if name == "head" and group["rayStartParams"].get("num-cpus") != "0":
            yield "num-cpus of the head is not '0'"


@rule
def the_object_store_is_small_and_large_enough_for_ray(manifest: Json) -> Iterator[str]:
    for name, group in groups(manifest):
        store = int(group["rayStartParams"].get("object-store-memory", 0))
        limit = bytes_of(group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"])
        if not 75 * 2**20 <= store <= limit // 4:
            yield f"{store} of {limit} in {name}"


@rule
def tokens_need_a_ray_that_knows_them(manifest: Json) -> Iterator[str]:
    cluster = cluster_of(manifest)
    if cluster and cluster["authOptions"]["mode"] != "token":
        yield "the cluster takes commands from everybody"
    elif cluster and tuple(map(int, cluster["rayVersion"].split("."))) < (2, 52, 0):
        yield f"Ray {cluster['rayVersion']}"


@rule
def cleaning_up_needs_the_shutdown(manifest: Json) -> Iterator[str]:
    job = job_of(manifest)
    if job and not job["shutdownAfterJobFinishes"]:
        yield "the cluster stays after the job, and a time to live means nothing"


@rule
def groups_have_the_bounds_of_their_kind(manifest: Json) -> Iterator[str]:
    cluster = cluster_of(manifest)
    for group in cluster.get("workerGroupSpecs", ()):
        least, now, most = group["minReplicas"], group["replicas"], group["maxReplicas"]
        if not least <= now <= most or (not cluster.get("enableInTreeAutoscaling") and least != most):
            yield f"{least}, {now}, {most} in {group['groupName']}"


@rule
def pods_of_an_autoscaler_are_not_restarted(manifest: Json) -> Iterator[str]:
    cluster = cluster_of(manifest)
    if cluster.get("autoscalerOptions") and not cluster.get("enableInTreeAutoscaling"):
        yield "options of an autoscaler that is off"
    for name, group in groups(manifest):
        restarts = group["template"]["spec"].get("restartPolicy", "Never") != "Never"
        if cluster.get("enableInTreeAutoscaling") and restarts:
            yield name


@rule
def the_entrypoint_is_read_alike_by_every_shell(manifest: Json) -> Iterator[str]:
    words = job_of(manifest).get("entrypoint", "").split()
    if words != [shlex.quote(word) for word in words]:
        yield " ".join(words)


@rule
def a_schedule_has_five_fields_and_no_zone(manifest: Json) -> Iterator[str]:
    schedule = manifest["spec"]["schedule"] if manifest["kind"] == "RayCronJob" else "* * * * *"
    if len(schedule.split()) != 5 or "TZ" in schedule:
        yield schedule


# -- Kueue


@rule
def what_waits_in_a_queue_is_suspended_and_of_fixed_size(manifest: Json) -> Iterator[str]:
    queued = QUEUE in manifest["metadata"].get("labels", {})
    suspended = bool(job_of(manifest).get("suspend"))
    if queued != suspended:
        yield "a queue's label and `suspend` belong together"
    if queued and cluster_of(manifest).get("enableInTreeAutoscaling"):
        yield "its size may change"
    if queued and len(cluster_of(manifest).get("workerGroupSpecs", ())) > 7:
        yield "more than eight sets of pods"


# -- ours


@rule
def no_cluster_is_built_again_for_a_typo(manifest: Json) -> Iterator[str]:
    if job_of(manifest).get("backoffLimit"):
        yield "KubeRay would repeat a job whatever its exit code was; merge.sh repeats what helps"


@rule
def limits_are_requests(manifest: Json) -> Iterator[str]:
    for name, container in containers(manifest):
        if container["resources"]["requests"] != container["resources"]["limits"]:
            yield f"{container['name']} of {name}"


@rule
def what_is_mounted_is_there(manifest: Json) -> Iterator[str]:
    for name, pod in pods(manifest):
        there = {volume["name"] for volume in pod.get("volumes", ())}
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", ())}
        if there != mounted:
            yield f"{sorted(there ^ mounted)} of {name}"


@rule
def disk_is_bounded_and_asked_for(manifest: Json) -> Iterator[str]:
    for name, pod in pods(manifest):
        folders = [volume["emptyDir"] for volume in pod.get("volumes", ()) if "emptyDir" in volume]
        if not all("sizeLimit" in folder for folder in folders):
            yield f"a folder of {name} may fill its node"
        asked = pod["containers"][0]["resources"]["limits"].get("ephemeral-storage")
        if asked and sum(bytes_of(folder.get("sizeLimit", "0")) for folder in folders) >= bytes_of(asked):
            yield f"{name} is evicted before its folders are full"


@rule
def a_read_only_root_leaves_one_writable_folder(manifest: Json) -> Iterator[str]:
    for name, container in containers(manifest):
        if not container["securityContext"].get("readOnlyRootFilesystem"):
            yield f"{name} may write its image"
        writable = [mount["mountPath"] for mount in container.get("volumeMounts", ()) if not mount.get("readOnly")]
        if writable != ["/tmp"]:
            yield f"{name} may write {writable}, and Ray writes to /tmp"
        for variable in container.get("env", ()):
            if variable["name"] == "HOME" and not f"{variable['value']}/".startswith("/tmp/"):
                yield f"{variable['name']} of {name} is not under /tmp"


@rule
def no_secret_is_written_down(manifest: Json) -> Iterator[str]:
    for name, container in containers(manifest):
        names = [variable["name"] for variable in container.get("env", ())]
        yield from (f"{each} of {name}" for each in names if re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY", each))
    text = repr(manifest.get("data", ""))
    if re.search(r"AKIA[0-9A-Z]{16}|aws_secret_access_key|-----BEGIN", text):
        yield "in the files of a ConfigMap"


@rule
def heads_stay_and_workers_only_wish_for_spot(manifest: Json) -> Iterator[str]:
    for name, pod in pods(manifest):
        affinity: Mapping[str, Any] = pod["affinity"]["nodeAffinity"]
        demands = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", ())
        operators = {one["operator"] for term in demands for one in term["matchExpressions"]}
        if name in ("head", "submitter") and operators != {"NotIn"}:
            yield f"{name} may lie on a node that is taken away"
        if "In" in operators:
            yield f"{name} has no place where there are no spot nodes"
