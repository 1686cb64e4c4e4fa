"""Configurations of mergekit as recipes: what each becomes, and what is refused with its line."""

from typing import Any

import pytest

from ties_ray.errors import RecipeError
from ties_ray.recipe.mergekit import Conversion, Stack, convert, is_mergekit
from ties_ray.recipe.parse import validate

THREE = """\
models:
  - model: /m/base
  - model: /m/a
    parameters: {weight: 0.5, density: 0.3}
  - model: /m/b
    parameters: {weight: 1.0, density: 0.3}
base_model: /m/base
"""


def converted(text: str, **stack: Any) -> Conversion:
    return convert(text, "m.yml", Stack(**stack))


def recipe_of(text: str, **stack: Any) -> dict[str, Any]:
    """Return the recipe, which the parser takes once it has a folder."""
    recipe = converted(text, **stack).recipe
    validate({**recipe, "output": {**recipe["output"], "path": "/out"}})
    return recipe


def problems_of(text: str, **stack: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        converted(text, **stack)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("method", "parameters", "becomes"),
    [
        ("ties", "", {"name": "ties", "profile": "mergekit", "merge": "mean", "rescale": "none", "density": 0.3}),
        ("ties", "normalize: false, lambda: 0.7, rescale: true",
         {"name": "ties", "profile": "mergekit", "merge": "sum", "rescale": "l1", "lambda": 0.7, "density": 0.3}),
        ("dare_ties", "", {"name": "dare", "combine": "ties", "zero_sum": "positive", "merge": "sum", "rescale": "l1",
                           "density": 0.3}),
        ("dare_linear", "rescale: false, normalize: true",
         {"name": "dare", "combine": "linear", "merge": "mean", "rescale": "none", "density": 0.3}),
        ("breadcrumbs", "gamma: 0.02",
         {"name": "breadcrumbs", "merge": "sum", "rescale": "none", "gamma": 0.02, "density": 0.3}),
        ("breadcrumbs_ties", "", {"name": "breadcrumbs", "combine": "ties", "zero_sum": "positive", "merge": "sum",
                                  "rescale": "none", "gamma": 0.01, "density": 0.3}),
        ("della", "epsilon: 0.1", {"name": "della", "zero_sum": "positive", "merge": "mean", "rescale": "l1",
                                   "epsilon": 0.1, "density": 0.3}),
        ("della_linear", "", {"name": "della", "combine": "linear", "merge": "sum", "rescale": "l1", "epsilon": 0.15,
                              "density": 0.3}),
    ],
)  # fmt: skip
def test_methods_of_sums_keep_mergekits_rules_and_defaults(method: str, parameters: str, becomes: object) -> None:
    recipe = recipe_of(f"{THREE}merge_method: {method}\nparameters: {{{parameters}}}\n")
    assert recipe["method"] == becomes
    assert recipe["base"] == "/m/base"
    assert recipe["models"] == [{"path": "/m/a", "weight": 0.5}, {"path": "/m/b"}]


PLAIN = "models: [{model: /m/base}, {model: /m/a}, {model: /m/b}]\nbase_model: /m/base\n"


@pytest.mark.parametrize(
    ("method", "parameters", "becomes"),
    [
        ("model_stock", "", {"name": "model_stock", "profile": "mergekit"}),
        ("model_stock", "filter_wise: true", {"name": "model_stock", "profile": "mergekit", "scope": "row"}),
        ("sce", "select_topk: 0.4", {"name": "sce", "select_topk": 0.4, "at_threshold": "exact", "least": 1e-6}),
        ("ram", "", {"name": "ram", "epsilon": 1e-5}),
        ("ramplus_tl", "r: 0.2", {"name": "ram", "plus": True, "epsilon": 1e-5, "r": 0.2, "alpha": 0.2}),
    ],
)
def test_methods_without_weights_take_the_models_beside_the_base(method: str, parameters: str, becomes: object) -> None:
    recipe = recipe_of(f"{PLAIN}merge_method: {method}\nparameters: {{{parameters}}}\n")
    assert (recipe["method"], recipe["models"]) == (becomes, [{"path": "/m/a"}, {"path": "/m/b"}])


PAIR = "models: [{model: /m/a, parameters: {weight: 1}}, {model: /m/b, parameters: {weight: 0.25}}]\n"


@pytest.mark.parametrize(
    ("text", "method", "base"),
    [
        ("merge_method: linear", {"name": "average"}, "/m/a"),
        ("merge_method: linear\nbase_model: /m/a", {"name": "average"}, "/m/a"),
        ("merge_method: linear\nparameters: {normalize: false}",
         {"name": "task_arithmetic", "vectors": "weights"}, "/m/a"),
        ("merge_method: multislerp", {"name": "multislerp", "vectors": "weights"}, "/m/a"),
        ("merge_method: nuslerp", {"name": "nuslerp", "vectors": "weights"}, "/m/a"),
        ("merge_method: nuslerp\nbase_model: /m/z\nparameters: {nuslerp_flatten: false}",
         {"name": "nuslerp", "arcs": "row"}, "/m/z"),
        ("merge_method: multislerp\nbase_model: /m/z", {"name": "multislerp"}, "/m/z"),
        ("merge_method: task_arithmetic\nbase_model: /m/z", {"name": "task_arithmetic"}, "/m/z"),
        ("merge_method: task_arithmetic\nbase_model: /m/z\nparameters: {normalize: true, lambda: 0.5}",
         {"name": "average", "lambda": 0.5}, "/m/z"),
    ],
)  # fmt: skip
def test_methods_of_pairs_and_whole_weights(text: str, method: object, base: str) -> None:
    recipe = recipe_of(PAIR + text)
    assert (recipe["method"], recipe["base"]) == (method, base)
    first = {"path": "/m/a"} | ({"id": "base-model"} if base == "/m/a" else {})
    assert recipe["models"] == [first, {"path": "/m/b", "weight": 0.25}]


def test_karcher_merges_the_base_among_others() -> None:
    recipe = recipe_of(
        "models: [{model: a}, {model: b}]\nmerge_method: karcher\nparameters: {max_iter: 5, tol: 1e-6}\n"
    )
    assert recipe["method"] == {"name": "karcher", "max_iter": 5, "tolerance": 1e-6}
    assert recipe["models"] == [{"path": "a", "id": "base-model"}, {"path": "b"}]


def test_the_base_and_one_model_make_slerp_and_nearswap() -> None:
    pair = "models: [{model: a}, {model: b}]\nbase_model: a\n"
    slerp = recipe_of(pair + "merge_method: slerp\nparameters: {t: 0.3}\n")
    assert slerp["models"] == [{"path": "a", "id": "base-model"}, {"path": "b"}]
    assert slerp["method"] == {"name": "slerp", "t": 0.3}
    nearswap = recipe_of(pair + "merge_method: nearswap\nparameters: {t: 1e-4}\n")
    assert (nearswap["models"], nearswap["method"]) == ([{"path": "b"}], {"name": "nearswap", "t": 1e-4})


FILTERS = """\
slices:
  - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.25, 1]}
    - {filter: "mlp[0]", value: 0.3}
    - value: 0.5
"""


def test_filters_and_gradients_become_tables_by_pattern() -> None:
    recipe = recipe_of(FILTERS, num_layers=4)
    assert recipe["models"][0]["weight"] == {"*self_attn*": [1.0, 0.75, 0.0], "*mlp[[]0]*": 0.7, "*": 0.5}
    assert recipe["models"][1]["weight"] == {"*self_attn*": [0.0, 0.25, 1.0], "*mlp[[]0]*": 0.3, "*": 0.5}


SLICES = """\
slices:
  - sources:
      - {model: a, layer_range: [0, 1], parameters: {weight: 0.2}}
      - {model: b, layer_range: [0, 1]}
  - sources:
      - {model: a, layer_range: [1, 4]}
      - {model: b, layer_range: [1, 4], parameters: {weight: [0, 1]}}
merge_method: linear
parameters: {weight: 0.8}
"""


def test_slices_become_numbers_by_layer() -> None:
    recipe = recipe_of(SLICES, num_layers=4, name="h", before=("*wte*",))
    assert recipe["models"][1]["weight"] == {
        "*h.0.*": 0.8, "*h.1.*": 0.0, "*h.2.*": 0.5, "*h.3.*": 1.0, "*wte*": 0.8, "*": 0.0,
    }  # fmt: skip
    assert recipe["models"][0]["weight"] == {
        "*h.0.*": 0.2, "*h.1.*": 0.8, "*h.2.*": 0.8, "*h.3.*": 0.8, "*wte*": 0.2, "*": 0.8,
    }  # fmt: skip


def test_slices_that_say_the_same_are_models() -> None:
    text = SLICES.replace(", parameters: {weight: 0.2}", "").replace(", parameters: {weight: [0, 1]}", "")
    recipe = recipe_of(text, num_layers=4)
    assert recipe["models"] == [{"path": "a", "id": "base-model", "weight": 0.8}, {"path": "b", "weight": 0.8}]


def test_a_scope_says_what_narrower_ones_leave_open() -> None:
    recipe = recipe_of("""\
models:
  - {model: a, parameters: {weight: [{filter: mlp, value: 2}], density: 1.5}}
  - {model: b, parameters: {density: [1, 0.5]}}
base_model: z
merge_method: ties
parameters: {weight: [{filter: norm, value: "1e-1"}, {filter: "*", value: 1}]}
""")
    assert recipe["models"] == [
        {"path": "a", "weight": {"*mlp*": 2.0, "*norm*": 0.1, "*": 1.0}, "density": 1.0},
        {"path": "b", "weight": {"*norm*": 0.1, "*": 1.0}, "density": [1.0, 0.5]},
    ]


def test_an_adapter_of_the_base_is_a_model_and_one_of_another_model_goes_with_it() -> None:
    text = (
        "models: [{model: z+x, parameters: {weight: 1}}, {model: {model: {path: z}, lora: {path: y, revision: r}}}]\n"
    )
    recipe = converted(text + "base_model: z\nmerge_method: ties\nparameters: {weight: 1}\n").recipe
    assert recipe["models"] == [{"path": "x"}, {"path": "y@r"}]
    other = converted(text + "base_model: other\nmerge_method: ties\nparameters: {weight: 1}\n").recipe
    assert other["models"] == [{"path": "z", "adapter": "x"}, {"path": "z", "adapter": "y@r"}]


def test_notes_say_what_is_different() -> None:
    text = f"{THREE}merge_method: ties\nparameters: {{int8_mask: true}}\ndtype: bfloat16\nout_dtype: float32\n"
    conversion = converted(text + "chat_template: auto\ntokenizer_source: union\n")
    assert conversion.recipe["output"] == {"dtype": "float32", "chat_template": "auto"}
    assert [note.split(" ", 1)[0] for note in conversion.notes] == ["int8_mask", "dtype"]
    for template in ("chatml", "llama3", "mistral", "alpaca", "exaone", "{{ messages }}"):
        assert converted(text + f"chat_template: '{template}'\n").recipe["output"]["chat_template"] == template


def test_tokenizers_become_a_vocabulary() -> None:
    text = f"{THREE}merge_method: ties\n"
    conversion = converted(text + "tokenizer_source: union\n")
    assert conversion.compared == ("/m/base", "/m/a", "/m/b")
    assert "vocabulary" not in conversion.recipe
    assert conversion.vocabulary == {"tokens": "union", "pad_to_multiple_of": 1}
    assert converted(text).compared == ()
    of_model = converted(text + "tokenizer: {source: /m/b, pad_to_multiple_of: 64}\n")
    assert of_model.recipe["vocabulary"] == {"tokens": "/m/b", "pad_to_multiple_of": 64}
    assert of_model.compared == ()
    linear = "models: [{model: x, parameters: {weight: 1}}]\nmerge_method: linear\n"
    assert converted(linear + "tokenizer_source: union\n").vocabulary == {
        "tokens": "union", "missing": "mean", "pad_to_multiple_of": 1,
    }  # fmt: skip


def test_rows_of_tokens_are_converted() -> None:
    tokens = """tokenizer:
  tokens:
    <a>: {source: /m/a, force: true}
    <b>: {source: {kind: zero}}
    <c>: {source: {kind: model_token, model: /m/b, token: x}}
    <d>: {source: {kind: model_token, model: /m/b, token_id: 7}}
"""
    vocabulary = converted(f"{THREE}merge_method: ties\n{tokens}").recipe["vocabulary"]
    assert vocabulary["tokens"] == "union"
    assert vocabulary["rows"] == {
        "<a>": {"from": "/m/a", "everywhere": True},
        "<b>": {"from": "zero"},
        "<c>": {"from": "/m/b", "token": "x"},
        "<d>": {"from": "/m/b", "row": 7},
    }


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("models: [{model: a, weight: 1}]\nmerge_method: linear\n",
         ["line 1: models.0.weight: mergekit ignores this key here; put it below `parameters`"]),
        ("models:\n  - model: a\n    parameters: {desnity: 1, normalize: true}\nbase_model: b\nmerge_method: ties\n"
         "normalise: 1\n",
         ["line 6: normalise: mergekit ignores this key; known here:",
          "line 3: models.0.parameters.desnity: mergekit ignores this key; known here: density, weight",
          "line 3: models.0.parameters.normalize: mergekit ignores this key here; move it"]),
        ("models: [{model: a}]\nmerge_method: tyes\n", ["line 2: merge_method: unknown method 'tyes'; did you mean"]),
        ("slices: [{sources: [{model: a, layer_range: [0, 4]}]}]\nmerge_method: passthrough\n",
         ["line 2: merge_method: passthrough stacks layers"]),
        ("models: [{model: a}]\nmerge_method: arcee_fusion\n", ["line 2: merge_method: arcee_fusion takes"]),
        ("models: [{model: a}]\nmerge_method: ties\nbase_model: b\n", ["line 1: models.0: has no weight for some"]),
        ("models: [{model: a, parameters: {weight: [{filter: x, value: 1}]}}]\nmerge_method: ties\nbase_model: b\n",
         ["line 1: models.0: has no weight for some tensors; add a weight for all of them"]),
        ("models: [{model: a, parameters: {weight: x}}]\nmerge_method: ties\nbase_model: b\n",
         ["line 1: models.0.parameters.weight: is neither a number nor a list of numbers"]),
        ("models: [{model: a, parameters: {weight: 1}}]\nmerge_method: ties\n", ["m.yml: ties needs a base_model"]),
        (SLICES.replace("[1, 4]", "[2, 4]"), ["line 5: slices.1: begins at layer 2, where layer 1 is due"]),
        (SLICES, ["line 5: slices.1: ends at layer 4, and the base has 5 layers"]),
        (SLICES.replace("b, layer_range: [1, 4]", "b, layer_range: [0, 3]"),
         ["line 5: slices.1: takes different layers of its models"]),
        (SLICES.replace("model: b, layer_range: [1", "model: c, layer_range: [1"),
         ["line 4: slices.0.sources.1: b does not stand in every slice just once",
          "line 7: slices.1.sources.1: c does not stand in every slice just once"]),
        (f"{THREE}merge_method: breadcrumbs\nparameters: {{gamma: [0, 1]}}\n",
         ["line 9: parameters.gamma: gamma differs by layer, tensor or model"]),
        (f"{PAIR}merge_method: linear\nbase_model: /m/z\n", ["linear merges the base_model too"]),
        (f"{PAIR}merge_method: multislerp\nparameters: {{normalize_weights: false}}\n",
         ["normalize_weights: false needs weights that sum to 1 here"]),
        (f"{PLAIN}merge_method: slerp\nparameters: {{t: 1}}\n", ["slerp takes 1 models beside the base_model, not 2"]),
        (f"models: [{{model: z, parameters: {{weight: 1}}}}, {PAIR[9:]}base_model: z\nmerge_method: ties\n",
         ["line 1: models.0.parameters: mergekit ignores those of the base_model; remove them"]),
        (f"{PLAIN}merge_method: sce\nmodules: {{}}\n", ["line 4: modules: ties_ray merges the parts of a model alike"]),
        (f"{PLAIN}merge_method: sce\ntokenizer: {{source: union, pad_to_multiple_of: 0.5}}\n",
         ["line 4: tokenizer.pad_to_multiple_of: is 0.5, and no number from 1 to 65,536"]),
        (f"{PLAIN}merge_method: sce\ntokenizer: {{tokens: {{x: {{force: true}}, y: {{source: {{kind: odd}}}}}}}}\n",
         ["line 4: tokenizer.tokens.x: has no source", "line 4: tokenizer.tokens.y: 'odd' is no kind of source"]),
        (f"{PLAIN}merge_method: sce\ntokenizer: {{tokens: {{x: {{source: {{kind: model_token, model: a}}}}}}}}\n",
         ["line 4: tokenizer.tokens.x.source: needs `model`, and either `token` or `token_id`"]),
        (f"{PLAIN}merge_method: sce\ntokenizer: {{tokens: [x]}}\ntokenizer_source: base\n",
         ["line 5: tokenizer_source: mergekit ignores it beside `tokenizer`",
          "line 4: tokenizer.tokens: is not a mapping of tokens"]),
        (f"{PLAIN}merge_method: sce\ndtype: int64\n", ["line 4: dtype: is int64, and ties_ray writes"]),
        (f"{PLAIN}merge_method: sce\nchat_template: vicuna\n", ["line 4: chat_template: 'vicuna' is no template"]),
        ("- 1\n", ["m.yml: needs either `models` or `slices`", "merge_method"]),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_with_its_line(text: str, problems: list[str]) -> None:
    found = problems_of(text, num_layers=5 if text == SLICES else 4)
    assert len(found) == len(problems), found
    for part in problems:
        assert any(part in each for each in found), (part, found)


def test_a_configuration_is_told_by_its_merge_method() -> None:
    assert is_mergekit(THREE + "merge_method: ties\n")
    assert not is_mergekit("base: b\nmodels: [a]\nmethod: ties\noutput: o\n")


MENDED = {
    "put it below `parameters`": ("{model: a, weight: 1}", "{model: a, parameters: {weight: 1}}"),
    "move it to the `parameters` of the whole merge": (
        "{model: a, parameters: {weight: 1, normalize: true}}]\nx: [",
        "{model: a, parameters: {weight: 1}}]\nparameters: {normalize: true}\nx: [",
    ),
    "add a weight for all of them": ("{model: a}", "{model: a, parameters: {weight: 1}}"),
    "give a number": ("{model: a, parameters: {weight: x}}", "{model: a, parameters: {weight: 1}}"),
    "mend this entry": (
        "{model: a, parameters: {weight: [{filter: x}, 1]}}",
        "{model: a, parameters: {weight: [{filter: x, value: 2}, {value: 1}]}}",
    ),
    "write `model: PATH`": ("{parameters: {weight: 1}}", "{model: a, parameters: {weight: 1}}"),
    "write PATH, PATH@REVISION or PATH+ADAPTER": (
        "{model: a@b@c, parameters: {weight: 1}}", "{model: a@b, parameters: {weight: 1}}",
    ),
    "give it a weight of 0": (
        "{model: a, parameters: {weight: 1, density: 0}}", "{model: a, parameters: {weight: 0, density: 1}}",
    ),
    "mend the YAML": ("{model: a, parameters: [weight, 1]}", "{model: a, parameters: {weight: 1}}"),
}  # fmt: skip


@pytest.mark.parametrize("remedy", MENDED)
def test_a_configuration_that_follows_the_remedy_is_converted(remedy: str) -> None:
    wrong, right = (
        f"models: [{text}]\nbase_model: z\nmerge_method: ties\n".replace("\nx: []", "") for text in MENDED[remedy]
    )
    assert any(f"; {remedy}" in problem for problem in problems_of(wrong))
    recipe_of(right)


WHOLE = {
    "add base_model": (PAIR + "merge_method: ties\n", PAIR + "merge_method: ties\nbase_model: z\n"),
    "list it under `models`, or leave base_model out": (
        PAIR + "merge_method: linear\nbase_model: z\n",
        PAIR + "merge_method: linear\n",
    ),
    "write auto, alpaca, chatml, exaone, llama3, mistral, or Jinja": (
        PAIR + "merge_method: linear\nchat_template: vicuna\n",
        PAIR + "merge_method: linear\nchat_template: alpaca\n",
    ),
    "give all sources the same layer_range": (
        SLICES.replace("b, layer_range: [1, 4]", "b, layer_range: [0, 3]"),
        SLICES,
    ),
    "let slices follow one another": (SLICES.replace("[1, 4]", "[2, 4]"), SLICES),
    "let the slices end at 4": (SLICES.replace("[1, 4]", "[1, 3]"), SLICES),
    "list the same models in every slice": (
        SLICES.replace("model: b, layer_range: [1", "model: c, layer_range: [1"),
        SLICES,
    ),
    "write `layer_range: [0, 32]`": (SLICES.replace("layer_range: [0, 1]", "layer_range: 1", 1), SLICES),
    "leave one of them out": (SLICES.replace("[0, 1]}}", "[{filter: layers.1, value: 2}, {value: 1}]}}"), SLICES),
    "write true or false": (
        PAIR + "merge_method: linear\nparameters: {normalize: 2}\n",
        PAIR + "merge_method: linear\nparameters: {normalize: true}\n",
    ),
    "give one gamma": (
        f"{THREE}merge_method: breadcrumbs\nparameters: {{gamma: [0, 1]}}\n",
        f"{THREE}merge_method: breadcrumbs\nparameters: {{gamma: 0.1}}\n",
    ),
}


@pytest.mark.parametrize("remedy", WHOLE)
def test_a_document_that_follows_the_remedy_is_converted(remedy: str) -> None:
    wrong, right = WHOLE[remedy]
    assert any(f"; {remedy}" in problem for problem in problems_of(wrong, num_layers=4))
    recipe_of(right, num_layers=4)
