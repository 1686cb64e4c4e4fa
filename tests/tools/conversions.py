"""Write ties_ray/libraries/conversions.json: what transformers renames, converts and ties, as facts without its code.

`python -m tests.tools.conversions` writes it anew for the transformers that is installed.
"""

import importlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import conversion_mapping
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from tests.tools.architectures import config_of, kinds
from ties_ray.inputs import orientation
from ties_ray.libraries import conversions

TARGET = Path(conversions.__file__).with_name("conversions.json")


def collected() -> dict[str, Any]:
    """Return the content of the file."""
    mappings = {key: [_rule(one) for one in many] for key, many in _mappings().items()}
    first: dict[str, str] = {}
    same = {key: first.setdefault(json.dumps(rules), key) for key, rules in mappings.items()}
    classes = {kind: name for kind, name in MODEL_MAPPING_NAMES.items() if isinstance(name, str) and name in mappings}
    return {
        "transformers": transformers.__version__,
        "rules": {key: mappings[key] for key in sorted(mappings) if same[key] == key},
        "alike": {key: same[key] for key in sorted(mappings) if same[key] != key},
        "classes": dict(sorted(classes.items())),
        "tied": sorted(kind for kind in CONFIG_MAPPING if _ties(kind)),
        "always_tied": sorted(kind for kind in CONFIG_MAPPING if _ties(kind, tie_word_embeddings=False)),
        "ties": {cls.__name__: list(_tied_keys(cls)) for cls in model_classes() if list(_tied_keys(cls))},
        **_orientations(),
    }


def _orientations() -> dict[str, Any]:
    """Return the modules with a matrix as their weight that are no linear layer (out, in)."""
    embeddings, linear = set[str](), set[str]()
    transposed, others = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for name, kind in kinds().items():
        try:
            with torch.device("meta"):
                model = getattr(transformers, name)(CONFIG_MAPPING[kind](**config_of(CONFIG_MAPPING[kind])))
        except Exception:  # can't be built small, or without what is not installed
            continue
        for path, module in model.named_modules():
            weight, word = module._parameters.get("weight"), orientation.word_of(path)
            if weight is None or weight.dim() != 2:
                continue
            if type(module) is torch.nn.Embedding or hasattr(module, "embed_scale"):
                embeddings.add(word)
            elif isinstance(module, torch.nn.Linear):
                linear.add(word)
            else:
                (transposed if type(module).__name__ == "Conv1D" else others)[kind].add(word)
    return {
        "embeddings": sorted(embeddings - linear),
        "transposed": {kind: sorted(words) for kind, words in sorted(transposed.items())},
        "other_matrices": {kind: sorted(words) for kind, words in sorted(others.items())},
    }


def model_classes() -> list[type[PreTrainedModel]]:
    """Return every model class of transformers that can be imported here."""
    folder = Path(transformers.__file__).parent / "models"
    for file in sorted(folder.glob("*/modeling_*.py")):
        try:
            importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        except ImportError:  # of a library that is not installed
            continue
    return sorted(set(_subclasses(PreTrainedModel)), key=lambda cls: cls.__qualname__)


def _subclasses(cls: type) -> Iterator[type]:
    for one in cls.__subclasses__():
        if one.__module__.startswith("transformers."):
            yield one
            yield from _subclasses(one)


def _mappings() -> dict[str, list[Any]]:
    return conversion_mapping._build_checkpoint_conversion_mapping()


def _rule(rule: Any) -> list[Any]:
    """Return [kind, patterns of the sources, of the targets, operations]."""
    operations = [[type(one).__name__, _settings(one)] for one in getattr(rule, "operations", ())]
    kind = {"WeightRenaming": "rename", "WeightConverter": "convert"}.get(type(rule).__name__, type(rule).__name__)
    return [kind, list(rule._original_source_patterns), list(rule._original_target_patterns), operations]


def _settings(operation: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(operation).items() if value not in (None, False)}


def _ties(kind: str, **settings: bool) -> bool:
    try:
        return getattr(CONFIG_MAPPING[kind](**settings), "tie_word_embeddings", False) is True
    except Exception:  # configs that can't be made without arguments
        return False


def _tied_keys(cls: type[PreTrainedModel]) -> Iterator[tuple[str, str]]:
    keys = getattr(cls, "_tied_weights_keys", None)
    if isinstance(keys, dict):
        yield from keys.items()


def text(content: dict[str, Any]) -> str:
    """Return the file's text, an entry a line, so that a difference can be read."""
    parts = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines = ",\n".join(f"  {json.dumps(one)}: {json.dumps(many)}" for one, many in value.items())
            parts.append(f'"{key}": {{\n{lines}\n}}')
        elif isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(one)}" for one in value)
            parts.append(f'"{key}": [\n{lines}\n]')
        else:
            parts.append(f'"{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    TARGET.write_text(text(collected()))
