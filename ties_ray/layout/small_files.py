"""Small files in buckets, which a worker reads whole by one request, and keeps for all blocks and rounds."""

from collections.abc import Sequence

from ties_ray.inputs.catalog import Model
from ties_ray.stores import scheme_of


def small_files(adapters: Sequence[Model], room: int, limit: int) -> dict[str, int]:
    """Return the bytes of small files by URI: all files of the first adapters that fit the room.

    room: bytes of a worker's cache. Where larger adapters are merged too, half of it is for their factors. limit: bytes
    of a small file at most.
    """
    small = [
        model for model in adapters if all(pin.size <= limit and scheme_of(pin.uri) != "local" for pin in model.objects)
    ]
    left = room if len(small) == len(adapters) else room // 2
    files: dict[str, int] = {}
    for model in small:
        new = {pin.uri: pin.size for pin in model.objects if pin.uri not in files}
        if sum(new.values()) <= left:
            files.update(new)
            left -= sum(new.values())
    return files
