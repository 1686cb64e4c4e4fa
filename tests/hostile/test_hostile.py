"""Files and recipes made to hurt whoever reads them: an answer or a `MergeError`, soon, and in little memory."""

import ast
import json
import re
import secrets
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ties_ray
from tests.tools import hostile
from tests.tools.families import Family, write_checkpoint
from tests.tools.merging import LOCAL, merge, read_tensors
from ties_ray import safetensors
from ties_ray.errors import InputError, MergeError, Problem, RecipeError
from ties_ray.inputs.catalog import read_catalog
from ties_ray.inputs.expand import entries_of
from ties_ray.inputs.licence import licence_of
from ties_ray.inputs.tokenizers import Tokenizer, check_common_ids, notes
from ties_ray.operations import merging
from ties_ray.recipe import parse
from ties_ray.recipe.recipe import ModelEntry, Recipe, Run
from ties_ray.stores import Stores
from ties_ray.stores.memory import Memory

seeded = settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TENSORS = {"w": torch.ones(2, 2, dtype=torch.bfloat16), "v": torch.zeros(3)}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("../../etc/passwd"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def check(function: Callable[[], object], nbytes: int) -> MergeError | None:
    """Call it; the only error it may raise is a `MergeError` in printable text. Bound its time and its memory."""
    tracemalloc.start()
    started, error = time.perf_counter(), None
    try:
        function()
    except MergeError as caught:
        error = caught
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert error is None or all(line.isprintable() for line in str(error).split("\n"))
    assert peak < 2**21 + hostile.BYTES_A_BYTE * nbytes, f"{peak:,} bytes for {nbytes:,}"
    assert time.perf_counter() - started < 5 + nbytes / 2**18
    return error


# -- headers


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*safetensors.DTYPE_BITS, "f32", "F128", "", "\ud800"]) | json_values,
        "shape": st.lists(st.integers(-1, 5) | st.sampled_from([2**31, 2**62, 2**63, 10**40, True, 0.0])) | json_values,
        "data_offsets": st.lists(st.integers(-1, 64) | st.sampled_from([2**63, 1e300]), max_size=3) | json_values,
        "extra": json_values,
    },
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | json_values, max_size=6)


@seeded
@given(headers, st.binary(max_size=64))
def test_any_json_is_a_header_or_refused(header: dict[str, object], data: bytes) -> None:
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    check(lambda: hostile.read_header(content), len(content))


@seeded
@given(st.binary(max_size=200))
def test_random_bytes_are_no_header(content: bytes) -> None:
    check(lambda: hostile.read_header(content), len(content))
    check(lambda: hostile.read_header(len(content).to_bytes(8, "little") + content), len(content) + 8)


@seeded
@given(st.data())
def test_a_header_with_a_few_bytes_changed_says_what_its_file_holds_or_is_refused(data: st.DataObject) -> None:
    head = safetensors.build([("a", "F32", (2, 3)), ("b.\u00e9", "BF16", (4,)), ("c", "U8", (0, 9))], {"format": "pt"})
    content = bytearray(head.rstrip() + bytes(32))
    content[:8] = (len(head.rstrip()) - 8).to_bytes(8, "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        replaced = data.draw(st.integers(0, 2))
        content[place : place + replaced] = data.draw(st.sampled_from(hostile.TOKENS))
    check(lambda: hostile.read_header(bytes(content)), len(content))


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"{" + b",".join(b'"%d":[]' % number for number in range(100_000)) + b"}",
        b'{"w":{"dtype":"U8","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,0]}}',
        b'{"w":{"dtype":"U8","shape":[' + b"9223372036854775807," * 50_000 + b'0],"data_offsets":[0,0]}}',
        b'{"w":{"dtype":"' + b"F" * 500_000 + b'","shape":[],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"\\ud800":"\\udfff"},"w":{"dtype":"U8","shape":[],"data_offsets":[-Infinity,NaN]}}',
        b'{"w":' + b"{}," * 100_000 + b"{}}",
    ],
)
def test_a_header_bomb_is_refused(header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header
    assert isinstance(check(lambda: hostile.read_header(content), len(content)), InputError)


def test_a_shape_of_astronomic_size_without_elements_is_no_more_than_it_is() -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [2**62, 0, 2**62], "data_offsets": [0, 0]}}).encode()
    content = len(text).to_bytes(8, "little") + text
    assert safetensors.parse(content, len(content), "m").tensors["w"].shape == (2**62, 0, 2**62)


# -- models


@pytest.fixture
def stores() -> Stores:
    return Stores({})


def written(stores: Stores, folder: Path, **files: bytes) -> tuple[str, str]:
    """Write a base and a model with these files added; return their folders."""
    store = stores.of(str(folder))
    write_checkpoint(store, f"{folder}/base", TENSORS)
    write_checkpoint(
        store, f"{folder}/m", TENSORS, files={name.replace("__", "."): data for name, data in files.items()}
    )
    return f"{folder}/base", f"{folder}/m"


def recipe_of(base: str, *models: object, **more: object) -> Recipe:
    data = {"base": base, "models": list(models), "method": "ties", "output": f"{base}-out", "run": LOCAL}
    return parse.validate(data | more)


class Opened(Memory):
    """Remembers what was opened."""

    def __init__(self) -> None:
        super().__init__(Memory.options())
        self.opened: set[str] = set()

    def head(self, uri: str, nbytes: int) -> Any:
        self.opened.add(uri)
        return super().head(uri, nbytes)


def in_memory() -> tuple[Stores, Opened, str]:
    """Return the store, as the stores have it, and an empty place in it."""
    stores, store = Stores({}), Opened()
    stores._open["memory"] = store
    return stores, store, f"memory://{secrets.token_hex(6)}"


OUTSIDE = [
    "../base/model.safetensors", "/etc/passwd", "..\\base\\model.safetensors", "C:\\model.safetensors",
    "file:///etc/passwd", "s3://bucket/model.safetensors", "memory://fuzz/base/model.safetensors",
    "model.safetensors\0", "./model.safetensors", "model.safetensors/", "MODEL.safetensors", "model\u2024safetensors",
    "\uff0e\uff0e/m", "..", ".", "", "\ud800", "~/m", "model.safetensors?x", "%2e%2e/m", "\u202emodel.safetensors",
    "x" * 5000, "sub/model.safetensors", "*.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_an_index_can_name_nothing_but_files_that_lie_beside_it(name: str) -> None:
    stores, store, root = in_memory()
    index = json.dumps({"weight_map": {"w": name, "v": "model.safetensors"}}).encode()
    write_checkpoint(store, f"{root}/base", TENSORS)
    write_checkpoint(store, f"{root}/m", TENSORS, files={"model.safetensors.index.json": index})
    with pytest.raises(InputError, match=r"names (1 )?files (outside its folder|that are not there)") as raised:
        read_catalog(recipe_of(f"{root}/base", f"{root}/m"), stores)
    assert all(line.isprintable() for line in str(raised.value).split("\n"))
    assert {uri.rpartition("/")[0] for uri in store.opened} == {f"{root}/base", f"{root}/m"}


weight_maps = st.dictionaries(
    st.sampled_from(["w", "v", "u", "\x1b[31m"]),
    st.sampled_from([*OUTSIDE, "model.safetensors"]) | json_values,
    max_size=4,
)


@settings(seeded, max_examples=40)
@given(
    st.fixed_dictionaries({}, optional={"weight_map": weight_maps | json_values, "metadata": json_values})
    | json_values,
    st.fixed_dictionaries(
        {},
        optional={
            key: json_values
            for key in ("model_type", "text_config", "vocab_size", "tie_word_embeddings", "architectures")
        },
    )
    | json_values,
)
def test_any_index_and_config_are_understood_or_refused(index: object, config: object) -> None:
    stores, store, root = in_memory()
    texts = {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": json.dumps(config).encode()}
    write_checkpoint(store, f"{root}/base", TENSORS, files={"config.json": texts["config.json"]})
    write_checkpoint(store, f"{root}/m", TENSORS, files=texts)
    wanted = recipe_of(f"{root}/base", f"{root}/m")
    check(lambda: read_catalog(wanted, stores), 2**14 + sum(map(len, texts.values())))
    assert {uri.rpartition("/")[0] for uri in store.opened} == {f"{root}/base", f"{root}/m"}


BOMBS = {
    "deep": b"[" * 100_000, "as deep as it gets": b"[" * 900 + b"]" * 900, "number": b"9" * 5000,
    "infinite": b'{"a": Infinity}', "not text": b"\xff\xfe\x00", "utf-16": '{"a": 1}'.encode("utf-16"),
    "deep values": b'{"model_type": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
    "list": b"[1, 2]", "null": b"null", "empty": b"", "half": b'{"a"', "surrogate": b'{"\\ud800": "\\udc00"}',
}  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("bomb", BOMBS, ids=str)
def test_a_bomb_in_the_place_of_a_config_is_refused_or_of_no_effect(tmp_path: Path, name: str, bomb: str) -> None:
    stores = Stores({})
    base, model = written(stores, tmp_path, **{name.replace(".", "__"): BOMBS[bomb]})
    check(lambda: read_catalog(recipe_of(base, model), stores), 2**17)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_config.json", "chat_template.json"]
)
@pytest.mark.parametrize("bomb", BOMBS, ids=str)
def test_a_bomb_in_the_place_of_a_tokenizer_is_a_difference(stores: Stores, name: str, bomb: str) -> None:
    store = stores.of("memory://x")
    store.put("memory://bombs/mine", BOMBS[bomb])
    store.put("memory://bombs/theirs", BOMBS[bomb] + b" ")
    ours = Tokenizer("base", "memory://bombs/a", {name: store.head("memory://bombs/mine", 0)[0]})
    theirs = Tokenizer("0", "memory://bombs/b", {name: store.head("memory://bombs/theirs", 0)[0]})
    with ThreadPoolExecutor(2) as threads:
        assert check(lambda: notes(ours, [theirs], stores, threads), 2**18) is None
    assert check(lambda: check_common_ids(ours, theirs, 10, stores), 2**18) is None


@pytest.mark.parametrize(
    "text", [b"---" + b"\n" * 65_000, b"---\n" + b"license:\n- " * 6000, b"---\nlicense: \xff\x00\x1b\n---"]
)
def test_a_model_card_is_read_in_linear_time(text: bytes) -> None:
    assert check(lambda: licence_of(text), 8 * len(text)) is None


def test_names_of_tensors_and_files_cannot_write_to_the_terminal(tmp_path: Path, stores: Stores) -> None:
    base, model = written(stores, tmp_path)
    name = "\x1b]0;owned\x07\u202e\nerror: none"
    write_checkpoint(stores.of(model), model, {**TENSORS, name: torch.ones(1)})
    Path(model, "a\x1b[2Jb.txt").touch()
    with pytest.raises(InputError, match=r"\\x1b\]0;owned\\x07\\u202e\\nerror: none"):
        read_catalog(recipe_of(base, model), stores)
    write_checkpoint(stores.of(model), model, {**TENSORS, name: torch.ones(1, dtype=torch.int32)})
    catalog = read_catalog(recipe_of(base, model, output={"path": f"{tmp_path}/o", "files_from": model}), stores)
    assert sum("\\x1b" in note for note in catalog.notes) == 2
    assert all(note.isprintable() for note in catalog.notes)
    assert str(MergeError(Problem("m", "\x9b31m\ud800"))) == "m: \\x9b31m\\ud800"


def test_tensors_of_any_name_and_of_no_elements_are_merged(tmp_path: Path, stores: Stores) -> None:
    names = [
        "",
        " ",
        "../../x",
        "__metadata",
        "a\x00b",
        "\x1b[31m",
        "\U0001f600",
        "x" * 4000,
        "constructor",
        "-0",
        "w\n",
    ]
    base = {name: torch.full((2,), float(number)) for number, name in enumerate(names)} | {"none": torch.ones(3, 0)}
    model = {name: tensor + 1 for name, tensor in base.items()}
    store = stores.of(str(tmp_path))
    write_checkpoint(store, f"{tmp_path}/base", base)
    write_checkpoint(store, f"{tmp_path}/m", model)
    family = Family(f"{tmp_path}/base", (f"{tmp_path}/m",), base, (model,))
    merge(family, tmp_path / "out", {"name": "task_arithmetic"})
    merged = read_tensors(tmp_path / "out")
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[name], model[name]) for name in names)


def test_a_link_out_of_a_model_is_not_followed_by_a_merge(tmp_path: Path, stores: Stores) -> None:
    base, model = written(stores, tmp_path)
    (tmp_path / "secret").write_text("{}")
    Path(base, "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"generation_config.json: is a link that leads out of its folder"):
        merging.merge(recipe_of(base, model))
    assert not Path(f"{base}-out").exists()
    merging.merge(recipe_of(base, model, storage={"local": {"follow_links": True}}))
    assert Path(f"{base}-out", "generation_config.json").read_text() == "{}"


# -- pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_folder_of_pickles_is_refused_without_being_opened(name: str) -> None:
    stores, store, root = in_memory()
    write_checkpoint(store, f"{root}/base", TENSORS)
    store.put(f"{root}/m/{name}", b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match="holds its weights as pickles, which can run code when opened"):
        read_catalog(recipe_of(f"{root}/base", f"{root}/m"), stores)
    assert not [uri for uri in store.opened if uri.startswith(f"{root}/m/")]


def test_pickles_beside_safetensors_are_never_opened() -> None:
    stores, store, root = in_memory()
    write_checkpoint(store, f"{root}/base", TENSORS, files={"pytorch_model.bin": b"x", "training_args.bin": b"x"})
    write_checkpoint(store, f"{root}/m", TENSORS, files={"optimizer.pt": b"x"})
    read_catalog(recipe_of(f"{root}/base", f"{root}/m"), stores)
    assert not [uri for uri in store.opened if uri.endswith((".bin", ".pt"))]


UNSAFE = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.load", "np.load", "numpy.load",
    "eval", "exec", "os.system", "yaml.load", "importlib.reload", "torch.jit.load", "torch.hub",
}  # fmt: skip


def _used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Name | ast.Attribute):
            yield ast.unparse(node)


def test_nothing_in_production_unpickles_or_evaluates() -> None:
    sources = sorted(Path(ties_ray.__file__).parent.rglob("*.py"))
    sources = [path for path in sources if path.parent.name != "testing"]  # show that stores can't be pickled
    assert len(sources) > 30
    assert set(_used(ast.parse("import numpy as np, pickle\nnp.load(1)"))) & UNSAFE == {"pickle", "np.load"}
    found = {path.name: set(_used(ast.parse(path.read_bytes()))) & UNSAFE for path in sources}
    own = {"compiling.py": {"pickle"}}  # kernels that this user has compiled; tests/kernels/test_code_folders.py
    assert {name: used for name, used in found.items() if used} == own


# -- recipes and tables


GOOD = "base: /b\nmodels: [/m]\nmethod: ties\noutput: /o\n"


def laughs(levels: int, form: str = "[{}]") -> str:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{level}: &a{level} {form.format(', '.join([f'*a{level - 1}'] * 10))}" for level in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#" * (parse.MAX_CHARACTERS + 1), "has 4,194,305 characters; a recipe has at most 4,194,304 characters"),
        ("[" * 100_000, "is nested more than 32 levels deep"),
        ("- " * 50_000, "is nested more than 32 levels deep"),
        ("? " * 50_000, "is nested more than 32 levels deep"),
        ('{"a":' * 50_000, "is nested more than 32 levels deep"),
        (laughs(9) + GOOD, "stands for more than 500,000 values"),
        (laughs(9) + GOOD + "exclude: *a8\n", "stands for more than 500,000 values"),
        (laughs(9, "{{<<: [{}]}}").replace("[x, x]", "{x: 1}"), "stands for more than 500,000 values"),
        ("a: &a [*a]\n" + GOOD, "stands for more than 500,000 values"),
        ("storage: &a {s3: *a}\n" + GOOD, "stands for more than 500,000 values"),
        ("a: &a 1\nb: &a [*a]\n", "has the anchor a twice"),
        ("base: !!python/object/apply:os.system [id]\n", "holds the tag tag:yaml.org,2002:python/object"),
        ("base: !!int abc", "holds the tag tag:yaml.org,2002:int"),
        ("base: ! x", "holds the tag !"),
        ("base: 2001-13-99", "holds a value that can't be read: month must be in 1..12; put it in quotes"),
        (GOOD + "run: {deadline: 10, workers: 2001-02-30}", "holds a value that can't be read"),
        (GOOD + "run: {workers: 0x" + "f" * 4000 + "}", "run.workers: .*, not a number of 16000 bits"),
        (GOOD + "run: {workers: 1000001}", "run.workers: should be less than or equal to 100000"),
        (GOOD + "run: {gpus_per_worker: .inf}", "run.gpus_per_worker: should be a finite number"),
        (GOOD + "run: {memory: '" + "9" * 4000 + "GB'}", r"run.memory: should be a number of bytes, .{0,300}\.\.\.$"),
        (GOOD + "run: {memory: '" + "9" * 100_000 + "GB'}", "holds a text of 100,002 characters"),
        ('base: "a\\0b"', r"base: 'a\\x00b' holds a control character"),
        ('exclude: ["a", "\\ud800"]', r"exclude.1: '\\ud800' holds a control character or half a character"),
        ('storage: {"s3\\n": {}}', r"storage: 's3\\n' holds a control character"),
        ("models: !!binary '////'", "holds the tag"),
        ("\x01", "special characters are not allowed"),
        ("%YAML " + "1" * 5000 + ".1\n---\na: 1", "holds a value that can't be read"),
    ],
    ids=lambda value: ascii(value)[:30],
)  # fmt: skip
def test_a_recipe_that_attacks_its_reader_is_refused(text: str, message: str) -> None:
    error = check(lambda: parse.parse(text), 8 * len(text))
    assert isinstance(error, RecipeError)
    assert re.search(message, str(error)), str(error)


def test_anchors_and_merge_keys_in_reason_are_fine() -> None:
    text = "models: [&m {path: /m, weight: 2.0}, {<<: *m, path: /n}]\nmethod: ties\nbase: /b\noutput: /o\n"
    assert [entry.weight for entry in parse.parse(text).models] == [2.0, 2.0]


def test_a_recipe_of_many_models_is_read() -> None:
    models = ",".join(f'{{"path": "/models/{number}", "weight": 0.5}}' for number in range(5000))
    text = f'{{"base": "/b", "method": "ties", "output": "/o", "models": [{models}]}}'
    assert len(parse.parse(text).models) == 5000


parse.parse(GOOD)  # imports what the first recipe imports, so that no bound counts it

fields = st.sampled_from([*Recipe.model_fields, "models.0", "run.workers", "storage.s3", "method.name", "x"])


@settings(seeded, max_examples=50)
@given(
    st.dictionaries(fields, json_values, max_size=3),
    st.dictionaries(st.sampled_from(list(Run.model_fields)), json_values),
)
def test_a_recipe_with_any_values_is_understood_or_refused(changes: dict[str, object], run: dict[str, object]) -> None:
    data: dict[str, Any] = {
        "base": "/b",
        "models": ["/m", {"path": "/n"}],
        "method": {"name": "ties"},
        "output": {"path": "/o"},
    }
    text = json.dumps(data | {"run": run} | changes)
    check(lambda: parse.parse(text), 2**14 + 64 * len(text))
    overrides = [f"{field}={json.dumps(value)}" for field, value in changes.items()]
    check(lambda: parse.parse(GOOD, "recipe", overrides), 2**14 + 64 * len(text))


@seeded
@given(st.text(alphabet=st.sampled_from("ab01:-?&*!|>%@`{}[],#\"' \n\t.~<=\\_/\u00e9\ufeff"), max_size=60))
def test_any_text_is_a_recipe_or_refused(text: str) -> None:
    assert isinstance(check(lambda: parse.parse(text), 2**15), RecipeError)
    check(lambda: parse.parse(GOOD + text), 2**15)


@settings(seeded, max_examples=60)
@given(
    st.binary(max_size=60)
    | st.lists(
        st.lists(
            st.sampled_from(["/a", "nan", "1e999", "0", "", '"', "*", "\0", "density", "s3://x", "-1", "x" * 300])
        ),
        max_size=4,
    ).map(lambda rows: b"path,weight,density\n" + "\n".join(map(",".join, rows)).encode())
)
def test_any_table_is_a_list_of_models_or_refused(table: bytes) -> None:
    stores = Stores({})
    stores.of("memory://x").put("memory://tables/t.csv", table)
    asked = ModelEntry(table="memory://tables/t.csv")
    with ThreadPoolExecutor(1) as threads:
        check(lambda: list(entries_of(asked, "models.0", stores, threads, [])), 2**15)


def test_a_large_table_of_nonsense_is_refused_in_a_few_lines() -> None:
    stores = Stores({})
    stores.of("memory://x").put("memory://tables/t.csv", b"path,weight\n" + b"/a,x\n" * 40_000)
    with (
        ThreadPoolExecutor(1) as threads,
        pytest.raises(InputError, match=r"t.csv:2: weight: Input should be a valid number") as raised,
    ):
        list(entries_of(ModelEntry(table="memory://tables/t.csv"), "models.0", stores, threads, []))
    assert len(raised.value.problems) == 21
    assert raised.value.problems[-1].what == "and 39,980 more problems"


# -- coverage-guided


def test_coverage_guided_fuzzing_finds_nothing_in_a_few_seconds(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed")
    flags = ["-seed=7", "-max_total_time=2", "-timeout=20", "-rss_limit_mb=2048", "-max_len=4096"]

    def fuzz(target: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "tests.tools.fuzz_readers", target, *flags, f"-artifact_prefix={tmp_path}/"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])

    with ThreadPoolExecutor(2) as threads:
        for done in threads.map(fuzz, hostile.TARGETS):
            assert done.returncode == 0, done.stderr[-3000:]
            assert int(re.findall(r"Done (\d+) runs", done.stderr)[-1]) > 20
