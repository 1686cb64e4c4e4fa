import pytest

from ties_ray.libraries.weight_files import candidates, choose, others, usual

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def names_of(*names: str) -> list[tuple[str, str, str, int]]:
    return [(one.stem, one.variant, one.index, len(one.files)) for one in candidates(names)]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["config.json"], []),
        ([".model.safetensors"], []),
        (["model.safetensors"], [("model", "", "", 1)]),
        ([*SHARDS, INDEX], [("model", "", INDEX, 2)]),
        (list(SHARDS), [("model", "", "", 2)]),
        (["layer-1.safetensors", "layer-2.safetensors", INDEX],
         [("model", "", INDEX, 0), ("layer-1", "", "", 1), ("layer-2", "", "", 1)]),
        (["model.fp16.safetensors", "model.safetensors"], [("model", "fp16", "", 1), ("model", "", "", 1)]),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors",
          "model.safetensors.index.fp16.json"], [("model", "fp16", "model.safetensors.index.fp16.json", 2)]),
        (["diffusion_pytorch_model-00001-of-00001.fp16.safetensors"], [("diffusion_pytorch_model", "fp16", "", 1)]),
        (["diffusion_pytorch_model.non_ema.safetensors"], [("diffusion_pytorch_model", "non_ema", "", 1)]),
        (["sd_xl_base_1.0.safetensors"], [("sd_xl_base_1.0", "", "", 1)]),
        (["adapter_model.safetensors"], [("adapter_model", "", "", 1)]),
        (["consolidated.00.safetensors"], [("consolidated", "00", "", 1)]),
    ],
)  # fmt: skip
def test_files_that_belong_together_are_one_candidate(names: list[str], found: list[object]) -> None:
    assert names_of(*names) == found


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model.safetensors", "consolidated.safetensors"], "model.safetensors"),
        (["model.safetensors", "open_clip_model.safetensors"], "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        (["any.safetensors"], "any.safetensors"),
        (["any.safetensors", "model.safetensors"], "model.safetensors"),
        (["a.safetensors", "b.safetensors"], None),
        (["model.fp16.safetensors", "model.bf16.safetensors"], None),
        (["consolidated.00.safetensors", "consolidated.01.safetensors"], None),
        ([], None),
        ([*SHARDS, INDEX, "model.safetensors"], INDEX),
        ([*SHARDS, "model.safetensors"], "model.safetensors"),
    ],
)
def test_the_usual_one_is_what_a_library_opens(names: list[str], taken: str | None) -> None:
    found = usual(candidates(names))
    assert (found and found.name) == taken


@pytest.mark.parametrize(
    ("file", "variant", "taken"),
    [
        ("ema.safetensors", None, "ema.safetensors"),
        (SHARDS[1], None, SHARDS[0]),
        (None, "fp16", "model.fp16.safetensors"),
        ("model.fp16.safetensors", "fp16", "model.fp16.safetensors"),
        ("model.fp16.safetensors", "bf16", None),
        (None, "bf16", None),
        ("gone.safetensors", None, None),
    ],
)
def test_a_recipe_chooses_by_file_or_variant(file: str | None, variant: str | None, taken: str | None) -> None:
    every = candidates([*SHARDS, "ema.safetensors", "model.fp16.safetensors", "model.safetensors"])
    found = choose(every, file, variant)
    assert (found and found.name) == taken
    if found:
        left = {name for one in every for name in one.files} - others(every, found)
        assert left == set(found.files)


def test_an_index_may_name_files_of_any_name() -> None:
    aside = ["consolidated.safetensors", "e.safetensors.index.json"]
    every = candidates([INDEX, *SHARDS, "mtp.safetensors", "model.safetensors", *aside])
    kept = choose(every, INDEX, None)
    assert kept
    assert others(every, kept) == set(aside)


def test_shards_that_are_missing_are_named() -> None:
    (found,) = candidates(["m-00001-of-00003.safetensors", "m-00003-of-00003.safetensors"])
    assert found.missing == ("m-00002-of-00003.safetensors",)
    assert candidates(["m.safetensors"])[0].missing == ()
