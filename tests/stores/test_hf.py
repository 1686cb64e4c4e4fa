import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from tests.tools.families import file_bytes
from tests.tools.hub import TOKEN, Hub, serve_hub
from tests.tools.merging import read_tensors
from ties_ray.errors import InputError, UnavailableError
from ties_ray.inputs.catalog import Catalog, read_catalog
from ties_ray.recipe.parse import validate
from ties_ray.stores import Pin, Stores, hub_uri
from ties_ray.stores.hf import Hf, HfOptions

CONFIG = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'


def model(value: float) -> dict[str, bytes]:
    weights = file_bytes({"a.weight": torch.full((40, 10), float(value)), "b.weight": torch.full((7,), 1.0)})
    return {"config.json": CONFIG, "model.safetensors": weights, "README.md": b"---\nlicense: mit\n---\n"}


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    for store in (server.repos, server.branches, server.gated, server.private, server.asked):
        store.clear()
    server.ignores_ranges, server.broken = False, 0
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix("https://huggingface.co")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    return server


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def store_of(*, cache: bool = True) -> Hf:
    return Hf(HfOptions(cache=cache))


def catalog_of(*models: str, base: str = "org/base", **storage: object) -> Catalog:
    data = {"base": base, "models": list(models), "method": "average", "output": "memory://out", "storage": storage}
    return read_catalog(validate(data), Stores(storage))  # type: ignore[arg-type]


def read_whole(store: Hf, pin: Pin) -> bytes:
    data = bytearray(pin.size)
    store.read(pin, 0, memoryview(data))
    return bytes(data)


def test_a_branch_is_pinned_to_its_commit(hub: Hub) -> None:
    first = hub.commit("org/base", model(0))
    hub.commit("org/m", model(1))
    tuned = hub.commit("org/m", model(2), branch="tuned")
    found = catalog_of("hf://org/m@tuned", "org/m")
    assert found.base.uri == f"hf://org/base@{first}"
    assert found.models[0].uri == f"hf://org/m@{tuned}"
    assert [pin.version for pin in found.models[0].objects] == [tuned]
    pin = found.models[0].objects[0]
    hub.commit("org/m", model(3), branch="tuned")
    assert read_whole(store_of(), pin) == model(2)["model.safetensors"]
    assert found.base.licence == "mit"
    assert len(pin.etag) == 64
    assert found.facts["base"] == "org/base"


@pytest.mark.parametrize("revision", ["", "@main", "@refs/pr/1", "@v1.0"])
def test_any_kind_of_revision_is_found(hub: Hub, revision: str) -> None:
    sha = hub.commit("org/base", {**model(0), "sub/x/model.safetensors": b"x"}, branch=revision[1:] or "main")
    store = store_of()
    assert store.resolve(f"hf://org/base{revision}") == f"hf://org/base@{sha}"
    listing = store.list(f"hf://org/base@{sha}")
    assert [pin.uri.rpartition("/")[2] for pin in listing.files] == ["README.md", "config.json", "model.safetensors"]
    assert listing.folders == (f"hf://org/base@{sha}/sub",)
    assert store.list(f"hf://org/base{revision}/sub").folders == (f"hf://org/base{revision}/sub/x",)
    assert store.list(f"hf://org/base@{sha}/none") == ((), ())
    assert store.head(f"hf://org/base@{sha}/sub/x/model.safetensors", 9)[1] == b"x"
    with pytest.raises(FileNotFoundError):
        store.head(f"hf://org/base@{sha}/none", 1)


def test_headers_are_ranges_and_weights_come_into_the_cache_once(
    hub: Hub, offline: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ties_ray.stores.hf._SMALL", 200)  # bytes
    hub.commit("org/base", model(0))
    store = store_of()
    uri = store.resolve("hf://org/base")
    pin, head = store.head(f"{uri}/model.safetensors", 100)
    assert len(head) == 100
    assert hub.asked[-1][2]["range"] == "bytes=0-99"
    assert [read_whole(store, pin) for _ in range(3)] == [model(0)["model.safetensors"]] * 3
    store.head(f"{uri}/config.json", 10)
    bodies = hub.bodies()
    assert read_whole(store_of(), pin) == model(0)["model.safetensors"]
    assert hub.bodies() == bodies
    offline()
    again = store_of()
    assert again.resolve("hf://org/base") == uri
    assert {pin.uri.rpartition("/")[2] for pin in again.list(uri).files} == {"model.safetensors", "config.json"}
    assert again.head(f"{uri}/model.safetensors", 5)[0] == pin
    with pytest.raises(InputError, match=r"org/other@main: is not in the hub's cache, and HF_HUB_OFFLINE is set"):
        again.resolve("hf://org/other")
    with pytest.raises(InputError, match="is not in the hub's cache"):
        again.list(f"hf://org/base@{'0' * 40}")


def test_without_the_cache_only_ranges_are_read(hub: Hub, tmp_path: Path) -> None:
    hub.commit("org/base", model(0))
    store = store_of(cache=False)
    pin = store.list(store.resolve("hf://org/base")).files[-1]
    assert read_whole(store, pin) == model(0)["model.safetensors"]
    assert not (tmp_path / "cache").exists()
    hub.ignores_ranges = True
    with pytest.raises(UnavailableError, match=r"got status 200 and the range ''"):
        store_of(cache=False).read(pin, 8, memoryview(bytearray(4)))


def test_the_token_goes_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/base", model(0))
    hub.private.add("org/base")
    with pytest.raises(InputError, match=r"no such model on the hub, or it is private .*set HF_TOKEN"):
        catalog_of("org/m")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for cache in (True, False):
        store = store_of(cache=cache)
        pin = store.list(store.resolve("hf://org/base")).files[-1]
        assert read_whole(store, pin) == model(0)["model.safetensors"]
    assert {headers.get("authorization") for _, path, headers in hub.asked if path.startswith("cdn")} == {None}
    assert TOKEN not in str(pin)


def test_what_the_hub_refuses_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/base", model(0))
    hub.commit("org/gated", model(0))
    hub.gated.add("org/gated")
    with pytest.raises(InputError) as raised:
        catalog_of("org/gated", "org/base@gone", "org/none", "hf://datasets/org/x", "hf://org/base/sub")
    said = str(raised.value).split("\n")
    assert "hf://org/gated@main: is gated" in said[0]
    assert "accept them at https://huggingface.co/org/gated, and set HF_TOKEN" in said[0]
    assert "has no branch, tag or commit 'gone'" in said[1]
    assert "there is no such model on the hub" in said[2]
    assert "a local folder is written ./org/none" in said[2]
    assert "hf://datasets/org/x: is no model of the hub" in said[3]
    assert "hf://org/base/sub: there is nothing" in said[4]
    for uri in ("hf://org", "hf://org/base@..", "hf://org/base/../x", "hf://spaces/org/x"):
        with pytest.raises(InputError, match="is no model of the hub"):
            store_of().resolve(uri)


def test_a_hub_that_fails_once_is_asked_again_and_one_that_is_gone_is_unavailable(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/base", model(0))
    store = store_of(cache=False)
    pin = store.list(store.resolve("hf://org/base")).files[-1]
    hub.broken = 2
    assert read_whole(store, pin) == model(0)["model.safetensors"]
    assert store.meter.retries == 2
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("ties_ray.stores.hf._ATTEMPTS", 2)
    with pytest.raises(UnavailableError, match=r"asking for main failed 2 times"):
        store_of().resolve("hf://org/base")


def test_a_bare_name_is_the_hubs_unless_there_is_such_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_uri("org/name") == "hf://org/name"
    assert hub_uri("org/name@main") == "hf://org/name@main"
    for path in ("./org/name", "/org/name", "name", "a/b/c", "../name", "s3://a/b", "~/name", "org/na me", "file.yaml"):
        assert hub_uri(path) == path
    (tmp_path / "org").mkdir()
    assert hub_uri("org/name") == "org/name"


def test_without_its_library_the_hub_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="needs the package huggingface_hub; run `pip install huggingface_hub`"):
        Stores({}).of("hf://org/name")


def test_the_command_line_merges_from_the_hub_and_again_without_it(hub: Hub, tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("m", 1.0), ("n", 2.0)):
        hub.commit(f"org/{name}", model(value))
    hub.private.add("org/n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "base: org/base\nmodels: [org/m, hf://org/n@main]\nmethod: average\noutput: out\n"
        "run: {executor: local, workers: 1}\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-c", "from ties_ray.cli.commands import main; main()", "merge", str(recipe)]
    for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = subprocess.run(command, env={**environment, **more}, cwd=tmp_path, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert torch.equal(read_tensors(tmp_path / "out")["a.weight"], torch.full((40, 10), 1.5))
        command[-1:] = [str(recipe), "--set", "output.path=again"] if not more else command[-1:]
        for file in (tmp_path / "out").rglob("*"):
            assert TOKEN.encode() not in (file.read_bytes() if file.is_file() else b"")
        assert TOKEN not in said
        card = (tmp_path / "out/README.md").read_text()
        assert "base_model:\n- org/base\n- org/m\n- org/n\n" in card
    assert torch.equal(read_tensors(tmp_path / "again")["a.weight"], torch.full((40, 10), 1.5))
