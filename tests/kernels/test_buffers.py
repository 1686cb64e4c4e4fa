import re
import threading
from pathlib import Path

import torch

from ties_ray.kernels import BINS, Encoded, load
from ties_ray.kernels.buffers import Buffers, zeros


def test_memory_is_used_again_once_the_last_view_of_it_is_gone() -> None:
    buffers = Buffers()
    tensor = buffers.empty(1000, torch.float32)
    place, view = tensor.data_ptr(), tensor.view(torch.int32).numpy()
    del tensor
    other = buffers.empty(1000, torch.float32)
    assert other.data_ptr() != place
    del view
    assert buffers.empty(500, torch.bfloat16).data_ptr() == place


def test_buffers_grow_to_the_largest_size_asked_for() -> None:
    buffers = Buffers()
    small = buffers.empty(10, torch.uint8).data_ptr()
    large = buffers.empty(2**22, torch.float64)
    large[-1] = 1.0
    place = large.data_ptr()
    assert place != small
    del large
    assert buffers.empty(10, torch.uint8).data_ptr() == place


def test_pieces_share_a_buffer_which_comes_back_when_the_last_is_gone() -> None:
    buffers = Buffers()
    pieces = [buffers.piece(400, 1000).fill_(number) for number in range(3)]
    places = [piece.data_ptr() for piece in pieces]
    assert places[1] == places[0] + 400, "two have room..."
    assert not 0 <= places[2] - places[0] < 1000, "...and the third has not"
    assert [int(piece.max()) for piece in pieces] == [int(piece.min()) for piece in pieces] == [0, 1, 2]
    del pieces[0], pieces[1]  # the first and the third
    assert buffers.empty(1000, torch.uint8).data_ptr() == places[2]
    held = buffers.empty(1000, torch.uint8)
    assert held.data_ptr() != places[0], "one of its pieces lives"
    pieces.clear()
    lent = [buffers.empty(1000, torch.uint8) for _ in range(2)]
    assert places[0] in {tensor.data_ptr() for tensor in lent}
    assert len(buffers.piece(3000, 1000)) == 3000


def test_what_was_lent_for_larger_blocks_is_given_back() -> None:
    buffers, size = Buffers(), 64 * 2**20
    before = anonymous()
    kept, free = (buffers.empty(size, torch.uint8).fill_(1) for _ in range(2))
    del free
    assert anonymous() - before > 1.9 * size
    buffers.forget()
    assert anonymous() - before < 1.1 * size, "what nobody holds goes at once"
    assert int(kept.min()) == 1
    del kept
    assert anonymous() - before < 0.1 * size, "and the rest as it comes back"
    assert len(buffers.empty(1000, torch.uint8)) == 1000
    assert anonymous() - before < 0.1 * size


def test_a_small_buffer_takes_the_memory_that_is_used() -> None:
    buffers, size, number = Buffers(), 256 * 2**10, 64
    before = anonymous()
    lent = [buffers.empty(size, torch.uint8).fill_(1) for _ in range(number)]
    assert anonymous() - before < 1.2 * sum(map(len, lent))


def test_threads_never_share_a_buffer() -> None:
    buffers, wrong = Buffers(), []

    def work(number: int) -> None:
        for _ in range(300):
            tensor = buffers.empty(64, torch.int32).fill_(number)
            if int(tensor.sum()) != 64 * number:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def anonymous() -> int:
    resident = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert resident
    return int(resident[1]) * 1024


def test_tables_of_counts_take_memory_only_where_something_was_counted() -> None:
    """The 64 tables are as many as a worker has for 32 models. bf16 deltas fill few of their bins."""
    kernels, base = load("cpu"), torch.randn(2**16, generator=torch.Generator().manual_seed(0)) * 0.02
    source = Encoded((base * 1.01).bfloat16())
    base = base.bfloat16().float()
    kernels.count_high(source, base, zeros(BINS))  # what a first call takes is not the tables'
    before = anonymous()
    tables = [zeros(BINS) for _ in range(64)]
    for table in tables:
        assert kernels.count_high(source, base, table) == 0
    assert all(int(table.sum()) == len(base) for table in tables)
    assert 0 < anonymous() - before < sum(table.nbytes for table in tables) // 3
