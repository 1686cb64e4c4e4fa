import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import pytest
import safetensors.torch
import torch

from tests.tools.families import CONFIG, file_bytes
from ties_ray.formats import Account, Aside, Contents, Format, Rules
from ties_ray.formats._checkpoint_names import tied
from ties_ray.formats.checkpoint import Checkpoint
from ties_ray.libraries.library import TRANSFORMERS
from ties_ray.safetensors import MERGEABLE
from ties_ray.tensors import Parameter, Source, TensorRef
from ties_ray.testing import FormatContract, folder_of

Config = Mapping[str, object]
BASE = {
    "model.embed_tokens.weight": torch.zeros(4, 2, dtype=torch.bfloat16),
    "model.norm.weight": torch.zeros(2, dtype=torch.bfloat16),
    "model.ids": torch.arange(3),
}
TIED = {**CONFIG, "tie_word_embeddings": True}


def files_of(tensors: Mapping[str, torch.Tensor], config: Config = CONFIG) -> dict[str, bytes]:
    return {"config.json": json.dumps(config).encode(), "model.safetensors": file_bytes(tensors)}


def sharded(*shards: Mapping[str, torch.Tensor], **weight_map: object) -> dict[str, bytes]:
    """Return a checkpoint of several files; `weight_map` replaces entries of the index."""
    files = {f"model-{number}.safetensors": tensors for number, tensors in enumerate(shards)}
    index = {name: file for file, tensors in files.items() for name in tensors}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps({"weight_map": {**index, **weight_map}}).encode(),
        **{file: file_bytes(tensors) for file, tensors in files.items()},
    }


def read(
    files: dict[str, bytes],
    base: dict[str, Parameter] | None = None,
    rules: Rules = Rules(),  # noqa: B008
    *,
    same: bool = True,
) -> Contents:
    """Return what the format makes of a folder; same: the answer to questions about the base's bytes."""
    form, folder = Checkpoint(), folder_of(Checkpoint(), files)
    stored = {
        name: one for file in form.weight_files(folder) for name, one in safetensors.torch.load(files[file]).items()
    }
    asked = form.questions(folder, base, rules)
    answers = {one: same if one.of == "base" else torch.equal(stored[one.mine], stored[one.other]) for one in asked}
    return form.read(replace(folder, answers=answers), base, rules)


def base_of(
    tensors: Mapping[str, torch.Tensor] = BASE, config: Config = CONFIG, exclude: tuple[str, ...] = ()
) -> dict[str, Parameter]:
    found = read(files_of(tensors, config), None, Rules(exclude=exclude))
    assert found.problems == ()
    refs = {name: source.tensors[0] for name, source in found.sources.items()}
    return {
        name: Parameter(name, ref.shape, ref.dtype, ref.dtype in MERGEABLE and name not in exclude)
        for name, ref in refs.items()
    }


def problems(found: Contents) -> list[str]:
    return [str(problem) for problem in found.problems]


class TestCheckpoint(FormatContract):
    TENSORS: ClassVar = {
        "a.weight": torch.randn(20, 21, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
        "b.weight": torch.randn(7, generator=torch.Generator().manual_seed(2)),
        "double": torch.tensor([1.5, -0.0], dtype=torch.float64),
        "scalar": torch.tensor(3.0, dtype=torch.float16),
        "empty": torch.zeros(0, 5),
    }

    @pytest.fixture
    def format(self) -> Format:
        return Checkpoint()

    @pytest.fixture
    def files(self) -> dict[str, bytes]:
        names = sorted(self.TENSORS)
        return sharded(
            {name: self.TENSORS[name] for name in names[:2]}, {name: self.TENSORS[name] for name in names[2:]}
        )

    @pytest.fixture
    def parameters(self) -> dict[str, Parameter]:
        return base_of(self.TENSORS)

    @pytest.fixture
    def expected(self) -> dict[str, torch.Tensor]:
        return {name: tensor.reshape(-1) for name, tensor in self.TENSORS.items()}


def test_an_aligned_slice_is_not_copied() -> None:
    source = Source((TensorRef(0, 4096, "BF16", (4,)),))
    buffer = torch.arange(8, dtype=torch.uint8)
    assert Checkpoint().encoded(source, 0, 4, [buffer]).data.data_ptr() == buffer.data_ptr()
    assert Checkpoint().encoded(source, 0, 0, ()).data.dtype == torch.bfloat16


def test_kernels_get_aligned_numbers() -> None:
    source = Source((TensorRef(0, 4096, "F32", (2,)),))
    for offset in range(4):
        buffer = torch.frombuffer(bytearray(16), dtype=torch.uint8, offset=offset)[:8]
        assert Checkpoint().encoded(source, 0, 2, [buffer]).data.data_ptr() % 4 == 0


def test_the_account_of_a_base_tells_what_is_merged_copied_and_tied() -> None:
    head = {"lm_head.weight": BASE["model.embed_tokens.weight"]}
    assert read(files_of({**BASE, **head}, TIED)).account == Account(stored=21, merged=10, equal=3, tied=8)


def test_the_base_gives_every_tensor_in_the_order_of_files_and_offsets() -> None:
    found = read(sharded({"z": torch.zeros(2), "i": torch.arange(2)}, {"a": torch.zeros(1)}))
    assert list(found.sources) == ["i", "z", "a"]
    assert found.sources["a"].tensors[0] == TensorRef(1, 4096, "F32", (1,))
    assert [pin.uri for pin in found.objects] == [f"memory://model/model-{number}.safetensors" for number in (0, 1)]


def test_a_fine_tune_may_lack_the_bases_integers_and_store_other_float_widths() -> None:
    model = {"model.embed_tokens.weight": torch.zeros(4, 2), "model.norm.weight": torch.zeros(2, dtype=torch.float64)}
    found = read(files_of(model), base_of())
    assert problems(found) == []
    assert found.notes == ()
    assert {name: source.tensors[0].dtype for name, source in found.sources.items()} == {
        "model.norm.weight": "F64",
        "model.embed_tokens.weight": "F32",
    }


def test_integers_that_the_base_lacks_are_left_aside_with_a_note() -> None:
    found = read(files_of({**BASE, "model.new_ids": torch.arange(2)}), base_of())
    assert "model.new_ids" not in found.sources
    assert found.notes == ("memory://model: left aside, the base has no such tensors: model.new_ids",)


def test_a_float_that_the_base_lacks_is_refused_unless_it_is_excluded() -> None:
    files = files_of({**BASE, "score.weight": torch.zeros(2)})
    assert problems(read(files, base_of())) == [
        "memory://model: holds 1 floating-point tensors that the base lacks (among them a head for one task):"
        ' score.weight; is it a fine-tune of this base? `exclude: ["score.weight"]` leaves them out of the merge,'
        " with what was trained in them"
    ]
    found = read(files, base_of(), Rules(exclude=("score.*",)))
    assert (problems(found), "score.weight" in found.sources) == ([], False)
    assert found.notes == ("memory://model: left aside, excluded, and not in the base: score.weight",)
    assert found.excluded == ("score.weight",)


def test_a_missing_float_is_refused_unless_it_is_allowed_or_excluded() -> None:
    files = files_of({"model.norm.weight": BASE["model.norm.weight"]})
    assert problems(read(files, base_of())) == [
        "memory://model: lacks 1 of the base's 2 merged parameters: model.embed_tokens.weight; is it a fine-tune of"
        ' this base? `allow: {missing: zero}` takes their change as zero; `exclude: ["model.embed_tokens.weight"]`'
        " copies the base's, without what the models trained in them"
    ]
    allowed = read(files, base_of(), Rules(missing=True))
    assert (list(allowed.sources), len(allowed.notes)) == (["model.norm.weight"], 1)
    assert "whose change is taken as zero: model.embed_tokens.weight" in allowed.notes[0]
    assert read(files, base_of(exclude=("model.embed_tokens.weight",))).problems == ()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 3), "another shape: model.embed_tokens.weight [4, 3] where the base has [4, 2]"),
        ((3, 2), "another shape: model.embed_tokens.weight [3, 2]"),
        ((7, 2), "another shape: model.embed_tokens.weight [7, 2]"),
        ((2, 4), "another shape: model.embed_tokens.weight [2, 4]"),
        ((8,), "another shape: model.embed_tokens.weight [8]"),
        ((6, 2), "more embedding rows than the base: model.embed_tokens.weight [6, 2] where the base has [4, 2]"),
    ],
)
def test_another_shape_is_refused(shape: tuple[int, ...], message: str) -> None:
    model = {**BASE, "model.embed_tokens.weight": torch.zeros(shape)}
    (problem,) = problems(read(files_of(model, {**CONFIG, "vocab_size": 6}), base_of()))
    assert message in problem


def test_extra_embedding_rows_are_dropped_where_that_is_allowed() -> None:
    model = {**BASE, "model.embed_tokens.weight": torch.arange(12.0).reshape(6, 2)}
    files = files_of(model, {**CONFIG, "vocab_size": 6})
    found = read(files, base_of(), Rules(extra_rows=True))
    assert (problems(found), found.extra_rows) == ([], ("model.embed_tokens.weight",))
    assert "rows beyond the base's are left aside" in found.notes[0]
    (whole,) = Checkpoint().reads(found.sources["model.embed_tokens.weight"], 0, 8)
    data = files["model.safetensors"][whole.start : whole.stop]
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == list(range(8))


def test_integers_in_the_place_of_floats_are_refused() -> None:
    base = {**BASE, "model.table": torch.zeros(2)}
    (problem,) = problems(read(files_of({**base, "model.table": torch.zeros(2).int()}), base_of(base)))
    assert "integers where the base holds floating-point numbers: model.table (I32 where the base has F32)" in problem
    for name in BASE.keys() - {"model.ids"}:
        (problem,) = problems(read(files_of({**BASE, name: BASE[name].int()}), base_of()))
        assert f"holds integers or 8-bit floats as weights, 1 tensors: {name} [quantised]" in problem


@pytest.mark.parametrize("as_base", [True, False])
def test_8_bit_floats_are_refused_by_name_and_reason(as_base: bool) -> None:
    model = {**BASE, "model.norm.weight": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    (problem,) = problems(read(files_of(model), None if as_base else base_of()))
    assert "stores 1 tensors as F8_E4M3, and 8-bit floats mean nothing without the scales" in problem
    assert "model.norm.weight" in problem


PACKED = {
    "model.q.qweight": torch.ones(2, 2, dtype=torch.int32), "model.q.qzeros": torch.ones(2, 1, dtype=torch.int32),
    "model.q.scales": torch.ones(2, 2, dtype=torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("as_base", [True, False])
def test_a_quantised_model_is_refused_by_its_method_and_what_announces_it(as_base: bool) -> None:
    base = None if as_base else base_of()
    files = {**files_of({**BASE, **PACKED}), "quant_config.json": b"{}"}
    (problem,) = problems(read(files, base))
    assert problem == (
        "memory://model: holds weights quantised by AWQ, 3 tensors (quant_config.json lies beside the weights):"
        " model.q.qweight, model.q.qzeros, model.q.scales [quantised];"
        " give the unquantised model, or dequantise this one and save it again"
    )
    assert read(files, base, Rules(exclude=("model.q.*",))).problems == ()


def test_plain_weights_whose_config_still_announces_quantised_ones_are_merged() -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    for base in (None, base_of()):
        found = read(files_of(BASE, config), base)
        assert (problems(found), found.leftovers) == ([], ("quantization_config",))
        assert found.notes == (
            "memory://model: quantization_config in config.json is left over: no weight is quantised",
        )
    kept = read(files_of({**BASE, **PACKED}, config), None, Rules(exclude=("model.q.*",)))
    assert (problems(kept), kept.leftovers) == ([], ())


def test_integers_that_differ_from_the_bases_are_refused_unless_they_are_excluded() -> None:
    (problem,) = problems(read(files_of(BASE), base_of(), same=False))
    assert problem == (
        "memory://model: has 1 tensors of integers or booleans that differ from the base's: model.ids;"
        " they can't be merged; `exclude: [\"model.ids\"]` copies the base's, without what the models trained in them"
    )
    for other in (torch.arange(4), torch.arange(3).int(), torch.arange(3).float()):
        assert (
            "differ from the base's: model.ids" in problems(read(files_of({**BASE, "model.ids": other}), base_of()))[0]
        )
    excluded = read(files_of(BASE), base_of(exclude=("model.ids",)), Rules(exclude=("model.ids",)), same=False)
    assert (problems(excluded), excluded.notes) == ([], ())
    assert excluded.account.aside == (Aside("excluded by the recipe", 1, 3),)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_mask_of_bytes_is_the_same_mask_of_booleans(swapped: bool) -> None:
    mask = torch.tensor([True, False, True])
    base, model = (mask, mask.to(torch.uint8))[:: -1 if swapped else 1]
    found = read(files_of({**BASE, "mask": model}), base_of({**BASE, "mask": base}))
    assert (problems(found), found.account.equal) == ([], 3 + 3)


def test_counters_of_a_training_may_differ_and_the_bases_are_kept() -> None:
    base = {**BASE, "norm.num_batches_tracked": torch.tensor(3), "steps": torch.tensor([5])}
    found = read(files_of(base), base_of(base, exclude=("model.ids",)), Rules(exclude=("model.ids",)), same=False)
    assert problems(found) == []
    counters = "norm.num_batches_tracked, steps"
    assert found.notes == (f"memory://model: counts the steps of its training, and the base's are kept: {counters}",)
    assert Aside("a counter of the training", 2, 2) in found.account.aside
    for name, value in (("steps", torch.arange(2)), ("vocabulary", torch.tensor(3))):  # a table, and no counter
        base = {**BASE, name: value}
        assert name in problems(read(files_of(base), base_of(base), same=False))[0]


def test_fewer_embedding_rows_are_refused_unless_the_others_may_stay_as_they_are() -> None:
    model = {**BASE, "model.embed_tokens.weight": torch.arange(6.0).reshape(3, 2)}
    files = files_of(model, {**CONFIG, "vocab_size": 3})
    (problem,) = problems(read(files, base_of()))
    assert "fewer embedding rows than the base: model.embed_tokens.weight [3, 2] where the base has [4, 2]" in problem
    assert problem.endswith(
        "`allow: {missing: zero}` takes the change of the other rows as zero where the tokenizers agree"
    )
    found = read(files, base_of(), Rules(missing=True))
    assert (problems(found), found.extra_rows) == ([], ("model.embed_tokens.weight",))
    assert "rows that it lacks are the base's, their change is zero" in found.notes[0]
    source = found.sources["model.embed_tokens.weight"]
    assert [read.stop - read.start for read in Checkpoint().reads(source, 4, 8)] == [8]
    assert Checkpoint().reads(source, 6, 8) == ()
    assert Checkpoint().encoded(source, 6, 8, ()).data.numel() == 0


NAMES = ("model.norm.weight", "model.ids", "model.mask", "model.embed_tokens.weight", "lm_head.weight", "v_head.weight",
         "model.num_updates", "model.extra_ids", "model.empty")  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_every_stored_value_has_one_fate_whatever_is_stored(seed: int) -> None:
    draw = random.Random(seed)

    def tensor(name: str) -> torch.Tensor:
        if name == "model.empty":
            return torch.zeros(0, 2)
        if "ids" in name:
            return torch.arange(3)
        if "mask" in name or "num" in name:
            return torch.tensor([True]) if "mask" in name else torch.tensor(seed)
        rows = draw.choice([4, 4, 4, 3, 6]) if name in ("model.embed_tokens.weight", "lm_head.weight") else 4
        return torch.full((rows, 2), draw.choice([0.5, 2.0]), dtype=draw.choice([torch.bfloat16, torch.float32]))

    exclude = tuple(draw.sample([*NAMES, "*.weight", "model.*"], draw.choice([0, 1, 2])))
    config = {**CONFIG, "tie_word_embeddings": draw.random() < 0.5, "vocab_size": draw.choice([3, 6])}
    stored = {name: tensor(name) for name in draw.sample(NAMES, draw.randint(4, len(NAMES)))}
    rules = Rules(exclude=exclude, missing=True, extra_rows=True)
    of_base = read(files_of({name: tensor(name) for name in NAMES[:5]}, {**config, "vocab_size": 4}), None, rules)
    base = {
        name: Parameter(name, ref.shape, ref.dtype, ref.dtype in MERGEABLE and not rules.excludes(name))
        for name, source in of_base.sources.items()
        for ref in source.tensors
    }
    found = read(files_of(stored, config), base, rules)
    assert of_base.account.adds_up
    if not found.problems:
        assert found.account.adds_up
        assert found.account.stored == sum(one.numel() for one in stored.values())
        refs = {ref for source in found.sources.values() for ref in source.tensors}
        beyond = sum(aside.elements for aside in found.account.aside if aside.reason.startswith("rows beyond"))
        assert found.account.merged == sum(math.prod(ref.shape) for ref in refs) - beyond


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((9, 2, 3), True), ((4, 2, 3), True), ((4, 5, 3), False), ((4, 2, 5), False), ((8, 3), False), ((24,), False)],
)
def test_a_parameter_by_token_may_have_other_rows_and_no_other_shape(shape: tuple[int, ...], fits: bool) -> None:
    base, rules = {**BASE, "by_token": torch.zeros(4, 2, 3)}, Rules(by_token=("by_token", "model.norm.weight"))
    found = read(files_of({**base, "by_token": torch.zeros(shape)}), base_of(base), rules)
    assert (problems(found) == []) == fits
    scalar = {**BASE, "by_token": torch.tensor(1.0)}
    assert problems(read(files_of({**scalar, "by_token": torch.zeros(1)}), base_of(scalar), rules))


@pytest.mark.parametrize("pattern", ["model.extra", "backbone.model.extra"])
def test_a_pattern_excludes_a_tensor_by_its_stored_name_and_by_the_bases(pattern: str) -> None:
    model = {f"backbone.{name}": tensor for name, tensor in {**BASE, "model.extra": torch.zeros(2)}.items()}
    found = read(files_of(model), base_of(), Rules(exclude=(pattern,)))
    assert (problems(found), found.excluded) == ([], ("backbone.model.extra",))
    assert problems(read(files_of(model), base_of()))


@pytest.mark.parametrize("empty", ["model.a", "model.z"])
def test_a_tensor_without_elements_at_the_place_of_another_takes_none_of_its_elements(empty: str) -> None:
    tensors = {empty: torch.zeros(0, 2), **BASE}
    found = read(files_of(tensors), base_of(tensors))
    assert problems(found) == []
    assert found.account.adds_up
    assert {aside.elements for aside in found.account.aside} <= {0}


def test_other_numbers_are_copied_where_they_are_excluded() -> None:
    odd = {"a": torch.zeros(2, dtype=torch.complex64), "b": torch.zeros(2).to(torch.float8_e5m2)}
    (told, _) = problems(read(files_of({**BASE, **odd})))
    assert told.endswith(
        """real numbers: a; `exclude: ["a"]` copies the base's, without what the models trained in them"""
    )
    for base in (None, base_of({**BASE, **odd}, exclude=("a", "b"))):
        assert base is not None or len(problems(read(files_of({**BASE, **odd})))) == 2
        found = read(files_of({**BASE, **odd}), base, Rules(exclude=("a", "b")))
        assert problems(found) == []
        assert found.account.adds_up


def test_all_problems_of_a_model_are_told_at_once() -> None:
    model = {
        "model.norm.weight": torch.zeros(3),
        "extra": torch.zeros(1),
        "eight": torch.zeros(1).to(torch.float8_e4m3fn),
    }
    found = problems(read(files_of(model), base_of()))
    assert len(found) == 4
    for part in ("F8_E4M3", "that the base lacks: extra", "lacks 1 of", "another shape"):
        assert any(part in problem for problem in found), part


def test_a_tied_head_that_is_stored_twice_is_merged_once() -> None:
    head = {"lm_head.weight": BASE["model.embed_tokens.weight"]}
    found = read(files_of({**BASE, **head}, TIED))
    assert "lm_head.weight" not in found.sources
    assert found.notes == (
        "memory://model: lm_head.weight is tied to model.embed_tokens.weight: merged once, not written again",
    )
    assert "lm_head.weight" in read(files_of({**BASE, **head})).sources


def test_a_head_of_its_own_shape_is_not_tied() -> None:
    found = read(files_of({**BASE, "lm_head.weight": torch.zeros(5, 2)}, TIED))
    assert "lm_head.weight" in found.sources


@pytest.mark.parametrize(
    ("model_type", "embedding", "head"),
    [
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("bert", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("t5", "shared.weight", "decoder.embed_tokens.weight"),
        ("t5", "shared.weight", "lm_head.weight"),
    ],
)
def test_some_architectures_tie_without_saying_so(model_type: str, embedding: str, head: str) -> None:
    tensors = {embedding: torch.zeros(4, 2), head: torch.zeros(4, 2)}
    assert list(read(files_of(tensors, {"model_type": model_type})).sources) == [embedding]
    apart = read(files_of({**tensors, head: torch.ones(4, 2)}, {"model_type": model_type}))
    assert apart.untied == {head: embedding}
    assert apart.sources.keys() == {embedding, head}
    untied = {"model_type": "llama", "tie_word_embeddings": False}
    assert read(files_of(tensors, untied)).sources.keys() == {embedding, head}


def test_a_multimodal_config_ties_in_its_text_part() -> None:
    tensors = {"model.language_model.embed_tokens.weight": torch.zeros(4, 2), "lm_head.weight": torch.zeros(4, 2)}
    config = {"model_type": "any", "text_config": {"tie_word_embeddings": True}}
    assert list(read(files_of(tensors, config)).sources) == ["model.language_model.embed_tokens.weight"]


@pytest.mark.parametrize("config", [TIED, CONFIG, {**CONFIG, "tie_word_embeddings": False}])
def test_a_fine_tunes_equal_copy_is_merged_once_and_a_head_of_its_own_is_a_parameter(config: Config) -> None:
    model = {**BASE, "lm_head.weight": BASE["model.embed_tokens.weight"]}
    found = read(files_of(model, config), base_of(config=TIED))
    assert (problems(found), found.untied) == ([], {})
    assert found.notes == (
        "memory://model: lm_head.weight is tied to model.embed_tokens.weight, and holds the same: merged once",
    )
    found = read(files_of({**model, "lm_head.weight": torch.ones(4, 2)}, config), base_of(config=TIED))
    assert (problems(found), found.untied) == ([], {"lm_head.weight": "model.embed_tokens.weight"})
    assert "differs from model.embed_tokens.weight, to which the base ties it" in found.notes[0]
    assert found.sources["lm_head.weight"].tensors[0].dtype == "F32"
    found = read(
        files_of({**model, "lm_head.weight": torch.ones(4, 2)}, config), base_of(config=TIED), Rules(("lm_*",))
    )
    assert (problems(found), found.untied, found.excluded) == ([], {}, ("lm_head.weight",))


def test_the_head_of_a_tied_fine_tune_of_an_untied_base_is_its_embedding() -> None:
    base = base_of({**BASE, "lm_head.weight": torch.ones(4, 2)})
    found = read(files_of(BASE, TIED), base)
    assert problems(found) == []
    assert found.sources["lm_head.weight"] == found.sources["model.embed_tokens.weight"]
    assert "lm_head.weight is not stored, and is tied to model.embed_tokens.weight" in found.notes[0]
    assert found.account.adds_up, "what is used twice counts once"
    assert read(files_of(BASE, {"model_type": "any"}), base).sources == found.sources, "what is not said may be"
    untied = read(files_of(BASE, {**CONFIG, "tie_word_embeddings": False}), base)
    assert "lacks 1 of the base's 3 merged parameters (among them a head for one task): lm_head" in problems(untied)[0]


def test_only_a_config_that_ties_has_parameters_that_are_not_stored() -> None:
    assert tied(BASE, TIED) == [("lm_head.weight", "model.embed_tokens.weight")]
    assert tied(BASE, {**TIED, "tie_word_embeddings": False}) == []


def test_tensors_under_other_names_are_merged_and_noted() -> None:
    found = read(files_of({f"backbone.{name}": tensor for name, tensor in BASE.items()}), base_of())
    assert (problems(found), found.sources.keys()) == ([], {"model.embed_tokens.weight", "model.norm.weight"})
    assert "3 parameters are stored under other names: model.ids is backbone.model.ids, " in found.notes[0]


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._fsdp_wrapped_module."])
def test_a_base_and_a_model_lose_the_words_of_a_wrapper_and_it_is_noted(wrapper: str) -> None:
    files = files_of({f"{wrapper}{name}": tensor for name, tensor in BASE.items()})
    for found in (read(files), read(files, base_of())):
        assert (problems(found), found.sources.keys() >= {"model.embed_tokens.weight", "model.norm.weight"}) == (
            [],
            True,
        )
        assert not any(name.startswith(wrapper) for name in found.sources)
        assert f"names of a wrapper in training lose its words: {wrapper}model.ids" in found.notes[0]


def test_two_tensors_that_differ_by_a_wrapper_alone_keep_their_names() -> None:
    found = read(files_of({**BASE, "module.model.norm.weight": BASE["model.norm.weight"]}))
    assert {"module.model.norm.weight", "model.norm.weight"} <= found.sources.keys()


EXPERTS = {f"m.mlp.experts.{n}.{part}_proj.weight": torch.rand(3, 2) for n in range(2) for part in ("gate", "up")}
FUSED = torch.stack(
    [torch.cat([EXPERTS[f"m.mlp.experts.{n}.{part}_proj.weight"] for part in ("gate", "up")]) for n in (0, 1)]
)


def values(found: Contents, name: str, files: dict[str, bytes], start: int, stop: int) -> torch.Tensor:
    form, source = Checkpoint(), found.sources[name]
    data = torch.frombuffer(bytearray(files["model.safetensors"]), dtype=torch.uint8)
    buffers = [data[read.start : read.stop] for read in form.reads(source, start, stop)]
    return form.encoded(source, start, stop, buffers).data


def test_experts_apart_and_fused_are_read_from_each_other() -> None:
    apart, fused = files_of(EXPERTS), files_of({"m.mlp.experts.gate_up_proj": FUSED})
    found = read(fused, base_of(EXPERTS))
    assert problems(found) == []
    whole = "m.mlp.experts.gate_up_proj"
    assert "4 parameters are stored fused with others: m.mlp.experts.0.gate_proj.weight is a part of " in found.notes[0]
    for name, tensor in EXPERTS.items():
        assert torch.equal(values(found, name, fused, 1, 6), tensor.flatten()[1:6])
    found = read(apart, base_of({whole: FUSED}))
    assert problems(found) == []
    joined = f"1 parameters are stored in several tensors: {whole} is m.mlp.experts.0.gate_proj.weight and 3 more"
    assert joined in found.notes[0]
    for start, stop in ((0, 24), (3, 4), (5, 13), (6, 12), (0, 0), (23, 24)):
        assert torch.equal(values(found, whole, apart, start, stop), FUSED.flatten()[start:stop])


def test_parts_of_several_dtypes_are_refused() -> None:
    mixed = files_of(EXPERTS | {"m.mlp.experts.1.up_proj.weight": torch.rand(3, 2).half()})
    found = read(mixed, base_of({"m.mlp.experts.gate_up_proj": FUSED}))
    assert "stores the parts of one parameter in several dtypes: m.mlp.experts.gate_up_proj" in problems(found)[0]


def test_a_model_that_shares_no_name_with_the_base_is_refused_without_advice_to_leave_it_aside() -> None:
    (problem,) = problems(read(files_of({"x": torch.zeros(2, 2), "y": torch.zeros(3)}), base_of()))
    assert "has none of the base's 2 merged parameters" in problem
    assert "exclude" not in problem
    assert "missing" not in problem
    assert problems(read(files_of({"x": torch.zeros(2)}), base_of(), Rules(("x",), missing=True)))


def test_a_fine_tune_that_stores_only_the_tied_copy_is_read_from_it() -> None:
    model = {**BASE, "lm_head.weight": torch.ones(4, 2)}
    del model["model.embed_tokens.weight"]
    found = read(files_of(model, TIED), base_of(config=TIED))
    assert problems(found) == []
    assert found.sources["model.embed_tokens.weight"].tensors[0].dtype == "F32"
    assert "lm_head.weight is model.embed_tokens.weight, to which it is tied" in found.notes[0]


@pytest.mark.parametrize(
    "file", ["../model-0.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "https://h/x", ".."]
)
def test_an_index_can_not_leave_its_folder(file: str) -> None:
    assert "names files outside its folder" in problems(read(sharded({"a": torch.zeros(1)}, a=file)))[0]


def test_an_index_must_agree_with_its_files() -> None:
    one, two = {"a": torch.zeros(1)}, {"b": torch.zeros(1)}
    cases = {
        "names 1 files that are not there: gone.safetensors": sharded(one, two, c="gone.safetensors"),
        "names 1 tensors that their files lack: c": sharded(one, two, c="model-1.safetensors"),
        "holds 1 tensors in more than one file: a": sharded({**one, "a2": torch.zeros(1)}, {**two, **one}),
        "has no weight_map from tensor names to file names": sharded(one, a=1),
    }
    for message, files in cases.items():
        assert any(message in problem for problem in problems(read(files))), message
    files = sharded(one, two)
    files["model-1.safetensors"] = file_bytes({**two, "c": torch.zeros(1)})
    assert "does not name 1 tensors of its files: c" in problems(read(files))[0]


def test_files_outside_the_index_are_left_aside_with_a_note() -> None:
    files = {**sharded({"a": torch.zeros(1)}), "consolidated.safetensors": file_bytes({"x": torch.zeros(1)})}
    found = read(files)
    assert list(found.sources) == ["a"]
    (note,) = found.notes
    assert note.startswith("memory://model: left aside, not part of the model: consolidated.safetensors (`file: ")


def test_one_weight_file_needs_no_special_name_but_several_need_an_index() -> None:
    assert list(read({"weights.safetensors": file_bytes({"a": torch.zeros(1)})}).sources) == ["a"]
    files = {f"{name}.safetensors": file_bytes({name: torch.zeros(1)}) for name in "ab"}
    assert "holds 2 models: `file: a.safetensors`, `file: b.safetensors`" in problems(read(files))[0]
    both = {**sharded({"a": torch.zeros(1)}), "model.safetensors": file_bytes({"a": torch.zeros(1)})}
    assert "has both model.safetensors and model.safetensors.index.json" in problems(read(both))[0]


def test_an_index_that_is_older_than_the_one_weight_file_is_named_with_a_way_to_choose() -> None:
    files = sharded({"a": torch.zeros(1)}, a="gone.safetensors")
    files = {name: files[name] for name in files if not name.endswith(".safetensors")}
    stale = {**files, "model.safetensors": file_bytes({"a": torch.zeros(1)})}
    (problem,) = problems(read(stale))
    assert "has both model.safetensors and model.safetensors.index.json, which names 1 files that" in problem
    assert "`file: model.safetensors` beside its `path` chooses it" in problem


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_an_adapter_and_masks_are_not_taken_for_a_checkpoint() -> None:
    for names in (
        ["adapter_config.json", "adapter_model.safetensors"],
        ["adapter_model.safetensors", "model.safetensors"],
        ["adapter_model-00001-of-00002.safetensors"],
        ["adapter_config.json", "other.safetensors"],
        ["unified_vector.safetensors", "mask-00001.safetensors"],
        ["config.json"],
    ):
        assert not Checkpoint().recognises(names), names
    for names in (SHARDS, ["other.safetensors"], ["adapter_config.json", "model.safetensors"]):
        assert Checkpoint().recognises(names), names


def test_the_usual_model_of_a_folder_is_fetched_and_all_weights_where_there_is_an_index() -> None:
    index = "model.safetensors.index.json"
    for names, weights in (
        (["other.safetensors", "model.safetensors", "README.md"], ("model.safetensors",)),
        (["a.safetensors", "b.safetensors"], ()),
        (["other.safetensors", *SHARDS], tuple(SHARDS)),
        (["other.safetensors", *SHARDS, index], ("other.safetensors", *SHARDS)),
    ):
        texts = tuple(name for name in names if name == index)
        assert Checkpoint().wanted([*names, "config.json", "notes.txt"]) == (weights, (*texts, "config.json"))


def test_the_library_that_opens_it_is_known_by_its_files() -> None:
    assert read(files_of(BASE)).library == TRANSFORMERS
    weights = files_of(BASE)["model.safetensors"]
    found = read({"open_clip_model.safetensors": weights, "open_clip_config.json": b"{}"})
    assert (problems(found), found.library.name) == ([], "open_clip")
