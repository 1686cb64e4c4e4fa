from pathlib import Path

import numpy as np
import pytest

from tests.tools.oracles import held
from tests.tools.oracles.families import Family
from tests.tools.oracles.layers import lines
from tests.tools.oracles.protocol import Merged
from ties_ray.layers import Layer, layer_of
from ties_ray.methods.lines import Lines
from ties_ray.testing import MethodContract

WEIGHTS = [1.0, 2.0, 0.5, 0.3, -1.2]


class TestLines(MethodContract):
    @pytest.fixture
    def method(self) -> Lines:
        return Lines(beta=0.5)


def weighted(family: Family) -> Merged:
    deltas = family.deltas
    total = {
        name: np.sum([weight * delta[name] for weight, delta in zip(WEIGHTS, deltas, strict=True)], axis=0)
        for name in deltas[0]
    }
    return lines(family.base, family.models, beta=0.5, merged=total)


def test_the_merge_is_the_oracles() -> None:
    held.check(Lines(beta=0.5), lambda family: lines(family.base, family.models, beta=0.5))
    held.check(Lines(beta=0.5, alpha=0.1), lambda family: lines(family.base, family.models, beta=0.5, alpha=0.1))
    held.check(Lines(), lambda family: lines(family.base, family.models, beta=1 - 1 / len(family.models)))


def test_a_merge_from_files_to_files_is_the_oracles(tmp_path: Path) -> None:
    method = {"name": "lines", "beta": 0.5}
    held.check_stored(method, lambda family: lines(family.base, family.models, beta=0.5), tmp_path / "plain")
    held.check_stored(method, weighted, tmp_path / "weighted", weights=WEIGHTS)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.mlp.experts.3.down_proj.weight", Layer("model.layers", 11)),
        ("decoder.block.3.layer.1.layer_norm.weight", Layer("decoder.block", 3)),
        ("h.0.attn.c_attn.weight", Layer("h", 0)),
        ("visual.transformer.resblocks.5.ln_1.bias", Layer("visual.transformer.resblocks", 5)),
        ("model.experts.4.weight", None),
        ("model.embed_tokens.weight", None),
    ],
)
def test_the_number_after_a_name_of_layers_is_the_layer(name: str, layer: Layer | None) -> None:
    assert layer_of(name) == layer
