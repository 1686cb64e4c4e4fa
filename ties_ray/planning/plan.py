"""What will be done: files, headers, rounds, shards, reads and memory, as frozen values with a JSON form."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

from pydantic import Field, TypeAdapter

from ties_ray.inputs.catalog import Catalog
from ties_ray.layout.budget import are_local
from ties_ray.layout.sizes import Sizes
from ties_ray.libraries.library import Library
from ties_ray.outputs import OutputFile
from ties_ray.recipe.recipe import Recipe
from ties_ray.rounds import Merge, PlannedResult, kind_of
from ties_ray.tables import Row, Tabular

SCHEMA_VERSION = 9
"""The version of the form of stored plans and records. It is part of the run_id."""


@dataclass(frozen=True, repr=False)
class Plan(Tabular):
    """All that a worker needs to know."""

    schema_version: int
    arithmetic: str
    run_id: str
    recipe: Recipe
    catalog: Catalog
    results: Annotated[tuple[PlannedResult, ...], Field(min_length=1)]
    sizes: Sizes
    output: str
    """The output folder, with `{run_id}` filled in."""
    memory: int
    """The most bytes of memory that a worker takes beyond its imports."""
    notes: tuple[str, ...]
    ahead: int
    """Slices that a worker reads ahead."""
    revision: int = 0
    """How often barriers have changed the plan."""
    gpu_memory: int = 0
    """The most bytes of a GPU's memory that a worker takes, with its context; 0 without a GPU."""

    @cached_property
    def merges(self) -> tuple[Merge, ...]:
        """Return each result as its rounds see it."""
        return tuple(Merge(self.recipe, self.catalog, result, self.sizes, self.arithmetic) for result in self.results)

    @property
    def sharers(self) -> int:
        """Return how many workers may share a GPU; 1 where the recipe says how much of a GPU a worker gets."""
        chosen = self.recipe.run.device == "cpu" or self.recipe.run.gpus_per_worker is not None
        return 1 if chosen else self.sizes.sharers_for(self.gpu_memory)

    @property
    def files(self) -> tuple[OutputFile, ...]:
        """Return the weight files of all results."""
        return tuple(file for result in self.results for file in result.files)

    @property
    def library(self) -> Library:
        """Return the library that opens the output."""
        return self.recipe.output.library(self.catalog.library)

    @property
    def num_shards(self) -> int:
        """Return how many shards all rounds have."""
        return sum(round_.num_shards for merge in self.merges for round_ in merge.rounds)

    @property
    def bytes_read(self) -> int:
        """Return how many bytes all rounds read."""
        return sum(round_.bytes_read for merge in self.merges for round_ in merge.rounds)

    @property
    def bytes_again(self) -> int:
        """Return how many of these bytes may come from caches."""
        return sum(round_.bytes_again for merge in self.merges for round_ in merge.rounds)

    @property
    def bytes_written(self) -> int:
        """Return the size of all weight files."""
        return sum(file.size for file in self.files)

    @property
    def bytes_of_scratch(self) -> int:
        """Return about how many bytes rounds keep in scratch until the merge is done."""
        return sum(kind_of(round_).scratch(merge, round_) for merge in self.merges for round_ in merge.rounds)

    @property
    def copies(self) -> bool:
        """Return whether workers copy local inputs from the page cache themselves; see `Store.is_in_page_cache`."""
        models = (model for merge in self.merges for model in merge.models)
        return self.recipe.run.device == "cpu" and are_local((self.catalog.base, *models))

    def _facts(self) -> Row:
        """Return the method, the output, and what the merge moves and needs."""
        return {
            "run_id": self.run_id,
            "method": self.recipe.method.name,
            "num_models": len(self.catalog.models),
            "output": self.output,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "num_shards": self.num_shards,
            "memory": self.memory,
        }

    def table(self) -> list[Row]:
        """Return a row a model."""
        return [
            {
                "model": model.uri,
                "format": model.format,
                "weight": model.weight,
                "density": model.density,
                "licence": model.licence,
                "elements": model.account.stored,
                "bytes": sum(pin.size for pin in model.objects),
            }
            for model in self.catalog.models
        ]

    def to_json(self) -> bytes:
        """Return the stored form."""
        return PLAN_FORM.dump_json(self)

    def digest(self) -> str:
        """Return the SHA-256 of what a run's records rest on: pinned inputs, the place of each tensor, weight files.

        The settings of `run`, storage options, notes, licences and `output.part_size` are not part of it.
        """
        models = tuple(replace(model, licence="") for model in self.catalog.models)
        base = replace(self.catalog.base, licence="")
        catalog = replace(self.catalog, base=base, models=models, small_files=(), notes=(), refused=(), waiting=())
        results = tuple(replace(result, rounds=()) for result in self.results)
        data = _DECISIVE.dump_json((self.run_id, catalog, results))
        return hashlib.sha256(data).hexdigest()


PLAN_FORM = TypeAdapter(Plan)
"""The stored form of a plan. `documents.parse` reads it, within bounds."""
_DECISIVE = TypeAdapter(tuple[str, Catalog, tuple[PlannedResult, ...]])
