import json
import re
from pathlib import Path

import pytest
import torch

from tests.tools.adapters import adapter_files
from tests.tools.families import CONFIG, file_bytes, make_family
from ties_ray import plugins
from ties_ray.formats import Folder, Format
from ties_ray.formats.checkpoint import Checkpoint
from ties_ray.formats.lora import Lora
from ties_ray.inputs import other_tools
from ties_ray.stores import Stores
from ties_ray.testing import folder_of

MODULE = {"model.q_proj": (torch.ones(2, 4), torch.ones(6, 2), 4.0)}
PEFT = adapter_files(MODULE)
MLX_CONFIG = json.dumps({"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2}}).encode()


def weights(*keys: str) -> bytes:
    return file_bytes({key: torch.ones(4, 4) for key in keys})


def looked_at(files: dict[str, bytes]) -> Folder:
    """Return the folder as the one format that recognises it would have it fetched."""
    known = [plugins.load("formats", name, Format)() for name in ("checkpoint", "lora")]
    (one,) = [format for format in known if format.recognises(list(files))]
    return folder_of(one, files)


KOHYA = weights("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight", "lora_unet_x.alpha")
MLX = weights("model.layers.0.q_proj.lora_a", "model.layers.0.q_proj.lora_b")
FOREIGN = [
    ("mlx", {"adapter_config.json": MLX_CONFIG, "adapters.safetensors": MLX}),
    ("mlx", {"adapters.safetensors": MLX}),
    ("mlx", {"adapter_config.json": MLX_CONFIG, "adapter_model.safetensors": MLX}),
    ("kohya", {"style.safetensors": KOHYA}),
    ("kohya", {"style.safetensors": weights("lora_te1_x.lora_down.weight", "lora_te1_x.lora_up.weight")}),
    ("diffusers", {"pytorch_lora_weights.safetensors": weights("transformer.to_q.lora_A.weight")}),
    ("diffusers", {"some.safetensors": weights("unet.to_q.lora_A.weight", "unet.to_q.lora_B.weight")}),
    ("diffusers", {"some.safetensors": weights("unet.mid.to_q.lora.down.weight", "unet.mid.to_q.lora.up.weight")}),
    ("diffusers", {"some.safetensors": weights("mid.attn1.processor.to_q_lora.down.weight")}),
    ("kohya", {"flux.safetensors": weights("lora_transformer_x.lora_A.weight", "lora_transformer_x.alpha")}),
    ("comfyui", {"wan.safetensors": weights("diffusion_model.blocks.0.q.lora_A.weight")}),
    ("comfyui", {"wan.safetensors": weights("diffusion_model.blocks.0.q.diff", "diffusion_model.patch.diff_b")}),
    ("lycoris", {"loha.safetensors": weights("lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b", "lora_unet_x.alpha")}),
    ("lycoris", {"lokr.safetensors": weights("lycoris_layers_0_q.lokr_w1", "lycoris_layers_0_q.lokr_w2")}),
    ("xlora", {"adapter_config.json": b"{}", "adapter_model.safetensors": weights("xlora_classifier.lora_.weight")}),
    ("torchtune", {"adapter_0.safetensors": weights("layers.0.attn.q_proj.lora_a.weight")}),
    ("nemo", {"a.safetensors": weights("layers.0.adapter_layer.lora_kqv_adapter.linear_in.weight")}),
    ("loralib", {"a.safetensors": weights("transformer.h.0.attn.attn.lora_A", "transformer.h.0.attn.attn.lora_B")}),
    ("adapterhub", {"a.safetensors": weights("layer.0.q.loras.x.lora_A", "layer.0.q.loras.x.lora_B")}),
    ("config_missing", {"my_lora.safetensors": PEFT["adapter_model.safetensors"]}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "files"), FOREIGN)
def test_another_tools_adapter_is_told_by_its_keys(code: str, files: dict[str, bytes]) -> None:
    problem = other_tools.problem(looked_at(files))
    assert problem is not None
    assert problem.code == code
    assert re.search("lora|diff|hada|lokr", problem.what)
    assert problem.remedy


def test_a_peft_adapter_and_a_checkpoint_are_nobody_elses(tmp_path: Path) -> None:
    assert other_tools.problem(looked_at(PEFT)) is None
    family = make_family(Stores({}).of("/"), str(tmp_path), num_models=1)
    files = {path.name: path.read_bytes() for path in Path(family.base).iterdir()}
    assert other_tools.problem(looked_at(files)) is None


def test_a_whole_model_that_carries_factors_of_its_own_is_a_checkpoint() -> None:
    names = ["q_proj.base_layer.weight", "q_proj.lora_A.vision.weight", "q_proj.lora_B.vision.weight"]
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": weights(*names)}
    assert other_tools.problem(looked_at(files)) is None


def test_a_folder_with_weights_of_peft_is_an_adapter_and_no_checkpoint() -> None:
    names = ["adapter_model.safetensors", "model.safetensors"]
    assert Lora().recognises(names)
    assert not Checkpoint().recognises(names)


def test_an_adapter_of_another_tool_is_known_by_one_key_among_many_others() -> None:
    others = [f"blocks.{number}.weight" for number in range(9)]
    for key in ("x.lora_down.weight", "x.hada_w1_a", "x.lokr_w2", "diffusion_model.x.lora_A.weight", "q.lora_a"):
        problem = other_tools.problem(looked_at({"some.safetensors": weights(key, *others)}))
        assert problem is not None
        assert key in problem.what
