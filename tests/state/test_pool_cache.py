"""What earlier merges have found is used, signed where a key is set, and counted anew when asked."""

import base64
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tools.adapters import Pool, make_pool
from tests.tools.merging import LOCAL, carried_out
from ties_ray.formats.lora import Lora
from ties_ray.operations import merging
from ties_ray.operations.verify import verify
from ties_ray.recipe.parse import validate
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import MergeResult
from ties_ray.rounds._kth_largest import Counts
from ties_ray.rounds.threshold import COUNTS
from ties_ray.state.documents import parse
from ties_ray.state.pool_cache import BOUNDS, KEY, UNSIGNED, identity
from ties_ray.stores import Stores

SURVEYED = {"bounds": {"norm": [1e-9, 1e9]}}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return make_pool(Stores({}).of("/"), str(tmp_path_factory.mktemp("pool")), num_adapters=3)


def recipe_of(pool: Pool, output: Path, cache: Path | None, **more: object) -> Recipe:
    data: dict[str, object] = {
        "models": [{"path": uri} for uri in pool.adapters],
        "method": {"name": "ties", "density": 0.3},
        "output": {"path": str(output), "kind": "delta"},
        "run": {**LOCAL, "workers": 1, **({"pool_cache": str(cache)} if cache else {})},
    }
    return validate(data | more)


def merged(pool: Pool, output: Path, cache: Path | None, **more: object) -> MergeResult:
    return merging.merge(recipe_of(pool, output, cache, **more))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def poison(cache: Path, signature: bytes | None = None) -> list[Path]:
    """Move all magnitudes of the high counts up, to huge ones; return the files."""
    changed = sorted(cache.glob("*-high.json"))
    for path in changed:
        first, _, body = path.read_bytes().partition(b"\n")
        counts = parse(body, COUNTS, BOUNDS, str(path), "it", "")
        bins = np.frombuffer(zlib.decompress(base64.b64decode(counts.bins)), "<i4")
        moved = (65_000 - 2 * len(bins) + 2 * np.arange(len(bins))).astype("<i4")
        packed = base64.b64encode(zlib.compress(moved.tobytes())).decode()
        made = COUNTS.dump_json(Counts(counts.member, counts.parameter, packed, counts.counts))
        path.write_bytes((first if signature is None else signature) + b"\n" + made)
    return changed


@pytest.mark.parametrize("key", ["", "a secret"])
def test_a_merge_that_finds_everything_in_the_cache_reads_less_and_writes_the_same_bytes(
    key: str, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, key)
    cache = tmp_path / "cache"
    without = merged(pool, tmp_path / "without", None, **SURVEYED)
    first = merged(pool, tmp_path / "first", cache, **SURVEYED)
    names = sorted(path.name.partition("-")[2] for path in cache.iterdir())
    assert names.count("high.json") == names.count("survey.json") == 3
    again = merged(pool, tmp_path / "again", cache, **SURVEYED)
    assert first.bytes_read == without.bytes_read
    merge_round = carried_out(again).merges[0].rounds[-1]
    assert again.bytes_read == merge_round.bytes_read < first.bytes_read
    assert weights(tmp_path / "again") == weights(tmp_path / "first") == weights(tmp_path / "without")
    assert again.trims == first.trims
    assert not any("pool cache" in note for note in again.notes)
    assert all((path.read_bytes().split(b"\n")[0] == UNSIGNED) == (not key) for path in cache.iterdir())
    verification = verify(Stores({}), str(tmp_path / "again"), recount=1.0)
    assert (verification.problems, verification.recounted) == ([], ["0", "1", "2"])


def test_a_poisoned_cache_is_found_when_thresholds_are_counted_anew(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    cache = tmp_path / "cache"
    merged(pool, tmp_path / "first", cache)
    assert len(poison(cache)) == 3
    merged(pool, tmp_path / "again", cache)
    assert weights(tmp_path / "again") != weights(tmp_path / "first")  # which is why nobody else may write there
    assert verify(Stores({}), str(tmp_path / "again"), sample=1.0).problems == []
    verification = verify(Stores({}), str(tmp_path / "again"), recount=0.01)
    assert len(verification.recounted) == 1
    assert "the merge trimmed it at " in verification.problems[0].what
    assert "clear the pool cache" in verification.problems[0].remedy


@pytest.mark.parametrize("signature", [None, UNSIGNED, b"", b"0" * 64])
def test_with_a_key_what_is_not_signed_by_it_is_ignored_and_named(
    signature: bytes | None, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "a secret")
    cache = tmp_path / "cache"
    merged(pool, tmp_path / "first", cache)
    files = poison(cache, signature)
    again = merged(pool, tmp_path / "again", cache)
    assert weights(tmp_path / "again") == weights(tmp_path / "first")
    (note,) = (note for note in again.notes if "pool cache" in note)
    assert "3 findings in the pool cache are broken or not signed by this key" in note
    assert str(files[0]) in note
    assert not any(b"a secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_finding_of_one_model_does_not_pass_for_that_of_another(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "a secret")
    cache = tmp_path / "cache"
    merged(pool, tmp_path / "first", cache)
    first, other, *_ = sorted(cache.glob("*-high.json"))
    first.write_bytes(other.read_bytes())
    again = merged(pool, tmp_path / "again", cache)
    assert any("1 findings in the pool cache" in note for note in again.notes)
    assert weights(tmp_path / "again") == weights(tmp_path / "first")


@pytest.mark.parametrize("norm2", ["NaN", "Infinity", "-1.0"])
def test_a_norm_that_no_adapter_has_is_found_again(
    norm2: str, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    cache = tmp_path / "cache"
    merged(pool, tmp_path / "first", cache, **SURVEYED)
    for path in cache.glob("*-survey.json"):
        path.write_bytes(f"unsigned\n[0, {norm2}, 0]".encode())
    again = merged(pool, tmp_path / "again", cache, **SURVEYED)
    assert any("3 findings in the pool cache are broken" in note for note in again.notes)
    assert weights(tmp_path / "again") == weights(tmp_path / "first")


@pytest.mark.parametrize(
    "content", [b"", b"unsigned\n", b"\n\n", b"unsigned\n[1,2]", b'unsigned\n[0,5,"!","?"]', b"x" * (BOUNDS.stored + 1)]
)
def test_a_broken_finding_is_found_again(
    content: bytes, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    cache = tmp_path / "cache"
    merged(pool, tmp_path / "first", cache)
    for path in cache.iterdir():
        path.write_bytes(content)
    again = merged(pool, tmp_path / "again", cache)
    assert any("pool cache are broken" in note for note in again.notes)
    assert weights(tmp_path / "again") == weights(tmp_path / "first")


@pytest.mark.parametrize(("etag", "is_same"), [("0" * 32, True), ("0" * 32 + "-2", False), ("a generation", False)])
def test_a_copy_elsewhere_is_the_same_adapter_where_its_etag_names_the_content(
    etag: str, is_same: bool, pool: Pool, tmp_path: Path
) -> None:
    model = merging.plan(recipe_of(pool, tmp_path / "out", None)).catalog.models[0]
    (pin,) = model.objects
    here, there = (
        identity(replace(model, objects=(pin._replace(uri=uri, etag=etag),)), Lora(), "exact") for uri in ("/a", "/b")
    )
    assert here
    assert (here == there) is is_same
    assert identity(replace(model, objects=(pin._replace(size=pin.size + 1, etag=etag),)), Lora(), "exact") != here
