"""A machine for what the kernels say in PTX, so that Triton's interpreter can run all of them; see `interpret`.

It knows the instructions that they use, refuses any other, and runs all instances of a piece of PTX at a time: a
register holds a number of each. It has a register for each name: what `&` is for, outputs in the place of inputs, it
can't see. The rules are those of NVIDIA's "Parallel Thread Execution ISA", section 9.7.
"""

import ctypes
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from triton.runtime import interpreter

from ties_ray.kernels import definition

Numbers = npt.NDArray[Any]

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "ge": operator.ge,
    "geu": lambda a, b: ~(a < b),  # or either is NaN
}  # fmt: skip
INTEGERS: dict[str, Callable[..., Any]] = {
    "mov": lambda a: a,
    "and": operator.and_,
    "or": operator.or_,
    "add": operator.add,
    "sub": operator.sub,
    "min": np.minimum,
    "shr": operator.rshift,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: a.astype(np.uint64) * b + c,
    "selp": lambda a, b, chosen: np.where(chosen, a, b),
}
FLOATS: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "add.rn": operator.add,
    "fma.rn": lambda a, b, c: definition.fma(
        *(torch.from_numpy(np.ascontiguousarray(one)) for one in (a, b, c))
    ).numpy(),
}
DTYPES = {"b32": np.uint32, "u32": np.uint32, "f32": np.float32, "u64": np.uint64, "b64": np.uint64, "pred": np.bool_}
SHARED, GARBAGE = 0x400, 0xDEADBEEF
"""Where shared memory begins, and what it holds before it is written to."""


class Machine:
    """Runs pieces of PTX; keeps shared memory between those of a program."""

    def __init__(self) -> None:
        self._shared = np.empty(0, np.uint32)

    def run(self, text: str, constraints: str, inputs: Sequence[Numbers], outputs: Sequence[type]) -> list[Numbers]:
        """Return a piece's outputs. inputs, outputs: a number of each instance for every operand."""
        kinds = constraints.split(",")
        assert [kind.startswith("=") for kind in kinds] == [True] * len(outputs) + [False] * len(inputs)
        self._registers: dict[str, Numbers] = {}
        for place, (kind, numbers) in enumerate(zip(kinds[len(outputs) :], inputs, strict=True), len(outputs)):
            name = f"${kind if kind.isdigit() else place}"  # a number: the output that begins with this input
            self._registers[name] = numbers.view(np.uint32 if numbers.itemsize == 4 else np.uint64).copy()
        self._active = np.ones(max((len(one) for one in inputs), default=1), np.bool_)
        self._waiting: dict[str, Numbers] = {}
        self._declared = {f"${place}" for place in range(len(outputs))}
        self._symbols: dict[str, int] = {}
        for statement in re.split(r"[;{}]|(?<=:)\s", text.replace("\n", " ")):
            if statement.strip():
                self._step(statement.strip())
        assert not self._waiting, "a label that nobody set"
        return [self._registers[f"${place}"].view(dtype) for place, dtype in enumerate(outputs)]

    def _step(self, statement: str) -> None:
        if statement.endswith(":"):
            self._active = self._active | self._waiting.pop(statement[:-1], False)
            return
        if statement.startswith(".reg"):
            for name in re.split(r",\s*", statement.split(maxsplit=2)[2]):
                stem, _, count = name.rstrip(">").partition("<")
                self._declared |= {f"{stem}{number}" for number in range(int(count))} if count else {stem}
            return
        if statement.startswith(".shared"):
            found = re.fullmatch(r"\.shared \.align 4 \.b32 (\w+)\[(\d+)\]", statement)
            assert found, statement
            self._shared = np.full(int(found[2]), GARBAGE, np.uint32)
            self._symbols[found[1]] = SHARED
            return
        guard, opcode, *rest = re.fullmatch(r"(@!?\w+ )?([\w.]+)\s+(.*)", statement).groups()  # type: ignore[union-attr]
        chosen = self._active
        if guard:
            predicate = self._read(guard.strip("@! "), np.bool_)
            chosen = chosen & (~predicate if "!" in guard else predicate)
        self._execute(opcode, re.split(r",\s*", rest[0]), chosen)

    def _execute(self, opcode: str, operands: list[str], chosen: Numbers) -> None:
        if opcode == "bra":
            (label,) = operands
            self._waiting[label] = self._waiting.get(label, False) | chosen
            self._active = self._active & ~chosen
            return
        first, *others = opcode.split(".")
        dtype = DTYPES[others.pop()]
        if first in ("red", "st", "ld"):
            self._reach(f"{first}.{'.'.join(others)}", operands, dtype, chosen)
            return
        target, *sources = operands
        if first in ("set", "setp"):
            a, b = (self._read(one, dtype) for one in sources[:2])
            value = COMPARISONS[others[0]](a, b)
            if first == "set":
                assert others[1] == "f32", opcode
                value = value.astype(np.float32)
            elif others[1:]:
                assert others[1:] == ["and"], opcode
                value = value & self._read(sources[2], np.bool_)
        else:
            table = FLOATS if dtype is np.float32 else INTEGERS
            kinds = [dtype] * len(sources)
            if first == "selp":
                kinds[2] = np.bool_
            if opcode == "mad.wide.u32":
                kinds[2] = np.uint64
            numbers = [self._read(one, kind) for one, kind in zip(sources, kinds, strict=True)]
            value = table[".".join([first, *others])](*numbers)
        self._write(target, value, chosen)

    def _reach(self, what: str, operands: list[str], dtype: Any, chosen: Numbers) -> None:
        """Read, write or add to memory."""
        place, number = reversed(operands) if what == "ld.shared" else operands
        at = self._read(place.strip("[]"), np.uint64 if "global" in what else np.uint32)
        assert not (at[chosen] % np.dtype(dtype).itemsize).any(), "each number begins at a multiple of its size"
        if what == "red.global.add":
            assert dtype is np.uint64, "of a table of int64"
            places, counts = np.unique(at[chosen], return_counts=True)
            assert number == "1", "what is counted"
            for address, count in zip(places.tolist(), counts.tolist(), strict=True):
                ctypes.c_int64.from_address(address).value += count
            return
        index = (at[chosen].astype(np.int64) - SHARED) // 4
        assert dtype is np.uint32
        assert ((index >= 0) & (index < len(self._shared))).all(), "beyond shared memory"
        if what == "ld.shared":
            found = np.zeros(len(at), np.uint32)
            found[chosen] = self._shared[index]
            self._write(number, found, chosen)
        elif what == "st.shared":
            self._shared[index] = self._read(number, dtype)[chosen]
        else:
            assert what == "red.shared.add", what
            np.add.at(self._shared, index, self._read(number, dtype)[chosen])

    def _read(self, name: str, dtype: Any) -> Numbers:
        if name in self._registers:
            found = self._registers[name]
            return found if dtype in (np.bool_, np.uint64) else found.view(dtype)
        if name.startswith("0f"):
            bits = int(name[2:], 16)
        else:
            bits = self._symbols[name] if name in self._symbols else int(name)
        whole = np.full(len(self._active), bits, np.uint64 if dtype is np.uint64 else np.uint32)
        return whole.view(dtype)

    def _write(self, name: str, value: Numbers, chosen: Numbers) -> None:
        assert name in self._declared, f"{name} is not declared"
        value = np.broadcast_to(value, chosen.shape)
        bits = value if value.dtype == np.bool_ else value.view(np.uint64 if value.itemsize == 8 else np.uint32)
        before = self._registers.get(name)
        self._registers[name] = bits.copy() if before is None or chosen.all() else np.where(chosen, bits, before)


class Results:
    """What Triton takes for a call of PTX."""

    def __init__(self, handles: list[interpreter.TensorHandle]) -> None:
        self._handles = handles

    def get_result(self, place: int) -> interpreter.TensorHandle:
        """Return one of its outputs."""
        return self._handles[place]


def inline_asm(machine: Machine) -> Callable[..., Results]:
    """Return what Triton's interpreter lacks: `pack` elements of each tensor are the operands of an instance."""

    def create(_: Any, text: str, constraints: str, values: Sequence[Any], types: Sequence[Any], is_pure: bool,
               pack: int) -> Results:  # fmt: skip
        shape = values[0].data.shape if values else (1,)
        flat = [np.ascontiguousarray(one.data).reshape(-1, pack) for one in values]
        inputs = [column.copy() for one in flat for column in one.T]
        scalars = [one.scalar for one in types]
        dtypes = [np.float32 if one.is_floating() else np.int32 for one in scalars]
        assert all(one.primitive_bitwidth == 32 for one in scalars)
        found = machine.run(text, constraints, inputs, [dtype for dtype in dtypes for _ in range(pack)])
        whole = [np.stack(found[place : place + pack], 1).reshape(shape) for place in range(0, len(found), pack)]
        return Results([interpreter.TensorHandle(data, one) for data, one in zip(whole, scalars, strict=True)])

    return create
