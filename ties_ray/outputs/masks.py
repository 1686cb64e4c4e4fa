"""One vector for all models, and for each a mask of a bit an element: base + factor * mask * vector is that model."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ties_ray.errors import Problem
from ties_ray.kernels import Kernels
from ties_ray.libraries.library import LOAD_FILE, Library
from ties_ray.libraries.weight_files import BITS, VECTOR
from ties_ray.outputs import ElementwiseOutput, OutputFile, OutputTensor, Product, weight_map
from ties_ray.outputs.delta import changed, write_change
from ties_ray.tensors import COPIES, Parameter, exclusion

if TYPE_CHECKING:
    from torch import Tensor

LIBRARY = Library("safetensors", VECTOR, opened_by=LOAD_FILE.format(name=f"{VECTOR}.safetensors"))
FACTOR = "factor"
"""Name of the tensor that holds a model's factor."""


class Masks(ElementwiseOutput):
    """The unified vector of a method with masks, and a file for each model: its factor, and its mask in packed bits.

    A recipe rebuilds a model from them: `models: [{path: <folder>, file: mask-00000.safetensors}]`.
    """

    kind: Literal["masks"] = "masks"
    dtype: Literal["float32"] = "float32"
    """The dtype of the vector."""

    reads_base = False
    holds_masks = True

    def problems(self, parameters: Sequence[Parameter]) -> list[Problem]:
        """Return that a parameter has the name of the factor."""
        if not any(each.name == FACTOR for each in changed(parameters)):
            return []
        message = f"a parameter is called {FACTOR!r}, as the factor of a mask is"
        remedy = exclusion([FACTOR], [each.name for each in parameters], COPIES)
        return [Problem("output.kind", message, remedy)]

    def tensors(self, parameters: Sequence[Parameter]) -> tuple[OutputTensor, ...]:
        """Return every parameter that is merged and changed."""
        return tuple(OutputTensor(each.name, "F32", each.shape, each.name) for each in changed(parameters))

    def products(self, parameters: Sequence[Parameter], ids: Sequence[str]) -> tuple[Product, ...]:
        """Return a file for each model: its factor, and the mask of each parameter as ceil(elements / 8) bytes."""
        own = changed(parameters)
        return tuple(
            Product(
                f"mask-{member:05d}.safetensors",
                {"model": id_, BITS: "numpy.packbits"},
                (
                    *(OutputTensor(FACTOR, "F64", (1,), each.name, "factor", member) for each in own[:1]),
                    *(OutputTensor(each.name, "U8", (-(-each.numel // 8),), each.name, "mask", member) for each in own),
                ),
            )
            for member, id_ in enumerate(ids)
        )

    def values(self, base: "Tensor", merged: "Tensor", out: "Tensor", kernels: Kernels) -> int:
        """Write the vector; no change is +0."""
        return write_change(merged, out, kernels)

    def library(self, inputs: Library) -> Library:
        """Return names that no loader takes for a model's."""
        return LIBRARY

    def index(
        self, files: Sequence[OutputFile], parameters: Sequence[Parameter], facts: Mapping[str, str], library: Library
    ) -> tuple[str, bytes]:
        """Return the files of the vector by tensor, and the file of each model by its id."""
        models = {
            json.loads(file.header)["__metadata__"]["model"]: file.name
            for file in files
            if any(placed.tensor.origin == "factor" for placed in file.tensors)
        }
        of_vector = [file for file in files if file.name not in models.values()]
        content = {**json.loads(weight_map(of_vector)), "models": models}
        return library.index, (json.dumps(content, indent=2) + "\n").encode()

    def rewrite(self, name: str, data: bytes, facts: Mapping[str, str]) -> bytes | None:
        """Leave out all small files: they belong to a whole model."""
        return None

    def entry_point_file(self, files: Sequence[OutputFile], library: Library) -> str:
        """Return the index."""
        return library.index
