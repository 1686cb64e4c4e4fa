"""From a plan to Kubernetes: a RayJob (or RayCronJob, or RayCluster) of KubeRay sized for that merge. Pure.

What KubeRay refuses was read in its validation, what Kueue refuses in its documentation; no cluster has taken these
manifests yet. deploy/schemas and the rules of tests/deploy hold what the fields ask of each other.
"""

import io
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

from ties_ray.errors import USER_IN_URL, Problem, RecipeError, holds_secret
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import PlanRecord
from ties_ray.stores import hub_uri

Json = dict[str, Any]

IMPORTS = 256 * 2**20
"""Of a worker beside what its plan counts: torch, numba, Ray (229 MB measured in an actor)."""
NODE = 768 * 2**20
"""Of a pod beside its workers: raylet, agents, idle worker processes (456 MiB measured, and 50 a CPU)."""
IDLE = 64 * 2**20
"""Of the process that Ray starts ahead for each CPU."""
OBJECT_STORE = 128 * 2**20
"""Nothing of ours goes through it; Ray asks for 75 MiB at least."""
HEADROOM = 0.85
"""Share of a pod's memory that is planned for; Ray kills workers at 0.95."""
HEAD_MEMORY = 4 * 2**30
"""Of the head: GCS, dashboard, the driver with its imports; beside it 1 MiB a model for the plan."""
STORAGE = 4 * 2**30
"""Of /tmp, a pod's one writable folder: Ray's logs, compiled kernels, HOME."""
RATE = 100e6
"""Bytes a second and worker, by which their number is chosen: what one reader gets of S3, not what a core could do."""
TARGET = 900.0
"""Seconds that a merge should take at this rate."""
MAX_WORKERS = 256
MAX_NAME = 47
"""KubeRay: a cluster's name adds 6 characters, a service's 10, and a label has 63."""
MAX_CRON_NAME = 36
"""... and what a RayCronJob starts is called after it and its time: 11 characters, as for Kubernetes' own CronJob."""
MAX_CONFIG = 1_000_000
"""Bytes of a ConfigMap, which Kubernetes bounds at 1 MiB."""
FOLDER = "/etc/ties-ray"
"""Where the head finds recipe and script."""

SPOT_LABELS = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
"""How Karpenter, EKS, GKE and AKS mark nodes that may be taken away."""
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./:@-]*")
_NOT_TEXT = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", ".inf", ".nan"))
"""Words that YAML 1.1, which Kubernetes reads, takes for something else."""


@dataclass(frozen=True)
class Options:
    """What the user decides; the rest follows from the plan."""

    image: str
    """Holds ties_ray, Ray and torch; deploy/Dockerfile makes one."""
    ray_version: str
    """Of the image; KubeRay chooses its commands by it."""
    name: str = ""
    """Of all that is made; empty: `merge-` and the start of the run_id."""
    namespace: str = "default"
    workers: int | None = None
    """None: the recipe's, else as many as read the inputs in a quarter of an hour."""
    workers_per_pod: int = 4
    """At most; each takes one CPU. Small pods spread: the network, and the loss, is a node's."""
    service_account: str = "ties-ray"
    role_arn: str = ""
    """Also print that service account, bound to this IAM role (IRSA)."""
    queue: str = ""
    """A local queue of Kueue."""
    schedule: str = ""
    """Five fields of cron: a RayCronJob instead of a RayJob."""
    time_zone: str = ""
    cluster: bool = False
    """A RayCluster that grows and shrinks, to which merges are submitted, instead of a job with its own."""
    spot: bool = True
    """Workers go to spot nodes where there are any, else to on-demand ones; the head never does."""
    result: str = ""
    """Where the result record is written, also on failure."""
    deadline: int | None = None
    """Seconds until the job is given up; None: four times what the plan expects, at least an hour."""
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    """Names of Kubernetes secrets whose keys become environment variables."""


@dataclass(frozen=True)
class Size:
    """What a merge is given. Sizes are bytes, times seconds."""

    pods: int
    workers_per_pod: int
    gpus_per_pod: int
    memory: int
    """Of a worker pod."""
    head_memory: int
    seconds: float
    """How long it should take, at `RATE`."""
    deadline: int

    @property
    def workers(self) -> int:
        """Of all pods."""
        return self.pods * self.workers_per_pod


def size(record: PlanRecord, recipe: Recipe, options: Options) -> Size:
    """Return what a planned merge should be given: full pods, at least as many workers as were asked for."""
    wanted = options.workers or recipe.run.workers or _workers(record)
    pods = math.ceil(wanted / options.workers_per_pod)
    each = math.ceil(wanted / pods)
    planned = each * (record.memory + IMPORTS + IDLE) + NODE + OBJECT_STORE
    seconds = record.bytes_read / (RATE * pods * each)
    return Size(
        pods=pods,
        workers_per_pod=each,
        gpus_per_pod=math.ceil(each * recipe.run.gpus),
        memory=_round(planned / HEADROOM, 256 * 2**20),
        head_memory=_round(HEAD_MEMORY + 2**20 * len(record.models), 256 * 2**20),
        seconds=seconds,
        deadline=options.deadline or max(3600, _round(1800 + 4 * seconds, 60)),
    )


def kuberay(record: PlanRecord, recipe: Recipe, options: Options) -> list[Json]:
    """Return the manifests of a planned merge: what to apply, in this order.

    Raises `RecipeError` with everything that Kubernetes, KubeRay or Kueue would refuse or read otherwise.
    """
    script = _script(size(record, recipe, options), options)
    text = recipe_text(recipe)
    problems = [*_problems(recipe, options), *_too_large(text)]
    if problems:
        raise RecipeError(problems)
    made = _Manifests(record, options, size(record, recipe, options))
    account = [made.service_account()] if options.role_arn else []
    if options.cluster:
        return [*account, made.cluster()]
    return [*account, made.config({"recipe.yaml": text, "merge.sh": script}), made.job()]


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as YAML, with what it left open left open."""
    return to_yaml([recipe.model_dump(mode="json", exclude_unset=True)])


def to_yaml(documents: Sequence[Json]) -> str:
    """Return documents as YAML that readers of 1.1 and 1.2 understand alike: what could be read otherwise is quoted."""
    writer = YAML()
    writer.width = 2**20
    writer.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    writer.dump_all([_quoted(document) for document in documents], stream)
    return stream.getvalue()


class _Manifests:
    """The parts that RayJob, RayCronJob and RayCluster share."""

    def __init__(self, record: PlanRecord, options: Options, wanted: Size) -> None:
        self._record, self._options, self._size = record, options, wanted
        self._name = options.name or f"merge-{record.run_id[:10]}"

    def service_account(self) -> Json:
        """Return the account whose pods S3 knows by their IAM role."""
        annotations = {"eks.amazonaws.com/role-arn": self._options.role_arn}
        metadata = self._metadata(self._options.service_account) | {"annotations": annotations}
        return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}

    def config(self, files: Mapping[str, str]) -> Json:
        """Return the files that the head mounts."""
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata(self._name), "data": dict(files)}

    def job(self) -> Json:
        """Return the RayJob, or the RayCronJob that makes one each time."""
        metadata = self._metadata(self._name) | {"annotations": self._annotations()}
        if self._options.schedule:
            spec = {"schedule": self._options.schedule, "jobTemplate": self._job_spec()}
            spec |= {"timeZone": self._options.time_zone} if self._options.time_zone else {}
            return {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": metadata, "spec": spec}
        if self._options.queue:
            metadata["labels"]["kueue.x-k8s.io/queue-name"] = self._options.queue
        return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": self._job_spec()}

    def cluster(self) -> Json:
        """Return a cluster that grows to the planned size when merges ask for workers, and shrinks after them."""
        metadata = self._metadata(self._name) | {"annotations": self._annotations()}
        return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": self._cluster_spec()}

    def _job_spec(self) -> Json:
        spec: Json = {
            # One word after the other: a shell and `ray job submit` both read this line.
            "entrypoint": f"sh {FOLDER}/merge.sh",
            "submissionMode": "K8sJobMode",
            "submitterConfig": {"backoffLimit": 2},
            # KubeRay would build a new cluster after any failure, a typo's too; merge.sh knows which ones to retry.
            "backoffLimit": 0,
            "activeDeadlineSeconds": self._size.deadline,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 300,
            "submitterPodTemplate": {"spec": self._submitter()},
            "rayClusterSpec": self._cluster_spec(),
        }
        return spec | ({"suspend": True} if self._options.queue else {})

    def _cluster_spec(self) -> Json:
        grows = self._options.cluster
        autoscaler: Json = {"version": "v2", "idleTimeoutSeconds": 120, "resources": _resources(0.5, 2**30, 0)}
        autoscaler["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        head: Json = {
            # No worker on the head: losing that pod loses the job.
            "rayStartParams": {"num-cpus": "0", "object-store-memory": str(OBJECT_STORE)},
            "template": self._pod("ray-head", 2, self._size.head_memory, 0),
        }
        workers: Json = {
            "groupName": "workers",
            "replicas": 0 if grows else self._size.pods,
            "minReplicas": 0 if grows else self._size.pods,
            "maxReplicas": self._size.pods,
            "rayStartParams": {"object-store-memory": str(OBJECT_STORE)},
            "template": self._pod("ray-worker", self._size.workers_per_pod, self._size.memory, self._size.gpus_per_pod),
        }
        spec = {"enableInTreeAutoscaling": True, "autoscalerOptions": autoscaler} if grows else {}
        return {
            "rayVersion": self._options.ray_version,
            "authOptions": {"mode": "token"},  # KubeRay makes the token, and its secret
            **spec,
            "headGroupSpec": head,
            "workerGroupSpecs": [workers],
        }

    def _pod(self, container: str, cpus: float, memory: int, gpus: int) -> Json:
        head = container == "ray-head"
        mounts: list[Json] = [{"name": "tmp", "mountPath": "/tmp"}]
        volumes: list[Json] = [{"name": "tmp", "emptyDir": {"sizeLimit": _mebibytes(STORAGE)}}]
        if head and not self._options.cluster:
            mounts.append({"name": "recipe", "mountPath": FOLDER, "readOnly": True})
            volumes.append({"name": "recipe", "configMap": {"name": self._name}})
        spec: Json = {
            "serviceAccountName": self._options.service_account,
            "automountServiceAccountToken": head and self._options.cluster,  # for the autoscaler alone
            "securityContext": _POD_SECURITY,
            "affinity": {"nodeAffinity": _on_demand() if head or not self._options.spot else _spot_preferred()},
        }
        if not head:
            spec["topologySpreadConstraints"] = [self._spread()]
            tolerations = _tolerations(spot=self._options.spot, gpus=gpus)
            spec |= {"tolerations": tolerations} if tolerations else {}
        ray: Json = {
            "name": container,
            "image": self._options.image,
            "env": [{"name": name, "value": value} for name, value in self._environment().items()],
            "resources": _resources(cpus, memory, gpus, STORAGE + 2**30),
            "securityContext": _CONTAINER_SECURITY,
            "volumeMounts": mounts,
        }
        if self._options.secrets:
            ray["envFrom"] = [{"secretRef": {"name": name}} for name in self._options.secrets]
        spec |= {"containers": [ray], "volumes": volumes}
        return {"metadata": {"labels": self._labels()}, "spec": spec}

    def _submitter(self) -> Json:
        container: Json = {
            "name": "ray-job-submitter",
            "image": self._options.image,
            "env": [{"name": "HOME", "value": "/tmp"}],
            "resources": _resources(0.5, 2**30, 0),
            "securityContext": _CONTAINER_SECURITY,
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
        return {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,  # it only follows the job's log
            "securityContext": _POD_SECURITY,
            "affinity": {"nodeAffinity": _on_demand()},
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}}],
        }

    def _environment(self) -> dict[str, str]:
        own = {"HOME": "/tmp", "NUMBA_CACHE_DIR": "/tmp/numba", "RAY_USAGE_STATS_ENABLED": "0"}
        return own | dict(self._options.env)

    def _spread(self) -> Json:
        """Return the wish that workers lie on different nodes: the network is a node's."""
        return {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": self._labels()},
        }

    def _metadata(self, name: str) -> Json:
        return {"name": name, "namespace": self._options.namespace, "labels": self._labels()}

    def _labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": "ties-ray", "app.kubernetes.io/instance": self._name}

    def _annotations(self) -> dict[str, str]:
        plan = f"{len(self._record.models)} models, {self._record.bytes_read} bytes read, "
        plan += f"{self._record.bytes_written} written, {self._record.memory} a worker"
        workers = f"{self._size.workers} in pods of {self._size.workers_per_pod}, about {self._size.seconds:.0f} s"
        return {"ties-ray/run-id": self._record.run_id, "ties-ray/plan": plan, "ties-ray/workers": workers}


# -- parts


_POD_SECURITY: Json = {
    "runAsNonRoot": True,
    "runAsUser": 1000,  # `ray` of Ray's images
    "runAsGroup": 100,
    "fsGroup": 100,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CONTAINER_SECURITY: Json = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def _workers(record: PlanRecord) -> int:
    most = max((one.shards for one in record.rounds), default=1)
    return max(1, min(math.ceil(record.bytes_read / (RATE * TARGET)), most, MAX_WORKERS))


def _script(wanted: Size, options: Options) -> str:
    overrides = ("run.executor=ray", "run.address=auto", f"run.workers={wanted.workers}", "run.deadline=1800")
    words = ["ties-ray", "merge", f"{FOLDER}/recipe.yaml", "--json"]
    words += [word for one in overrides for word in ("--set", one)]
    command = shlex.join(words + (["--result", options.result] if options.result else []))
    return f"""\
# Merges; again where that helps: 4 (interrupted, it continues) and 5 (something out of reach). Other codes are final.
for pause in 30 120 0; do
  {command}
  code=$?
  case $code in
    4 | 5) sleep "$pause" ;;
    *) exit "$code" ;;
  esac
done
exit "$code"
"""


def _resources(cpus: float, memory: int, gpus: int, storage: int = 0) -> Json:
    """Return requests and limits, which are equal: Ray counts by limits, Kubernetes and Kueue place by requests."""
    amounts = {"cpu": f"{cpus:g}" if cpus >= 1 else f"{round(1000 * cpus)}m", "memory": _mebibytes(memory)}
    amounts |= {"ephemeral-storage": _mebibytes(storage)} if storage else {}
    amounts |= {"nvidia.com/gpu": str(gpus)} if gpus else {}
    return {"requests": dict(amounts), "limits": amounts}


def _on_demand() -> Json:
    """Return a demand that nodes without these labels meet too."""
    terms = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in SPOT_LABELS.items()]
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": terms}]}}


def _spot_preferred() -> Json:
    """Return a wish, not a demand: where no spot node can be had, pods go to on-demand ones."""

    def term(key: str, value: str) -> Json:
        return {"weight": 100, "preference": {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}}

    return {"preferredDuringSchedulingIgnoredDuringExecution": [term(key, value) for key, value in SPOT_LABELS.items()]}


def _tolerations(*, spot: bool, gpus: int) -> list[Json]:
    keys = ["spot", *(key for key in SPOT_LABELS if not key.startswith("eks"))] if spot else []
    keys += ["nvidia.com/gpu"] if gpus else []
    return [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys]


def _problems(recipe: Recipe, options: Options) -> Iterator[Problem]:
    longest = MAX_CRON_NAME if options.schedule else MAX_NAME
    names = [("--name", options.name, longest), ("--namespace", options.namespace, 63)]
    names += [("--service-account", options.service_account, 63), ("--kueue-queue", options.queue, 63)]
    names += [("--env-from", secret, 63) for secret in options.secrets]
    for option, name, most in names:
        if name and (len(name) > most or not _NAME.fullmatch(name)):
            yield Problem(option, f"{name!r} is no name here", f"a-z, 0-9 and -, a letter first, at most {most}")
    if options.schedule and (len(options.schedule.split()) != 5 or "TZ" in options.schedule):
        yield Problem("--cron", f"{options.schedule!r} has not five fields", "as in '15 2 * * *', and --time-zone")
    if options.schedule and options.queue:
        what = "the jobs of a RayCronJob would not carry the queue's label"
        yield Problem("--cron", what, "let the schedule come from outside Kubernetes, or leave --kueue-queue out")
    if options.cluster and (options.schedule or options.queue):
        yield Problem("--cluster", "a cluster that grows has neither a schedule nor a place in a queue of Kueue")
    if options.workers_per_pod < 1 or (options.workers is not None and options.workers < 1):
        yield Problem("--workers", "less than one")
    if not options.image or any(char.isspace() for char in options.image):
        yield Problem("--image", f"{options.image!r} names no image", "as in registry.example/ties-ray:0.1.0")
    for name, value in options.env.items():
        if _SECRET.search(name) or holds_secret(value) or USER_IN_URL.match(value):
            what = f"{name} looks like a secret, or holds one, which a manifest must not"
            yield Problem("--env", what, "put it into a Kubernetes secret and name that: --env-from NAME")
    for place, path in _paths(recipe, options):
        if "://" not in hub_uri(path) or path.startswith("file://"):
            what = f"{path} is a path of this machine, which a pod does not see"
            yield Problem(place, what, "put it into object storage")


def _paths(recipe: Recipe, options: Options) -> Iterator[tuple[str, str]]:
    for number, entry in enumerate(recipe.models):
        yield f"models.{number}", entry.path or entry.table or ""
    for place, path in (
        ("base", recipe.base and recipe.base.path),
        ("output.path", recipe.output.path),
        ("run.pool_cache", recipe.run.pool_cache),
        ("--result", options.result),
    ):
        if path:
            yield place, path


def _too_large(text: str) -> Iterator[Problem]:
    if len(text.encode()) > MAX_CONFIG:
        what = f"has {len(text.encode()):,} bytes, and a ConfigMap takes {MAX_CONFIG:,}"
        yield Problem("recipe", what, "put its models into a table in object storage")


def _quoted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_quoted(key): _quoted(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_quoted(each) for each in value]
    if not isinstance(value, str):
        return value
    if "\n" in value and value[0] not in " \n" and all(line.isprintable() for line in value.split("\n")):
        return LiteralScalarString(value)
    plain = _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT and not value.endswith(":")
    return value if plain else DoubleQuotedScalarString(value)


def _round(value: float, step: int) -> int:
    return math.ceil(value / step) * step


def _mebibytes(size: int) -> str:
    return f"{math.ceil(size / 2**20)}Mi"
