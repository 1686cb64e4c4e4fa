"""KnOTS, Core Space and Compress-then-Merge: adapters turned into a common basis, merged there, and turned back.

An adapter maps a module to (B, A), B (m, r) and A (r, n), with the scale s folded in: its delta is B A. A module that
an adapter lacks has a delta of zero. A rule in the core is any function from a list of dicts to one dict of arrays.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tests.tools.oracles.electing import ties
from tests.tools.oracles.linalg import svd
from tests.tools.oracles.protocol import Array, Merged, Tensors, stacked, task_vectors

Adapter = Mapping[str, tuple[Array, Array]]
Rule = Callable[[Sequence[Tensors]], Tensors]


def dense(adapters: Sequence[Adapter]) -> list[dict[str, Array]]:
    """Return the adapters' deltas B A, zero where a module is missing."""
    return task_vectors(None, [{name: b @ a for name, (b, a) in adapter.items()} for adapter in adapters])


def added(deltas: Sequence[Tensors]) -> dict[str, Array]:
    """Return the sum: task arithmetic as a rule."""
    return {name: stacked(deltas, name).sum(0) for name in deltas[0]}


def trimmed(density: float, profile: str = "official") -> Rule:
    """Return TIES as a rule."""
    return lambda deltas: ties(None, deltas, density=density, profile=profile).delta  # type: ignore[arg-type]


def knots(
    base: Tensors | None,
    models: Sequence[Tensors],
    *,
    rule: Rule = added,
    cut: float | None = 1e-5,
    lambda_: float = 1.0,
) -> Merged:
    """KnOTS (Stoica et al. 2025, arXiv:2410.19735): lambda U rule(diag(s) V_i), [tau_1 .. tau_N] = U s [V_1 .. V_N].

    By module; `rule` sees all modules of a model at once, so its ranks are those of the whole. Singular values at or
    below `cut` are dropped; the published cut is absolute, 1e-5. None is the relative cutoff of `linalg.svd`.
    A rule that is linear makes KnOTS the same as that rule on the deltas, up to what the cut drops. TIES is not: it
    sees the signs of U, and, where singular values are equal, an arbitrary rotation. Zero sums by majority depend on
    the signs of U as well. Parameters of other than two axes go through the rule as they are.
    Published: TIES without a trim at lambda 0.5 on Llama; only the first weight is used.
    Products: `basis` U (m, p) by module.
    """
    deltas = task_vectors(base, models)
    bases: dict[str, Array] = {}
    parts: list[dict[str, Array]] = [{} for _ in deltas]
    for name in deltas[0]:
        stack = stacked(deltas, name)
        if stack.ndim != 3:
            for part, tau in zip(parts, stack, strict=True):
                part[name] = tau
            continue
        wide = np.concatenate(list(stack), 1)
        if cut is None:
            u, s, v = svd(wide)
        else:
            u, s, v = np.linalg.svd(wide, full_matrices=False)
            there = int(np.sum(s > cut))
            u, s, v = u[:, :there], s[:there], v[:there]
        bases[name] = u
        for part, own in zip(parts, np.split(s[:, None] * v, len(stack), 1), strict=True):
            part[name] = own
    core = rule(parts)
    merged = {name: bases[name] @ value if name in bases else value for name, value in core.items()}
    return Merged({name: lambda_ * value for name, value in merged.items()}, base, {"basis": bases})


def core_space(adapters: Sequence[Adapter], *, rule: Rule = added, lambda_: float = 1.0) -> Merged:
    """Core Space (Panariello et al. 2025, arXiv:2509.17786): lambda U rule(U^T B_i A_i V) V^T.

    U: left singular vectors of [B_1 .. B_N]; V: right singular vectors of [A_1; ..; A_N], both up to the numerical
    rank, by module. Every B_i A_i lies in their span, so nothing is lost: a linear rule gives what it gives on the
    deltas, and so do TSV and Iso-C. TIES depends on the basis, and the basis on how B and A share a scale.
    Products: `left` (m, p), `right` (q, n), `cores` (p, q) for each adapter.
    """
    modules = dict.fromkeys(name for adapter in adapters for name in adapter)
    left, right = {}, {}
    for name in modules:
        pairs = [adapter[name] for adapter in adapters if name in adapter]
        left[name] = svd(np.concatenate([b for b, _ in pairs], 1))[0]
        right[name] = svd(np.concatenate([a for _, a in pairs], 0))[2]
    return _merged_between(dense(adapters), left, right, rule, lambda_)


def compress_merge(
    adapters: Sequence[Adapter],
    *,
    rank: int,
    beta: float = 1.0,
    rule: Rule = added,
    lambda_: float = 1.0,
    iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Merged:
    """Compress-then-Merge (He et al. 2026, arXiv:2606.03723): as Core Space, in `rank` directions learned from the tau.

    By module: targets X_i = (beta + (1 - beta) mean_j|tau_j| / |tau_i|) tau_i, over the adapters that change it; U and
    V are the factors of their Tucker-2 decomposition, by alternation: U begins with the leading left singular vectors
    of [X_1 .. X_N], V with the right ones of [X_1; ..; X_N]; then U becomes the leading left ones of [X_1 V .. X_N V]
    and V the right ones of [U^T X_1; ..; U^T X_N], until, after the second time, the relative error
    sqrt(|X|^2 - |core|^2) / |X| changes by less than `tolerance`. The cores are U^T tau_i V of the tau_i themselves.
    beta = 1 does not rescale, beta = 0 makes all targets equally long (the paper: 0 to .75 serve).
    The result has rank `rank` at most: B = U core, A = V^T. A rank at least that of both stacks loses nothing.
    Depends on the deltas alone, not on how B and A share a scale. Products as of Core Space.
    """
    deltas = dense(adapters)
    left, right = {}, {}
    for name in deltas[0]:
        targets = [tau for tau in stacked(deltas, name) if tau.any()]
        sizes = np.array([np.linalg.norm(tau) for tau in targets])
        shares = [beta + (1 - beta) * sizes.mean() / size for size in sizes]
        stretched = [share * tau for share, tau in zip(shares, targets, strict=True)] or [deltas[0][name]]
        left[name], right[name] = _tucker(stretched, rank, iterations, tolerance)
    return _merged_between(deltas, left, right, rule, lambda_)


def _tucker(targets: Sequence[Array], rank: int, iterations: int, tolerance: float) -> tuple[Array, Array]:
    """Return U (m, rank) and V^T (rank, n)."""
    left = svd(np.concatenate(targets, 1), rank)[0]
    right = svd(np.concatenate(targets, 0), rank)[2]
    whole = sum(float(np.vdot(tau, tau)) for tau in targets)
    errors: list[float] = []
    for _ in range(iterations if whole else 0):
        left = svd(np.concatenate([tau @ right.T for tau in targets], 1), rank)[0]
        right = svd(np.concatenate([left.T @ tau for tau in targets], 0), rank)[2]
        kept = sum(float(np.sum((left.T @ tau @ right.T) ** 2)) for tau in targets)
        errors.append(np.sqrt(abs(whole - kept) / whole))
        if len(errors) > 2 and abs(errors[-2] - errors[-1]) < tolerance:
            break
    return left, right


def _merged_between(deltas: Sequence[Tensors], left: Tensors, right: Tensors, rule: Rule, lambda_: float) -> Merged:
    cores = [{name: left[name].T @ tau @ right[name].T for name, tau in delta.items()} for delta in deltas]
    core = rule(cores)
    merged = {name: lambda_ * left[name] @ core[name] @ right[name] for name in left}
    return Merged(merged, None, {"left": left, "right": right, "cores": cores})
