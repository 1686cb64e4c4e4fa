"""Argo's manifests, as far as a machine without Kubernetes can: names meet, the scripts run, the RayJob is valid."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.conftest import Bucket, tool
from tests.deploy.rules import broken
from tests.tools.adapters import make_pool
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores
from ties_ray_pipelines.step import verdict

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "pipelines" / "argo"
SCHEMA = Draft202012Validator(json.loads((ROOT / "deploy" / "schemas" / "kubernetes.json").read_text()))
TEMPLATE = yaml.safe_load((FOLDER / "merge.yaml").read_text())
TEMPLATES: dict[str, Any] = {one["name"]: one for one in TEMPLATE["spec"]["templates"]}
PARAMETERS = {one["name"]: one.get("value") for one in TEMPLATE["spec"]["arguments"]["parameters"]}


def names(template: Any, which: str) -> set[str]:
    return {one["name"] for one in template.get(which, {}).get("parameters", [])}


def steps_of(template: Any) -> list[Any]:
    return [step for group in template.get("steps", []) for step in group]


def test_every_reference_has_something_to_refer_to() -> None:
    assert TEMPLATE["spec"]["entrypoint"] in TEMPLATES
    for template in TEMPLATES.values():
        before: dict[str, set[str]] = {}
        for step in steps_of(template):
            given = {one["name"] for one in step.get("arguments", {}).get("parameters", [])}
            assert given == names(TEMPLATES[step["template"]], "inputs")
            for name, output in re.findall(r"\{\{steps\.(\w+)\.outputs\.parameters\.(\w+)\}\}", json.dumps(step)):
                assert output in before[name]
            before[step["name"]] = names(TEMPLATES[step["template"]], "outputs")
        for asked in re.findall(r"\{\{workflow\.parameters\.(\w+)\}\}", json.dumps(template)):
            assert asked in PARAMETERS
        for asked in re.findall(r"\{\{inputs\.parameters\.(\w+)\}\}", json.dumps(template)):
            assert asked in names(template, "inputs")


def test_the_nightly_gives_every_parameter_that_has_no_value() -> None:
    cron = yaml.safe_load((FOLDER / "nightly.yaml").read_text())["spec"]
    assert cron["workflowSpec"]["workflowTemplateRef"]["name"] == TEMPLATE["metadata"]["name"]
    given = {one["name"] for one in cron["workflowSpec"]["arguments"]["parameters"]}
    assert {name for name, value in PARAMETERS.items() if value is None} <= given <= PARAMETERS.keys()


def test_argo_tries_again_what_the_contract_says() -> None:
    found = [one["retryStrategy"]["expression"] for one in TEMPLATES.values() if "retryStrategy" in one]
    codes = {code for code in range(256) if verdict(code) == "again"}
    assert len(found) == 3
    assert {one: set(map(int, re.findall(r"\d+", one))) for one in found} == {found[0]: codes}
    assert "retryStrategy" not in TEMPLATES["run"], "merge.sh tries again; what it ends with is final"


def test_the_role_allows_what_the_resources_do() -> None:
    documents = list(yaml.safe_load_all((FOLDER / "roles.yaml").read_text()))
    assert TEMPLATE["spec"]["serviceAccountName"] == documents[0]["metadata"]["name"]
    allowed = {(kind, verb) for rule in documents[1]["rules"] for kind in rule["resources"] for verb in rule["verbs"]}
    assert {("rayjobs", "create"), ("rayjobs", "get"), ("configmaps", "patch")} <= allowed


@pytest.fixture
def recipe(s3_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of a recipe whose inputs and output lie in a bucket; the environment names the service."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_bucket.storage["s3"]["endpoint_url"])
    stores = Stores(s3_bucket.storage)
    pool = make_pool(stores.of(s3_bucket.uri), f"{s3_bucket.uri}/pool", num_adapters=2)
    output = {"path": f"{s3_bucket.uri}/out/{{run_id}}", "kind": "adapter", "rank": 8}
    models = [f"{s3_bucket.uri}/pool/adapter-*/"]
    made = {"base": pool.base, "models": models, "method": "ties", "output": output}
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(made))
    return file


def script(name: str, folder: Path, **parameters: str) -> int:
    """Run a template's script as its pod would, with /tmp and placeholders replaced; return the exit code."""
    source = TEMPLATES[name]["script"]["source"].replace("/tmp", str(folder))
    assert "{{" not in source, "a parameter in the source is Python"
    known = {f"workflow.parameters.{key}": value for key, value in (PARAMETERS | parameters).items()}
    known |= {"workflow.name": "nightly-merge-1763777700", "workflow.namespace": "merges"}
    given = {one["name"]: filled(one["value"], known) for one in TEMPLATES[name]["script"]["env"]}
    path = {"PATH": f"{Path(tool('ties-ray')).parent}:{os.environ['PATH']}"}
    return subprocess.run([sys.executable, "-c", source], env=os.environ | given | path, cwd=ROOT).returncode


def filled(text: str, known: dict[str, object]) -> str:
    """Return a text with Argo's placeholders replaced."""
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: str(known[match[1]]), text)


@pytest.mark.parametrize(
    "template", [one for one in TEMPLATES.values() if "script" in one], ids=lambda one: one["name"]
)
def test_no_parameter_stands_in_the_source_of_a_script(template: dict[str, Any]) -> None:
    assert "{{" not in template["script"]["source"]


def test_a_parameter_that_looks_like_python_or_an_option_is_a_value(tmp_path: Path) -> None:
    hostile = f"--x\"; open('{tmp_path}/ran', 'w'); \""
    assert script("plan", tmp_path, recipe=hostile, result=hostile, image="x") == 3  # there is no such file
    assert script("record", tmp_path, result=hostile) == 1
    assert not (tmp_path / "ran").exists()


def test_a_record_cannot_give_options_to_what_follows() -> None:
    for name in ("promote", "merge-on-a-cluster"):
        words = [str(word) for word in TEMPLATES[name]["container"]["args"]]
        last = len(words) - 1 - words[::-1].index("--")
        assert not [word for word in words[:last] if word.startswith("{{")]
        assert [word for word in words[last:] if word.startswith("{{")]


def test_the_plan_step_prints_a_valid_rayjob_sized_for_the_merge(recipe: Path, tmp_path: Path) -> None:
    assert script("plan", tmp_path, recipe=str(recipe), result="s3://b/result.json") == 0
    config, job = (json.loads((tmp_path / name).read_text()) for name in ("configmap.json", "rayjob.json"))
    for manifest in (config, job):
        assert not [error.message for error in SCHEMA.iter_errors(manifest)]
        assert not broken(manifest)
        assert manifest["metadata"]["name"] == "nightly-merge-1763777700"
    assert "--result s3://b/result.json" in config["data"]["merge.sh"]


def test_the_plan_step_ends_with_the_code_of_a_wrong_recipe(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"bose": "b"}))
    assert script("plan", tmp_path, recipe=str(recipe), result="") == 2


def test_the_record_step_hands_on_what_promote_needs(tmp_path: Path) -> None:
    pool, output = make_pool(Stores({}).of("/"), str(tmp_path / "pool"), num_adapters=2), str(tmp_path / "{run_id}")
    recipe = {"base": pool.base, "models": list(pool.adapters), "method": "ties", "run": {"executor": "local"}}
    result = merging.merge(validate(recipe | {"output": {"path": output, "kind": "adapter", "rank": 8}}))
    (tmp_path / "result.json").write_text(result.model_dump_json())
    assert script("record", tmp_path, result=f"{tmp_path}/result.json") == 0
    assert (tmp_path / "reused").read_text() == "false"
    words = [*TEMPLATES["promote"]["container"]["command"], *TEMPLATES["promote"]["container"]["args"]]
    known = {"inputs.parameters.output": (tmp_path / "output").read_text()}
    known |= {"workflow.parameters.pointer": f"{tmp_path}/current.json", "workflow.parameters.evaluate": "true"}
    subprocess.run([tool(words[0]), *(filled(word, known) for word in words[1:])], check=True)
    assert json.loads((tmp_path / "current.json").read_text())["current"]["output"] == result.output
