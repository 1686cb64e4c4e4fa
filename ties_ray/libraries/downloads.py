"""Recognises files that are not the weights or JSON they should be: pointers, error pages, archives, half downloads."""

import json
import re
from collections.abc import Collection

SNIFFED = 512
"""The first bytes of a file that `mistaken` needs."""
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".st", ".tmp")
"""Endings that download clients append to the name of an unfinished file."""
_CONTROL = (".aria2", ".st")
"""The endings of control files beside a file that has its full size, with holes in it."""

_AGAIN = "download or upload the file again"
_POINTERS = (
    (b"version https://git-lfs.github.com/spec/", "Git LFS", "`git lfs pull` in the clone fetches the file"),
    (b"version https://hawser.github.com/spec/", "Git LFS", "`git lfs pull` in the clone fetches the file"),
    (b"# xet version", "Xet", "`git lfs pull` in the clone fetches the file, where git-xet is installed"),
    (b"/annex/objects/", "git-annex", "`git annex get .` in the clone fetches the file"),
)
_PICKLE = "save it as safetensors (save_pretrained): a pickle can run code when it is opened"
_MAGIC = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it, whatever its name says", _PICKLE),
    (b"\x80\x02", "a pickle, whatever its name says", _PICKLE),
    (b"\x80\x03", "a pickle, whatever its name says", _PICKLE),
    (b"\x80\x04", "a pickle, whatever its name says", _PICKLE),
    (b"\x80\x05", "a pickle, whatever its name says", _PICKLE),
    (b"\x1f\x8b", "compressed with gzip", "unpack it (`gunzip`), and upload it without Content-Encoding"),
    (b"(\xb5/\xfd", "compressed with zstd", "unpack it (`unzstd`)"),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it (`unxz`)"),
    (b"BZh", "compressed with bzip2", "unpack it (`bunzip2`)"),
    (b"GGUF", "a GGUF file, which is made for inference", "give the original safetensors checkpoint"),
    (b"\x89HDF\r\n", "an HDF5 file", "convert it to safetensors"),
    (b"\x93NUMPY", "a NumPy array", "convert it to safetensors"),
)
_PAGE = re.compile(rb"<!doctype html|<html|<head|<body", re.IGNORECASE)
_XML = re.compile(rb"<\?xml|<Error>|<ListBucketResult")
_CODE = re.compile(rb"<Code>([\w.-]{1,64})</Code>")
_SAYS_ERROR = frozenset({"error", "errors", "message", "detail", "Error", "Message", "code", "status"})


def pointer(head: bytes) -> bool:
    """Return whether a file is a pointer to another one; head: its first `SNIFFED` bytes."""
    return any(head.startswith(start) for start, _, _ in _POINTERS)


def mistaken(head: bytes, size: int, *, text: bool = False) -> tuple[str, str] | None:
    """Return (what a file is, what to do), where it is neither safetensors nor, with `text`, a JSON object; else None.

    head: its first `SNIFFED` bytes, or all of a shorter file. size: the file's, in bytes. text: JSON is what is wanted.
    """
    if not size:
        return "is empty (0 bytes)", _AGAIN
    for start, tool, remedy in _POINTERS:
        if head.startswith(start):
            return f"is a pointer of {tool}, not the file itself", f"{remedy}; so does `hf download` of the repository"
    for start, kind, remedy in _MAGIC:
        if head.startswith(start):
            return f"is {kind}", remedy
    if head[257:262] == b"ustar":
        return "is a tar archive", "unpack it"
    if not head.strip(b"\0"):
        return "begins with zeros only, as a download that was not finished", _AGAIN
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if _PAGE.match(start):
        remedy = "on the hub, download from /resolve/ instead of /blob/, with a token where the repository is gated"
        return "is an HTML page, such as a login or an error page", remedy
    if _XML.match(start):
        code = _CODE.search(start)
        said = f" ({code[1].decode()})" if code else ""
        return f"is an XML document, such as the error that a store answered{said}", _AGAIN
    if start.startswith(b"{"):
        said = _error(start)
        if not text or said:
            return f"is JSON text, such as the error that a server answered{said}", _AGAIN
        return None
    return None if text and start.startswith(b"[") else _plain(start, size)


def unfinished(name: str, names: Collection[str]) -> str:
    """Return the file in a folder which tells that the download of `name` is not finished; empty where none does."""
    endings = _CONTROL if name in names else UNFINISHED
    return next((name + ending for ending in endings if name + ending in names), "")


def _error(start: bytes) -> str:
    """Return the message of a small JSON object that is an error; empty for any other object."""
    try:
        value = json.loads(start)
    except (ValueError, RecursionError):
        return ""
    if not (isinstance(value, dict) and value and set(value) <= _SAYS_ERROR):
        return ""
    return f" ({str(next(iter(value.values())))[:80]})"


def _plain(start: bytes, size: int) -> tuple[str, str] | None:
    """Return (problem, remedy) of a short line of text, as some servers answer with."""
    line = start.strip()
    try:
        words = line.decode()
    except UnicodeDecodeError:
        return None
    if size > SNIFFED or not words or not words.replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
        return None
    first = words.splitlines()[0]
    return f"is text ({first[:80]!r}), such as the error that a server answered", _AGAIN
