"""Every oracle that takes any number of checkpoints, with usual parameters and with what it promises."""

from collections.abc import Callable
from typing import NamedTuple

from tests.tools.oracles import families
from tests.tools.oracles.adapters import knots
from tests.tools.oracles.breadcrumbs import breadcrumbs
from tests.tools.oracles.cabs import cabs
from tests.tools.oracles.coefficients import metagpt, nan
from tests.tools.oracles.consensus import consensus
from tests.tools.oracles.della import della
from tests.tools.oracles.electing import dare, ties
from tests.tools.oracles.elements import magmax, negmerge, ram
from tests.tools.oracles.emr import emr
from tests.tools.oracles.families import Family
from tests.tools.oracles.fisher import fisher
from tests.tools.oracles.iso import iso_c, iso_cts
from tests.tools.oracles.layers import lines
from tests.tools.oracles.model_stock import model_stock
from tests.tools.oracles.opcm import opcm
from tests.tools.oracles.pcb import pcb
from tests.tools.oracles.protocol import Flags, Merged
from tests.tools.oracles.regmean import regmean
from tests.tools.oracles.sce import sce
from tests.tools.oracles.spherical import karcher, multislerp
from tests.tools.oracles.star import star
from tests.tools.oracles.tsv import tsv
from tests.tools.oracles.twin import twin
from tests.tools.oracles.wudi import wudi


class Entry(NamedTuple):
    """An oracle and the laws it obeys."""

    run: Callable[[Family], Merged]
    alone: bool = False
    """One model gives that model."""
    same: bool = False
    """Identical models give that model."""
    permutes: bool = True
    """The order of the models does not matter."""
    scales: bool = True
    """Deltas twice as large give a merged delta twice as large."""


def _kept(family: Family) -> list[dict[str, Flags]]:
    return [{name: draw < 0.5 for name, draw in own.items()} for own in families.draws(5, family)]


ORACLES: dict[str, Entry] = {
    "multislerp": Entry(lambda f: multislerp(f.base, f.models), True, True),
    "karcher": Entry(lambda f: karcher(f.base, f.models), True, True),
    "model_stock": Entry(lambda f: model_stock(f.base, f.models), True, True),
    "model_stock_filters": Entry(lambda f: model_stock(f.base, f.models, filter_wise=True), True, True),
    "ties_exact": Entry(lambda f: ties(f.base, f.models, at_threshold="exact")),
    "ties_mergekit": Entry(lambda f: ties(f.base, f.models, density=0.3, profile="mergekit")),
    "ties_mergekit_rescaled": Entry(lambda f: ties(f.base, f.models, profile="mergekit", rescale=True)),
    "ties_peft": Entry(lambda f: ties(f.base, f.models, density=0.3, profile="peft")),
    "ties_untrimmed": Entry(lambda f: ties(f.base, f.models, density=1.0), True, True),
    "dare_mergekit": Entry(
        lambda f: dare(f.base, f.models, kept=_kept(f), density=0.5, profile="mergekit"), permutes=False
    ),
    "dare_peft": Entry(
        lambda f: dare(f.base, f.models, kept=_kept(f), density=0.5, profile="peft", combine="ties"), permutes=False
    ),
    "breadcrumbs": Entry(lambda f: breadcrumbs(f.base, f.models, density=0.6, gamma=0.1)),
    "breadcrumbs_rows": Entry(lambda f: breadcrumbs(f.base, f.models, density=0.6, gamma=0.1, scope="row")),
    "della": Entry(
        lambda f: della(f.base, f.models, draws=families.draws(1, f), density=0.5, epsilon=0.2), permutes=False
    ),
    "sce": Entry(lambda f: sce(f.base, f.models, select_topk=0.5), True, True),
    "cabs": Entry(lambda f: cabs(f.base, f.models, n=2, m=8), permutes=False),
    "emr": Entry(lambda f: emr(f.base, f.models), True, True),
    "consensus": Entry(lambda f: consensus(f.base, f.models, agree=1), True),
    "pcb": Entry(lambda f: pcb(f.base, f.models, ratio=0.3), scales=False),
    "magmax": Entry(lambda f: magmax(f.base, f.models), True, True, permutes=False),
    "negmerge": Entry(lambda f: negmerge(f.base, f.models, lambda_=-1.0), True, True),
    "ram": Entry(lambda f: ram(f.base, f.models, epsilon=0.0), True, True),
    "ram_plus": Entry(lambda f: ram(f.base, f.models, epsilon=0.0, plus=True), True, True),
    "lines": Entry(lambda f: lines(f.base, f.models, beta=0.0), True, True),
    "metagpt": Entry(lambda f: metagpt(f.base, f.models), True, True),
    "nan": Entry(lambda f: nan(f.base, f.models), True, True),
    "tsv": Entry(lambda f: tsv(f.base, f.models), True),
    "iso_c": Entry(lambda f: iso_c(f.base, f.models)),
    "iso_cts": Entry(lambda f: iso_cts(f.base, f.models)),
    "wudi": Entry(lambda f: wudi(f.base, f.models, steps=20), True, scales=False),
    "wudi_closed": Entry(lambda f: wudi(f.base, f.models, steps=None), True, True),
    "opcm": Entry(lambda f: opcm(f.base, f.models), True, permutes=False),
    "star": Entry(lambda f: star(f.base, f.models)),
    "star_whole": Entry(lambda f: star(f.base, f.models, eta=100.0), True, True),
    "twin": Entry(lambda f: twin(f.base, f.models, lambda_=1.0), True),
    "fisher": Entry(lambda f: fisher(f.base, f.models, importances=families.importances(2, f)), True, permutes=False),
    "fisher_equal": Entry(
        lambda f: fisher(f.base, f.models, importances=families.importances(2, f)[:1] * len(f.models), floored="all"),
        True,
        True,
    ),
    "regmean": Entry(lambda f: regmean(f.base, f.models, grams=families.grams(3, f)), True, True, permutes=False),
    "knots": Entry(lambda f: knots(f.base, f.models, cut=None), True),
}  # fmt: skip
