"""What a living pool holds, and what a command does to it."""

from ties_ray.reports.records import Report


class MemberRow(Report):
    """A member of a pool."""

    id: str
    uri: str
    weight: float | None
    """The weight; None where it differs by parameter."""
    size: int
    """Bytes of its files."""
    added: str
    """When it was added: UTC, ISO 8601."""
    drop_reads: int
    """Models that are read again when it is dropped."""
    drop_bytes: int
    """Bytes of these models and of the state from which the merge goes on. The base comes on top."""


class ResultRow(Report):
    """A result that the pool still has. The last is the current one."""

    output: str
    run_id: str
    num_models: int
    state_bytes: int
    """Bytes of what it keeps for later merges."""
    made: str
    """When it was made: UTC, ISO 8601."""
    holds: list[str] = []
    """Dropped models that are merged in it."""


class DroppedRow(Report):
    """A model that was dropped."""

    id: str
    uri: str
    dropped: str
    """When it was dropped: UTC, ISO 8601."""


class PoolRecord(Report):
    """What a pool holds."""

    pool: str
    """The pool's folder."""
    result: str
    """The folder of the current result."""
    run_id: str
    method: dict[str, object]
    base: str
    """The base's folder; empty where the recipe names none."""
    members: list[MemberRow]
    """The models, in the order of the merge."""
    add_bytes: int
    """Bytes that are read to add a model, beside its own and the base's."""
    reads_all: str
    """Why all models are read again to add one; empty where they are not."""
    results: list[ResultRow]
    dropped: list[DroppedRow] = []
    leftovers: list[str] = []
    """Folders of results that the pool does not list: of merges at work, interrupted, or overtaken."""


class PoolChange(Report):
    """What a command does to a pool, or did."""

    pool: str
    """The pool's folder."""
    done: bool
    """Whether it is done; False: it is planned only."""
    added: list[str] = []
    """Folders of the models that become members."""
    dropped: list[str] = []
    """Folders of the models that are members no more."""
    present: int = 0
    """Models that were members already."""
    num_members: int
    """The pool's models after it."""
    again: list[str] = []
    """Folders of models that were merged before, and are read again."""
    again_bytes: int = 0
    """Bytes of their files."""
    reason: str = ""
    """Why they are read again; empty where none is."""
    bytes_read: int = 0
    """Bytes that the merge reads, of the base, of models and of what an earlier result has kept."""
    result: str
    """The folder of the result."""
    run_id: str
    refused: dict[str, list[str]] = {}
    """Reasons why models were left out, as the recipe allows, by URI. They are no members."""
    waiting: list[str] = []
    """Folders that wait for a later call, each with the reason."""
    erased: list[str] = []
    """Folders and findings that were removed."""
    remains: list[str] = []
    """What the pool still holds of dropped models."""


class PoolCleaning(Report):
    """What is removed from a pool."""

    pool: str
    removed: bool
    """Whether it was removed; False: it is listed only."""
    found: list[str]
    """Folders of results and names of findings."""
