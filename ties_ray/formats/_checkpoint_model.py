"""A whole model checked against its base: what is merged, what is left aside, and what is wrong."""

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ties_ray.errors import enumerated
from ties_ray.formats import Rules
from ties_ray.formats._checkpoint_names import ModelNames, setting
from ties_ray.libraries import quantised
from ties_ray.safetensors import COPYABLE, DTYPE_BITS, MERGEABLE
from ties_ray.tensors import COPIES, Parameter, TensorRef, either, exclusion

REFUSED = {
    "F8": "8-bit floats mean nothing without the scales stored elsewhere",
    "F6": "6-bit floats mean nothing without the scales stored elsewhere",
    "F4": "4-bit floats mean nothing without the scales stored elsewhere",
    "C64": "the methods are defined on real numbers",
}
"""Why a dtype is not merged, by the start of its name."""
EXCLUDED = "excluded by the recipe"
BEYOND = "rows beyond the base's"

Wrong = tuple[str, str]
"""(what is wrong, remedy)."""


class Checked(NamedTuple):
    """What holds for a whole checkpoint."""

    tensors: dict[str, tuple[TensorRef, ...]]
    """The tensors whose elements, one after the other, are a base parameter's, by its name."""
    problems: list[Wrong]
    notes: list[str]
    fates: Iterable[tuple[str, int]]
    """The fates of the stored elements, as `account` takes them."""
    extra_rows: tuple[str, ...] = ()
    untied: Mapping[str, str] = {}
    excluded: tuple[str, ...] = ()


def check_model(
    stored: Mapping[str, TensorRef],
    config: Mapping[str, Any],
    base: Mapping[str, Parameter],
    rules: Rules,
    same: Collection[tuple[str, str]],
) -> Checked:
    """Return what a model has for each merged parameter of the base, with every problem.

    same: pairs of tensors with the same bytes, as the formats' questions name them.
    """
    return _ModelCheck(stored, config, base, rules, same).check()


class _ModelCheck:
    """One model beside its base; `check` goes through all that they must agree on."""

    def __init__(
        self,
        stored: Mapping[str, TensorRef],
        config: Mapping[str, Any],
        base: Mapping[str, Parameter],
        rules: Rules,
        same: Collection[tuple[str, str]],
    ) -> None:
        self._stored, self._config, self._rules = stored, config, rules
        self._names = names = ModelNames(stored, config, base)
        self._notes = names.notes
        self._problems: list[Wrong] = []
        self._tables = names.tables(base, rules, same)
        self._fates: dict[str, str] = {}
        """The fates of tensors that have no place in the base, by stored name."""
        self._untied = self._untie(base, {alias for alias, kept in names.pairs() if (alias, kept) in same})
        base = {**base, **{name: base[kept]._replace(name=name) for name, kept in self._untied.items()}}
        self._merged = {name: parameter for name, parameter in base.items() if parameter.merged}
        self._kept = {name: names.tensors[name] for name in self._merged if name in names.tensors}
        self._refs = {name: ref for name, refs in self._kept.items() for ref in refs}
        self._others = {*base, *(name for name, _ in names.left.values())}
        """All names that a pattern of `exclude` could match."""

    def check(self) -> Checked:
        """Return what the model has for its base."""
        self._check_layout()
        excluded, extra = self._set_aside()
        self._check_tables()
        self._check_dtypes(extra)
        self._check_presence({name: ref for name, ref in extra.items() if ref.dtype in MERGEABLE})
        self._check_numbers()
        longer, shorter = self._check_shapes()
        fates = () if self._problems else tuple(self._all_fates(longer))
        resized = (*longer, *shorter)
        return Checked(self._kept, self._problems, self._notes, fates, resized, self._untied, tuple(excluded))

    def _check_layout(self) -> None:
        for message in self._names.problems:
            self._problems.append((message, "save it in the layout of the base"))

    def _untie(self, base: Mapping[str, Parameter], equal: Collection[str]) -> dict[str, str]:
        """Return tensors that the model has of its own where the base ties them: the parameter, by the new name.

        equal: stored names of tensors that hold the same as the parameter to which they are tied.
        """
        names, untied = self._names, dict[str, str]()
        for name, kept in names.tied.items():
            alias, ref = names.left[name]
            if self._rules.excludes(name) or self._rules.excludes(alias):
                continue
            if alias in equal:
                self._notes.append(f"{alias} is tied to {kept}, and holds the same: merged once")
                self._fates[alias] = "tied"
            elif base[kept].merged:
                self._notes.append(f"{alias} differs from {kept}, to which the base ties it: a parameter of its own")
                untied[name], names.tensors[name] = kept, (ref,)
            else:
                continue
            del names.left[name]
        return untied

    def _set_aside(self) -> tuple[list[str], dict[str, TensorRef]]:
        """Return (the tensors that the recipe excludes, other tensors that the base lacks); note what is left aside."""
        left = self._names.left
        excludes = self._rules.excludes
        excluded = [alias for name, (alias, _) in left.items() if excludes(name) or excludes(alias)]
        aside = [name for name, ref in left.values() if ref.dtype in COPYABLE and name not in set(excluded)]
        for names, why in ((aside, "the base has no such tensors"), (excluded, "excluded, and not in the base")):
            if names:
                self._notes.append(f"left aside, {why}: {enumerated(names)}")
        self._fates |= dict.fromkeys(aside, "the base has no such tensor") | dict.fromkeys(excluded, EXCLUDED)
        settled = {*excluded, *aside}
        return excluded, {name: ref for name, ref in left.values() if name not in settled}

    def _check_tables(self) -> None:
        odd = [name for name, fate in self._tables.items() if not fate]
        if odd:
            message = f"has {len(odd)} tensors of integers or booleans that differ from the base's: {enumerated(odd)}"
            self._problems.append((message, f"they can't be merged; {exclusion(odd, self._others, COPIES)}"))
        counters = [name for name, fate in self._tables.items() if fate not in ("", "equal")]
        if counters:
            note = "counts the steps of its training, and the base's are kept"
            self._notes.append(f"{note}: {enumerated(counters)}")

    def _check_dtypes(self, extra: Mapping[str, TensorRef]) -> None:
        self._problems += refused_dtypes({**self._refs, **extra}, self._others)

    def _check_presence(self, extra: Mapping[str, TensorRef]) -> None:
        """Check that base and model have the same parameters."""
        missing = [name for name in self._merged if name not in self._names.tensors]
        self._problems += _one_sided(extra, missing, self._kept, self._merged, self._rules, self._others)
        if missing and self._kept and self._rules.missing:
            note = f"lacks {len(missing)} parameters, whose change is taken as zero"
            self._notes.append(f"{note}: {enumerated(missing)}")

    def _check_numbers(self) -> None:
        """Check that each parameter is stored as floating-point numbers of one dtype."""
        integers = [name for name, ref in self._refs.items() if ref.dtype in COPYABLE]
        if integers:
            dtypes = [(name, self._refs[name].dtype, self._merged[name].dtype) for name in integers]
            shown = enumerated([f"{name} ({dtype} where the base has {other})" for name, dtype, other in dtypes])
            message = f"holds integers where the base holds floating-point numbers: {shown}"
            self._problems.append((message, quantised.REMEDY))
        mixed = [name for name, refs in self._kept.items() if len({ref.dtype for ref in refs}) > 1]
        if mixed:
            message = f"stores the parts of one parameter in several dtypes: {enumerated(mixed)}"
            self._problems.append((message, "save it in one"))

    def _check_shapes(self) -> tuple[list[str], list[str]]:
        """Return the parameters with (more, fewer) vocabulary rows than the base's."""
        single = {name: refs[0] for name, refs in self._kept.items() if len(refs) == 1}
        by_token = [name for name in self._rules.by_token if name in single]
        free = [name for name in by_token if _has_the_bases_width(single[name], self._merged[name])]
        single = {name: ref for name, ref in single.items() if name not in free}
        longer, shorter, wrong = _compare_shapes(single, self._merged, self._config)
        if longer and not self._rules.extra_rows:
            message = f"has more embedding rows than the base: {self._shapes(longer)}"
            remedy = "`allow: {extra_rows: drop}` leaves them aside where the tokenizers agree on the common ids, and"
            remedy += " `vocabulary: union` keeps them"
            self._problems.append((message, remedy))
        elif longer:
            self._notes.append(f"rows beyond the base's are left aside: {self._shapes(longer)}")
        if shorter and not self._rules.missing:
            message = f"has fewer embedding rows than the base: {self._shapes(shorter)}"
            remedy = "`allow: {missing: zero}` takes the change of the other rows as zero where the tokenizers agree"
            self._problems.append((message, remedy))
        elif shorter:
            self._notes.append(f"rows that it lacks are the base's, their change is zero: {self._shapes(shorter)}")
        if wrong:
            remedy = f"is it a fine-tune of this base? {exclusion(wrong, self._others, COPIES)}"
            self._problems.append((f"has {len(wrong)} parameters of another shape: {self._shapes(wrong)}", remedy))
        return longer, shorter

    def _shapes(self, names: Sequence[str]) -> str:
        shapes = [(name, list(self._refs[name].shape), list(self._merged[name].shape)) for name in names]
        return enumerated([f"{name} {shape} where the base has {other}" for name, shape, other in shapes])

    def _all_fates(self, longer: Collection[str]) -> Iterator[tuple[str, int]]:
        """Yield (fate, elements) of all that is stored."""
        placed = (
            (
                ref,
                self._merged[name].numel if name in longer else math.prod(ref.shape),
                "merged" if name in self._merged else self._tables.get(name, EXCLUDED),
            )
            for name, refs in self._names.tensors.items()
            for ref in refs
        )
        return _fates(self._stored, placed, self._fates)


def _fates(
    stored: Mapping[str, TensorRef], placed: Iterable[tuple[TensorRef, int, str]], left: Mapping[str, str]
) -> Iterator[tuple[str, int]]:
    """Yield (fate, elements) of each stored tensor, or of its parts where only a part is used.

    placed: (place, elements, fate) of what the base has too; what is used twice counts once. left: the fates of
    tensors that have no place in the base.
    """
    places = sorted((ref.object, ref.start, name) for name, ref in stored.items() if 0 not in ref.shape)
    rest = {name: math.prod(ref.shape) for name, ref in stored.items()}
    counted: set[tuple[int, int]] = set()
    for ref, elements, fate in placed:
        if elements and (ref.object, ref.start) not in counted:
            counted.add((ref.object, ref.start))
            rest[places[bisect_right(places, ref[:2], key=lambda place: place[:2]) - 1][2]] -= elements
            yield fate, elements
    for name, elements in rest.items():
        if elements or name in left:
            yield left.get(name, BEYOND), elements


def _one_sided(
    extra: Mapping[str, TensorRef],
    missing: Sequence[str],
    kept: Collection[str],
    merged: Collection[str],
    rules: Rules,
    others: Collection[str],
) -> Iterator[Wrong]:
    """Yield (what, remedy) of floating-point tensors that only the model, or only the base, has."""
    only = enumerated(list(extra))
    if merged and not kept:
        message = f"has none of the base's {len(merged)} merged parameters, under these names or others that are known"
        yield f"{message}; it holds {only}", "is it a fine-tune of this base? `ties-ray inspect` shows what each holds"
        return
    if extra:
        message = f"holds {len(extra)} floating-point tensors that the base lacks{_what_they_are(extra)}: {only}"
        out = exclusion(extra, others, "leaves them out of the merge, with what was trained in them")
        yield message, f"is it a fine-tune of this base? {out}"
    if missing and not rules.missing:
        message = f"lacks {len(missing)} of the base's {len(merged)} merged parameters{_what_they_are(missing)}"
        keep = exclusion(missing, others, COPIES)
        yield (
            f"{message}: {enumerated(missing)}",
            f"is it a fine-tune of this base? `allow: {{missing: zero}}` takes their change as zero; {keep}",
        )


_KNOWN = {
    "buffers that the model's code computes": r"inv_freq$|\.attn\.(?:masked_)?bias$|position_ids$|attention\.bias$",
    "layers for multi-token prediction": r"(?:^|\.)(?:mtp|nextn|eh_proj|enorm|hnorm|shared_head)\b",
    "a head for one task": r"(?:^|\.)(?:classifier|score|qa_outputs|cls|pooler|lm_head|(?:v|reward|value)_head)\b",
    "factors of an adapter": r"\.lora_|\.(?:hada|lokr|oft)_",
}
"""Tensors that often only one of two checkpoints stores, by a pattern of their names."""


def _what_they_are(names: Collection[str]) -> str:
    kinds = [kind for kind, pattern in _KNOWN.items() if any(re.search(pattern, name) for name in names)]
    return f" (among them {' and '.join(kinds)})" if kinds else ""


def _compare_shapes(
    kept: Mapping[str, TensorRef], base: Mapping[str, Parameter], config: Mapping[str, Any]
) -> tuple[list[str], list[str], list[str]]:
    """Return (parameters that only have more vocabulary rows, only fewer of them, another shape altogether)."""
    differ = [name for name, ref in kept.items() if ref.shape != base[name].shape]
    rows = setting(config, "vocab_size", None)
    resized = [
        name
        for name in differ
        if kept[name].shape[:1] == (rows,) and base[name].shape and kept[name].shape[1:] == base[name].shape[1:]
    ]
    longer = [name for name in resized if kept[name].shape > base[name].shape]
    shorter = [name for name in resized if name not in longer]
    return longer, shorter, [name for name in differ if name not in resized]


def _has_the_bases_width(ref: TensorRef, parameter: Parameter) -> bool:
    """Return whether a tensor differs from the base's in the number of its rows at most."""
    return len(ref.shape) == len(parameter.shape) > 0 and ref.shape[1:] == parameter.shape[1:]


def refused_dtypes(tensors: Mapping[str, TensorRef], others: Collection[str]) -> Iterator[Wrong]:
    """Yield a problem for each dtype that can be neither merged nor copied."""
    for dtype in sorted({ref.dtype for ref in tensors.values()} - MERGEABLE - COPYABLE):
        reason = next(why for start, why in REFUSED.items() if dtype.startswith(start))
        names = [name for name, ref in tensors.items() if ref.dtype == dtype]
        copied = exclusion(names, others, COPIES) if DTYPE_BITS[dtype] % 8 == 0 else ""
        remedy = copied if dtype == "C64" else either(("give the unquantised model", copied))
        yield f"stores {len(names)} tensors as {dtype}, and {reason}: {enumerated(names)}", remedy
