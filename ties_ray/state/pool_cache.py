"""Findings of earlier merges about adapters, by the identity of their content: magnitude counts and norms.

Each finding is one object, `<folder>/<identity>-<name>.json`: a line with a signature, then the finding. A finding that
is missing, or can't be a table of so many values, is found again.

**What is trusted.** A merge believes the stored findings, so whoever may write to the folder decides thresholds. Let
only those write there who merge. Or set `TIES_RAY_POOL_CACHE_KEY` on every node: the key then signs each finding
(HMAC-SHA256 over its name and content). A finding without that signature is ignored and named. `verify --recount`
counts thresholds anew.
"""

import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import TypeAdapter

from ties_ray import runtime
from ties_ray.errors import InputError
from ties_ray.formats import Format
from ties_ray.inputs.catalog import Model
from ties_ray.state import documents
from ties_ray.state.documents import Bounds
from ties_ray.stores import Stores, join

T = TypeVar("T")
KEY = "TIES_RAY_POOL_CACHE_KEY"
"""Environment variable with the secret that signs findings, the same on every node."""
BOUNDS = Bounds(stored=2**24, values=2**10)
"""The bounds of a finding. A full table of 65,536 bins takes 1 MiB, in two strings."""
UNSIGNED = b"unsigned"
"""The signature of a finding that no key has signed."""
_MD5 = re.compile("[0-9a-f]{32}")

FORM = 3
"""The version of the findings' form, part of the identity. Raise it with any change to what a bin holds."""
RECALLS = 16
"""Requests in flight."""


def identity(model: Model, form: Format, arithmetic: str) -> str | None:
    """Return the identity of a model's changes.

    None where they depend on the base, or where the store has no ETags. arithmetic: the one that counts the values. An
    ETag that is an MD5 names the content wherever it lies. Any other ETag names it together with the URI.
    """
    if any(form.needs(source) != "nothing" for source in model.sources.values()):
        return None
    if not all(pin.etag for pin in model.objects):
        return None
    pins = [("" if _MD5.fullmatch(pin.etag) else pin.uri, pin.size, pin.etag) for pin in model.objects]
    text = json.dumps([FORM, arithmetic, pins, sorted(model.sources.items())])
    return hashlib.sha256(text.encode()).hexdigest()


class PoolCache:
    """The findings in a folder."""

    def __init__(self, stores: Stores, folder: str, formats: Mapping[str, Format], arithmetic: str) -> None:
        """formats: the models' formats by name. arithmetic: the one that counts their values."""
        self._store = stores.writer(folder)
        self._formats = formats
        self._arithmetic = arithmetic
        self._folder = folder
        self._key = os.environ.get(KEY, "").encode()
        self.refused: list[str] = []
        """URIs of findings that were ignored: the key has not signed them, or they are broken."""

    def identity(self, model: Model) -> str | None:
        """Return the identity of a model's changes, None where they have none."""
        return identity(model, self._formats[model.format], self._arithmetic)

    def read_each(self, names: Sequence[tuple[str, str]], form: TypeAdapter[T]) -> list[T | None]:
        """Return the finding of each (identity, name), None where there is none; add to `refused`."""
        with runtime.pool(RECALLS) as threads:
            return list(threads.map(lambda name: self._read(name[0], name[1], form), names))

    def write(self, identity: str, name: str, form: TypeAdapter[T], finding: T) -> None:
        """Store a finding."""
        body = form.dump_json(finding)
        self._store.put(self._uri(identity, name), self._signature(identity, name, body) + b"\n" + body)

    def refuse(self, identity: str, name: str) -> None:
        """Note that a finding can't be what its name says."""
        self.refused.append(self._uri(identity, name))

    def _read(self, identity: str, name: str, adapter: TypeAdapter[T]) -> T | None:
        uri = self._uri(identity, name)
        try:
            signature, _, body = self._store.get(uri, BOUNDS.stored)[1].partition(b"\n")
            if not self._key or hmac.compare_digest(signature, self._signature(identity, name, body)):
                return documents.parse(body, adapter, BOUNDS, uri, "what an earlier merge has found", "remove it")
        except FileNotFoundError:
            return None
        except InputError:
            pass  # too large, or broken
        self.refused.append(uri)
        return None

    def _signature(self, identity: str, name: str, body: bytes) -> bytes:
        if not self._key:
            return UNSIGNED
        return hmac.digest(self._key, f"{identity}-{name}\n".encode() + body, "sha256").hex().encode()

    def _uri(self, identity: str, name: str) -> str:
        return join(self._folder, f"{identity}-{name}.json")
