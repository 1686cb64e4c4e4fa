"""The contract of input formats."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter

from ties_ray import safetensors
from ties_ray.formats import Contents, Folder, Format, Rules
from ties_ray.kernels import (
    Encoded,
    Factors,
    Stored,
)
from ties_ray.stores import Pin, join
from ties_ray.tensors import Parameter, Source
from ties_ray.testing.kernels import same_bits


class FormatContract:
    """Every input format names exact ranges and decodes them, however a parameter is cut.

    A subclass provides four fixtures. `format` is the implementation under test. `files` is one model in this format,
    by file name. `parameters` are those of its base. `expected` holds the values that each of them decodes to, 1-D.
    """

    @pytest.fixture
    def format(self) -> Format:
        """Return the implementation under test."""
        raise NotImplementedError

    @pytest.fixture
    def files(self) -> dict[str, bytes]:
        """Return a small model, with at least one parameter of a few hundred elements."""
        raise NotImplementedError

    @pytest.fixture
    def parameters(self) -> dict[str, Parameter]:
        """Return the base's parameters."""
        raise NotImplementedError

    @pytest.fixture
    def expected(self) -> dict[str, torch.Tensor]:
        """Return what every source decodes to."""
        raise NotImplementedError

    def test_it_knows_its_own_folders_only(self, format: Format, files: dict[str, bytes]) -> None:
        assert format.recognises(list(files))
        assert not format.recognises([])
        assert not format.recognises(["README.md", "config.json"])

    def test_it_wants_files_that_are_there(self, format: Format, files: dict[str, bytes]) -> None:
        weights, texts = format.wanted([*files, "notes.txt"])
        assert weights or texts
        assert {*weights, *texts} <= files.keys()

    def test_every_source_decodes_to_what_was_stored(
        self,
        format: Format,
        files: dict[str, bytes],
        parameters: dict[str, Parameter],
        expected: dict[str, torch.Tensor],
    ) -> None:
        contents = self.contents(format, files, parameters)
        assert {name for name in contents.sources if parameters[name].merged} == expected.keys()
        for name, stored in expected.items():
            got = self.decoded(format, files, contents, name, 0, parameters[name].numel)
            if isinstance(got, Factors):
                torch.testing.assert_close(values(got, len(stored)), stored, rtol=1e-12, atol=1e-12)
            else:
                assert got.data.dtype == stored.dtype
                assert same_bits(got.data, stored), name

    def test_slices_are_cut_from_the_whole(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]
    ) -> None:
        contents = self.contents(format, files, parameters)
        for name in filter(lambda name: parameters[name].merged, contents.sources):
            numel = parameters[name].numel
            whole = values(self.decoded(format, files, contents, name, 0, numel), numel)
            for start, stop in itertools.pairwise(sorted({0, 1, 2, numel // 3, numel // 2 + 1, numel})):
                if stop <= numel:
                    piece = values(self.decoded(format, files, contents, name, start, stop), stop - start)
                    assert same_bits(piece, whole[start:stop]), (name, start, stop)

    def test_what_decoding_holds_is_told_before(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]
    ) -> None:
        contents = self.contents(format, files, parameters)
        for name, source in contents.sources.items():
            if not parameters[name].merged:
                continue
            got = self.decoded(format, files, contents, name, 0, parameters[name].numel)
            factors = [part for part in got if isinstance(part, torch.Tensor)] if isinstance(got, Factors) else []
            assert isinstance(got, Factors) == (source.encoding == "factors"), name
            assert sum(factor.nbytes for factor in factors) <= format.decoded_bytes(source), name
            assert format.needs(source) in ("nothing", "slice", "rows")
            assert format.shape(source) == parameters[name].shape
            rank = got.left.shape[1] if isinstance(got, Factors) and got.magnitude is None else 0
            assert format.rank(source) in (0, rank)

    def test_an_empty_slice_needs_no_read(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]
    ) -> None:
        contents = self.contents(format, files, parameters)
        for name, source in contents.sources.items():
            assert format.reads(source, 0, 0) == ()
            if parameters[name].merged:
                assert values(format.encoded(source, 0, 0, ()), 0).numel() == 0

    def test_every_stored_element_is_accounted_for(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]
    ) -> None:
        folder = folder_of(format, files)
        headers = [folder.headers[name] for name in format.weight_files(folder)]
        stored = sum(math.prod(info.shape) for header in headers for info in header.tensors.values())
        account = self.contents(format, files, parameters).account
        assert account.adds_up
        assert account.merged > 0
        assert account.stored == stored or not headers
        of_base = format.read(folder, None, Rules())
        if not of_base.problems:
            assert of_base.account.adds_up
            assert of_base.account.stored == account.stored

    def test_sources_survive_json(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]
    ) -> None:
        sources = dict(self.contents(format, files, parameters).sources)
        adapter = TypeAdapter(dict[str, Source])
        assert adapter.validate_json(adapter.dump_json(sources)) == sources

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
    def test_a_broken_small_file_is_a_problem_and_no_crash(
        self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter], text: bytes
    ) -> None:
        for name in format.wanted(list(files))[1]:
            folder = folder_of(format, {**files, name: text})
            assert format.read(folder, parameters, Rules()).problems, name

    def contents(self, format: Format, files: dict[str, bytes], parameters: dict[str, Parameter]) -> Contents:
        """Return what the format makes of the model; it has no problems."""
        folder = folder_of(format, files)
        answers = dict.fromkeys(format.questions(folder, parameters, Rules()), True)
        contents = format.read(replace(folder, answers=answers), parameters, Rules())
        assert contents.problems == ()
        assert set(contents.objects) <= set(folder.files)
        assert contents.kinds.keys() <= contents.sources.keys() <= parameters.keys()
        return contents

    def decoded(
        self, format: Format, files: dict[str, bytes], contents: Contents, name: str, start: int, stop: int
    ) -> Stored:
        """Return a slice from buffers that begin at an odd address, and check that they were not written to."""
        buffers = []
        for read in format.reads(contents.sources[name], start, stop):
            data = files[contents.objects[read.object].uri.rpartition("/")[2]]
            assert 0 <= read.start < read.stop <= len(data)
            buffers.append(torch.frombuffer(bytearray(b"\0" + data[read.start : read.stop]), dtype=torch.uint8)[1:])
        before = [buffer.clone() for buffer in buffers]
        encoded = format.encoded(contents.sources[name], start, stop, buffers)
        assert all(torch.equal(buffer, copy) for buffer, copy in zip(buffers, before, strict=True))
        if isinstance(encoded, Encoded):
            assert encoded.data.shape == (stop - start,)
            return Encoded(encoded.data.clone(), encoded.kind)
        rows, columns = len(encoded.left), encoded.right.shape[1]
        assert encoded.left.shape[1] == len(encoded.right)
        assert encoded.start == start % columns
        assert rows == -(-(encoded.start + stop - start) // columns)
        for factor in encoded:
            if isinstance(factor, torch.Tensor):
                assert factor.dtype == torch.float32
                assert factor.is_contiguous()
        return encoded


def values(stored: Stored, length: int) -> torch.Tensor:
    """Return the values of a slice, 1-D: the data as they are, or scale * left @ right in float64.

    The rows of a change with a magnitude are multiplied by it. DoRA does something else, but this makes it visible.
    """
    if isinstance(stored, Encoded):
        return stored.data
    product = torch.zeros(len(stored.left), stored.right.shape[1], dtype=torch.float64)
    for column, row in zip(stored.left.double().T, stored.right.double(), strict=True):
        product += column[:, None] * row  # rank by rank: a matrix product's bits depend on its shape
    product *= stored.scale
    if stored.magnitude is not None:
        product *= stored.magnitude.double()[:, None]
    return product.flatten()[stored.start :][:length]


def folder_of(format: Format, files: Mapping[str, bytes], uri: str = "memory://model") -> Folder:
    """Return a folder with these files as the catalog fetches it."""
    pins = {name: Pin(join(uri, name), len(data), "etag") for name, data in files.items()}
    weights, texts = format.wanted(list(files))
    headers = {name: safetensors.parse(files[name], len(files[name]), join(uri, name)) for name in weights}
    return Folder(uri, tuple(pins.values()), headers, {name: files[name] for name in texts})
