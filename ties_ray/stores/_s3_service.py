"""One S3 service: connections, retries, and what the service turns out to lack."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ties_ray import runtime
from ties_ray.errors import InputError, MergeError, Problem, UnavailableError
from ties_ray.stores import Meter, NoUpload, Throttle, Transient, persist
from ties_ray.stores._s3_answers import object_of, split
from ties_ray.stores._s3_client import Connection, S3Options, connect
from ties_ray.stores._s3_clock import SKEWED, Clock
from ties_ray.stores._s3_errors import EXPIRED, SET_CLOCK, answer, explained, refuses

T = TypeVar("T")

LEAST_RATE = 1 << 18
"""Bytes a second. A transfer that is slower for `GRACE` seconds counts as hung, though it never falls silent."""
GRACE = 60.0
"""Seconds that any transfer may take."""
_STATIC = ("env", "shared-credentials-file", "config-file")
"""Places in which botocore finds credentials that do not renew themselves."""


class Service:
    """Sends requests, in the threads of its callers; all share one client and its connections."""

    patience: float = 120.0
    """Seconds that one call may go on repeating itself."""
    first_patience: float = 20.0
    """Seconds that a call may repeat itself while nothing at the endpoint has answered: the address is likely wrong.

    They count again after a call gave up, until the next success, so that a run whose storage is down ends soon."""
    silence: float = 30.0
    """Seconds without a byte after which a connection counts as dead."""

    def __init__(self, options: S3Options, meter: Meter, notes: list[str]) -> None:
        if options.ca and not Path(options.ca).is_file():
            raise InputError(Problem("storage.s3.ca", f"there is no file {options.ca}", "every worker needs it"))
        self.options = options
        self.meter = meter
        self._notes = notes
        self.payer = {"RequestPayer": "requester"} if options.requester_pays else {}
        self.sealed = options.sealed()
        self.customer = options.customer()
        self.crc: bool | None = None
        """Whether CRC32C proves the bytes that are written, else MD5; None before the first connection."""
        self._answered = False
        self._given_up = False
        self._throttle = Throttle()
        self._clock = Clock()
        self._connections: dict[bool, Connection] = {}
        """Signed and unsigned connections; the key is whether requests go unsigned."""
        self._connecting = threading.Lock()

    def connected(self, uri: str) -> Connection:
        """Return the connection for a bucket."""
        unsigned = self.options.unsigned(split(uri)[0])
        with self._connecting:
            if unsigned not in self._connections:
                made = connect(self.options, self.silence, self._clock, unsigned=unsigned)
                if self.crc is None:
                    self.crc = made.checksums == "when_supported" or (made.is_aws and not made.checksums)
                self._connections[unsigned] = made
            return self._connections[unsigned]

    def _disconnect(self, expired: Connection) -> None:
        """Let the next request look up credentials anew, unless another thread has done so."""
        with self._connecting:
            self._connections = {
                kind: connection for kind, connection in self._connections.items() if connection is not expired
            }

    def note(self, message: str) -> None:
        """Note for the result, once, what the service lacks and what is done instead."""
        if message not in self._notes:
            self._notes.append(message)

    def ask_upload(self, uri: str, doing: str, operation: str, upload: str, **arguments: Any) -> Any:
        """Return the answer of a request about an upload; None if the service does not know it."""
        try:
            return self.ask(uri, doing, operation, **object_of(uri), UploadId=upload, **arguments)
        except NoUpload:
            return None

    def ask(self, uri: str, doing: str, operation: str, **arguments: Any) -> Any:
        """Return the answer of one request without a body either way; {} where the service has no such list."""

        def send(client: Any, late: float) -> Any:
            try:
                return getattr(client, operation)(**arguments, **self.payer)
            except Exception as error:
                if not (operation.startswith("list_") and refuses(error, operation)):
                    raise
                self.note(f"s3://: the service can't do {operation}; uploads that a kill leaves behind stay there")
                return {}

        return self.repeat(uri, doing, send, 0)

    def repeat(self, uri: str, doing: str, request: Callable[[Any, float], T], nbytes: int) -> T:
        """Return the result of `request`, which is given the client and the time when it is late.

        nbytes: how many bytes it transfers.
        """

        def attempt() -> T:
            return self._once(uri, doing, request, nbytes)

        def seconds() -> float:
            return self.patience if self._answered and not self._given_up else self.first_patience

        try:
            result = persist(attempt, meter=self.meter, uri=uri, doing=doing, seconds=seconds, throttle=self._throttle)
        except UnavailableError:
            self._given_up = True
            raise
        self._given_up = False
        return result

    def _once(self, uri: str, doing: str, request: Callable[[Any, float], T], nbytes: int) -> T:
        connection = None
        try:
            connection = self.connected(uri)
            result = request(connection.client, runtime.monotonic() + GRACE + nbytes / LEAST_RATE)
        except (MergeError, Transient):
            self._answered = True
            raise
        except Exception as error:
            status, code, _ = answer(error)
            reached, self._answered = self._answered, self._answered or status > 0
            if code == SKEWED and (skew := self._clock.follow(error)):
                self.note(f"s3://: {skew}; requests are signed by the service's time")
                raise Transient(f"{status} {code}: {skew}", attempts=4, remedy=SET_CLOCK) from error
            if connection and code in EXPIRED:
                self._disconnect(connection)
                raise self._expired(error, uri, connection) from error
            raise explained(
                error, uri, doing, reached=reached, unsigned=self.options.unsigned(split(uri)[0])
            ) from error
        self._answered = True
        return result

    def _expired(self, error: Exception, uri: str, connection: Connection) -> Transient:
        """Return the error for credentials that have run out; the next try looks them up anew."""
        status, code, message = answer(error)
        failure = f"{status} {code}: {message}, and so again after the credentials were looked up anew"
        static = connection.credentials[0] in _STATIC
        remedy = "get new credentials, and run the same command: what is done is kept"
        return Transient(failure, attempts=4, remedy=remedy if static else None)
