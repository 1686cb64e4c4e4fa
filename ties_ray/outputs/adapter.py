"""One LoRA adapter in PEFT's layout: the merged change of every matrix as factors of one rank, and the error.

Serving engines need one rank for all modules and one file: vLLM ignores rank and alpha patterns. So a matrix of a lower
rank gets zeros, alpha = r, the scale is in the factors, and the targets are a plain list.

A stored parameter has delta = L @ R. A linear layer (out, in) has lora_A = R and lora_B = L. GPT-2's layers (in, out)
and embeddings (rows, width) have the transposed product: A = L.T, B = R.T.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ties_ray.errors import Problem
from ties_ray.kernels import Factors
from ties_ray.libraries.library import Library
from ties_ray.outputs import DTYPES, Condensed, CondensingOutput, OutputFile, OutputTensor
from ties_ray.tensors import Kind, Parameter, exclusion

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
OPENED_BY = 'from peft import PeftModel; model = PeftModel.from_pretrained(base_model, "{output}")'
PEFT = Library("peft", "adapter_model", CONFIG, OPENED_BY, shards=False)
PREFIX = "base_model.model."
KEYS: dict[Kind, tuple[str, str]] = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "transposed": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}
WITHOUT_HEAD = frozenset({"CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"})
"""Task types for which PEFT loads an adapter without a saved head."""
LIBRARY = 16 * 2**20
"""Bytes that linear algebra holds beside matrices."""
SMALLEST = 8
"""The first rank that `auto` tries; the others double it, as serving engines like them."""
SHOWN = 4
"""The most parameters that a problem names; more are counted."""


class Adapter(CondensingOutput):
    """The best adapter of one rank for the merged change; exact where the rank suffices, else with its error."""

    carries_heads: ClassVar[bool] = True

    kind: Literal["adapter"] = "adapter"
    dtype: Literal["float64", "float32", "float16", "bfloat16"] = "float32"
    """The dtype of the factors."""
    rank: Annotated[int, Field(ge=1)] | Literal["auto"] = 64
    """The rank of every module. auto: the smallest of 8, 16, 32, ... that keeps `energy`."""
    energy: float = Field(default=0.99, gt=0, le=1)
    """The share of the squared norm, over all modules, that `auto` keeps."""
    max_rank: int = Field(default=256, ge=SMALLEST)
    """The largest rank that `auto` chooses; it is taken where no rank keeps enough."""

    def problems(self, parameters: Sequence[Parameter]) -> list[Problem]:
        """Return which changed parameters have no place in an adapter, and that layouts are mixed."""
        changed = _changed(parameters)
        no_matrix = [
            each.name
            for each in changed
            if len(each.shape) != 2 or not each.name.endswith(".weight") or each.kind not in KEYS
        ]
        problems = []
        if no_matrix:
            message = "an adapter holds matrices of linear layers and embeddings; the models also change"
            message += f" {_listed(no_matrix)}"
            remedy = f"write `kind: checkpoint` or `kind: delta`, or {_excluding(no_matrix, parameters)}"
            problems.append(Problem("output.kind", message, remedy, "not_a_matrix"))
        if {"linear", "transposed"} <= {each.kind for each in changed if each.name not in no_matrix}:
            turned = [each.name for each in changed if each.kind == "transposed"]
            message = f"one adapter has one layout, and {_listed(turned)} are stored as (in, out), others as (out, in)"
            remedy = f"write `kind: checkpoint`, or {_excluding(turned, parameters)}"
            problems.append(Problem("output.kind", message, remedy, "mixed_layouts"))
        tied = [each.name for each in changed if len(each.tied) > 1 and each.kind in KEYS]
        if tied:
            message = f"an adapter changes modules one by one, and several share {_listed(tied)}"
            remedy = f"write `kind: checkpoint` or `kind: delta`, or {_excluding(tied, parameters)}"
            problems.append(Problem("output.kind", message, remedy, "tied"))
        return problems

    def tensors(self, parameters: Sequence[Parameter]) -> tuple[OutputTensor, ...]:
        """Return A and B of every parameter that is merged and changed, and the heads that come along."""
        rank, dtype = self.ranks[-1], DTYPES[self.dtype]
        tensors = []
        for each in _changed(parameters):
            width, height = each.shape if _is_turned(each) else each.shape[::-1]
            for key, shape in zip(KEYS[each.kind], ((rank, width), (height, rank)), strict=True):
                name = PREFIX + _path(each) + key
                tensors.append(OutputTensor(name, dtype, shape, each.name, "scratch"))
            for alias in each.tied:  # the head of a tied model: PEFT changes its module apart from the embedding
                for key, shape in zip(KEYS["linear"], ((rank, each.shape[1]), (each.shape[0], rank)), strict=True):
                    tensors.append(OutputTensor(PREFIX + _module(alias) + key, dtype, shape, each.name, "scratch"))
        heads = (each for each in parameters if each.carried)
        tensors += [OutputTensor(PREFIX + each.name, each.dtype, each.shape, each.name, "base") for each in heads]
        return tuple(tensors)

    def library(self, inputs: Library) -> Library:
        """Return PEFT: it and serving engines look for one file."""
        return PEFT

    def index(
        self, files: Sequence[OutputFile], parameters: Sequence[Parameter], facts: Mapping[str, str], library: Library
    ) -> tuple[str, bytes]:
        """Return the config that PEFT writes for a plain LoRA, without keys that say nothing."""
        changed = _changed(parameters)
        rank = self.ranks[-1]
        heads = _modules_to_save([each.name for each in parameters if each.carried], facts.get("modules_to_save", ""))
        keeps_task = bool(heads) or facts.get("task_type") in WITHOUT_HEAD
        config: dict[str, object] = {
            "peft_type": "LORA",
            "task_type": facts.get("task_type") or None if keeps_task else None,
            "base_model_name_or_path": facts.get("base_name") or facts.get("base") or None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": any(each.kind == "transposed" for each in changed),
            "target_modules": targets(_paths(changed), _paths(parameters)),
            "rank_pattern": {},
            "alpha_pattern": {},
            "modules_to_save": heads or None,
        }
        return CONFIG, (json.dumps(config, indent=2) + "\n").encode()

    def rewrite(self, name: str, data: bytes, facts: Mapping[str, str]) -> bytes | None:
        """Leave out all small files: they belong to a whole model."""
        return None

    def entry_point_file(self, files: Sequence[OutputFile], library: Library) -> str:
        """Return the config."""
        return CONFIG

    @property
    def ranks(self) -> tuple[int, ...]:
        """Return the rank, or the ranks that `auto` chooses from."""
        if self.rank != "auto":
            return (self.rank,)
        return tuple(SMALLEST << step for step in range((self.max_rank // SMALLEST).bit_length()))

    def condense(self, parameter: Parameter, matrix: "Tensor") -> Condensed:
        """Return the best factors, laid out as in `kernels/lowrank.py`."""
        from ties_ray.kernels import lowrank  # here, so that planning does not wait for torch

        return Condensed(*lowrank.of_matrix(matrix, self.ranks))

    def combine(self, parameter: Parameter, factors: "Sequence[tuple[float, Factors]]") -> Condensed:
        """Return the best factors of the sum, computed exactly from the factors of the changes."""
        from ties_ray.kernels import lowrank

        return Condensed(*lowrank.of_sum(factors, self.ranks))

    def condense_bytes(self, parameter: Parameter) -> int:
        """Return a measured bound of the bytes that `lowrank.of_matrix` holds."""
        short, long = sorted(parameter.shape)
        rank = self.ranks[-1]
        square = min(short, max(512, 3 * rank + 64))
        return 4 * (rank + 16) * (5 * long + 3 * short) + 56 * square**2 + LIBRARY

    def combine_bytes(self, parameter: Parameter, rank_sum: int) -> int:
        """Return a measured bound of the bytes that `lowrank.of_sum` holds."""
        short, long = sorted(parameter.shape)
        return 4 * rank_sum * (6 * short + long) + 56 * rank_sum**2 + 16 * self.ranks[-1] * (long + short) + LIBRARY

    def choose(self, norms2: Sequence[float], errors2: Sequence[Sequence[float]]) -> "Adapter":
        """Return the adapter of the smallest rank that keeps `energy` of all matrices together."""
        if self.rank != "auto":
            return self
        norm2 = math.fsum(norms2)
        lost = [math.fsum(errors) for errors in zip(*errors2, strict=True)]
        enough = (rank for rank, error2 in zip(self.ranks, lost, strict=False) if norm2 - error2 >= self.energy * norm2)
        return self.model_copy(update={"rank": next(enough, self.ranks[-1])})

    def assemble(self, tensor: OutputTensor, parameter: Parameter, data: "Tensor") -> "Tensor":
        """Return A or B; `data` may have been made for a larger rank."""
        import torch

        from ties_ray.kernels import lowrank

        halves = lowrank.halves(data, *parameter.shape)
        is_head = parameter.kind == "embedding" and tensor.name.endswith(KEYS["linear"])
        kind: Kind = "linear" if is_head else parameter.kind
        a, b = halves[::-1] if kind == "linear" else halves
        rank = self.ranks[-1]
        factor = a[:rank] if tensor.name.endswith(KEYS[kind][0]) else b[:rank].T
        return factor.to(getattr(torch, self.dtype)).reshape(-1)


def _changed(parameters: Sequence[Parameter]) -> list[Parameter]:
    return [each for each in parameters if each.merged and each.changed]


def _excluding(names: Sequence[str], parameters: Sequence[Parameter]) -> str:
    return exclusion(names, (each.name for each in parameters), "leaves out what was trained in them")


def _is_turned(parameter: Parameter) -> bool:
    """Return whether the parameter is stored as the transpose of B @ A."""
    return parameter.kind != "linear"


def targets(changed: Collection[str], modules: Iterable[str]) -> list[str]:
    """Return the shortest ends of paths that name the changed modules and no other, as PEFT matches them.

    changed: paths of the changed modules. modules: paths of all modules. An end begins with a number only where no
    other end is possible.
    """
    own = {tuple(path.split(".")) for path in changed}
    paths = [tuple(path.split(".")) for path in modules]
    others = {words[:count] for words in paths for count in range(1, len(words) + 1)}
    ends = Counter(words[start:] for words in others - own for start in range(len(words)))
    ends_of_own = set()
    for words in own:
        starts = [start for start in range(len(words) - 1, -1, -1) if not ends[words[start:]]]
        named = [start for start in starts if not words[start].isdigit()]
        ends_of_own.add(words[(named or starts or [0])[0] :])
    return sorted(".".join(words) for words in ends_of_own)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _path(parameter: Parameter) -> str:
    """Return the module's path in the model that an adapter is put on; checkpoints may call it otherwise."""
    return _module(parameter.called or parameter.name)


def _modules_to_save(heads: Sequence[str], named: str) -> list[str]:
    """Return the modules of heads: as the adapters' configs name them, or else by their own paths.

    named: the names of the configs, with commas between.
    """
    modules = set()
    for head in heads:
        words = head.rpartition(".")[0].split(".")
        ends = {".".join(words[start:stop]) for stop in range(1, len(words) + 1) for start in range(stop)}
        modules |= ends & set(named.split(", ")) or {".".join(words)}
    return sorted(modules)


def _paths(parameters: Sequence[Parameter]) -> list[str]:
    """Return the paths of modules, those that share a parameter's tensor among them."""
    return [*map(_path, parameters), *(_module(alias) for each in parameters for alias in each.tied)]


def _module(name: str) -> str:
    return name.removesuffix(".weight")
