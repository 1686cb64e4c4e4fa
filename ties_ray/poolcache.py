"""What earlier merges have found of an adapter, under its content's identity: magnitude counts and norm.

One object a finding, `<folder>/<identity>/<name>.json`. Nothing depends on it but time: what is not there, or not
believable, is found again. What is there was counted by the same arithmetic from the same bytes.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ties_ray.catalog import Model
from ties_ray.formats import Format
from ties_ray.layout import RoundKind
from ties_ray.manifest import Survey
from ties_ray.plan import Plan
from ties_ray.sources import formats_of
from ties_ray.statistics import Counts, Pick, add
from ties_ray.stores import Stores, join

T = TypeVar("T")
LIMIT = 2**24
"""Bytes: a full table of 65,536 bins takes 1 MiB."""
_MD5 = re.compile("[0-9a-f]{32}")

FORM = 2
"""Of what is kept; part of its name. Raise it with any change to what a bin holds."""
RECALLS = 16
"""Requests at a time."""
COUNTS = TypeAdapter(Counts)
SURVEY = TypeAdapter(Survey)


def identity(model: Model, form: Format, arithmetic: str) -> str | None:
    """Return what names a model's changes; None where they depend on the base, or the store can't tell content apart.

    arithmetic: by which they are counted. An ETag that is the content's MD5 names it wherever it lies; any other only
    together with its URI.
    """
    if any(form.needs(source) != "nothing" for source in model.sources.values()):
        return None
    if not all(pin.etag for pin in model.objects):
        return None
    pins = [("" if _MD5.fullmatch(pin.etag) else pin.uri, pin.size, pin.etag) for pin in model.objects]
    text = json.dumps([FORM, arithmetic, pins, sorted(model.sources.items())])
    return hashlib.sha256(text.encode()).hexdigest()


class PoolCache:
    """The findings in one folder."""

    def __init__(self, stores: Stores, folder: str) -> None:
        self._store = stores.of(folder)
        self._folder = folder

    def recall(
        self, plan: Plan, kind: RoundKind, picks: Mapping[int, Pick]
    ) -> tuple[tuple[Survey, ...], tuple[Counts, ...]]:
        """Return what is known already of what a round would find, of the plan's members.

        picks: before low bits are counted, where each member's threshold lies.
        """
        result, formats = plan.result, formats_of(plan.catalog.models)
        need = plan.recipe.method.needs(result.members)

        def look(member: int) -> Survey | Counts | None:
            model = plan.catalog.models[result.models[member]]
            name = identity(model, formats[model.format], plan.arithmetic)
            if name is None:
                return None
            if kind == "survey":
                survey = self._read(name, "survey", SURVEY)
                return survey._replace(member=member) if survey else None
            if need is None or need.scope != "global" or need.densities[member] == 1:
                return None
            size = result.sizes[member]
            if kind == "count_high":
                return self._counts(name, "high", member, range(size, size + 1))
            pick = picks.get(member)
            if pick is None or pick.settled:
                return None
            return self._counts(name, f"low-{pick.high}", member, range(pick.rank, size + 1))

        with ThreadPoolExecutor(RECALLS) as threads:
            found = list(threads.map(look, range(len(result.models))))
        return (
            tuple(one for one in found if isinstance(one, Survey)),
            tuple(one for one in found if isinstance(one, Counts)),
        )

    def write(self, name: str, what: str, found: Counts | Survey) -> None:
        """Keep a finding."""
        adapter: TypeAdapter[Counts] | TypeAdapter[Survey] = COUNTS if isinstance(found, Counts) else SURVEY
        self._store.put(self._uri(name, what), adapter.dump_json(found))  # type: ignore[arg-type]

    def _counts(self, name: str, what: str, member: int, number: range) -> Counts | None:
        """Return a table of so many counted values, as that of a member; None where there is none."""
        found = self._read(name, what, COUNTS)
        if found is None:
            return None
        with suppress(ValueError, IndexError, zlib.error):
            table = add([found])[found.member, found.parameter]
            if int(table.sum()) in number and bool(np.all(table >= 0)):
                return found._replace(member=member)
        return None

    def _read(self, name: str, what: str, adapter: TypeAdapter[T]) -> T | None:
        try:
            return adapter.validate_json(self._store.get(self._uri(name, what), LIMIT)[1])
        except (FileNotFoundError, ValidationError):
            return None

    def _uri(self, name: str, what: str) -> str:
        return join(join(self._folder, name), f"{what}.json")
