"""Folders as people have them: of several libraries, with several models, half downloaded, under odd names."""

import secrets
from pathlib import Path

import pytest
import torch

from tests.conftest import Bucket
from tests.tools.families import file_bytes
from ties_ray.errors import InputError, RecipeError
from ties_ray.inputs.catalog import Catalog, read_catalog
from ties_ray.operations import merging
from ties_ray.outputs import Output
from ties_ray.planning.planner import make_plan
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.stores import Store, Stores

CONFIG = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 98888\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def stores() -> Stores:
    return Stores({})


@pytest.fixture
def store(stores: Stores) -> Store:
    return stores.of("memory://x")


@pytest.fixture
def root() -> str:
    return f"memory://{secrets.token_hex(6)}"


def weights(value: float, *names: str) -> bytes:
    return file_bytes({name: torch.full((4, 2), float(value)) for name in names or ("a.weight", "b.weight")})


def write(store: Store, folder: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        store.put(f"{folder}/{name}", data)


def recipe_of(root: str, *models: object, base: object = None, **more: object) -> Recipe:
    output = {"path": f"{root}-out"} | more.pop("output", {})  # type: ignore[operator]
    data = {"base": base or f"{root}/base", "models": list(models), "method": "average", "output": output,
            "run": {"executor": "local", "workers": 1, "disk_cache": 0}, **more}  # fmt: skip
    return validate(data)


def read(root: str, stores: Stores, *models: object, **more: object) -> Catalog:
    return read_catalog(recipe_of(root, *models, **more), stores)


def test_the_file_that_is_chosen_is_merged_and_the_choice_is_noted(stores: Stores, store: Store, root: str) -> None:
    files = {"config.json": CONFIG, "last.safetensors": weights(1), "ema.safetensors": weights(3)}
    write(store, f"{root}/base", {"config.json": CONFIG, "model.safetensors": weights(0)})
    write(store, f"{root}/m", files)
    with pytest.raises(InputError, match=r"holds 2 models: `file: ema.safetensors`, `file: last.safetensors` \["):
        read(root, stores, f"{root}/m")
    run_ids = set()
    for name, value in (("last", 1.0), ("ema", 3.0)):
        recipe = recipe_of(
            root, {"path": f"{root}/m", "file": f"{name}.safetensors"}, output={"path": f"{root}-out/{name}"}
        )
        result = merging.merge(recipe)
        assert any(f"{root}/m: the recipe chooses {name}.safetensors; left aside: " in note for note in result.notes)
        card = store.get(f"{root}-out/{name}/README.md", 2**20)[1].decode()
        assert f"the recipe chooses {name}.safetensors" in card
        assert torch.equal(merged(store, f"{root}-out/{name}/model.safetensors")["a.weight"], torch.full((4, 2), value))
        run_ids.add(result.run_id)
    assert len(run_ids) == 2


def merged(store: Store, uri: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(store.get(uri, 2**20)[1])


def test_a_variant_is_chosen_for_base_and_models(stores: Stores, store: Store, root: str) -> None:
    for name in ("base", "m"):
        files = {"model.fp16.safetensors": weights(1), "model.bf16.safetensors": weights(2), "config.json": CONFIG}
        write(store, f"{root}/{name}", files)
    variant = {"path": f"{root}/m", "variant": "fp16"}
    found = read(root, stores, variant, base={"path": f"{root}/base", "variant": "bf16"})
    assert [model.objects[0].uri for model in (found.base, *found.models)] == [
        f"{root}/base/model.bf16.safetensors", f"{root}/m/model.fp16.safetensors",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"has no model, or several, of the variant 'fp8'.* it has `file: model.bf16"):
        read(root, stores, {**variant, "variant": "fp8"}, base={"path": f"{root}/base", "variant": "bf16"})


def test_a_choice_holds_for_all_folders_of_a_glob_and_a_table(stores: Stores, store: Store, root: str) -> None:
    write(store, f"{root}/base", {"model.safetensors": weights(0)})
    for name in "ab":
        write(store, f"{root}/p/{name}", {"x.safetensors": weights(1), "y.safetensors": weights(2)})
    found = read(root, stores, {"path": f"{root}/p/*", "file": "y.safetensors"})
    assert [model.objects[0].uri[-15:] for model in found.models] == ["/a/y.safetensors"[1:], "/b/y.safetensors"[1:]]
    store.put(f"{root}/t.csv", f"path,file\n{root}/p/a,x.safetensors\n{root}/p/b,\n".encode())
    found = read(root, stores, {"table": f"{root}/t.csv", "file": "y.safetensors"})
    assert [model.objects[0].uri[-13:] for model in found.models] == ["x.safetensors", "y.safetensors"]


def test_a_base_without_a_choice_stands_as_its_path(root: str) -> None:
    assert recipe_of(root, "m").model_dump(mode="json")["base"] == f"{root}/base"
    chosen = recipe_of(root, "m", base={"path": "/b", "file": "f"})
    assert validate(chosen.model_dump(mode="json", exclude_unset=True)) == chosen
    with pytest.raises(RecipeError, match=r"base.fil: unknown key; did you mean 'file'"):
        recipe_of(root, "m", base={"path": "/b", "fil": "f"})


def test_shards_without_index_are_read_where_the_recipe_says_so(stores: Stores, store: Store, root: str) -> None:
    write(store, f"{root}/base", {"model.safetensors": weights(0)})
    write(store, f"{root}/m", dict(zip(SHARDS, (weights(1, "a.weight"), weights(1, "b.weight")), strict=True)))
    with pytest.raises(InputError, match=rf"has 2 shards and no index .*`file: {SHARDS[0]}` beside its `path`"):
        read(root, stores, f"{root}/m")
    (model,) = read(root, stores, {"path": f"{root}/m", "file": SHARDS[0]}).models
    assert [pin.uri.rpartition("/")[2] for pin in model.objects] == list(SHARDS)
    store.delete(f"{root}/m/{SHARDS[0]}")
    store.put(f"{root}/m/{SHARDS[0]}.incomplete", b"x")
    with pytest.raises(InputError, match=rf"lacks 1 of 2 shards: {SHARDS[0]}; .*\({SHARDS[0]}.incomplete is not fin"):
        read(root, stores, {"path": f"{root}/m", "file": SHARDS[1]})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize(("data", "what"), [
    (POINTER, "pointer of Git LFS"), (b"<!doctype html><p>Log in", "HTML page"), (b"", "empty"),
    (b"<Error><Code>AccessDenied</Code></Error>", "AccessDenied"), (b'{"error": "gone"}', "gone"),
])  # fmt: skip
def test_a_broken_download_is_named_as_what_it_is(
    stores: Stores, store: Store, root: str, name: str, data: bytes, what: str
) -> None:
    write(store, f"{root}/base", {"model.safetensors": weights(0), "config.json": CONFIG})
    write(store, f"{root}/m", {"model.safetensors": weights(1), "config.json": CONFIG, name: data})
    with pytest.raises(InputError, match=f"{root}/m/{name}: is .*{what}"):
        read(root, stores, f"{root}/m")


def test_a_file_with_holes_is_refused_by_what_lies_beside_it(stores: Stores, store: Store, root: str) -> None:
    write(store, f"{root}/base", {"model.safetensors": weights(0), "model.safetensors.aria2": b"x"})
    write(store, f"{root}/m", {"model.safetensors": weights(0)})
    with pytest.raises(InputError, match=r"is not downloaded to its end: model.safetensors.aria2 lies beside it"):
        read(root, stores, f"{root}/m")


@pytest.mark.parametrize(("files", "message"), [
    (["pytorch_model_fsdp_0/x.distcp", "trainer_state.json"], "state of a training with FSDP"),
    (["__0_0.distcp", ".metadata"], "state of a distributed training"),
    (["global_step500/x.pt", "latest", "zero_to_fp32.py"], "DeepSpeed"),
    (["config.json", "checkpoint-5/model.safetensors"], r"may be one of those inside \(checkpoint-5\)"),
    (["model.safetensors.part", "config.json"], r"model.safetensors.part is not finished"),
    (["optimizer.bin", "config.json", "0/model.safetensors"], r"holds no safetensors file .*inside \(0\)"),
])  # fmt: skip
def test_what_is_no_model_yet_is_named(stores: Stores, store: Store, root: str, files: list[str], message: str) -> None:
    write(store, f"{root}/base", {"model.safetensors": weights(0)})
    write(store, f"{root}/m", dict.fromkeys(files, b"{}"))
    with pytest.raises(InputError, match=message):
        read(root, stores, f"{root}/m")


def test_a_pipeline_lists_its_models_and_one_of_them_merges(stores: Stores, store: Store, root: str) -> None:
    for name in ("base", "m"):
        write(store, f"{root}/{name}", {
            "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}', "scheduler/scheduler_config.json": b"{}",
            "unet/config.json": b'{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}',
            "unet/diffusion_pytorch_model.fp16.safetensors": weights(name == "m"),
            "text_encoder/config.json": CONFIG, "text_encoder/model.safetensors": weights(0),
            "v1-5-pruned.safetensors": weights(0),
        })  # fmt: skip
    with pytest.raises(InputError, match=r"models are text_encoder, unet .*as in .*/m/text_encoder, for base"):
        read(root, stores, f"{root}/m")
    result = merging.merge(recipe_of(root, f"{root}/m/unet", base=f"{root}/base/unet"))
    assert [file.name for file in result.files] == ["diffusion_pytorch_model.safetensors"]
    copy = f"{root}-out".removeprefix("memory://")
    assert result.opened_by == (
        f'from diffusers import UNet2DConditionModel; model = UNet2DConditionModel.from_pretrained("{copy}")'
    )
    assert b"library_name: diffusers" in store.get(f"{root}-out/README.md", 2**20)[1]
    single = {"path": f"{root}/m", "file": "v1-5-pruned.safetensors"}
    assert read(root, stores, single, base={**single, "path": f"{root}/base"}).models


@pytest.mark.parametrize(("files", "library", "written"), [
    ({"config.json": CONFIG, "model.safetensors": 0}, "transformers", "model"),
    ({"config.json": CONFIG, "weights.safetensors": 0}, "transformers", "model"),
    ({"model.safetensors": 0}, "safetensors", "model"),
    ({"open_clip_config.json": b"{}", "open_clip_model.safetensors": 0}, "open_clip", "open_clip_model"),
    ({"params.json": b"{}", "consolidated.safetensors": 0}, "mistral-common", "consolidated"),
    ({"config.json": b'{"architecture": "vit", "num_classes": 3, "pretrained_cfg": {}}', "model.safetensors": 0},
     "timm", "model"),
    ({"config.json": CONFIG, "modules.json": b"[]", "model.safetensors": 0}, "sentence-transformers", "model"),
    ({"config.json": b'{"_class_name": "VAE", "_diffusers_version": "1"}', "diffusion_pytorch_model.safetensors": 0},
     "diffusers", "diffusion_pytorch_model"),
    ({"config.json": b'{"_class_name": "x(); y", "_diffusers_version": "1"}', "model.safetensors": 0},
     "transformers", "model"),
])  # fmt: skip
def test_a_model_is_written_under_the_names_that_its_library_opens(
    stores: Stores, store: Store, root: str, files: dict[str, bytes], library: str, written: str
) -> None:
    for name, value in (("base", 0), ("m", 1)):
        write(store, f"{root}/{name}", {file: data or weights(value) for file, data in files.items()})
    plan = make_plan(recipe := recipe_of(root, f"{root}/m"), read_catalog(recipe, stores))
    assert plan.library.name == library
    assert [file.name for file in plan.files] == [f"{written}.safetensors"]
    small = make_plan(recipe := recipe_of(root, f"{root}/m", output={"file_size": 40}), read_catalog(recipe, stores))
    names = [file.name for file in small.files]
    one = [f"{written}.safetensors"]
    assert names == ([f"{written}-00001-of-00002.safetensors", f"{written}-00002-of-00002.safetensors"]
                     if small.library.shards else one)  # fmt: skip
    output: Output = small.recipe.output
    index = output.index(small.files, small.catalog.parameters, {}, small.library)
    assert (index and index[0]) == (f"{written}.safetensors.index.json" if len(names) > 1 else None)


def test_an_output_that_no_library_opens_says_so(stores: Stores, store: Store, root: str) -> None:
    write(store, f"{root}/base", {"model.safetensors": weights(0)})
    write(store, f"{root}/m", {"model.safetensors": weights(1), "config.json": CONFIG})
    assert any(
        "base has no config.json, so the output has none" in note for note in read(root, stores, f"{root}/m").notes
    )
    found = read(root, stores, f"{root}/m", output={"files_from": f"{root}/m"})
    assert not found.notes
    assert found.library.name == "transformers"


def test_a_whole_model_beside_an_adapter_config_is_a_whole_model(stores: Stores, store: Store, root: str) -> None:
    write(store, f"{root}/base", {"model.safetensors": weights(0), "config.json": CONFIG})
    files = {"model.safetensors": weights(1), "config.json": CONFIG, "adapter_config.json": b'{"peft_type": "LORA"}'}
    write(store, f"{root}/m", files)
    found = read(root, stores, f"{root}/m")
    assert found.models[0].format == "checkpoint"
    assert any("is a whole model; left aside, as of an adapter: adapter_config.json" in note for note in found.notes)
    store.put(f"{root}/m/adapter_model.safetensors", weights(1, "base_model.model.a.lora_A.weight"))
    choice = "choose: `file: adapter_model.safetensors` or `file: model.safetensors` beside its `path`"
    with pytest.raises(InputError, match=choice):
        read(root, stores, f"{root}/m")
    whole = read(root, stores, {"path": f"{root}/m", "file": "model.safetensors"})
    assert whole.models[0].format == "checkpoint"
    with pytest.raises(InputError, match="one factor of a pair without the other"):  # so the adapter was read
        read(root, stores, {"path": f"{root}/m", "file": "adapter_model.safetensors"})
    write(store, f"{root}/n", {"adapter_config.json": b"{}", "model.safetensors": weights(1, "x.lora_A.weight")})
    with pytest.raises(InputError, match=r"factors in model.safetensors .*rename it to adapter_model.safetensors"):
        read(root, stores, f"{root}/n")


ODD = ("tuned [final]", "lr[1e-4]", "a*b", "what?", "a b", "ünï-模型", "100%", "x=1&y=2", "hash#tag", "a+b", "[[]x]")


def test_a_path_that_exists_wins_over_a_pattern(stores: Stores, tmp_path: Path) -> None:
    local, root = stores.of("/"), str(tmp_path)
    write(local, f"{root}/base", {"model.safetensors": weights(0)})
    for name in (*ODD, "lr1", "axb"):
        write(local, f"{root}/p/{name}", {"model.safetensors": weights(1)})

    def uris(*models: object) -> list[str]:
        return [Path(model.uri).name for model in read(root, stores, *models).models]

    assert uris(*(f"{root}/p/{name}" for name in ODD)) == list(ODD)
    named = [{"path": f"{root}/p/{name}", "glob": False, "id": f"the {name}"} for name in ODD]
    assert uris(*named) == list(ODD)
    table = "path\n" + "".join(f'"{root}/p/{name}"\n' for name in ODD)
    local.put(f"{root}/t.csv", table.encode())
    assert uris({"table": f"{root}/t.csv"}) == list(ODD)
    local.put(f"{root}/t.csv", f"path\n{root}/p/lr[[]1e-4[]]\n".encode())
    assert uris({"table": f"{root}/t.csv"}) == ["lr[1e-4]"]
    assert uris({"path": f"{root}/p/[la]*", "not": ["lr[1e-4]", "a*b"]}) == ["a b", "a+b", "axb", "lr1"]
    assert uris({"path": f"{root}/p/[la]*", "not": ["lr[[]*", "a?b"]}) == ["lr1"]
    with pytest.raises(InputError, match=r"no folder matches .*`\[` begins a set of characters: `glob: false`"):
        read(root, stores, f"{root}/p/gone[1]")
    with pytest.raises(RecipeError, match=r"name one model, not a glob or a table or a run \(`glob: false` takes"):
        recipe_of(root, {"path": "a[b]", "id": "x"})


def test_odd_names_are_found_in_a_bucket(s3_bucket: Bucket) -> None:
    stores, root = Stores(s3_bucket.storage), s3_bucket.uri
    store = stores.of(root)
    write(store, f"{root}/base", {"model.safetensors": weights(0)})
    names = [name for name in ODD if not set(name) & set("*?[")]
    for name in ODD:
        write(store, f"{root}/p/{name}", {"model.safetensors": weights(1)})
    store.put(f"{root}/t.csv", "".join(f'"{line}"\n' for line in ["path", *(f"{root}/p/{n}" for n in ODD)]).encode())
    more = {"storage": s3_bucket.storage, "output": {"path": "memory://odd"}}
    for models in ([f"{root}/p/{name}" for name in ODD], [f"{root}/p/*"], [{"table": f"{root}/t.csv"}]):
        found = read(root, stores, *models, **more)
        assert {model.uri.rpartition("/")[2] for model in found.models} == set(ODD), models
    left = read(root, stores, {"path": f"{root}/p/*", "not": [name for name in ODD if name not in names]}, **more)
    assert {model.uri.rpartition("/")[2] for model in left.models} == set(names)


def test_links_of_a_globbed_pool_are_told_and_can_be_left_out(stores: Stores, tmp_path: Path) -> None:
    local, root = stores.of("/"), str(tmp_path)
    for name in ("base", "p/a", "elsewhere/m"):
        write(local, f"{root}/{name}", {"model.safetensors": weights(1)})
    (tmp_path / "p/out").symlink_to(tmp_path / "elsewhere/m")
    found = read(root, stores, f"{root}/p/*")
    note = f"{root}/p/*: 1 folders are links (out to {root}/elsewhere/m); `links: false` leaves them out"
    assert note in found.notes
    assert len(found.models) == 2
    assert len(read(root, stores, {"path": f"{root}/p/*", "links": False}).models) == 1
    (tmp_path / "p/latest").symlink_to("a")
    with pytest.raises(RecipeError, match=r"twice, first .*leave one out: `links: false`, or `not: \[latest"):
        read(root, stores, f"{root}/p/*")
    (tmp_path / "p/dangling").symlink_to("nowhere")
    (tmp_path / "p/notes.md").symlink_to("/etc/hostname")
    assert len(read(root, stores, {"path": f"{root}/p/*", "not": ["latest", "dangling"]}).models) == 2
    assert len(read(root, stores, {"path": f"{root}/p/*", "links": False}).models) == 1
    with pytest.raises(InputError, match=r"p/dangling: there is nothing"):
        read(root, stores, {"path": f"{root}/p/*", "not": ["latest"]})
