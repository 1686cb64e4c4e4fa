"""Every remedy that is printed works: applied as it is written, the merge succeeds and loses nothing unsaid.

`CASES` is a table: an input, the remedy it provokes, how that is applied, and how many trained values are left aside.
test_advice.py reads the code for remedies that stand neither here nor among those that no test can follow.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.tools.adapters import Module, make_pool, write_adapter
from tests.tools.families import CONFIG, Family, Tensors, file_bytes, make_family, tokenizer_json, write_checkpoint
from ties_ray.errors import FRESH_THEN, MergeError, Problem
from ties_ray.formats.lora import REASONS
from ties_ray.operations import merging
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import MergeResult
from ties_ray.stores import Stores

STORE = Stores({}).of("/")
TIES = {"name": "ties"}
Recipe = dict[str, Any]
SAYS_LOSS = re.compile(
    r"without what the models trained|with what was trained|leaves? (?:it|them|one) (?:out|aside)|leaves out what was"
    r" trained|change is zero|takes their change as zero|drop|leave the weight out|have no embedding"
)
"""What a remedy must say where something trained is left aside."""


MASKS = {"path": "{folder}/out", "kind": "masks"}


class Case(NamedTuple):
    sentence: str
    provoke: Callable[[Path], Recipe]
    remedy: str
    """A part of the printed remedy, as it is in the code or as it is printed."""
    snippet: str = ""
    """A pattern of the one snippet in backticks that is pasted into the recipe; empty: `by_hand` does it."""
    by_hand: Callable[[Recipe, Problem], None] | None = None
    lost: int = 0
    """Trained values of all models that are left aside afterwards: the remedy says so."""
    refused: int = 0
    """Models that are left out afterwards."""
    fresh: bool = False
    """The remedy says --fresh."""


# Inputs.


def recipe_for(base: str | None, models: Sequence[object], folder: Path, **more: Any) -> Recipe:
    made = {"models": list(models), "method": TIES, "output": {"path": str(folder / "out")}}
    return {**({"base": base} if base else {}), **made, "run": {"executor": "local"}, **more}


def merged(recipe: Recipe, *, fresh: bool = False) -> MergeResult:
    return merging.merge(validate(recipe), fresh=fresh)


def family(folder: Path, **how: Any) -> Family:
    return make_family(STORE, str(folder), num_models=2, **{"dtype": "F32", **how})


def changed(change: Callable[[Tensors], object], *, config: object = None, both: bool = False, **more: Any) -> Any:
    """Return how to make a family whose second model's tensors, and with `both` all, were changed in place."""

    def provoke(folder: Path) -> Recipe:
        made = family(folder)
        written = {**CONFIG, **(config or {})}  # type: ignore[dict-item]
        places = [(made.models[1], made.model_tensors[1])]
        if both:
            places += [(made.base, made.base_tensors), (made.models[0], made.model_tensors[0])]
        for uri, tensors in places:
            change(tensors)
            write_checkpoint(STORE, uri, tensors, config=written if uri == made.models[1] else CONFIG)
        return recipe_for(made.base, made.models, folder, **more)

    return provoke


def files(change: Callable[[Path], object], which: str = "model-1", **more: Any) -> Callable[[Path], Recipe]:
    """Return how to make a family in one of whose folders files were changed."""

    def provoke(folder: Path) -> Recipe:
        made = family(folder, shards=2)
        change(folder / which)
        return recipe_for(made.base, made.models, folder, **more)

    return provoke


def plain(**more: Any) -> Callable[[Path], Recipe]:
    return files(lambda folder: None, **more)


def put(name: str, value: float, which: int = 0) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[which] = value

    return change


def extras(count: int, pattern: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({pattern.format(number): torch.ones(2) for number in range(count)})


def resized(rows: int) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat((tensors[name], tensors[name]))[:rows].clone()

    return change


Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 8


def module(out: int, width: int) -> Module:
    return normal(2, width), normal(out, 2), 4.0


def pool(
    modules: dict[str, Module] | None = None,
    config: dict[str, object] | None = None,
    extra: Tensors | None = None,
    *,
    base: bool = True,
    kind: str = "delta",
    more_base: Tensors | None = None,
    **more: Any,
) -> Callable[[Path], Recipe]:
    """Return how to make two good adapters and a third one."""

    def provoke(folder: Path) -> Recipe:
        made = make_pool(STORE, str(folder), num_adapters=2, targets=(("q_proj", "k_proj"),))
        if more_base:
            write_checkpoint(STORE, made.base, {**made.base_tensors, **more_base}, config={"vocab_size": 48})
        third = str(folder / "adapter-0002")
        named = {f"base_model.model.{key}": each for key, each in (extra or {}).items()}
        write_adapter(STORE, third, modules or {Q: module(16, 16)}, config=config, extra=named)
        output = {"path": str(folder / "out"), "kind": kind}
        return {**recipe_for(made.base if base else None, [*made.adapters, third], folder), "output": output, **more}

    return provoke


# Remedies by hand.


def setting(**fields: Any) -> Callable[[Recipe, Problem], None]:
    """Return how to set fields of the recipe, `a__b` for a.b."""

    def by_hand(recipe: Recipe, problem: Problem) -> None:
        for place, value in fields.items():
            *parents, last = place.split("__")
            part = recipe
            for parent in parents:
                part = part.setdefault(parent, {})
            if value is None:
                del part[last]
            else:
                part[last] = value

    return by_hand


def weights(*values: float | None) -> Callable[[Recipe, Problem], None]:
    def by_hand(recipe: Recipe, problem: Problem) -> None:
        recipe["models"] = [
            {"path": one["path"] if isinstance(one, dict) else one, **({} if weight is None else {"weight": weight})}
            for one, weight in zip(recipe["models"], values, strict=True)
        ]

    return by_hand


def weighted(*values: float, **more: Any) -> Callable[[Path], Recipe]:
    def provoke(folder: Path) -> Recipe:
        recipe = plain(**more)(folder)
        weights(*values)(recipe, Problem("", ""))
        return recipe

    return provoke


def on_disk(change: Callable[[Path, str], object]) -> Callable[[Recipe, Problem], None]:
    """Return how to change a file of the folder that the problem names."""
    return lambda recipe, problem: change(Path(problem.where.rpartition(": ")[2]), problem.remedy) and None


def rows_written(folder: Path, remedy: str) -> None:
    """Write the number of rows that the remedy names into the config that the output takes over."""
    (count,) = re.findall(r"write (\d+) there", remedy)
    config = folder.parent / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": int(count)}))


def instead(pattern: str) -> Callable[[Recipe, Problem], None]:
    """Return how to write the path that the remedy names, in place of a model's own or of all models."""

    def by_hand(recipe: Recipe, problem: Problem) -> None:
        (path,) = re.search(pattern, problem.remedy).groups()  # type: ignore[union-attr]
        number = re.match(r"models\.(\d+)", problem.where)
        assert number
        recipe["models"][int(number[1])] = path

    return by_hand


def memory_raised(recipe: Recipe, problem: Problem) -> None:
    (mebibytes,) = re.findall(r"give it (\d+) MiB", problem.remedy)
    recipe["run"]["memory"] = f"{mebibytes}MiB"


def memory_raised_by(recipe: Recipe, problem: Problem) -> None:
    (count,) = re.findall(r"raise it by ([\d,]+) bytes", problem.remedy)
    recipe["run"]["memory"] += int(count.replace(",", ""))


def without_entry(recipe: Recipe, problem: Problem) -> None:
    del recipe["models"][int(problem.where.partition(".")[2])]


def with_ids(recipe: Recipe, problem: Problem) -> None:
    recipe["models"] = [{"path": path, "id": f"m{number}"} for number, path in enumerate(recipe["models"])]


def without_ids(recipe: Recipe, problem: Problem) -> None:
    recipe["models"] = [one["path"] for one in recipe["models"]]


def with_base(recipe: Recipe, problem: Problem) -> None:
    recipe["base"] = str(Path(recipe["models"][0]).parent / "base")


def with_head(recipe: Recipe, problem: Problem) -> None:
    base = Path(recipe["base"])
    tensors = {**load_file(base / "model.safetensors"), "score.weight": normal(2, 16)}
    write_checkpoint(STORE, str(base), tensors, config={"vocab_size": 48})
    recipe["allow"] = {"saved_modules": "merge"}


def pinned(recipe: Recipe, problem: Problem) -> None:
    (digest,) = re.findall(r"has the SHA-256 (\w+)", problem.what)
    recipe["models"][1]["sha256"]["model.safetensors"] = digest


def removed(recipe: Recipe, problem: Problem) -> None:
    """Remove from the output what the problem names."""
    for name in re.split(", ", problem.what.rpartition(": ")[2]):
        (Path(problem.where) / name).unlink()


# Folders.


def both_ways(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model.safetensors")


def renamed(*pairs: tuple[str, str]) -> Callable[[Path], object]:
    return lambda folder: [(folder / old).rename(folder / new) for old, new in pairs]


def without_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def two_models(folder: Path) -> None:
    """Make a folder with two models under names of no library."""
    for file in [*folder.glob("model-*"), folder / "model.safetensors.index.json"]:
        file.unlink()
    for name in ("a", "b"):
        shutil.copy(folder.parent / "one" / "model-1" / "model.safetensors", folder / f"{name}.safetensors")


def with_two_models(folder: Path) -> Recipe:
    family(folder / "one")
    return files(two_models)(folder)


def with_an_adapter(folder: Path) -> Recipe:
    made = family(folder)
    (Path(made.models[0]) / "adapter_model.safetensors").write_bytes(file_bytes({"x.lora_A.weight": torch.ones(2, 2)}))
    return recipe_for(made.base, made.models, folder)


def to_file(folder: Path) -> Recipe:
    made = family(folder)
    return recipe_for(made.base, [made.models[0], f"{made.models[1]}/model.safetensors"], folder)


def entry_given(recipe: Recipe, problem: Problem) -> None:
    recipe["models"][1] = yaml.safe_load(problem.remedy.partition("holds it: ")[2])


def pipeline(folder: Path) -> Recipe:
    made = family(folder / "f")
    for uri in (made.base, *made.models):
        place = folder / Path(uri).name
        shutil.copytree(uri, place / "unet")
        (place / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return recipe_for(str(folder / "base"), [str(folder / f"model-{n}") for n in (0, 1)], folder)


def component(recipe: Recipe, problem: Problem) -> None:
    (name,) = re.findall(r"/(\w+), for base and models", problem.remedy)
    recipe["base"] += f"/{name}"
    recipe["models"] = [f"{path}/{name}" for path in recipe["models"]]


def globbed(change: Callable[[Path], object], pattern: str = "{folder}/model-*") -> Callable[[Path], Recipe]:
    def provoke(folder: Path) -> Recipe:
        made = family(folder)
        change(folder)
        return recipe_for(made.base, [pattern.format(folder=folder)], folder)

    return provoke


def states(folder: Path) -> None:
    for number in (0, 1):
        (folder / f"model-{number}").rename(folder / f"checkpoint-{number}")


def run_of(*names: str, **window: Any) -> Callable[[Path], Recipe]:
    """Return how to make a run whose checkpoints have these names, two at most, and to ask for a window of it."""

    def provoke(folder: Path) -> Recipe:
        made = family(folder)
        for uri, name in zip(made.models, names, strict=True):
            (folder / "run").mkdir(exist_ok=True)
            Path(uri).rename(folder / "run" / name)
        return recipe_for(made.base, [{"run": str(folder / "run"), **window}], folder)

    return provoke


def window_mended(recipe: Recipe, problem: Problem) -> None:
    (snippet,) = re.findall(r"`(\w+: [^`]*)`", problem.remedy)
    recipe["models"][0] |= yaml.safe_load(snippet)


def bracketed(folder: Path) -> None:
    (folder / "run[1]").mkdir()
    for number in (0, 1):
        (folder / f"model-{number}").rename(folder / "run[1]" / f"model-{number}")


def occupied(first: Recipe | None, *, names: Sequence[str] = ()) -> Callable[[Path], Recipe]:
    """Return how to have an output that holds another merge, done, and further files."""

    def provoke(folder: Path) -> Recipe:
        recipe = plain()(folder)
        if first is not None:
            merged({**recipe, **first})
        for name in names:
            place = folder / "out" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"another's")
        return recipe

    return provoke


def nothing(recipe: Recipe, problem: Problem) -> None: ...


def folders_removed(recipe: Recipe, problem: Problem) -> None:
    for name in re.split(", ", problem.what.rpartition(": ")[2]):
        shutil.rmtree(Path(problem.where) / name.partition("/")[0])


def by_run_id(recipe: Recipe, problem: Problem) -> None:
    recipe["output"]["path"] += "/{run_id}"


def own_rows(folder: Path) -> Recipe:
    recipe = changed(lambda tensors: None)(folder)
    config = Path(recipe["base"]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 50}))
    return recipe


ZERO = {"name": "task_arithmetic", "lambda": 1.0}
BIG = torch.finfo(torch.float32).max
ROWS = 16 * 2
"""Values of one row in both embeddings."""


def config_written(**fields: object) -> Callable[[Path, str], object]:
    def change(folder: Path, remedy: str) -> None:
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))

    return change


def config_copied(folder: Path, remedy: str) -> None:
    (folder / "kept.json").rename(folder / "adapter_config.json")


def unconfigured(folder: Path) -> Recipe:
    recipe = pool()(folder)
    (folder / "adapter-0002" / "adapter_config.json").rename(folder / "adapter-0002" / "kept.json")
    return recipe


def other_spelling(folder: Path) -> Recipe:
    return pool({f"language_model.{Q}": module(16, 16)}, base=False)(folder)


def nested(folder: Path) -> Recipe:
    recipe = pool()(folder)
    (folder / "both").mkdir()
    for number in (1, 2):
        shutil.move(recipe["models"][number], folder / "both")
    return {**recipe, "models": [recipe["models"][0], f"{folder}/both"]}


def linked_out(folder: Path) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    (folder.parent / "elsewhere").mkdir()
    shutil.move(file, folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere" / file.name)


def other_tokens(folder: Path) -> Recipe:
    recipe = changed(resized(46), config={"vocab_size": 46})(folder)
    (folder / "model-1/tokenizer.json").write_bytes(tokenizer_json(46, prefix="u"))
    return {**recipe, "allow": {"missing": "zero"}}


def tokenizer_added(folder: Path, remedy: str) -> None:
    shutil.copy(folder.parent / "base" / "tokenizer.json", folder)


def table(*rows: str) -> Callable[[Path], Recipe]:
    """Return how to list the models in a table; the second model's folder has a name that a table must quote."""

    def provoke(folder: Path) -> Recipe:
        made = family(folder)
        for name in ("model-0,x", "model-[x]"):
            shutil.copytree(made.models[0], folder / name)
        (folder / "t.csv").write_text("\n".join(rows).replace("{folder}", str(folder)))
        return recipe_for(made.base, [{"table": f"{folder}/t.csv"}], folder)

    return provoke


def table_written(*rows: str) -> Callable[[Recipe, Problem], None]:
    def by_hand(recipe: Recipe, problem: Problem) -> None:
        path = Path(recipe["models"][0]["table"])
        path.write_text("\n".join(rows).replace("{folder}", str(path.parent)))

    return by_hand


def coefficients(*rows: str, method: object = "average") -> Callable[[Path], Recipe]:
    """Return how to give numbers by parameter in a file."""

    def provoke(folder: Path) -> Recipe:
        (folder / "c.csv").write_text("\n".join(rows))
        return plain(method=method, coefficients={"file": f"{folder}/c.csv"})(folder)

    return provoke


def lines_written(*rows: str) -> Callable[[Recipe, Problem], None]:
    def by_hand(recipe: Recipe, problem: Problem) -> None:
        Path(recipe["coefficients"]["file"]).write_text("\n".join(rows))

    return by_hand


def numbers_written(
    models: Sequence[str], patterns: Sequence[str], name: str, values: object
) -> Callable[[Recipe, Problem], None]:
    """Return how to write a file of coefficients in safetensors, by the recipe's own path."""

    def by_hand(recipe: Recipe, problem: Problem) -> None:
        metadata = {"models": json.dumps(models), "patterns": json.dumps(patterns)}
        save_file({name: torch.tensor(values)}, recipe["coefficients"]["file"], metadata)

    return by_hand


def numbers(models: Sequence[str], patterns: Sequence[str], name: str, values: object) -> Callable[[Path], Recipe]:
    """Return how to give numbers of two adapters of rank 8 in a file of safetensors."""

    def provoke(folder: Path) -> Recipe:
        made = make_pool(STORE, str(folder), num_adapters=2, ranks=(8,))
        recipe = recipe_for(made.base, made.adapters, folder, coefficients={"file": f"{folder}/c.safetensors"})
        numbers_written(models, patterns, name, values)(recipe, Problem("", ""))
        return recipe

    return provoke


def with_companions(name: str) -> Callable[[Path], Recipe]:
    """Return how to give a method what it needs beside the models, and one model a negative weight."""

    def provoke(folder: Path) -> Recipe:
        made = family(folder)
        tensors = {key: value.float().abs() for key, value in made.base_tensors.items() if value.is_floating_point()}
        if name == "gram":
            tensors = {Q + ".weight": torch.eye(16)}
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        models = [{"path": uri, "with": {name: f"{folder}/{name}"}, "weight": 1} for uri in made.models]
        models[1]["weight"] = -1
        method = {"fisher": "fisher", "gram": "regmean"}[name]
        return recipe_for(made.base, models, folder, method=method)

    return provoke


CASES = (
    # Checkpoints.
    Case("a head of one model is left out", changed(extras(1, "score.weight")),
         "leaves them out of the merge, with what was trained in them", "exclude", lost=2),
    Case("a dozen modules of one model are left out by their parent", changed(extras(12, "vision.part{}.weight")),
         'exclude: ["vision.*"]', "exclude", lost=24),
    Case("forty tensors without a common module are left out with their model", changed(extras(40, "own_{}")),
         "leave it out (`allow: {refused_model: drop}` does)", "allow", refused=1),
    Case("what one layer lacks is zero there", changed(lambda tensors: tensors.pop("model.layers.1.norm.bias")),
         "`allow: {missing: zero}` takes their change as zero", "allow"),
    Case("what one layer lacks is excluded there and in no other layer",
         changed(lambda tensors: tensors.pop("model.layers.1.norm.bias")),
         "copies the base's, without what the models trained in them", "exclude", lost=16),
    Case("a parameter of another shape is excluded, and in no other layer",
         changed(lambda tensors: tensors.update({"model.layers.0.norm.bias": torch.ones(3)})),
         'is it a fine-tune of this base? {}', "exclude", lost=16 + 3),
    Case("a table that differs is the base's", changed(lambda tensors: tensors["model.mask"].logical_not_()),
         "they can't be merged; {}", "exclude", lost=2 * 16),
    Case("a complex tensor is copied",
         changed(lambda tensors: tensors.update({"turn[0]: x": torch.ones(2, dtype=torch.complex64)}), both=True),
         "copies the base's", "exclude", lost=2 * 2),
    Case("an 8-bit float is copied",
         changed(lambda tensors: tensors.update({"turn": torch.ones(2).to(torch.float8_e5m2)}), both=True),
         "give the unquantised model", "exclude", lost=2 * 2),
    Case("a table of integers that is called a weight is copied",
         changed(lambda tensors: tensors.update({"ids.weight": torch.arange(4)}), both=True),
         "where these are no weights, {}", "exclude", lost=2 * 4),
    Case("rows beyond the base's are left aside", changed(resized(50), config={"vocab_size": 50}),
         "`allow: {extra_rows: drop}` leaves them aside", "allow", lost=2 * ROWS),
    Case("rows beyond the base's are kept by their tokens", changed(resized(50), config={"vocab_size": 50}),
         "`vocabulary: union` keeps them", "vocabulary"),
    Case("rows of other tokens are matched by token", other_tokens, "`vocabulary: base` matches the rows by token",
         "vocabulary", lost=46 * 2 * 16),
    Case("rows that a model lacks have no change", changed(resized(46), config={"vocab_size": 46}),
         "`allow: {missing: zero}` takes the change of the other rows as zero", "allow"),
    # Folders.
    Case("of a single file and an index one is chosen", files(both_ways),
         "remove the one that is not the model, or choose: {}", "file"),
    Case("shards without an index are read as they are", files(without_index),
         "download the index too, or read these shards as they are: {}", "file"),
    Case("one of two models is chosen", with_two_models, "`file: {name}` beside its `path` chooses it", "file"),
    Case("a file that is not there is chosen anew",
         lambda folder: {**(recipe := plain()(folder)),
                         "models": [recipe["models"][0], {"path": recipe["models"][1], "file": "no.safetensors"}]},
         "it has {}", "file"),
    Case("of an adapter and a whole model in one folder the model is chosen", with_an_adapter,
         "choose: `file: {}` or `file: {}` beside its `path`", r"file: model\.safetensors"),
    Case("a file is named by its folder", to_file, ": {path: {}, file: {}}", by_hand=entry_given),
    Case("a component of a pipeline is merged", pipeline, "merge one of them, as in {}/{}, for base and models",
         by_hand=component),
    Case("a link to another model of a glob is left out",
         globbed(lambda folder: (folder / "model-9").symlink_to(folder / "model-0")),
         "leave one out: `links: false`, or `not: [{}]`", "links"),
    Case("a link to another model of a glob is left out by name",
         globbed(lambda folder: (folder / "model-9").symlink_to(folder / "model-0")),
         "leave one out: `links: false`, or `not: [{}]`", "not"),
    Case("an empty folder of a glob is left out", globbed(lambda folder: (folder / "model-9").mkdir()),
         "an empty folder that a glob found: `not: [{}]`", "not"),
    Case("checkpoints of a training are named", globbed(states, "{folder}/*-?"), "name them: {}/checkpoint-*",
         by_hand=lambda recipe, problem: recipe["models"].__setitem__(
             0, f"{Path(recipe['base']).parent}/checkpoint-*")),
    Case("one naming of a run's checkpoints is chosen", run_of("step-1", "checkpoint-2"), "choose one: `run: {}/{}`",
         by_hand=window_mended),
    Case("a window takes all checkpoints that there are", run_of("step-1", "step-2", last=3),
         "`last: {}` takes all of them", by_hand=window_mended),
    Case("one of two folders of a step is left out", run_of("step-1", "step-01"), "leave one out: `not: [{}]`",
         by_hand=window_mended),
    Case("a window takes as many checkpoints as it has coefficients", run_of("step-1", "step-2", schedule=[1]),
         "`last: {}` takes as many", by_hand=window_mended),
    Case("a bracket in a glob is quoted", globbed(bracketed, "{folder}/run[1]/model-*"),
         "; `[` begins a set of characters: `glob: false` or `[[]` takes it as it is",
         by_hand=lambda recipe, problem: recipe["models"].__setitem__(0, recipe["models"][0].replace("[", "[[]"))),
    # Recipes.
    Case("a model that is listed twice has an id each",
         lambda folder: {**(recipe := plain()(folder)), "models": recipe["models"][:1] * 2},
         "give each an `id` if this is meant", by_hand=with_ids),
    Case("the base among its models is left out",
         lambda folder: {**(recipe := plain()(folder)), "models": [*recipe["models"], recipe["base"]]},
         "leave it out: its change is zero", by_hand=without_entry),
    Case("an output inside an input has a folder of its own",
         lambda folder: {**(recipe := plain()(folder)), "output": {"path": recipe["base"] + "/out"}},
         "write to a folder of its own", by_hand=lambda recipe, problem: recipe["output"].update(
             path=str(Path(recipe["base"]).parent / "elsewhere"))),
    Case("files come from an input that there is", plain(output={"path": "{folder}/out", "files_from": "9"}),
         "write `base`, or a model's id, position or path", by_hand=setting(output__files_from="base")),
    Case("files come from the base where the rows are the base's",
         lambda folder: {**(recipe := changed(resized(50), config={"vocab_size": 50})(folder)),
                         "allow": {"extra_rows": "drop"}, "output": {**recipe["output"], "files_from": "1"}},
         "write `files_from: base`", "files_from", lost=2 * ROWS),
    Case("files come from no model that is left out",
         lambda folder: {**(recipe := changed(extras(1, "own"))(folder)), "allow": {"refused_model": "drop"},
                         "output": {**recipe["output"], "files_from": "1"}},
         "write `base`, or a model that is merged", by_hand=setting(output__files_from="base"), refused=1),
    Case("a config states the rows of the output", own_rows,
         "write {} there, or take the small files of another input", by_hand=on_disk(rows_written)),
    Case("a config of another input states the rows", own_rows,
         "write {} there, or take the small files of another input (`output.files_from`)",
         by_hand=setting(output__files_from="0")),
    Case("a hash that was wrong is pinned",
         lambda folder: {**(recipe := changed(lambda tensors: None)(folder)), "models": [
             recipe["models"][0], {"path": recipe["models"][1], "sha256": {"model.safetensors": "0" * 64}}]},
         "use the file that was pinned, or pin this one", by_hand=pinned),
    Case("a folder with a bracket is quoted in a table", table("path", "{folder}/model-[y]"),
         "write one folder a row; `[[]` stands for `[`", by_hand=table_written("path", "{folder}/model-[[]x]")),
    Case("a path with a comma is quoted", table("path,weight", "{folder}/model-0,x,1"), "quote a field with commas",
         by_hand=table_written("path,weight", '"{folder}/model-0,x",1')),
    Case("a level of folders has a star", globbed(lambda folder: None, "{folder}/**"),
         "write one `*` for each level of folders",
         by_hand=lambda recipe, problem: recipe["models"].__setitem__(
             0, f"{Path(recipe['base']).parent}/model-*")),
    Case("a link out of a folder is trusted", files(linked_out),
         "put the file itself there, or set `storage: {local: {follow_links: true}}` if you trust the folder",
         "storage"),
    Case("vocabularies are there to compare rows",
         lambda folder: {**changed(resized(46), config={"vocab_size": 46})(folder), "allow": {"missing": "zero"},
                         **{"exclude": [(folder / "model-1/tokenizer.json").unlink() or "none"]}},
         "add the tokenizer's files, or drop the model", by_hand=on_disk(tokenizer_added)),
    Case("folders of modules that are not there are left out",
         files(lambda folder: (folder / "modules.json").write_text(json.dumps(
             [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}])), "base"),
         "complete the folder, or remove {} to have the transformer alone",
         by_hand=lambda recipe, problem: (Path(recipe["base"]) / "modules.json").unlink()),
    Case("a negative weight counts as zero where a module is missing",
         weighted(1, -2, method={"name": "average", "missing_module": "skip"}),
         "use missing_module: zero, or positive weights", by_hand=setting(method__missing_module="zero")),
    Case("the official profile knows no weights", weighted(1, 2, method={"name": "ties", "profile": "official"}),
         "leave the weight out, or use profile paper", by_hand=weights(None, None)),
    Case("a model has an id of its own",
         lambda folder: {**(recipe := plain()(folder)),
                         "models": [{"path": path, "id": "same"} for path in recipe["models"]]},
         "give each its own; by default it is the position", by_hand=without_ids),
    Case("weights that sum to zero are changed", weighted(1, -1, method={"name": "average"}), "change a weight",
         by_hand=weights(1, 2)),
    Case("a model at least has a weight", weighted(0, 0), "give at least one model a weight", by_hand=weights(1, None)),
    Case("fewer models must agree", plain(method={"name": "consensus", "agree": 5}), "lower it",
         by_hand=setting(method__agree=2)),
    Case("a negative weight is summed", weighted(1, -1), "use merge: sum, or a positive weight",
         by_hand=setting(method__merge="sum")),
    Case("a negative weight is combined linearly",
         weighted(1, -1, method={"name": "dare", "density": 0.5, "combine": "ties", "vote": "plain"}),
         "use combine: linear, or a positive weight", by_hand=setting(method__combine="linear")),
    Case("a method that uses no weights gets none", weighted(1, 2, method={"name": "magmax"}), "leave the weight out",
         by_hand=weights(None, None)),
    Case("an arc joins two models",
         lambda folder: {**(recipe := plain(method={"name": "slerp"})(folder)), "models": recipe["models"][:1]},
         "use multislerp or karcher",
         by_hand=setting(method={"name": "multislerp"})),
    Case("a negative weight pulls nowhere", weighted(1, -1, method={"name": "karcher"}),
         "give karcher a positive weight", by_hand=weights(1, 1)),
    Case("information weighs positive weights", with_companions("fisher"), "give fisher a positive weight",
         by_hand=lambda recipe, problem: recipe["models"][1].update(weight=1)),
    Case("a closed form has positive weights", with_companions("gram"), "give regmean a positive weight",
         by_hand=lambda recipe, problem: recipe["models"][1].update(weight=1)),
    Case("a method that needs all models keeps no state",
         plain(method="consensus", output={"path": "{folder}/out", "state": True}),
         "leave it out, and merge all models in one recipe", by_hand=setting(output__state=False)),
    Case("an adapter keeps no state",
         lambda folder: {**(recipe := pool(kind="adapter")(folder)), "output": {**recipe["output"], "state": True}},
         "use kind: checkpoint or kind: delta", by_hand=setting(output__kind="delta")),
    Case("a mean over spectra has positive weights", weighted(1, -1, method={"name": "star"}),
         "give it a positive weight", by_hand=weights(1, 2)),
    Case("probabilities lie between 0 and 1", plain(method={"name": "della", "epsilon": 0.9}),
         "lower method.epsilon", by_hand=setting(method__epsilon=0.1)),
    Case("blocks have a place for every model", plain(method={"name": "cabs", "n": 4, "m": 4}),
         "raise method.m, or lower method.n", by_hand=setting(method__m=16)),
    Case("a key is spelt as the recipe knows it", plain(exlude=["lm_head.*"]), "did you mean {}?",
         by_hand=lambda recipe, problem: recipe.update(exclude=recipe.pop("exlude")), lost=2 * 48 * 16),
    Case("an exclude of everything is narrowed", plain(exclude=["*"]), "drop the model, or mend `exclude`",
         by_hand=setting(exclude=[])),
    Case("a column that the method does not have is dropped",
         coefficients("pattern,weight,density", "*,1,0.5"), "drop the column",
         by_hand=lines_written("pattern,weight", "*,1")),
    Case("a density of a file is a share",
         coefficients("pattern,density", "*,2", method={"name": "ties", "trim": "tensor"}),
         "give one above 0 and at most 1", by_hand=lines_written("pattern,density", "*,0.2")),
    Case("a gradient over no layers is a number",
         plain(method={"name": "task_arithmetic", "lambda": {"*embed*": [0, 1]}}),
         "give one number, or a table by pattern",
         by_hand=setting(method__lambda={"*embed*": 0.5})),
    Case("a lambda is for all models", coefficients("model,pattern,lambda", "0,*,0.5", method="task_arithmetic"),
         "leave its model out: lambda is for all", by_hand=lines_written("model,pattern,lambda", ",*,0.5")),
    Case("a pattern matches a parameter", plain(method={"name": "task_arithmetic", "lambda": {"*nrom*": 0.5}}),
         "mend the pattern, or leave it out", by_hand=setting(method__lambda={"*norm*": 0.5})),
    Case("one threshold cuts at one density", plain(method={"name": "ties", "density": {"*norm*": 0.5}}),
         "use trim: tensor, or one density for a model",
         by_hand=setting(method={"name": "ties", "trim": "tensor", "density": {"*norm*": 0.5}})),
    Case("a row of coefficients has a pattern", coefficients("pattern,weight", ",1"), "write * for all parameters",
         by_hand=lines_written("pattern,weight", "*,1")),
    Case("a coefficient is a number", coefficients("pattern,weight", "*,much"), "write a number",
         by_hand=lines_written("pattern,weight", "*,2")),
    Case("a row of coefficients names a model by its id", coefficients("model,pattern,weight", "model-1,*,2"),
         "write its id, by default its position from 0", by_hand=lines_written("model,pattern,weight", "1,*,2")),
    Case("a file of tensors holds what it may hold", numbers(["0"], ["*"], "value", [[1.0]]),
         "write the file as the guide on numbers by layer says",
         by_hand=numbers_written(["0"], ["*"], "weight", [[1.0]])),
    Case("many patterns become few", numbers(["0"] * 201, ["*"] * 200, "weight", [[1.0] * 200] * 201),
         "use patterns that match several parameters",
         by_hand=numbers_written(["0"], ["*"], "weight", [[1.0]])),
    Case("weights by rank are as many as the rank", numbers(["0"], ["*q_proj*"], "ranks", [[[1.0, 2.0]]]),
         "give one for each rank, or narrow the pattern",
         by_hand=numbers_written(["0"], ["*q_proj*"], "ranks", [[[1.0, 2.0] * 4]])),
    # Masks.
    Case("masks come from a method that gives them", plain(method="emr", output=dict(MASKS)),
         "use `masks: true` of emr or consensus, or another kind of output",
         by_hand=setting(method={"name": "emr", "masks": True})),
    Case("masks need an output that holds them", plain(method={"name": "emr", "masks": True}),
         "write `kind: masks`, or leave `masks` out", by_hand=setting(method__masks=False)),
    Case("a mask has one factor",
         plain(method={"name": "emr", "masks": True, "lambda": {"*norm*": 2}}, output=dict(MASKS)),
         "give one lambda", by_hand=setting(method__lambda=2)),
    Case("a merge gives a part or masks", plain(method={"name": "emr", "masks": True, "part": "0"}, output=dict(MASKS)),
         "leave one of them out", by_hand=setting(method__part=None)),
    # Memory.
    Case("a worker's memory is raised as the message says", plain(
        run={"executor": "local", "memory": "128MiB"}, output={"path": "{folder}/out", "part_size": "64MiB"}),
         "give it {} MiB, or lower output.part_size", by_hand=memory_raised),
    # What only bytes show.
    Case("a model's NaN counts as no change", changed(put(Q + ".weight", torch.nan)),
         "repair or drop the model, or `allow: {nan: zero}` (their change is zero)", "allow", fresh=True),
    Case("a parameter with NaN is excluded, and in no other layer", changed(put(Q + ".weight", torch.nan)),
         f'`exclude: ["{Q}.weight"]`', "exclude", fresh=True, lost=2 * 256),
    Case("the base's NaN is copied", changed(put(Q + ".weight", torch.nan), both=True), "repair the base, or {}; {}",
         "exclude", fresh=True, lost=2 * 256),
    Case("a merge that overflows has a wider dtype",
         changed(put(Q + ".weight", 1e6), output={"path": "{folder}/out", "dtype": "float16"}),
         "choose a wider output.dtype", by_hand=setting(output__dtype="float32"), fresh=True),
    Case("a merge that overflows has a smaller lambda", changed(
        put(Q + ".weight", 1e5), method=ZERO, output={"path": "{folder}/out", "dtype": "float16"}),
         "choose a smaller method.lambda", by_hand=setting(method__lambda=0.1), fresh=True),
    Case("a merge that overflows leaves the parameter out",
         changed(put(Q + ".weight", 1e6), output={"path": "{folder}/out", "dtype": "float16"}),
         "{}; {}", "exclude", fresh=True, lost=2 * 256),
    # Outputs.
    Case("another merge's result is replaced", occupied({"method": {"name": "average"}}),
         "replace it with --fresh", by_hand=nothing, fresh=True),
    Case("another merge's result stays beside", occupied({"method": {"name": "average"}}),
         "choose another folder (a path with {run_id} gives each merge its own)", by_hand=by_run_id),
    Case("an output that holds another model is replaced", occupied(None, names=["pytorch_model.bin"]),
         "replace it with --fresh", by_hand=nothing, fresh=True),
    Case("folders of another model are removed by their owner",
         occupied(None, names=["additional_chat_templates/x.jinja", "thesis.docx"]),
         "remove these folders yourself and run it with --fresh, or choose another output", by_hand=folders_removed,
         fresh=True),
    Case("an output whose files have gone is merged again",
         lambda folder: ((recipe := plain()(folder)), merged(recipe),
                         (folder / "out" / "config.json").unlink())[0],
         "put the files back, or merge again with --fresh", by_hand=nothing, fresh=True),
    # Adapters.
    Case("a head of an adapter is left out", pool(extra={"score.weight": normal(2, 16)}),
         "leaves them out, with what was trained in them", "exclude", lost=32),
    Case("a head of an adapter is merged over a base that has one", pool(extra={"score.weight": normal(2, 16)}),
         "name a `base` that has them (load it by the class of the task, save_pretrained), with `allow: {saved_modules:"
         " merge}`; {}", by_hand=with_head),
    Case("heads that differ are merged over a base that has one",
         pool(extra={"score.weight": normal(2, 16)}, kind="adapter"),
         "name a `base` that has them (load it by the class of the task, save_pretrained), with `allow: {saved_modules:"
         " merge}`; {}", by_hand=with_head),
    Case("a tensor that was saved whole is merged", pool(extra={"model.norm.weight": normal(16)}),
         "`allow: {saved_modules: merge}` merges them as dense changes", "allow"),
    Case("a tensor that was saved whole is left out", pool(extra={"model.norm.weight": normal(16)}),
         "leaves them out, with what was trained in them", "exclude", lost=16),
    Case("a base of two names is one", pool(config={"base_model_name_or_path": "some/other[1]"}),
         "if these are names of one model: `allow: {base_names: [{}]}`", "allow"),
    Case("what the base alone tells needs the base",
         pool(extra={"model.norm.weight": normal(16)}, base=False, allow={"saved_modules": "merge"}),
         "name the `base`", by_hand=with_base),
    Case("an adapter of vectors is a delta",
         pool(extra={"model.norm.weight": normal(16)}, allow={"saved_modules": "merge"}, kind="adapter"),
         "write `kind: checkpoint` or `kind: delta`, or {}", "kind: delta"),
    Case("an adapter leaves its vectors out",
         pool(extra={"model.norm.weight": normal(16)}, allow={"saved_modules": "merge"}, kind="adapter"),
         "leaves out what was trained in them", "exclude", lost=16),
    Case("an adapter of two layouts leaves out one",
         pool({UP: module(36, 16), "h.c_attn": module(36, 16)}, more_base={"h.c_attn.weight": normal(16, 36)},
              kind="adapter"),
         "write `kind: checkpoint`, or {}", "exclude", lost=2 * (16 + 36)),
    Case("a square module has the layout that the config says, where the others are left out",
         pool({"h.sq": module(16, 16), "h.c_attn": module(36, 16), "h.lin": module(36, 16)}, more_base={
             "h.c_attn.weight": normal(16, 36), "h.lin.weight": normal(36, 16), "h.sq.weight": normal(16, 16)}),
         REASONS["ambiguous_layout"][1],
         by_hand=setting(exclude=["h.c_attn.weight"]), lost=2 * (16 + 36)),
    *(Case(f"an adapter with {words} is left out", pool(modules, config, extra),
           "leave it out (`allow: {refused_model: drop}` does)", "allow", refused=1)
      for words, modules, config, extra in (
          ("modules of another base", {"model.layers.7.mlp.up_proj": module(36, 16)}, None, None),
          ("shapes of another base", {Q: module(24, 24)}, None, None),
          ("another tuner", None, {"peft_type": "LOHA"}, None),
          ("a variant", None, {"use_qalora": True}, None),
          ("tokens of its own", None, {"trainable_token_indices": [3]}, None),
          ("a base that it changed", None, {"init_lora_weights": "pissa"}, None),
          ("a base that data changed", None, {"init_lora_weights": "corda"}, None),
          ("virtual tokens", None, {"peft_type": "PROMPT_TUNING"}, None),
          ("copied layers", None, {"layer_replication": [[0, 1], [0, 1]]}, None),
          ("factors of experts", None, {"target_parameters": ["experts.w1"]}, None),
          ("a change for some tokens", None, {"alora_invocation_tokens": [1]}, None),
          ("convolutions", {Q: (normal(2, 16, 3, 3), normal(16, 2, 1, 1), 4.0)}, None, None),
          ("unknown tensors", None, None, {f"{Q}.lora_E": normal(2, 2)}),
      )),
    Case("an initialisation that left the base alone is written so", pool(config={"init_lora_weights": "unheard-of"}),
         "if it leaves the base alone, write init_lora_weights: true into adapter_config.json",
         by_hand=on_disk(config_written(init_lora_weights=True))),
    Case("a rank is corrected", pool(config={"r": 3}), "correct r", by_hand=on_disk(config_written(r=2))),
    Case("values that mean nothing are corrected", pool(config={"lora_alpha": "four"}), "correct them",
         by_hand=on_disk(config_written(lora_alpha=4))),
    Case("patterns are names of modules", pool(config={"rank_pattern": {"(": 2}}), "write module names",
         by_hand=on_disk(config_written(rank_pattern={Q: 2}))),
    Case("a missing config is added", unconfigured, "add it beside the weights", by_hand=on_disk(config_copied)),
    Case("a table of another number of rows is left out",
         pool(extra={"lm_head.weight": normal(50, 16)}, allow={"saved_modules": "merge"}),
         "name a base that was resized alike (resize_token_embeddings, save_pretrained) as `base`",
         "exclude", lost=50 * 16),
    Case("two spellings need the base", other_spelling, "name the `base`, which tells what is meant",
         by_hand=with_base),
    Case("one of several adapters in a folder is named", nested, "write {} for one of them, or {}/* for all",
         by_hand=instead("write (\\S+) for one")),
    Case("all adapters in a folder are named", nested, "write {} for one of them, or {}/* for all",
         by_hand=instead("or (\\S+) for all")),
    Case("an adapter with NaN is dropped", pool({Q: (normal(2, 16) * torch.nan, normal(16, 2), 4.0)},
                                               bounds={"norm": [0, 1000]}),
         "repair or drop it, or `allow: {nan: drop_model}`", "allow", fresh=True, refused=1),
    Case("an adapter out of bounds is dropped", pool({Q: (normal(2, 16), 1e9 * normal(16, 2), 4.0)},
                                                    bounds={"norm": [0, 1000]}),
         "drop it, or `allow: {refused_model: drop}`", "allow", fresh=True, refused=1),
)  # fmt: skip


def pasted(recipe: Recipe, snippet: str, problem: Problem) -> None:
    """Put a snippet of a remedy where its key belongs: the recipe, its output, or the model that the problem names."""
    ((key, value),) = yaml.safe_load(snippet).items()
    if key in ("allow", "exclude"):
        old = recipe.get(key)
        recipe[key] = {**(old or {}), **value} if key == "allow" else [*(old or []), *value]
    elif key in ("storage", "vocabulary"):
        recipe[key] = value
    elif key in ("kind", "files_from"):
        recipe["output"][key] = value
    else:
        number = re.match(r"models\.(\d+)", problem.where)
        paths = [one["path"] if isinstance(one, dict) else one for one in recipe["models"]]
        index = int(number[1]) if number else next(n for n, path in enumerate(paths) if path in problem.where)
        recipe["models"][index] = {"path": paths[index], key: value}


def placed(value: Any, folder: Path) -> Any:
    """Return a recipe with the test's folder in its output."""
    value["output"]["path"] = value["output"]["path"].replace("{folder}", str(folder))
    return value


def wording(text: str) -> str:
    """Return a pattern of what a text of the code prints."""
    return re.escape(text).replace(re.escape("{}"), ".*").replace(re.escape("{name}"), ".*")


@pytest.mark.parametrize("case", CASES, ids=[case.sentence for case in CASES])
def test_a_remedy_works_as_it_is_written(case: Case, tmp_path: Path) -> None:
    recipe = placed(case.provoke(tmp_path), tmp_path)
    with pytest.raises(MergeError) as raised:
        merged(recipe)
    told = [one for one in raised.value.problems if re.search(wording(case.remedy), one.remedy)]
    assert told, raised.value
    problem = told[0]
    assert ("--fresh" in problem.remedy) >= case.fresh
    if case.snippet:
        (snippet,) = {one for one in re.findall("`([^`]*)`", problem.remedy) if re.match(case.snippet, one)}
        pasted(recipe, snippet, problem)
    else:
        assert case.by_hand
        case.by_hand(recipe, problem)
    result = merged(recipe, fresh=case.fresh)
    assert result.status == "done"
    assert result.provenance
    aside = [one for model in result.provenance.models for one in model.account.aside]
    assert sum(one.elements for one in aside) == case.lost, aside
    assert len(result.refused) == case.refused
    if case.lost or case.refused or result.zeroed:
        assert SAYS_LOSS.search(problem.remedy) or not case.snippet, problem.remedy


def test_a_remedy_after_the_run_has_begun_says_that_it_is_another_merge(tmp_path: Path) -> None:
    recipe = changed(put(Q + ".weight", torch.nan))(tmp_path)
    with pytest.raises(MergeError, match=re.escape(FRESH_THEN)):
        merged(recipe)
    with pytest.raises(MergeError, match="unfinished merge"):
        merged({**recipe, "allow": {"nan": "zero"}})
