import pytest

from ties_ray.inputs.spelling import Spelling, other_spellings

LAYERS = ("layers.0.q.weight", "layers.1.q.weight")


def told(prefix: str, *names: str, base: str = "model.") -> dict[str, str]:
    return {base + name: prefix + name for name in names or LAYERS}


HEAD = {"lm_head.weight": "lm_head.weight"}
ALIKE = [
    ([told("model."), told("")], "model.layers.9.v.weight", "model.layers.9.v.weight"),
    ([told(""), told(""), told("model.")], "model.layers.0.q.weight", "model.layers.0.q.weight"),
    ([told("") | HEAD, told("", "layers.3.v.weight")], "model.layers.5.k.weight", "layers.5.k.weight"),
    ([told("") | HEAD], "lm_head.weight", "lm_head.weight"),
    ([told("", "layers.0.q.weight"), told("model.", "embed.weight")], "model.embed.weight", "model.embed.weight"),
    (
        [told("transformer.", base=""), told("transformer.", "wte.weight", base="")],
        "ln.weight",
        "transformer.ln.weight",
    ),
    ([told("transformer.", base=""), told("", "wte.weight", base="")], "wte.weight", "transformer.wte.weight"),
    ([told("model.lm."), told("model.lm."), told("model.")], "model.layers.1.q.weight", "model.lm.layers.1.q.weight"),
    ([], "model.layers.0.q.weight", "model.layers.0.q.weight"),
]


@pytest.mark.parametrize(("models", "name", "wanted"), ALIKE)
def test_a_merged_adapter_spells_all_modules_in_one_way(models: list[dict[str, str]], name: str, wanted: str) -> None:
    assert Spelling(models)(name) == wanted


OTHERS = [
    ([["layers.0.q.weight"], ["model.layers.0.q.weight"]], {0}),
    ([["layers.0.q.weight"], ["layers.0.q.weight"], ["model.layers.0.q.weight"]], {2}),
    ([["model.language_model.layers.0.q.weight"], ["language_model.model.layers.0.q.weight"]], {0}),
    ([["bert.encoder.layer.0.q.weight"], ["encoder.layer.0.q.weight"]], {1}),
    ([["encoder.block.0.q.weight"], ["decoder.block.0.q.weight"]], set()),
    ([["layers.0.q.weight", "model.layers.0.q.weight"], ["layers.0.q.weight"]], set()),
    ([["layers.0.q.weight"], ["layers.0.v.weight"]], set()),
    ([["lm_head.weight"], ["model.lm_head.weight"]], {0}),
]


@pytest.mark.parametrize(("models", "wanted"), OTHERS)
def test_two_spellings_of_one_module_are_seen_without_a_base(models: list[list[str]], wanted: set[int]) -> None:
    found = other_spellings(models)
    assert found.keys() == wanted
    assert all(name in models[number] and usual not in models[number] for number, (name, usual) in found.items())
