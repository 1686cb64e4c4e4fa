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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import TypeAdapter

from ties_ray.errors import InputError
from ties_ray.formats import Format
from ties_ray.inputs.catalog import Model
from ties_ray.state import documents
from ties_ray.state.documents import Bounds
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

    def __init__(self, stores: Stores, folder: str, formats: Mapping[str, Format], arithmetic: str) -> None:
        """formats: of the models, by name. arithmetic: by which their values are counted."""
        self._store = stores.writer(folder)
        self._formats = formats
        self._arithmetic = arithmetic
        self._folder = folder
        self._key = os.environ.get(KEY, "").encode()
        self.refused: list[str] = []
        """URIs of findings that were ignored: not signed by the key, or broken."""

    def identity(self, model: Model) -> str | None:
        """Return what names a model's changes here, None where nothing does."""
        return identity(model, self._formats[model.format], self._arithmetic)

    def read_each(self, names: Sequence[tuple[str, str]], form: TypeAdapter[T]) -> list[T | None]:
        """Return the findings of some (identity, name), None where there is none; add to `refused`."""
        with ThreadPoolExecutor(RECALLS) as threads:
            return list(threads.map(lambda name: self._read(name[0], name[1], form), names))

    def write(self, identity: str, name: str, form: TypeAdapter[T], finding: T) -> None:
        """Keep a finding."""
        body = form.dump_json(finding)
        self._store.put(self._uri(identity, name), self._signature(identity, name, body) + b"\n" + body)

    def refuse(self, identity: str, name: str) -> None:
        """Note that a finding can't be what its name says."""
        self.refused.append(self._uri(identity, name))

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
