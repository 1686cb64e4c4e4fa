# ruff: noqa: E501
"""Model classes of transformers, built small: what their configs have in common is shrunk.

`python -m tests.tools.architectures` merges those of `CLASSES` and prints docs/reference/architectures.md.
"""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ties_ray.operations import merging
from ties_ray.recipe.parse import validate

Tensors = dict[str, torch.Tensor]
LARGEST = 3_000_000
"""Parameters of a model that counts as small."""
SIZES = {
    r"(text_|decoder_|encoder_)?hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|hidden_dim|word_embed_proj_dim|encoder_hidden_dim|decoder_hidden_size|mm_hidden_size|out_hidden_size|projection_dim|text_embed_dim|emb_dim|model_dim|output_hidden_size|backbone_hidden_size|lru_width|time_step_rank|attention_hidden_size|d_embed": 32,
    r"(num_)?((text_|en|de)coder_)?(hidden_)?layers|n_layers?|num_(en|de)coder_layers|num_layers|depth|num_hidden_groups|n_layer|num_blocks|first_k_dense_replace": 2,
    r"((en|de)coder_)?(num_)?(attention_|encoder_attention_|decoder_attention_)?heads|n_heads?|num_attention_heads|num_heads|(en|de)coder_attention_heads": 4,
    r"num_key_value_heads|n_kv_heads|num_kv_heads|multi_query_group_num": 2,
    r"intermediate_size|(en|de)coder_ffn_dim|d_ff|ffn_dim|ffn_hidden_size|n_inner|d_inner|moe_intermediate_size|shared_expert_intermediate_size|mlp_dim|decoder_intermediate_size|expert_ffn_hidden_size": 48,
    r"vocab_size|text_vocab_size|n_token|vocab_size_per_layer_input": 96,
    r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_source_positions|max_target_positions|max_sequence_length|block_size": 64,
    r"head_dim|d_kv|kv_channels|attention_head_size|global_head_dim|qk_rope_head_dim|qk_nope_head_dim|v_head_dim|linear_(key|value)_head_dim": 8,
    r"image_size|input_size|img_size": 32,
    r"patch_size": 8,
    r"num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_moe_experts": 4,
    r"num_experts_per_tok|moe_topk|top_k|moe_k": 2,
    r"n_shared_experts": 1,
    r"n_group|topk_group": 1,
    r"kv_lora_rank|q_lora_rank": 16,
    r"linear_num_(key|value)_heads|mamba_n_heads": 4,
    r"state_size|mamba_d_state|ssm_state_size": 8,
    r"num_labels": 3,
    r"entity_vocab_size": 32,
    r"entity_emb_size": 32,
    r"num_mel_bins|n_mels": 16,
    r"(pad|bos|eos|unk|sep|cls|mask|decoder_start|forced_\w+|image|video|audio|vision_\w+|boi|eoi|img|image_start|image_end|context_image)_token_(id|index)|\w*_token_id": 1,
    r"sliding_window": 16,
    r"window_size": 2,
    r"codebook_dim": 16,
    r"codebook_size": 32,
}

"""How large what a config calls so is made, at most; names as patterns."""
HEADS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
)
CLASSES: dict[str, str] = {
    "decoder": "GPT2LMHeadModel LlamaForCausalLM MistralForCausalLM GemmaForCausalLM Gemma2ForCausalLM Phi3ForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM OPTForCausalLM BloomForCausalLM GPTNeoXForCausalLM GPTJForCausalLM FalconForCausalLM GlmForCausalLM Olmo2ForCausalLM CohereForCausalLM BioGptForCausalLM ModernBertDecoderForCausalLM",
    "mixture of experts": "MixtralForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM DeepseekV2ForCausalLM OlmoeForCausalLM PhimoeForCausalLM GraniteMoeForCausalLM GptOssForCausalLM",
    "state space and recurrent": "MambaForCausalLM Mamba2ForCausalLM FalconMambaForCausalLM JambaForCausalLM FalconH1ForCausalLM RecurrentGemmaForCausalLM Zamba2ForCausalLM Lfm2ForCausalLM",
    "encoder": "BertForMaskedLM RobertaForMaskedLM AlbertForMaskedLM DistilBertForMaskedLM ElectraForMaskedLM DebertaV2ForMaskedLM ModernBertForMaskedLM XLNetLMHeadModel MPNetForMaskedLM FNetForMaskedLM NomicBertForMaskedLM DPRQuestionEncoder",
    "encoder-decoder": "T5ForConditionalGeneration BartForConditionalGeneration MBartForConditionalGeneration PegasusForConditionalGeneration M2M100ForConditionalGeneration T5GemmaForConditionalGeneration UMT5ForConditionalGeneration",
    "vision": "ViTForImageClassification DeiTForImageClassification BeitForImageClassification Dinov2ForImageClassification Siglip2ForImageClassification CLIPForImageClassification Sam3ViTModel SwinForImageClassification ConvNextForImageClassification ResNetForImageClassification DetrForObjectDetection",
    "audio": "WhisperForConditionalGeneration Wav2Vec2ForCTC ParakeetForCTC MoonshineForConditionalGeneration AudioFlamingo3Encoder",
    "multimodal": "LlavaForConditionalGeneration Qwen2VLForConditionalGeneration Gemma3ForConditionalGeneration PaliGemmaForConditionalGeneration Kosmos2ForConditionalGeneration ViltModel ChineseCLIPModel InstructBlipForConditionalGeneration",
}
"""What is merged, by what it is."""


RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
BACKBONE: dict[str, Any] = {
    "use_timm_backbone": False, "backbone": None,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage4"], **RESNET},
}  # fmt: skip
LISTS: dict[str, dict[str, Any]] = {
    "detr": BACKBONE,
    "conditional_detr": BACKBONE,
    "resnet": RESNET,
    "convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]},
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16},
    "wav2vec2": CONVOLUTIONS,
    "hubert": CONVOLUTIONS,
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
}
"""Settings of a model type that are no single size."""


def config_of(kind: type[PreTrainedConfig], depth: int = 0) -> dict[str, Any]:
    """Return settings that make a config small, those of its parts with them."""
    config, made = kind(), dict[str, Any]()
    for name, value in vars(config).items():
        size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
        if isinstance(value, PreTrainedConfig) and depth < 3:
            made[name] = {**config_of(type(value), depth + 1), "model_type": value.model_type}
        elif isinstance(value, int) and not isinstance(value, bool) and size is not None:
            made[name] = min(size, max(value, 0))
    layers = next((made[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if key in made), None)
    own = getattr(kind, config.attribute_map.get("layer_types", "layer_types"), None)
    is_settable = not isinstance(own, property) or own.fset
    if layers and is_settable and isinstance(getattr(config, "layer_types", None), list):
        made["layer_types"] = (list(dict.fromkeys(config.layer_types)) * 4)[:layers]
    return made | LISTS.get(kind.model_type, {})


def kinds() -> dict[str, str]:
    """Return the model type of the classes that are known to the automatic ones."""
    tables = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in HEADS]
    found: dict[str, str] = {}
    for table in (*tables, modeling_auto.MODEL_MAPPING_NAMES):
        for kind, name in table.items():
            for one in (name,) if isinstance(name, str) else name:
                cls = getattr(transformers, one, None)
                if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and kind in CONFIG_MAPPING:
                    own = getattr(cls.config_class, "model_type", kind)
                    found.setdefault(one, own if own in CONFIG_MAPPING else kind)
    return found


def build(name: str, kind: str) -> PreTrainedModel:
    """Return a small model of a class; raises whatever its class does where that can't be."""
    cls = getattr(transformers, name)
    config = CONFIG_MAPPING[kind](**config_of(CONFIG_MAPPING[kind]))
    config._attn_implementation = "eager"
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    return cls(config)


def tune(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Change every parameter a little, as training does; rows for padding stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model


def values(model: PreTrainedModel) -> Tensors:
    """Return all floating-point tensors that a model would save, tied ones once."""
    found: Tensors = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr(), tensor.shape
        if tensor.is_floating_point() and (place not in seen or not tensor.numel()):
            seen.add(place)
            found[name] = tensor.detach().clone()
    return found


def average(base: Tensors, models: list[Tensors]) -> Tensors:
    """Return the mean, in fp64."""
    return {name: torch.stack([one[name].double() for one in models]).mean(0) for name in base}


def ties(base: Tensors, models: list[Tensors], density: float = 0.2) -> Tensors:
    """Return TIES of whole models, in fp64, with lambda 1."""
    count = max(1, int(density * sum(tensor.numel() for tensor in base.values())))
    trimmed = []
    for model in models:
        deltas = {name: model[name] - base[name] for name in base}
        threshold = torch.cat([delta.abs().flatten() for delta in deltas.values()]).topk(count).values[-1]
        trimmed.append({name: torch.where(one.abs() >= threshold, one, 0).double() for name, one in deltas.items()})
    merged = {}
    for name, tensor in base.items():
        stack = torch.stack([one[name] for one in trimmed])
        agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
        merged[name] = tensor.double() + (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged


METHODS: dict[str, Callable[[Tensors, list[Tensors]], Tensors]] = {"average": average, "ties": ties}


class Outcome(NamedTuple):
    """What became of one class."""

    name: str
    kind: str
    wrong: tuple[str, ...]
    """Tensors or outputs of a merge that differ from the dense reference; empty: it is right."""
    outputs: bool
    """Whether its outputs were compared too: some classes want inputs of their own."""


def check(name: str, kind: str, folder: Path) -> Outcome:
    """Merge two fine-tunes of a small model by each method, and compare what the class loads with dense references."""
    cls = getattr(transformers, name)
    build(name, kind).save_pretrained(folder / "base")
    for seed in (1, 2):
        tune(cls.from_pretrained(folder / "base"), seed).save_pretrained(folder / f"tuned-{seed}")
    base, *models = (values(cls.from_pretrained(folder / one)) for one in ("base", "tuned-1", "tuned-2"))
    wrong: list[str] = []
    ran = False
    for method, dense in METHODS.items():
        recipe = {
            "base": str(folder / "base"),
            "models": [str(folder / f"tuned-{seed}") for seed in (1, 2)],
            "method": method,
        }
        run = {"executor": "local", "workers": 1}
        result = merging.merge(validate({**recipe, "output": str(folder / method), "run": run}))
        accounts = [model.account for model in result.provenance.models] if result.provenance else []
        if len(accounts) != 2 or not all(one.adds_up and not one.aside for one in accounts):
            wrong.append(f"{method}: account {accounts}")
        merged, wanted = cls.from_pretrained(folder / method).eval(), dense(base, models)
        got = values(merged)
        wrong += [f"{method}: {one} is on one side only" for one in got.keys() ^ wanted.keys()]
        common = got.keys() & wanted.keys()
        wrong += [
            f"{method}: {one}"
            for one in common
            if not torch.allclose(got[one].double(), wanted[one], rtol=2e-6, atol=1e-7)
        ]
        reference = cls.from_pretrained(folder / "base").eval()
        reference.load_state_dict({one: tensor.float() for one, tensor in wanted.items()}, strict=False)
        ours, theirs = outputs(merged), outputs(reference)
        ran = ran or bool(ours)
        pairs = zip(ours, theirs, strict=True)
        wrong += [
            f"{method}: output"
            for one, other in pairs
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)
        ]
    return Outcome(name, kind, tuple(wrong), ran)


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return what a model makes of plain inputs; nothing where it wants others."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 90, (1, 8), generator=generator)
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 32, 32, generator=generator)}
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    try:
        made = model(**{model.main_input_name: inputs[model.main_input_name]}, **more)
    except Exception:
        return []
    return [one for one in made.values() if isinstance(one, torch.Tensor) and one.is_floating_point()]


def outcomes() -> list[Outcome]:
    """Return what becomes of all `CLASSES`."""
    known, found = kinds(), list[Outcome]()
    for name in " ".join(CLASSES.values()).split():
        with tempfile.TemporaryDirectory() as folder:
            found.append(check(name, known[name], Path(folder)))
    return found


def page(found: list[Outcome]) -> str:
    """Return docs/reference/architectures.md."""
    by_name = {one.name: one for one in found}
    lines = [
        "# Architectures",
        "",
        "Each class is built small. Two fine-tunes of it are merged by average and by TIES, and the class loads the merge.",
        "Every tensor equals a dense reference. Outputs are compared where plain inputs will do.",
        f"`python -m tests.tools.architectures` prints this page, for transformers {transformers.__version__}.",
    ]
    for kind, names in CLASSES.items():
        lines += ["", f"## {kind[0].upper()}{kind[1:]}", "", "| class | model type | compared |", "|---|---|---|"]
        for one in map(by_name.__getitem__, names.split()):
            compared = f"wrong: {one.wrong[0]}" if one.wrong else "tensors, outputs" if one.outputs else "tensors"
            lines.append(f"| {one.name} | {one.kind} | {compared} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(outcomes()), end="")
