"""What the papers say, in plain dense float64: all models stacked, thresholds by sorting, no streams and no slices.

Written from the papers and from section 6 of the design, not from the code under test. Two answers: the ideal values
(float64 throughout), and for families whose sums are exact in any order the very bits (sums in float64, then the tail
of the design in fp32: division, lambda, base + m, one cast).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tests.tools.families import Family
from tests.tools.merging import fp32, quantum, rounded, same_bits

UNIT = 2.0**-24
"""Half a unit in the last place of fp32, relative."""


@dataclass(frozen=True)
class Rules:
    """A method in the words of the design; one flat record for all of them."""

    method: Literal["average", "task_arithmetic", "ties", "dare", "consensus"]
    density: float = 1.0
    lambda_: float = 1.0
    tensor: bool = False
    strict: bool = False
    exact: bool = False
    """Of equal values the first are kept, in the order of names and positions, so that k are kept."""
    zero_sum: Literal["none", "majority", "positive"] = "none"
    merge: Literal["mean", "sum", "max"] = "mean"
    one_more: bool = False
    """k = int(density * d) + 1, as the authors' code has it."""
    elects: bool = False
    """Dare: by sign election."""
    seed: int = 0
    bound: float = 0.4
    agree: int = 2
    union: bool = False
    """The density of an adapter counts over what any adapter changes, not over what it changes itself."""
    skip: bool = False
    """Average: over the models that change a parameter at all."""


class Change(NamedTuple):
    """What one model adds to the base, in float64, flat, by parameter; what it lacks is zero."""

    values: Mapping[str, Tensor]
    errors: Mapping[str, Tensor] = {}
    """How far fp32 may be off, by element; nothing where a parameter's values are exact in fp32."""
    whole: bool = True
    """A checkpoint's, whose task vector has all parameters; else an adapter's."""


@dataclass
class Trim:
    """What the trim of one model (or of one of its parameters) comes to."""

    threshold: float
    kept: int
    tied: int
    size: int


@dataclass
class Answer:
    """What a merge should give."""

    value: dict[str, Tensor] = field(default_factory=dict)
    """What is divided, float64, by merged parameter."""
    divisor: dict[str, Tensor] = field(default_factory=dict)
    factor: float = 1.0
    scale: dict[str, Tensor] = field(default_factory=dict)
    """|lambda| * sum |w d| / normaliser: what the rounding error of the merged delta is relative to."""
    slack: dict[str, Tensor] = field(default_factory=dict)
    """How far the merged delta may be off because the changes themselves are rounded."""
    sure: dict[str, Tensor] = field(default_factory=dict)
    """Where no rounding error could turn a trim, an election or a vote."""
    trims: dict[tuple[str, str | None], Trim] = field(default_factory=dict)
    """By model id and parameter (None: the whole task vector)."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Which elements of which model are kept, (model, element)."""

    def ideal(self, name: str) -> Tensor:
        """Return the merged delta in float64."""
        return self.value[name] / self.divisor[name] * self.factor

    def exact(self, name: str) -> Tensor:
        """Return the merged delta as the design rounds it to fp32, given that the sums were exact."""
        value, divisor = self.value[name].float(), self.divisor[name].float()
        assert torch.equal(value.double(), self.value[name]), "this family's sums are not exact"
        assert torch.equal(divisor.double(), self.divisor[name]), "this recipe's weights are not exact"
        return value / divisor * torch.tensor(self.factor, dtype=torch.float32)


def merge(
    family: Family,
    rules: Rules,
    *,
    weights: Sequence[float] | None = None,
    densities: Sequence[float | None] | None = None,
    exclude: Sequence[str] = (),
) -> Answer:
    """Return what the family merges to; `exclude` holds whole names."""
    changes = [
        Change({
            name: _delta(model[name], base)
            for name, base in family.base_tensors.items()
            if base.is_floating_point() and name not in exclude
        })
        for model in family.model_tensors
    ]  # fmt: skip
    return merge_changes(changes, rules, weights=weights, densities=densities)


def merge_changes(
    changes: Sequence[Change],
    rules: Rules,
    *,
    weights: Sequence[float] | None = None,
    densities: Sequence[float | None] | None = None,
    ids: Sequence[str] | None = None,
) -> Answer:
    """Return what changes of checkpoints and adapters merge to, for every parameter that one of them changes."""
    all_weights = weights or [1.0] * len(changes)
    own = densities or [None] * len(changes)
    members = [index for index, weight in enumerate(all_weights) if weight != 0]
    kept_ids = [(ids or list(map(str, range(len(changes)))))[index] for index in members]
    factors = torch.tensor([fp32(all_weights[index]) for index in members], dtype=torch.float64)
    shares = [float((rules.density if own[index] is None else own[index]) or 0) for index in members]
    chosen = [changes[index] for index in members]
    numels = {name: len(value) for change in chosen for name, value in change.values.items()}
    deltas, errors, present = {}, {}, {}
    for name, numel in numels.items():
        zero = torch.zeros(numel, dtype=torch.float64)
        deltas[name] = torch.stack([change.values.get(name, zero).double() for change in chosen])
        errors[name] = torch.stack([change.errors.get(name, zero).double() for change in chosen])
        present[name] = torch.tensor([name in change.values for change in chosen])
    answer = Answer()
    scopes = [_scopes(change, chosen, numels, rules) for change in chosen]
    kept, close = _kept(deltas, errors, kept_ids, shares, scopes, rules, answer)
    answer.factor = 1.0 if rules.method == "average" else fp32(rules.lambda_)
    rescale = torch.tensor([fp32(1 / share) if rules.method == "dare" else 1.0 for share in shares]).double()
    terms = {name: torch.where(kept[name], delta * (rescale * factors)[:, None], 0.0) for name, delta in deltas.items()}
    zero_sign = _zero_sign(terms, rules)
    for name, term in terms.items():
        off = torch.where(kept[name], errors[name] * (rescale * factors.abs())[:, None], 0.0)
        divisors = factors * present[name] if rules.skip else factors
        _combine(name, term, off, divisors, zero_sign, rules, answer)
        answer.sure[name] &= ~close[name]
    answer.kept = kept
    return answer


def output_of(base: Tensor, merged: Tensor, dtype: torch.dtype) -> Tensor:
    """Return base + merged delta (fp32), rounded once: in fp64 where base or output is, else in fp32."""
    wide = torch.float64 in (base.dtype, dtype)
    total = base.double() + merged.double() if wide else (base.float() + merged).double()
    return torch.where(merged == 0, rounded(base.double(), dtype), rounded(total, dtype))


def keeps(seed: int, id: str, name: str, element: int, density: float) -> bool:
    """Return whether DARE keeps an element: Philox4x32-10 on Python integers."""
    digest = hashlib.sha256(b"\0".join([str(seed).encode(), id.encode(), name.encode()])).digest()
    low, high = (int.from_bytes(digest[start : start + 4], "little") for start in (0, 4))
    word = philox([element // 4 % 2**32, element // 4 // 2**32, 0, 0], (low, high))[element % 4]
    return word < int(density * 2**32)


def philox(x: list[int], key: tuple[int, int]) -> list[int]:
    """Return the four words of Philox4x32-10 (Salmon et al. 2011)."""
    low, high = key
    for _ in range(10):
        first, third = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [third // 2**32 ^ x[1] ^ low, third % 2**32, first // 2**32 ^ x[3] ^ high, first % 2**32]
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return x


def _delta(model: Tensor, base: Tensor) -> Tensor:
    if torch.float64 in (model.dtype, base.dtype):
        return (model.double() - base.double()).float().reshape(-1)
    return (model.float() - base.float()).reshape(-1)


def _scopes(
    change: Change, everything: Sequence[Change], numels: Mapping[str, int], rules: Rules
) -> list[tuple[str | None, list[str], int]]:
    """Return what has a threshold of its own: (parameter or None, parameters, d)."""
    if rules.tensor:
        return [(name, [name], numels[name]) for name in change.values]
    names = set(change.values)
    if rules.union and not change.whole:
        names = {name for other in everything if not other.whole for name in other.values}
    d = sum(numels.values()) if change.whole else sum(numels[name] for name in names)
    return [(None, list(change.values), d)]


def _kept(
    deltas: dict[str, Tensor],
    errors: dict[str, Tensor],
    ids: Sequence[str],
    shares: Sequence[float],
    scopes: Sequence[list[tuple[str | None, list[str], int]]],
    rules: Rules,
    answer: Answer,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return which elements are kept, (model, element), and by parameter where rounding could change that."""
    kept = {name: torch.ones(delta.shape, dtype=torch.bool) for name, delta in deltas.items()}
    close = {name: torch.zeros(delta.shape[1], dtype=torch.bool) for name, delta in deltas.items()}
    for row, (id, share) in enumerate(zip(ids, shares, strict=True)):
        if share == 1 or rules.method not in ("ties", "dare"):
            continue
        if rules.method == "dare":
            for name, delta in deltas.items():
                decided = [keeps(rules.seed, id, name, element, share) for element in range(delta.shape[1])]
                kept[name][row] = torch.tensor(decided, dtype=torch.bool)
            continue
        for scope, names, d in scopes[row]:
            size = torch.cat([deltas[name][row] for name in names]).abs()
            count = min(d, max(1, int(share * d) + rules.one_more))
            # what d counts beyond the values is zero, and so is a threshold of that rank
            threshold = float(size.sort(descending=True).values[count - 1]) if 0 < count <= len(size) else 0.0
            worst = max(float(errors[name][row].max()) for name in names if deltas[name].shape[1]) if len(size) else 0.0
            for name in names:
                own, error = deltas[name][row].abs(), errors[name][row]
                kept[name][row] = own > threshold if rules.strict and threshold else own >= threshold
                close[name] |= (error > 0) & (threshold > 0) & ((own - threshold).abs() <= error + worst)
            if rules.exact and threshold:
                _drop_last_ties(kept, deltas, row, sorted(names), threshold, count)
            of_trim = int(((size >= threshold) & (size > 0)).sum())
            kept_values = min(of_trim, count) if rules.exact else of_trim
            answer.trims[id, scope] = Trim(threshold, kept_values, int((size == threshold).sum()), d)
    return kept, close


def _drop_last_ties(
    kept: dict[str, Tensor], deltas: dict[str, Tensor], row: int, names: Sequence[str], threshold: float, count: int
) -> None:
    """Drop the last of the kept values that equal the threshold, until `count` are kept."""
    excess = sum(int(kept[name][row].sum()) for name in names) - count
    for name in reversed(names):
        equal = (deltas[name][row].abs() == threshold).nonzero()[:, 0]
        last = equal[max(0, len(equal) - max(0, excess)) :]
        kept[name][row][last] = False
        excess -= len(last)


def _zero_sign(terms: dict[str, Tensor], rules: Rules) -> int:
    if rules.zero_sum != "majority":
        return {"none": 0, "positive": 1}[rules.zero_sum]
    balance = int(sum(term.sum(0).sign().sum() for term in terms.values()))
    # sign(0) = 0 is not > 0, so the authors' code takes negative values for it, and none by max
    return (balance > 0) - (balance < 0) or (0 if rules.merge == "max" else -1)


def _combine(
    name: str, term: Tensor, off: Tensor, factors: Tensor, zero_sign: int, rules: Rules, answer: Answer
) -> None:
    total, size = term.sum(0), term.abs().sum(0)
    error = (len(term) + 3) * UNIT * size + off.sum(0)
    sure = torch.ones(total.shape, dtype=torch.bool)
    divisor = torch.ones_like(total)
    value = total
    if rules.method == "average":
        divisor = torch.full_like(total, fp32(float(factors.sum())) or 1.0)
    elif rules.method == "ties" or (rules.method == "dare" and rules.elects):
        sign = torch.where(total == 0, float(zero_sign), total.sign())
        # Where models cancel, the sums of all and of the others may differ by rounding: no sign is promised there.
        sure = ((total.abs() > error) | (size == 0)) & ~((term.abs() <= off) & (off > 0)).any(0)
        agrees = (term.sign() == sign) & (sign != 0)
        value = torch.where(agrees, term, 0.0).sum(0)
        if rules.merge == "mean":
            divisor = torch.where(agrees, factors[:, None], 0.0).sum(0)
            value = torch.where(divisor == 0, 0.0, value)
            divisor = torch.where(divisor == 0, 1.0, divisor)
        elif rules.merge == "max" and len(term):
            value = torch.where(agrees, term.abs(), 0.0).max(0).values * sign
    elif rules.method == "consensus":
        margin = term.abs() - fp32(rules.bound) * (total - term).abs()
        sure = ((margin.abs() > 2 * (1 + rules.bound) * error) | (term == 0)).all(0) | (size == 0)
        value = torch.where((margin > 0).sum(0) >= rules.agree, total, 0.0)
    answer.value[name], answer.divisor[name], answer.sure[name] = value, divisor, sure
    answer.scale[name] = abs(answer.factor) * size / divisor.abs()
    answer.slack[name] = abs(answer.factor) * off.sum(0) / divisor.abs()


def check(
    family: Family, answer: Answer, found: dict[str, Tensor], *, dtype: torch.dtype | None = None, exact: bool = False
) -> None:
    """Assert that the tensors of an output are the oracle's: within the rounding errors of fp32, or to the bit."""
    assert found.keys() == family.base_tensors.keys()
    for name, base in family.base_tensors.items():
        if name not in answer.value:
            assert same_bits(found[name], base), name
            continue
        got = found[name].reshape(-1)
        assert got.dtype == (dtype or base.dtype), name
        flat = base.reshape(-1)
        if exact:
            assert same_bits(got, output_of(flat, answer.exact(name), got.dtype)), name
            continue
        wanted = flat.double() + answer.ideal(name)
        size = flat.double().abs() + wanted.abs() + answer.scale[name] * (len(answer.kept[name]) + 3)
        error = (got.double() - wanted).abs()
        allowed = quantum(wanted, got.dtype) / 2 + 2 * UNIT * size + answer.slack[name]
        wrong = answer.sure[name] & (error > allowed)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {len(wrong)} values are wrong, by up to {error.max()}"
        untouched = (answer.scale[name] == 0) & answer.sure[name]
        assert same_bits(got[untouched], rounded(flat[untouched].double(), got.dtype)), name
    sure = torch.cat(list(answer.sure.values()))
    assert exact or sure.sum() > 0.6 * len(sure), "rounding could turn so many elections that nothing was tested"
