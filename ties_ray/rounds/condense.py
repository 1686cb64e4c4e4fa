"""Condense: merge each matrix whole, and keep the best factors of it in scratch for outputs of low rank."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from ties_ray.errors import FRESH_THEN, InputError, Problem
from ties_ray.kernels import Factors
from ties_ray.layout.reads import Cost
from ties_ray.layout.shards import Segment, Shard
from ties_ray.methods import every_element
from ties_ray.outputs import CondensingOutput
from ties_ray.rounds import Bench, Conclusion, Listed, Merge, PlannedRound, RoundKind
from ties_ray.rounds._method_round import blocks_of, cut, memory_of_blocks, merged
from ties_ray.rounds.units import Assembly, is_assembly, memory_of_units, whole_units
from ties_ray.tensors import COPIES, Parameter, either, exclusion


class Matrix(NamedTuple):
    """One matrix whose factors are in scratch."""

    parameter: int
    """Index into the catalog's parameters."""
    crc32c: str
    """CRC32C of its scratch, 8 hex digits."""
    norm2: float
    """Squared Frobenius norm of the merged matrix."""
    errors2: dict[int, float]
    """Squared Frobenius norm of the error, by rank."""


Matrices = tuple[Matrix, ...]


class Truncation(BaseModel):
    """The error of writing merged matrices as factors of one rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    relative_error: float
    """Frobenius norm of the error, divided by the norm of the whole merged change."""
    matrices: dict[str, float]
    """Relative error of each matrix, by parameter; 0 where the change itself is zero."""


class CondenseRound(RoundKind[Matrices, Matrices]):
    """Runs the method's last round where the output condenses; a shard is one matrix."""

    activity = "condensing"
    finding = Matrices
    folded = Matrices
    blocks_are_slices = False
    final = True

    def planned(self, merge: Merge, cost: Cost, position: int) -> Iterator[PlannedRound]:
        """Yield the round."""
        own, shards = merge.recipe.method.rounds()[position], len(merge.layout.matrices)
        if own.finish:  # the change is final once all of it is merged
            yield PlannedRound(own.name, "units", position, *whole_units(merge, cost, position))
            block = max(merge.layout.parameters[index].numel for index in merge.layout.matrices)
            yield PlannedRound("condense", "condense", position, shards, 1, block, 0, 0)
            return
        block, run, passes = cut(merge, position, beside=_largest_matrix)
        if own.unit is not every_element:  # the method needs its matrix whole
            block = max(merge.layout.parameters[index].numel for index in merge.layout.matrices)
            run, passes = 0, own.passes
        reading = cost.condensing(block, passes, own)
        again = cost.again(range(len(merge.models)), passes, 1, reading.gaps)
        yield PlannedRound(own.name, "condense", position, shards, passes, block, *reading[:2], again, run)

    def memory(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of blocks and of the costliest matrix."""
        in_units = merge.own_round(round_).unit is not every_element
        blocks = memory_of_units(merge, round_) if in_units else memory_of_blocks(merge, round_)
        return blocks + _largest_matrix(merge)

    def scratch(self, merge: Merge, round_: PlannedRound) -> int:
        """Return the bytes of two fp32 factors of each matrix, of the largest rank."""
        rank = condensing(merge).ranks[-1]
        return sum(4 * rank * sum(merge.layout.parameters[index].shape) for index in merge.layout.matrices)

    def shard(self, merge: Merge, round_: PlannedRound, index: int) -> Shard:
        """Return one whole parameter of all models."""
        parameter = merge.layout.matrices[index]
        segment = Segment(parameter, 0, merge.layout.parameters[parameter].numel)
        return Shard(models=(0, len(merge.models)), segments=(segment,))

    def tally(self, bench: Bench) -> Listed:
        """Return an empty list."""
        return Listed()

    def work(self, bench: Bench, index: int, shard: Shard, tally: Listed, zeroed: Counter[tuple[int, str]]) -> None:
        """Merge one matrix and put its best factors into scratch."""
        (segment,) = shard.segments
        merge = bench.merge
        parameter, output = merge.catalog.parameters[segment.parameter], condensing(merge)
        factors = self._factors(bench, parameter)
        if factors:
            condensed = output.combine(parameter, factors)
        else:
            matrix = self._merged(bench, index, shard, parameter, zeroed)
            condensed = output.condense(parameter, matrix.view(parameter.shape))
        crc = bench.write_scratch(segment.parameter, condensed.data)
        errors2 = dict(zip(output.ranks, condensed.errors2, strict=True))
        tally.values.append(Matrix(segment.parameter, crc, condensed.norm2, errors2))

    def _merged(
        self, bench: Bench, index: int, shard: Shard, parameter: Parameter, zeroed: Counter[tuple[int, str]]
    ) -> Any:
        """Return the merged change of a whole matrix (1-D fp32), on the device of the kernels."""
        import torch

        matrix, assembled = torch.empty(parameter.numel, device=bench.kernels.device), is_assembly(bench.merge, index)
        members = () if assembled else range(*shard.models)
        delta = Assembly(bench, index - 1).delta if assembled else partial(merged, bench, index)
        with closing(blocks_of(bench, index, shard.segments, members, zeroed)) as blocks:
            for block in blocks:
                matrix[block.start : block.stop] = delta(block)
        if not matrix.isfinite().all():
            message = f"{int((~matrix.isfinite()).sum())} merged values are not finite"
            advice = (smaller_lambda(bench.merge), copied_instead(bench.merge, parameter.name))
            raise InputError(Problem(parameter.name, message, f"{either(advice)}; {FRESH_THEN}"))
        return matrix

    def _factors(self, bench: Bench, parameter: Parameter) -> list[tuple[float, Factors]]:
        """Return (coefficient, factors of the whole change) of each model where a merge needs no more, else none."""
        merge = bench.merge
        if not merge.sources.rank_sum(merge.recipe, merge.members, parameter):
            return []
        import torch

        present = [parameter.name in model.sources for model in merge.models]
        numbers, index = merge.by_parameter, merge.layout.by_name[parameter.name]
        coefficients = numbers.method(index).coefficients(numbers.members(index), present) or ()
        stored = bench.factors(((member, parameter) for member in range(len(merge.models))), on_device=True)
        pairs = [pair for pair in zip(coefficients, stored, strict=True) if pair[1] is not None]
        factors = [(coefficient, each) for coefficient, each in pairs if each is not None]
        finite = [part.isfinite().all() for _, each in factors for part in (each.left, each.right)]
        return factors if torch.stack(finite).all() else []  # else the blocks are merged, and say what is wrong

    def fold(self, bench: Bench, index: int, group: int, findings: Iterable[Matrices]) -> Matrices:
        """Return all matrices in the order of their parameters."""
        matrices = (matrix for finding in findings for matrix in finding)
        return tuple(sorted(matrices, key=lambda matrix: matrix.parameter))

    def misfit(self, merge: Merge, index: int, finding: Matrices) -> Iterator[str]:
        """Yield what is out of range."""
        ranks = set(condensing(merge).ranks)
        if any(matrix.parameter not in range(len(merge.catalog.parameters)) for matrix in finding):
            yield "a matrix"
        if not all(_is_norm(matrix.norm2) for matrix in finding):
            yield "a norm"
        if not all(
            matrix.errors2.keys() >= ranks and all(map(_is_norm, matrix.errors2.values())) for matrix in finding
        ):
            yield "an error by rank"

    misfit_folded = misfit

    def conclude(self, merge: Merge, index: int, folded: Mapping[int, Matrices]) -> Conclusion:
        """Settle the output's rank by what the matrices came to."""
        matrices, output = folded[0], condensing(merge)
        if [matrix.parameter for matrix in matrices] != merge.layout.matrices:
            raise InputError(Problem("scratch", "a condensed matrix is not recorded", "merge again with --fresh"))
        errors2 = [[matrix.errors2[rank] for rank in output.ranks] for matrix in matrices]
        return Conclusion(output=output.choose([matrix.norm2 for matrix in matrices], errors2))

    def report(self, merge: Merge, index: int, folded: Mapping[int, Matrices]) -> dict[str, Truncation]:
        """Return what the rank cost."""
        matrices, rank = folded[0], condensing(merge).ranks[-1]
        norm2 = math.fsum(matrix.norm2 for matrix in matrices)
        error2 = math.fsum(matrix.errors2[rank] for matrix in matrices)
        names = [parameter.name for parameter in merge.catalog.parameters]
        errors = {names[matrix.parameter]: _share(matrix.errors2[rank], matrix.norm2) for matrix in matrices}
        return {"truncation": Truncation(rank=rank, relative_error=_share(error2, norm2), matrices=errors)}


def condensing(merge: Merge) -> CondensingOutput:
    """Return the output, which condenses."""
    output = merge.recipe.output
    assert isinstance(output, CondensingOutput), "only a condensing output has this round"
    return output


def scratch_of(bench: Bench, index: int, parameter: int) -> bytearray:
    """Return the scratch of a matrix that round `index` has condensed."""
    crc = bench.derived(index, 0, _crc_by_parameter)[parameter]
    return bench.read_scratch(parameter, crc)


def smaller_lambda(merge: Merge) -> str:
    """Return the remedy of a smaller lambda, where the method has one."""
    return "choose a smaller method.lambda" if hasattr(merge.recipe.method, "lambda_") else ""


def copied_instead(merge: Merge, name: str) -> str:
    """Return the remedy of copying a parameter from the base."""
    return exclusion([name], (parameter.name for parameter in merge.catalog.parameters), COPIES)


def _crc_by_parameter(matrices: Sequence[Matrix]) -> dict[int, str]:
    return {matrix.parameter: matrix.crc32c for matrix in matrices}


def _largest_matrix(merge: Merge) -> int:
    """Return the bytes of the costliest matrix while it is condensed, beside the blocks it is merged in.

    Its factors go into scratch from the host's memory.
    """
    needed, output = 0, condensing(merge)
    for index in merge.layout.matrices:
        parameter = merge.layout.parameters[index]
        ranks = merge.sources.rank_sum(merge.recipe, merge.members, parameter)
        if ranks:
            decoded = merge.sources.footprint(parameter, merge.models).decoded_bytes[0]
            work = decoded + output.combine_bytes(parameter, ranks)
        else:
            work = 4 * parameter.numel + output.condense_bytes(parameter)
        needed = max(needed, merge.budget.worked(work) or 4 * output.ranks[-1] * sum(parameter.shape))
    return needed


def _is_norm(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _share(error2: float, norm2: float) -> float:
    return math.sqrt(error2 / norm2) if norm2 else 0.0
