"""A wire of a given rate before a server, for measuring what happens where storage is the limit and cores are not.

    python -m benchmarks.throttle HOST:PORT MEGABYTES_A_SECOND

It prints its own address and forwards until it is killed. All connections share the rate, either way.
"""

import asyncio
import sys
import time

CHUNK = 2**18


class Wire:
    """When the next bytes may pass."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = 0.0

    async def carry(self, nbytes: int) -> None:
        self._free = max(self._free, time.monotonic()) + nbytes / self._rate
        await asyncio.sleep(self._free - time.monotonic())


async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter, wire: Wire) -> None:
    try:
        while data := await source.read(CHUNK):
            await wire.carry(len(data))
            target.write(data)
            await target.drain()
    except ConnectionError:
        pass  # one side has gone; the other is told
    finally:
        target.close()


async def serve(host: str, port: int, rate: float) -> None:
    there, back = Wire(rate), Wire(rate)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(host, port)
        await asyncio.gather(forward(reader, to_server, there), forward(from_server, writer, back))

    server = await asyncio.start_server(connect, "127.0.0.1", limit=CHUNK)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    host, _, port = sys.argv[1].rpartition(":")
    asyncio.run(serve(host, int(port), float(sys.argv[2]) * 1e6))
