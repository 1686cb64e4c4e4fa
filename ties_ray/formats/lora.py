"""A LoRA adapter (Hu et al. 2022) as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

The change of a linear module is scale * B @ A with A (r, in) and B (out, r); scale = alpha / r, or alpha / sqrt(r) for
rsLoRA (Kalajdzievski 2023), with the module's own r and alpha. The tensors decide which modules there are and of what
rank; the config decides the scale alone, and a config of another rank is refused. Nothing is guessed: what is neither
a factor nor known to be harmless is refused, with a reason of `REASONS`.
"""

import functools
import math
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ties_ray import bounded
from ties_ray.account import Account, account
from ties_ray.errors import Problem, printable
from ties_ray.excluding import LEAVE_OUT, exclusion
from ties_ray.formats import Contents, Folder, Format, Rules
from ties_ray.kernels import Encoded, Factors
from ties_ray.libraries import naming
from ties_ray.libraries.patterns import UnfitKey, resolve
from ties_ray.safetensors import DTYPE_BITS, MERGEABLE, TensorInfo, nbytes
from ties_ray.tensors import Kind, Parameter, Read, Source, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

    from ties_ray.kernels import Stored

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
FACTOR_DTYPES = frozenset({"F32", "F16", "BF16"})

_AGAIN = "save the adapter again, whole (save_pretrained)"
_OUT = LEAVE_OUT
_WHOLE = f"give the whole model that PEFT makes of it (merge_and_unload, save_pretrained) in its place, or {_OUT}"
_SAME_BASE = f"name the base that it was trained on, or {_OUT}"
_EXCLUDED = "{exclusion}"
_LEFT_OUT = "leaves them out, with what was trained in them"
REASONS: Mapping[str, tuple[str, str]] = {
    "config_missing": (f"has no {CONFIG}, without which the scale is unknown", "add it beside the weights"),
    "config_json": (f"{CONFIG} is not a JSON object", "upload it again"),
    "config_value": (f"{CONFIG} has values that mean nothing", "correct them"),
    "pattern": (
        "has patterns that are no regular expressions, are too many, or hold flags, look-around or references",
        "write module names",
    ),
    "prompt": ("adds virtual tokens, a router or a model of its own to the base, and no change of its weights", _OUT),
    "peft_type": ("is no LoRA adapter", _WHOLE),
    "conditional": ("changes the base for some tokens only, or by a router, and no weights do the same", _OUT),
    "variant": ("is a variant of LoRA whose change is not scale * B @ A", _WHOLE),
    "layer_replication": ("has more layers than its base (layer_replication)", _OUT),
    "trainable_tokens": (
        "replaces rows of the embedding (trainable_token_indices), which is no low-rank change",
        _WHOLE,
    ),
    "target_parameters": ("has factors for single parameters of experts (target_parameters)", _WHOLE),
    "mutated_base": (
        "was trained on a base that its initialisation had changed",
        f"{_WHOLE}: PEFT repeats the initialisation where it loads the adapter",
    ),
    "residual_base": (
        "was trained on a base that its initialisation had changed by what it saw of the data, which the adapter does"
        " not tell",
        f"where that base was saved, name it as `base` and write init_lora_weights: true into {CONFIG}; otherwise save"
        f" it again from its training (path_initial_model_for_weight_conversion), or {_OUT}",
    ),
    "unknown_initialisation": (
        "names an initialisation that is not known here and may have changed the base",
        f"if it leaves the base alone, write init_lora_weights: true into {CONFIG}; otherwise {_WHOLE}",
    ),
    "pickle": (
        f"holds its weights as a pickle ({PICKLE}), which can run code when opened",
        "load it with PEFT where that is safe, and save it again (save_pretrained writes safetensors)",
    ),
    "weights_missing": (f"has no {WEIGHTS}", "complete the download or upload"),
    "nothing": ("holds no factors", _AGAIN),
    "empty": ("has empty or flattened tensors, as a save under ZeRO-3 or FSDP that gathered nothing leaves", _AGAIN),
    "orphan": ("has one factor of a pair without the other", _AGAIN),
    "duplicate": ("has two changes for one parameter", "keep one of them"),
    "several_adapters": ("holds several adapters in one file", "save each in a folder of its own (save_pretrained)"),
    "unknown_tensor": ("has tensors of adapters that are not known here", _WHOLE),
    "dtype": ("has tensors of a dtype that is not merged", "save it as float32, float16 or bfloat16"),
    "rank_mismatch": (f"has factors of another rank than {CONFIG} says, so the scale is unknown", "correct r"),
    "conv": ("has factors of convolutions, whose change is not a matrix", _WHOLE),
    "fused": ("changes parameters that the base stores in another layout, fused or apart", _WHOLE),
    "unknown_module": ("changes parameters that the base lacks", _SAME_BASE),
    "not_floating": ("changes parameters that are not floating-point numbers in the base", "give the unquantised base"),
    "shape_mismatch": ("has factors that do not fit the base", _SAME_BASE),
    "ambiguous_layout": (
        "has square modules of which it can't be told whether they are stored (in, out)",
        f"set fan_in_fan_out in {CONFIG} as it is for these modules, and name the others in `exclude`",
    ),
    "tied": (
        "changes one of several parameters that the base ties to each other, and only all of them can have the change",
        f"{_EXCLUDED}; or {_OUT}",
    ),
    "dora_mismatch": (f"has magnitudes where {CONFIG} says use_dora: false, or lacks them where it says true", _AGAIN),
    "dora_transposed": ("has DoRA magnitudes for modules that are not linear (out, in)", _WHOLE),
    "head": ("has parameters of its own that the base lacks (the head of its task)", _EXCLUDED),
    "resized": (
        "has whole tables with another number of rows than the base's: its vocabulary was resized",
        f"name a base that was resized alike (resize_token_embeddings, save_pretrained) as `base`; {_EXCLUDED}",
    ),
    "saved_modules": (
        "has whole tensors beside its factors (modules_to_save, embeddings or biases)",
        f"`allow: {{saved_modules: merge}}` merges them as dense changes, saved minus base; {_EXCLUDED}",
    ),
}
"""Why an adapter is refused, and the remedy, by code; the modules or values follow in the message."""

_VARIANTS: Mapping[str, str] = {
    "use_qalora": "variant",
    "use_bdlora": "variant",
    "megatron_config": "variant",
    "alora_invocation_tokens": "conditional",
    "arrow_config": "conditional",
}
"""Keys whose change is not scale * B @ A, with the reason's code."""
_HARMLESS = frozenset({
    "use_dora", "use_rslora", "velora_config", "monteclora_config", "kasa_config", "eva_config", "corda_config",
    "lora_ga_config", "loftq_config", "runtime_config", *_VARIANTS,
})  # fmt: skip
"""`use_...` and `..._config` keys that are dealt with, or say only how training went. Any other that is set is
refused: it may be a variant that did not exist when this was written."""
_UNCHANGED_BASE = frozenset({"true", "false", "gaussian", "orthogonal", "eva", "mica"})
"""Values of `init_lora_weights` that leave the base as it was; PEFT's conversion of the others writes true."""
_REPEATED = ("pissa", "olora", "loftq")
"""Those that subtract from the base what it alone tells, so that PEFT's loading does the same again."""
_FROM_DATA = ("corda", "lora_ga")
"""Those that subtract what data or gradients tell."""
_TRAINING_ONLY = re.compile(r".+\.lora_(?:velora|monteclora)_.+", re.DOTALL)
"""Keys of what only training uses: the change is scale * B @ A without them."""
_WITHOUT_CHANGE = frozenset({
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT",
    "POLY", "XLORA", "LILY", "SHADOW",
})  # fmt: skip
"""`peft_type`s that PEFT can't merge into the base."""

_PREFIXES = re.compile(r"\A(?:base_model\.model\.)*")
_FACTOR = re.compile(
    r"(?P<path>.+)\.lora_(?:"
    r"(?P<linear>A|B)(?:\.(?P<name1>[^.]+))?\.(?P<what>weight|bias)"
    r"|(?P<embedding>embedding_A|embedding_B)(?:\.(?P<name2>[^.]+))?"
    r"|(?P<magnitude>magnitude_vector)(?:\.[^.]+)?(?:\.weight)?)",
    re.DOTALL,
)
"""A factor's key; the adapter's name is left out or left in."""
_SAVED = re.compile(r"\.(?:modules_to_save\.[^.]+|base_layer)(?=\.[^.]+$)")
_TUNER = re.compile(r"\.(?:lora|hada|lokr|ia3|vera|oft|boft|hra|miss|c3a|shira|delora|adapter|router)_")
"""In keys that are a tuner's own, and no parameter of a model."""
_LARGEST = 2**31
"""Rank or alpha that is taken for a number and no attack."""

_LONGEST = 1000
"""Characters of a fact."""

Parts = dict[str, TensorRef]
"""What is stored of one module: A, B, bias, embedding_A, embedding_B, magnitude_vector."""


class Lora(Format):
    """A model stored as low-rank changes of a base."""

    name = "lora"
    whole = False

    def recognises(self, names: Sequence[str]) -> bool:
        """Return whether there is a PEFT config, or weights under PEFT's name."""
        return CONFIG in names or WEIGHTS in names

    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the weights (or, without them, any safetensors, whose keys tell another tool's) and the config."""
        weights = [name for name in names if name == WEIGHTS] or [
            name for name in names if name.endswith(".safetensors") and not name.startswith(".")
        ]
        return tuple(weights), tuple(name for name in names if name == CONFIG)

    def read(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> Contents:
        """Return a source for each parameter that the adapter changes, checked against config and base."""
        refused = _Refused()
        config = _config(folder, refused)
        pins = {pin.uri.rpartition("/")[2]: pin for pin in folder.files}
        if WEIGHTS not in pins:
            refused.add("pickle" if PICKLE in pins else "weights_missing")
        if WEIGHTS not in pins or "peft_type" in refused or "prompt" in refused:  # the rest would follow from it
            return Contents(problems=refused.problems(folder.uri))
        modules, saved = _stored(folder.headers[WEIGHTS].tensors, refused)
        adapter = _Adapter(_settings(config, modules, refused), modules, saved, base, rules, refused)
        for path, parts in modules.items():
            adapter.add_module(path, parts)
        for key, (name, ref) in saved.items():
            adapter.add_saved(key, name, ref)
        if not modules:
            refused.add("nothing")
        problems = refused.problems(folder.uri, {*adapter.sources, *(base or ())})
        if problems:
            return Contents(problems=problems)
        notes = tuple(f"{folder.uri}: {note}" for note in adapter.notes())
        if folder.nested:
            inside = ", ".join(folder.nested)
            notes += (f"{folder.uri}: further adapters lie in it, each to be named by its own path: {inside}",)
        return Contents(
            (pins[WEIGHTS],),
            adapter.sources,
            untied=adapter.untied,
            notes=notes,
            kinds=adapter.kinds,
            called=adapter.called,
            facts=adapter.facts(),
            account=_account(folder.headers[WEIGHTS].tensors, adapter),
        )

    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return the rows of a linear module's B, its A whole; both whole where the parameter is stored transposed.

        What lies together and is needed whole comes in one read.
        """
        return _joined(_pieces(source, start, stop))

    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> "Stored":
        """Return fp32 factors of the rows that the slice touches; a whole tensor that was saved as it is."""
        import torch  # here, so that planning does not wait for it

        dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        pieces = _pieces(source, start, stop)
        stored = []
        for ref, piece in zip(source.tensors, pieces, strict=False):
            (data,) = (
                buffer[piece.start - read.start : piece.stop - read.start]
                for read, buffer in zip(_joined(pieces), buffers, strict=True)
                if read.start <= piece.start and piece.stop <= read.stop
            )
            dtype = dtypes[ref.dtype]
            aligned = data.storage_offset() % dtype.itemsize == 0 == data.data_ptr() % dtype.itemsize
            stored.append((data if aligned else data.clone()).view(dtype))
        if source.encoding == "dense":
            return Encoded(stored[0] if stored else torch.empty(0, dtype=dtypes[source.tensors[0].dtype]))
        numbers = dict(source.numbers)
        scale = numbers["scale"]
        if len(source.tensors) == 1:  # a bias: rows of one element
            values = stored[0].float() if stored else torch.empty(0)
            return Factors(values.reshape(-1, 1), torch.ones(1, 1), scale, 0)
        rank, columns = source.tensors[0].shape[0], _shape(source)[1]
        if not stored:
            return Factors(torch.empty(0, rank), torch.empty(rank, columns), scale, 0)
        first, last = start // columns, -(-stop // columns)
        if "transposed" in numbers:
            left = torch.empty(last - first, rank).copy_(stored[0].reshape(rank, -1)[:, first:last].T)
            right = torch.empty(rank, columns).copy_(stored[1].reshape(columns, rank).T)
            return Factors(left, right, scale, start - first * columns)
        left, right = stored[1].float().reshape(-1, rank), stored[0].float().reshape(rank, -1)
        magnitude = stored[2].float() if len(stored) > 2 else None
        return Factors(left, right, scale, start - first * columns, magnitude)

    def needs(self, source: Source) -> Literal["nothing", "slice", "rows"]:
        """Return `rows` for DoRA, whose rows are scaled by their norms; `slice` for a tensor that was saved whole."""
        if source.encoding == "dense":
            return "slice"
        return "rows" if len(source.tensors) > 2 else "nothing"

    def shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape of the parameter that the factors change."""
        return _shape(source)

    def rank(self, source: Source) -> int:
        """Return the rank of a module's factors; 0 of DoRA, whose change is no product, and of anything saved whole."""
        plain = source.encoding == "factors" and len(source.tensors) == 2
        return source.tensors[0].shape[0] if plain else 0

    def decoded_bytes(self, source: Source) -> int:
        """Return the bytes of the factors as read, once more aligned, and decoded."""
        if source.encoding == "dense":
            return 0
        return sum(2 * nbytes(ref.dtype, ref.shape) + 4 * math.prod(ref.shape) for ref in source.tensors)


def _account(stored: Mapping[str, TensorInfo], adapter: "_Adapter") -> Account:
    """Return what becomes of every tensor of an adapter that is not refused."""
    merged = {ref.start for source in adapter.sources.values() for ref in source.tensors}
    fates = []
    for key, info in stored.items():
        fate = "excluded by the recipe"
        if info.start in merged:
            fate = "merged"
        elif key in adapter.copies:
            fate = "copies of base layers"
        elif _TRAINING_ONLY.fullmatch(key):
            fate = "used in training only"
        fates.append((fate, math.prod(info.shape)))
    return account(sum(elements for _, elements in fates), fates)


def _shape(source: Source) -> tuple[int, ...]:
    if len(source.tensors) == 1:
        return source.tensors[0].shape
    a, b = source.tensors[:2]
    return (a.shape[1], b.shape[0]) if "transposed" in dict(source.numbers) else (b.shape[0], a.shape[1])


def _pieces(source: Source, start: int, stop: int) -> tuple[Read, ...]:
    """Return what elements [start, stop) need of each tensor."""
    if start == stop:
        return ()
    if len(source.tensors) == 1:
        return (_part(source.tensors[0], start, stop)._replace(shared=False),)
    columns = _shape(source)[1]
    rows = (start // columns, -(-stop // columns))
    whole = tuple(_part(ref, 0, math.prod(ref.shape)) for ref in source.tensors[:2])
    if "transposed" in dict(source.numbers):
        return whole
    rank = source.tensors[0].shape[0]
    return whole[0], *(
        _part(ref, rows[0] * width, rows[1] * width) for ref, width in zip(source.tensors[1:], (rank, 1), strict=False)
    )


def _part(ref: TensorRef, start: int, stop: int) -> Read:
    """Return the read of elements [start, stop) of a tensor; what is whole is the same for every slice."""
    width = DTYPE_BITS[ref.dtype] // 8
    whole = (start, stop) == (0, math.prod(ref.shape))
    return Read(ref.object, ref.start + start * width, ref.start + stop * width, shared=whole)


def _joined(pieces: Sequence[Read]) -> tuple[Read, ...]:
    """Return the pieces in the order of the file, neighbours that are shared alike as one."""
    joined: list[Read] = []
    for piece in sorted(pieces):
        last = joined[-1] if joined else None
        if last and (last.object, last.stop, last.shared) == (piece.object, piece.start, piece.shared):
            joined[-1] = last._replace(stop=piece.stop)
        else:
            joined.append(piece)
    return tuple(joined)


class _Refused:
    """Why an adapter is refused: for each code of `REASONS` the modules or values concerned."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, code: str, item: str = "", name: str = "") -> None:
        """Note an item; name: of the parameter that `exclude` would leave out."""
        self._found.setdefault(code, []).append(item)
        self._names.setdefault(code, []).append(name)

    def __contains__(self, code: object) -> bool:
        return code in self._found

    def problems(self, where: str, others: Collection[str] = ()) -> tuple[Problem, ...]:
        """Return one problem a code, with the first few of its items; others: parameters that are not left out."""
        return tuple(
            Problem(
                where,
                what + (f": {_listed(self._found[code])}" if any(self._found[code]) else ""),
                remedy.replace("{exclusion}", exclusion(self._names[code], others, _LEFT_OUT)),
                code,
            )
            for code, (what, remedy) in REASONS.items()
            if code in self._found
        )


class _Settings(NamedTuple):
    """What the config says of the scale, and of how modules are stored."""

    r: int | None
    """None where the config does not say it in a way that can be used."""
    alpha: float
    ranks: Mapping[str, int]
    """By path, of modules that have one of their own; so are the alphas."""
    alphas: Mapping[str, float]
    rslora: bool
    transposed: bool
    dora: bool
    base_name: str
    task_type: str

    def scale(self, path: str, rank: int) -> float:
        """Return what multiplies B @ A of a module."""
        alpha = self.alphas.get(path, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


class _Adapter:
    """The sources of one adapter, module by module."""

    def __init__(
        self,
        settings: _Settings,
        modules: Mapping[str, Parts],
        saved: Mapping[str, tuple[str, TensorRef]],
        base: Mapping[str, Parameter] | None,
        rules: Rules,
        refused: _Refused,
    ) -> None:
        self.sources: dict[str, Source] = {}
        self.kinds: dict[str, Kind] = {}
        self._settings, self._base, self._rules, self._refused = settings, base, rules, refused
        self.untied: dict[str, str] = {}
        self._tied = {tie.alias: tie.kept for tie in rules.tied if base is not None and base[tie.kept].merged}
        if base is not None:
            self._base = base = {
                **base,
                **{alias: base[kept]._replace(name=alias) for alias, kept in self._tied.items()},
            }
        self._names: dict[str, str] = {}
        """The base's, by the adapter's."""
        self._parts: dict[str, list[tuple[str, naming.Piece]]] = {}
        """Parameters of the base that are parts of one of the adapter's, by its name."""
        self._fused: set[str] = set()
        """The adapter's names of what the base stores as a part of something."""
        if base is not None:
            self._match({**_shapes(modules), **{name: ref.shape for name, ref in saved.values()}}, base)
        self.called: dict[str, str] = {}
        self._layouts = self._told_by_shape(modules)
        self._modules: list[str] = []
        self._ranks: set[int] = set()
        self._variants: set[str] = {"rslora"} if settings.rslora else set()
        self.copies: list[str] = []
        self.excluded: list[str] = []

    def _match(self, shapes: Mapping[str, naming.Shape], base: Mapping[str, Parameter]) -> None:
        theirs = frozenset((name, one.shape) for name, one in base.items())
        match = _matched(frozenset(shapes.items()), theirs, self._rules.kinds)
        self._names |= match.left
        for problem in match.problems:
            self._refused.add("fused", problem)
        for name, (piece, *others) in match.pieces.items():
            if others:
                self._fused |= {piece.name, *(one.name for one in others)}
            elif math.prod(piece.shape) == math.prod(shapes[piece.name]):
                self._names[piece.name] = name
            else:
                self._parts.setdefault(piece.name, []).append((name, piece))

    def _rename(self, name: str) -> str:
        return self._names.get(name, name)

    def add_module(self, path: str, parts: Parts) -> None:
        """Add the changes of a module's weight, and of its bias."""
        names = [f"{path}.weight", f"{path}.bias"] if "bias" in parts else [f"{path}.weight"]
        if all(self._rules.excludes(self._rename(name)) for name in names):
            self.excluded.append(path)
            return
        a, b = parts.get("A", parts.get("embedding_A")), parts.get("B", parts.get("embedding_B"))
        if parts.keys() & {"A", "B"} and parts.keys() & {"embedding_A", "embedding_B"}:
            self._refused.add("duplicate", path)
        elif a is None or b is None:
            self._refused.add("orphan", f"{path} ({', '.join(parts)})")
        elif all([self._usable(path, parts[role], role) for role in parts]) and self._same_rank(path, a, b):
            scale = self._settings.scale(path, a.shape[0])
            self._add_weight(path, parts, a, b, scale)
            if "bias" in parts:
                self._variants.add("lora_bias")
                self._add(f"{path}.bias", parts["bias"].shape, Source((parts["bias"],), (("scale", scale),), "factors"))
            self._modules.append(path)
            self._ranks.add(a.shape[0])

    def add_saved(self, key: str, name: str, ref: TensorRef) -> None:
        """Add a whole tensor that was saved beside the factors."""
        name = self._rename(name)
        if self._rules.excludes(name):
            self.excluded.append(key)
            return
        known = name.endswith((".weight", ".bias")) if self._base is None else name in self._base
        if not known:
            of_tuner = bool(_TUNER.search(key))
            self._refused.add("unknown_tensor" if of_tuner else "head", key, "" if of_tuner else name)
        elif 0 in ref.shape:
            self._refused.add("empty", key)
        elif ref.dtype not in MERGEABLE:
            self._refused.add("dtype", f"{key} ({ref.dtype})")
        elif key.endswith(".base_layer.weight") and name in self.sources and ref.shape == _shape(self.sources[name]):
            self.copies.append(key)
        elif self._resized(name, ref):
            shapes = f"{list(ref.shape)} where the base has {list(self._base[name].shape)}" if self._base else ""
            self._refused.add("resized", f"{key} {shapes}", name)
        elif not self._rules.saved_modules:
            self._refused.add("saved_modules", key, name)
        else:
            self._variants.add("saved_modules")
            self._add(name, ref.shape, Source((ref,)))

    def _resized(self, name: str, ref: TensorRef) -> bool:
        """Return whether a saved table differs from the base's in its rows alone."""
        shape = self._base[name].shape if self._base else ref.shape
        return len(shape) == len(ref.shape) == 2 and shape[1:] == ref.shape[1:] and shape != ref.shape

    def notes(self) -> list[str]:
        """Return what was left aside."""
        notes = [
            f"changes {kept} and {alias}, which the base ties, apart from each other: the result does not tie them"
            for alias, kept in self.untied.items()
        ]
        if self.copies:
            notes.append(
                f"left aside, copies of base layers that PEFT saves beside their factors: {_listed(self.copies)}"
            )
        if self.excluded:
            notes.append(f"left out with all that was trained in them, as `exclude` says: {_listed(self.excluded)}")
        return notes

    def facts(self) -> dict[str, str]:
        """Return what a report tells of the adapter."""
        scales = {number for source in self.sources.values() for name, number in source.numbers if name == "scale"}
        facts = {
            "base_name": self._settings.base_name,
            "task_type": self._settings.task_type,
            "rank": _range(self._ranks),
            "scale": _range(scales),
            "modules": str(len(self._modules)),
            "targets": ", ".join(sorted({path.rpartition(".")[2] for path in self._modules})),
            "variants": ", ".join(sorted(self._variants)),
        }
        return {name: printable(fact)[:_LONGEST] for name, fact in facts.items()}

    def _usable(self, path: str, ref: TensorRef, role: str) -> bool:
        """Return whether a factor has a shape and dtype that a factor can have."""
        dimensions = 1 if role in ("bias", "magnitude_vector") else 2
        code = (
            "empty" if 0 in ref.shape or len(ref.shape) < dimensions
            else "conv" if len(ref.shape) > dimensions == 2
            else "shape_mismatch" if len(ref.shape) > dimensions
            else "dtype" if ref.dtype not in FACTOR_DTYPES
            else None
        )  # fmt: skip
        if code:
            self._refused.add(code, f"{path} {role} ({ref.dtype} {list(ref.shape)})")
        return code is None

    def _same_rank(self, path: str, a: TensorRef, b: TensorRef) -> bool:
        """Return whether both factors have the rank that the config resolves to."""
        rank = self._settings.r and self._settings.ranks.get(path, self._settings.r)
        same = a.shape[0] == b.shape[1] and rank in (None, a.shape[0])
        if not same:
            said = "" if rank is None else f", r {rank}"
            self._refused.add("rank_mismatch", f"{path} (A {list(a.shape)}, B {list(b.shape)}{said})")
        return same

    def _add_weight(self, path: str, parts: Parts, a: TensorRef, b: TensorRef, scale: float) -> None:
        name = self._rename(f"{path}.weight")
        if name in self._fused:
            self._refused.add("fused", path)
            return
        if name in self._parts:
            self._add_parts(name, parts, a, b, scale)
            return
        kind: Kind | None = "embedding" if "embedding_A" in parts else self._layout(path, a, b)
        if kind is None:
            self._refused.add("ambiguous_layout", path)
            return
        shape = (b.shape[0], a.shape[1]) if kind == "linear" else (a.shape[1], b.shape[0])
        numbers = (("scale", scale),) if kind == "linear" else (("scale", scale), ("transposed", 1.0))
        magnitude = parts.get("magnitude_vector")
        if (magnitude is not None) != self._settings.dora:
            self._refused.add("dora_mismatch", path)
        elif magnitude is not None and kind != "linear":
            self._refused.add("dora_transposed", path)
        elif magnitude is not None and magnitude.shape != shape[:1]:
            self._refused.add("shape_mismatch", f"{path} magnitude {list(magnitude.shape)} of {shape[0]} rows")
        else:
            self._variants |= {"dora"} if magnitude is not None else set()
            source = Source((a, b) if magnitude is None else (a, b, magnitude), numbers, "factors")
            self._add(f"{path}.weight", shape, source)
            if kind != "linear" and name in self.sources:
                self.kinds[name] = kind

    def _add_parts(self, told: str, parts: Parts, a: TensorRef, b: TensorRef, scale: float) -> None:
        """Add the rows of a module's change by the parameters in which the base stores it."""
        for name, piece in self._parts[told]:
            first, last = piece.start // a.shape[1], (piece.start + math.prod(piece.shape)) // a.shape[1]
            rows = piece.shape[1:] == a.shape[1:] and piece.start % a.shape[1] == 0
            if not rows or "magnitude_vector" in parts or "A" not in parts:
                self._refused.add("fused", told)
                return
            start = b.start + first * b.shape[1] * DTYPE_BITS[b.dtype] // 8
            part = b._replace(start=start, shape=(last - first, b.shape[1]))
            self._add(name, piece.shape, Source((a, part), (("scale", scale),), "factors"))

    def _add(self, name: str, shape: tuple[int, ...], source: Source) -> None:
        """Add a source if the base has such a parameter and the recipe does not exclude it."""
        told, name = name, self._rename(name)
        parameter = None if self._base is None else self._base.get(name)
        if self._rules.excludes(name):
            return
        if self._base is not None and parameter is None:
            if "fused" not in self._refused:  # or it is one of those
                self._refused.add("unknown_module", name)
        elif parameter and not parameter.merged:
            self._refused.add("not_floating", f"{name} ({parameter.dtype})")
        elif parameter and parameter.shape != shape:
            what = f"{name} {list(shape)} where the base has {list(parameter.shape)}"
            self._refused.add("shape_mismatch", what)
        elif name in self.sources:
            self._refused.add("duplicate", name)
        else:
            self.sources[name] = source
            if told != name:
                self.called[name] = told
            self._untie(name)

    def _untie(self, name: str) -> None:
        """Let a parameter that shares its tensor with another have a change of its own, as PEFT applies it."""
        kept = self._tied.get(name, name)
        group = [alias for alias, other in self._tied.items() if other == kept]
        if len(group) == 1:
            self.untied |= {alias: kept for alias in group}
        elif group:
            self._refused.add("tied", name, name)

    def _layout(self, path: str, a: TensorRef, b: TensorRef) -> Kind | None:
        """Return how a module is stored: as shapes tell; where it is square, as its namesakes are, or the config says.

        PEFT's fan_in_fan_out is one flag, which the last module of a model with both kinds decides.
        """
        told = self._told(path, a, b)
        config: Kind = "transposed" if self._settings.transposed else "linear"
        if told or a.shape[1] != b.shape[0]:
            return told or config
        namesakes = self._layouts.get(path.rpartition(".")[2], set())
        seen = namesakes or set().union(*self._layouts.values()) | {config}
        return next(iter(seen)) if len(seen) == 1 else None

    def _told_by_shape(self, modules: Mapping[str, Parts]) -> dict[str, set[Kind]]:
        """Return the layouts of modules that are not square, by the last word of their path."""
        layouts: dict[str, set[Kind]] = {}
        for path, parts in modules.items():
            excluded = self._rules.excludes(self._rename(f"{path}.weight"))
            told = self._told(path, parts["A"], parts["B"]) if parts.keys() >= {"A", "B"} and not excluded else None
            if told:
                layouts.setdefault(path.rpartition(".")[2], set()).add(told)
        return layouts

    def _told(self, path: str, a: TensorRef, b: TensorRef) -> Kind | None:
        """Return the layout where only one fits the base's shape."""
        parameter = (self._base or {}).get(self._rename(f"{path}.weight"))
        if parameter is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] == b.shape[0]:
            return None
        layouts: dict[tuple[int, ...], Kind] = {
            (b.shape[0], a.shape[1]): "linear", (a.shape[1], b.shape[0]): "transposed"
        }  # fmt: skip
        return layouts.get(parameter.shape)


@functools.lru_cache(16)  # the adapters of a pool have the same modules
def _matched(
    names: frozenset[tuple[str, naming.Shape]], base: frozenset[tuple[str, naming.Shape]], kinds: tuple[str, ...]
) -> naming.Match:
    return naming.matched(dict(sorted(names)), dict(sorted(base)), kinds)


def _shapes(modules: Mapping[str, Parts]) -> dict[str, naming.Shape]:
    """Return the shape of each changed parameter, as far as factors tell it; (0,) stands for any."""
    shapes: dict[str, naming.Shape] = {}
    for path, parts in modules.items():
        a, b = parts.get("A"), parts.get("B")
        rows, columns = (b, a) if "A" in parts else (parts.get("embedding_A"), parts.get("embedding_B"))
        if rows and columns and len(rows.shape) == len(columns.shape) == 2:
            of_rows, of_columns = (0, 1) if "A" in parts else (1, 0)
            shapes[f"{path}.weight"] = (rows.shape[of_rows], columns.shape[of_columns])
        else:
            shapes[f"{path}.weight"] = (0,)
        if "bias" in parts:
            shapes[f"{path}.bias"] = parts["bias"].shape
    return shapes


def _stored(
    tensors: Mapping[str, TensorInfo], refused: _Refused
) -> tuple[dict[str, Parts], dict[str, tuple[str, TensorRef]]]:
    """Return the factors by module, and by key what else there is with its name in the model."""
    modules: dict[str, Parts] = {}
    saved: dict[str, tuple[str, TensorRef]] = {}
    adapters: dict[str, None] = {}
    for key, info in tensors.items():
        ref = TensorRef(0, info.start, info.dtype, info.shape)
        name = _PREFIXES.sub("", key, count=1)
        match = _FACTOR.fullmatch(name)
        if ".trainable_tokens_" in name:
            refused.add("trainable_tokens", key)
        elif _TRAINING_ONLY.fullmatch(name):
            continue
        elif match is None:
            saved[key] = (_SAVED.sub("", name), ref)
        elif match["linear"] == "A" and match["what"] == "bias":
            refused.add("unknown_tensor", key)
        else:
            role = "bias" if match["what"] == "bias" else match["linear"] or match["embedding"] or match["magnitude"]
            adapters[match["name1"] or match["name2"] or ""] = None
            parts = modules.setdefault(match["path"], {})
            if role in parts and len(adapters) == 1:
                refused.add("duplicate", key)
            parts[role] = ref
    for name in adapters if len(adapters) > 1 else ():
        refused.add("several_adapters", name or "one without a name")
    return modules, saved


def _config(folder: Folder, refused: _Refused) -> Mapping[str, Any]:
    """Return the config; empty, and refused, where there is none or it is of another kind of adapter."""
    if CONFIG not in folder.texts:
        refused.add("config_missing")
        return {}
    try:
        config = bounded.loads(folder.texts[CONFIG])
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        refused.add("config_json")
        return {}
    kind = config.get("peft_type")
    if kind != "LORA":
        refused.add("prompt" if isinstance(kind, str) and kind in _WITHOUT_CHANGE else "peft_type", _shown(kind))
        return config  # its other keys mean something else
    for key in ("layer_replication", "target_parameters"):
        if config.get(key):
            refused.add(key)
    if config.get("trainable_token_indices"):
        refused.add("trainable_tokens")
    initialised = "kasa" if config.get("kasa_config") else config.get("init_lora_weights", True)
    code = _of_initialisation(initialised)
    if code:
        refused.add(code, _shown(initialised))
    for key, value in config.items():
        unheard = (key.startswith("use_") or key.endswith("_config")) and key not in _HARMLESS
        if value and (unheard or key in _VARIANTS):
            refused.add(_VARIANTS.get(key, "variant"), key)
    return config


def _of_initialisation(value: object) -> str | None:
    """Return the reason to refuse an initialisation, by what it does to the base; None where that stays as it was."""
    name = str(value).lower() if isinstance(value, bool | str) else ""
    if value is None or name in _UNCHANGED_BASE:
        return None
    if name.startswith(_REPEATED) or name == "kasa":
        return "mutated_base"
    return "residual_base" if name in _FROM_DATA else "unknown_initialisation"


def _settings(config: Mapping[str, Any], modules: Collection[str], refused: _Refused) -> _Settings:
    """Return what a config says; a value that can't be used is refused, and the default stands for it."""

    def value(key: str, default: Any, usable: Callable[[Any], bool]) -> Any:
        given = config.get(key, default)
        if usable(given):
            return given
        refused.add("config_value", f"{key}: {_shown(given)}")
        return default

    def pattern(key: str, usable: Callable[[Any], bool]) -> Any:
        given = value(key, None, lambda it: it is None or (isinstance(it, dict) and all(map(usable, it.values()))))
        try:
            return resolve(given or {}, modules)
        except UnfitKey as error:
            refused.add("pattern", _shown(str(error)))
            return {}

    def flag(key: str) -> bool:
        return bool(value(key, False, lambda it: it is None or isinstance(it, bool)))

    def text(key: str) -> str:
        return str(value(key, None, lambda it: it is None or isinstance(it, str)) or "")

    r = value("r", 8, _is_rank)  # 8 and 8 are PEFT's own defaults
    alpha = value("lora_alpha", 8, _is_alpha)
    ranks, alphas = pattern("rank_pattern", _is_rank), pattern("alpha_pattern", _is_alpha)
    said = bool(config) and "pattern" not in refused and "config_value" not in refused
    return _Settings(
        r=r if said else None,
        alpha=float(alpha),
        ranks=ranks,
        alphas=alphas,
        rslora=flag("use_rslora"),
        transposed=flag("fan_in_fan_out"),
        dora=flag("use_dora"),
        base_name=text("base_model_name_or_path"),
        task_type=text("task_type"),
    )


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < _LARGEST


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # type: ignore[arg-type]  # nan compares false


def _range(values: Iterable[float]) -> str:
    """Return `8..64`, or `16` where all are one, or nothing."""
    ordered = [f"{value:g}" for value in sorted(values)]
    return "..".join(dict.fromkeys(ordered[:1] + ordered[-1:]))


def _shown(value: object) -> str:
    """Return a short text of anything that JSON may hold."""
    return reprlib.repr(value)


def _listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    every = [printable(name) for name in names]
    return ", ".join(every[:4]) + (f" and {len(every) - 4} more" if len(every) > 4 else "")
