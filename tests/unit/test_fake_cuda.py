"""The pretended CUDA device notices what it is for."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.unit.fake_cuda import DEVICE, FakeCuda, HostSynchronisation, fake_cuda


def test_tensors_of_two_devices_in_one_operation_raise() -> None:
    with fake_cuda(), pytest.raises(RuntimeError, match=r"two (different )?devices"):
        torch.zeros(3, device=DEVICE) + torch.zeros(3)


def test_copies_and_launches_are_counted_and_views_are_not() -> None:
    with fake_cuda() as cuda, torch.inference_mode():
        with cuda.counting() as counts:
            x = torch.from_numpy(np.ones((4, 6), np.float32)).to(DEVICE, non_blocking=True)
            y = x.view(2, 12).t()[1:].unsqueeze(0)
            assert (counts.to_device, counts.total) == (1, 0)
            host = torch.empty(1, 11, 2, pin_memory=True)
            host.copy_(y + 1, non_blocking=True)
            F.linear(x, x, x[:, 0])
        assert (counts.to_device, counts.from_device) == (1, 1)
        assert dict(counts.launches) == {"aten::add": 1, "aten::addmm": 1}
        assert counts.waits == []
    assert cuda.counts == counts, "they are added to the outer ones"


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: torch.empty(3).copy_(x),
        lambda x: torch.cuda.synchronize(x.device),
    ],
)
def test_whatever_makes_the_host_wait_is_noticed(wait: Callable[[torch.Tensor], object]) -> None:
    with fake_cuda() as cuda:
        x = torch.zeros(3, device=DEVICE)
        with pytest.raises(HostSynchronisation), cuda.no_waiting():
            wait(x)
        assert len(cuda.counts.waits) == 1


def test_a_graph_is_recorded_once_and_nothing_in_it_may_wait() -> None:
    with fake_cuda() as cuda:
        x = torch.zeros(3, device=DEVICE)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(1)
        graph.replay()
        graph.replay()
        assert (cuda.counts.captures, cuda.counts.replays, cuda.counts.launches["aten::add_"]) == (1, 2, 1)
        with pytest.raises(HostSynchronisation), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.cpu()


def attend(cuda: FakeCuda, dtype: torch.dtype) -> list[str]:
    """Kernels of an attention without a mask."""
    q = torch.empty(2, 4, 10, 64, dtype=dtype, device=DEVICE)
    with cuda.counting() as counts:
        assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
    return list(counts.launches)


def test_attention_is_one_kernel_of_the_backend_that_is_enabled() -> None:
    with fake_cuda() as cuda, torch.inference_mode():
        assert attend(cuda, torch.bfloat16) == ["attention::cudnn"]
        assert attend(cuda, torch.float32) == ["attention::efficient"]
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            assert attend(cuda, torch.bfloat16) == ["attention::flash"]
        with sdpa_kernel(SDPBackend.MATH), pytest.raises(AssertionError, match="step by step"):
            attend(cuda, torch.bfloat16)


def test_an_operation_of_ones_own_launches_what_it_declares() -> None:
    @torch.library.custom_op("test_fake_cuda::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @twice.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    with fake_cuda(lambda name, x: {"test_fake_cuda::twice": x.ndim + 2}[name]) as cuda:
        assert twice(torch.zeros(3, device=DEVICE)).shape == (3,)
        assert cuda.counts.launches["test_fake_cuda::twice"] == 3
    with fake_cuda(), pytest.raises(AssertionError, match="how many kernels"):
        twice(torch.zeros(3, device=DEVICE))
