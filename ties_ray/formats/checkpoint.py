"""A Hugging Face checkpoint: `model.safetensors`, or shards under an index, with names as in its `config.json`."""

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ties_ray import bounded
from ties_ray.account import account
from ties_ray.errors import Problem, printable
from ties_ray.excluding import COPIES, either, exclusion
from ties_ray.formats import Contents, Folder, Format, Question, Rules
from ties_ray.kernels import Encoded
from ties_ray.libraries import naming, quantised
from ties_ray.libraries.downloads import unfinished
from ties_ray.libraries.library import CONFIGS, library_of
from ties_ray.libraries.weight_files import ADAPTER, STEMS, Candidate, candidates, is_index, is_weights, listed, usual
from ties_ray.safetensors import COPYABLE, DTYPE_BITS, MERGEABLE
from ties_ray.stores import join
from ties_ray.tensors import Parameter, Read, Source, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
CHOOSE = "`file: {name}` beside its `path` chooses it"
"""What a recipe may do where a folder holds several models."""

REFUSED = {
    "F8": "8-bit floats mean nothing without the scales stored elsewhere",
    "F6": "6-bit floats mean nothing without the scales stored elsewhere",
    "F4": "4-bit floats mean nothing without the scales stored elsewhere",
    "C64": "the methods are defined on real numbers",
}
"""Why a dtype is not merged, by the start of its name."""
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Checkpoint(Format):
    """A model stored whole; its delta is its own value minus the base's."""

    name = "checkpoint"

    def recognises(self, names: Sequence[str]) -> bool:
        """Return whether there are safetensors files that are not an adapter's.

        A whole model stays one beside an `adapter_config.json` that somebody left there.
        """
        whole = [one for one in candidates(names) if one.stem != ADAPTER]
        adapter = "adapter_config.json" in names
        return f"{ADAPTER}.safetensors" not in names and any(one.stem in STEMS or not adapter for one in whole)

    def wanted(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the weights and texts of the model; all weights, where an index says which are the model's."""
        every = candidates(names)
        usually = usual(every)
        weights = usually.files if usually else ()
        if usually.index if usually else any(one.index for one in every):
            weights = tuple(name for name in names if is_weights(name))
        return weights, tuple(name for name in names if name in CONFIGS or is_index(name))

    def weight_files(self, folder: Folder) -> tuple[str, ...]:
        """Return the files that the index names, or the one file; none where that is unclear."""
        problems: list[Problem] = []
        names = _weight_files(folder, problems, [])
        return () if problems else tuple(names)

    def questions(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> tuple[Question, ...]:
        """Ask whether tensors that a config may tie are one value or two, and whether integers are the base's."""
        problems: list[Problem] = []
        config = _object(folder, CONFIG, problems)
        stored = _stored(folder, _weight_files(folder, problems, []), problems)
        if problems:
            return ()
        if base is None:
            return tuple(Question(alias, kept, "model") for alias, kept in _base_ties(stored, config))
        names = _Names(stored, config, base)
        return (
            *(Question(alias, kept, "model") for alias, kept in names.pairs()),
            *(Question(mine, name, "base") for name, mine in names.copied(base, rules).items()),
        )

    def read(self, folder: Folder, base: Mapping[str, Parameter] | None, rules: Rules) -> Contents:
        """Return every tensor of the base, or one source for each merged parameter that the model stores."""
        problems: list[Problem] = []
        notes: list[str] = []
        config = _object(folder, CONFIG, problems)
        names = _weight_files(folder, problems, notes)
        library = library_of([_name(pin.uri) for pin in folder.files], names, config)
        pins = {_name(pin.uri): pin for pin in folder.files}
        objects = tuple(pins[name] for name in names)
        stored = _stored(folder, names, problems)
        leftovers, wrong = _quantised(stored, config, list(pins), rules)
        problems += [Problem(folder.uri, what, remedy, "quantised") for what, remedy in wrong]
        if problems:
            return Contents(problems=tuple(problems))
        same = {(question.mine, question.other) for question, same in folder.answers.items() if same}
        if base is None:
            checked = _check_base(stored, config, rules, same)
        else:
            checked = _check_model(stored, config, base, rules, same)
        problems += [Problem(folder.uri, what, remedy) for what, remedy in checked.problems]
        if problems:
            return Contents(problems=tuple(problems))
        if leftovers:
            notes.append(f"{', '.join(leftovers)} in {CONFIG} is left over: no weight is quantised")
        return Contents(
            objects,
            {name: Source(refs) for name, refs in checked.tensors.items()},
            notes=tuple(f"{folder.uri}: {note}" for note in (*notes, *checked.notes)),
            extra_rows=checked.extra_rows,
            untied=checked.untied,
            excluded=checked.excluded,
            library=library,
            account=account(sum(math.prod(ref.shape) for ref in stored.values()), checked.fates),
            leftovers=leftovers,
        )

    def reads(self, source: Source, start: int, stop: int) -> tuple[Read, ...]:
        """Return the range of the elements in each tensor that has some of them; none where there are no elements."""
        found: list[Read] = []
        first = 0
        for tensor in source.tensors:
            width = DTYPE_BITS[tensor.dtype] // 8
            low, high = max(start - first, 0), min(stop - first, math.prod(tensor.shape))
            if low < high:
                found.append(Read(tensor.object, tensor.start + low * width, tensor.start + high * width))
            first += math.prod(tensor.shape)
        return tuple(found)

    def encoded(self, source: Source, start: int, stop: int, buffers: Sequence["Tensor"]) -> Encoded:
        """Return the model's values as stored, without a copy where they are one buffer that is aligned to them.

        Of rows that the model lacks there are none: the slice is then shorter.
        """
        import torch  # here, so that planning does not wait for it

        dtype: torch.dtype = getattr(torch, _TORCH_NAMES[source.tensors[0].dtype])
        if start == stop:
            return Encoded(torch.empty(0, dtype=dtype))
        if not buffers:
            return Encoded(torch.empty(0, dtype=dtype))  # of rows that the model lacks
        buffer = buffers[0] if len(buffers) == 1 else torch.cat(list(buffers))
        if buffer.storage_offset() % dtype.itemsize or buffer.data_ptr() % dtype.itemsize:
            buffer = buffer.clone()
        return Encoded(buffer.view(dtype))


class _Checked(NamedTuple):
    """What holds for a whole checkpoint: its tensors by base parameter, and (what, remedy) of each problem."""

    tensors: dict[str, tuple[TensorRef, ...]]
    """Whose elements, one after the other, are the parameter's."""
    problems: list[tuple[str, str]]
    notes: list[str]
    fates: Iterable[tuple[str, int]]
    """What becomes of the stored elements, as `account` takes it."""
    extra_rows: tuple[str, ...] = ()
    untied: Mapping[str, str] = {}
    excluded: tuple[str, ...] = ()


def _check_base(
    stored: Mapping[str, TensorRef], config: Mapping[str, Any], rules: Rules, same: Collection[tuple[str, str]]
) -> _Checked:
    tensors: dict[str, tuple[TensorRef, ...]] = {name: (ref,) for name, ref in stored.items()}
    notes: list[str] = []
    untied: dict[str, str] = {}
    for alias, kept in _base_ties(stored, config):
        if (alias, kept) in same:
            del tensors[alias]
            notes.append(f"{alias} is tied to {kept}: merged once, not written again")
        else:
            untied[alias] = kept
            notes.append(f"{alias} differs from {kept}, to which config.json ties it: a parameter of its own")
    problems = [] if tensors else [("holds no tensors", "")]
    problems += _refused({name: ref for name, ref in stored.items() if not _is_copied_whole(name, ref, rules)}, stored)
    fates = [
        ("tied" if name not in tensors else "merged" if _is_merged(name, ref, rules) else "equal", math.prod(ref.shape))
        for name, ref in stored.items()
    ]
    return _Checked(tensors, problems, notes, fates, untied=untied)


def _is_merged(name: str, ref: TensorRef, rules: Rules) -> bool:
    return ref.dtype in MERGEABLE and not rules.excludes(name)


def _is_copied_whole(name: str, ref: TensorRef, rules: Rules) -> bool:
    """Return whether a tensor of the base is copied whatever its dtype: excluded, and made of whole bytes."""
    return rules.excludes(name) and DTYPE_BITS[ref.dtype] % 8 == 0


def _quantised(
    stored: Mapping[str, TensorRef], config: Mapping[str, Any], files: Collection[str], rules: Rules
) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Return (keys of config.json that announce quantised weights where there are none, what is quantised and what to
    do)."""
    tensors = {name: (ref.dtype, ref.shape) for name, ref in stored.items()}
    excluded = {name for name in stored if rules.excludes(name)}
    told = quantised.announced(config, files)
    reason = f" ({told})" if told else ""
    wrong = [
        (
            f"{what}{reason}: {_listed(names)}",
            quantised.REMEDY if known else f"{quantised.REMEDY}; where these are no weights, {out}",
        )
        for what, names, known in quantised.refusals(tensors, excluded)
        for out in [exclusion(names, stored, COPIES)]
    ]
    return () if quantised.packed(tensors) else quantised.keys(config), wrong


def _base_ties(stored: Mapping[str, TensorRef], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (alias, name that is kept) of tensors that are stored twice if the config's ties hold."""
    if not _ties(config):
        return []
    ties = naming.ties_of(stored, naming.kinds_of(config))
    return [(tie.alias, tie.kept) for tie in ties if stored[tie.alias].shape == stored[tie.kept].shape]


class _Names:
    """A model's tensors under the base's names."""

    def __init__(
        self, stored: Mapping[str, TensorRef], config: Mapping[str, Any], base: Mapping[str, Parameter]
    ) -> None:
        kinds = naming.kinds_of(config)
        match = naming.matched(
            {name: ref.shape for name, ref in stored.items()}, {name: one.shape for name, one in base.items()}, kinds
        )
        self.problems = list(match.problems)
        self.notes: list[str] = []
        self.tensors = {name: tuple(_cut(stored[one.name], one) for one in many) for name, many in match.pieces.items()}
        self.left = {called: (name, stored[name]) for name, called in match.left.items()}
        """Tensors that the base lacks, with their stored names, by what it would call them."""
        self.tied: dict[str, str] = {}
        """Of those: the base parameter with which one may share its value."""
        self.whole = {name: many[0].name for name, many in match.pieces.items()}
        """The stored name of what a base parameter is; of several tensors, the first."""
        self.notes += _renamed(match, stored)
        if self.left or len(self.tensors) < len(base):
            self._tie(base, naming.ties_of([*base, *self.left], kinds), _ties(config, unsaid=True))

    def _tie(self, base: Mapping[str, Parameter], ties: Sequence[naming.Tie], tied: bool) -> None:
        """Settle names that may mean one value, where the base and the model do not store the same ones of them."""
        groups: dict[str, list[str]] = {}
        for alias, kept in ties:
            groups.setdefault(kept, [kept]).append(alias)
        for group in groups.values():
            known = [name for name in group if name in base]
            left = [name for name in group if name in self.left]
            if known and left and not self.tensors.keys() & known:
                stored, ref = self.left.pop(left[0])
                self.tensors[known[0]], self.whole[known[0]] = (ref,), stored
                self.notes.append(f"{stored} is {known[0]}, to which it is tied")
            here = next((name for name in known if name in self.tensors), None)
            if here:
                self.tied |= {name: here for name in left if name in self.left}
                for name in known if tied else ():
                    if name not in self.tensors and base[name].merged:
                        self.tensors[name] = self.tensors[here]
                        self.notes.append(f"{name} is not stored, and is tied to {here}: its value is that one's")

    def pairs(self) -> list[tuple[str, str]]:
        """Return stored names of tensors that may hold one value, where dtype and shape do not tell them apart."""
        return [
            (self.left[name][0], self.whole[kept])
            for name, kept in self.tied.items()
            if (self.left[name][1].dtype, self.left[name][1].shape)
            == (self.tensors[kept][0].dtype, self.tensors[kept][0].shape)
        ]

    def copied(self, base: Mapping[str, Parameter], rules: Rules) -> dict[str, str]:
        """Return the stored names of integers and booleans that may be the base's, by name in the base."""
        return {
            name: self.whole[name]
            for name, refs in self.tensors.items()
            if _is_table(base[name], rules) and [one[2:] for one in refs] == [(base[name].dtype, base[name].shape)]
        }


def _is_table(parameter: Parameter, rules: Rules) -> bool:
    """Return whether a base parameter holds integers or booleans that models must share."""
    return parameter.dtype in COPYABLE and not rules.excludes(parameter.name)


_COUNTER = re.compile(r"(?:.*\.)?(?:num_batches_tracked|num_updates|global_step|steps?|iterations?)", re.DOTALL)
"""Integers that count the steps of a training: a merge keeps the base's."""


def _tables(
    names: _Names, base: Mapping[str, Parameter], rules: Rules, same: Collection[tuple[str, str]]
) -> dict[str, str]:
    """Return what becomes of a model's integers and booleans that the base has too; empty: they can't be merged."""
    asked = names.copied(base, rules)

    def fate(name: str, refs: Sequence[TensorRef]) -> str:
        if (asked.get(name), name) in same:
            return "equal"
        single = sum(math.prod(ref.shape) for ref in refs) == 1
        return "a counter of the training" if single and _COUNTER.fullmatch(name) else ""

    return {name: fate(name, refs) for name, refs in names.tensors.items() if _is_table(base[name], rules)}


BEYOND = "rows beyond the base's"


def _fates(
    stored: Mapping[str, TensorRef], placed: Iterable[tuple[TensorRef, int, str]], left: Mapping[str, str]
) -> Iterator[tuple[str, int]]:
    """Yield what becomes of the elements of each stored tensor, of some of which only a part is used.

    placed: (where elements lie, how many, their fate); what is used twice counts once. left: the fates of tensors that
    have no place.
    """
    places = sorted((ref.object, ref.start, name) for name, ref in stored.items() if 0 not in ref.shape)
    rest = {name: math.prod(ref.shape) for name, ref in stored.items()}
    seen: set[tuple[int, int]] = set()
    for ref, elements, fate in placed:
        if elements and (ref.object, ref.start) not in seen:
            seen.add((ref.object, ref.start))
            rest[places[bisect_right(places, ref[:2], key=lambda place: place[:2]) - 1][2]] -= elements
            yield fate, elements
    for name, elements in rest.items():
        if elements or name in left:
            yield left.get(name, BEYOND), elements


def _renamed(match: naming.Match, stored: Mapping[str, TensorRef]) -> Iterator[str]:
    """Yield notes on parameters that the model stores otherwise than the base."""
    renamed, cut, joined = list[str](), list[str](), list[str]()
    for name, (first, *others) in match.pieces.items():
        if others:
            joined.append(f"{name} is {first.name} and {len(others)} more")
        elif first.shape != stored[first.name].shape:
            cut.append(f"{name} is a part of {first.name}")
        elif first.name != name:
            renamed.append(f"{name} is {first.name}")
    for names, what in (
        (renamed, "are stored under other names"),
        (cut, "are stored fused with others"),
        (joined, "are stored in several tensors"),
    ):
        if names:
            yield f"{len(names)} parameters {what}: {_listed(names)}"


def _cut(ref: TensorRef, piece: naming.Piece) -> TensorRef:
    """Return where a run of elements of a tensor lies."""
    return ref._replace(start=ref.start + piece.start * DTYPE_BITS[ref.dtype] // 8, shape=piece.shape)


def tied(names: Collection[str], config: Mapping[str, Any]) -> list[naming.Tie]:
    """Return the parameters of a model of this config that are not stored, because it ties them to stored ones."""
    return naming.unstored(names, config) if _ties(config) else []


def _ties(config: Mapping[str, Any], *, unsaid: bool | None = None) -> bool:
    """Return whether a config ties the embeddings; unsaid: the answer where it does not say, else its default."""
    text = config.get("text_config")
    kinds = [config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None]
    if any(map(naming.always_tied, kinds)):
        return True
    default = any(map(naming.tied_by_default, kinds)) if unsaid is None else unsaid
    return _setting(config, "tie_word_embeddings", default) is True


def _check_model(
    stored: Mapping[str, TensorRef],
    config: Mapping[str, Any],
    base: Mapping[str, Parameter],
    rules: Rules,
    same: Collection[tuple[str, str]],
) -> _Checked:
    names = _Names(stored, config, base)
    tensors, notes = names.tensors, names.notes
    problems = [(what, "save it in the layout of the base") for what in names.problems]
    tables = _tables(names, base, rules, same)
    left_fates: dict[str, str] = {}
    untied: dict[str, str] = {}
    equal = {alias for alias, kept in names.pairs() if (alias, kept) in same}
    for name, kept in names.tied.items():
        alias, ref = names.left[name]
        if rules.excludes(name) or rules.excludes(alias):
            continue
        if alias in equal:
            notes.append(f"{alias} is tied to {kept}, and holds the same: merged once")
            left_fates[alias] = "tied"
        elif base[kept].merged:
            notes.append(f"{alias} differs from {kept}, to which the base ties it: a parameter of its own")
            untied[name], tensors[name] = kept, (ref,)
        else:
            continue
        del names.left[name]
    base = {**base, **{name: base[kept]._replace(name=name) for name, kept in untied.items()}}
    merged = {name: parameter for name, parameter in base.items() if parameter.merged}
    kept_refs = {name: tensors[name] for name in merged if name in tensors}

    left = {stored_name: ref for stored_name, ref in names.left.values()}
    excluded = [alias for name, (alias, _) in names.left.items() if rules.excludes(name) or rules.excludes(alias)]
    known = set(excluded)
    aside = [name for name, ref in left.items() if ref.dtype in COPYABLE and name not in known]
    known |= set(aside)
    for some, why in ((aside, "the base has no such tensors"), (excluded, "excluded, and not in the base")):
        if some:
            notes.append(f"left aside, {why}: {_listed(some)}")
    left_fates |= dict.fromkeys(aside, "the base has no such tensor") | dict.fromkeys(excluded, _EXCLUDED)
    extra = {name: ref for name, ref in left.items() if name not in known}
    others = {*base, *left}
    problems += _odd_tables(tables, others)
    counters = [name for name, fate in tables.items() if fate not in ("", "equal")]
    if counters:
        notes.append(f"counts the steps of its training, and the base's are kept: {_listed(counters)}")
    refs = {name: ref for name, many in kept_refs.items() for ref in many}
    problems += _refused({**refs, **extra}, others)
    extra = {name: ref for name, ref in extra.items() if ref.dtype in MERGEABLE}
    missing = [name for name in merged if name not in tensors]
    problems += _one_sided(extra, missing, kept_refs, merged, rules, others)
    if missing and kept_refs and rules.missing:
        notes.append(f"lacks {len(missing)} parameters, whose change is taken as zero: {_listed(missing)}")
    whole = [name for name, ref in refs.items() if ref.dtype in COPYABLE]
    if whole:
        shown = _listed(f"{name} ({refs[name].dtype} where the base has {merged[name].dtype})" for name in whole)
        problems.append((f"holds integers where the base holds floating-point numbers: {shown}", quantised.REMEDY))
    mixed = [name for name, many in kept_refs.items() if len({ref.dtype for ref in many}) > 1]
    if mixed:
        problems.append((f"stores the parts of one parameter in several dtypes: {_listed(mixed)}", "save it in one"))
    single = {name: many[0] for name, many in kept_refs.items() if len(many) == 1}
    longer, shorter, wrong = _compare_shapes(single, merged, config)
    if longer and not rules.extra_rows:
        problems.append(
            (
                f"has more embedding rows than the base: {_shapes(longer, refs, merged)}",
                "`allow: {extra_rows: drop}` leaves them aside where the tokenizers agree on the common ids",
            )
        )
    elif longer:
        notes.append(f"rows beyond the base's are left aside: {_shapes(longer, refs, merged)}")
    if shorter and not rules.missing:
        problems.append(
            (
                f"has fewer embedding rows than the base: {_shapes(shorter, refs, merged)}",
                "`allow: {missing: zero}` takes the change of the other rows as zero where the tokenizers agree",
            )
        )
    elif shorter:
        notes.append(f"rows that it lacks are the base's, their change is zero: {_shapes(shorter, refs, merged)}")
    if wrong:
        remedy = f"is it a fine-tune of this base? {exclusion(wrong, others, COPIES)}"
        problems.append((f"has {len(wrong)} parameters of another shape: {_shapes(wrong, refs, merged)}", remedy))
    placed = (
        (ref, base[name].numel if name in longer else math.prod(ref.shape), _placed_fate(name, merged, tables))
        for name, many in tensors.items()
        for ref in many
    )
    fates = () if problems else tuple(_fates(stored, placed, left_fates))
    return _Checked(kept_refs, problems, notes, fates, (*longer, *shorter), untied, tuple(excluded))


_EXCLUDED = "excluded by the recipe"


def _placed_fate(name: str, merged: Collection[str], tables: Mapping[str, str]) -> str:
    return "merged" if name in merged else tables.get(name, _EXCLUDED)


def _odd_tables(tables: Mapping[str, str], others: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (what, remedy) of integers and booleans that are not the base's."""
    odd = [name for name, fate in tables.items() if not fate]
    if odd:
        what = f"has {len(odd)} tensors of integers or booleans that differ from the base's: {_listed(odd)}"
        yield what, f"they can't be merged; {exclusion(odd, others, COPIES)}"


def _one_sided(
    extra: Mapping[str, TensorRef],
    missing: Sequence[str],
    kept: Collection[str],
    merged: Collection[str],
    rules: Rules,
    others: Collection[str],
) -> Iterator[tuple[str, str]]:
    """Yield (what, remedy) of floating-point tensors that only the model, or only the base, has."""
    only = _listed(list(extra))
    if merged and not kept:
        what = f"has none of the base's {len(merged)} merged parameters, under these names or others that are known"
        yield f"{what}; it holds {only}", "is it a fine-tune of this base? `ties-ray inspect` shows what each holds"
        return
    if extra:
        what = f"holds {len(extra)} floating-point tensors that the base lacks{_what_they_are(extra)}: {only}"
        out = exclusion(extra, others, "leaves them out of the merge, with what was trained in them")
        yield what, f"is it a fine-tune of this base? {out}"
    if missing and not rules.missing:
        what = f"lacks {len(missing)} of the base's {len(merged)} merged parameters{_what_they_are(missing)}"
        keep = exclusion(missing, others, COPIES)
        yield (
            f"{what}: {_listed(missing)}",
            f"is it a fine-tune of this base? `allow: {{missing: zero}}` takes their change as zero; {keep}",
        )


_KNOWN = {
    "buffers that the model's code computes": r"inv_freq$|\.attn\.(?:masked_)?bias$|position_ids$|attention\.bias$",
    "layers for multi-token prediction": r"(?:^|\.)(?:mtp|nextn|eh_proj|enorm|hnorm|shared_head)\b",
    "a head for one task": r"(?:^|\.)(?:classifier|score|qa_outputs|cls|pooler|lm_head|(?:v|reward|value)_head)\b",
    "factors of an adapter": r"\.lora_|\.(?:hada|lokr|oft)_",
}
"""What tensors are that often only one of two checkpoints stores, by a pattern of their names."""


def _what_they_are(names: Collection[str]) -> str:
    kinds = [kind for kind, pattern in _KNOWN.items() if any(re.search(pattern, name) for name in names)]
    return f" (among them {' and '.join(kinds)})" if kinds else ""


def _compare_shapes(
    kept: Mapping[str, TensorRef], base: Mapping[str, Parameter], config: Mapping[str, Any]
) -> tuple[list[str], list[str], list[str]]:
    """Return (parameters that only have more vocabulary rows, only fewer of them, another shape altogether)."""
    differ = [name for name, ref in kept.items() if ref.shape != base[name].shape]
    rows = _setting(config, "vocab_size", None)
    resized = [
        name
        for name in differ
        if kept[name].shape[:1] == (rows,) and base[name].shape and kept[name].shape[1:] == base[name].shape[1:]
    ]
    longer = [name for name in resized if kept[name].shape > base[name].shape]
    shorter = [name for name in resized if name not in longer]
    return longer, shorter, [name for name in differ if name not in resized]


def _refused(tensors: Mapping[str, TensorRef], others: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield a problem for each dtype that can be neither merged nor copied."""
    for dtype in sorted({ref.dtype for ref in tensors.values()} - MERGEABLE - COPYABLE):
        reason = next(why for start, why in REFUSED.items() if dtype.startswith(start))
        names = [name for name, ref in tensors.items() if ref.dtype == dtype]
        copied = exclusion(names, others, COPIES) if DTYPE_BITS[dtype] % 8 == 0 else ""
        remedy = copied if dtype == "C64" else either(("give the unquantised model", copied))
        yield f"stores {len(names)} tensors as {dtype}, and {reason}: {_listed(names)}", remedy


def _setting(config: Mapping[str, Any], key: str, default: object) -> object:
    """Return a config's value, looked up in `text_config` too, where multimodal models keep it."""
    text = config.get("text_config")
    return config.get(key, text.get(key, default) if isinstance(text, dict) else default)


def _weight_files(folder: Folder, problems: list[Problem], notes: list[str]) -> list[str]:
    """Return the files that hold the weights, sorted; check the index, where there is one, against their headers."""
    names = [_name(pin.uri) for pin in folder.files]
    every = candidates(names)
    model = next((one for one in every if one.name == folder.chosen), None) or usual(every)
    weights = [name for name in names if is_weights(name)]
    if model is None:
        what = f"holds {len(every)} models: {listed(every)}"
        problems.append(Problem(folder.uri, what, CHOOSE.format(name=every[0].name), "candidates"))
        return []
    if model.index:
        used = _indexed_files(folder, model.index, weights, problems)
        single = f"{model.stem}.safetensors"
        if single in weights and single not in used and not folder.chosen and not problems:
            what = f"has both {single} and {model.index}, which does not name it"
            remedy = f"remove the one that is not the model, or choose: {CHOOSE.format(name=model.index)}"
            problems.append(Problem(folder.uri, what, remedy, "candidates"))
    else:
        used = list(model.files)
        _check_shards(folder, model, names, problems)
    aside = [name for name in weights if name not in used]
    if aside and not problems:
        notes.append(f"left aside, not part of the model: {_listed(aside)} ({CHOOSE.format(name=aside[0])})")
    left = [name for name in ("adapter_config.json", "adapter_model.bin") if name in names]
    if left:
        notes.append(f"is a whole model; left aside, as of an adapter: {', '.join(left)}")
    return used


def _check_shards(folder: Folder, model: Candidate, names: Collection[str], problems: list[Problem]) -> None:
    """Add a problem where shards have lost their index, or the index its shards."""
    if model.missing:
        what = f"lacks {len(model.missing)} of {model.count} shards: {_listed(model.missing)}"
        problems.append(Problem(folder.uri, what, _completing(model.missing, names)))
    elif model.count > 1 and not folder.chosen:
        what = f"has {model.count} shards and no index that says they belong together: {_listed(model.files)}"
        remedy = f"download the index too, or read these shards as they are: {CHOOSE.format(name=model.files[0])}"
        problems.append(Problem(folder.uri, what, remedy))


def _completing(missing: Sequence[str], names: Collection[str]) -> str:
    """Return the remedy for files that are not there; it names what an unfinished download has left of them."""
    left = [part for name in missing if (part := unfinished(name, names))]
    return f"complete the download or upload{f' ({_listed(left)} is not finished)' if left else ''}"


def _indexed_files(folder: Folder, index: str, weights: Collection[str], problems: list[Problem]) -> list[str]:
    where = join(folder.uri, index)
    before = len(problems)
    weight_map = _object(folder, index, problems).get("weight_map")
    if len(problems) > before:
        return []
    if not (isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())):
        problems.append(Problem(where, "has no weight_map from tensor names to file names", "save the model again"))
        return []
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if "/" in file or "\\" in file or file in ("", ".", "..")]
    if outside:
        problems.append(
            Problem(where, f"names files outside its folder: {_listed(outside)}", "do not trust this model")
        )
    missing = [file for file in files if file not in weights and file not in outside]
    if missing:
        what = f"names {len(missing)} files that are not there: {_listed(missing)}"
        problems.append(Problem(where, what, _completing(missing, [_name(pin.uri) for pin in folder.files])))
    used = [file for file in files if file in weights]
    absent = [name for name, file in weight_map.items() if file in used and name not in folder.headers[file].tensors]
    if absent:
        what = f"names {len(absent)} tensors that their files lack: {_listed(absent)}"
        problems.append(Problem(where, what, "save the model again"))
    unnamed = [name for file in used for name in folder.headers[file].tensors if name not in weight_map]
    if unnamed:
        what = f"does not name {len(unnamed)} tensors of its files: {_listed(unnamed)}"
        problems.append(Problem(where, what, "save the model again"))
    return used


def _stored(folder: Folder, files: Sequence[str], problems: list[Problem]) -> dict[str, TensorRef]:
    """Return every tensor in the order of files and offsets; a name in two files is a problem."""
    stored: dict[str, TensorRef] = {}
    twice: list[str] = []
    for number, file in enumerate(files):
        for name, info in folder.headers[file].tensors.items():
            if name in stored:
                twice.append(name)
            stored[name] = TensorRef(number, info.start, info.dtype, info.shape)
    if twice:
        what = f"holds {len(twice)} tensors in more than one file: {_listed(twice)}"
        problems.append(Problem(folder.uri, what, "save the model again"))
    return stored


def _object(folder: Folder, name: str, problems: list[Problem]) -> Mapping[str, Any]:
    """Return a small file's JSON object; empty where there is no such file."""
    try:
        value = bounded.loads(folder.texts.get(name, b"{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problems.append(Problem(join(folder.uri, name), "is not a JSON object", "upload it again"))
        return {}
    return value


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def _shapes(names: Sequence[str], kept: Mapping[str, TensorRef], base: Mapping[str, Parameter]) -> str:
    return _listed(f"{name} {list(kept[name].shape)} where the base has {list(base[name].shape)}" for name in names)


def _listed(names: Iterator[str] | Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    every = [printable(name) for name in names]
    return ", ".join(every[:4]) + (f" and {len(every) - 4} more" if len(every) > 4 else "")
