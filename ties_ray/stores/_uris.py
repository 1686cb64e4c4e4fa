"""URIs of stores: which are served, how they are joined, and the names of the hub."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from ties_ray import plugins
from ties_ray.errors import InputError, Problem, shown

REMOTE = frozenset({
    "abfs", "abfss", "adl", "arrow_hdfs", "az", "box", "dbfs", "dropbox", "ftp", "gcs", "gdrive", "gist", "github",
    "gs", "hdfs", "hf", "http", "https", "lakefs", "oci", "ocilake", "oss", "s3a", "sftp", "ssh", "tos", "tosfs",
    "webdav", "webhdfs",
})  # fmt: skip
"""Schemes that `fsspec.py` serves: each names files of one remote store, and nothing else.

fsspec knows others that lead from a URI to other URIs, to local files or to code: `reference`, `filecache`, `zip`,
`local`, `memory`, `git`, `jupyter`, ... They are not served; a store of one's own is a plugin.
"""
_NO_NAME = re.compile(r"[/\\\0]")
_FAMILIES = (("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss", "adl"), ("http", "https"))
"""Schemes that are spellings of one service."""


def is_generic(scheme: str) -> bool:
    """Return whether `fsspec.py` serves a scheme, because it has no file of its own."""
    return scheme in REMOTE and scheme not in plugins.names("stores")


def unserved(uri: str) -> str:
    """Return why no store serves a URI, for a message; empty where one does."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        return ""
    if scheme in REMOTE and "::" in uri:
        return "is a chain of URIs (::), which could lead anywhere: give the plain URI of one folder or file"
    own = set(plugins.names("stores")) - {"fsspec", "local"}
    if scheme in own | REMOTE:
        return ""
    return plugins.unknown(scheme, sorted(own | {"file"} | REMOTE), "scheme")


def _served(uri: str) -> str:
    wrong = unserved(uri)
    if wrong:
        raise ValueError(wrong)
    return uri


Uri = Annotated[str, AfterValidator(_served)]
"""A path or URI in a recipe, which some store serves."""


def leads_from(table: str, uri: str) -> bool:
    """Return whether a table may name a URI: a local table any URI, another table only URIs of its own service."""
    ours, theirs = scheme_of(table), scheme_of(uri)
    return ours in ("local", theirs) or any({ours, theirs} <= set(family) for family in _FAMILIES)


def scheme_of(uri: str) -> str:
    """Return the scheme of a URI; `local` for a path and for `file://`."""
    scheme, separator, _ = uri.partition("://")
    return "local" if not separator or scheme == "file" else scheme


def absolute(uri: str) -> str:
    """Return the URI as any process of this machine understands it: a local path made absolute, `~` expanded."""
    return os.path.abspath(os.path.expanduser(uri)) if scheme_of(uri) == "local" and "://" not in uri else uri


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?:@[\w./-]+)?")


def hub_uri(uri: str) -> str:
    """Return `hf://org/name` for a bare `org/name` that is no path of this machine; any other URI as it is."""
    organisation = os.path.expanduser(uri).partition("/")[0]
    if _HUB_NAME.fullmatch(uri) and not os.path.exists(organisation):
        return f"hf://{uri}"
    return uri


def hub_name(uri: str) -> str:
    """Return `org/name` of a URI of the hub, which is what its libraries take; any other URI as it is."""
    match = re.match(r"hf://([^/@]+/[^/@]+)", uri)
    return match[1] if match else uri


def join(folder: str, name: str) -> str:
    """Return the URI of `name`, a single file or folder name, directly inside `folder`.

    Others may have written the document that gives the name, and here no name leaves its folder. Raises `InputError`
    for a name that is empty, `.` or `..`, or holds a slash, a backslash or a NUL.
    """
    if name in ("", ".", "..") or _NO_NAME.search(name):
        message = f"{name!r} is not the name of a file in this folder"
        remedy = "rename the file, or remove the document that names it; for an output, merge again with --fresh"
        raise InputError(Problem(shown(folder), message, remedy))
    return entry_uri(folder, name)


def entry_uri(folder: str, name: str) -> str:
    """Return the URI of an entry that the store itself lists in `folder`: disks and buckets allow odd names."""
    return f"{folder.rstrip('/')}/{name}"


def last_part(uri: str) -> str:
    """Return the name of a file or folder in its own folder."""
    return uri.rpartition("/")[2]


def within(folder: str, name: str) -> str:
    """Return the URI of a relative name of one or more components (`1_Pooling/config.json`) inside a folder.

    Raises `InputError` for a name that could lead anywhere else: each component is checked as by `join`.
    """
    for part in name.split("/"):
        folder = join(folder, part)
    return folder
