"""A proxy before a real S3 server that fails as storage does: by a script, counted, and the same for the same seed.

By hand:    python -m tests.tools.fault_proxy --upstream http://127.0.0.1:9000 --script faults.json --seed 7
            faults.json: [{"fault": "slow_down", "operation": "get-range", "count": 20, "probability": 0.3}, ...]
            curl http://127.0.0.1:PORT/-/counts
In a test:  with FaultProxy(server, [Rule("cut", "get-range", nth=2)]) as proxy: ... proxy.url, proxy.faults

Requests are forwarded with their headers as they came, Host among them, so that signatures hold. A server that checks
them refuses what the proxy changes in a request (`whole` drops its Range, `flip_upload` a bit of its body). Buckets
stand in the path.
"""

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self, cast
from urllib.parse import parse_qs, unquote, urlsplit

import psutil

Fault = Literal[
    "slow_down",  # 503, the server sees nothing (so do all of these until `delay`)
    "internal_error",  # 500
    "expired_token",  # 400
    "skewed",  # 403 where a request is signed by another time than the service's, which is an hour ahead
    "hang_up",  # the connection is closed without an answer
    "drop_upload",  # the same in the middle of the request's body
    "forget_upload",  # the upload is aborted, as a lifecycle rule does, and from then on there is none
    "delay",  # the answer comes `seconds` late
    "hang",  # half of the body, then silence
    "cut",  # half of the body, then the connection is closed
    "short",  # a 206 of half the range, which says so
    "whole",  # Range is ignored: 200 with the whole object
    "flip",  # one bit of the answer's body
    "flip_upload",  # one bit of the request's body
    "new_etag",  # as of an object that was overwritten: another ETag, other bytes
    "stale",  # what this request was answered first, whatever was written since
    "error_after",  # the server does as asked, the answer is 500
    "error_inside",  # the same, as a 200 with an error in its body
    "kill",  # the process that asks gets SIGKILL, the server sees nothing
    "kill_upload",  # the same in the middle of the request's body
    "kill_after",  # the same once the server has done as asked
    "strike",  # `FaultProxy.strike` is called first
]
SKEW = timedelta(hours=1)
"""How far the clock of a `skewed` service is ahead."""
MOST_SKEW = timedelta(minutes=15)
"""The most that the time of a signature may differ from the service's."""
COUNTS = "/-/counts"
"""GET it for the counts in JSON."""


@dataclass(frozen=True)
class Rule:
    """One fault and when it happens; the first rule that applies to a request is taken."""

    fault: Fault
    operation: str = "*"
    """Pattern of what is asked: get, get-range, head, put, put-part, create-upload, complete, abort, list, list-parts,
    list-uploads, delete, other."""
    path: str = "*"
    """Pattern of `/bucket/key`."""
    nth: int = 0
    """Only the nth request that matches, from 1; 0: any."""
    probability: float = 1.0
    """Decided by the seed and by what is asked for how often, not by the order in which threads happen to ask."""
    count: int | None = None
    """At most so often."""
    seconds: float = 1.0
    """Of `delay`, and of the silence of `hang`."""
    after: str = ""
    """Pattern of `operation /bucket/key`: only when such a request has come before."""


@dataclass(frozen=True)
class Dialect:
    """What a service of another make lacks or demands."""

    refuse: Callable[[str, str, Mapping[str, str]], tuple[int, str, str] | None] = lambda method, path, headers: None
    """Takes method, path with query, and headers by lower-case names; returns status, code and message of a refusal."""
    ignore: tuple[str, ...] = ()
    """Headers that it knows nothing of, in lower case."""
    rewrite: Callable[[str], str] = lambda path: path
    """Takes path with query; returns what the service makes of it."""


class Answer(NamedTuple):
    """What the server said."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def having(self, **headers: str) -> "Answer":
        """Return it with some headers in place of its own; `_` stands for `-`."""
        new = {name.replace("_", "-"): value for name, value in headers.items()}
        lower = {name.lower() for name in new}
        return self._replace(headers=[one for one in self.headers if one[0].lower() not in lower] + list(new.items()))


class FaultProxy:
    """The proxy, serving in a thread of its own until the block ends."""

    def __init__(
        self,
        upstream: str,
        script: Sequence[Rule] = (),
        *,
        seed: int = 0,
        port: int = 0,
        dialect: Dialect = Dialect(),
    ) -> None:
        """`upstream` is the server's URL; port 0: any free one."""
        self.upstream = upstream
        self.dialect = dialect
        self.seed = seed
        self.requests: Counter[str] = Counter()
        """Requests that came, by operation."""
        self.faults: Counter[str] = Counter()
        """Faults that were committed, by kind."""
        self.forgotten: set[str] = set()
        """Uploads that are no more."""
        self.killed: list[int] = []
        """Processes that were killed."""
        self.strike: Callable[[], object] = lambda: None
        """What a `strike` rule does beside the storage, such as to end a node."""
        self.first: dict[tuple[str, str], Answer] = {}
        """The first answer to each request that a `stale` rule may meet."""
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._asked: Counter[str] = Counter()
        self.script = script
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def script(self) -> tuple[Rule, ...]:
        """Return the rules; setting them starts their counts anew."""
        return self._script

    @script.setter
    def script(self, rules: Sequence[Rule]) -> None:
        with self._lock:
            self._script = tuple(rules)
            self._matched = [0] * len(rules)
            self._done = [0] * len(rules)
            self._armed = [not rule.after for rule in rules]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def decide(self, operation: str, path: str, asked: str) -> Rule | None:
        """Count a request and return the rule that applies to it."""
        with self._lock:
            self.requests[operation] += 1
            self._asked[asked] += 1
            armed = list(self._armed)
            for index, rule in enumerate(self._script):
                self._armed[index] = armed[index] or fnmatch(f"{operation} {path}", rule.after)
            for index, rule in enumerate(self._script):
                if not (armed[index] and fnmatch(operation, rule.operation) and fnmatch(path, rule.path)):
                    continue
                self._matched[index] += 1
                spent = rule.count is not None and self._done[index] >= rule.count
                if spent or (rule.nth and self._matched[index] != rule.nth):
                    continue
                told = f"{self.seed}\0{index}\0{asked}\0{self._asked[asked]}"
                if int.from_bytes(hashlib.sha256(told.encode()).digest()[:8]) < rule.probability * 2**64:
                    self._done[index] += 1
                    self.faults[rule.fault] += 1
                    return rule
        return None

    def times(self, asked: str) -> int:
        """Return how often something was asked for, by a pattern of `operation /bucket/key`."""
        with self._lock:
            return sum(count for each, count in self._asked.items() if fnmatch(each, f"{asked} *"))

    def missed(self, rule: Rule) -> None:
        """Take back a fault that could not be committed: the answer had no body to spoil."""
        with self._lock:
            self.faults[rule.fault] -= 1
            self._done[self._script.index(rule)] -= 1

    def counts(self) -> dict[str, dict[str, int]]:
        """Return what came and what was done to it, as JSON has it."""
        with self._lock:
            return {"requests": dict(self.requests), "faults": dict(self.faults)}

    def forget(self, path: str, upload: str) -> None:
        """Abort an upload on the server, with the credentials of the environment."""
        import boto3

        bucket, _, key = path.lstrip("/").partition("/")
        client = boto3.client("s3", endpoint_url=self.upstream, region_name="us-east-1")
        with contextlib.suppress(client.exceptions.NoSuchUpload):  # completed, and asked about once more
            client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
        self.forgotten.add(upload)

    def kill(self, port: int) -> None:
        """Kill the process of this machine whose connection comes from `port`."""
        ours = self._server.server_port
        for one in psutil.net_connections("tcp"):
            if one.pid and one.laddr.port == port and one.raddr and one.raddr.port == ours:
                self.killed.append(one.pid)  # first: who waits for its end looks here at once
                try:
                    os.kill(one.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has ended by itself
                    self.killed.remove(one.pid)
                return
        raise ProcessLookupError(f"nobody is connected from port {port}")

    def keeps(self, operation: str, path: str) -> bool:
        """Return whether a `stale` rule may ask for the first answer to this."""
        return any(
            rule.fault == "stale" and fnmatch(operation, rule.operation) and fnmatch(path, rule.path)
            for rule in self._script
        )


def operation_of(method: str, query: dict[str, list[str]], *, has_key: bool, has_range: bool) -> str:
    """Return the name of what a request asks for."""
    upload = "uploadId" in query
    match method:
        case "GET" if upload:
            return "list-parts"
        case "GET" if "uploads" in query:
            return "list-uploads"
        case "GET" if has_key:
            return "get-range" if has_range else "get"
        case "GET":
            return "list"
        case "HEAD" if has_key:
            return "head"
        case "PUT" if upload:
            return "put-part"
        case "PUT" if has_key:
            return "put"
        case "POST" if "uploads" in query:
            return "create-upload"
        case "POST" if upload:
            return "complete"
        case "DELETE" if upload:
            return "abort"
        case "DELETE" if has_key:
            return "delete"
    return "other"


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    """Return the class that handles the connections of one proxy."""
    to = urlsplit(proxy.upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except (ConnectionError, TimeoutError):
                self.close_connection = True  # the client has gone

        def serve(self) -> None:
            if self.path == COUNTS:
                return self.answer(_document(200, json.dumps(proxy.counts()).encode(), "application/json"))
            url = urlsplit(self.path)
            path, query = unquote(url.path), parse_qs(url.query, keep_blank_values=True)
            upload = query.get("uploadId", [""])[0]
            has_key = bool(path.strip("/").partition("/")[2])
            operation = operation_of(self.command, query, has_key=has_key, has_range="Range" in self.headers)
            asked = f"{operation} {path} {self.headers.get('Range', '')} {query.get('partNumber', '')}"
            refusal = proxy.dialect.refuse(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
            if refusal:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.decide(operation, path, asked)
                return self.answer(_error(*refusal))
            rule = proxy.decide(operation, path, asked)
            fault = rule.fault if rule else None
            length = int(self.headers.get("Content-Length", 0))
            if fault == "kill":
                return self.kill()
            if fault in ("drop_upload", "kill_upload"):
                self.rfile.read(length // 2)
                return self.hang_up() if fault == "drop_upload" else self.kill()
            body = self.rfile.read(length)
            if fault == "forget_upload" and upload not in proxy.forgotten:
                proxy.forget(path, upload)
            if upload in proxy.forgotten:
                return self.answer(_error(404, "NoSuchUpload"))
            if rule:
                return self.fail(rule, body, operation, path)
            found = self.forward(body)
            if proxy.keeps(operation, path):
                proxy.first.setdefault((path, self.headers.get("Range", "")), found)
            return self.answer(found)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

        def forward(self, body: bytes, *, drop: str = "") -> Answer:
            """Return the server's answer to the request, which lacks the header `drop`."""
            connection = http.client.HTTPConnection(to.hostname or "", to.port, timeout=120)
            try:
                path = proxy.dialect.rewrite(self.path)
                connection.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
                unknown = ("connection", "expect", "transfer-encoding", drop.lower(), *proxy.dialect.ignore)
                for name, value in self.headers.items():
                    if name.lower() not in unknown:
                        connection.putheader(name, value)
                connection.endheaders(body)
                with connection.getresponse() as response:
                    return Answer(response.status, response.getheaders(), response.read())
            finally:
                connection.close()

        def answer(self, found: Answer, *, sent: int | None = None) -> None:
            """Send an answer, or the first `sent` bytes of its body under the length of the whole."""
            self.send_response_only(found.status)
            length = str(len(found.body))
            for name, value in found.headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "keep-alive"):
                    self.send_header(name, value)
            if found.status not in (204, 304):
                self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(found.body[:sent] if self.command != "HEAD" else b"")

        def hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def kill(self) -> None:
            proxy.kill(self.client_address[1])
            self.hang_up()

        def fail(self, rule: Rule, body: bytes, operation: str, path: str) -> None:
            """Handle a request as a rule says."""
            match rule.fault:
                case "slow_down":
                    return self.answer(_error(503, "SlowDown"))
                case "internal_error":
                    return self.answer(_error(500, "InternalError"))
                case "expired_token":
                    return self.answer(_error(400, "ExpiredToken"))
                case "skewed":
                    return self.answer(self.skewed(rule) or self.forward(body))
                case "hang_up":
                    return self.hang_up()
                case "strike":
                    proxy.strike()
                    return self.answer(self.forward(body))
                case "delay":
                    proxy.stopped.wait(rule.seconds)
                case "flip_upload":
                    return self.answer(self.forward(_flipped(body)))
                case "whole":
                    return self.answer(self.forward(body, drop="Range"))
                case "stale" if (path, self.headers.get("Range", "")) in proxy.first:
                    return self.answer(proxy.first[path, self.headers.get("Range", "")])
            found = self.forward(body)
            match rule.fault:
                case "error_after":
                    return self.answer(_error(500, "InternalError"))
                case "error_inside":
                    return self.answer(_error(200, "InternalError"))
                case "kill_after":
                    return self.kill()
                case "delay":
                    return self.answer(found)
            if found.status >= 300 or not found.body:
                proxy.missed(rule)
                return self.answer(found)
            return self.spoil(rule, found, path)

        def skewed(self, rule: Rule) -> Answer | None:
            """Return the refusal of a request that is not signed by the service's time; None where it is."""
            now = datetime.now(UTC) + SKEW
            signed = datetime.strptime(self.headers["x-amz-date"], "%Y%m%dT%H%M%S%z")
            if abs(now - signed) < MOST_SKEW:
                proxy.missed(rule)
                return None
            return _error(403, "RequestTimeTooSkewed").having(Date=format_datetime(now, usegmt=True))

        def spoil(self, rule: Rule, found: Answer, path: str) -> None:
            """Send a good answer with a body otherwise than it is."""
            half = len(found.body) // 2
            match rule.fault:
                case "cut":
                    self.answer(found, sent=half)
                    self.hang_up()
                case "hang":
                    self.answer(found, sent=half)
                    proxy.stopped.wait(rule.seconds)
                    self.hang_up()
                case "short":
                    whole = f"bytes 0-{len(found.body) - 1}/{len(found.body)}"
                    spans = next((value for name, value in found.headers if name.lower() == "content-range"), whole)
                    first, _, rest = spans.removeprefix("bytes ").partition("-")
                    spans = f"bytes {first}-{int(first) + half - 1}/{rest.partition('/')[2]}"
                    self.answer(found.having(Content_Range=spans)._replace(status=206, body=found.body[:half]))
                case "flip":
                    self.answer(found._replace(body=_flipped(found.body)))
                case "new_etag":
                    etag = hashlib.md5(self.path.encode(), usedforsecurity=False).hexdigest()
                    self.answer(found.having(ETag=f'"{etag}"')._replace(body=_flipped(found.body)))
                case "stale":  # there is nothing older
                    proxy.missed(rule)
                    proxy.first[path, self.headers.get("Range", "")] = found
                    self.answer(found)

    return Handler


def _flipped(body: bytes) -> bytes:
    """Return the bytes with one bit near the middle turned: of a number there, the sign, which no rounding hides."""
    last = min(len(body) // 2 | 7, len(body) - 1)
    return body[:last] + bytes([body[last] ^ 0x80]) + body[last + 1 :] if body else body


def _error(status: int, code: str, message: str = "the proxy says so") -> Answer:
    told = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n{told}'
    return _document(status, text.encode(), "application/xml")


def _document(status: int, body: bytes, kind: str) -> Answer:
    return Answer(status, [("Content-Type", kind)], body)


def read_script(path: str) -> list[Rule]:
    """Return the rules of a JSON file: a list of objects with the fields of `Rule`."""
    return [Rule(**cast(dict[str, object], one)) for one in json.loads(Path(path).read_text())]  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted; then print the counts."""
    parser = argparse.ArgumentParser(description="A proxy before an S3 server that fails by a script.")
    parser.add_argument("--upstream", required=True, help="URL of the server")
    parser.add_argument("--script", help="JSON file: a list of rules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args(arguments)
    rules = read_script(given.script) if given.script else []
    with FaultProxy(given.upstream, rules, seed=given.seed, port=given.port) as proxy:
        print(f"{proxy.url} -> {given.upstream}; counts at {proxy.url}{COUNTS}", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print(json.dumps(proxy.counts()), file=sys.stdout)


if __name__ == "__main__":
    main()
