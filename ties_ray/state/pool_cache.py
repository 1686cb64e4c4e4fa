"""What earlier merges have found of an adapter, under its content's identity: magnitude counts and norm.

One object a finding, `<folder>/<identity>-<name>.json`: a line with a signature, then the finding. What is not there,
or can't be a table of so many values, is found again.

**What is trusted.** A merge believes what lies there, and whoever may write to the folder decides thresholds by it. Let
nobody write there but those who merge. Or set `TIES_RAY_POOL_CACHE_KEY` on every node: the key then signs each finding
(HMAC-SHA256 over its name and content). A finding without that signature is ignored and named. `verify
--recount` counts thresholds anew.
"""

import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from pydantic import TypeAdapter

from ties_ray.errors import InputError
from ties_ray.formats import Format
from ties_ray.inputs.catalog import Model
from ties_ray.layout.footprint import formats_of
from ties_ray.layout.shards import RoundKind
from ties_ray.planning.plan import Plan
from ties_ray.rounds.kth_largest import WHOLE, Counts, Pick, add
from ties_ray.state import documents
from ties_ray.state.documents import Bounds
from ties_ray.state.manifest import Survey
from ties_ray.stores import Stores, join

T = TypeVar("T")
KEY = "TIES_RAY_POOL_CACHE_KEY"
"""Environment variable: the secret by which findings are signed, the same on every node."""
BOUNDS = Bounds(stored=2**24, values=2**10)
"""A full table of 65,536 bins takes 1 MiB, in two strings."""
UNSIGNED = b"unsigned"
_MD5 = re.compile("[0-9a-f]{32}")

FORM = 3
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
        self._store = stores.writer(folder)
        self._folder = folder
        self._key = os.environ.get(KEY, "").encode()
        self.refused: list[str] = []
        """URIs of findings that were ignored: not signed by the key, or broken."""

    def recall(
        self, plan: Plan, kind: RoundKind, picks: Mapping[int, Pick]
    ) -> tuple[tuple[Survey, ...], tuple[Counts, ...]]:
        """Return what is known already of what a round would find, of the plan's members; add to `refused`.

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
        body = adapter.dump_json(found)  # type: ignore[arg-type]
        self._store.put(self._uri(name, what), self._signature(name, what, body) + b"\n" + body)

    def _counts(self, name: str, what: str, member: int, number: range) -> Counts | None:
        """Return a table of so many counted values, as that of a member; None where there is none."""
        found = self._read(name, what, COUNTS)
        if found is None:
            return None
        with suppress(ValueError):
            if int(add([found])[found.member, found.parameter].sum()) in number:
                return found._replace(member=member, parameter=WHOLE)
        self.refused.append(self._uri(name, what))
        return None

    def _read(self, name: str, what: str, adapter: TypeAdapter[T]) -> T | None:
        uri = self._uri(name, what)
        try:
            signature, _, body = self._store.get(uri, BOUNDS.stored)[1].partition(b"\n")
            if not self._key or hmac.compare_digest(signature, self._signature(name, what, body)):
                return documents.parse(body, adapter, BOUNDS, uri, "what an earlier merge has found", "remove it")
        except FileNotFoundError:
            return None
        except InputError:
            pass  # too large, or broken
        self.refused.append(uri)
        return None

    def _signature(self, name: str, what: str, body: bytes) -> bytes:
        if not self._key:
            return UNSIGNED
        return hmac.digest(self._key, f"{name}-{what}\n".encode() + body, "sha256").hex().encode()

    def _uri(self, name: str, what: str) -> str:
        return join(self._folder, f"{name}-{what}.json")
