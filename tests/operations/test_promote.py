import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Bucket, tool
from tests.tools.adapters import make_pool
from tests.tools.families import Family
from tests.tools.merging import merge
from ties_ray.errors import InputError, UnavailableError
from ties_ray.operations import merging
from ties_ray.operations.promote import Pointer, promote, rollback
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.stores import Stores
from ties_ray.stores.local import Local

STORES = Stores({})


@pytest.fixture
def outputs(family_of: Callable[..., Family], tmp_path: Path) -> list[str]:
    """Return two finished merges."""
    family = family_of(num_models=2)
    for density in (0.2, 0.4):
        merge(family, tmp_path / f"d{density}", {"name": "ties", "density": density})
    return [str(tmp_path / "d0.2"), str(tmp_path / "d0.4")]


def test_a_pointer_names_the_promoted_merge_and_rollback_the_one_before(outputs: list[str], tmp_path: Path) -> None:
    pointer = str(tmp_path / "current.json")
    with pytest.raises(InputError, match="names no merge before the current one"):
        rollback(STORES, pointer)
    assert promote(STORES, outputs[0], pointer).changed
    assert not promote(STORES, outputs[0], pointer).changed
    promotion = promote(STORES, outputs[1], pointer)
    assert (promotion.current.output, promotion.previous and promotion.previous.output) == (outputs[1], outputs[0])
    assert rollback(STORES, pointer).current.output == outputs[0]
    content = Pointer.model_validate_json((tmp_path / "current.json").read_bytes())
    assert (content.current.output, content.previous and content.previous.output) == (outputs[0], outputs[1])
    assert content.current.run_id == json.loads((Path(outputs[0]) / "ties-ray.result.json").read_bytes())["run_id"]


def test_only_what_the_evaluation_approves_is_promoted(outputs: list[str], tmp_path: Path) -> None:
    pointer, calls = str(tmp_path / "current.json"), tmp_path / "calls"
    look = "import os, json, sys; r = json.load(open(os.environ['TIES_RAY_RESULT']))"
    look += (
        f"; open({str(calls)!r}, 'a').write(os.environ['TIES_RAY_OUTPUT'] + ' ' + r['status'] + chr(10)); sys.exit(%d)"
    )
    with pytest.raises(InputError, match=r"ended with 7: .* is not promoted \[not_approved\]"):
        promote(STORES, outputs[0], pointer, [sys.executable, "-c", look % 7])
    assert not Path(pointer).exists()
    for _ in range(2):  # the second time it is known, and nobody is asked
        promote(STORES, outputs[0], pointer, [sys.executable, "-c", look % 0])
    assert calls.read_text() == f"{outputs[0]} done\n" * 2
    with pytest.raises(InputError, match="no-such-command: No such file"):
        promote(STORES, outputs[1], pointer, ["no-such-command"])
    assert Pointer.model_validate_json(Path(pointer).read_bytes()).current.output == outputs[0]


def test_what_is_no_merge_or_no_pointer_is_refused(outputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no finished merge; merge first"):
        promote(STORES, str(tmp_path / "empty"), str(tmp_path / "current.json"))
    (tmp_path / "other.json").write_text('{"important": true}')
    with pytest.raises(
        InputError, match=r"other.json: this ties_ray can't read it as a pointer .*; name another object"
    ):
        promote(STORES, outputs[0], str(tmp_path / "other.json"))
    assert (tmp_path / "other.json").read_text() == '{"important": true}'


@pytest.mark.parametrize("change", ["another run", "weights"])
def test_what_was_changed_while_it_was_evaluated_is_not_promoted(
    change: str, outputs: list[str], tmp_path: Path
) -> None:
    pointer = str(tmp_path / "current.json")
    act = f"import shutil; shutil.copytree({outputs[1]!r}, {outputs[0]!r}, dirs_exist_ok=True)"
    if change == "weights":
        act = f"open({outputs[0] + '/model.safetensors'!r}, 'ab').write(b'x')"
    with pytest.raises(InputError, match=r"was changed while it was evaluated: .*model.safetensors.*\[not_approved\]"):
        promote(STORES, outputs[0], pointer, [sys.executable, "-c", act])
    assert not Path(pointer).exists()


def test_scores_see_the_output_in_use_and_what_changes_meanwhile_is_not_promoted(
    outputs: list[str], tmp_path: Path
) -> None:
    pointer, in_use = str(tmp_path / "current.json"), list[str]()
    promote(STORES, outputs[0], pointer, scored=in_use.append)

    def changing(current: str) -> None:
        in_use.append(current)
        with (Path(outputs[1]) / "model.safetensors").open("ab") as file:
            file.write(b"x")

    with pytest.raises(InputError, match=r"was changed while it was evaluated: model.safetensors"):
        promote(STORES, outputs[1], pointer, scored=changing)
    assert in_use == ["", outputs[0]]
    assert Pointer.model_validate_json(Path(pointer).read_bytes()).current.output == outputs[0]


def test_an_evaluation_may_leave_its_report_beside_the_weights(outputs: list[str], tmp_path: Path) -> None:
    act = "import os; open(os.environ['TIES_RAY_OUTPUT'] + '/report.json', 'w').write('{}')"
    assert promote(STORES, outputs[0], str(tmp_path / "current.json"), [sys.executable, "-c", act]).changed


def test_only_what_is_whole_is_promoted_where_that_is_asked(outputs: list[str], tmp_path: Path) -> None:
    pointer, weights = str(tmp_path / "current.json"), Path(outputs[0]) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="are not those that were written"):
        promote(STORES, outputs[0], pointer, check=partial(verify, STORES, outputs[0]))
    assert promote(STORES, outputs[1], pointer, check=partial(verify, STORES, outputs[1])).changed


@pytest.mark.parametrize("first", [False, True], ids=["there is a pointer", "there is none"])
def test_of_two_promotions_at_the_same_time_none_is_lost(
    first: bool, outputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other promotion comes between our look at the pointer and our writing."""
    pointer = str(tmp_path / "current.json")
    if not first:
        promote(STORES, outputs[0], pointer)
        rival = Path(outputs[0]).parent / "rival"
        shutil.copytree(outputs[1], rival)
    else:
        rival = Path(outputs[0])
    swap, racing = Local.swap, [True]

    def late(store: Local, uri: str, data: bytes, etag: str) -> object:
        if uri == pointer and racing:
            racing.clear()
            promote(STORES, str(rival), pointer)
        return swap(store, uri, data, etag)

    monkeypatch.setattr(Local, "swap", late)
    promotion = promote(STORES, outputs[1], pointer)
    assert (promotion.current.output, promotion.previous and promotion.previous.output) == (outputs[1], str(rival))
    content = Pointer.model_validate_json(Path(pointer).read_bytes())
    assert (content.current, content.previous) == (promotion.current, promotion.previous)


def test_who_comes_second_with_the_same_merge_has_changed_nothing(
    outputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer, swap, racing = str(tmp_path / "current.json"), Local.swap, [True]

    def late(store: Local, uri: str, data: bytes, etag: str) -> object:
        if uri == pointer and racing:
            racing.clear()
            promote(STORES, outputs[0], pointer)
        return swap(store, uri, data, etag)

    monkeypatch.setattr(Local, "swap", late)
    promotion = promote(STORES, outputs[0], pointer)
    assert (promotion.changed, promotion.previous) == (False, None)


def test_a_pointer_that_others_write_all_the_time_is_given_up(
    outputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Local, "swap", lambda *_: None)
    with pytest.raises(UnavailableError, match=r"current.json: others keep writing it; try again"):
        promote(STORES, outputs[0], str(tmp_path / "current.json"))


def test_a_merge_that_was_replaced_is_not_rolled_back_to(outputs: list[str], tmp_path: Path) -> None:
    pointer = str(tmp_path / "current.json")
    promote(STORES, outputs[0], pointer)
    promote(STORES, outputs[1], pointer)
    shutil.copytree(outputs[1], outputs[0], dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"the merge before, run \w+ in .*, is not there any more"):
        rollback(STORES, pointer)


def test_a_pointer_in_a_bucket_moves_too(outputs: list[str], s3_bucket: Bucket) -> None:
    stores = Stores(s3_bucket.storage)
    pointer = f"{s3_bucket.uri}/current.json"
    promote(stores, outputs[0], pointer)
    promote(stores, outputs[1], pointer)
    assert rollback(stores, pointer).current.output == outputs[0]


def test_the_command_line_promotes_and_rolls_back(outputs: list[str], tmp_path: Path) -> None:
    pointer = str(tmp_path / "current.json")

    def run(*arguments: str) -> tuple[int, str]:
        command = [tool("ties-ray"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert run("promote", outputs[0], pointer, "--evaluate", "false")[0] == 3
    assert run("promote", outputs[0], pointer, "--evaluate", "true")[0] == 0
    assert run("promote", outputs[1], pointer)[0] == 0
    code, promotion = run("rollback", pointer, "--json")
    assert code == 0
    assert json.loads(promotion)["current"]["output"] == outputs[0]


def test_an_adapter_that_is_young_or_without_weights_waits_and_is_named(tmp_path: Path) -> None:
    pool = make_pool(STORES.of("/"), str(tmp_path), num_adapters=4)
    hour_ago = time.time() - 3600
    for number, uri in enumerate(pool.adapters):
        for path in Path(uri).iterdir():
            if number != 2:
                os.utime(path, (hour_ago, hour_ago))
    (Path(pool.adapters[3]) / "adapter_model.safetensors").unlink()
    data = {
        "models": [{"path": str(tmp_path / "adapter-*"), "settle": 600}],
        "method": "average",
        "output": {"path": str(tmp_path / "{run_id}"), "kind": "delta"},
        "run": {"executor": "local", "workers": 1},
    }
    first = merging.merge(validate(data))
    assert [model.uri for model in first.provenance.models] == list(pool.adapters[:2]) if first.provenance else False
    assert "adapter-0002: its newest file is" in first.waiting[0]
    assert "settle is 600 s" in first.waiting[0]
    assert first.waiting[1].endswith("adapter-0003: it has no weights yet")
    again = merging.merge(validate(data))
    assert again.reused
    assert again.output == first.output
    assert len(again.waiting) == 2
    for path in Path(pool.adapters[2]).iterdir():
        os.utime(path, (hour_ago, hour_ago))
    third = merging.merge(validate(data))
    assert not third.reused
    assert third.output != first.output
    assert len(third.waiting) == 1


def test_where_all_wait_nothing_is_merged(tmp_path: Path) -> None:
    make_pool(STORES.of("/"), str(tmp_path), num_adapters=2)
    data = {
        "models": [{"path": str(tmp_path / "adapter-*"), "settle": 600}],
        "method": "average",
        "output": {"path": str(tmp_path / "out"), "kind": "delta"},
    }
    with pytest.raises(InputError, match=r"models\.0: all 2 models wait: .*; merge later"):
        merging.plan(validate(data))
