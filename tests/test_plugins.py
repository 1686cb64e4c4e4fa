"""A method, an output kind, a format, a store and an executor are one file each, dropped into a folder and used."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file

import ties_ray
from tests.tools import oracle
from tests.tools.families import Family, raw_bytes
from tests.tools.merging import digests, merge, read_tensors, recipe_of, same_bits
from tests.tools.oracle import Rules
from ties_ray import plugins
from ties_ray.errors import RecipeError
from ties_ray.executors import Executor
from ties_ray.formats import Format
from ties_ray.inputs.catalog import read_catalog
from ties_ray.methods import Method
from ties_ray.outputs import Output
from ties_ray.stores import Store, Stores
from ties_ray.tensors import Parameter
from ties_ray.testing import FormatContract, MethodContract, OutputContract, StoreContract

MakeFamily = Callable[..., Family]
OURS = Path(__file__).with_name("plugins")


@pytest.fixture
def drop(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a plugin folder of one file, `methods/mine.py` say."""

    def make(file: str) -> Path:
        target = tmp_path / "plugins" / file
        target.parent.mkdir(parents=True)
        shutil.copy(OURS / file, target)
        assert [path for path in (tmp_path / "plugins").rglob("*") if path.is_file()] == [target]
        return tmp_path / "plugins"

    return make


def command(folder: Path | None, family: Family, output: object, method: object, **more: Any) -> dict[str, Any]:
    """Run `ties-ray merge` with a plugin folder; return the result record. The recipe is not looked at before."""
    entries = [{"path": uri} for uri in family.models]
    data = {"base": family.base, "models": entries, "method": method, "output": output, "run": {"executor": "local"}}
    environment = dict(os.environ) | ({plugins.PLUGIN_FOLDER: str(folder)} if folder else {})
    done = subprocess.run(
        [sys.executable, "-c", "from ties_ray.cli.commands import main; main()", "merge", "-", "--json"],
        input=json.dumps(data | more),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    assert record["status"] == ("failed" if done.returncode else "done"), done.stderr
    assert (record["status"] == "done") == (folder is not None), record["error"]
    return record


def test_a_method_is_one_file(family_of: MakeFamily, tmp_path: Path, drop: Callable[[str], Path]) -> None:
    family, method = family_of(num_models=3), {"name": "plain_ties", "density": 0.3}
    output = str(tmp_path / "out")
    assert "unknown method 'plain_ties'" in command(None, family, output, method)["error"]["message"]
    command(drop("methods/plain_ties.py"), family, output, method)
    merge(family, tmp_path / "wanted", {"name": "ties", "density": 0.3})
    assert digests(tmp_path / "out") == digests(tmp_path / "wanted")


def test_a_kind_of_round_is_one_file(family_of: MakeFamily, tmp_path: Path, drop: Callable[[str], Path]) -> None:
    """A method that asks for it is another file; shards, records, barrier and result are the kind's own."""
    folder, family = drop("rounds/peaks.py"), family_of(num_models=3, shards=2)
    (folder / "methods").mkdir()
    shutil.copy(OURS / "methods" / "even_peaks.py", folder / "methods")
    record = command(folder, family, str(tmp_path / "out"), "even_peaks")
    base = family.base_tensors
    merged = {name for name, tensor in base.items() if tensor.is_floating_point() and tensor.numel()}
    changes = [{name: each[name].float() - base[name].float() for name in merged} for each in family.model_tensors]
    peaks = [max(float(change[name].abs().max()) for name in merged) for change in changes]
    told = np.array(list(record["statistics"].values()), np.uint32).view(np.float32)
    assert told.tolist() == peaks
    written = read_tensors(tmp_path / "out")
    for name in merged:
        scaled = [change[name].double() * (peaks[0] / peak) / 3 for change, peak in zip(changes, peaks, strict=True)]
        wanted = base[name].double() + sum(scaled)
        assert torch.allclose(written[name].double(), wanted, rtol=2**-7, atol=1e-6), name


def test_a_kind_of_evaluation_is_one_file(family_of: MakeFamily, drop: Callable[[str], Path]) -> None:
    family = family_of(num_models=1)
    words = ["evaluate", family.base, "--with", "largest:*.weight", "--json", "--quiet"]
    environment = dict(os.environ) | {plugins.PLUGIN_FOLDER: str(drop("evaluations/largest.py"))}
    start = [sys.executable, "-c", "from ties_ray.cli.commands import main; main()"]
    done = subprocess.run([*start, *words], env=environment, capture_output=True, text=True, check=True)
    (score,) = json.loads(done.stdout)["models"][0]["scores"]
    weights = {name: tensor for name, tensor in family.base_tensors.items() if name.endswith(".weight")}
    assert score["value"] == max(float(tensor.abs().max()) for tensor in weights.values())
    assert (score["label"], score["better"], score["counts"]) == ("largest", "smaller", {"tensors": len(weights)})


def test_an_output_kind_is_one_file(family_of: MakeFamily, tmp_path: Path, drop: Callable[[str], Path]) -> None:
    family = family_of(num_models=4, exact=True, mixed=True, shards=2)
    output = {"path": str(tmp_path / "out"), "kind": "delta32", "prefix": "task."}
    record = command(drop("outputs/delta32.py"), family, output, {"name": "ties", "lambda": 0.7})
    answer = oracle.merge(family, Rules("ties", 0.2, lambda_=0.7))
    (file,) = record["files"]
    loaded = load_file(tmp_path / "out" / file["name"])
    assert loaded.keys() == {f"task.{name}" for name in answer.value}
    for name in answer.value:
        assert torch.equal(loaded[f"task.{name}"].reshape(-1), answer.exact(name)), name
    assert (tmp_path / "out/delta.json").exists()
    assert not (tmp_path / "out/config.json").exists()


def test_a_format_is_one_file(family_of: MakeFamily, tmp_path: Path, drop: Callable[[str], Path]) -> None:
    family = family_of(num_models=3)
    write_toy(family, 1, tmp_path / "toy")
    mixed = Family(family.base, (family.models[0], str(tmp_path / "toy"), family.models[2]), {}, ())
    command(drop("formats/toy.py"), mixed, str(tmp_path / "out"), "ties", allow={"missing": "zero"})
    merge(family, tmp_path / "wanted", "ties")
    assert digests(tmp_path / "out") == digests(tmp_path / "wanted")


def test_two_formats_with_the_same_layout_do_not_share_their_sources(
    family_of: MakeFamily, tmp_path: Path, plugged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ties_ray import formats

    (tmp_path / "negative.py").write_text(
        "from ties_ray.formats.toy import Toy\n"
        "class Negative(Toy):\n"
        "    name = 'negative'\n"
        "    def recognises(self, names): return 'negative.txt' in names\n"
    )
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    family = family_of(num_models=3)
    folders = [tmp_path / name for name in ("toy", "same", "negative")]
    for folder in folders:
        write_toy(family, 1, folder)
    (folders[2] / "negative.txt").touch()
    models = Family(family.base, tuple(map(str, folders)), {}, ())
    catalog = read_catalog(recipe_of(models, str(tmp_path / "out"), "average", allow={"missing": "zero"}), Stores({}))
    toy, same, negative = catalog.models
    assert [toy.format, same.format, negative.format] == ["toy", "toy", "negative"]
    assert toy.sources is same.sources
    assert toy.sources == negative.sources
    assert toy.sources is not negative.sources


def test_a_store_is_one_file(family_of: MakeFamily, tmp_path: Path, drop: Callable[[str], Path]) -> None:
    family = family_of(num_models=3)
    there = Family(f"frail://{family.base}", tuple(f"frail://{uri}" for uri in family.models), {}, ())
    record = command(drop("stores/frail.py"), there, f"frail://{tmp_path / 'out'}", "ties")
    assert record["provenance"]["models"][0]["objects"][0][0].startswith("frail://")
    merge(family, tmp_path / "wanted", "ties")
    assert digests(tmp_path / "out") == digests(tmp_path / "wanted")


def test_an_executor_is_one_file(family_of: MakeFamily, tmp_path: Path, drop: Callable[[str], Path]) -> None:
    family = family_of(num_models=3)
    run = {"executor": "inline", "workers": 3}
    command(drop("executors/inline.py"), family, str(tmp_path / "out"), "ties", run=run)
    merge(family, tmp_path / "wanted", "ties")
    assert digests(tmp_path / "out") == digests(tmp_path / "wanted")


def test_a_sampler_is_one_file(family_of: MakeFamily, tmp_path: Path, plugged: Path) -> None:
    family = family_of(num_models=3)
    (tmp_path / "score.py").write_text("def score(model): return float(model.id.split()[-1])")
    recipe = {"base": family.base, "models": list(family.models), "method": "ties", "output": str(tmp_path / "out")}
    space = {"method.lambda": {"low": 0, "high": 1}, "method.zero_sum": {"choices": ["none", "positive"]}}
    search = {"space": space, "sampler": "halton", "budget": 3, "evaluate": f"function:{tmp_path}/score.py:score"}
    result = ties_ray.search({**recipe, "search": search})
    values = {row.number: row.values for row in result.rows}
    assert [values[number].get("method.lambda") for number in range(4)] == [None, 0.5, 0.25, 0.75]
    assert result.chosen == 3


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("class A(Average): pass\nclass B(Average): pass\nclass _C(Average): pass\n", 2)]
)
def test_a_file_defines_one_extension(text: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ties_ray import methods

    name = f"broken_{count}"
    (tmp_path / f"{name}.py").write_text("from ties_ray.methods.average import Average\n" + text)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    with pytest.raises(TypeError, match=rf"{name}\.py should define one Method, not {count}"):
        plugins.load("methods", name, Method)


def test_an_unknown_name_is_told_with_the_likely_one(family_of: MakeFamily) -> None:
    with pytest.raises(RecipeError, match="unknown method 'tie'; did you mean 'ties'"):
        recipe_of(family_of(num_models=3), "/out", "tie")


class TestThePluginMethod(MethodContract):
    @pytest.fixture
    def method(self, plugged: Path) -> Method:
        return plugins.load("methods", "plain_ties", Method)(name="plain_ties")


class TestThePluginOutput(OutputContract):
    @pytest.fixture
    def output(self, plugged: Path) -> Output:
        return plugins.load("outputs", "delta32", Output)(path="/out", kind="delta32")


class TestThePluginStore(StoreContract):
    @pytest.fixture
    def place(self, plugged: Path, tmp_path: Path) -> tuple[Store, str]:
        loaded = plugins.load("stores", "frail", Store)
        options: BaseModel = loaded.options()
        return loaded(options), f"frail://{tmp_path}"


class TestThePluginFormat(FormatContract):
    VALUES = torch.arange(500, dtype=torch.float32) - 250

    @pytest.fixture
    def format(self, plugged: Path) -> Format:
        return plugins.load("formats", "toy", Format)()

    @pytest.fixture
    def files(self) -> dict[str, bytes]:
        return {"toy.json": b'{"b": 0, "a": 1200}', "toy.bin": raw_bytes(self.VALUES)}

    @pytest.fixture
    def parameters(self) -> dict[str, Parameter]:
        shapes = {"a": (20, 10), "b": (300,), "c": (4,)}
        return {name: Parameter(name, shape, "BF16", True) for name, shape in shapes.items()}

    @pytest.fixture
    def expected(self) -> dict[str, torch.Tensor]:
        return {"a": self.VALUES[300:], "b": self.VALUES[:300]}


def test_the_plugin_executor_is_an_executor(plugged: Path) -> None:
    assert plugins.load("executors", "inline", Executor)().name == "inline"
    assert "inline" in plugins.names("executors")


def write_toy(family: Family, number: int, folder: Path) -> None:
    """Write a model of the family as its changes; what it does not change it does not name."""
    folder.mkdir()
    starts, data = {}, b""
    for name, tensor in family.model_tensors[number].items():
        delta = tensor.float() - family.base_tensors[name].float()
        if delta.any():
            starts[name] = len(data)
            data += raw_bytes(delta)
        else:
            assert same_bits(tensor, family.base_tensors[name])
    assert len(starts) < len(family.model_tensors[number])
    (folder / "toy.json").write_text(json.dumps(starts))
    (folder / "toy.bin").write_bytes(data)
