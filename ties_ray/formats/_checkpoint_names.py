"""A model's tensors under the names of its base, and the tensors that share their values."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ties_ray.errors import enumerated
from ties_ray.formats import Rules
from ties_ray.libraries.conversions import kinds_of
from ties_ray.libraries.naming import Match, Piece, matched
from ties_ray.libraries.ties import Tie, always_tied, tied_by_default, ties_of, unstored
from ties_ray.safetensors import COPYABLE, DTYPE_BITS
from ties_ray.tensors import Parameter, TensorRef

_COUNTER = re.compile(r"(?:.*\.)?(?:num_batches_tracked|num_updates|global_step|steps?|iterations?)", re.DOTALL)
"""Names of integers that count the steps of a training: a merge keeps the base's."""

_BYTES = {"BOOL": "U8"}
"""The dtype of integers with the same bytes: a mask may be stored as either."""


class ModelNames:
    """A model's tensors under the base's names."""

    def __init__(
        self, stored: Mapping[str, TensorRef], config: Mapping[str, Any], base: Mapping[str, Parameter]
    ) -> None:
        kinds = kinds_of(config)
        shapes = {name: ref.shape for name, ref in stored.items()}
        match = matched(shapes, {name: parameter.shape for name, parameter in base.items()}, kinds)
        self.problems = list(match.problems)
        self.notes = list(_stored_otherwise(match, stored))
        self.tensors = {
            name: tuple(_cut(stored[piece.name], piece) for piece in pieces) for name, pieces in match.pieces.items()
        }
        """The tensors whose elements, one after the other, are a base parameter's, by its name."""
        self.first = {name: pieces[0].name for name, pieces in match.pieces.items()}
        """The stored name of the first of these tensors, by the parameter's name."""
        self.left = {called: (name, stored[name]) for name, called in match.left.items()}
        """Tensors that the base lacks, by the name that it would give them: (stored name, tensor)."""
        self.tied: dict[str, str] = {}
        """The base's parameters with which tensors of `left` may share their values, by name in `left`."""
        if self.left or len(self.tensors) < len(base):
            self._tie(base, ties_of([*base, *self.left], kinds), ties(config, unsaid=True))

    def _tie(self, base: Mapping[str, Parameter], pairs: Sequence[Tie], tied: bool) -> None:
        """Settle names that may mean one value, where the base and the model store different ones of them."""
        groups: dict[str, list[str]] = {}
        for alias, kept in pairs:
            groups.setdefault(kept, [kept]).append(alias)
        for group in groups.values():
            in_base = [name for name in group if name in base]
            left = [name for name in group if name in self.left]
            if in_base and left and not self.tensors.keys() & in_base:
                stored, ref = self.left.pop(left[0])
                self.tensors[in_base[0]], self.first[in_base[0]] = (ref,), stored
                self.notes.append(f"{stored} is {in_base[0]}, to which it is tied")
            here = next((name for name in in_base if name in self.tensors), None)
            if here:
                self.tied |= {name: here for name in left if name in self.left}
                for name in in_base if tied else ():
                    if name not in self.tensors and base[name].merged:
                        self.tensors[name] = self.tensors[here]
                        self.notes.append(f"{name} is not stored, and is tied to {here}: its value is that one's")

    def pairs(self) -> list[tuple[str, str]]:
        """Return stored names of tensors that may hold one value, where dtype and shape do not tell them apart."""
        pairs = []
        for name, kept in self.tied.items():
            alias, ref = self.left[name]
            other = self.tensors[kept][0]
            if (ref.dtype, ref.shape) == (other.dtype, other.shape):
                pairs.append((alias, self.first[kept]))
        return pairs

    def copied(self, base: Mapping[str, Parameter], rules: Rules) -> dict[str, str]:
        """Return the stored names of integers and booleans that may be the base's, by name in the base."""
        copied = {}
        for name, refs in self.tensors.items():
            stored = [(_BYTES.get(ref.dtype, ref.dtype), ref.shape) for ref in refs]
            same = stored == [(_BYTES.get(base[name].dtype, base[name].dtype), base[name].shape)]
            if same and _is_table(base[name], rules):
                copied[name] = self.first[name]
        return copied

    def tables(self, base: Mapping[str, Parameter], rules: Rules, same: Collection[tuple[str, str]]) -> dict[str, str]:
        """Return, by name, the fate of the integers and booleans that the base has too; empty: it can't be merged.

        same: (stored name, name in the base) of tensors with the same bytes.
        """
        asked = self.copied(base, rules)

        def fate(name: str, refs: Sequence[TensorRef]) -> str:
            if (asked.get(name), name) in same:
                return "equal"
            single = sum(math.prod(ref.shape) for ref in refs) == 1
            return "a counter of the training" if single and _COUNTER.fullmatch(name) else ""

        return {name: fate(name, refs) for name, refs in self.tensors.items() if _is_table(base[name], rules)}


def _is_table(parameter: Parameter, rules: Rules) -> bool:
    """Return whether a base parameter holds integers or booleans that models must share."""
    return parameter.dtype in COPYABLE and not rules.excludes(parameter.name)


def _stored_otherwise(match: Match, stored: Mapping[str, TensorRef]) -> Iterator[str]:
    """Yield notes on parameters that the model stores otherwise than the base."""
    renamed, cut, joined = list[str](), list[str](), list[str]()
    for name, (first, *others) in match.pieces.items():
        if others:
            joined.append(f"{name} is {first.name} and {len(others)} more")
        elif first.shape != stored[first.name].shape:
            cut.append(f"{name} is a part of {first.name}")
        elif first.name != name:
            renamed.append(f"{name} is {first.name}")
    for names, message in (
        (renamed, "are stored under other names"),
        (cut, "are stored fused with others"),
        (joined, "are stored in several tensors"),
    ):
        if names:
            yield f"{len(names)} parameters {message}: {enumerated(names)}"


def _cut(ref: TensorRef, piece: Piece) -> TensorRef:
    """Return the place of a run of a tensor's elements."""
    return ref._replace(start=ref.start + piece.start * DTYPE_BITS[ref.dtype] // 8, shape=piece.shape)


def tied(names: Collection[str], config: Mapping[str, Any]) -> list[Tie]:
    """Return the parameters of a model of this config that are not stored, because it ties them to stored ones."""
    return unstored(names, config) if ties(config) else []


def ties(config: Mapping[str, Any], *, unsaid: bool | None = None) -> bool:
    """Return whether a config ties the embeddings.

    unsaid: the answer where the config does not say; None: the default of its model type.
    """
    text = config.get("text_config")
    kinds = [config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None]
    if any(map(always_tied, kinds)):
        return True
    default = any(map(tied_by_default, kinds)) if unsaid is None else unsaid
    return setting(config, "tie_word_embeddings", default) is True


def setting(config: Mapping[str, Any], key: str, default: object) -> object:
    """Return a config's value, looked up in `text_config` too, where multimodal models keep it."""
    text = config.get("text_config")
    return config.get(key, text.get(key, default) if isinstance(text, dict) else default)
