"""The state that a merge keeps for later ones: files of whole blocks, named by the shards that they were merged in."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ties_ray.layout.shards import Shard
from ties_ray.methods import Round, every_element
from ties_ray.rounds import Bench, Block, Merge
from ties_ray.safetensors import build
from ties_ray.tensors import Parameter

if TYPE_CHECKING:
    from torch import Tensor

FILE_BYTES = 32 * 2**20
"""The most bytes of a file's tensors. A block whose state takes more is divided."""


class StateFiles:
    """Collects the state of a shard's blocks, if its round leaves one.

    A tensor is called `<first element>:<name of the state>:<parameter>`, (elements, words).
    """

    def __init__(self, bench: Bench, index: int, shard: Shard) -> None:
        """index: of the round that merges the shard."""
        self._bench = bench
        self._state = _left_by(bench.merge, index)
        if self._state:
            from ties_ray.kernels.buffers import return_large_memory

            return_large_memory()
        parameter, start = shard.segments[0][:2] if shard.segments else (0, 0)
        places = (shard.file, shard.parts[0]) if shard.parts[1] else (parameter, start)
        self._place = f"{index}-{places[0]:05}-{places[1]:06}"
        self._waiting: list[tuple[str, Tensor]] = []
        self._bytes = 0
        self._number = 0

    def keeping(self, delta: "Callable[[Block], Tensor]") -> "Callable[[Block], Tensor]":
        """Return what gives the merged change of a block, and keeps the state after it."""

        def kept(block: Block) -> "Tensor":
            change = delta(block)
            self.add(block)
            return change

        return kept

    def add(self, block: Block) -> None:
        """Add the state of a block, as its round has left it."""
        import torch

        if not self._state:
            return
        assert block.slices.kept, "a round with a state keeps it"
        parameter = self._bench.merge.catalog.parameters[block.parameter]
        words = torch.cat(list(block.slices.kept), 1).cpu()
        block.slices.kept = ()
        step = max(1, FILE_BYTES // (4 * words.shape[1]))
        for start in range(0, len(words), step):
            piece = words[start : start + step]
            if self._bytes + piece.nbytes > FILE_BYTES:
                self.write()
            self._waiting.append((f"{block.start + start}:{self._state}:{parameter.name}", piece))
            self._bytes += piece.nbytes

    def write(self) -> None:
        """Write what waits, if anything does."""
        if not self._waiting:
            return
        header = build([(name, "F32", tuple(words.shape)) for name, words in self._waiting], {})
        data = b"".join([header, *(words.numpy().data for _, words in self._waiting)])
        self._bench.write_state(f"{self._place}-{self._number:04}.safetensors", data)
        self._waiting, self._bytes, self._number = [], 0, self._number + 1


def files_bytes(merge: Merge, own: Round) -> int:
    """Return the bytes of what waits to be written, and of the file made of it."""
    return 2 * FILE_BYTES if own.state and merge.recipe.output.state else 0


def state_bytes(merge: Merge, own: Round, parameter: Parameter) -> int:
    """Return the bytes that a round's state takes for each element: as it is read, kept, and put together."""
    read = 0
    if merge.catalog.earlier:  # a whole unit is read alone; other blocks come ahead, each with base, state and models
        in_flight = -(-merge.sizes.ahead // (2 + len(merge.models)))
        read = 1 + (in_flight if own.unit is every_element else 0)
    return 4 * own.words(parameter) * (read + 2 * merge.recipe.output.state) if own.state else 0


def _left_by(merge: Merge, index: int) -> str:
    """Return the name of the state that a round leaves, empty where it leaves none: the last round of a name does."""
    position = merge.rounds[index].position
    own, *later = merge.recipe.method.rounds()[position:]
    return own.state if merge.recipe.output.state and own.state not in {each.state for each in later} else ""
