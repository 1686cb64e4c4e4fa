"""Models of the Hugging Face hub: `hf://org/name@revision`, read through `huggingface_hub` and its cache; read only.

Planning resolves a branch or tag to its commit once. The URIs of a plan name commits, whose files never change.

A file comes from the hub's cache. A file that is not there is downloaded whole at its first read. A merge reads every
byte of it, often several times, and the next merge finds it. With `cache: false` workers read only the ranges that they
need, and keep nothing, which suits clusters of many nodes and small disks. Headers of weight files are always ranges.

Tokens come from where `huggingface_hub` finds them (HF_TOKEN, or its login), on every node.
"""

import errno
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from ties_ray.errors import InputError, MergeError, Problem, UnavailableError
from ties_ray.stores import Listing, Pin, Store, Transient, changed, entry_uri, persist, shown
from ties_ray.stores._hub_commit import StoredFile as StoredFile
from ties_ray.stores._hub_commit import commit

T = TypeVar("T")

_URI = re.compile(
    r"hf://(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?P<path>(?:/[^/]+)*)/?"
)
_COMMIT = re.compile("[0-9a-f]{40}")
_OTHERS = ("datasets", "spaces", "buckets")
_TIMEOUT = 60.0
"""Seconds without a byte after which a request is sent again."""
_WRITABLE = "set HF_TOKEN to a token that may write it"
_ATTEMPTS = 6
"""The most tries to reach the hub, which take some ten seconds."""
_SMALL = 2**20
"""A file of at most so many bytes is downloaded into the cache when its beginning is asked for."""


class HfOptions(BaseModel):
    """`storage.hf` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)

    cache: bool = True
    """Download a file whole into the hub's cache when it is first read; false: read ranges, and keep nothing."""


class _At(NamedTuple):
    """A file or folder of the hub, as a URI names it."""

    repo: str
    revision: str
    path: str
    """The path in the repository; empty for its root."""


class _File(NamedTuple):
    size: int
    mark: str
    """SHA-256 of a large file, git's hash of a small one."""


class Hf(Store):
    """Ranges of files of a commit, from the cache of `huggingface_hub` or by HTTP."""

    options = HfOptions
    pinned_by = "the commit"
    patience: float = 60.0
    """Seconds that one call may go on repeating itself."""

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        assert isinstance(options, HfOptions)
        try:
            from huggingface_hub import HfApi
        except ImportError:
            message = "reading a model from the Hugging Face hub needs the package huggingface_hub"
            raise InputError(Problem("hf://", message, "run `pip install huggingface_hub` on every node")) from None
        self._api = HfApi()
        self._cache = options.cache
        self._commits: dict[tuple[str, str], str] = {}
        self._trees: dict[_At, tuple[dict[str, _File], tuple[str, ...]]] = {}
        self._downloading = threading.Lock()

    def resolve(self, uri: str) -> str:
        """Return the URI with the commit that its branch or tag stands for now."""
        at = _at(uri)
        return _join(at._replace(revision=self._commit(at)))

    def list(self, uri: str) -> Listing:
        """Return the content of the folder; offline, the part of it that the cache holds."""
        at = _at(uri)
        files, folders = self._tree(at._replace(revision=self._commit(at)))
        pins = [self._pin(entry_uri(uri, name), file, self._commit(at)) for name, file in files.items()]
        return Listing(
            tuple(sorted(pins, key=lambda pin: pin.uri.encode())),
            tuple(sorted((entry_uri(uri, name) for name in folders), key=str.encode)),
        )

    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        """Return the file's pin and its first bytes."""
        at = _at(uri)
        at = at._replace(revision=self._commit(at))
        folder, _, name = at.path.rpartition("/")
        file = self._tree(at._replace(path=folder))[0].get(name)
        if file is None:
            raise FileNotFoundError(uri)
        data = bytearray(min(nbytes, file.size))
        self._fill(uri, at, 0, memoryview(data), keep=file.size <= max(nbytes, _SMALL))
        return self._pin(uri, file, at.revision), bytes(data)

    def read(self, pin: Pin, start: int, into: memoryview) -> None:
        """Read a range of a commit's file, which can't change."""
        at = _at(pin.uri)
        try:
            self._fill(pin.uri, at._replace(revision=pin.version or at.revision), start, into.cast("B"), keep=True)
        except FileNotFoundError:
            raise changed(pin, "the file is gone") from None

    def publish(
        self, uri: str, files: Mapping[str, StoredFile], own: Callable[[Sequence[str]], Sequence[str]], *, private: bool
    ) -> str:
        """Make a model repository, if there is none, and commit files to it at once; return its URI at that commit.

        own: gets the names in the repository, and returns those that go because they belong to another model.
        Raises `InputError` where the token of the environment may not write.
        """
        at = _at(uri)
        if at.path or _COMMIT.fullmatch(at.revision):
            raise InputError(
                Problem(shown(uri), "is no branch of a model", "write hf://org/name or hf://org/name@branch")
            )

        def once() -> str:
            self._api.create_repo(at.repo, private=private or None, exist_ok=True)
            if at.revision != "main":
                self._api.create_branch(at.repo, branch=at.revision, exist_ok=True)
            names = self._api.list_repo_files(at.repo, revision=at.revision)
            return commit(self._api, at.repo, at.revision, files, own(names), "Merged by ties_ray")

        try:
            sha = self._repeat(at, "committing to it", once)
        except InputError as error:
            if error.problems[0].code != "not_found":  # a problem of a file that is published
                raise
            raise InputError(Problem(shown(uri), "this token can't write it, or there is none", _WRITABLE)) from error
        return _join(at._replace(revision=sha))

    def _pin(self, uri: str, file: _File, commit: str) -> Pin:
        return Pin(uri, file.size, file.mark, commit)

    def _commit(self, at: _At) -> str:
        """Return the commit of a revision; offline, the one that the cache remembers for it."""
        if _COMMIT.fullmatch(at.revision):
            return at.revision
        key = at.repo, at.revision
        if key not in self._commits:

            def ask() -> str:
                if not _is_offline():
                    commit = self._api.model_info(at.repo, revision=at.revision, timeout=_TIMEOUT).sha
                    return commit or at.revision
                with open(_ref(at)) as file:
                    return file.read().strip()

            try:
                self._commits[key] = self._repeat(at, f"asking for {at.revision}", ask)
            except FileNotFoundError:
                raise _not_cached(at) from None
        return self._commits[key]

    def _tree(self, at: _At) -> tuple[dict[str, _File], tuple[str, ...]]:
        """Return the files and folders directly in a folder of a commit; kept, since they never change."""
        if at not in self._trees:
            asked = self._offline_tree if _is_offline() else self._online_tree
            try:
                self._trees[at] = self._repeat(at, "listing it", lambda: asked(at))
            except FileNotFoundError:
                return {}, ()
        return self._trees[at]

    def _online_tree(self, at: _At) -> tuple[dict[str, _File], tuple[str, ...]]:
        from huggingface_hub.hf_api import RepoFile

        files, folders = {}, []
        for entry in self._api.list_repo_tree(at.repo, at.path or None, revision=at.revision):
            name = entry.path.rpartition("/")[2]
            if isinstance(entry, RepoFile):
                files[name] = _File(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            else:
                folders.append(name)
        return files, tuple(folders)

    def _offline_tree(self, at: _At) -> tuple[dict[str, _File], tuple[str, ...]]:
        root = os.path.join(_cache_folder(at), "snapshots", at.revision)
        if not os.path.isdir(root):
            raise _not_cached(at)
        files, folders = {}, []
        for entry in os.scandir(os.path.join(root, *at.path.split("/")) if at.path else root):
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.is_file():  # a link to a blob, which is called as the hub marks it
                files[entry.name] = _File(entry.stat().st_size, os.path.basename(os.path.realpath(entry.path)))
        return files, tuple(folders)

    def _fill(self, uri: str, at: _At, start: int, into: memoryview, *, keep: bool) -> None:
        """Read from the cache, after a download into it where `keep` and the options say so, or by HTTP."""
        if not into:
            return

        def once() -> None:
            path = _cached(at) or (self._download(at) if keep and self._cache else None)
            if path is None:
                self._range(at, start, into)
                return
            with open(path, "rb", buffering=0) as file:
                position = 0
                while position < len(into):
                    count = os.preadv(file.fileno(), [into[position:]], start + position)
                    if not count:
                        message = f"its copy in the cache is too short ({path})"
                        raise InputError(
                            Problem(shown(uri), message, f"remove that file, or run `hf cache verify {at.repo}`")
                        )
                    position += count
            self.meter.add(requests=1, bytes_read=len(into))

        self._repeat(at, f"reading bytes {start:,} to {start + len(into):,}", once)

    def _download(self, at: _At) -> str:
        from huggingface_hub import hf_hub_download

        with self._downloading:  # the other threads of this process wait for the file, and not each for its lock
            path = _cached(at) or hf_hub_download(at.repo, at.path, revision=at.revision)
            for (repo, revision), commit in self._commits.items():
                if (repo, commit) == (at.repo, at.revision):  # so that the branch is found without a network, too
                    ref = _ref(at._replace(revision=revision))
                    os.makedirs(os.path.dirname(ref), exist_ok=True)
                    with open(ref, "w") as file:
                        file.write(commit)
        return path

    def _range(self, at: _At, start: int, into: memoryview) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        stop = start + len(into)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(at.repo, at.path, revision=at.revision)
        self.meter.add(requests=1)
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
            hf_raise_for_status(response)
            where = response.headers.get("Content-Range", "")
            if response.status_code != 206 or not where.startswith(f"bytes {start}-{stop - 1}/"):
                message = f"got status {response.status_code} and the range {where!r}"
                raise Transient(f"asked for bytes {start} to {stop - 1}, {message}", attempts=_ATTEMPTS)
            position = 0
            for piece in response.iter_raw():
                into[position : position + len(piece)] = piece[: len(into) - position]
                position += len(piece)
            self.meter.add(bytes_read=position)
            if position != len(into):
                raise Transient(f"asked for {len(into):,} bytes, {position:,} came", attempts=_ATTEMPTS)

    def _repeat(self, at: _At, doing: str, attempt: Callable[[], T]) -> T:
        """Return `attempt()`; the errors of the hub's library become ours."""

        def once() -> T:
            try:
                return attempt()
            except (MergeError, Transient, ImportError, AttributeError, TypeError):  # the last three are defects
                raise
            except Exception as error:
                raise _ours(error, at, doing) from error

        return persist(once, meter=self.meter, uri=_join(at), doing=doing, seconds=lambda: self.patience)


def _at(uri: str) -> _At:
    match = _URI.fullmatch(uri)
    parts = {match["revision"], *match["path"].split("/")} if match else set()
    if not match or match["repo"].partition("/")[0] in _OTHERS or parts & {".", ".."}:
        raise InputError(Problem(shown(uri), "is no model of the hub", "write hf://org/name@revision"))
    return _At(match["repo"], match["revision"] or "main", match["path"].strip("/"))


def _join(at: _At) -> str:
    return f"hf://{at.repo}@{at.revision}" + (f"/{at.path}" if at.path else "")


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _cache_folder(at: _At) -> str:
    """Return the folder of a repository in the cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return os.path.join(HF_HUB_CACHE, f"models--{at.repo.replace('/', '--')}")


def _ref(at: _At) -> str:
    """Return the file of the cache that holds the commit of a branch or tag."""
    return os.path.join(_cache_folder(at), "refs", *at.revision.split("/"))


def _cached(at: _At) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(at.repo, at.path, revision=at.revision)
    return path if isinstance(path, str) else None


def _not_cached(at: _At) -> InputError:
    remedy = f"unset HF_HUB_OFFLINE, or run `hf download {at.repo} --revision {at.revision}` where there is a network"
    return InputError(Problem(_join(at), "is not in the hub's cache, and HF_HUB_OFFLINE is set", remedy))


def _ours(error: Exception, at: _At, doing: str) -> Exception:
    """Return the error to raise for one of the hub's library."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{at.repo}"
    uri, reason = (
        _join(at),
        f"({shown(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)})",
    )
    token = "set HF_TOKEN to a token that may read it, on every node"
    if isinstance(error, errors.GatedRepoError):
        message = "is gated: its owner asks readers to accept conditions first"
        return InputError(Problem(uri, message, f"accept them at {page}, and {token}", "gated"))
    if isinstance(error, errors.RepositoryNotFoundError):
        message = "there is no such model on the hub, or it is private"
        return InputError(
            Problem(
                uri,
                message,
                f"check the name; if it is private, {token}; a local folder is written ./{at.repo}",
                "not_found",
            )
        )
    if isinstance(error, errors.RevisionNotFoundError):
        message = f"the model has no branch, tag or commit {at.revision!r}"
        return InputError(Problem(uri, message, f"see {page}/branches/all", "revision"))
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _not_cached(at)
    if isinstance(error, errors.EntryNotFoundError | FileNotFoundError):
        return FileNotFoundError(shown(uri))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free space, point HF_HOME to a larger disk, or set `storage: {hf: {cache: false}}` to keep nothing"
        return UnavailableError(Problem(uri, f"the hub's cache has no room {reason}", remedy))
    if isinstance(error, PermissionError):
        remedy = "make HF_HOME a folder that the workers may write, or set `storage: {hf: {cache: false}}`"
        return InputError(Problem(uri, f"the hub's cache can't be written {reason}", remedy))
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        remedy = f"check the name; where it is private or gated, {token}"
        return InputError(Problem(uri, f"{doing} was refused {reason}", remedy))
    return Transient(
        f"{type(error).__name__}: {reason}", attempts=None if status else _ATTEMPTS, throttled=status == 429
    )
