"""What S3 clients cost: ranges of large objects read, and parts of an upload written, by several threads.

    python -m benchmarks.clients [--server juicefs] [--threads 4] [--threads 16] [--read 8192] [--write 32]

The server is real and runs on loopback, in a process of its own. Each row is a process of its own too: CPU seconds are
its user and system time between the first request and the last, memory is how far its peak grew beyond the callers'
buffers. `floor` is http.client with URLs signed before the clock starts, which receives into the caller's buffer and
sends from it, unchecked and unhashed: no Python client can do with less. `store` is ours, with every check it makes. A
client that is not installed (obstore, s3fs) is left out. Seconds of the clock say little where server and client
share two cores.
"""

import asyncio
import hashlib
import importlib.util
import json
import os
import random
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from threading import local
from typing import Any
from urllib.parse import urlsplit

import click

from benchmarks import measure

MIB = 2**20
OBJECTS = 4
BUCKET = "clients"
CHILD = "import sys; from benchmarks.clients import child; child(*sys.argv[1:])"
NEEDS = {"obstore": "obstore", "s3fs": "s3fs"}

Read = Callable[[str, str, int, memoryview], None]
"""Fill memory with what an object (key, ETag) holds from an offset on."""
Write = Callable[[str, str, int, memoryview], str]
"""Send a part (key, upload, number, bytes), and return its ETag."""


def client_of(endpoint: str) -> Any:
    """Return botocore's client, as one gets it from boto3, without its retries."""
    import boto3  # type: ignore[import-untyped]
    from botocore.config import Config

    config = Config(
        max_pool_connections=64,
        retries={"total_max_attempts": 1},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.client("s3", endpoint_url=endpoint, config=config)


def store(endpoint: str) -> tuple[Read, Write]:
    """Return what ties_ray reads and writes by."""
    from ties_ray.stores import Pin, Stores

    ours = Stores({"s3": {"endpoint_url": endpoint}}).writer("s3://")
    ours.put(f"s3://{BUCKET}/known", b"as a plan is: so a worker knows how the server makes ETags")
    sizes = {str(key): ours.head(f"s3://{BUCKET}/{key}", 1)[0].size for key in range(OBJECTS)}

    def read(key: str, etag: str, start: int, into: memoryview) -> None:
        ours.read(Pin(f"s3://{BUCKET}/{key}", sizes[key], etag), start, into)

    def write(key: str, upload: str, number: int, data: memoryview) -> str:
        return ours.write_part(f"s3://{BUCKET}/{key}", upload, number, 0, data).etag

    return read, write


def botocore_(endpoint: str) -> tuple[Read, Write]:
    """Return the plain way with botocore: If-Match, `readinto` of its body, Content-MD5."""
    client = client_of(endpoint)

    def read(key: str, etag: str, start: int, into: memoryview) -> None:
        span = f"bytes={start}-{start + len(into) - 1}"
        body = client.get_object(Bucket=BUCKET, Key=key, Range=span, IfMatch=f'"{etag}"')["Body"]
        filled = 0
        while filled < len(into):
            filled += body.readinto(into[filled:])

    def write(key: str, upload: str, number: int, data: memoryview) -> str:
        md5 = b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        sent = client.upload_part(
            Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=number, Body=bytes(data), ContentMD5=md5
        )
        return str(sent["ETag"])

    return read, write


def obstore(endpoint: str) -> tuple[Read, None]:
    """Return obstore's way: If-Match and a copy into the caller's memory; it has no parts."""
    from obstore import get
    from obstore.store import S3Store

    files = S3Store(BUCKET, endpoint=endpoint, region="us-east-1", client_options={"allow_http": True})

    def read(key: str, etag: str, start: int, into: memoryview) -> None:
        options = {"if_match": f'"{etag}"', "range": (start, start + len(into))}
        into[:] = memoryview(get(files, key, options=options).bytes())

    return read, None


def s3fs_(endpoint: str) -> tuple[Read, Write]:
    """Return the way of s3fs: aiobotocore in one thread with an event loop, for which the others wait."""
    import s3fs

    config = {"max_pool_connections": 64, "retries": {"total_max_attempts": 1}}
    config |= dict.fromkeys(("request_checksum_calculation", "response_checksum_validation"), "when_required")
    files = s3fs.S3FileSystem(endpoint_url=endpoint, config_kwargs=config, skip_instance_cache=True)
    files.connect()

    async def get(key: str, etag: str, start: int, into: memoryview) -> None:
        client, span = await files.set_session(), f"bytes={start}-{start + len(into) - 1}"
        answer = await client.get_object(Bucket=BUCKET, Key=key, Range=span, IfMatch=f'"{etag}"')
        filled = 0
        async with answer["Body"] as body:
            while chunk := await body.read(MIB):
                into[filled : filled + len(chunk)] = chunk
                filled += len(chunk)

    async def put(key: str, upload: str, number: int, data: memoryview) -> str:
        md5 = b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        client = await files.set_session()
        sent = await client.upload_part(
            Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=number, Body=bytes(data), ContentMD5=md5
        )
        return str(sent["ETag"])

    def read(*given: Any) -> None:
        asyncio.run_coroutine_threadsafe(get(*given), files.loop).result()

    def write(*given: Any) -> str:
        return str(asyncio.run_coroutine_threadsafe(put(*given), files.loop).result())

    return read, write


def floor(endpoint: str) -> tuple[Read, Write]:
    """Return the least that Python can do; its URLs are signed by `signed`, before the clock starts."""
    connections, server = local(), urlsplit(endpoint)

    def ask(method: str, url: str, body: memoryview | None, headers: dict[str, str]) -> Any:
        if not hasattr(connections, "own"):
            connections.own = HTTPConnection(server.hostname or "", server.port)
        connections.own.request(method, url, body, headers)
        return connections.own.getresponse()

    def read(url: str, etag: str, start: int, into: memoryview) -> None:
        span = f"bytes={start}-{start + len(into) - 1}"
        answer = ask("GET", url, None, {"Range": span, "If-Match": f'"{etag}"'})
        assert answer.readinto(into) == len(into)

    def write(url: str, upload: str, number: int, data: memoryview) -> str:
        answer = ask("PUT", url, data, {})
        answer.read()
        assert answer.status == 200
        return str(answer.headers["ETag"])

    return read, write


CLIENTS: dict[str, Callable[[str], tuple[Read, Write | None]]] = {
    "floor": floor,
    "store": store,
    "botocore": botocore_,
    "obstore": obstore,
    "s3fs": s3fs_,
}
OTHERS = tuple(CLIENTS)[1:]


def signed(client: Any, operation: str, **arguments: Any) -> str:
    """Return path and query of a URL that is its own permission."""
    url: str = client.generate_presigned_url(operation, Params={"Bucket": BUCKET, **arguments}, ExpiresIn=3600)
    return url.removeprefix(client.meta.endpoint_url)


def peak() -> int:
    """Return the most memory that this process has had, in bytes; `ru_maxrss` would know the parent's, too."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def child(name: str, what: str, endpoint: str, num_threads: str, size: str, count: str) -> None:
    """Read or write in this process, and print what it took as JSON."""
    client, length, threads = client_of(endpoint), int(size), int(num_threads)
    read, write = CLIENTS[name](endpoint)
    buffers = [bytearray(length) for _ in range(threads)]
    for buffer in buffers:
        buffer[::4096] = os.urandom(len(buffer[::4096]))
    found = {str(key): client.head_object(Bucket=BUCKET, Key=str(key)) for key in range(OBJECTS)}
    etags = {key: answer["ETag"].strip('"') for key, answer in found.items()}
    urls = {key: signed(client, "get_object", Key=key) if name == "floor" else key for key in etags}
    read(urls["0"], etags["0"], 0, memoryview(buffers[0])[:1])  # all that is imported late is there now
    draw, ways = random.Random(7), []
    if what == "read":
        for _ in range(int(count)):
            key = str(draw.randrange(OBJECTS))
            ways.append((urls[key], etags[key], draw.randrange(found[key]["ContentLength"] - length)))
    else:
        assert write is not None
        key = f"to-{name}-{secrets.token_hex(3)}"
        upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
        for number in range(1, int(count) + 1):
            part = {"Key": key, "UploadId": upload, "PartNumber": number}
            ways.append((signed(client, "upload_part", **part) if name == "floor" else key, upload, number))

    def work(number: int) -> None:
        view = memoryview(buffers[number])
        for way in ways[number::threads]:
            (read if what == "read" else write)(*way, view)  # type: ignore[misc]

    with ThreadPoolExecutor(threads) as pool:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = peak()
        started, cpu = time.monotonic(), time.process_time()
        list(pool.map(work, range(threads)))
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        grown = peak() - before
    if what == "write":
        client.abort_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload)
    json.dump({"seconds": seconds, "cpu": cpu, "grown": grown}, sys.stdout)


@contextmanager
def juicefs(folder: Path) -> Iterator[str]:
    """Run JuiceFS' gateway, which checks signatures; yield its endpoint."""
    program, database = str(Path(sys.executable).with_name("juicefs")), f"sqlite3://{folder}/meta.db"
    command = [program, "format", "--storage", "file", "--bucket", f"{folder}/data/", database, "clients"]
    subprocess.run(command, check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"AWS_ACCESS_KEY_ID": "ties-ray", "AWS_SECRET_ACCESS_KEY": "measured", "AWS_REGION": "us-east-1"}
    server = {"MINIO_ROOT_USER": "ties-ray", "MINIO_ROOT_PASSWORD": "measured"}
    command = [program, "gateway", "--multi-buckets", "--keep-etag", "--no-usage-report", "--no-banner", "--cache-dir"]
    command += [str(folder / "cache"), "--log", str(folder / "log"), database, f"127.0.0.1:{port}"]
    with subprocess.Popen(
        command, env=os.environ | server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            while process.poll() is None:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def row(name: str, what: str, endpoint: str, threads: int, size: int, count: int) -> dict[str, float]:
    """Measure one client in a process of its own."""
    command = [sys.executable, "-c", CHILD, name, what, endpoint, *map(str, (threads, size, count))]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


@click.command()
@click.option("--client", "names", multiple=True, default=OTHERS, type=click.Choice(OTHERS), help="beside the floor")
@click.option("--server", default="juicefs", show_default=True, type=click.Choice(["juicefs", "moto"]))
@click.option("--threads", "all_threads", multiple=True, default=(4, 16), show_default=True)
@click.option("--read", "reads", multiple=True, default=(8192,), show_default=True, help="KiB of a range")
@click.option("--write", "writes", multiple=True, default=(32,), show_default=True, help="MiB of a part")
@click.option("--total", default=1024, show_default=True, help="MiB a row, at most 1000 requests")
@click.option("--object", "size_of_object", default=128, show_default=True, help="MiB of each of four objects")
def main(
    names: tuple[str, ...],
    server: str,
    all_threads: tuple[int, ...],
    reads: tuple[int, ...],
    writes: tuple[int, ...],
    total: int,
    size_of_object: int,
) -> None:
    """Print a table of what clients cost."""
    names = ("floor", *(name for name in names if importlib.util.find_spec(NEEDS.get(name, "botocore"))))
    with tempfile.TemporaryDirectory(prefix="ties-ray-") as temporary:
        serve = juicefs(Path(temporary)) if server == "juicefs" else measure.s3_server(Path(temporary) / "log")
        with serve as endpoint:
            client = client_of(endpoint)
            client.create_bucket(Bucket=BUCKET)
            for key in range(OBJECTS):
                client.put_object(Bucket=BUCKET, Key=str(key), Body=os.urandom(size_of_object * MIB))
            heads = ("what", "threads", "client", "CPU s/GB", "of the floor", "CPU ms a request", "MB/s", "memory MB")
            measure.table(heads)
            kinds = [("read", kib * 1024) for kib in reads] + [("write", mib * MIB) for mib in writes]
            for (what, size), threads in ((kind, threads) for kind in kinds for threads in all_threads):
                count, least = min(max(total * MIB // size, threads), 1000), 0.0
                for name in names:
                    if name == "obstore" and what == "write":
                        continue
                    found = row(name, what, endpoint, threads, size, count)
                    each, gigabytes = found["cpu"] / count, count * size / 1e9
                    least = least or each
                    said = f"{what} {size // 1024:,} KiB"
                    speed, grown = gigabytes * 1000 / found["seconds"], found["grown"] / 1e6
                    cells = (said, threads, name, found["cpu"] / gigabytes, each / least, each * 1000, speed, grown)
                    measure.row(cells)


if __name__ == "__main__":
    main()
