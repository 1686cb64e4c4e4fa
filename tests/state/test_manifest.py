"""What a run has stored is used again, once, and only where it is what was written."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.adapters import make_pool
from tests.tools.families import Family, make_family
from tests.tools.merging import LOCAL, digests, merge, recipe_of
from ties_ray.errors import InputError
from ties_ray.measures.effects import NOTHING, Effects, ParameterSums
from ties_ray.operations import merging
from ties_ray.planning.plan import Plan
from ties_ray.recipe.parse import validate
from ties_ray.reports.records import Progress
from ties_ray.rounds import Folded, Record
from ties_ray.rounds._kth_largest import Counts, Pick
from ties_ray.rounds.condense import Matrix
from ties_ray.rounds.merge import Parts, Written
from ties_ray.state.manifest import Manifest, misfit, misfit_folded
from ties_ray.stores import Part, Stores, local

MakeFamily = Callable[..., Family]
TIES = {"name": "ties", "density": 0.3}


class Stop(Exception):
    """Ends a merge at a stage, as a kill would."""


def stop_at(stage: str) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.stage == stage:
            raise Stop

    return watch


def test_scratch_with_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    manifest = Manifest(Stores({}), f"{tmp_path}/0123456789abcdef/1")
    data = bytearray(range(256))
    crc = manifest.write_scratch(3, memoryview(data))
    assert manifest.read_scratch(3, crc) == bytes(data)
    path = Path(manifest.folder, "scratch", "3")
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="scratch is not what was written; merge again with --fresh"):
        manifest.read_scratch(3, crc)
    path.unlink()
    with pytest.raises(InputError, match="scratch of this merge has gone"):
        manifest.read_scratch(3, crc)


def test_an_adapter_is_not_assembled_from_spoiled_scratch(tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=2)
    output = {"path": str(tmp_path / "out"), "kind": "adapter", "rank": 4}
    data = {"base": pool.base, "models": list(pool.adapters), "method": "average", "output": output, "run": LOCAL}
    with pytest.raises(Stop):
        merging.merge(validate(data), watch=stop_at("assemble"))
    for path in tmp_path.glob("out/.ties-ray/*/1/scratch/*"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(InputError, match="scratch is not what was written"):
        merging.merge(validate(data))


def test_of_two_records_of_the_same_shards_one_is_counted(family_of: MakeFamily, tmp_path: Path) -> None:
    """A shard that two workers have counted, the second after it was given up, is in two records."""
    family = family_of(num_models=3)
    undisturbed = merge(family, tmp_path / "undisturbed", TIES)
    recipe = recipe_of(family, tmp_path / "out", TIES)
    with pytest.raises(Stop):
        merging.merge(recipe, watch=stop_at("merge"))
    (generation,) = tmp_path.glob("out/.ties-ray/*/1")
    for path in generation.glob("folded/*/*"):
        path.unlink()
    records = sorted(generation.glob("records/0/*"))
    assert records
    for number, path in enumerate(records):
        path.with_name(f"{number:08d}-ffffffffffff-{number:06d}.json").write_bytes(path.read_bytes())
    result = merging.merge(recipe)
    assert result.resumed
    assert result.trims == undisturbed.trims
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def test_what_the_first_round_has_read_is_known_to_a_run_that_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger of checksums is stored and read again: an input that changed behind its mark in between is found."""
    monkeypatch.setattr(local, "_mark", lambda status: str(status.st_ino))
    family = make_family(Stores({}).of("/"), str(tmp_path), num_models=2)
    recipe = recipe_of(family, tmp_path / "out", TIES)
    with pytest.raises(Stop):
        merging.merge(recipe, watch=stop_at("merge"))
    assert list(tmp_path.glob("out/.ties-ray/*/1/seen/*.json"))
    victim = Path(family.models[1]) / "model.safetensors"
    data = bytearray(victim.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    (start, *_) = (entry["data_offsets"][0] for name, entry in header.items() if name.endswith("q_proj.weight"))
    data[8 + size + start : 8 + size + start + 2] = b"\x11\x11"
    with victim.open("r+b") as file:
        file.write(data)
    with pytest.raises(InputError, match="are not those that this merge read first, though its ETag is the same"):
        merging.merge(recipe)


@pytest.fixture
def plan(family_of: MakeFamily, tmp_path: Path) -> Plan:
    return merging.plan(recipe_of(family_of(num_models=2), tmp_path / "out", TIES))


PART = Part(1, 100, "etag")


INFINITE = ParameterSums(0, magnitude=math.inf)
MATRIX = Matrix(0, "00000000", 1.0, {4: 0.5})


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (Record(1, (), ()), "the round"), (Record(0, (99,), ()), "a shard"), (Record(0, (-1,), ()), "a shard"),
        (Record(0, (), (Counts(2, -1, "", ""),)), "a model"),
        (Record(0, (), (Counts(0, -2, "", ""),)), "a parameter"),
        (Record(0, (), (), ((0, "nothing", 1),)), "a zeroed parameter"),
        (Record(0, (), (), (), (Effects(0, (), (NOTHING,)),)), "the effects of the models"),
        (Record(0, (), (), (), (Effects(0, (ParameterSums(99),), (NOTHING,) * 2),)), "the effects on a parameter"),
        (Record(0, (), (), (), (Effects(0, (INFINITE,), (NOTHING,) * 2),)), "a sum of effects"),
        (Record(0, (), (), ((2, "lm_head.weight", 1),)), "a model"),
        (Record(2, (), Parts((Written(0, PART, "00000000"),))), "a part"),
        (Record(2, (), Parts((Written(0, PART, "00000000"),), ((0, "x"),))), "a part"),
        (Record(2, (), Parts((Written(7, PART, "00000000"),), ((7, "x"),))), "a weight file"),
    ],
)  # fmt: skip
def test_a_record_that_can_not_be_of_the_merge_is_refused(record: Record[Any], fault: str, plan: Plan) -> None:
    round_ = 2 if record.round == 2 else 0
    assert fault in misfit(record, plan.merges[0], round_)
    assert misfit(Record(0, (0,), ()), plan.merges[0], 0) == []


@pytest.mark.parametrize(
    ("picks", "fault"),
    [
        ((Pick(0, -1, 70_000, 1, 1),), "a bin"), ((Pick(0, -1, 0, 1, 1, 2**31),), "a threshold"),
        ((Pick(0, -1, 0, -1, 1),), "a threshold"), ((Pick(2, -1, 0, 1, 1),), "a model"),
    ],
)  # fmt: skip
def test_what_a_barrier_can_not_have_found_is_refused(picks: tuple[Pick, ...], fault: str, plan: Plan) -> None:
    assert fault in misfit_folded(Folded(picks), plan.merges[0], 0)
    assert misfit_folded(Folded(()), plan.merges[0], 0) == []


@pytest.mark.parametrize(
    ("matrix", "fault"),
    [
        (MATRIX._replace(parameter=99), "a matrix"), (MATRIX._replace(norm2=math.nan), "a norm"),
        (MATRIX._replace(norm2=-1.0), "a norm"), (MATRIX._replace(errors2={}), "an error by rank"),
        (MATRIX._replace(errors2={4: math.inf}), "an error by rank"),
    ],
)  # fmt: skip
def test_a_matrix_that_can_not_be_of_the_merge_is_refused(matrix: Matrix, fault: str, tmp_path: Path) -> None:
    pool = make_pool(Stores({}).of("/"), str(tmp_path), num_adapters=2)
    output = {"path": str(tmp_path / "out"), "kind": "adapter", "rank": 4}
    data = {"base": pool.base, "models": list(pool.adapters), "method": "average", "output": output}
    (merge,) = merging.plan(validate(data)).merges
    assert fault in misfit(Record(0, (), (matrix,)), merge, 0)
    assert misfit(Record(0, (), (MATRIX,)), merge, 0) == []
