"""The files that libraries open in a model's folder: weights, the files that lead to them, and the code they name.

The catalog takes small files by these rules. A merge keeps other models' files out of its output, and `verify` looks
for them. Names are relative to the model's folder (`1_Pooling/config.json`). Pure.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ties_ray.errors import Problem
from ties_ray.libraries import bounded

RESULT_NAME = "ties-ray.result.json"
"""The last object written into an output; its presence means that the merge is whole."""
RECIPE_NAME = "ties-ray.recipe.yaml"
SUMS_NAME = "SHA256SUMS"
"""Written by `verify --sha256`."""
SCORES_NAME = "ties-ray.scores.json"
"""Written by `evaluate`."""
CARD_NAME = "README.md"
MODULES = "modules.json"
"""The file in which sentence-transformers lists a model's modules, each with its folder."""
ADAPTER = "adapter_config.json"
"""The file in which PEFT describes an adapter."""
OURS = (RESULT_NAME, RECIPE_NAME, SUMS_NAME, SCORES_NAME, CARD_NAME)
"""The files that this tool writes into every output."""

Role = Literal["own", "weights", "quantized", "adapter", "training", "hidden", "small"]
"""own: files that each output has of its own (card, result). quantized: files that describe a quantization."""

_ROLES: dict[Role, tuple[str, ...]] = {
    "hidden": (".*", "__pycache__", "*~", "Thumbs.db"),
    "own": (*OURS, "README*", "readme*"),
    "training": (
        "optimizer*", "scheduler*.pt", "scheduler*.bin", "rng_state*", "random_states*", "scaler*.pt", "scaler*.bin",
        "training_args*", "trainer_state*", "trainer_log*", "training_loss*", "all_results.json", "train_results.json",
        "eval_results.json", "predict_results.json", "*.log", "*tfevents*", "events.out.*", "zero_to_fp32.py", "latest",
        "latest_checkpointed_iteration.txt", "checkpoint-*", "global_step*", "wandb", "mlruns", "tensorboard",
        "lightning_logs", "tb_logs", "runs", "logs", "eval", "*_fsdp_*", "*_optim_states*", "ds_config*.json",
        "deepspeed_config*.json", "*.lock",
    ),
    "adapter": ("adapter_config.json", "adapter_model*"),
    "quantized": ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json"),
    "weights": (
        "*.safetensors", "*.safetensors.index*.json", "*.bin", "*.bin.index*.json", "*.pt", "*.pth", "*.ckpt", "*.h5",
        "*.msgpack", "*.msgpack.index.json", "*.ot", "*.onnx", "*.onnx_data", "*.gguf", "*.ggml", "*.tflite", "*.pb",
        "*.mlmodel", "*.mlpackage", "*.engine", "weights*.npz", "*.pkl", "*.pickle", "*.joblib",
        "*.pdparams", "*.nemo", "*.distcp",
    ),
}  # fmt: skip
"""The names of each role, in any folder; the first role that fits counts."""

_LOADED = (
    "*.safetensors", "*.safetensors.index*.json", "pytorch_model*.bin", "pytorch_model*.bin.index*.json",
    "*_pytorch_model*.bin", "consolidated*.pth", "tf_model*.h5", "tf_model*.h5.index.json", "flax_model*.msgpack",
    "flax_model*.msgpack.index.json", "rust_model.ot", "adapter_config.json", "adapter_model*", "config.json",
    "generation_config.json", "params.json", "model_index.json", "modules.json", "router_config.json",
    "sentence_bert_config.json", "sentence_*_config.json", "config_sentence_transformers.json", "open_clip_config.json",
    "quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json",
    "*processor_config.json", "*processor.json", "image_*config.json", "audio_tokenizer_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "bpe.codes", "spiece.model", "sentencepiece*.model", "*.spm",
    "source.spm", "target.spm", "*.tiktoken", "tekken.json", "chat_template*.jinja", "chat_template*.json",
    "normalizer.json",
)  # fmt: skip
"""Names that a loader of the folder opens or follows."""
LOADED_FOLDERS = ("additional_chat_templates",)
"""Folders that a loader opens although no file names them."""


def role(name: str) -> Role:
    """Return the role of a file or folder of a model."""
    parts = name.split("/")
    for kind, patterns in _ROLES.items():
        if any(fnmatchcase(part, pattern) for part in parts for pattern in patterns):
            return kind
    return "small"


def is_loaded(name: str) -> bool:
    """Return whether a loader that is given the folder may open a file of this name that lies directly in it."""
    return any(fnmatchcase(name, pattern) for pattern in _LOADED)


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder as a loader sees it."""

    uri: str
    names: frozenset[str]
    """The relative names of all files."""
    texts: Mapping[str, bytes]
    """The files of `TEXTS` that are there, by name."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shapes of the stored tensors, by name."""
    borrowed: bool = False
    """Whether the configs are another model's than the shapes."""


TEXTS = (
    "config.json", MODULES, "config_sentence_transformers.json", "tokenizer_config.json", "processor_config.json",
    "preprocessor_config.json", ADAPTER,
)  # fmt: skip
"""The files that name other files which must be there, or the class that opens the folder."""
_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "embed_in", "shared")
"""Modules that hold a row for each token."""
_MORE_ROWS = frozenset({
    "csm", "kyutai_speech_to_text", "mllama", "mllama_text_model", "molmo2", "molmo2_text", "moshi",
})  # fmt: skip
"""Model types whose embedding has more rows than their `vocab_size`, for images or codes."""
_MODULES_WITH_FILES = (
    "Pooling", "Dense", "CNN", "LSTM", "LayerNorm", "WeightedLayerPooling", "WordEmbeddings", "WordWeights", "BoW",
    "SpladePooling", "Router", "Asym",
)  # fmt: skip
"""Classes of sentence-transformers that read their folder; others (Normalize) may have none."""
_ADAPTER_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
"""PEFT's classes that open an adapter together with its base, by the task of the adapter."""
_ENCODERS = ("SentenceTransformer", "SparseEncoder", "CrossEncoder", "MultiVectorEncoder")


def unloadable(folder: ModelFolder) -> list[Problem]:
    """Return why a library can't open the folder, as far as that is certain from names, shapes and configs."""
    return [*_without_modules(folder), *_other_rows(folder)]


def remarks(folder: ModelFolder) -> list[str]:
    """Return notes on files that a reader of the folder may have to add."""
    lacking = sorted({name for text in folder.texts.values() for name in _code(text)} - folder.names)
    if not lacking:
        return []
    return [f"a config names code that is not there: {', '.join(lacking)}; copy it if a library asks for it"]


def opened_by(folder: ModelFolder, library: str) -> str:
    """Return a line of Python that opens a model with the class that it names, `{output}` standing for the folder.

    library: the hub's name of it. The line is empty where the folder's files name no class of it.
    """
    if library == "peft":
        return _adapter_opened_by(_object(folder.texts.get(ADAPTER, b"")))
    if library not in ("transformers", "sentence-transformers"):
        return ""
    if isinstance(parsed(folder.texts.get(MODULES, b"")), list):
        kind = _object(folder.texts.get("config_sentence_transformers.json", b"")).get("model_type")
        encoder = kind if kind in _ENCODERS else _ENCODERS[0]
        return f'from sentence_transformers import {encoder}; model = {encoder}("{{output}}")'
    config = _object(folder.texts.get("config.json", b""))
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    name = first if isinstance(first, str) and first.isidentifier() else ""
    classes = config.get("auto_map")
    if isinstance(classes, dict) and classes:
        own = [key for key, place in classes.items() if str(place).endswith(f".{name}")] if name else []
        auto = next((key for key in [*own, "AutoModelForCausalLM", "AutoModel"] if key in classes), "")
        if auto.isidentifier():
            call = f'{auto}.from_pretrained("{{output}}", trust_remote_code=True)  # runs its code'
            return f"from transformers import {auto}; model = {call}"
    if name:
        cls = "AutoModelForCausalLM" if name.endswith("ForCausalLM") else name
        return f'from transformers import {cls}; model = {cls}.from_pretrained("{{output}}")'
    return ""


def _adapter_opened_by(config: Mapping[str, object]) -> str:
    """Return the line for an adapter whose config names its task and a base that PEFT finds, else nothing."""
    auto, base = _ADAPTER_CLASSES.get(str(config.get("task_type"))), config.get("base_model_name_or_path")
    if auto is None or not isinstance(base, str) or "://" in base:
        return ""
    return f'from peft import {auto}; model = {auto}.from_pretrained("{{output}}")'


def strangers(names: Iterable[str], own: Collection[str]) -> list[str]:
    """Return the files that a loader may take for the model's and that are not its own.

    names: the files directly in the folder, and all files in folders of the model's own files or in `LOADED_FOLDERS`.
    """
    return [name for name in names if name not in own and ("/" in name or is_loaded(name))]


def _without_modules(folder: ModelFolder) -> Iterator[Problem]:
    """Yield the modules of sentence-transformers whose folders are not there."""
    listed = parsed(folder.texts.get(MODULES, b"[]"))
    for module in listed if isinstance(listed, list) else ():
        path, kind = (module.get("path"), module.get("type")) if isinstance(module, dict) else (None, None)
        if not (isinstance(path, str) and path.strip("/") and isinstance(kind, str)):
            continue
        inside = f"{path.strip('/')}/"
        needs = kind.rpartition(".")[2] in _MODULES_WITH_FILES
        if ".." in path.split("/") or (needs and not any(name.startswith(inside) for name in folder.names)):
            message = f"{MODULES} names {path!r}, and no file of it is there"
            yield Problem(
                folder.uri, message, f"complete the folder, or remove {MODULES} to have the transformer alone"
            )


def _other_rows(folder: ModelFolder) -> Iterator[Problem]:
    """Yield the token embedding, if a model of this config would have other rows.

    Fewer rows than stated never load. More do in some models: they count where the config is not the model's own.
    """
    config = _object(folder.texts.get("config.json", b""))
    text = config.get("text_config")
    vocabulary = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    stated = {size for key, size in _numbers(config) if "vocab" in key}
    padded = any("multiple" in key for key, _ in _numbers(config))
    if not isinstance(vocabulary, int) or padded or "auto_map" in config:
        return
    for name, shape in folder.shapes.items():
        if not (name.endswith(".weight") and name.split(".")[-2] in _EMBEDDINGS and len(shape) == 2):
            continue
        more = shape[0] > vocabulary and (not folder.borrowed or config.get("model_type") in _MORE_ROWS)
        if shape[0] not in stated and not more:
            message = f"{name} has {shape[0]:,} rows, and config.json states a vocab_size of {vocabulary:,}"
            remedy = f"write {shape[0]} there, or take the small files of another input (`output.files_from`)"
            yield Problem(folder.uri, message, remedy)
            return


def _code(text: bytes) -> Iterator[str]:
    """Yield the Python files that a config names as its own."""
    named = _object(text).get("auto_map")
    for place in named.values() if isinstance(named, dict) else ():
        for reference in place if isinstance(place, list) else [place]:
            if isinstance(reference, str) and "--" not in reference and "." in reference:
                yield f"{reference.partition('.')[0]}.py"


def _numbers(value: object, depth: int = 8) -> Iterator[tuple[str, int]]:
    """Yield every integer of a config with its key, of configs inside it too."""
    for key, inner in value.items() if isinstance(value, dict) and depth else ():
        if isinstance(inner, int) and not isinstance(inner, bool):
            yield str(key), inner
        yield from _numbers(inner, depth - 1)


def _object(text: bytes) -> dict[str, object]:
    value = parsed(text)
    return value if isinstance(value, dict) else {}


def module_folders(modules: bytes) -> tuple[str, ...]:
    """Return the folders, relative, that a `modules.json` names; none where it is not one."""
    listed = parsed(modules)
    paths = [module.get("path") for module in listed if isinstance(module, dict)] if isinstance(listed, list) else []
    return tuple(path.strip("/") for path in paths if isinstance(path, str) and path.strip("/"))


def parsed(data: bytes) -> object:
    """Return the value of a JSON text; None where it is none."""
    try:
        return bounded.loads(data)
    except (ValueError, RecursionError):
        return None
