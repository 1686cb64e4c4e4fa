"""A wire of a given rate and length before a server, for measuring where storage is the limit and cores are not.

    python -m benchmarks.throttle HOST:PORT MEGABYTES_A_SECOND [MILLISECONDS]

It prints its own address and forwards until it is killed. All connections share the rate, either way; what is asked
arrives so many milliseconds later.
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


async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter, wire: Wire, seconds: float) -> None:
    """Hand on what comes, each piece so many seconds after it came."""
    on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

    async def take() -> None:
        data = b"-"
        while data:
            data = await source.read(CHUNK)
            await on_its_way.put((time.monotonic() + seconds, data))

    async def give() -> None:
        due, data = await on_its_way.get()
        while data:
            await asyncio.sleep(due - time.monotonic())
            await wire.carry(len(data))
            target.write(data)
            await target.drain()
            due, data = await on_its_way.get()

    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(take())
            both.create_task(give())
    except* ConnectionError:
        pass  # one side has gone; the other is told
    finally:
        target.close()


async def serve(host: str, port: int, rate: float, seconds: float) -> None:
    there, back = Wire(rate), Wire(rate)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(host, port)
        await asyncio.gather(forward(reader, to_server, there, seconds), forward(from_server, writer, back, 0.0))

    server = await asyncio.start_server(connect, "127.0.0.1", limit=CHUNK)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    host, _, port = sys.argv[1].rpartition(":")
    rate, milliseconds = map(float, [*sys.argv[2:], "0"][:2])
    asyncio.run(serve(host, int(port), rate * 1e6, milliseconds / 1e3))
