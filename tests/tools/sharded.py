"""Checkpoints that torch's own writer of sharded safetensors writes, rank by rank, without a process group."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

Cuts = Sequence[Sequence[int]]
"""The first index of each part but the first, by dimension."""


class _Planner:
    """Gives the writer the parts of one rank."""

    def __init__(self, parts: Mapping[MetadataIndex, torch.Tensor]) -> None:
        self._parts = parts

    def resolve_data(self, item: WriteItem) -> torch.Tensor:
        return self._parts[item.index]


def write_sharded(
    folder: Path | str, tensors: Mapping[str, torch.Tensor], cuts: Mapping[str, Cuts], *, files: int = 1
) -> None:
    """Write each tensor in the parts that its cuts make, one part a rank; tensors without cuts go to rank 0.

    files: files of each rank, among which the names are dealt.
    """
    ranks: list[dict[MetadataIndex, torch.Tensor]] = []
    for name, tensor in tensors.items():
        for rank, (offsets, part) in enumerate(_parts(tensor, cuts.get(name, ()))):
            ranks += [{} for _ in range(rank + 1 - len(ranks))]
            ranks[rank][MetadataIndex(name, torch.Size(offsets))] = part.contiguous()
    names = {name: 1 + number % files for number, name in enumerate(tensors)}
    if not hasattr(checkpoint, "HuggingFaceStorageWriter"):
        pytest.skip("this torch writes no sharded safetensors")
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True, fqn_to_index_mapping=names)
    writer.reset()
    plans = [SavePlan([_item(index, part, tensors[index.fqn]) for index, part in parts.items()]) for parts in ranks]
    writer.set_up_storage_writer(True)
    writer.prepare_local_plan(plans[0])
    for plan, parts in zip(writer.prepare_global_plan(plans), ranks, strict=True):
        planner: Any = _Planner(parts)
        writer.write_data(plan, planner).wait()


def _parts(tensor: torch.Tensor, cuts: Cuts) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    parts: list[tuple[tuple[int, ...], torch.Tensor]] = [((0,) * tensor.ndim, tensor)]
    for axis, starts in enumerate(cuts):
        parts = [
            ((*offsets[:axis], start, *offsets[axis + 1 :]), part.narrow(axis, start, stop - start))
            for offsets, part in parts
            for start, stop in zip([0, *starts], [*starts, tensor.shape[axis]], strict=True)
        ]
    return parts


def _item(index: MetadataIndex, part: torch.Tensor, whole: torch.Tensor) -> WriteItem:
    assert index.offset is not None
    chunk = ChunkStorageMetadata(index.offset, part.size())
    data = TensorWriteData(chunk, TensorProperties(dtype=part.dtype), whole.size())
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)
