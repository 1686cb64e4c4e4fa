"""`ties-ray push`: a finished merge on the Hugging Face hub, in one commit."""

from collections.abc import Sequence

from ties_ray.errors import InputError, Problem
from ties_ray.libraries.loaders import CARD_NAME, RESULT_NAME, is_loaded
from ties_ray.reports.records import Progress, Report, Watch, find_result
from ties_ray.stores import Pin, Stores, crc32c, scheme_of, shown, within
from ties_ray.stores.hf import Hf, StoredFile

MOST_CARD = 2**20
"""Bytes of a card at most."""


class Push(Report):
    """What was published."""

    output: str
    """The folder of the merge."""
    uri: str
    """The repository at the commit."""
    files: list[str]
    removed: list[str]
    """Files that the repository held, and that a loader would take for this model's."""
    num_bytes: int


def push(
    stores: Stores, output: str, repository: str, *, private: bool = False, watch: Watch = lambda progress: None
) -> Push:
    """Publish the weights, config, tokenizer and card of a finished merge, and return what was published.

    Everything is read twice, and nothing is kept on a disk. The recipe and the result record stay where they are, since
    they name folders of the inputs. repository: `hf://org/name` or `hf://org/name@branch`. private: of a new one.
    Raises `InputError` where there is no finished merge, where a file has changed since, or where the token may not
    write.
    """
    if scheme_of(repository) != "hf":
        raise InputError(Problem(shown(repository), "is no model of the hub", "write hf://org/name"))
    result = find_result(stores, output)
    if result is None:
        raise InputError(Problem(output, f"holds no {RESULT_NAME}: no finished merge", "see `ties-ray status`"))
    store, files, total = stores.of(output), dict[str, StoredFile](), 0
    for written in (*result.documents, *result.files):
        uri = within(output, written.name)
        try:
            pin, _ = store.head(uri, 0)
        except FileNotFoundError:
            raise InputError(Problem(shown(uri), "is gone", "merge again with --fresh")) from None
        if pin.size != written.size:
            message = f"has {pin.size:,} bytes, and the merge has written {written.size:,}"
            raise InputError(Problem(shown(uri), message, "merge again with --fresh"))
        files[written.name], total = StoredFile(store, pin, written.crc32c), total + pin.size
    card = _card(stores, output)
    if card:
        files[CARD_NAME] = card
    removed: list[str] = []

    def others(names: Sequence[str]) -> list[str]:
        removed[:] = [name for name in names if name not in files and is_loaded(name)]
        return removed

    watch(Progress("push", 0, len(files), 0, total, activity="files"))
    hub = stores.of(repository)
    assert isinstance(hub, Hf)
    uri = hub.publish(repository, files, others, private=private)
    watch(Progress("push", len(files), len(files), total, total, activity="files"))
    return Push(output=output, uri=uri, files=sorted(files), removed=removed, num_bytes=total)


def _card(stores: Stores, output: str) -> StoredFile | None:
    """Return the card; nobody has recorded its checksum, since people edit it."""
    store, uri = stores.of(output), within(output, CARD_NAME)
    try:
        pin, data = store.get(uri, MOST_CARD)
    except FileNotFoundError:
        return None
    return StoredFile(store, Pin(*pin), crc32c(memoryview(data)))
