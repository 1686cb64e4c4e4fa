"""The memory of a worker, on its host and on its GPU. It sets how large the blocks may be. Pure."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from ties_ray.errors import Problem, RecipeError
from ties_ray.inputs.catalog import Catalog, Model
from ties_ray.layout.footprint import Sources
from ties_ray.layout.sizes import Sizes
from ties_ray.recipe.recipe import Recipe
from ties_ray.stores import scheme_of

STATE_BYTES = 20 + 4 + 4
"""Bytes for each element of a block: the largest state of a kernel, the merged delta, one fp32 scratch."""


class ReadAhead(NamedTuple):
    """Slices that are read ahead beyond `Sizes.ahead`."""

    slices: int
    """The number of slices."""
    memory: int
    """Bytes that these slices take."""


class Budget:
    """The memory of one worker: `run.memory` bytes of the host beyond its imports, or its share of a GPU."""

    def __init__(self, recipe: Recipe, catalog: Catalog, sources: Sources, *, of_gpu: bool = False) -> None:
        """of_gpu: whether it is the memory of the GPU that the worker computes on."""
        self._recipe = recipe
        self._of_gpu = of_gpu
        self._computes = of_gpu or not sources.on_gpu
        self._sources = sources
        self._sizes: Sizes = sources.sizes
        models = [each for model in (catalog.base, *catalog.models) for each in model.inputs]
        layouts = {id(model.sources): len(model.sources) for model in models}
        entries = sum(layouts.values()) + sum(len(model.objects) for model in models)
        self.overhead = self._sizes.gpu_overhead if of_gpu else self._sizes.overhead + self._sizes.entry * entries
        """Bytes that every round needs for clients, records and the plan."""
        kept = catalog.earlier.state.sources.values() if catalog.earlier else ()
        self._of_state = 4 * max((source.tensors[0].shape[1] for source in kept), default=0)

    def block(self, *, beside: int, slices: int, resident: bool = False, holds: int = 0) -> int:
        """Return the elements of a block, so that a worker can hold all its slices.

        beside: bytes of its tables, parts or matrix. slices: how many slices are needed at a time. resident: whether
        they stay for several passes. holds: bytes for each element that the method holds beside slice and state.
        Raises `RecipeError` where memory is too small for the least block.
        """
        beside += self._decoded(resident)
        room = self._sizes.gpu_memory // self._sizes.sharers if self._of_gpu else int(self._recipe.run.memory)
        elements = (room - self.overhead - beside) // (self._element(self._slices(resident, 0)) + holds)
        if self._of_gpu:
            elements = max(elements, self._sizes.least_block)  # fewer workers share the GPU
        if not resident and elements < self._sizes.least_block:
            human = self._recipe.run.memory.human_readable()
            problem = (
                f"{human} is too little beside {beside // 2**20} MiB of parts, tables, factors or the largest matrix"
            )
            remedy = f"give it {(beside + self.overhead) // 2**20 + 256} MiB, or lower output.part_size"
            raise RecipeError(Problem("run.memory", problem, remedy))
        most = self._sources.max_block
        if self.copies:
            fitting = self._sizes.local_room // (slices * self._sources.widths[1])
            least = max(self._sizes.least_local_block, fitting - fitting % 4096)
            most = min(most, self._sizes.max_local_block, least)
        elements = max(1, min(most, elements - elements % 4096))
        return 2 ** (elements.bit_length() - 1) if self._sources.on_gpu else elements  # as torch pins memory

    def run(self, block: int, num_models: int) -> int:
        """Return how many elements a run of small blocks may have. The blocks of a run are read together."""
        most = self._sizes.models_per_pass
        fitting = most
        if self.copies:
            fitting = self._sizes.local_room // (self._sources.filled(block) * self._sources.widths[1])
        return self._sources.run_of(block, num_models, max(1, min(fitting, most)))

    def blocks(self, block: int, *, resident: bool = False, holds: int = 0) -> int:
        """Return the bytes that a block of so many elements takes, with its slices and decoded factors."""
        element, filled = self._element(self._slices(resident, block)) + holds, self._sources.filled(block)
        if not self._computes:  # torch pins powers of two
            filled = 2 ** (filled - 1).bit_length()
        return filled * element + self._decoded(resident)

    def worked(self, size: int) -> int:
        """Return the bytes of this memory that work takes, of so many where kernels and methods work."""
        return size if self._computes else 0

    def companions(self, names: Collection[str], block: int, *, resident: bool = False) -> int:
        """Return the bytes that companions of these names take beside a block: as read, and one of each decoded."""
        if not names:
            return 0
        sizes = self._sources.companion_sizes(names, block)
        return sum(4 * numel + numel * width * self._slices(resident, block) for numel, width in sizes)

    def fits(self, block: int, *, resident: bool, beside: int) -> bool:
        """Return whether blocks of so many elements fit in the memory beside other bytes."""
        room = self._sizes.gpu_memory if self._of_gpu else int(self._recipe.run.memory)
        return self.overhead + self.blocks(block, resident=resident) + beside <= room

    def further_ahead(self, block: int, memory: int) -> ReadAhead:
        """Return how many more slices fit what is left of the memory. Local files are not read further ahead.

        block: elements of the largest block. memory: bytes that are in use.
        """
        if are_local((self._sources.catalog.base, *self._sources.models)):
            return ReadAhead(0, 0)
        slice_ = self._sources.filled(block) * max(*self._sources.widths, self._of_state)
        largest = max(slice_, self._sources.largest_decoded)
        fitting = (int(self._recipe.run.memory) - memory) // largest if largest else 0
        slices = max(0, min(self._sizes.most_ahead - self._sizes.ahead, fitting))
        return ReadAhead(slices, slices * largest)

    @property
    def copies(self) -> bool:
        """Return whether workers copy dense slices themselves, from files that the system caches."""
        local = are_local((self._sources.catalog.base, *self._sources.models))
        return local and self._recipe.run.device == "cpu" and self._sources.widths[1] > 0

    def _element(self, slices: int) -> int:
        """Return the bytes that an element of a block takes while so many slices are held."""
        of_base, widest = self._sources.widths[0] or 4, self._sources.widths[1]
        if not self._computes:  # slices pass through
            return max(of_base, widest) * slices
        return STATE_BYTES + max(4, of_base, widest) + of_base + widest * slices

    def _slices(self, resident: bool, block: int) -> int:
        """Return how many slices are in memory at a time: those read ahead, and those of one pass or of all."""
        of_pass = len(self._sources.models) if resident else self._sources.dense_per_pass(block)
        return self._sizes.ahead + self.worked(of_pass)

    def _decoded(self, resident: bool) -> int:
        """Return the most bytes that decoded factors take beside a block. On a GPU they lie twice."""
        needed = 0
        for parameter in self._sources.catalog.parameters:
            footprint = self._sources.footprint(parameter, self._sources.models)
            total, largest = footprint.decoded_bytes
            per_pass = self._sources.models_per_pass(footprint) * largest
            of_pass = min(total, per_pass, self._sources.factor_room + largest)
            merged = self.worked(total if resident else of_pass)
            needed = max(needed, (self._sizes.ahead * largest + merged) * (2 if self._of_gpu else 1))
        return needed and needed + self._sizes.fragments


def are_local(models: Iterable[Model]) -> bool:
    """Return whether all models lie in local files, which the system caches."""
    inputs = (each for model in models for each in model.inputs)
    return all(scheme_of(pin.uri) == "local" for each in inputs for pin in each.objects[:1])
