"""MetaGPT (Zhou et al., EMNLP 2024): weights in proportion to the squared norms of whole task vectors."""

from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat

from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Key, Method, Result, Round


class MetaGpt(Method):
    """Averages the task vectors, each weighted by its squared norm over the whole model; lambda scales that average.

    Goes through the models twice. The longest task vector rules: a model that moved ten times as far as the others
    has a hundred times their weight.
    """

    name: Literal["metagpt"] = "metagpt"
    lambda_: FiniteFloat = Field(default=1.0, alias="lambda")
    """Factor on the weighted average."""

    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = (
        "Zhou et al. 2024, MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic"
        " (arXiv:2406.11385)"
    )
    caveat: ClassVar[str] = "A model that moved ten times as far has a hundred times the weight."
    uses_weights: ClassVar[bool] = False

    def rounds(self) -> tuple[Round, ...]:
        """Return the norms and the merge."""
        return Round("norms", self._norms), Round("merge", self._merge)

    def _norms(self, deltas: Deltas, context: Context) -> Result:
        from ties_ray.kernels.exact_sums import dot

        return Result(sums={Key("norm2", (model,), whole=True): dot(delta, delta) for model, delta in deltas})

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        squares = [context.sums.get(Key("norm2", (model,), whole=True), 0) for model in range(len(context.members))]
        total = sum(squares)
        terms = tuple(Term(square / total if total else 0.0) for square in squares)
        return Result(merged=deltas.fold(WeightedSum(terms))["sum"].mul_(self.lambda_))
