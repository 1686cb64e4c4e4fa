"""An output of masks holds every model: each is rebuilt from it with the bytes of a merge of that part."""

import contextlib
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.tools.families import Family
from tests.tools.merging import LOCAL, digests, draw_sizes, merge, recipe_of
from ties_ray.errors import InputError, RecipeError
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.operations import merging, verify
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import Progress
from ties_ray.stores import Stores

MakeFamily = Callable[..., Family]
INDEX = "unified_vector.safetensors.index.json"
EMR = {"name": "emr", "lambda": 0.7}
CONSENSUS = {"name": "consensus", "bound": 0.3, "lambda": 0.6}


def masks_in(folder: Path, **more: Any) -> dict[str, Any]:
    return {"output": {"path": str(folder), "kind": "masks"}, **more}


def written_in(folder: Path) -> dict[str, bytes]:
    """Return the vector, the masks and their index."""
    paths = [*folder.glob("*.safetensors"), folder / INDEX]
    return {path.name: path.read_bytes() for path in paths}


def interrupted(recipe: Recipe, sizes: Sizes, events: int) -> None:
    """Begin a merge, and end it after so many events if it is not done before."""
    seen = 0

    def watch(progress: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == events:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        merging.merge(recipe, watch=watch, sizes=sizes)


def rebuilt(family: Family, folder: Path, number: int, output: Path, method: object = "average") -> dict[str, str]:
    """Rebuild a model from its mask by a recipe; return the digests of its files."""
    entry = {"path": str(folder), "file": f"mask-{number:05d}.safetensors"}
    data = {"base": family.base, "models": [entry], "method": method, "output": str(output), "run": LOCAL}
    merging.merge(validate(data))
    return digests(output)


@pytest.mark.parametrize(
    ("method", "weights"), [(EMR, None), (CONSENSUS, [0.5, 2.0, -1.0]), (CONSENSUS, [1.0, {"*norm*": 0.0}, 1.0])],
    ids=["emr", "consensus", "consensus by parameter"],
)  # fmt: skip
def test_a_model_rebuilt_from_its_mask_has_the_bytes_of_its_part(
    method: Mapping[str, Any], weights: Any, family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=3, layers=2, mixed=True)
    out = {"path": str(tmp_path / "masks"), "kind": "masks"}
    merge(family, out, {**method, "masks": True}, weights=weights)
    for number in (0, 2):
        merge(family, tmp_path / f"part-{number}", {**method, "part": str(number)}, weights=weights)
        assert rebuilt(family, tmp_path / "masks", number, tmp_path / f"rebuilt-{number}") == digests(
            tmp_path / f"part-{number}"
        )
    assert digests(tmp_path / "part-0") != digests(tmp_path / "part-2")


def test_vector_masks_and_factors_are_what_the_guide_reads(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=2, layers=1)
    entries = [{"path": uri, "id": id_} for uri, id_ in zip(family.models, ("code", "math"), strict=True)]
    data = {"base": family.base, "models": entries, "method": {**EMR, "masks": True}, "run": LOCAL}
    merging.merge(validate(data | masks_in(tmp_path / "masks")))
    index = json.loads((tmp_path / "masks" / INDEX).read_text())
    assert index["models"] == {"code": "mask-00000.safetensors", "math": "mask-00001.safetensors"}
    assert set(index["weight_map"].values()) == {"unified_vector.safetensors"}
    vector = load_file(tmp_path / "masks" / "unified_vector.safetensors")
    merging.merge(
        validate(
            {**data, "method": {**EMR, "part": "math"}, "output": {"path": str(tmp_path / "part"), "kind": "delta"}}
        )
    )
    part = load_file(tmp_path / "part" / "delta.safetensors")
    mask = load_file(tmp_path / "masks" / index["models"]["math"])
    factor = float(mask.pop("factor"))
    assert mask.keys() == vector.keys() == part.keys()
    for name, value in vector.items():
        bits = torch.from_numpy(np.unpackbits(mask[name].numpy(), count=value.numel())).view(value.shape)
        assert torch.equal(torch.where(bits == 1, value, 0.0) * factor, part[name]), name
        assert not np.unpackbits(mask[name].numpy())[value.numel() :].any()


@pytest.mark.parametrize("method", [EMR, CONSENSUS], ids=["emr", "consensus"])
def test_no_cut_and_no_worker_changes_a_bit_of_a_mask(
    method: Mapping[str, Any], family_of: MakeFamily, tmp_path: Path
) -> None:
    family = family_of(num_models=3, layers=1, mixed=True)
    given = {**method, "masks": True}
    merge(family, masks_in(tmp_path / "usual")["output"], given)
    assert len(written_in(tmp_path / "usual")) == 5
    for seed in range(3):
        folder = tmp_path / str(seed)
        draw = random.Random(seed)
        recipe = recipe_of(family, masks_in(folder)["output"], given, run={**LOCAL, "workers": 1 + seed})
        sizes = draw_sizes(draw)
        interrupted(recipe, sizes, draw.randint(1, 40))
        merging.merge(recipe, sizes=sizes)
        assert written_in(folder) == written_in(tmp_path / "usual")
    report = verify.verify(Stores({}), str(tmp_path / "usual"), sample=1.0)
    assert not report.problems
    assert report.sample
    assert report.sample.elements == report.sample.of > 0


@pytest.mark.parametrize(
    ("method", "output", "message"),
    [
        (EMR, "masks", "emr with these settings gives no masks; use `masks: true`"),
        ("ties", "masks", "ties with these settings gives no masks"),
        ({**EMR, "masks": True}, "checkpoint", "an output of kind checkpoint holds no masks; write `kind: masks`"),
        ({**EMR, "masks": True, "part": "0"}, "masks", "method.part: one model, and the masks of all, are two results"),
        ({**EMR, "masks": True, "lambda": {"*norm*": 2.0}}, "masks", "a mask has one factor"),
    ],
)
def test_masks_that_nothing_gives_or_holds_are_refused(
    method: object, output: str, message: str, family_of: MakeFamily, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        merging.plan(recipe_of(family_of(num_models=2), {"path": str(tmp_path / "out"), "kind": output}, method))


def test_a_folder_of_masks_is_one_model_by_its_file_alone(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=2, layers=1)
    merge(family, masks_in(tmp_path / "masks")["output"], {**EMR, "masks": True})
    data = {"base": family.base, "models": [str(tmp_path / "masks")], "method": "average", "run": LOCAL}
    data["output"] = str(tmp_path / "out")
    with pytest.raises(InputError, match=r"holds the masks of 2 models .*; `file: mask-00000\.safetensors` beside its"):
        merging.plan(validate(data))
    other = family_of(num_models=1, hidden=8)
    entry = {"path": str(tmp_path / "masks"), "file": "mask-00001.safetensors"}
    with pytest.raises(InputError, match="vector, mask and base do not fit"):
        merging.plan(validate({**data, "base": other.base, "models": [entry]}))


def test_masks_rebuild_models_in_any_cut_and_beside_others(family_of: MakeFamily, tmp_path: Path) -> None:
    family = family_of(num_models=2, layers=1, mixed=True)
    merge(family, masks_in(tmp_path / "masks")["output"], {**EMR, "masks": True})
    merge(family, {"path": str(tmp_path / "part"), "kind": "checkpoint", "dtype": "float32"}, {**EMR, "part": "1"})
    entry = {"path": str(tmp_path / "masks"), "file": "mask-00001.safetensors"}
    method = {"name": "ties", "density": 0.4}
    for seed in range(3):
        data = {"base": family.base, "models": [entry, family.models[0]], "method": method, "run": LOCAL}
        data["output"] = {"path": str(tmp_path / f"out-{seed}"), "dtype": "float32"}
        merging.merge(validate(data), sizes=draw_sizes(random.Random(seed)) if seed else SIZES)
    assert digests(tmp_path / "out-0") == digests(tmp_path / "out-1") == digests(tmp_path / "out-2")
