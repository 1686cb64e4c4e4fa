"""A finished merge on the hub, beside a stand-in of the hub's API."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import ties_ray
from tests.stores.test_hf import hub as hub
from tests.stores.test_hf import server as server
from tests.tools.families import Family, make_family
from tests.tools.hub import TOKEN, Hub
from tests.tools.merging import merge
from ties_ray.cli.commands import commands
from ties_ray.errors import InputError, UnavailableError
from ties_ray.stores import Stores
from ties_ray.stores.hf import Hf

REPO = "team/merged"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub sends a file so


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(Stores({}).of("/"), str(tmp_path / "in"), num_models=2)


@pytest.fixture
def token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def files_of(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    return hub.repos[REPO][hub.branches[REPO, branch]]


@pytest.mark.usefixtures("token")
def test_a_merge_is_published_in_one_commit(hub: Hub, family: Family, tmp_path: Path) -> None:
    merge(family, {"path": str(tmp_path / "out"), "file_size": "4KiB"}, "average")
    pushed = ties_ray.push(tmp_path / "out", f"hf://{REPO}", private=True)
    published = files_of(hub)
    assert pushed.uri == f"hf://{REPO}@{hub.branches[REPO, 'main']}"
    assert pushed.files == sorted(published.keys() - {".gitattributes"})
    assert {"README.md", "config.json", "tokenizer.json", "model.safetensors.index.json"} <= published.keys()
    for name in pushed.files:
        assert published[name] == (tmp_path / "out" / name).read_bytes()
    written = b"".join(published.values())
    assert not any(name.startswith("ties-ray") for name in published)
    assert str(tmp_path).encode() not in written, "no folder of this machine is published"
    assert hub.private == {REPO}
    assert sum(path.endswith("/commit/main") for _, path, _ in hub.asked) == 1
    text = "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))
    assert TOKEN not in text + pushed.model_dump_json()


@pytest.mark.usefixtures("token")
def test_files_of_another_model_go_and_others_stay(hub: Hub, family: Family, tmp_path: Path) -> None:
    hub.commit(REPO, {"model-00001-of-00009.safetensors": b"old", "thesis.pdf": b"mine", "config.json": b"{}"})
    merge(family, tmp_path / "out", "average")
    pushed = ties_ray.push(tmp_path / "out", f"hf://{REPO}@nightly")
    assert pushed.removed == ["model-00001-of-00009.safetensors"]
    assert files_of(hub, "nightly")["thesis.pdf"] == b"mine"
    assert files_of(hub)["config.json"] == b"{}", "the main branch stays"
    again = ties_ray.push(tmp_path / "out", f"hf://{REPO}@nightly")
    assert files_of(hub, "nightly").keys() == {*again.files, "thesis.pdf"}


@pytest.mark.usefixtures("token")
def test_only_what_a_merge_has_written_is_published(hub: Hub, family: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished merge"):
        ties_ray.push(tmp_path / "in", f"hf://{REPO}")
    merge(family, tmp_path / "out", "average")
    weights = tmp_path / "out/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.safetensors: its CRC32C is \w+, and the merge has written"):
        ties_ray.push(tmp_path / "out", f"hf://{REPO}")
    assert files_of(hub).keys() == {".gitattributes"}, "nothing is committed"
    weights.write_bytes(data[:-1])
    with pytest.raises(InputError, match="bytes, and the merge has written"):
        ties_ray.push(tmp_path / "out", f"hf://{REPO}")
    weights.unlink()
    with pytest.raises(InputError, match="is gone"):
        ties_ray.push(tmp_path / "out", f"hf://{REPO}")


def test_a_token_that_may_not_write_is_told(hub: Hub, family: Family, tmp_path: Path) -> None:
    merge(family, tmp_path / "out", "average")
    with pytest.raises(InputError, match="set HF_TOKEN to a token that may write it"):
        ties_ray.push(tmp_path / "out", f"hf://{REPO}")
    for wrong in ("s3://bucket/x", f"hf://{REPO}/folder", f"hf://{REPO}@{'a' * 40}"):
        with pytest.raises(InputError, match="is no"):
            ties_ray.push(tmp_path / "out", wrong)


@pytest.mark.usefixtures("token")
def test_a_hub_that_fails_once_is_asked_again(
    hub: Hub, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(family, tmp_path / "out", "average")
    hub.broken = 1
    ties_ray.push(tmp_path / "out", f"hf://{REPO}")
    assert "model.safetensors" in files_of(hub)
    monkeypatch.setattr(Hf, "patience", 0.1)
    hub.broken = 10**6
    with pytest.raises(UnavailableError):
        ties_ray.push(tmp_path / "out", f"hf://{REPO}")


@pytest.mark.usefixtures("token")
def test_the_command_tells_what_it_has_published(hub: Hub, family: Family, tmp_path: Path) -> None:
    merge(family, tmp_path / "out", "average")
    done = CliRunner().invoke(commands, ["push", str(tmp_path / "out"), f"hf://{REPO}", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["uri"] == f"hf://{REPO}@{hub.branches[REPO, 'main']}"
