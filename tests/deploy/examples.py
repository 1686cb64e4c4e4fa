"""The manifests of deploy/kuberay, as the command prints them for one plan; `python -m tests.deploy.examples` writes
them again.
"""

from dataclasses import replace
from pathlib import Path

from ties_ray.operations.kubernetes import Options, kuberay, to_yaml
from ties_ray.recipe.parse import parse
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import PlannedInput, PlannedRoundRecord, PlanRecord

FOLDER = Path(__file__).parents[2] / "deploy" / "kuberay"
RECIPE = """\
base: s3://models/llama-3.1-8b
models:
  - {path: "s3://models/team-*/", at_least: 10}
method: {name: ties, density: 0.2}
output: {path: "s3://merged/teams/{run_id}", dtype: bfloat16}
"""
OPTIONS = Options(
    image="registry.example/ties-ray:0.1.0",
    ray_version="2.60.0",
    name="merge-teams",
    namespace="merges",
    result="s3://merged/teams/last.result.json",
    env={"AWS_REGION": "eu-west-1"},
)
EXAMPLES = {
    "rayjob.yaml": replace(OPTIONS, role_arn="arn:aws:iam::111122223333:role/ties-ray"),
    "rayjob-kueue.yaml": replace(OPTIONS, queue="merges"),
    "raycronjob.yaml": replace(OPTIONS, schedule="15 2 * * *", time_zone="Europe/Berlin"),
    "raycluster.yaml": replace(OPTIONS, name="merges", cluster=True),
}


def recipe() -> Recipe:
    return parse(RECIPE)


def record(*, num_models: int = 10, memory: int = 411_000_000, shards: int = 240) -> PlanRecord:
    """Return what a plan says of so many fine-tunes of 8 B parameters in bf16: three rounds, 16 GB a model each."""
    rounds = [
        PlannedRoundRecord.model_construct(name=name, shards=shards, bytes_read=16_000_000_000 * num_models)
        for name in ("count", "refine", "merge")
    ]
    return PlanRecord.model_construct(
        run_id="5f0c7b1a9e3d4c2b8a6f5e4d3c2b1a09",
        models=[PlannedInput.model_construct(id=str(number)) for number in range(num_models)],
        rounds=rounds,
        bytes_read=sum(one.bytes_read for one in rounds),
        bytes_written=16_000_000_000,
        memory=memory,
    )


def example(name: str) -> str:
    words = {"rayjob-kueue.yaml": " --kueue-queue merges", "raycronjob.yaml": ' --cron "15 2 * * *"'}
    words |= {"raycluster.yaml": " --cluster"}
    head = f"# As `ties-ray deploy kuberay recipe.yaml --image IMAGE{words.get(name, '')}` prints it\n"
    head += "# for ten fine-tunes of 8 B parameters; make your own. Written by `python -m tests.deploy.examples`.\n"
    return head + to_yaml(kuberay(record(), recipe(), EXAMPLES[name]))


if __name__ == "__main__":
    for each in EXAMPLES:
        (FOLDER / each).write_text(example(each))
