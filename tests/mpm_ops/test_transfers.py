"""Copies between host and device; on a CPU they are none."""

import threading

import pytest
import torch

from mpm_ops.transfers import fetch, stack, upload, use_own_stream

CPU = torch.device("cpu")


def test_on_a_cpu_nothing_is_copied() -> None:
    x = torch.randn(2, 3)
    use_own_stream(CPU)
    assert upload(x, CPU) is x
    assert torch.equal(stack([x, x]), torch.stack([x, x]))
    assert fetch(x)() is x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_uploads_beside_computing_arrive_whole() -> None:
    device = torch.device("cuda")
    pictures = [torch.full((3, 512, 512), float(i)) for i in range(64)]
    arrived: list[torch.Tensor] = []

    def send() -> None:
        use_own_stream(device)
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        for picture in pictures:
            arrived.append(upload(picture, device))

    busy = torch.full((8192, 8192), 1e-4, device=device)
    for _ in range(4):
        busy = busy @ busy
    thread = threading.Thread(target=send)
    thread.start()
    thread.join()
    joined = stack(arrived)
    arrived.clear()
    again = [upload(torch.full((3, 512, 512), -1.0), device) for _ in range(64)]
    assert joined.amax(dim=(1, 2, 3)).tolist() == joined.amin(dim=(1, 2, 3)).tolist() == list(range(64))
    assert len(again) == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_fetched_is_waited_for_and_what_follows_is_not() -> None:
    busy = torch.full((8192, 8192), 1e-4, device="cuda")
    for _ in range(4):
        busy = busy @ busy
    number = (busy * 0).nan_to_num().sum() + 7
    wait = fetch(number[None])
    behind = torch.cuda.Event()
    for _ in range(20):
        busy = busy @ busy
    behind.record()
    assert wait().tolist() == [7]
    assert not behind.query(), "it waited for work that was launched later"
