import importlib.metadata
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from ray import cloudpickle

import ties_ray
from tests.conftest import Bucket
from tests.tools.families import Family, make_family
from tests.tools.merging import LOCAL, carried_out, recipe_of
from ties_ray.operations import merging
from ties_ray.stores import Stores


@pytest.fixture
def recipe(family_of: Callable[..., Family], tmp_path: Path) -> Path:
    recipe = recipe_of(family_of(num_models=3), tmp_path / "out", {"name": "ties", "density": 0.3}, run=LOCAL)
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json(exclude_unset=True))
    return path


def test_the_package_imports_neither_torch_nor_ray() -> None:
    code = "import sys, ties_ray; heavy = {'torch', 'ray', 'pydantic'} & sys.modules.keys(); assert not heavy, heavy;"
    code += "import ties_ray.planning.plan; assert ties_ray.plan.__name__ == 'plan' and callable(ties_ray.plan);"
    code += "assert ties_ray.Plan.__name__ == 'Plan' and not {'torch', 'ray'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_function_that_uses_the_package_can_be_sent_to_a_worker() -> None:
    function = eval("lambda: ties_ray.plan.__module__", {"ties_ray": ties_ray})  # as in a notebook: by value
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)())"
    sent = subprocess.run([sys.executable, "-c", code], input=cloudpickle.dumps(function), capture_output=True)
    assert sent.stdout.decode() == "ties_ray\n", sent.stderr.decode()
    assert pickle.loads(cloudpickle.dumps(ties_ray)) is ties_ray


def test_the_version_is_the_one_that_is_installed() -> None:
    assert ties_ray.__version__ == importlib.metadata.version("ties-ray")
    assert set(ties_ray.__all__) == set(dir(ties_ray))


def test_code_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert getattr(ties_ray, "__version__", "none") == "none"


def test_python_takes_a_recipe_a_mapping_or_a_path(recipe: Path, tmp_path: Path) -> None:
    loaded = ties_ray.load_recipe(recipe)
    plans = [ties_ray.plan(loaded), ties_ray.plan(json.loads(recipe.read_text())), ties_ray.plan(str(recipe))]
    assert len({plan.run_id for plan in plans}) == 1
    stages: list[str] = []
    result = ties_ray.merge(loaded, watch=lambda progress: stages.append(progress.stage))
    assert result.status == "done"
    assert {"start", "merge", "publish"} <= set(stages)
    assert ties_ray.merge(recipe).reused
    assert not ties_ray.merge(recipe, fresh=True).reused


def test_python_has_what_the_command_line_has(recipe: Path, tmp_path: Path) -> None:
    asked = json.loads(recipe.read_text())
    result = ties_ray.merge(recipe, progress=False)
    output, pointer = tmp_path / "out", tmp_path / "current.json"
    folder = ties_ray.inspect(asked["models"][0]["path"]).folders[0]
    assert (folder.format, folder.problems) == ("checkpoint", [])
    assert ties_ray.verify(output, sample=0.01).problems == []
    done = ties_ray.status(output)
    assert done.result
    assert done.result.run_id == result.run_id
    promotion = ties_ray.promote(output, pointer, evaluate=["true"], verify=True)
    assert promotion.current.output == str(output)
    with pytest.raises(ties_ray.InputError, match="no finished merge"):
        ties_ray.verify(tmp_path)


def test_what_is_returned_shows_itself_in_a_line_and_as_a_table(recipe: Path) -> None:
    plan, result = ties_ray.plan(recipe), ties_ray.merge(recipe)
    values = [plan, result, ties_ray.inspect(plan.catalog.models[0].uri), ties_ray.status(result.output),
              ties_ray.verify(result.output), ties_ray.load_recipe(recipe)]  # fmt: skip
    assert all(len(repr(value)) < 400 and "\n" not in repr(value) for value in values)
    assert repr(plan).startswith(f"Plan(run_id='{plan.run_id}', method='ties', num_models=3, output=")
    assert str(result).startswith("MergeResult(status='done', ")
    assert [row["model"] for row in result.table()] == ["model-0", "model-1", "model-2"]
    assert all(0 < cast(float, row["kept_share"]) <= 1 for row in result.table())
    assert [row["model"] for row in plan.table()] == [model.uri for model in plan.catalog.models]
    assert "<td>model-1</td>" in result._repr_html_()


def test_a_table_becomes_a_data_frame_where_pandas_is_installed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = ties_ray.merge(recipe)
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    assert result.to_dataframe() == result.table()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        result.to_dataframe()


def test_progress_is_shown_where_it_is_asked_for(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ties_ray.merge(recipe)
    assert capsys.readouterr() == ("", "")
    ties_ray.merge(recipe, fresh=True, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "plan: reading headers" in shown.err
    assert "publish: publishing" in shown.err


def test_python_refuses_what_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ties_ray.InputError, match=r"there is no such recipe"):
        ties_ray.load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ties_ray.InputError, match=r"is a folder"):
        ties_ray.load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"base: caf\xe9")
    with pytest.raises(ties_ray.RecipeError, match=r"not text in UTF-8"):
        ties_ray.load_recipe(tmp_path / "latin.yaml")
    with pytest.raises(AttributeError, match="has no attribute 'mergen'"):
        ties_ray.mergen  # noqa: B018


def test_a_recipe_and_its_models_may_lie_at_any_service_that_speaks_s3(
    s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = Stores(s3_bucket.storage)
    family = make_family(stores.of(s3_bucket.uri), s3_bucket.uri, num_models=2)
    text = recipe_of(family, f"{s3_bucket.uri}/out", "average").model_dump_json(exclude_unset=True)
    stores.writer(s3_bucket.uri).put(f"{s3_bucket.uri}/recipe.json", text.encode())
    endpoint = str(s3_bucket.storage["s3"]["endpoint_url"])
    recipe = ties_ray.load_recipe(f"{s3_bucket.uri}/recipe.json", [f"storage.s3.endpoint_url={endpoint}"])
    result = ties_ray.merge(recipe)
    name = "out"
    assert result.download_command == (
        f"aws s3 cp --recursive {s3_bucket.uri}/out {name} --exclude '.ties-ray/*' --endpoint-url {endpoint}"
    )
    assert result.opened_by.endswith(f'.from_pretrained("{name}")')
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert ties_ray.merge(f"{s3_bucket.uri}/recipe.json").reused


def test_a_plan_is_carried_out_as_it_is(recipe: Path) -> None:
    planned = ties_ray.plan(recipe)
    done = merging.carry_out(planned, started=time.monotonic(), fresh=False, watch=lambda progress: None)
    assert done.run_id == planned.run_id
    assert done.bytes_read == carried_out(done).bytes_read
