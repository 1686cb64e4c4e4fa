"""What a loader would open, by names, configs and shapes."""

import json
from dataclasses import replace

import pytest

from ties_ray.libraries.loaders import ModelFolder, opened_by, remarks, role, strangers, unloadable

EMBEDDING = "model.embed_tokens.weight"
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}


def folder(*names: str, shapes: dict[str, tuple[int, ...]] | None = None, **texts: object) -> ModelFolder:
    """Return a folder; texts: by name without `.json`."""
    written = {f"{name}.json": json.dumps(value).encode() for name, value in texts.items()}
    return ModelFolder("out", frozenset((*names, *written)), written, shapes or {})


@pytest.mark.parametrize(
    ("modules", "names", "problem"),
    [
        ([POOLING], ("1_Pooling/config.json",), ""),
        ([POOLING], (), "names '1_Pooling', and no file of it is there"),
        ([{**POOLING, "path": "../1_Pooling"}], (), "names '../1_Pooling'"),
        ([{"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}], (), ""),
        ([{"path": "2_N", "type": "sentence_transformers.base.modules.normalize.Normalize"}], (), ""),
        ([{"path": "2_D", "type": "sentence_transformers.base.modules.dense.Dense"}], ("2_D2/x",), "names '2_D'"),
        ([{"path": "", "type": "sentence_transformers.models.Transformer"}], (), ""),
        ([{"path": "x", "type": "custom_st.Mine"}, 3, {"path": 4}], (), ""),
        ({"no": "list"}, (), ""),
    ],
)
def test_a_module_needs_the_files_that_it_reads(modules: object, names: tuple[str, ...], problem: str) -> None:
    found = [str(one) for one in unloadable(folder(*names, modules=modules))]
    assert len(found) == bool(problem)
    assert problem in "".join(found)


@pytest.mark.parametrize(
    ("config", "name", "fits"),
    [
        ({"vocab_size": 8}, EMBEDDING, True),
        ({"vocab_size": 9}, EMBEDDING, False),
        ({"vocab_size": 9}, "transformer.wte.weight", False),
        ({"vocab_size": 9}, "roberta.embeddings.word_embeddings.weight", False),
        ({"vocab_size": 9}, "roberta.embeddings.position_embeddings.weight", True),
        ({"text_config": {"vocab_size": 9}}, "model.language_model.embed_tokens.weight", False),
        ({"vocab_size": 9, "text_config": {"vocab_size": 8}}, EMBEDDING, True),
        ({"vocab_size": 9, "decoder": {"decoder_vocab_size": 8}}, "shared.weight", True),
        ({"vision_config": {"vocab_size": 9}}, EMBEDDING, True),
        ({"vocab_size": 7, "pad_vocab_size_multiple": 8}, EMBEDDING, True),
        ({"vocab_size": 9, "auto_map": {"AutoModel": "x.Y"}}, EMBEDDING, True),
        ({}, EMBEDDING, True),
        ({"vocab_size": 9}, "scale", True),
    ],
)
def test_the_token_embedding_has_the_rows_that_the_config_states(
    config: dict[str, object], name: str, fits: bool
) -> None:
    found = unloadable(folder(config=config, shapes={"scalar": (), name: (8, 2)}))
    assert not found if fits else "has 8 rows, and config.json states a vocab_size of 9" in str(found[0])


@pytest.mark.parametrize(
    ("texts", "module", "cls"),
    [
        ({"config": {"architectures": ["LlamaForCausalLM"]}}, "transformers", "AutoModelForCausalLM"),
        ({"config": {"architectures": ["BertForMaskedLM"]}}, "transformers", "BertForMaskedLM"),
        ({"config": {"architectures": ["GPT2LMHeadModel"]}}, "transformers", "GPT2LMHeadModel"),
        ({"config": {"model_type": "bert"}}, "", ""),
        ({"config": {"model_type": "bert"}, "modules": []}, "sentence_transformers", "SentenceTransformer"),
        (
            {"modules": [], "config_sentence_transformers": {"model_type": "SparseEncoder"}},
            "sentence_transformers", "SparseEncoder",
        ),
        (
            {"modules": [], "config_sentence_transformers": {"model_type": "x; rm"}},
            "sentence_transformers", "SentenceTransformer",
        ),
        ({"config": {"architectures": ['X").y("']}}, "", ""),
        ({"config": ["no object"]}, "", ""),
        ({}, "", ""),
    ],
)  # fmt: skip
def test_the_line_that_opens_a_checkpoint_names_the_class_of_its_config(
    texts: dict[str, object], module: str, cls: str
) -> None:
    call = f"{cls}.from_pretrained" if module == "transformers" else cls
    line = f'from {module} import {cls}; model = {call}("{{output}}")' if module else ""
    assert opened_by(folder("model.safetensors", **texts), "transformers") == line
    assert opened_by(folder("model.safetensors", **texts), "timm") == ""


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        ({"task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base"}, "AutoPeftModelForCausalLM"),
        ({"task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": "/m/base"}, "AutoPeftModelForSeq2SeqLM"),
        ({"task_type": "CAUSAL_LM", "base_model_name_or_path": "s3://m/base"}, ""),
        ({"task_type": "CAUSAL_LM", "base_model_name_or_path": None}, ""),
        ({"task_type": None, "base_model_name_or_path": "org/base"}, ""),
    ],
)
def test_an_adapter_opens_with_its_base_where_peft_finds_it(config: dict[str, object], cls: str) -> None:
    line = f'from peft import {cls}; model = {cls}.from_pretrained("{{output}}")' if cls else ""
    assert opened_by(folder(adapter_config=config), "peft") == line


@pytest.mark.parametrize(
    ("kind", "borrowed", "fits"),
    [("llama", False, True), ("llama", True, False), ("mllama", True, True), ("mllama", False, True)],
)
def test_more_rows_than_the_config_states_are_wrong_only_with_the_config_of_another_model(
    kind: str, borrowed: bool, fits: bool
) -> None:
    """A model as it is may have more: Llama 3.2 Vision has 8."""
    found = folder(config={"model_type": kind, "vocab_size": 7}, shapes={EMBEDDING: (8, 2)})
    assert (unloadable(replace(found, borrowed=borrowed)) == []) == fits


def test_the_line_for_a_model_with_code_of_its_own_says_that_it_runs_it() -> None:
    classes = {"AutoConfig": "c.X", "AutoModel": "m.X", "AutoModelForCausalLM": "m.XForCausalLM"}
    config = {"architectures": ["XForCausalLM"], "auto_map": classes}
    call = 'AutoModelForCausalLM.from_pretrained("{output}", trust_remote_code=True)  # runs its code'
    line = f"from transformers import AutoModelForCausalLM; model = {call}"
    assert opened_by(folder(config=config), "transformers") == line


def test_what_the_reader_must_add_is_said() -> None:
    code = {"auto_map": {"AutoConfig": "configuration_x.C", "AutoModel": ["modeling_x.M", None], "A": "org/r--o.X"}}
    assert remarks(folder("configuration_x.py", config=code)) == [
        "a config names code that is not there: modeling_x.py; copy it if a library asks for it"
    ]
    assert remarks(folder(config={})) == []


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json",
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5",
        "flax_model.msgpack", "consolidated.safetensors", "consolidated.00.pth", "params.json", "adapter_config.json",
        "adapter_model.bin", "model_index.json", "modules.json", "open_clip_config.json", "open_clip_pytorch_model.bin",
        "hf_quant_config.json", "tokenizer.json", "spiece.model", "chat_template.jinja", "preprocessor_config.json",
        "additional_chat_templates/x.jinja", "1_Pooling/config.json",
    ],
)  # fmt: skip
def test_a_file_that_a_loader_takes_is_a_stranger_unless_it_is_the_models_own(name: str) -> None:
    assert strangers([name], ()) == [name]
    assert strangers([name], {name}) == []


@pytest.mark.parametrize(
    "name", ["thesis.docx", "notes.json", "package.json", "train.py", "weights.pt", "firmware.bin", "x.gguf", "a.log"]
)
def test_other_files_are_nobodys_business(name: str) -> None:
    assert strangers([name], ()) == []


def test_a_folder_of_a_training_is_one_at_any_depth() -> None:
    assert role("a/checkpoint-5/config.json") == "training"
    assert role("a/config.json") == "small"
