"""Workers without threads: a message is handled while somebody waits."""

from collections import deque
from typing import ClassVar

from ties_ray.executors import Answered, Event, Executor, Host, Needs, Refusal, Refused, build, handle


class Inline(Executor):
    """As many hosts as are asked for, in this thread, each in its turn."""

    name: ClassVar[str] = "inline"

    def start(self, factory: str, setup: str, needs: Needs) -> int:
        self._messages: deque[tuple[int, int, str]] = deque()
        self._hosts: list[Host] = []
        for _ in range(needs.num_workers or 1):
            host = build(factory, setup)
            if isinstance(host, Refusal):
                raise host.error()
            self._hosts.append(host)
        return len(self._hosts)

    def submit(self, worker: int, ticket: int, message: str) -> None:
        self._messages.append((worker, ticket, message))

    def wait(self, timeout: float) -> list[Event]:
        if not self._messages:
            return []
        worker, ticket, message = self._messages.popleft()
        outcome = handle(self._hosts[worker], message)
        if isinstance(outcome, Refusal):
            return [Refused(worker, ticket, *outcome)]
        return [Answered(worker, ticket, outcome)]

    def give_up(self, worker: int) -> None:
        """Nothing here ever hangs for longer than the caller itself."""

    def revive(self, worker: int) -> None:
        """Nothing here is ever lost."""

    def stop(self) -> None:
        self._hosts = []
