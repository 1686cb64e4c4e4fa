"""Models of different vocabularies: rows are matched by token, as `vocabulary` asks, and transformers loads the output.

The oracle builds every matrix token by token from the words of the recipe's reference, and merges in float64.
"""

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

import ties_ray
from tests.tools.merging import LOCAL, carried_out, draw_sizes, read_tensors
from tests.tools.vocabularies import BY_TOKEN, LETTERS, WIDTH, write_model
from ties_ray.errors import InputError, RecipeError
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate

VOCABULARIES: dict[str, tuple[list[str], list[str], int]] = {
    "base": ([*LETTERS, "ab", "cd"], ["<s>", "</s>"], 36),
    "longer": ([*LETTERS, "ab", "cd"], ["<s>", "</s>", "<x>", "<only-longer>"], 34),
    "other": ([*reversed(LETTERS[2:]), "ef", "cd", "a"], ["</s>", "<x>"], 29),
    "plain": ([*LETTERS, "ab", "cd"], ["<s>", "</s>"], 36),
}
"""Ordinary tokens, added ones, and rows of the embedding; a base has rows without a token."""
WEIGHTS = {"longer": 0.5, "other": 1.25, "plain": 0.75}
Tensors = Mapping[str, torch.Tensor]


def write(folder: Path, name: str, *, tie: bool = False, dtype: torch.dtype = torch.float32) -> None:
    seed = sum(map(ord, name))
    write_model(folder / name, *VOCABULARIES[name], seed=seed, tie=tie, dtype=dtype, with_tokenizer=name != "plain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vocabularies")
    for name in VOCABULARIES:
        write(place / "free", name)
        write(place / "tied", name, tie=True)
    return place


def ids_of(name: str) -> dict[str, int]:
    """Return the row of each token of an input."""
    ordinary, added, rows = VOCABULARIES[name]
    return {token: row for row, token in enumerate([*ordinary, *added]) if row < rows}


class Oracle(NamedTuple):
    """What a recipe's words say of one parameter, token by token."""

    inputs: Mapping[str, torch.Tensor]
    missing: str = "base"
    rows: Mapping[str, Any] = {}

    def row(self, name: str, token: str) -> torch.Tensor:
        ids, asked = ids_of(name), self.rows.get(token)
        if token in ids and not (asked and asked.get("everywhere")):
            return self.inputs[name][ids[token]]
        if asked and asked["from"] == "zero":
            return torch.zeros_like(self.inputs["base"][0])
        if asked:
            of = ids_of(asked["from"])
            return self.inputs[asked["from"]][asked["row"] if "row" in asked else of[asked.get("token", token)]]
        own = [self.inputs[each][ids_of(each)[token]] for each in WEIGHTS if token in ids_of(each)]
        base = [self.inputs["base"][ids_of("base")[token]]] if token in ids_of("base") else []
        chosen = {"base": base or own, "mean": own or base, "zero": base}[self.missing]
        return torch.stack(chosen).mean(0) if chosen else torch.zeros_like(self.inputs["base"][0])

    def merged(self, token: str) -> torch.Tensor:
        base = self.row("base", token).double()
        return base + sum(weight * (self.row(name, token).double() - base) for name, weight in WEIGHTS.items())


def merge(folder: Path, out: Path, vocabulary: object, sizes: Any = None, **more: Any) -> ties_ray.MergeResult:
    models = [{"path": str(folder / name), "id": name, "weight": weight} for name, weight in WEIGHTS.items()]
    recipe = validate(
        {"base": str(folder / "base"), "models": models, "method": "task_arithmetic", "output": str(out),
         "run": LOCAL, "vocabulary": vocabulary} | more
    )  # fmt: skip
    return merging.merge(recipe, **({"sizes": sizes} if sizes else {}))


def check(folder: Path, output: Path, oracle: Mapping[str, Any]) -> transformers.PreTrainedTokenizerBase:
    """Compare every row by token with the oracle; return the output's tokenizer as transformers loads it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    merged = read_tensors(str(output))
    names = [name for name in BY_TOKEN if name in merged]
    inputs = {name: read_tensors(str(folder / name)) for name in VOCABULARIES}
    for name in names:
        values = Oracle({key: tensors.get(name, tensors[BY_TOKEN[0]]) for key, tensors in inputs.items()}, **oracle)
        assert merged[name].shape[0] == model.config.vocab_size
        for token, row in tokenizer.get_vocab().items():
            torch.testing.assert_close(merged[name][row].double(), values.merged(token), rtol=0, atol=1e-6)
    assert ties_ray.verify(str(output), sample=1.0).problems == []
    return tokenizer


UNION = [*VOCABULARIES["base"][0], "<s>", "</s>", "ef", "<x>", "<only-longer>"]


@pytest.mark.parametrize(("kind", "missing"), [("free", "base"), ("tied", "mean"), ("tied", "zero")])
def test_a_union_has_the_bases_ids_and_all_other_tokens(kind: str, missing: str, folder: Path, tmp_path: Path) -> None:
    result = merge(folder / kind, tmp_path / "out", {"tokens": "union", "missing": missing})
    tokenizer = check(folder / kind, tmp_path / "out", {"missing": missing})
    assert [tokenizer.convert_ids_to_tokens(row) for row in range(len(UNION))] == UNION
    assert tokenizer("ab<x>cd").input_ids == [UNION.index(each) for each in ("ab", "<x>", "cd")]
    merged = read_tensors(str(tmp_path / "out"))
    assert ("lm_head.weight" in merged) == (kind == "free")
    assert merged[BY_TOKEN[0]].shape[0] == 36, "the base's rows are enough"
    assert any("model other lacks" in note for note in result.notes), "\n".join(result.notes)


def test_a_head_that_one_model_unties_gets_the_rows_too(folder: Path, tmp_path: Path) -> None:
    for name in VOCABULARIES:
        shutil.copytree(folder / ("free" if name == "other" else "tied") / name, tmp_path / name)
    result = merge(tmp_path, tmp_path / "out", "union")
    check(tmp_path, tmp_path / "out", {})
    assert "lm_head.weight" in read_tensors(str(tmp_path / "out"))
    assert all(model.account.adds_up for model in carried_out(result).catalog.models)


def test_the_tokens_may_be_those_of_a_model(folder: Path, tmp_path: Path) -> None:
    merge(folder / "free", tmp_path / "out", {"tokens": "other"})
    tokenizer = check(folder / "free", tmp_path / "out", {})
    assert tokenizer.get_vocab() == ids_of("other")
    assert read_tensors(str(tmp_path / "out"))["lm_head.weight"].shape == (29, WIDTH)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == ids_of("other")["</s>"] != ids_of("base")["</s>"]


def test_rows_may_be_given_by_token(folder: Path, tmp_path: Path) -> None:
    rows = {
        "b": {"from": "zero"},
        "<x>": {"from": "other", "token": "z", "everywhere": True},
        "<new>": {"from": "base", "row": 5},
        "ef": {"from": "other"},
    }
    merge(folder / "free", tmp_path / "out", {"tokens": "base", "rows": rows, "pad_to_multiple_of": 8})
    tokenizer = check(folder / "free", tmp_path / "out", {"rows": rows})
    assert tokenizer.convert_tokens_to_ids(["<x>", "<new>", "ef"]) == [30, 31, 32]
    merged = read_tensors(str(tmp_path / "out"))["lm_head.weight"]
    assert merged.shape[0] == 40
    last = tokenizer.convert_tokens_to_ids("cd")
    assert all(torch.equal(row, merged[last]) for row in merged[36:])


@pytest.mark.parametrize(
    "method", ["task_arithmetic", {"name": "ties", "density": 0.4}, {"name": "dare", "density": 0.5}]
)
def test_cuts_change_no_byte(method: Any, folder: Path, tmp_path: Path) -> None:
    for name in VOCABULARIES:
        write(tmp_path, name, dtype=torch.float32 if name == "other" else torch.bfloat16)
    asked = {"tokens": "union", "missing": "mean", "pad_to_multiple_of": 16, "rows": {"c": {"from": "zero"}}}
    draw, digests = random.Random(5), set()
    for number in range(4):
        out = tmp_path / f"out-{number}"
        result = merge(tmp_path, out, asked, draw_sizes(draw) if number else None, method=method)
        plan = carried_out(result)
        assert result.bytes_read == plan.bytes_read
        digests.add((out / "model.safetensors").read_bytes())
    assert len(digests) == 1


def test_one_vocabulary_gives_what_no_section_gives(folder: Path, tmp_path: Path) -> None:
    models = [{"path": str(folder / "free/plain")}]
    for name, more in (("with", {"vocabulary": "union"}), ("without", {})):
        data = {"base": str(folder / "free/base"), "models": models, "method": "average", "run": LOCAL, **more}
        merging.merge(validate({**data, "output": str(tmp_path / name)}))
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


@pytest.mark.parametrize(
    ("vocabulary", "error", "message"),
    [
        ({"tokens": "nobody"}, RecipeError, "vocabulary.tokens: 'nobody' is neither the id nor the path of an input"),
        ({"rows": {"<q>": "other"}}, RecipeError, "vocabulary.rows.<q>: .*has no row for '<q>'"),
        ({"rows": {"<q>": {"from": "other", "row": 29}}}, RecipeError, "has 29 rows, and row 29 is asked for"),
        ({"rows": {"<q>": {"from": "zero", "row": 1}}}, RecipeError, "`from: zero` takes neither"),
        ({"rows": {"<q>": {"from": "base", "row": 1, "token": "a"}}}, RecipeError, "give either `token` or `row`"),
    ],
)
def test_what_the_inputs_do_not_have_is_refused(
    vocabulary: Any, error: type[Exception], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        merge(folder / "free", tmp_path / "out", vocabulary)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"output": {"path": "out", "kind": "delta"}}, "needs an output of kind checkpoint, and delta has no"),
        ({"output": {"path": "out", "state": True}}, "`vocabulary` and `output.state` exclude each other"),
        ({"continues": "earlier"}, "`vocabulary` and `continues` exclude each other"),
        ({"exclude": ["*embed*"]}, "exclude: leaves out model.embed_tokens.weight"),
    ],
)
def test_what_does_not_go_with_it_is_refused(more: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        merge(folder / "free", tmp_path / "out", "union", **more)


def test_an_input_that_tells_no_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "free", tmp_path / "in")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in/other" / name).unlink()
    with pytest.raises(InputError, match=r"other: has no tokenizer\.json, vocab\.json or vocab\.txt"):
        merge(tmp_path / "in", tmp_path / "out", "union")
    result = merge(tmp_path / "in", tmp_path / "out", "union", allow={"refused_model": "drop"})
    assert len(result.refused) == 1


def test_a_tokenizer_with_gaps_takes_no_tokens_up(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "free", tmp_path / "in")
    path = tmp_path / "in/base/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["z"] = 35
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(RecipeError, match="have gaps, so that added tokens would share an id"):
        merge(tmp_path / "in", tmp_path / "out", "union")
    merge(tmp_path / "in", tmp_path / "out", {"tokens": "base"})
