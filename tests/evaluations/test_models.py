"""Models are loaded from safetensors alone, and their own code does not run unless it is trusted."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools import scored
from tests.tools.scored import Folder
from ties_ray.errors import InputError
from ties_ray.evaluations import _models
from ties_ray.evaluations._models import CAUSAL, Loader
from ties_ray.evaluations.loss import Loss

ROWS = [{"text": "the cat sat on a mat"}]
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
Path("{mark}").touch()

class Own(LlamaForCausalLM):
    pass
"""


def loader(**settings: Any) -> Loader:
    return Loader(Loss(data="unread.jsonl", **settings))


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    model = scored.causal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"AutoModelForCausalLM can't load it: OSError: .*no file named model"):
        loader().model(Folder(tmp_path), CAUSAL)


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_a_model_runs_only_where_it_is_trusted(
    tmp_path: Path, trust: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder, mark = tmp_path / "model", tmp_path / "mark"
    scored.causal(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", CAUSAL: "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    code = (
        CODE.format(mark=mark)
        + "\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\nOwn.config_class = OwnConfig\n"
    )
    (folder / "own.py").write_text(code)
    if trust:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own
            assert type(loader(trust=True).model(Folder(folder), CAUSAL)).__name__ == "Own"
    else:
        with pytest.raises(InputError, match="write `trust: true` if that code may run here"):
            loader().model(Folder(folder), CAUSAL)
    assert mark.exists() == trust


def test_an_adapter_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    scored.causal(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(InputError, match="its adapter is no safetensors file"):
        loader().model(Folder(tmp_path / "adapter", tmp_path / "base"), CAUSAL)


def test_a_missing_tokenizer_and_an_unknown_device_are_refused(tmp_path: Path) -> None:
    scored.causal(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"no tokenizer can be loaded: .*; name a folder that has one: `tokenizer`"):
        loader().tokenizer(Folder(tmp_path))
    with pytest.raises(InputError, match="write cpu, cuda, cuda:N or auto"):
        loader(device="gpu").model(Folder(tmp_path), CAUSAL)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="cuda: this process sees no GPU; write cpu or auto"):
            _models.device("cuda")


def test_a_loaded_model_is_kept_until_another_is_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        scored.causal(tmp_path / name, seed=ord(name))
    own = loader()
    first = own.model(Folder(tmp_path / "a"), CAUSAL)
    assert own.model(Folder(tmp_path / "a"), CAUSAL) is first
    second = own.model(Folder(tmp_path / "b"), CAUSAL)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
