"""The document of a living pool, `<pool>/pool.json`: its recipe, its members with their pins, and its results.

Results lie in `<pool>/results/<run_id>`, and findings about adapters in `<pool>/cache`. The document names no other
place of its own. Its reader bounds it and checks every type, as anybody who may write to the pool may have written it.
"""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from ties_ray.errors import InputError, Problem
from ties_ray.recipe.recipe import ModelEntry
from ties_ray.state import documents
from ties_ray.state.documents import Bounds
from ties_ray.stores import Pin, Stores, join

NAME = "pool.json"
"""Name of the document in the pool's folder."""
RESULTS = "results"
"""Name of the folder that holds the results."""
CACHE = "cache"
"""Name of the folder that holds findings about adapters, where the caller names no other."""
BOUNDS = Bounds(stored=2**26, values=2**21)
"""The bounds of the document. A member of 30 files takes some 150 values."""
OF_THE_RUN = frozenset({"models", "continues", "storage", "run"})
"""Parts of a recipe that are no rules of a pool."""
REMEDY = "put its last copy back, or make another pool of the same models"

Text = Annotated[str, Field(max_length=2**12)]
RunId = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Digest = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
Number = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PoolMember(_Part):
    """A model of the pool."""

    number: Number
    """Its number in the pool, which no other model ever gets."""
    entry: ModelEntry
    """The line of a recipe that means this model alone, with its id."""
    pins: tuple[Pin, ...]
    """All files that are read of it."""
    added: Text
    """When it was added: UTC, ISO 8601."""
    read_as: Digest = ""
    """The digest of how its files are read, such as the scales of an adapter."""
    cached: Digest = ""
    """The identity of its changes in the pool cache; empty where they have none."""

    @property
    def uri(self) -> str:
        """Return its folder."""
        return self.entry.path or ""

    @property
    def size(self) -> int:
        """Return the bytes of its files."""
        return sum(pin.size for pin in self.pins)


class PoolResult(_Part):
    """A finished merge of members."""

    run_id: RunId
    members: tuple[Number, ...]
    """The numbers of the members that it merges, in order."""
    state_bytes: Number = 0
    """Bytes of what it keeps for later merges; 0 where it keeps nothing."""
    made: Text
    """When it became the pool's result: UTC, ISO 8601."""


class DroppedMember(_Part):
    """A model that was dropped. Nothing of its content is kept here."""

    member: PoolMember
    dropped: Text
    """When it was dropped: UTC, ISO 8601."""


class PoolDocument(_Part):
    """What a pool holds."""

    schema_version: Literal[1]
    revision: Number
    """How often the document was written. So each version has another content."""
    next_number: Number
    """The number of the next member."""
    recipe: dict[str, Any]
    """The recipe without models, places and limits of the run."""
    base: tuple[Pin, ...] = ()
    """The files of the base; empty where the recipe names none."""
    members: Annotated[tuple[PoolMember, ...], Field(min_length=1)]
    """The models, in the order of the merge."""
    results: Annotated[tuple[PoolResult, ...], Field(min_length=1)]
    """The results that the pool still has. The last is the current one."""
    dropped: tuple[DroppedMember, ...] = ()
    """The models that were dropped, oldest first."""

    @model_validator(mode="after")
    def _agrees(self) -> "PoolDocument":
        numbers = [member.number for member in self.members]
        every = [*numbers, *(each.member.number for each in self.dropped)]
        if numbers != sorted(set(numbers)) or len(set(every)) != len(every):
            raise ValueError("two models have one number, or their order is not that of their numbers")
        if max(every) >= self.next_number or any(not set(every).issuperset(each.members) for each in self.results):
            raise ValueError("it names a number that no model has")
        if list(self.result.members) != numbers:
            raise ValueError("the last result is not of its members")
        if OF_THE_RUN & self.recipe.keys() or not isinstance(self.recipe.get("output"), dict):
            raise ValueError("its recipe names models or places, or no output")
        return self

    @property
    def result(self) -> PoolResult:
        """Return the current result."""
        return self.results[-1]

    def start(self, numbers: tuple[int, ...]) -> PoolResult | None:
        """Return the result from which the fewest models lead to a merge of some members; None where all are needed."""
        begun = [
            each
            for each in self.results
            if numbers[: len(each.members)] == each.members and (each.state_bytes or numbers == each.members)
        ]
        return max(begun, key=lambda each: len(each.members), default=None)


_FORM = TypeAdapter(PoolDocument)
_RUN_ID = re.compile("[0-9a-f]{16}")


def is_run_id(name: str) -> bool:
    """Return whether a folder's name is that of a result."""
    return bool(_RUN_ID.fullmatch(name))


def now() -> str:
    """Return the time for a document: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def place_of(pool: str, run_id: str) -> str:
    """Return the folder of a result."""
    return join(join(pool, RESULTS), run_id)


def read(stores: Stores, pool: str) -> tuple[PoolDocument | None, str]:
    """Return the document of a pool and its ETag; None and "" where there is none. Raises `InputError`."""
    try:
        uri = join(pool, NAME)
        pin, document = documents.read(stores.of(uri), uri, _FORM, BOUNDS, "the document of a pool", REMEDY)
        return document, pin.etag
    except FileNotFoundError:
        return None, ""


def swap(stores: Stores, pool: str, document: PoolDocument, etag: str) -> bool:
    """Write the document if the one there still has this ETag ("": if there is none); return whether it was written.

    Raises `InputError` where the document is too large to be read again.
    """
    uri, data = join(pool, NAME), document.model_dump_json(indent=1, exclude_defaults=True).encode() + b"\n"
    if len(data) > BOUNDS.stored or documents.num_values(data) > BOUNDS.values:
        message = f"a pool of {len(document.members):,} models takes a larger document than can be read"
        raise InputError(Problem(uri, message, "split it into several pools"))
    return stores.writer(uri).swap(uri, data, etag) is not None
