"""How finely a merge is cut: into parts, shards, blocks and groups. No size changes a byte of the result."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ties_ray.kernels import BINS

Size = Annotated[int, Field(ge=0, le=2**40)]
"""The form of a size in a stored plan."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of one merge; the plan stores them, and a run keeps those it began with.

    A *part* is one upload part, a *shard* the unit of scheduling, a *block* what a worker merges at a time.
    """

    least_part: Size = 8 * 2**20
    """Bytes of a part at least, unless the recipe names a size."""
    most_part: Size = 64 * 2**20
    """Bytes of a part at most, unless the recipe names a size."""
    max_shard: Size = 64 * 2**20
    """Bytes of a merge shard at most; it holds whole parts, at least one."""
    max_range: Size = 32 * 2**20
    """Elements of a range at most. A range is a shard of the rounds that read all merged parameters in order."""
    min_range: Size = 2**20
    """Elements of a range at least."""
    shards_at_least: Size = 16
    """A small merge is cut into about so many shards, so that several workers have something to do."""
    model_group: Size = 32
    """Models that a worker counts at a time: 32 tables of 65,536 int64 take 16 MiB."""
    max_block: Size = 4 * 2**20
    """Elements of a block at most. Reads of 8 MiB suit object storage."""
    max_gpu_block: Size = 32 * 2**20
    """Elements of a block at most on a GPU, which waits for Python once a block and group of models."""
    least_block: Size = 2**16
    """Elements of a block at least. With less memory than that takes, the recipe is refused."""
    max_local_block: Size = 2**20
    """Elements of a block at most where workers copy local files by themselves."""
    least_local_block: Size = 2**17
    """Elements of a block at least where workers copy local files by themselves."""
    local_room: Size = 8 * 2**20
    """Bytes of local slices that are needed together: they stay in the CPU's caches."""
    min_resident_block: Size = 128 * 2**10
    """Elements of a block at least that is kept for a second pass; with less memory, the models are read twice."""
    models_per_pass: Size = 16
    """Slices that one kernel call merges: sums go to memory and back once for so many models."""
    factored_models_per_pass: Size = 32
    """Low-rank slices that one kernel call merges."""
    factor_room: Size = 64 * 2**20
    """Bytes of decoded factors that one kernel call may hold; malloc keeps about as much again."""
    gpu_factor_room: Size = 512 * 2**20
    """Bytes of decoded factors that one kernel call of a GPU may hold in the GPU's memory; they lie there twice."""
    gpu_memory: Size = 16 * 2**30
    """Bytes of a GPU's memory that all workers who share it plan to take."""
    gpu_overhead: Size = 2**30
    """Bytes of a GPU that a worker takes for its context and libraries (guessed)."""
    sharers: Size = 4
    """Workers that share a GPU at most: four feed it 53 GB/s, as many as PCIe brings (measured)."""
    gap: Size = 64 * 2**10
    """Unneeded bytes between two reads that one request may bring along: a second request costs more CPU."""
    small_file: Size = 256 * 2**10
    """Bytes at most of an adapter's file in a bucket that a worker reads whole, once, and keeps for all rounds."""
    ahead: Size = 4
    """Slices read ahead of the one that is merged."""
    most_ahead: Size = 16
    """Slices read ahead from buckets, as far as memory allows."""
    overhead: Size = 64 * 2**20
    """Bytes of a worker for clients, records and what malloc keeps (measured)."""
    fragments: Size = 32 * 2**20
    """Bytes that malloc keeps beside decoded factors of all sizes (measured)."""
    entry: Size = 2**10
    """Bytes of a worker's plan for each pinned object, and for each tensor of models not stored alike (measured)."""
    record_shards: Size = 256
    """Shards in a record at most. A lost worker costs as many."""

    @property
    def tables(self) -> int:
        """Return the bytes of a shard's tables of counts, and of the tables that they are added to."""
        return 2 * self.model_group * BINS * 8

    def sharers_for(self, gpu_memory: int) -> int:
        """Return how many workers may share a GPU, of whose memory each takes so many bytes."""
        return max(1, min(self.sharers, self.gpu_memory // max(1, gpu_memory)))


SIZES = Sizes()
"""The sizes that a new run is cut by."""
EXTENT = 16
"""The most times that a stored run may be cut finer or coarser than a new one."""


def comparable(sizes: Sizes) -> bool:
    """Return whether all sizes are near those of a new run. No version of ties_ray writes others."""
    pairs = zip(vars(sizes).values(), vars(SIZES).values(), strict=True)
    return all(ours <= EXTENT * theirs and theirs <= EXTENT * ours for theirs, ours in pairs)
