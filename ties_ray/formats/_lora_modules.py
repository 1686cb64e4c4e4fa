"""The modules that a PEFT adapter changes, checked against its config and the base."""

import math
import re
from collections.abc import Iterable, Mapping

from ties_ray.errors import enumerated, printable
from ties_ray.formats import Rules
from ties_ray.formats._lora_config import Settings
from ties_ray.formats._lora_experts import Experts, experts_of, parameters_of, rows_of
from ties_ray.formats._lora_refusals import Refusals
from ties_ray.libraries.naming import Piece, Shape, matched
from ties_ray.safetensors import MERGEABLE, TensorInfo
from ties_ray.tensors import Kind, Parameter, Source, TensorRef

FACTOR_DTYPES = frozenset({"F32", "F16", "BF16"})
TRAINING_ONLY = re.compile(r".+\.lora_(?:velora|monteclora)_.+", re.DOTALL)
"""Keys of tensors that only training uses: the change is scale * B @ A without them."""
_PREFIXES = re.compile(r"\A(?:base_model\.model\.)*")
_FACTOR = re.compile(
    r"(?P<path>.+)\.lora_(?:"
    r"(?P<linear>A|B)(?:\.(?P<name1>[^.]+))?\.(?P<what>weight|bias)"
    r"|(?P<embedding>embedding_A|embedding_B)(?:\.(?P<name2>[^.]+))?"
    r"|(?P<magnitude>magnitude_vector)(?:\.[^.]+)?(?:\.weight)?)",
    re.DOTALL,
)
"""The key of a factor, with or without the adapter's name."""
_SAVED = re.compile(r"\.(?:modules_to_save\.[^.]+|base_layer)(?=\.[^.]+$)")
_TUNER = re.compile(r"\.(?:lora|hada|lokr|ia3|vera|oft|boft|hra|miss|c3a|shira|delora|adapter|router)_")
"""A part of keys that belong to a tuner and are no parameter of a model."""
FACT_CHARACTERS = 1000
"""The longest fact; the rest is cut off."""

Parts = dict[str, TensorRef]
"""The stored tensors of one module by role: A, B, bias, embedding_A, embedding_B, magnitude_vector."""


class Adapter:
    """The sources of one adapter, module by module."""

    def __init__(
        self,
        settings: Settings,
        modules: Mapping[str, Parts],
        saved: Mapping[str, tuple[str, TensorRef]],
        base: Mapping[str, Parameter] | None,
        rules: Rules,
        refused: Refusals,
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
        factors = factors_of(modules)
        self._parameters = parameters_of(factors, settings.target_parameters)
        self._experts = experts_of(factors, self._parameters, settings.ranks, settings.r or 1)
        self._names: dict[str, str] = {}
        """The base's name of a parameter, by the adapter's."""
        self._parts: dict[str, list[tuple[str, Piece]]] = {}
        """The base's parameters that are parts of one of the adapter's, by the adapter's name."""
        self._fused: set[str] = set()
        """The adapter's names of parameters that the base stores as a part of a larger one."""
        if base is not None:
            self._match({**_shapes(modules, self._experts), **{name: ref.shape for name, ref in saved.values()}}, base)
        self.called: dict[str, str] = {}
        self._layouts = self._layouts_by_shape(modules)
        self._paths = modules.keys()
        self._modules: list[str] = []
        self._ranks: set[int] = set()
        self._variants: set[str] = {"rslora"} if settings.rslora else set()
        self.copies: list[str] = []
        self.heads: dict[str, TensorRef] = {}
        self.excluded: list[str] = []

    def _match(self, shapes: Mapping[str, Shape], base: Mapping[str, Parameter]) -> None:
        theirs = {name: base[name].shape for name in sorted(base)}
        match = matched(dict(sorted(shapes.items())), theirs, self._rules.kinds)
        self._names |= match.left
        for problem in match.problems:
            self._refused.add("fused", problem)
        for name, (piece, *others) in match.pieces.items():
            if others:
                self._fused |= {piece.name, *(other.name for other in others)}
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
        if path in self._experts:
            self._add_experts(path, self._experts[path], parts)
        elif parts.keys() & {"A", "B"} and parts.keys() & {"embedding_A", "embedding_B"}:
            self._refused.add("duplicate", path)
        elif a is None or b is None:
            self._refused.add("orphan", f"{path} ({', '.join(parts)})")
        elif all([self._usable(path, parts[role], role) for role in parts]) and self._same_rank(path, a, b):
            scale = self._settings.scale(self._parameters.get(path, path), a.shape[0])
            self._add_weight(path, parts, a, b, scale)
            if "bias" in parts:
                self._variants.add("lora_bias")
                self._add(f"{path}.bias", parts["bias"].shape, Source((parts["bias"],), (("scale", scale),), "factors"))
            self._modules.append(path)
            self._ranks.add(a.shape[0])

    def add_saved(self, key: str, name: str, ref: TensorRef) -> None:
        """Add a whole tensor that was saved beside the factors."""
        called, name = name, self._rename(name)
        if self._rules.excludes(name):
            self.excluded.append(key)
            return
        exists = name.endswith((".weight", ".bias")) if self._base is None else name in self._base
        if not exists and (_TUNER.search(key) or self._is_in_module(called)):
            self._refused.add("unknown_tensor", key)
        elif not exists and not self._rules.heads:
            self._refused.add("head", key, name)
        elif 0 in ref.shape:
            self._refused.add("empty", key)
        elif ref.dtype not in MERGEABLE:
            self._refused.add("dtype", f"{key} ({ref.dtype})")
        elif key.endswith(".base_layer.weight") and name in self.sources and ref.shape == shape_of(self.sources[name]):
            self.copies.append(key)
        elif not exists or (self._base is None and self._rules.heads):
            self.heads[name] = ref
        elif self._resized(name, ref):
            shapes = f"{list(ref.shape)} where the base has {list(self._base[name].shape)}" if self._base else ""
            self._refused.add("resized", f"{key} {shapes}", name)
        elif not self._rules.saved_modules:
            self._refused.add("saved_modules", key, name)
        else:
            self._variants.add("saved_modules")
            self._add(name, ref.shape, Source((ref,)))

    def _is_in_module(self, name: str) -> bool:
        """Return whether a tensor that the base lacks belongs to a module with factors, whose change it may scale."""
        words = name.split(".")
        return any(".".join(words[:count]) in self._paths for count in range(1, len(words)))

    def _resized(self, name: str, ref: TensorRef) -> bool:
        """Return whether a saved table differs from the base's in its rows alone."""
        shape = self._base[name].shape if self._base else ref.shape
        return len(shape) == len(ref.shape) == 2 and shape[1:] == ref.shape[1:] and shape != ref.shape

    def notes(self) -> list[str]:
        """Return notes on tensors that are left aside, and on ties that the result drops."""
        notes = [
            f"changes {kept} and {alias}, which the base ties, apart from each other: the result does not tie them"
            for alias, kept in self.untied.items()
        ]
        if self.copies:
            notes.append(
                f"left aside, copies of base layers that PEFT saves beside their factors: {enumerated(self.copies)}"
            )
        if self.excluded:
            notes.append(f"left out with all that was trained in them, as `exclude` says: {enumerated(self.excluded)}")
        return notes

    def facts(self) -> dict[str, str]:
        """Return the facts that a report shows of the adapter."""
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
        if self.heads:
            facts["modules_to_save"] = ", ".join(self._settings.modules_to_save)
        return {name: printable(fact)[:FACT_CHARACTERS] for name, fact in facts.items()}

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
        rank = self._settings.r and self._settings.ranks.get(self._parameters.get(path, path), self._settings.r)
        same = a.shape[0] == b.shape[1] and rank in (None, a.shape[0])
        if not same:
            configured = "" if rank is None else f", r {rank}"
            self._refused.add("rank_mismatch", f"{path} (A {list(a.shape)}, B {list(b.shape)}{configured})")
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

    def _add_experts(self, path: str, experts: Experts, parts: Parts) -> None:
        """Add the changes of all experts to the parameters in which the base stores them one by one."""
        scale = self._settings.scale(experts.name, experts.rank)
        pieces = self._parts.get(experts.name, [])
        sources = {name: experts.part(piece.start, piece.shape, scale) for name, piece in pieces}
        usable = all([self._usable(path, parts[role], role) for role in parts])
        if not pieces or parts.keys() != {"A", "B"} or None in sources.values():
            self._refused.add("target_parameters", experts.name)
        elif usable:
            for name, source in sources.items():
                if source:
                    self._add(name, shape_of(source), source)
            self._variants.add("experts")
            self._modules.append(path)
            self._ranks.add(experts.rank)

    def _add_parts(self, called: str, parts: Parts, a: TensorRef, b: TensorRef, scale: float) -> None:
        """Add the rows of a module's change to each parameter in which the base stores them."""
        for name, piece in self._parts[called]:
            first, last = piece.start // a.shape[1], (piece.start + math.prod(piece.shape)) // a.shape[1]
            rows = piece.shape[1:] == a.shape[1:] and piece.start % a.shape[1] == 0
            if not rows or "magnitude_vector" in parts or "A" not in parts:
                self._refused.add("fused", called)
                return
            self._add(name, piece.shape, Source((a, rows_of(b, first, last)), (("scale", scale),), "factors"))

    def _add(self, name: str, shape: tuple[int, ...], source: Source) -> None:
        """Add a source if the base has such a parameter and the recipe does not exclude it."""
        called, name = name, self._rename(name)
        parameter = None if self._base is None else self._base.get(name)
        if self._rules.excludes(name):
            return
        if self._base is not None and parameter is None:
            if "fused" not in self._refused:  # else it may be a fused parameter
                self._refused.add("unknown_module", name)
        elif parameter and not parameter.merged:
            self._refused.add("not_floating", f"{name} ({parameter.dtype})")
        elif parameter and parameter.shape != shape:
            message = f"{name} {list(shape)} where the base has {list(parameter.shape)}"
            self._refused.add("shape_mismatch", message)
        elif name in self.sources:
            self._refused.add("duplicate", name)
        else:
            self.sources[name] = source
            if called != name:
                self.called[name] = called
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
        """Return the layout of a module: by its shape, by that of modules of the same name, or by the config.

        The config alone can't decide: PEFT's fan_in_fan_out is one flag, even for a model with both layouts.
        """
        by_shape = self._layout_by_shape(path, a, b)
        config: Kind = "transposed" if self._settings.transposed else "linear"
        if by_shape or a.shape[1] != b.shape[0]:
            return by_shape or config
        namesakes = self._layouts.get(path.rpartition(".")[2], set())
        layouts = namesakes or set().union(*self._layouts.values()) | {config}
        return next(iter(layouts)) if len(layouts) == 1 else None

    def _layouts_by_shape(self, modules: Mapping[str, Parts]) -> dict[str, set[Kind]]:
        """Return the layouts of modules that are not square, by the last word of their path."""
        layouts: dict[str, set[Kind]] = {}
        for path, parts in modules.items():
            excluded = self._rules.excludes(self._rename(f"{path}.weight"))
            if parts.keys() >= {"A", "B"} and not excluded:
                layout = self._layout_by_shape(path, parts["A"], parts["B"])
                if layout:
                    layouts.setdefault(path.rpartition(".")[2], set()).add(layout)
        return layouts

    def _layout_by_shape(self, path: str, a: TensorRef, b: TensorRef) -> Kind | None:
        """Return the layout where only one layout fits the base's shape."""
        parameter = (self._base or {}).get(self._rename(f"{path}.weight"))
        if parameter is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] == b.shape[0]:
            return None
        layouts: dict[tuple[int, ...], Kind] = {
            (b.shape[0], a.shape[1]): "linear", (a.shape[1], b.shape[0]): "transposed"
        }  # fmt: skip
        return layouts.get(parameter.shape)


def factors_of(modules: Mapping[str, Parts]) -> dict[str, tuple[TensorRef, TensorRef]]:
    """Return A and B of the modules that have both as matrices, by path."""
    both = {path: (parts["A"], parts["B"]) for path, parts in modules.items() if parts.keys() >= {"A", "B"}}
    return {path: pair for path, pair in both.items() if all(len(ref.shape) == 2 for ref in pair)}


def _shapes(modules: Mapping[str, Parts], experts: Mapping[str, Experts]) -> dict[str, Shape]:
    """Return the shape of each changed parameter as its factors give it, or (0,) where they give none."""
    shapes: dict[str, Shape] = {each.name: each.shape for each in experts.values()}
    for path, parts in modules.items():
        if path in experts:
            continue
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


def stored_modules(
    tensors: Mapping[str, TensorInfo], refused: Refusals
) -> tuple[dict[str, Parts], dict[str, tuple[str, TensorRef]]]:
    """Return (the factors by module, all other tensors by key with their names in the model)."""
    modules: dict[str, Parts] = {}
    saved: dict[str, tuple[str, TensorRef]] = {}
    adapters: dict[str, None] = {}
    for key, info in tensors.items():
        ref = TensorRef(0, info.start, info.dtype, info.shape)
        name = _PREFIXES.sub("", key, count=1)
        match = _FACTOR.fullmatch(name)
        if ".trainable_tokens_" in name:
            refused.add("trainable_tokens", key)
        elif TRAINING_ONLY.fullmatch(name):
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


def _range(values: Iterable[float]) -> str:
    """Return `8..64`, or `16` where all values are equal, or nothing."""
    ordered = [f"{value:g}" for value in sorted(values)]
    return "..".join(dict.fromkeys(ordered[:1] + ordered[-1:]))


def shape_of(source: Source) -> tuple[int, ...]:
    """Return the shape of the parameter that a source changes."""
    if len(source.tensors) == 1:
        return source.tensors[0].shape
    a, b = source.tensors[:2]
    return (a.shape[1], b.shape[0]) if "transposed" in dict(source.numbers) else (b.shape[0], a.shape[1])
