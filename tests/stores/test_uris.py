"""What places mean: paths of this machine, names on the hub, and schemes that nobody serves."""

import os
from pathlib import Path

import pytest

from ties_ray.stores._uris import absolute, hub_name, hub_uri, is_generic, unserved


def test_a_local_path_is_made_absolute_and_a_uri_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute("out/x") == f"{tmp_path}/out/x"
    assert absolute("~/out") == "/home/me/out"
    for uri in ("s3://b/../x", "memory://x/../y", "file:///x/../y"):
        assert absolute(uri) == uri


def test_a_bare_name_is_on_the_hub_unless_such_a_folder_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_uri("org/name@main") == "hf://org/name@main"
    os.mkdir("org")
    for path in ("org/name", "./org2/name", "/x/name", "one", "a/b/c", "s3://b/x"):
        assert hub_uri(path) == path
    assert hub_name("hf://org/name@main/sub") == "org/name"
    assert hub_name("s3://org/name") == "s3://org/name"


def test_schemes_are_served_by_their_own_file_or_by_fsspec_and_others_are_named() -> None:
    assert (is_generic("abfss"), is_generic("s3"), is_generic("nothing")) == (True, False, False)
    assert [unserved(uri) for uri in ("s3://b/x", "x/y", "file:///x", "abfss://c@a/x")] == [""] * 4
    message = unserved("nothing://x")
    assert all(scheme in message for scheme in ("nothing", "file", "s3", "abfss"))
