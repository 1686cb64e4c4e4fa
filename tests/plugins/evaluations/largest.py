"""Scores a model by the largest magnitude among its weights."""

from pathlib import Path
from typing import ClassVar, Literal

from ties_ray.evaluations import Better, Evaluation, Evaluator, Measured, Subject
from ties_ray.stores import Stores


class Largest(Evaluation):
    """The largest magnitude in the tensors whose names match a pattern."""

    main: ClassVar[str] = "pattern"
    packages: ClassVar[tuple[str, ...]] = ("torch", "safetensors")

    name: Literal["largest"] = "largest"
    better: Better = "smaller"
    pattern: str = "*"
    """Pattern of the tensors' names."""

    def prepared(self, stores: Stores, seed: int) -> Evaluator:
        return _Looks(self, seed)


class _Looks(Evaluator):
    def measure(self, subject: Subject) -> Measured:
        from fnmatch import fnmatchcase

        from safetensors.torch import load_file

        assert isinstance(self.evaluation, Largest)
        tensors = [pair for path in Path(subject.folder()).glob("*.safetensors") for pair in load_file(path).items()]
        chosen = [tensor for name, tensor in tensors if fnmatchcase(name, self.evaluation.pattern)]
        value = max(float(tensor.abs().max()) for tensor in chosen)
        return Measured(value, {"largest": value}, {"tensors": len(chosen)})
