"""A server that misbehaves as a test says, where servers of S3 don't."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ties_ray.stores import Pin, Stores
from ties_ray.stores.s3 import S3

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]
DATA = bytes(range(256)) * 64


@dataclass
class Misbehaving:
    """Serves DATA at any path under one ETag; the first answers can be replaced."""

    uri: str = ""
    storage: dict[str, dict[str, object]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    """What to do with the next requests; good behaviour follows."""
    requests: list[tuple[str, Message]] = field(default_factory=list)
    """Path and headers of what came."""
    connections: set[int] = field(default_factory=set)
    """Ports that it came from."""

    @property
    def pin(self) -> Pin:
        return Pin(f"{self.uri}/x", len(DATA), "mark")

    def store(self, **options: object) -> S3:
        store = Stores({"s3": {**self.storage["s3"], **options}}).of(self.uri)
        assert isinstance(store, S3)
        return store

    def read(self, start: int, stop: int, store: S3 | None = None) -> bytes:
        buffer = bytearray(stop - start)
        (store or self.store()).read(self.pin, start, memoryview(buffer))
        return bytes(buffer)


@contextmanager
def misbehaving() -> Iterator[Misbehaving]:
    """Run the server; credentials are in the environment."""
    state = Misbehaving("s3://bucket")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.requests.append((self.path, self.headers))
            state.connections.add(self.client_address[1])
            (state.answers.pop(0) if state.answers else good)(self, DATA)

        do_PUT = do_CONNECT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        state.storage = {"s3": {"endpoint_url": f"http://127.0.0.1:{server.server_port}"}}
        yield state
        server.shutdown()
        thread.join()


def good(request: BaseHTTPRequestHandler, data: bytes) -> None:
    start, stop = asked(request)
    ranged(request, data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}")


def asked(request: BaseHTTPRequestHandler) -> tuple[int, int]:
    first, last = request.headers["Range"].removeprefix("bytes=").split("-")
    return int(first), int(last) + 1


def ranged(
    request: BaseHTTPRequestHandler, body: bytes, content_range: str, etag: str = "mark", announced: int = -1
) -> None:
    answer(request, 206, body, announced, ETag=f'"{etag}"', **{"Content-Range": content_range})


def answer(request: BaseHTTPRequestHandler, status: int, body: bytes, announced: int = -1, **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body) if announced < 0 else announced))
    request.end_headers()
    request.wfile.write(body)
    request.close_connection = announced >= 0
