"""What a run has stored is used again, once, and only where it is what was written."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tools.adapters import make_pool
from tests.tools.families import Family, make_family
from tests.tools.merging import LOCAL, Stop, digests, merge, recipe_of, stop_at
from ties_ray.errors import InputError, InterruptedMerge
from ties_ray.measures import positions
from ties_ray.measures.effects import NOTHING, Effects, ParameterSums
from ties_ray.operations import merging
from ties_ray.planning.plan import Plan
from ties_ray.recipe.parse import validate
from ties_ray.rounds import Folded, Record
from ties_ray.rounds._kth_largest import Counts, Pick
from ties_ray.rounds.condense import Matrix
from ties_ray.rounds.merge import Parts, Written
from ties_ray.state.manifest import STATE, Manifest, Start, misfit, misfit_folded
from ties_ray.stores import Part, Stores, local

MakeFamily = Callable[..., Family]
TIES = {"name": "ties", "density": 0.3}


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


# -- what is stored and read again


def test_the_first_plan_and_the_first_generation_are_meant_where_nothing_else_is_said(
    plan: Plan, tmp_path: Path
) -> None:
    folder = Manifest.folder_of("/out", "0123456789abcdef")
    assert folder == "/out/.ties-ray/0123456789abcdef/1"
    manifest = Manifest(Stores({}), f"{tmp_path}/0123456789abcdef/1")
    assert (manifest.read_plan(), manifest.read_last_plan(), manifest.read_start()) == (None, None, None)
    digest = manifest.write_plan(plan)
    manifest.write_plan(replace(plan, revision=3))
    first, last = manifest.read_plan(digest=digest), manifest.read_last_plan()
    assert first
    assert last
    assert (first.revision, last.revision) == (0, 3)
    assert first.run_id == plan.run_id
    with pytest.raises(InterruptedMerge, match="another plan lies there than the one that this merge has written"):
        manifest.read_plan(3, digest)


def test_what_a_run_began_with_has_no_other_fields(tmp_path: Path) -> None:
    manifest = Manifest(Stores({}), str(tmp_path))
    manifest.write_start(Start(digest="0" * 64))
    assert manifest.read_start() == Start(digest="0" * 64)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "other": 1}))
    with pytest.raises(InputError, match=r"can't read what a run began with .*other"):
        manifest.read_start()


def test_how_lapack_computes_is_the_first_workers_word(tmp_path: Path) -> None:
    manifest = Manifest(Stores({}), str(tmp_path))
    assert manifest.read_lapack() is None
    assert manifest.agree_on_lapack("00000001") == "00000001"
    assert manifest.agree_on_lapack("00000002") == "00000001"
    assert manifest.read_lapack() == "00000001"


def test_stored_documents_that_are_not_of_the_merge_are_refused_when_they_are_read(plan: Plan, tmp_path: Path) -> None:
    manifest, (merge,) = Manifest(Stores({}), str(tmp_path / "run")), plan.merges
    name = "00000000-0123456789ab-000000.json"
    with pytest.raises(InputError, match="the record has gone; run the same command again"):
        manifest.read_record(merge, 0, name)
    manifest.write_record(merge, name, Record(0, (0,), ()))
    assert manifest.record_names(0) == [name]
    assert manifest.read_record(merge, 0, name) == Record(0, (0,), ())
    manifest.write_record(merge, name, Record(0, (99,), ()))
    with pytest.raises(InputError, match="is not of this merge: a shard is out of range"):
        manifest.read_record(merge, 0, name)
    fitting, odd = Folded((Pick(0, -1, 0, 1, 1),)), Folded((Pick(0, -1, 70_000, 1, 1),))
    manifest.write_folded(merge, 0, 0, fitting)
    assert manifest.read_folded(merge, 0, [0, 1]) == {0: fitting}
    uri = f"{manifest.folder}/folded/0/0.json"
    store = Stores({}).of(uri)
    assert manifest.read_of_earlier(merge, 0, store.head(uri, 0)[0]) == fitting.finding
    manifest.write_folded(merge, 0, 0, odd)
    for read in (
        lambda: manifest.read_folded(merge, 0, [0]),
        lambda: manifest.read_of_earlier(merge, 0, store.head(uri, 0)[0]),
    ):
        with pytest.raises(InputError, match="is not of this merge: a bin is out of range"):
            read()


def test_the_state_of_a_merge_lies_in_its_folder(tmp_path: Path) -> None:
    Manifest(Stores({}), str(tmp_path)).write_state("0.safetensors", b"state")
    assert (tmp_path / STATE / "0.safetensors").read_bytes() == b"state"


def test_of_very_many_models_a_record_has_no_effects(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "MOST_MODELS", 1)
    assert misfit(Record(0, (), (), (), (Effects(0, (), ()),)), plan.merges[0], 0) == []
    every = Effects(0, (), (NOTHING,) * 2)
    assert misfit(Record(0, (), (), (), (every,)), plan.merges[0], 0) == ["the effects of the models"]
