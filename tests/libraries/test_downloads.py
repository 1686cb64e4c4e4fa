import gzip
import io
import json
import tarfile
import zipfile

import pytest

from ties_ray.libraries.downloads import SNIFFED, mistaken, unfinished


def packed() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    return made.getvalue()


def tarred() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return made.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 98888\n"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (LFS, "is a pointer of Git LFS"),
        (b"# xet version 0\nfilesize = 12\n", "is a pointer of Xet"),
        (b"/annex/objects/MD5E-s12--0cc.safetensors\n", "is a pointer of git-annex"),
        (b"<!DOCTYPE html>\n<html class=''>", "is an HTML page"),
        (b"\n\n <HTML><head>", "is an HTML page"),
        (b"\xef\xbb\xbf<!doctype html>", "is an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", r"XML document, .*\(AccessDenied\)"),
        (b"<Error><Code>NoSuchKey</Code></Error>", r"\(NoSuchKey\)"),
        (b'{"error": "Repository not found"}', r"server answered \(Repository not found\)"),
        (b"Entry not found", "is text .*Entry not found"),
        (b"404: Not Found\n", "is text"),
        (gzip.compress(b"{}", mtime=0), "compressed with gzip"),
        (packed(), "zip archive, as torch.save writes it"),
        (tarred(), "tar archive"),
        (b"\x80\x04\x95", "is a pickle"),
        (b"GGUF\x03\0\0\0", "is a GGUF file"),
        (bytes(64), "begins with zeros"),
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_what_is_no_weight_file_and_no_config_is_named(data: bytes, what: str, text: bool) -> None:
    found = mistaken(data[:SNIFFED], len(data), text=text)
    assert found
    with pytest.raises(ValueError, match=what):
        raise ValueError(found[0])
    assert found[1]


@pytest.mark.parametrize("config", [{}, {"a": 1}, {"error": 1, "model_type": "llama"}, {"x": "y" * 2000}])
def test_a_config_is_none_of_these(config: object) -> None:
    data = json.dumps(config, indent=2).encode()
    assert mistaken(data[:SNIFFED], len(data), text=True) is None
    assert mistaken(b"\xff\xfe\x00garbage", 10) is None


def test_half_a_download_is_told_by_what_lies_beside_it() -> None:
    assert unfinished("m.safetensors", ["m.safetensors.incomplete"]) == "m.safetensors.incomplete"
    assert unfinished("m.safetensors", ["m.safetensors", "m.safetensors.aria2"]) == "m.safetensors.aria2"
    assert unfinished("m.safetensors", ["m.safetensors", "m.safetensors.part"]) == ""
