"""The bench that a worker gives to a round (`rounds.Bench`), on stores, manifest and kernels."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ties_ray.errors import InputError, Problem
from ties_ray.kernels import Encoded, Factors, Kernels
from ties_ray.kernels.buffers import Buffers
from ties_ray.layout.shards import Segment
from ties_ray.methods import Round
from ties_ray.rounds import Block, Merge, PlannedRound, Pool
from ties_ray.rounds._effects import Observer
from ties_ray.rounds.merge import Written
from ties_ray.state.manifest import Manifest
from ties_ray.stores import join
from ties_ray.tensors import Parameter
from ties_ray.worker.blocks import Blocks
from ties_ray.worker.held import Held
from ties_ray.worker.read_ahead import ReadAhead
from ties_ray.worker.write_behind import WriteBehind


class WorkerBench:
    """The bench of one merge on one worker."""

    def __init__(
        self,
        merge: Merge,
        output: str,
        manifest: Manifest,
        kernels: Kernels,
        reads: ReadAhead,
        writes: WriteBehind,
        pool: Pool | None,
        bases: Buffers,
        held: Held | None = None,
    ) -> None:
        """output: URI of the output's folder. bases: memory for decoded slices of the base. held: see `Blocks`."""
        self.merge = merge
        self.kernels = kernels
        self.pool: Pool | None = pool
        self.recalled: frozenset[int] = frozenset()
        self.observer: Observer | None = None
        self._output = output
        self._manifest = manifest
        self._reads = reads
        self._writes = writes
        self._blocks = Blocks(merge, kernels, reads, bases, held)
        self._stored: dict[tuple[int, int], Any] = {}
        self._derived: dict[tuple[int, int, Callable[[Any], Any]], Any] = {}
        self._scratch: tuple[int, bytearray] = (-1, bytearray())
        self._uploads: dict[str, str] = {}

    def blocks(
        self,
        round_: PlannedRound,
        segments: Iterable[Segment],
        members: Sequence[int],
        zeroed: Counter[tuple[int, str]],
        *,
        resident: bool = False,
        with_base: bool = False,
        own: Round | None = None,
    ) -> Generator[Block, None, None]:
        """See `rounds.Bench.blocks`."""
        return self._blocks.stream(round_, segments, members, zeroed, resident=resident, with_base=with_base, own=own)

    def factors(
        self, requests: Iterable[tuple[int, Parameter]], *, on_device: bool = False
    ) -> Iterator[Factors | None]:
        """See `rounds.Bench.factors`."""
        return self._blocks.factors(requests, on_device=on_device)

    # -- what barriers have stored

    def barrier(self, index: int, group: int = 0) -> Any:
        """Return a barrier's finding. Raises `InputError` where it has gone: nothing else would show its lack."""
        if (index, group) not in self._stored:
            folded = self._manifest.read_folded(self.merge, index, [group])
            if group not in folded:
                problem = f"what the barrier after round {index} stored of group {group} has gone"
                raise InputError(Problem(self._manifest.folder, problem, "merge again with --fresh"))
            self._stored[index, group] = folded[group].finding
        return self._stored[index, group]

    def derived(self, index: int, group: int, make: Callable[[Any], Any]) -> Any:
        """See `rounds.Bench.derived`."""
        if (index, group, make) not in self._derived:
            self._derived[index, group, make] = make(self.barrier(index, group))
        return self._derived[index, group, make]

    def of_earlier(self, index: int) -> Any:
        """See `rounds.Bench.of_earlier`."""
        earlier = self.merge.catalog.earlier
        pin = earlier.sums.get(self.merge.rounds[index].position) if earlier else None
        return self._manifest.read_of_earlier(self.merge, index, pin) if pin else None

    def remember(self, index: int, group: int, finding: Any) -> None:
        """See `rounds.Bench.remember`."""
        self._stored[index, group] = finding
        self._derived = {key: value for key, value in self._derived.items() if key[:2] != (index, group)}

    # -- what is written

    def copy_base(self, parameter: str, first: int, last: int, out: Tensor) -> None:
        """See `rounds.Bench.copy_base`."""
        base = self.merge.catalog.base
        form = self.merge.sources.formats[base.format]
        source = base.sources[parameter]
        reads = form.reads(source, first, last)  # none where there are no elements
        if len(reads) == 1:
            self._reads.read_once(base.objects[reads[0].object], reads[0].start, out)
        elif reads:
            views = [torch.empty(read.stop - read.start, dtype=torch.uint8) for read in reads]
            for read, view in zip(reads, views, strict=True):
                self._reads.read_once(base.objects[read.object], read.start, view)
            stored = form.encoded(source, first, last, views)
            assert isinstance(stored, Encoded), "a base is stored whole"
            out.copy_(stored.data.view(torch.uint8))

    def part(self, size: int) -> Tensor:
        """See `rounds.Bench.part`."""
        return self._writes.buffer(size)

    def upload(self, file: int) -> str:
        """Return the id of a weight file's upload. It begins just before the round that writes."""
        if not self._uploads:
            self._uploads = self._manifest.read_uploads()
        return self._uploads[self.merge.result.files[file].name]

    def write_part(self, data: Tensor, file: int, number: int) -> None:
        """See `rounds.Bench.write_part`."""
        uri = join(self._output, self.merge.result.files[file].name)
        start, _ = self.merge.layout.part(file, number)
        self._writes.write(data, file, uri, self.upload(file), number + 1, start)

    def written(self) -> list[Written]:
        """See `rounds.Bench.written`."""
        return self._writes.drain()

    def write_state(self, name: str, data: bytes) -> None:
        """See `rounds.Bench.write_state`."""
        self._manifest.write_state(name, data)

    def write_scratch(self, parameter: int, data: Tensor) -> str:
        """See `rounds.Bench.write_scratch`."""
        return self._manifest.write_scratch(parameter, data.view(torch.uint8).cpu().numpy().data)

    def read_scratch(self, parameter: int, crc32c: str) -> bytearray:
        """See `rounds.Bench.read_scratch`. The last scratch is kept: all tensors of a matrix come from it."""
        if self._scratch[0] != parameter:
            self._scratch = parameter, bytearray(self._manifest.read_scratch(parameter, crc32c))
        return self._scratch[1]
