import threading

import torch

from ties_ray.kernels.buffers import Buffers


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
