"""A method that needs a kind of round of its own: each change is scaled to the peak of the first one."""

from typing import ClassVar, Literal

import numpy as np

from ties_ray.kernels import Term, WeightedSum
from ties_ray.methods import Context, Deltas, Method, Result, Round


class EvenPeaks(Method):
    """Averages the changes, each scaled so that its largest magnitude is that of the first model's."""

    name: Literal["even_peaks"] = "even_peaks"
    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "none"

    def rounds(self) -> tuple[Round, ...]:
        return Round("peaks", self._merge, kind="peaks"), Round("merge", self._merge)

    def _merge(self, deltas: Deltas, context: Context) -> Result:
        count = len(context.members)
        bits = np.array([context.statistics[f"peak {member}"] for member in range(count)], np.uint32)
        peaks = bits.view(np.float32).astype(float)
        terms = tuple(Term(float(peaks[0] / peak) / count if peak else 0.0) for peak in peaks)
        return Result(merged=deltas.fold(WeightedSum(terms))["sum"])
