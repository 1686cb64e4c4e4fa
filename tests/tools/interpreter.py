"""The kernels of a GPU without one: run by Triton's interpreter, or compiled for a GPU that is not there."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.experimental.gluon  # imported late by Triton itself, when its functions must still be its own
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from tests.tools import ptx
from ties_ray.kernels import cuda, definition

H100, A100 = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32)


class Interpreted(interpreter.InterpretedFunction[Any]):
    """A kernel, or what one calls: the language is patched once a launch, not again in every call (20 times slower)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


class Standard(interpreter.InterpretedFunction[Any]):
    """A function of Triton's own library; what it needs patched is put back, for the compiler to come after."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scope = interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        finally:
            scope.restore()


def dot(builder: Any, a: Any, b: Any, total: Any, input_precision: Any, max_num_imprecise_acc: int) -> Any:
    """Of fp32 by fp32 (`ieee`) a chain of fused multiply-adds, as Triton compiles it."""
    if input_precision != ir.INPUT_PRECISION.IEEE:
        return DOT(builder, a, b, total, input_precision, max_num_imprecise_acc)
    left, right, found = (torch.from_numpy(each.data) for each in (a, b, total))
    for of_rows, of_columns in zip(left.unbind(1), right.unbind(0), strict=True):
        found = definition.fma(of_rows[:, None], of_columns, found)
    return interpreter.TensorHandle(found.numpy(), total.dtype.scalar)


DOT = interpreter.InterpreterBuilder.create_dot


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter run the kernels on tensors of the CPU, until `patch` is undone.

    One launch at a time, since it keeps its state in modules. Tiles are larger than on a GPU, since its cost is by the
    operation; no bit depends on them.
    """
    patch.setattr(triton.knobs.runtime, "interpret", True)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    patch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", ptx.inline_asm(ptx.Machine()))
    tile, block = cuda.Tile(64, 512, 1, 0, 1), 16_384
    changed = {"BLOCK": block, "COUNT_BLOCK": block, "TILE": tile}
    for name, value in changed.items():
        patch.setattr(cuda, name, value)
    for module, kind in ((tl, Standard), (tl.standard, Standard), (cuda, Interpreted)):
        for name, function in jitted(module):
            patch.setattr(module, name, kind(function.fn))
    launch, one_at_a_time = interpreter.GridExecutor.__call__, threading.Lock()

    def locked(*args: Any, **kwargs: Any) -> None:
        with one_at_a_time, np.errstate(all="ignore"):
            launch(*args, **kwargs)

    patch.setattr(interpreter.GridExecutor, "__call__", locked)


def jitted(module: Any) -> list[tuple[str, Any]]:
    return [(name, each) for name, each in vars(module).items() if isinstance(each, JITFunction)]


class Compiler:
    """Stands for a kernel: compiles what it is launched with, for a GPU that need not be there, and runs nothing."""

    def __init__(self, kernel: Any, target: GPUTarget) -> None:
        self.compiled: list[tuple[dict[str, Any], Any]] = []
        """With the constants that each was compiled for."""
        self._kernel = kernel
        self._target = target

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *args: Any, **more: Any) -> None:
        """As Triton does: addresses are multiples of 16, and so are the integers that are."""
        kinds, multiples = {}, {}
        for place, (parameter, arg) in enumerate(zip(self._kernel.params[: len(args)], args, strict=True)):
            kinds[parameter.name] = parameter.annotation_type or triton.runtime.jit.mangle_type(arg)
            number = isinstance(arg, int) and not parameter.do_not_specialize and arg % 16 == 0
            if number or isinstance(arg, torch.Tensor):
                multiples[place,] = [["tt.divisibility", 16]]
        names = [parameter.name for parameter in self._kernel.params]
        constants = {name: value for name, value in more.items() if name in names}
        options = {name: value for name, value in more.items() if name not in names}
        source = ASTSource(self._kernel, kinds | dict.fromkeys(constants, "constexpr"), constants, multiples)
        self.compiled.append((constants, triton.compile(source, target=self._target, options=options)))
