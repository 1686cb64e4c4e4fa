"""The oracles against published implementations, in an environment that has them.

    make differential
    python -m venv venv && venv/bin/pip install torch==2.13.0 fusion-bench==0.2.33
    venv/bin/python -m tests.tools.oracles.differential

Every case runs both on the same families, in fp64 where the other side lets it. A parameter for which a case gives a
reason to differ must differ; any other must agree. The exit code is the number of cases that break this.
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.tools.oracles import families
from tests.tools.oracles.breadcrumbs import breadcrumbs
from tests.tools.oracles.consensus import consensus
from tests.tools.oracles.della import della
from tests.tools.oracles.electing import dare, ties
from tests.tools.oracles.elements import magmax, ram
from tests.tools.oracles.emr import emr
from tests.tools.oracles.families import Family
from tests.tools.oracles.iso import iso_c, iso_cts
from tests.tools.oracles.model_stock import model_stock
from tests.tools.oracles.nearswap import nearswap
from tests.tools.oracles.opcm import opcm
from tests.tools.oracles.protocol import Array, Tensors, is_matrix
from tests.tools.oracles.regmean import regmean
from tests.tools.oracles.sce import sce
from tests.tools.oracles.spherical import karcher, multislerp, nuslerp, slerp
from tests.tools.oracles.tsv import tsv
from tests.tools.oracles.wudi import wudi

Merge = Callable[[Family], Tensors]
FROZEN = "model.frozen.weight"
NARROW = ("model.narrow.weight", "model.flat.weight")
TINY = ("model.scale", "model.one")


class Case(NamedTuple):
    """One method on both sides: both give merged deltas."""

    name: str
    theirs: Merge
    ours: Merge
    family: Family
    tolerance: float = 1e-12
    differs: Mapping[str, str] = {}
    """By parameter why it differs."""
    note: str = ""
    """Why the tolerance is wider than the rounding of fp64."""


def mergekit(method: str, *, base: bool = True, first_is_base: bool = False, **parameters: Any) -> Merge:
    """Return a method of mergekit, run tensor by tensor in fp64, as merged deltas."""
    from mergekit.merge_methods.api import merge_tensors

    def run(family: Family) -> Tensors:
        merged = {}
        for name, value in family.base.items():
            tensors = [torch.from_numpy(np.array(model[name])) for model in family.models]
            if base:
                tensors.insert(0, torch.from_numpy(np.array(value)))
            index = 0 if base or first_is_base else None
            found = merge_tensors(tensors, method, parameters=parameters, base_index=index)
            merged[name] = found.numpy() - value
        return merged

    return run


def fusion(module: str, function: str, *arguments: Any, **options: Any) -> Merge:
    """Return a function of fusion_bench that takes state dicts of task vectors."""

    def run(family: Family) -> Tensors:
        merge = getattr(importlib.import_module(f"fusion_bench.method.{module}"), function)
        deltas = [{name: torch.from_numpy(np.array(tau)) for name, tau in delta.items()} for delta in family.deltas]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = merge(deltas, *arguments, **options)
        found = found[0] if isinstance(found, tuple) else found
        return {name: value.detach().numpy() for name, value in found.items()}

    return run


@contextlib.contextmanager
def drawn(draws: Sequence[Array]) -> Iterator[None]:
    """Let torch.bernoulli compare with these uniforms, call by call."""
    original, left = torch.bernoulli, iter(draws)

    def bernoulli(chance: torch.Tensor) -> torch.Tensor:
        draw = torch.from_numpy(np.array(next(left))).reshape(chance.shape)
        return (draw < chance).to(chance.dtype)

    torch.bernoulli = bernoulli  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.bernoulli = original


def with_draws(method: str, **parameters: Any) -> Merge:
    """Return a method of mergekit that draws `families.draws(9, family)`."""
    from mergekit.merge_methods.api import merge_tensors

    def run(family: Family) -> Tensors:
        draws, merged = families.draws(9, family), {}
        for name, value in family.base.items():
            tensors = [torch.from_numpy(np.array(model[name])) for model in (family.base, *family.models)]
            with drawn([own[name] for own in draws]):
                merged[name] = merge_tensors(tensors, method, parameters=parameters, base_index=0).numpy() - value
        return merged

    return run


def wide(family: Family) -> Family:
    """Return the family without the parameters of width 1, on which mergekit's DELLA divides 0 by 0."""
    return without(family, *(name for name, value in family.base.items() if not value.ndim or value.shape[-1] == 1))


def scaled(family: Family, factor: float) -> Family:
    """Return the family with deltas of another size."""
    return Family(
        family.base,
        tuple({name: family.base[name] + factor * tau for name, tau in delta.items()} for delta in family.deltas),
    )


def without(family: Family, *names: str) -> Family:
    """Return the family without some parameters."""
    kept = [name for name in family.base if name not in names]
    return Family(
        {name: family.base[name] for name in kept}, tuple({name: own[name] for name in kept} for own in family.models)
    )


def cases_of_spheres() -> Iterator[Case]:
    """Yield mergekit's methods of angles."""
    pair, five = families.smooth(1, 2), families.smooth(2, 5)
    weights = [0.3, 0.5, 0.1, 0.6, 0.2]
    vector = "model.layers.0.norm.weight"
    frozen = families.frozen_in(pair, 1, vector)
    angle = {vector: "a zero tensor has no direction: linear here, a right angle there"}
    yield Case(
        "slerp",
        mergekit("slerp", base=False, first_is_base=True, t=0.3),
        lambda f: slerp(None, f.models, t=0.3).delta,
        frozen,
        differs=angle,
    )
    yield Case(
        "nuslerp",
        mergekit("nuslerp", weight=[0.7, 0.3]),
        lambda f: nuslerp(f.base, f.models, weights=[0.7, 0.3]).delta,
        frozen,
        differs=angle,
    )
    yield Case(
        "nuslerp by row",
        mergekit("nuslerp", weight=[0.7, 0.3], nuslerp_flatten=False),
        lambda f: nuslerp(f.base, f.models, weights=[0.7, 0.3], unit="row").delta,
        pair,
    )
    yield Case(
        "nuslerp by column",
        mergekit("nuslerp", weight=[0.7, 0.3], nuslerp_flatten=False, nuslerp_row_wise=True),
        lambda f: nuslerp(f.base, f.models, weights=[0.7, 0.3], unit="column").delta,
        pair,
    )
    yield Case(
        "multislerp",
        mergekit("multislerp", weight=weights),
        lambda f: multislerp(f.base, f.models, weights=weights).delta,
        without(five, FROZEN),
        1e-4,
        note="units have an epsilon of 1e-8 there",
    )
    yield Case("karcher", mergekit("karcher", base=False), lambda f: karcher(None, f.models).delta, scaled(five, 1e3))
    yield Case(
        "nearswap",
        mergekit("nearswap", t=1e-3),
        lambda f: nearswap(f.base, f.models, t=1e-3).delta,
        Family(pair.base, pair.models[:1]),
    )


def cases_of_elections() -> Iterator[Case]:
    """Yield mergekit's task arithmetic with trims, drops and elections."""
    five = families.smooth(2, 5)
    weights = [0.3, 0.5, 0.1, 0.6, 0.2]
    signed = [1.0, -0.5, 1.0, -1.0, 2.0]
    for density, own in ((0.3, weights), (1.0, weights), (0.6, signed)):
        yield Case(
            f"ties at {density}",
            mergekit("ties", weight=own, density=density),
            lambda f, density=density, own=own: (
                ties(f.base, f.models, weights=own, density=density, profile="mergekit").delta
            ),
            five,
        )
    yield Case(
        "ties, rescaled",
        mergekit("ties", weight=weights, density=0.3, rescale=True, normalize=False),
        lambda f: (
            ties(
                f.base, f.models, weights=weights, density=0.3, profile="mergekit", rescale=True, normalize=False
            ).delta
        ),
        five,
    )
    for method, combine in (("dare_linear", "linear"), ("dare_ties", "ties")):
        yield Case(
            method,
            with_draws(method, weight=weights, density=0.4),
            lambda f, combine=combine: (
                dare(
                    f.base,
                    f.models,
                    kept=below(0.4, f),
                    weights=weights,
                    density=0.4,
                    profile="mergekit",
                    combine=combine,
                ).delta
            ),
            five,
            1e-5,
            note="drops work in fp32 there",
        )
    for method, combine in (("della_linear", "linear"), ("della", "ties")):
        yield Case(
            method,
            with_draws(method, weight=weights, density=0.5, epsilon=0.2, normalize=combine == "ties"),
            lambda f, combine=combine: (
                della(
                    f.base,
                    f.models,
                    draws=families.draws(9, f),
                    weights=weights,
                    density=0.5,
                    epsilon=0.2,
                    rescale="l1",
                    combine=combine,
                    zero_sum="positive",
                ).delta
            ),
            wide(five),
            1e-5,
            {"model.conv.weight": "a tensor of three axes is ranked along axis 1 there"},
            note="drops work in fp32 there",
        )
    yield Case(
        "breadcrumbs",
        mergekit("breadcrumbs", weight=weights, density=0.4, gamma=0.1),
        lambda f: breadcrumbs(f.base, f.models, weights=weights, density=0.4, gamma=0.1).delta,
        five,
        differs=dict.fromkeys(TINY, "int(.4 * 1) = 0 elements stay there, one here"),
    )


def cases_of_tensors() -> Iterator[Case]:
    """Yield mergekit's Model Stock, SCE and RAM."""
    five, near = scaled(families.smooth(2, 5), 1e3), scaled(families.smooth(2, 5, shared=2.0), 1e3)
    sparse = families.checkpoints(3, 3, zeros=0.6)
    yield Case("model_stock", mergekit("model_stock"), lambda f: model_stock(f.base, f.models).delta, near, 1e-9)
    yield Case(
        "model_stock by filter",
        mergekit("model_stock", filter_wise=True),
        lambda f: model_stock(f.base, f.models, filter_wise=True).delta,
        wide(without(near, "model.conv.weight")),
        1e-9,
    )
    opposed = [name for name, ratio in model_stock(five.base, five.models).products["ratios"].items() if not ratio]
    yield Case(
        "model_stock, far apart",
        mergekit("model_stock"),
        lambda f: model_stock(f.base, f.models).delta,
        five,
        1e-9,
        dict.fromkeys(set(opposed) - {FROZEN}, "a negative ratio goes past the base there, and is 0 here"),
    )
    yield Case(
        "sce",
        mergekit("sce", select_topk=0.4),
        lambda f: sce(f.base, f.models, select_topk=0.4, at_threshold="exact").delta,
        five,
        1e-9,
        dict.fromkeys(TINY, "int(.4 * 1) = 0 elements are selected there, one here"),
    )
    yield Case("sce of all", mergekit("sce"), lambda f: sce(f.base, f.models).delta, five, 1e-9)
    yield Case(
        "sce of small updates",
        mergekit("sce"),
        lambda f: sce(f.base, f.models, least=1e-6).delta,
        families.smooth(2, 5),
        1e-9,
    )
    yield Case("ram", mergekit("ram"), lambda f: ram(f.base, f.models).delta, sparse)
    yield Case(
        "ram+",
        mergekit("ramplus_tl"),
        lambda f: ram(f.base, f.models, plus=True).delta,
        sparse,
        1e-6,
        note="its factors are fp32 there",
    )


def below(density: float, family: Family) -> list[dict[str, Any]]:
    """Return which values stay at a density in fp32, as upstream draws them."""
    return [{name: draw < np.float32(density) for name, draw in own.items()} for own in families.draws(9, family)]


def peft(method: str, **parameters: Any) -> Merge:
    """Return a function of peft's merge_utils, run tensor by tensor in fp64 with `families.draws(9, family)`."""

    def run(family: Family) -> Tensors:
        merge = getattr(importlib.import_module("peft.utils.merge_utils"), method)
        draws, merged = families.draws(9, family), {}
        for name in family.base:
            taus = [torch.from_numpy(np.array(delta[name])) for delta in family.deltas]
            own = {key: torch.tensor(value) if key == "weights" else value for key, value in parameters.items()}
            with drawn([each[name] for each in draws]):
                merged[name] = merge(taus, **own).numpy()
        return merged

    return run


def cases_of_peft() -> Iterator[Case]:
    """Yield peft's rules, on which its adapter merges rest."""
    five = families.smooth(2, 5)
    weights = [0.5, 0.25, 2.0, 0.5, 1.0]
    for vote in ("total", "frequency"):
        yield Case(
            f"ties by {vote}",
            peft("ties", weights=weights, density=0.3, majority_sign_method=vote),
            lambda f, vote=vote: ties(f.base, f.models, weights=weights, density=0.3, profile="peft", elect=vote).delta,
            five,
        )
    for method, combine in (("dare_linear", "linear"), ("dare_ties", "ties")):
        yield Case(
            method,
            peft(method, weights=weights, density=0.5),
            lambda f, combine=combine: (
                dare(
                    f.base, f.models, kept=below(0.5, f), weights=weights, density=0.5, profile="peft", combine=combine
                ).delta
            ),
            five,
        )


def opcm_of_fusion(family: Family) -> Tensors:
    """Return OPCM by fusion_bench's step, with the factor that makes the norm the mean of the norms."""
    clip = importlib.import_module("transformers.models.clip.modeling_clip")
    for name in ("CLIPVisionTransformer", "CLIPTextTransformer"):
        vars(clip).setdefault(name, object)  # transformers 5 has none; the step needs none
    from fusion_bench.method.opcm.opcm import OPCMForCLIP

    step = object.__new__(OPCMForCLIP)
    taus = [{name: torch.from_numpy(np.array(tau)) for name, tau in delta.items()} for delta in family.deltas]
    merged, step.previous_lambda_t = dict(taus[0]), 1.0
    for count in range(2, len(taus) + 1):
        step.lambda_t = 1.0
        total = {}
        for name, tau in taus[count - 1].items():
            kind = (
                step.merge_linear_weights if is_matrix(name, tau.numpy()) and tau.any() else step.merge_other_parameters
            )
            more = {"alpha": 0.5} if kind == step.merge_linear_weights else {}
            total[name] = kind(merged[name], torch.zeros_like(tau), tau, name, **more)
        size = torch.linalg.vector_norm(torch.cat([value.ravel() for value in total.values()]))
        norms = [torch.linalg.vector_norm(torch.cat([value.ravel() for value in own.values()])) for own in taus[:count]]
        step.previous_lambda_t = float(size / torch.stack(norms).mean())
        merged = {name: value / step.previous_lambda_t for name, value in total.items()}
    return {name: value.numpy() for name, value in merged.items()}


def consensus_of_fusion(family: Family) -> Tensors:
    """Return Consensus from fusion_bench's TALL masks, which compare whole weights."""
    module = importlib.import_module("fusion_bench.method.tall_mask.task_arithmetic")
    base = {name: torch.from_numpy(np.array(value)) for name, value in family.base.items()}
    models = [{name: torch.from_numpy(np.array(value)) for name, value in model.items()} for model in family.models]
    total = {name: sum(model[name] - value for model in models) for name, value in base.items()}
    multi = {name: value + total[name] for name, value in base.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        masks = [module.generate_task_masks(multi, model, base, tall_mask_lambda=0.4) for model in models]
    return {name: (value * (sum(mask[name] for mask in masks) >= 2)).numpy() for name, value in total.items()}


def regmean_of_fusion(family: Family) -> Tensors:
    """Return RegMean by fusion_bench, whose inverse needs a Gram matrix of full rank."""
    module = importlib.import_module("fusion_bench.method.regmean.regmean")
    own = [
        {name.removesuffix(".weight"): torch.from_numpy(gram) for name, gram in each.items()}
        for each in families.grams(3, family)
    ]
    taus = {name: [torch.from_numpy(np.array(delta[name])) for delta in family.deltas] for name in family.base}
    torch.set_default_dtype(torch.float64)
    found = module.merging_with_regmean_weights(taus, own, reduce_non_diagonal_ratio=0.9)
    torch.set_default_dtype(torch.float32)
    return {name: value.numpy() for name, value in found.items()}


def cases_of_fusion_bench() -> Iterator[Case]:
    """Yield fusion_bench's matrix methods, EMR, MagMax, Consensus and RegMean."""
    three = families.smooth(4, 3)
    moved = without(three, FROZEN)
    narrow = dict.fromkeys(NARROW, "a matrix of width 1 is a vector here")
    yield Case(
        "iso_c",
        fusion("isotropic_merging.iso_utils", "iso_c", accelerator="cpu"),
        lambda f: iso_c(f.base, f.models).delta,
        three,
        differs=narrow,
    )
    yield Case(
        "iso_cts",
        fusion("isotropic_merging.iso_utils", "iso_cts", 0.5, accelerator="cpu"),
        lambda f: iso_cts(f.base, f.models, common=0.5).delta,
        moved,
        differs=narrow,
    )
    yield Case(
        "tsv",
        fusion("task_singular_vector.utils.TSVM_utils", "compute_and_sum_svd_mem_reduction", accelerator="cpu"),
        lambda f: tsv(f.base, f.models).delta,
        three,
        differs=dict.fromkeys(NARROW, "k = int(1 / 3) = 0 there, a vector here"),
    )
    yield Case(
        "wudi",
        fusion("wudi.wudi", "wudi_merging", accelerator="cpu"),
        lambda f: wudi(f.base, f.models).delta,
        moved,
        differs=narrow,
    )
    yield Case("opcm", opcm_of_fusion, lambda f: opcm(f.base, f.models).delta, three)
    grid = families.checkpoints(5, 4)
    yield Case("magmax", fusion("magmax.magmax", "_magmax_select"), lambda f: magmax(f.base, f.models).delta, grid)
    yield Case("consensus", consensus_of_fusion, lambda f: consensus(f.base, f.models).delta, grid)
    yield Case(
        "regmean",
        regmean_of_fusion,
        lambda f: regmean(f.base, f.models, grams=families.grams(3, f)).delta,
        without(three, FROZEN),
        1e-9,
    )
    yield Case("emr", fusion("emr_merging.utils", "emr_merge"), lambda f: emr(f.base, f.models).delta, grid)


PACKAGES: dict[str, Sequence[Callable[[], Iterator[Case]]]] = {
    "mergekit": (cases_of_spheres, cases_of_elections, cases_of_tensors),
    "peft": (cases_of_peft,),
    "fusion_bench": (cases_of_fusion_bench,),
}


def main() -> int:
    """Run every case whose implementation is installed; return how many fail."""
    failures = 0
    for package, sources in PACKAGES.items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            print(f"{package}: not installed ({error})")
            continue
        failures += sum(not verdict(package, case) for cases in sources for case in cases())
    return failures


def verdict(package: str, case: Case) -> bool:
    """Print how far both sides are apart; return whether that is as the case says."""
    theirs, ours = case.theirs(case.family), case.ours(case.family)
    worst, wrong = 0.0, []
    for name, value in ours.items():
        size = max(np.abs(value).max(initial=0.0), np.abs(theirs[name]).max(initial=0.0), 1e-9)
        apart = float(np.abs(value - theirs[name]).max(initial=0.0) / size)
        apart = 1.0 if not np.isfinite(apart) else apart
        if (apart > case.tolerance) != (name in case.differs):
            wrong.append(f"{name} ({apart:.1e})")
        elif name not in case.differs:
            worst = max(worst, apart)
    reasons = [*sorted(set(case.differs.values())), *([case.note] if case.note else [])]
    print(f"{package:13}{case.name:28}{worst:9.1e}  {'; '.join(reasons)}")
    for line in wrong:
        print(f"{'':13}not as expected: {line}")
    return not wrong


if __name__ == "__main__":
    sys.exit(main())
