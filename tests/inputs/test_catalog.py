import hashlib
import json
import secrets
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from tests.conftest import Bucket
from tests.tools.adapters import make_pool
from tests.tools.families import CONFIG, Family, file_bytes, make_family, raw_bytes, tokenizer_json, write_checkpoint
from ties_ray import safetensors
from ties_ray.errors import InputError, RecipeError
from ties_ray.formats.checkpoint import Checkpoint
from ties_ray.inputs import tokenizers
from ties_ray.inputs.catalog import Catalog, read_catalog
from ties_ray.inputs.expand import overlaps
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.stores import NoOptions, Pin, Store, Stores, join
from ties_ray.stores.memory import Memory

TENSORS = {"model.embed_tokens.weight": torch.ones(4, 2), "model.ids": torch.arange(3)}
CONFIG_4 = {**CONFIG, "vocab_size": 4}


@pytest.fixture
def stores() -> Stores:
    return Stores({})


@pytest.fixture
def store(stores: Stores) -> Store:
    return stores.of("memory://x")


@pytest.fixture
def root() -> str:
    return f"memory://{secrets.token_hex(6)}"


def recipe_of(root: str, *models: object, **more: object) -> Recipe:
    return validate(
        {
            "base": f"{root}/base",
            "models": [f"{root}/{model}" if isinstance(model, str) else model for model in models],
            "method": "ties",
            "output": f"{root}-out/merged",
            **more,
        }
    )


def write_small(store: Store, root: str, *names: str, **files: bytes) -> None:
    for name in names:
        write_checkpoint(store, f"{root}/{name}", TENSORS, config=CONFIG_4, files=files)


def refused(recipe: Recipe, stores: Stores, kind: type[InputError | RecipeError] = InputError) -> list[str]:
    with pytest.raises(kind, match=r".") as raised:
        read_catalog(recipe, stores)
    assert type(raised.value) is kind
    return [str(problem) for problem in raised.value.problems]


def check_every_byte(catalog: Catalog, family: Family, stores: Stores) -> None:
    """Read each tensor where the catalog says it lies."""
    for model, tensors in zip(
        (catalog.base, *catalog.models), (family.base_tensors, *family.model_tensors), strict=True
    ):
        assert model.sources
        for name, source in model.sources.items():
            data = bytearray(tensors[name].nbytes)
            for read in Checkpoint().reads(source, 0, tensors[name].numel()):
                stores.of(model.uri).read(model.objects[read.object], read.start, memoryview(data))
            assert data == raw_bytes(tensors[name]), (model.uri, name)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_family_is_found_to_the_last_byte(stores: Stores, tmp_path: Path, shards: int, mixed: bool) -> None:
    family = make_family(stores.of(str(tmp_path)), str(tmp_path), shards=shards, mixed=mixed)
    catalog = read_catalog(recipe_of(str(tmp_path), "model-*"), stores)
    assert [model.uri for model in catalog.models] == list(family.models)
    assert [model.id for model in (catalog.base, *catalog.models)] == ["base", "0", "1", "2"]
    assert {parameter.name: parameter.shape for parameter in catalog.parameters} == {
        name: tuple(tensor.shape) for name, tensor in family.base_tensors.items()
    }
    assert [parameter.name for parameter in catalog.parameters if not parameter.merged] == [
        name for name in catalog.base.sources if not family.base_tensors[name].is_floating_point()
    ]
    check_every_byte(catalog, family, stores)


def test_the_json_form_is_exact(stores: Stores, store: Store, root: str) -> None:
    make_family(store, root, shards=2)
    catalog = read_catalog(
        recipe_of(root, "model-0", {"path": f"{root}/model-1", "weight": 0.1, "density": 0.3}), stores
    )
    adapter = TypeAdapter(Catalog)
    assert adapter.validate_json(adapter.dump_json(catalog)) == catalog


def test_s3_gives_the_same_with_one_request_a_file(s3_bucket: Bucket) -> None:
    stores = Stores(s3_bucket.storage)
    store = stores.of(s3_bucket.uri)
    family = make_family(store, f"{s3_bucket.uri}/family", num_models=2, shards=2)
    recipe = validate({
        "base": family.base, "models": [f"{s3_bucket.uri}/family/model-*"], "method": "ties",
        "output": f"{s3_bucket.uri}/out", "storage": s3_bucket.storage,
    })  # fmt: skip
    before = store.meter.requests
    catalog = read_catalog(recipe, stores)
    # Of each input two headers, index, config and README; of the base also the pins of the three files to take over.
    # The mask that all of them hold is compared with the base's.
    assert store.meter.requests - before == 3 * 5 + 3 + 3
    assert catalog.notes == ()
    check_every_byte(catalog, family, stores)


def test_a_header_above_the_first_request_takes_one_more(stores: Stores, store: Store, root: str) -> None:
    tensors = {f"a.parameter.with.a.name.of.some.length.{number}": torch.zeros(1) for number in range(4000)}
    for name in ("base", "m"):
        write_checkpoint(store, f"{root}/{name}", tensors)
    before = store.meter.requests, store.meter.bytes_read
    catalog = read_catalog(recipe_of(root, "m"), stores)
    assert len(catalog.parameters) == 4000
    # Of each input header, header's rest, config, README; the pins of three files to take over; two tokenizer files of
    # each, since this store's pins don't show that they are equal.
    assert store.meter.requests - before[0] == 2 * 4 + 3 + 2 * 2
    header = len(safetensors.build([(name, "F32", (1,)) for name in sorted(tensors)], {"format": "pt"}))
    assert 2 * header <= store.meter.bytes_read - before[1] < 2 * header + 16_000


def test_a_glob_is_sorted_by_bytes_and_leaves_out_what_not_names(stores: Stores, store: Store, root: str) -> None:
    write_small(store, root, "base", "t/é/v", "t/z/v", "t/Z/v", "t/broken/v", "t/.hidden/v")
    glob = {"path": f"{root}/t/*/v", "not": ["broken/*"], "at_least": 3, "weight": 0.5}
    catalog = read_catalog(recipe_of(root, glob, "t/broken/v"), stores)
    found = [(model.uri.removeprefix(root), model.id, model.weight) for model in catalog.models]
    assert found == [("/t/Z/v", "0", 0.5), ("/t/z/v", "1", 0.5), ("/t/é/v", "2", 0.5), ("/t/broken/v", "3", 1.0)]


def test_models_of_a_glob_are_in_the_order_of_their_whole_paths(stores: Stores, store: Store, root: str) -> None:
    write_small(store, root, "base", "t/a/v", "t/a-b/v", "t/a/u", "t/a0/v")
    models = read_catalog(recipe_of(root, {"path": f"{root}/t/*/*"}), stores).models
    # "-" comes before "/", and "0" after it, although the folder a is listed before a-b.
    assert [model.uri.removeprefix(f"{root}/t/") for model in models] == ["a-b/v", "a/u", "a/v", "a0/v"]


def test_tokenizers_of_different_sizes_differ_without_a_look_into_them(
    stores: Stores, store: Store, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter = tokenizer_json(4)[:-1] + b" }"
    write_small(store, root, "base", **{"tokenizer.json": tokenizer_json(4)})
    write_small(store, root, "m", **{"tokenizer.json": shorter})
    monkeypatch.setattr(tokenizers, "_fetch", lambda stores, pin: b"the same" if "tokenizer.json" in pin.uri else b"{}")
    assert "model m: tokenizer.json differs from the base's" in read_catalog(recipe_of(root, "m"), stores).notes


def test_relative_globs_work_in_the_current_folder(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small(stores.of("/"), str(tmp_path), "base", "m-1", "m-[2]")
    monkeypatch.chdir(tmp_path)
    recipe = validate({"base": "base", "models": ["m-?", "./m-[[]*"], "method": "ties", "output": "out"})
    assert [Path(model.uri).name for model in read_catalog(recipe, stores).models] == ["m-1", "m-[2]"]


def test_a_trainers_checkpoints_are_models_only_where_the_glob_names_them(
    stores: Stores, store: Store, root: str
) -> None:
    write_small(store, root, "base", "r/checkpoint-10", "r/checkpoint-20", "r/final")
    catalog = read_catalog(recipe_of(root, "r/*"), stores)
    assert [model.uri for model in catalog.models] == [f"{root}/r/final"]
    assert catalog.notes == (f"{root}/r/*: 2 checkpoint-* folders are not taken as models unless the glob names them",)
    assert len(read_catalog(recipe_of(root, "r/checkpoint-*"), stores).models) == 2


def test_what_globs_and_tables_lack_is_told_at_once(stores: Stores, store: Store, root: str) -> None:
    write_small(store, root, "base", "m")
    models = [
        "x-*",
        {"path": f"{root}/m*", "at_least": 2},
        {"path": f"{root}/m*", "not": ["m"]},
        {"table": f"{root}/t"},
    ]
    found = refused(recipe_of(root, *models), stores)
    assert found[0].startswith(f"models.0: no folder matches {root}/x-*")
    assert found[1].startswith("models.1: ")
    assert "yields 1 models, at_least is 2" in found[1]
    assert "`not` and `links` leave out all 1 matches" in found[2]
    assert f"models.3: there is no table {root}/t" in found[3]


def test_a_glob_that_could_mean_anything_is_refused(stores: Stores) -> None:
    models = ["s3://*/m", "/m/**/x"]
    recipe = validate({"base": "/b", "models": models, "method": "ties", "output": "/o"})
    found = refused(recipe, stores, RecipeError)
    assert "has a glob for the bucket" in found[0]
    assert "`**` in /m/**/x is not supported" in found[1]


def test_a_path_twice_needs_ids(stores: Stores, store: Store, root: str) -> None:
    write_small(store, root, "base", "m")
    (problem,) = refused(recipe_of(root, "m", "m/"), stores, RecipeError)
    assert f"models.1: {root}/m stands in the recipe twice, first as models.0; give each an `id`" in problem
    named = [{"path": f"{root}/m", "id": name} for name in "ab"]
    assert [model.id for model in read_catalog(recipe_of(root, *named), stores).models] == ["a", "b"]
    clash = [{"path": f"{root}/m", "id": "1"}, "base"]
    found = refused(recipe_of(root, *clash), stores, RecipeError)
    assert any("its change is zero" in problem for problem in found)
    assert any("2 models have the id '1'" in problem for problem in found)


def test_a_table_gives_paths_weights_and_densities(stores: Stores, store: Store, root: str) -> None:
    write_small(store, root, "base", "a", "b", "c")
    rows = f"path,weight,density\n{root}/b,0.5,0.1\n{root}/a,,\n\n{root}/c/, 2 ,\n"
    store.put(f"{root}/pool.csv", rows.encode())
    table = {"table": f"{root}/pool.csv", "weight": 3, "at_least": 3}
    models = read_catalog(recipe_of(root, table), stores).models
    assert [(model.uri[-1], model.weight, model.density) for model in models] == [
        ("b", 0.5, 0.1), ("a", 3.0, None), ("c", 2.0, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "needs a header row"),
        (b"weight\n1\n", "needs a header row and at least one model; columns: path, weight, density"),
        (b"path,lambda\n/m,1\n", "it has .*lambda"),
        (b"path\n/m,1\n", ":2: has more fields than the header row"),
        (b"path\n" + b"/m\n" * 40_001, "has more than 40,000 rows"),
        (b"path,weight\n/m,heavy\nmemory://n,1\n/o,nan\n", ":2: weight: .*\n.*:4: weight: "),
        (b"path,density\n/m,1.5\n", ":2: density: .*less than or equal to 1"),
        (b"path,weight\n,1\n", ":2: give either `path` or"),
        (b"path\nmemory://m-*\n", ":2: has a glob"),
        (b"\xff\xfe", "is not a CSV file in UTF-8"),
    ],
)
def test_a_broken_table_is_refused_with_its_line(
    stores: Stores, store: Store, root: str, text: bytes, message: str
) -> None:
    write_small(store, root, "base")
    store.put(f"{root}/pool.csv", text)
    with pytest.raises(InputError, match=message):
        read_catalog(recipe_of(root, {"table": f"{root}/pool.csv"}), stores)


def test_all_problems_of_all_inputs_are_told_at_once(stores: Stores, store: Store, root: str) -> None:
    write_small(store, root, "base", "good", "cut", "shape")
    content = file_bytes(TENSORS)
    store.put(f"{root}/cut/model.safetensors", content[:-1])
    store.put(f"{root}/shape/model.safetensors", file_bytes({"model.embed_tokens.weight": torch.ones(4, 3)}))
    found = refused(recipe_of(root, "cut", "good", "shape", "nothing"), stores)
    assert len(found) == 3
    assert any(
        f"{root}/cut/model.safetensors: is truncated: {len(content) - 1} of {len(content)}" in one for one in found
    )
    assert any(one.startswith(f"{root}/shape: has 1 parameters of another shape") for one in found)
    assert any(one.startswith(f"models.3: {root}/nothing: there is nothing") for one in found)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["m.Q4_K_M.gguf"], "holds GGUF files"),
        (["config.json", "pytorch_model.bin"], "holds its weights as pickles, .*save it as safetensors"),
        (["consolidated.00.pth"], "holds its weights as pickles"),
        (["run/x", "other/x"], r"holds only folders \(other, run\)"),
        (["config.json"], r"holds no safetensors file \(config.json\)"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_with_advice(
    stores: Stores, store: Store, root: str, files: list[str], message: str
) -> None:
    write_small(store, root, "base")
    for name in files:
        store.put(f"{root}/m/{name}", b"{}")
    with pytest.raises(InputError, match=f"^models.0: {root}/m: {message}"):
        read_catalog(recipe_of(root, "m"), stores)


@pytest.mark.parametrize("on", ["memory", "disk"])
def test_a_file_in_the_place_of_a_folder_is_refused(stores: Stores, root: str, tmp_path: Path, on: str) -> None:
    where = root if on == "memory" else str(tmp_path)
    write_small(stores.of(where), where, "base")
    with pytest.raises(InputError, match=f"{where}/base/model.safetensors: is a file; give the folder that holds it"):
        read_catalog(recipe_of(where, "base/model.safetensors", output="memory://out"), stores)


def test_an_unreadable_folder_is_refused(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small(stores.of("/"), str(tmp_path), "base", "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"m/model.safetensors: a link that leads nowhere"):
        read_catalog(recipe_of(str(tmp_path), "m"), stores)


def test_output_and_inputs_may_not_lie_in_each_other(stores: Stores, store: Store, root: str, tmp_path: Path) -> None:
    write_small(store, root, "base", "m")
    for output in (f"{root}/m", f"{root}/base/merged/", root):
        found = refused(recipe_of(root, "m", output=output), stores, RecipeError)
        assert "lie in each other; write to a folder of its own" in found[0]
    assert not overlaps("s3://a/m", "s3://a/m2")
    assert not overlaps("s3://a/m", "/a/m")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert overlaps(f"{tmp_path}/link/x", f"file://{tmp_path}/real")


def test_excluded_parameters_are_not_merged_and_an_idle_pattern_is_noted(
    stores: Stores, store: Store, root: str
) -> None:
    make_family(store, root)
    catalog = read_catalog(recipe_of(root, "model-0", exclude=["*.bias", "lm_hed.*"]), stores)
    merged = {parameter.name: parameter.merged for parameter in catalog.parameters}
    assert not any(merged[name] for name in merged if name.endswith(".bias"))
    assert merged["model.norm.weight"]
    assert catalog.notes == ("no tensor of base or models is called 'lm_hed.*' (exclude)",)


def test_what_differs_in_the_tokenizers_is_noted(stores: Stores, store: Store, root: str) -> None:
    settings = {"eos_token": {"content": "<t1>"}, "chat_template": "{{ messages }}"}
    write_small(store, root, "base")
    own = {"tokenizer_config.json": json.dumps({**settings, "model_max_length": 7}).encode()}
    write_small(store, root, "same", **own)
    write_small(store, root, "eos", **{"tokenizer_config.json": json.dumps({**settings, "eos_token": "<t2>"}).encode()})
    write_small(store, root, "chat", "chat2", **{"chat_template.jinja": b"{{ other }}"})
    write_small(store, root, "ids", **{"tokenizer.json": tokenizer_json(4, "u")})
    catalog = read_catalog(recipe_of(root, "same", "eos", "chat", "chat2", "ids"), stores)
    assert catalog.notes == (
        "model eos: eos_token differs from the base's",
        "models chat, chat2: the chat template differs from the base's",
        "model ids: tokenizer.json differs from the base's",
    )


def test_extra_rows_are_dropped_only_where_the_tokenizers_agree(stores: Stores, store: Store, root: str) -> None:
    write_small(store, root, "base")
    longer = {"model.embed_tokens.weight": torch.ones(6, 2)}
    config = {**CONFIG, "vocab_size": 6}
    recipe = recipe_of(root, "m", allow={"extra_rows": "drop"})
    write_checkpoint(store, f"{root}/m", longer, config=config)
    notes = read_catalog(recipe, stores).notes
    assert f"{root}/m: rows beyond the base's are left aside" in notes[0]
    write_checkpoint(store, f"{root}/m", longer, config=config, files={"tokenizer.json": tokenizer_json(6, "u")})
    assert (
        "4 of the common ids mean other tokens (id 0: '<u0>' where the base has '<t0>')" in refused(recipe, stores)[0]
    )
    store.delete(f"{root}/m/tokenizer.json")
    assert f"a vocabulary (tokenizer.json, vocab.json or vocab.txt) in {root}/m" in refused(recipe, stores)[0]
    store.put(f"{root}/m/tokenizer.json", b'{"model": {"vocab": [[]]}}')
    assert f"vocab.txt) in {root}/m it can't be shown" in refused(recipe, stores)[0]
    store.delete(f"{root}/m/tokenizer.json")
    store.put(f"{root}/m/vocab.txt", b"<t0>\n<t1>\n<t2>\n<t3>\n<new>\n")
    assert len(read_catalog(recipe, stores).models) == 1
    assert "has more embedding rows than the base" in refused(recipe_of(root, "m"), stores)[0]


def test_the_output_takes_small_files_from_the_input_that_is_named(stores: Stores, store: Store, root: str) -> None:
    write_small(
        store, root, "base", **{"modeling_x.py": b"1", "training_args.bin": b"2", ".cache": b"3", "LICENSE": b"4"}
    )
    write_small(store, root, "m", **{"chat_template.jinja": b"{{ 5 }}"})
    store.put(f"{root}/base/onnx/model.onnx", b"6")
    catalog = read_catalog(recipe_of(root, "m"), stores)
    assert [file.name for file in catalog.small_files] == [
        "LICENSE", "config.json", "modeling_x.py", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert f"not taken over from {root}/base: onnx/, training_args.bin" in catalog.notes
    for named in ("0", f"{root}/m"):
        recipe = recipe_of(root, "m", output={"path": f"{root}-out", "files_from": named})
        assert "chat_template.jinja" in [file.name for file in read_catalog(recipe, stores).small_files]
    recipe = recipe_of(root, "m", output={"path": f"{root}-out", "files_from": "1"})
    assert "'1' is neither the id nor the path of an input" in refused(recipe, stores, RecipeError)[0]


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        (b"---\nlicense: mit\nwidget:\n- text: x\n---\n# M\nlicense: gpl\n", "mit"),
        (
            b"---\r\nlicense: other\r\nlicense_name: llama3\r\nlicense_link: https://x/y\r\n---\r\n",
            "other llama3 https://x/y",
        ),
        (b"---\nlicense:\n- mit\n- 'bsd'\n---\n", "mit, bsd"),
        (b"# M\nlicense: gpl\n", ""),
        (b"", ""),
    ],
)
def test_the_licence_comes_from_the_model_card(
    stores: Stores, store: Store, root: str, readme: bytes, licence: str
) -> None:
    write_small(store, root, "base")
    write_small(store, root, "m", **{"README.md": readme})
    assert read_catalog(recipe_of(root, "m"), stores).models[0].licence == licence


def test_hashes_and_versions_pinned_by_hand_are_verified(stores: Stores, store: Store, root: str) -> None:
    write_small(store, root, "base", "m")
    digest = hashlib.sha256(file_bytes(TENSORS)).hexdigest()
    model = {"path": f"{root}/m", "sha256": {"model.safetensors": digest}}
    assert "1 files pinned by sha256 were read whole" in read_catalog(recipe_of(root, model), stores).notes[0]
    wrong = {
        **model,
        "sha256": {"model.safetensors": "0" * 64, "x.safetensors": digest},
        "version_id": {"model.safetensors": "v"},
    }
    found = refused(recipe_of(root, wrong), stores)
    assert any("pins x.safetensors, its weight files are model.safetensors" in one for one in found)
    assert any("is at version none, the recipe pins v" in one for one in found)
    assert any(f"has the SHA-256 {digest}, the recipe pins 000" in one for one in found)


def test_a_header_bomb_costs_one_request(stores: Stores, store: Store, root: str) -> None:
    write_small(store, root, "base")
    store.put(f"{root}/m/model.safetensors", (99_999_999).to_bytes(8, "little") + bytes(1000))
    before = store.meter.bytes_read
    assert "is truncated: its header alone has 99999999 bytes" in refused(recipe_of(root, "m"), stores)[0]
    assert store.meter.bytes_read - before < 20_000


def test_a_file_that_changes_after_the_plan_is_not_read(stores: Stores, tmp_path: Path) -> None:
    family = make_family(stores.of("/"), str(tmp_path), num_models=1)
    pin = read_catalog(recipe_of(str(tmp_path), "model-0"), stores).models[0].objects[0]
    stores.of("/").put(join(family.models[0], "model.safetensors"), file_bytes(family.model_tensors[0]))
    with pytest.raises(InputError, match="changed since the plan was made"):
        stores.of("/").read(pin, 0, memoryview(bytearray(8)))


class _SizesOnly(Memory):
    """A store that shows nothing of a file but its size."""

    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        pin, data = super().head(uri, nbytes)
        return pin._replace(etag=""), data

    def read(self, pin: Pin, start: int, buffer: memoryview) -> None:
        super().read(super().head(pin.uri, 0)[0], start, buffer)


class _WeakStores(Stores):
    def of(self, uri: str) -> Store:
        return _SizesOnly(NoOptions())


def test_pins_that_hold_the_size_alone_are_noted(store: Store, root: str) -> None:
    write_small(store, root, "base", "m")
    notes = read_catalog(recipe_of(root, "m"), _WeakStores({})).notes
    assert notes == ("2 files under memory:// are pinned by their size alone: a change that keeps it goes unseen",)


def test_a_family_has_what_real_ones_have(stores: Stores, tmp_path: Path) -> None:
    family = make_family(stores.of("/"), str(tmp_path))
    again = make_family(stores.of("/"), str(tmp_path / "again"))
    assert all(torch.equal(family.model_tensors[2][name], tensor) for name, tensor in again.model_tensors[2].items())
    assert family.base_tensors.keys() - family.model_tensors[0].keys() == {"embed.position_ids"}
    still = "model.never_changes.weight"
    assert raw_bytes(family.base_tensors[still])[:2] == b"\x00\x80"
    assert all(raw_bytes(tensors[still]) == raw_bytes(family.base_tensors[still]) for tensors in family.model_tensors)
    names = [name for name, tensor in family.model_tensors[0].items() if tensor.is_floating_point()]
    deltas = [
        torch.cat([(tensors[name].float() - family.base_tensors[name].float()).flatten() for name in names])
        for tensors in family.model_tensors
    ]
    magnitudes = deltas[0].abs().sort(descending=True).values
    kept = len(magnitudes) // 5
    assert (magnitudes == magnitudes[kept - 1]).sum() > 5
    assert ((deltas[0] + deltas[1] == 0) & (deltas[0] != 0)).sum() > 50


def test_models_stored_alike_share_their_sources_in_memory_and_in_json(store: Store, stores: Stores, root: str) -> None:
    make_family(store, root, num_models=3)
    catalog = read_catalog(recipe_of(root, "model-0", "model-1", "model-2"), stores)
    form = TypeAdapter(Catalog)
    stored = form.dump_json(catalog)
    again = form.validate_json(stored)
    assert again == catalog
    assert all(model.sources is again.models[0].sources for model in again.models)
    assert stored.count(b'"lm_head.weight":') == 2  # of the base, and of the models


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=2)
    first, second = pool.adapters
    recipe = {"base": first, "models": [second], "method": "average", "output": str(tmp_path / "out")}
    with pytest.raises(InputError, match=r"base: .*is no whole model: its format is lora"):
        merging.plan(validate(recipe))
