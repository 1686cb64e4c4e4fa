"""Task vectors of models that somebody looks at: found and checked as a merge does it, read in this process."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from ties_ray.inputs.catalog import Catalog, read_catalog
from ties_ray.kernels import Factors, Kernels
from ties_ray.layout.shards import Segment
from ties_ray.layout.sizes import SIZES
from ties_ray.planning.planner import make_plan
from ties_ray.recipe.parse import validate
from ties_ray.rounds import Merge, PlannedRound
from ties_ray.stores import Stores
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor

NOWHERE = "memory://nowhere/output"
"""The output of a recipe that is never carried out."""
TOLERANT = {"nan": "zero", "missing": "zero", "extra_rows": "drop", "saved_modules": "merge"}
"""A look at models accepts what a merge would refuse, and tells of it."""
ROOM = 2**25
"""Elements of all models' blocks together: 128 MiB."""


class TaskVectors:
    """The task vectors of the models of a catalog."""

    def __init__(self, stores: Stores, merge: Merge) -> None:
        from ties_ray import kernels
        from ties_ray.kernels.buffers import Buffers
        from ties_ray.worker.blocks import Blocks
        from ties_ray.worker.cache import Cache, RangeCache
        from ties_ray.worker.read_ahead import ReadAhead
        from ties_ray.worker.timing import Times

        self.merge = merge
        self.kernels: Kernels = kernels.load("cpu")
        self.zeroed: Counter[tuple[int, str]] = Counter()
        """Values that were not finite and count as zero, by (member, parameter)."""
        self._reads = ReadAhead(
            stores,
            merge.sources.formats,
            Times(profiled=False),
            ahead=SIZES.most_ahead,
            gap=SIZES.gap,
            cache=Cache(int(merge.recipe.run.cache)),
            range_cache=RangeCache(0, 0, None),
        )
        self._blocks = Blocks(merge, self.kernels, self._reads, Buffers())

    @property
    def parameters(self) -> dict[int, Parameter]:
        """Return the parameters that a merge would change, by their index in the catalog."""
        return {number: each for number, each in enumerate(self.merge.layout.parameters) if each.merged}

    @property
    def bytes_read(self) -> int:
        """Return the bytes that have been read."""
        return self._reads.bytes_read

    def deltas(
        self, parameters: Sequence[int], members: Sequence[int], most: int = 2**20
    ) -> Iterator[tuple[Segment, "Iterator[Tensor]"]]:
        """Yield the blocks of some parameters in order, each with the deltas of some members (1-D fp32, one buffer).

        A member that lacks the parameter has zeros. A delta is gone when the next is asked for, and so is a block.
        most: elements of a block.
        """
        segments = [Segment(number, 0, self.merge.layout.parameters[number].numel) for number in parameters]
        block = max(4096, min(most, ROOM // max(1, len(members))))
        round_ = PlannedRound("look", "merge", 0, 0, 1, block, 0, 0)
        stream = self._blocks.stream(round_, segments, members, self.zeroed, resident=False, with_base=False)
        with closing(stream) as blocks:
            for each in blocks:
                yield Segment(each.parameter, each.start, each.stop), (delta for _, delta in each.slices)

    def factors(self, parameter: int, members: Sequence[int]) -> Iterator[Factors | None]:
        """Yield what members store as factors of a whole parameter, in order; None also where they are not finite."""
        whole = self.merge.layout.parameters[parameter]
        stored = self._blocks.factors((member, whole) for member in members)
        for member, each in zip(members, stored, strict=True):
            wrong = sum(int((~part.isfinite()).sum()) for part in (each.left, each.right)) if each else 0
            self.zeroed[member, whole.name] += wrong
            yield None if wrong else each

    def is_product(self, parameter: int) -> bool:
        """Return whether all members that change a parameter store plain factors of it."""
        name, formats = self.merge.layout.parameters[parameter].name, self.merge.sources.formats
        sources = [(formats[model.format], model.sources.get(name)) for model in self.merge.models]
        return all(source is None or form.rank(source) > 0 for form, source in sources)


def open_models(
    stores: Stores, base: str | None, models: Sequence[Mapping[str, object] | str], *, drop: bool = False
) -> tuple[TaskVectors, Catalog]:
    """Return the task vectors of some models, and their catalog with whom it leaves out; read headers only.

    models: entries as a recipe has them. drop: leave out models that a merge would refuse, as long as any is left.
    Raises `RecipeError` and `InputError` with all problems.
    """
    allow = TOLERANT | ({"refused_model": "drop"} if drop else {})
    recipe = validate({
        "base": base,
        "models": list(models),
        "method": "average",
        "output": {"kind": "delta", "path": NOWHERE},
        "allow": allow,
        "run": {"executor": "local"},
        "storage": dict(stores.options),
    })  # fmt: skip
    catalog = read_catalog(recipe, stores)
    return TaskVectors(stores, make_plan(recipe, catalog).merges[0]), catalog
