"""Kubernetes manifests of a planned merge: a RayJob, RayCronJob or RayCluster of KubeRay, sized for it.

No cluster has taken these manifests yet. The rules come from the source of KubeRay's validation and from Kueue's
documentation; deploy/schemas and tests/deploy check them.
"""

import io
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

from ties_ray.errors import USER_IN_URL, Problem, RecipeError, holds_secret
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import PlanRecord
from ties_ray.stores import hub_uri

Json = dict[str, Any]

IMPORTS = 256 * 2**20
"""Bytes of a worker's imports: torch, numba and Ray (229 MB measured in an actor)."""
NODE = 768 * 2**20
"""Bytes of a pod beside its workers: raylet, agents, idle processes (456 MiB measured, and 50 MiB a CPU)."""
IDLE = 64 * 2**20
"""Bytes of the process that Ray starts ahead for each CPU."""
OBJECT_STORE = 128 * 2**20
"""Bytes of Ray's object store. We send nothing through it, and Ray demands at least 75 MiB."""
HEADROOM = 0.85
"""Share of a pod's memory that is planned for; Ray kills workers at 0.95."""
HEAD_MEMORY = 4 * 2**30
"""Bytes of the head: GCS, dashboard and the driver with its imports. Each model adds 1 MiB for the plan."""
STORAGE = 4 * 2**30
"""Bytes of /tmp, the only writable folder of a pod: it holds Ray's logs, compiled kernels and HOME."""
RATE = 100e6
"""Bytes a second that a worker is expected to read. This is the rate of one reader of S3; a core is faster."""
TARGET = 900.0
"""Seconds that a merge should take at this rate; they decide the number of workers."""
MAX_WORKERS = 256
"""Largest number of workers that is chosen without being asked for."""
MAX_NAME = 47
"""Characters of a name. KubeRay adds 6 to it for a cluster and 10 for a service; a label has at most 63."""
MAX_CRON_NAME = 36
"""Characters of the name of a RayCronJob, which adds its time to the name of each job: 11 characters."""
MAX_CONFIG = 1_000_000
"""Bytes of a ConfigMap, which Kubernetes bounds at 1 MiB."""
FOLDER = "/etc/ties-ray"
"""Folder of the recipe and the script on the head."""

SPOT_LABELS = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
"""Labels by which Karpenter, EKS, GKE and AKS mark spot nodes, which may be taken away."""
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./:@-]*")
_NOT_TEXT = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", ".inf", ".nan"))
"""Texts that YAML 1.1, which Kubernetes reads, takes for another type."""


@dataclass(frozen=True)
class Options:
    """The choices of the user; the rest follows from the plan."""

    image: str
    """Image that holds ties_ray, Ray and torch; deploy/Dockerfile makes one."""
    ray_version: str
    """Ray version of the image; KubeRay chooses its commands by it."""
    name: str = ""
    """Name of all objects; empty: `merge-` and the start of the run_id."""
    namespace: str = "default"
    workers: int | None = None
    """Number of workers. None: the recipe's, else enough to read the inputs in a quarter of an hour."""
    workers_per_pod: int = 4
    """Most workers of a pod; each takes one CPU. Small pods spread over more nodes, and over more networks."""
    service_account: str = "ties-ray"
    role_arn: str = ""
    """IAM role (IRSA) of the service account; where it is given, the account is printed too."""
    queue: str = ""
    """Local queue of Kueue."""
    schedule: str = ""
    """Five fields of cron: a RayCronJob instead of a RayJob."""
    time_zone: str = ""
    """Time zone of the schedule; empty: the operator's."""
    cluster: bool = False
    """Whether to print a RayCluster that grows and shrinks, for merges to come, instead of a job."""
    spot: bool = True
    """Whether workers go to spot nodes where there are any, else to on-demand ones; the head never does."""
    result: str = ""
    """URI of the result record, which is written on failure too."""
    deadline: int | None = None
    """Seconds until the job is given up; None: four times the expected time, at least an hour."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of all pods."""
    secrets: Sequence[str] = ()
    """Names of Kubernetes secrets whose keys become environment variables."""


@dataclass(frozen=True)
class Size:
    """The resources of a merge. Sizes are bytes, times are seconds."""

    pods: int
    workers_per_pod: int
    gpus_per_pod: int
    memory: int
    """Memory of a worker pod."""
    head_memory: int
    """Memory of the head pod."""
    seconds: float
    """Expected time of the merge, at `RATE`."""
    deadline: int
    """Time until the job is given up."""

    @property
    def workers(self) -> int:
        """Number of workers in all pods."""
        return self.pods * self.workers_per_pod


def size(record: PlanRecord, recipe: Recipe, options: Options) -> Size:
    """Return the resources of a planned merge: full pods, and at least as many workers as were asked for."""
    workers = options.workers or recipe.run.workers or _workers(record)
    pods = math.ceil(workers / options.workers_per_pod)
    each = math.ceil(workers / pods)
    planned = each * (record.memory + IMPORTS + IDLE) + NODE + OBJECT_STORE
    seconds = record.bytes_read / (RATE * pods * each)
    return Size(
        pods=pods,
        workers_per_pod=each,
        gpus_per_pod=math.ceil(each * recipe.run.gpus / record.sharers),
        memory=_round(planned / HEADROOM, 256 * 2**20),
        head_memory=_round(HEAD_MEMORY + 2**20 * len(record.models), 256 * 2**20),
        seconds=seconds,
        deadline=options.deadline or max(3600, _round(1800 + 4 * seconds, 60)),
    )


def kuberay(record: PlanRecord, recipe: Recipe, options: Options) -> list[Json]:
    """Return the manifests of a planned merge, in the order in which they are applied.

    Raises `RecipeError` with everything that Kubernetes, KubeRay or Kueue would refuse or misread.
    """
    script = _script(size(record, recipe, options), options)
    text = recipe_text(recipe)
    problems = [*_problems(recipe, options), *_own_addresses(recipe, options), *_too_large(text)]
    if problems:
        raise RecipeError(problems)
    manifests = _Manifests(record, options, size(record, recipe, options))
    account = [manifests.service_account()] if options.role_arn else []
    if options.cluster:
        return [*account, manifests.cluster()]
    return [*account, manifests.config({"recipe.yaml": text, "merge.sh": script}), manifests.job()]


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as YAML, without the fields that it leaves to their defaults."""
    return to_yaml([recipe.model_dump(mode="json", exclude_unset=True)])


def to_yaml(documents: Sequence[Json]) -> str:
    """Return documents as YAML that readers of YAML 1.1 and 1.2 read alike: ambiguous texts are quoted."""
    writer = YAML()
    writer.width = 2**20
    writer.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    writer.dump_all([_quoted(document) for document in documents], stream)
    return stream.getvalue()


class _Manifests:
    """Builds the manifests, whose parts RayJob, RayCronJob and RayCluster share."""

    def __init__(self, record: PlanRecord, options: Options, size: Size) -> None:
        self._record, self._options, self._size = record, options, size
        self._name = options.name or f"merge-{record.run_id[:10]}"

    def service_account(self) -> Json:
        """Return the service account that gives its pods an IAM role."""
        annotations = {"eks.amazonaws.com/role-arn": self._options.role_arn}
        metadata = self._metadata(self._options.service_account) | {"annotations": annotations}
        return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}

    def config(self, files: Mapping[str, str]) -> Json:
        """Return the ConfigMap of the files that the head mounts."""
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata(self._name), "data": dict(files)}

    def job(self) -> Json:
        """Return the RayJob, or the RayCronJob that starts a job at each of its times."""
        metadata = self._metadata(self._name) | {"annotations": self._annotations()}
        if self._options.schedule:
            spec = {"schedule": self._options.schedule, "jobTemplate": self._job_spec()}
            spec |= {"timeZone": self._options.time_zone} if self._options.time_zone else {}
            return {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": metadata, "spec": spec}
        if self._options.queue:
            metadata["labels"]["kueue.x-k8s.io/queue-name"] = self._options.queue
        return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": self._job_spec()}

    def cluster(self) -> Json:
        """Return the RayCluster: it grows to the planned size when merges ask for workers, and shrinks after them."""
        metadata = self._metadata(self._name) | {"annotations": self._annotations()}
        return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": self._cluster_spec()}

    def _job_spec(self) -> Json:
        spec: Json = {
            # A shell and `ray job submit` both split this line into words.
            "entrypoint": f"sh {FOLDER}/merge.sh",
            "submissionMode": "K8sJobMode",
            "submitterConfig": {"backoffLimit": 2},
            # KubeRay would build a new cluster after any failure, even a typo. merge.sh retries what may pass.
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
            # The head has no worker, since the loss of this pod loses the job.
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
            "authOptions": {"mode": "token"},  # KubeRay creates the token and its secret
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
            "automountServiceAccountToken": head and self._options.cluster,  # only the autoscaler needs it
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
            "automountServiceAccountToken": False,  # the submitter only follows the job's log
            "securityContext": _POD_SECURITY,
            "affinity": {"nodeAffinity": _on_demand()},
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}}],
        }

    def _environment(self) -> dict[str, str]:
        own = {"HOME": "/tmp", "RAY_USAGE_STATS_ENABLED": "0"}
        return own | dict(self._options.env)

    def _spread(self) -> Json:
        """Return the preference that workers run on different nodes, each with a network card of its own."""
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
    "runAsUser": 1000,  # the user `ray` of Ray's images
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
    most = max((round_.shards for round_ in record.rounds), default=1)
    return max(1, min(math.ceil(record.bytes_read / (RATE * TARGET)), most, MAX_WORKERS))


def _script(size: Size, options: Options) -> str:
    overrides = ("run.executor=ray", "run.address=auto", f"run.workers={size.workers}", "run.deadline=1800")
    words = ["ties-ray", "merge", f"{FOLDER}/recipe.yaml", "--json"]
    words += [word for override in overrides for word in ("--set", override)]
    command = shlex.join(words + (["--result", options.result] if options.result else []))
    return f"""\
# Merges. Repeats it where that helps: 4 (interrupted, it continues) and 5 (out of reach). Other codes are final.
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
    """Return equal requests and limits: Ray counts by limits, Kubernetes and Kueue place by requests."""
    amounts = {"cpu": f"{cpus:g}" if cpus >= 1 else f"{round(1000 * cpus)}m", "memory": _mebibytes(memory)}
    amounts |= {"ephemeral-storage": _mebibytes(storage)} if storage else {}
    amounts |= {"nvidia.com/gpu": str(gpus)} if gpus else {}
    return {"requests": dict(amounts), "limits": amounts}


def _on_demand() -> Json:
    """Return the requirement that a node is no spot node; nodes without these labels meet it."""
    terms = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in SPOT_LABELS.items()]
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": terms}]}}


def _spot_preferred() -> Json:
    """Return the preference for spot nodes: where there are none, pods go to on-demand nodes."""

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
        message = "the jobs of a RayCronJob would not carry the queue's label"
        yield Problem("--cron", message, "let the schedule come from outside Kubernetes, or leave --kueue-queue out")
    if options.cluster and (options.schedule or options.queue):
        yield Problem("--cluster", "a cluster that grows has neither a schedule nor a place in a queue of Kueue")
    if options.workers_per_pod < 1 or (options.workers is not None and options.workers < 1):
        yield Problem("--workers", "less than one")
    if not options.image or any(char.isspace() for char in options.image):
        yield Problem("--image", f"{options.image!r} names no image", "as in registry.example/ties-ray:0.1.0")
    for name, value in options.env.items():
        if _SECRET.search(name) or holds_secret(value) or USER_IN_URL.match(value):
            message = f"{name} looks like a secret, or holds one, which a manifest must not"
            yield Problem("--env", message, "put it into a Kubernetes secret and name that: --env-from NAME")
    for place, path in _paths(recipe, options):
        if "://" not in hub_uri(path) or path.startswith("file://"):
            message = f"{path} is a path of this machine, which a pod does not see"
            yield Problem(place, message, "put it into object storage")


def _own_addresses(recipe: Recipe, options: Options) -> Iterator[Problem]:
    """Yield the addresses of services that mean this machine, and in a pod the pod."""
    places = {f"storage.{scheme}.endpoint_url": each.get("endpoint_url", "") for scheme, each in recipe.storage.items()}
    places |= {f"--env {name}": value for name, value in options.env.items() if name.startswith("AWS_ENDPOINT_URL")}
    for place, url in places.items():
        host = urlsplit(str(url)).hostname or ""
        if host in ("localhost", "::1") or host.startswith("127."):
            message = f"{host} is this machine, which a pod does not see"
            remedy = "set AWS_ENDPOINT_URL here instead, and give the pods theirs: --env AWS_ENDPOINT_URL=ADDRESS"
            yield Problem(place, message, remedy)


def _paths(recipe: Recipe, options: Options) -> Iterator[tuple[str, str]]:
    for number, entry in enumerate(recipe.models):
        yield f"models.{number}", entry.path or entry.table or entry.run or ""
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
        message = f"has {len(text.encode()):,} bytes, and a ConfigMap takes {MAX_CONFIG:,}"
        yield Problem("recipe", message, "put its models into a table in object storage")


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
