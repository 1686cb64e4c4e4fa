"""Finished shards that no record holds yet."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ties_ray import runtime
from ties_ray.measures.effects import Effects
from ties_ray.rounds import Record, Tally

RECORD_SECONDS = 10.0
"""Seconds after which a record is written. A lost worker costs at most as many."""


class Batch:
    """Finished shards of one round and group. A shard joins it whole, or not at all if it fails."""

    def __init__(self, round_: int, group: int, tally: Tally[Any], *, result: int = 0) -> None:
        """group: the group of models that all shards of a record belong to. result: index of the result."""
        self.place = result, round_, group
        """The (result, round, group) that all shards of a record share."""
        self.shards: list[int] = []
        self.tally = tally
        self.zeroed: Counter[tuple[int, str]] = Counter()
        """How many values counted as zero, by (member, parameter)."""
        self.effects: list[Effects] = []
        self._since = runtime.monotonic()

    @property
    def round(self) -> int:
        """Return the index of the round."""
        return self.place[1]

    def absorb(
        self, shard: int, tally: Tally[Any], zeroed: Counter[tuple[int, str]], effects: Iterable[Effects] = ()
    ) -> None:
        """Add the work of a finished shard."""
        if not self.shards:
            self._since = runtime.monotonic()
        self.shards.append(shard)
        self.tally.absorb(tally)
        self.zeroed.update(zeroed)
        self.effects += effects

    def is_full(self, most: int) -> bool:
        """Return whether a record is due. most: the most shards in a record."""
        return len(self.shards) >= most or runtime.monotonic() - self._since >= RECORD_SECONDS

    def record(self) -> Record[Any]:
        """Return the batch as it is stored."""
        zeroed = tuple((member, name, count) for (member, name), count in self.zeroed.items())
        return Record(self.round, tuple(self.shards), self.tally.finding(), zeroed, tuple(self.effects))
