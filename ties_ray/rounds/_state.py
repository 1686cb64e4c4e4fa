"""The state that a merge keeps for later ones: files of whole blocks, named by the parts that they were merged for."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ties_ray.layout.shards import Shard
from ties_ray.rounds import Bench, Block
from ties_ray.safetensors import build

if TYPE_CHECKING:
    from torch import Tensor

FILE_BYTES = 32 * 2**20
"""A file is written once it holds so much."""


class StateFiles:
    """Collects the state of a shard's blocks. A tensor is called `<first element>:<parameter>`, (elements, words)."""

    def __init__(self, bench: Bench, shard: Shard) -> None:
        self._bench = bench
        self._place = f"{shard.file:05}-{shard.parts[0]:06}"
        self._waiting: list[tuple[str, Tensor, int]] = []
        self._bytes = 0
        self._number = 0

    def keeping(self, delta: "Callable[[Block], Tensor]") -> "Callable[[Block], Tensor]":
        """Return what gives the merged change of a block, and keeps the state after it."""

        def kept(block: Block) -> "Tensor":
            change = delta(block)
            self._add(block)
            return change

        return kept

    def _add(self, block: Block) -> None:
        """Add the state of a block, as its fold has left it."""
        state = block.slices.state
        assert state is not None, "a method that continues folds in its last round"
        parameter = self._bench.merge.catalog.parameters[block.parameter]
        self._waiting.append((f"{block.start}:{parameter.name}", state.cpu(), block.stop - block.start))
        self._bytes += state.nbytes
        if self._bytes >= FILE_BYTES:
            self.write()

    def write(self) -> None:
        """Write what waits, if anything does."""
        if not self._waiting:
            return
        shapes = [(name, "F32", (length, len(words) // length)) for name, words, length in self._waiting]
        data = bytearray(build(shapes, {}))
        for _, words, _ in self._waiting:
            data += words.numpy().tobytes()
        self._bench.write_state(f"{self._place}-{self._number:04}.safetensors", bytes(data))
        self._waiting, self._bytes, self._number = [], 0, self._number + 1
