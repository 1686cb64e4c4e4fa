"""Contract suites, one a file: who implements a contract inherits its suite and has our tests.

The docstring of each class says which fixtures a subclass provides. Names are imported when they are used. A worker
can therefore import `ties_ray.testing.echo` without pytest or torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ties_ray.testing.executors import ExecutorContract
    from ties_ray.testing.formats import FormatContract, folder_of, values
    from ties_ray.testing.kernels import KernelContract, a_group, an_op, same_bits, some_factors
    from ties_ray.testing.methods import MethodContract, held_members, merge_held
    from ties_ray.testing.outputs import OutputContract
    from ties_ray.testing.stores import StoreContract

__all__ = [
    "ExecutorContract",
    "FormatContract",
    "KernelContract",
    "MethodContract",
    "OutputContract",
    "StoreContract",
    "a_group",
    "an_op",
    "folder_of",
    "held_members",
    "merge_held",
    "same_bits",
    "some_factors",
    "values",
]

_FILES = {
    "executors": ("ExecutorContract",),
    "formats": ("FormatContract", "folder_of", "values"),
    "kernels": ("KernelContract", "a_group", "an_op", "same_bits", "some_factors"),
    "methods": ("MethodContract", "held_members", "merge_held"),
    "outputs": ("OutputContract",),
    "stores": ("StoreContract",),
}


def __getattr__(name: str) -> object:
    for file, names in _FILES.items():
        if name in names:
            return getattr(importlib.import_module(f"ties_ray.testing.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
