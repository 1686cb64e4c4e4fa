"""The number that counts, out of what a user's own program returns."""

from collections.abc import Mapping

from ties_ray.errors import InputError, Problem, enumerated, shown
from ties_ray.evaluations import Evaluation, Measured

MOST = 1000
"""Numbers that a mapping may hold."""


class OwnNumbers(Evaluation):
    """An evaluation whose numbers have names of their own."""

    metric: str = ""
    """Name of the number that counts. Default: `value`, or the only one."""

    def measured(self, answer: object, source: str) -> Measured:
        """Return what an answer says: a number, or a mapping of names to numbers.

        source: names what has answered. Raises `InputError` for any other answer.
        """
        alone = _number(answer)
        named = {self.metric or "value": alone} if alone is not None else _numbers(answer)
        metric = self.metric or ("value" if len(named) != 1 else next(iter(named)))
        if metric in named:
            return Measured(named[metric], named)
        if named:
            remedy = f"write `metric` with one of these: {enumerated(named)}"
            raise InputError(Problem(source, f"gives no number {metric!r}", remedy))
        message = f"gives {shown(repr(answer))[:100]}, which holds no number"
        raise InputError(Problem(source, message, 'return a number, or a mapping such as {"value": 0.93}'))


def _numbers(answer: object) -> dict[str, float]:
    """Return the numbers of a mapping by name."""
    if not isinstance(answer, Mapping) or len(answer) > MOST:
        return {}
    numbers = {str(name): _number(value) for name, value in answer.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def _number(value: object) -> float | None:
    """Return a number, a scalar of NumPy or a tensor of one value as a float; None for anything else."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
