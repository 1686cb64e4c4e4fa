"""What a worker has done since it began, for the metrics of its node."""

from collections import defaultdict

from ties_ray.worker.messages import Answer


class Totals:
    """Counts by metric (`messages.METRICS`) and label."""

    def __init__(self) -> None:
        self.by_metric: defaultdict[tuple[str, str], float] = defaultdict(float)

    def add(self, answer: Answer) -> None:
        """Add what an answer tells."""
        totals = self.by_metric
        for metric in ("bytes_read", "bytes_written", "requests", "retries"):
            totals[metric, ""] += getattr(answer.traffic, metric)
        read, write = answer.seconds["wait_read"], answer.seconds["wait_write"]
        totals["seconds", "read"] += read
        totals["seconds", "write"] += write
        totals["seconds", "merge"] += max(0.0, answer.seconds["work"] - read - write)
