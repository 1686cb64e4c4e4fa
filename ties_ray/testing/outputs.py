"""The contract of output kinds."""

import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from ties_ray import safetensors
from ties_ray.kernels import (
    Factors,
    load,
)
from ties_ray.libraries.library import Library
from ties_ray.outputs import CondensingOutput, ElementwiseOutput, Output, OutputFile, Placed
from ties_ray.tensors import Parameter
from ties_ray.testing.kernels import same_bits


class OutputContract:
    """Every output kind names the tensors that it writes, and writes the same bits however slices are cut.

    A subclass provides the fixtures `output` (with any path) and `parameters` (of a small base). A kind that condenses
    gives factors instead of values, and the tests of values are skipped for it.
    """

    @pytest.fixture
    def output(self) -> Output:
        """Return the output section under test."""
        raise NotImplementedError

    @pytest.fixture
    def parameters(self) -> tuple[Parameter, ...]:
        """Return the base's parameters: some merged, one copied, one without elements, one that nobody changes.

        For a kind that condenses: matrices that it can hold, where they are merged and changed.
        """
        return (
            Parameter("a.weight", (40, 7), "BF16", True),
            Parameter("b.scalar", (), "F32", True),
            Parameter("c.empty", (0, 3), "F16", True),
            Parameter("d.ids", (9,), "I64", False),
            Parameter("e.weight", (5,), "F32", True, changed=False),
        )

    @pytest.fixture
    def values(self, output: Output) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], int]:
        """Return the kind's `values` on the compiled kernels."""
        if not isinstance(output, ElementwiseOutput) or not output.writes:
            pytest.skip("this kind writes no values")
        return lambda base, merged, out: output.values(base, merged, out, load("cpu"))

    @pytest.fixture
    def condensing(self, output: Output) -> CondensingOutput:
        """Return the output, if it condenses."""
        if not isinstance(output, CondensingOutput):
            pytest.skip("this kind writes values")
        return output

    @pytest.fixture
    def matrices(
        self, condensing: CondensingOutput, parameters: tuple[Parameter, ...]
    ) -> list[tuple[Parameter, list[Factors]]]:
        """Return the parameters that are condensed, each with three changes of rank 2."""
        source = torch.Generator().manual_seed(4)
        changed = [each for each in parameters if each.merged and each.changed]
        sides = [(torch.randn(each.shape[0], 6), torch.randn(6, each.shape[1], generator=source)) for each in changed]
        return [
            (each, [Factors(left[:, at : at + 2].contiguous(), right[at : at + 2], 0.5, 0) for at in (0, 2, 4)])
            for each, (left, right) in zip(changed, sides, strict=True)
        ]

    def test_the_section_survives_json_and_can_not_be_changed(self, output: Output) -> None:
        assert type(output).model_validate_json(output.model_dump_json()) == output
        with pytest.raises(ValidationError, match="frozen"):
            output.path = "/elsewhere"
        with pytest.raises(ValidationError, match="Extra inputs"):
            type(output).model_validate({**output.model_dump(), "no_such_key": 1})

    def test_every_tensor_comes_from_a_parameter_that_can_give_it(
        self, output: Output, parameters: tuple[Parameter, ...]
    ) -> None:
        by_name = {parameter.name: parameter for parameter in parameters}
        tensors = output.tensors(parameters)
        assert isinstance(output, ElementwiseOutput | CondensingOutput)
        assert not output.problems(parameters)
        assert bool(tensors) == output.writes
        assert len({tensor.name for tensor in tensors}) == len(tensors)
        for tensor in tensors:
            source = by_name[tensor.parameter]
            assert tensor.dtype in safetensors.DTYPE_BITS
            assert tensor.origin == "base" or source.merged, "a parameter that is not merged can only be copied"
            assert (tensor.origin == "scratch") == isinstance(output, CondensingOutput)
            assert tensor.origin == "scratch" or math.prod(tensor.shape) == source.numel
            assert tensor.origin != "base" or (tensor.dtype == source.dtype and output.reads_base)

    def test_weight_files_have_names_of_their_own(self, output: Output) -> None:
        library = output.library(Library())
        for count in (1, 2, 3) if library.shards else (1,):
            names = [library.file_name(number, count) for number in range(1, count + 1)]
            assert len(set(names)) == count
            assert all(name.endswith(".safetensors") and "/" not in name for name in names)

    @pytest.mark.parametrize("count", [1, 3])
    def test_a_loader_finds_every_file_through_the_door(
        self, output: Output, parameters: tuple[Parameter, ...], count: int
    ) -> None:
        library = output.library(Library())
        groups = [[tensor] for tensor in output.tensors(parameters)[: count if library.shards else 1]]
        files = tuple(
            OutputFile(library.file_name(number, len(groups)), "{}", (Placed(tensor, 0, 8),), 8)
            for number, (tensor,) in enumerate(groups, start=1)
        )
        entry_point_file, index = output.entry_point_file(files, library), output.index(files, parameters, {}, library)
        assert bool(entry_point_file) == output.writes
        assert entry_point_file not in {file.name for file in files}
        if index is not None:
            name, data = index
            content = json.loads(data)
            assert name not in {file.name for file in files}
            mapped = {file.tensors[0].tensor.name: file.name for file in files}
            assert content["weight_map"] == mapped if "weight_map" in content else len(files) == 1

    def test_cuts_change_no_bit_of_the_values(
        self, values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], int]
    ) -> None:
        base, merged = torch.randn(2, 1_001, generator=torch.Generator().manual_seed(3))
        merged[::5] = 0
        for dtype in (torch.float32, torch.bfloat16):
            whole, cut = torch.empty(2, 1_001, dtype=dtype)
            assert values(base, merged, whole) == 0
            for start, stop in itertools.pairwise((0, 1, 64, 500, 1_001)):
                assert values(base[start:stop], merged[start:stop], cut[start:stop]) == 0
            assert same_bits(whole, cut)

    def test_what_overflows_is_counted(self, values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], int]) -> None:
        out = torch.empty(3, dtype=torch.float16)
        assert values(torch.zeros(3), torch.tensor([1.0, 1e6, -1e6]), out) == 2

    def test_a_kind_that_reads_no_base_gives_the_same_on_any(
        self, output: Output, values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], int]
    ) -> None:
        base, merged = torch.randn(2, 1_001, generator=torch.Generator().manual_seed(3))
        with_base, with_another = torch.empty(2, 1_001)
        values(base, merged, with_base)
        values(base * float("nan"), merged, with_another)
        assert output.reads_base or same_bits(with_base, with_another)

    def test_factors_are_as_close_as_they_say(
        self, condensing: CondensingOutput, matrices: list[tuple[Parameter, list[Factors]]]
    ) -> None:
        assert list(condensing.ranks) == sorted(set(condensing.ranks))
        for parameter, changes in matrices:
            matrix = sum(each.scale * each.left @ each.right for each in changes)
            assert isinstance(matrix, torch.Tensor)
            norm2 = float(matrix.double().square().sum())
            first, again = (condensing.condense(parameter, matrix.clone()) for _ in range(2))
            assert same_bits(first.data, again.data)
            assert first.norm2 == pytest.approx(norm2)
            assert len(first.errors2) == len(condensing.ranks)
            assert list(first.errors2) == sorted(first.errors2, reverse=True)
            assert 0 <= first.errors2[-1] <= 1e-6 * norm2 or condensing.ranks[-1] < 6
            combined = condensing.combine(parameter, [(1.0, each) for each in changes])
            assert combined.norm2 == pytest.approx(norm2)
            assert combined.errors2 == pytest.approx(first.errors2, abs=1e-6 * norm2)
            assert len(combined.data) == len(first.data)

    def test_every_rank_is_assembled_from_the_same_scratch(
        self,
        condensing: CondensingOutput,
        parameters: tuple[Parameter, ...],
        matrices: list[tuple[Parameter, list[Factors]]],
    ) -> None:
        condensed = {
            each.name: (each, condensing.combine(each, [(1.0, change) for change in changes]))
            for each, changes in matrices
        }
        settled = condensing.choose(
            *zip(*((factors.norm2, factors.errors2) for _, factors in condensed.values()), strict=True)
        )
        assert settled.ranks in {(rank,) for rank in condensing.ranks}
        assert settled.choose([], []) == settled
        for each in (condensing, settled):
            for tensor in each.tensors(parameters):
                parameter, factors = condensed[tensor.parameter]
                elements = each.assemble(tensor, parameter, factors.data)
                assert elements.shape == (math.prod(tensor.shape),)
                assert {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}[
                    elements.dtype
                ] == tensor.dtype

    def test_a_matrix_that_is_not_finite_shows_in_its_norm(
        self, condensing: CondensingOutput, matrices: list[tuple[Parameter, list[Factors]]]
    ) -> None:
        for parameter, _ in matrices:
            for value in (float("nan"), float("inf")):
                matrix = torch.zeros(parameter.shape)
                matrix.view(-1)[-1:] = value
                assert not parameter.numel or not math.isfinite(condensing.condense(parameter, matrix).norm2)

    def test_rewriting_a_small_file_is_stable(self, output: Output) -> None:
        for name, data in (("config.json", b'{"torch_dtype": "float32"}'), ("tokenizer.json", b"{}")):
            for facts in ({}, {"untied": "lm_head.weight"}):
                once = output.rewrite(name, data, facts)
                assert once is None or output.rewrite(name, once, facts) == once
