"""Fisher-weighted averaging (Matena and Raffel, NeurIPS 2022): each value counts by how sure its model is of it."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.errors import Problem
from ties_ray.methods import Companion, Context, Deltas, Key, Member, Method, Result, Round, bytes_each


class Fisher(Method):
    """The mean of the task vectors, each value weighted by the model's Fisher information there.

    Each model brings its diagonal Fisher information: `with: {fisher: <folder>}`, safetensors files with a tensor of
    the same shape for each parameter. Any importance that is not negative will do. Two passes over the models.
    Where a model's information is 0 everywhere else, the floor lets the first model win, as in the published code.
    """

    name: Literal["fisher"] = "fisher"
    floor: FiniteFloat = Field(default=1e-6, ge=0)
    """Least information of a value; smaller ones count as this."""
    floored: Literal["first", "all"] = "first"
    """The models that have the floor: the first one, as in the published code, or all."""
    normalize: bool = True
    """Whether the information of each model is divided by its norm over the whole model, so that none outweighs all."""
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the mean."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "Matena and Raffel 2022, Merging Models with Fisher-Weighted Averaging (arXiv:2111.09832)"
    caveat: ClassVar[str] = "Information from few samples is noise. Where all of it is 0, the first model wins."
    companions: ClassVar[tuple[Companion, ...]] = (Companion("fisher"),)

    @property
    def weights_are_shares(self) -> bool:
        """Return that weights are divided by their sum."""
        return True

    @property
    def base_cancels(self) -> bool:
        """Return whether it is the mean of the weights themselves."""
        return self.lambda_ == 1

    def problems(self, members: Sequence[Member]) -> list[Problem]:
        """Refuse negative weights, since the mean divides by them."""
        return [
            Problem(f"model {member.id}", f"weight {member.weight} is negative, and fisher divides by weights",
                    "give fisher a positive weight")
            for member in members
            if member.weight < 0
        ]  # fmt: skip

    @property
    def all_at_once(self) -> str:
        """Return nothing: norm and floor of a model's information depend on no other, and the sums go on."""
        return ""

    def rounds(self) -> tuple[Round, ...]:
        """Return the norms of the information, where it is normalised, and the merge."""
        merge = Round(
            "merge", self._merge, companions=("fisher",), holds=bytes_each(44), state="sums", words=lambda parameter: 6
        )
        if not self.normalize:
            return (merge,)
        return Round("norms", self._norms, companions=("fisher",), holds=bytes_each(4)), merge

    def _norms(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.exact_sums import dot

        sums = {}
        for model, _ in deltas:
            information = deltas.companion("fisher")
            if information is not None:
                sums[Key("fisher2", (model,), whole=True)] = dot(information, information)
        return Result(sums=sums)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        import torch

        above = torch.zeros(context.stop - context.start, dtype=torch.float64, device=context.kernels.device)
        below, plain = above.clone(), above.clone()
        deltas.resume(above, below, plain)
        for model, delta in deltas:
            weight, information = context.weights[model], deltas.companion("fisher")
            plain += delta.double().mul_(weight)
            if information is not None:
                if self.floored == "all" or model == 0:
                    information.clamp_(min=self.floor)
                share = information.double().mul_(weight / self._norm(context, model))
                below += share
                above += share.mul_(delta)
        deltas.keep(above, below, plain)
        plain /= sum(context.weights) or 1.0
        merged = torch.where(below > 0, above.div_(below), plain)
        return Result(merged=merged.mul_(self.lambda_).float())

    def _norm(self, context: Context, model: int) -> float:
        """Return what a model's information is divided by; 1 where all of it is zero."""
        return (math.sqrt(context.sum("fisher2", model, whole=True)) if self.normalize else 0.0) or 1.0
