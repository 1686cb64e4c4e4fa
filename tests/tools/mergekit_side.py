"""Runs mergekit, in an environment that has it, on every configuration of a folder.

    PYTHONPATH=. venv/bin/python -m tests.tools.mergekit_side FOLDER

FOLDER/NAME.yml is merged into FOLDER/NAME.mergekit. Random methods drop what ties_ray drops with seed 0: model i draws
as a model with the id i does. Needs torch and mergekit alone.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from mergekit.options import MergeOptions

from ties_ray.kernels.definition import words
from ties_ray.kernels.randomness import key


@contextlib.contextmanager
def our_draws() -> Iterator[None]:
    """Let mergekit's methods draw by model and tensor name."""
    waiting: list[tuple[str, str]] = []
    of_group, of_torch = GeneralizedTaskArithmeticMerge.merge_group, torch.bernoulli

    def merge_group(self: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
        densities = [parameters["density"][entry.id] for entry in group.non_base]
        waiting[:] = [(str(model), group.metadata.name) for model, density in enumerate(densities) if density < 1]
        return of_group(self, group, **parameters)

    def bernoulli(chances: torch.Tensor) -> torch.Tensor:
        model, name = waiting.pop(0)
        drawn = words(key(0, model, name), 0, chances.numel()).reshape(chances.shape)
        return (drawn < chances.double() * 2**32).to(chances.dtype)

    GeneralizedTaskArithmeticMerge.merge_group = merge_group
    torch.bernoulli = bernoulli  # type: ignore[assignment]
    try:
        yield
    finally:
        GeneralizedTaskArithmeticMerge.merge_group, torch.bernoulli = of_group, of_torch


def main() -> None:
    """Merge every configuration."""
    for path in sorted(Path(sys.argv[1]).glob("*.yml")):
        configuration = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, lora_merge_cache=sys.argv[1])
        with our_draws():
            run_merge(configuration, str(path.with_suffix(".mergekit")), options)


if __name__ == "__main__":
    main()
