"""A pretended CUDA device, ``cuda:0``, for tests on machines that have none.

PyTorch's `FakeTensorMode` runs the real code on tensors that have a shape, a dtype and a device, and no values. So
tensors of different devices in one operation raise, and copies, kernel launches and waits of the host can be counted.
What cannot be seen: values, streams, dtypes that a kernel lacks, and how much memory is left.

Compute in inference mode, as the engines do: outside, some operations come apart before they can be counted.
Always ``cuda:0``, never plain ``cuda``, which fake tensors do not compare as equal. Weights are loaded before the mode
begins; what was computed in inference mode before goes through `FakeCuda.convert`.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda:0")
LaunchesOf = Callable[..., int]

# A build of PyTorch without CUDA has no guard for its devices, and refuses to make tensors there, fake ones included;
# a build with CUDA has one that asks the driver.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
static impl::NoOpDeviceGuardImpl<DeviceType::CUDA> guard;
static const impl::DeviceGuardImplInterface* before;
extern "C" void set(bool on) {
    auto& entry = impl::device_guard_impl_registry[(size_t)DeviceType::CUDA];
    if (on) before = entry.load();
    entry.store(on ? &guard : before);
}
"""
# Operations that only describe memory, beside those that are views by their schema.
_NO_LAUNCH = frozenset(
    {
        "aten::_unsafe_view",
        "aten::_reshape_alias",
        "aten::detach",
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::lift_fresh",
        "aten::_fused_sdp_choice",
        "prim::device",
    }
)
# Operations whose result the host must know before it can go on.
_WAITS = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::equal",
        "aten::is_nonzero",
        "aten::nonzero",
        "aten::masked_select",
        "aten::unique_dim",
        "aten::_unique2",
        "aten::unique_consecutive",
    }
)


_ATTENTION = "aten::scaled_dot_product_attention"


class HostSynchronisation(AssertionError):
    """The host waited for the device where it must not."""


@dataclass
class Counts:
    """What was asked of the device."""

    launches: Counter[str] = field(default_factory=Counter)  # by operation; a view or an empty tensor is none
    to_device: int = 0  # copies from the host
    from_device: int = 0  # copies to the host
    waits: list[str] = field(default_factory=list)  # each time that the host waited for the device, and why
    emptied: int = 0  # times that unused memory was given back to the driver
    captures: int = 0  # graphs recorded
    replays: int = 0  # graphs launched

    @property
    def total(self) -> int:
        """Launches of all operations. Those of a graph are counted as it is recorded, and not as it is replayed."""
        return self.launches.total()

    def matching(self, part: str) -> int:
        """Launches of the operations whose name contains `part`."""
        return sum(count for name, count in self.launches.items() if part in name)


class FakeCuda(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The counting mode above a `FakeTensorMode`; made by `fake_cuda`."""

    def __init__(self, launches_of: LaunchesOf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.counts = Counts()
        self._launches_of = launches_of
        self._forbidden = 0
        self._capturing = False

    def convert(self, tensor: Tensor) -> Tensor:
        """Fake copy of a real tensor: shape, dtype and device."""
        return self.fake.from_tensor(tensor)

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Count what the body asks of the device, in `Counts` of its own that are added to the outer ones."""
        outer, self.counts = self.counts, Counts()
        inner = self.counts
        try:
            yield inner
        finally:
            for name, value in vars(inner).items():
                setattr(outer, name, getattr(outer, name) + value)
            self.counts = outer

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Raise `HostSynchronisation` where the body makes the host wait for the device."""
        self._forbidden += 1
        try:
            yield
        finally:
            self._forbidden -= 1

    def wait(self, why: str) -> None:
        """Note that the host waits for the device."""
        self.counts.waits.append(why)
        if self._forbidden or self._capturing:
            raise HostSynchronisation(f"the host waits for the device: {why}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        if kwargs.get("pin_memory"):  # which only a driver can do
            kwargs["pin_memory"] = False
        if name == _ATTENTION and _is_cuda(args[0]):
            return self._attention(*args, **kwargs)
        if not name.startswith("prim"):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        masked = name.startswith("aten::index") and any(t.dtype == torch.bool for t in tensors[1:])
        if (masked or name in _WAITS) and any(map(_is_cuda, tensors)):
            self.wait(name)
        result = func(*args, **kwargs)
        self._count(func, name, args, kwargs, tensors, result)
        return result

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_rest: Any, **options: Any
    ) -> Tensor:
        """Count one kernel of the backend that CUDA would take of those that are enabled, and the copies of its mask.

        Without a device PyTorch takes none of them, but the products and the softmax one by one.
        """
        enabled: Any = torch.backends.cuda
        half = q.dtype != torch.float32
        shared = options.get("enable_gqa", False) and q.shape[1] != k.shape[1]  # memory-efficient cannot
        if half and enabled.cudnn_sdp_enabled():  # on Hopper and later
            backend = "cudnn"
        elif half and attn_mask is None and enabled.flash_sdp_enabled():
            backend = "flash"
        elif enabled.mem_efficient_sdp_enabled() and not shared:
            backend = "efficient"
        else:
            raise AssertionError("no fused attention is enabled that takes this: it would be computed step by step")
        self.counts.launches[f"attention::{backend}"] += 1
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            self.counts.launches["attention::mask"] += 3  # zeros, not, fill
        if attn_mask is not None and backend == "efficient" and attn_mask.shape[-1] % 8:
            self.counts.launches["attention::mask"] += 1  # padded
        rows, heads, positions, _ = q.shape
        return q.new_empty(rows, positions, heads, v.shape[-1]).transpose(1, 2)  # as they lie in memory

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], result: Any) -> None:
        results = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if name in ("aten::_to_copy", "aten::copy_"):
            source, target = (args[0], results[0]) if name == "aten::_to_copy" else (args[1], args[0])
            if _is_cuda(source) != _is_cuda(target):
                self._count_copy(source, kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,)))
                return
        if func.is_view or name in _NO_LAUNCH or not any(map(_is_cuda, [*tensors, *results])):
            return
        own = not name.startswith(("aten::", "prim"))
        self.counts.launches[name] += self._launches_of(name, *args, **kwargs) if own else 1

    def _count_copy(self, source: Tensor, non_blocking: bool) -> None:
        if _is_cuda(source):
            self.counts.from_device += 1
        else:
            self.counts.to_device += 1
        if not non_blocking:
            self.wait(f"a copy {'from' if _is_cuda(source) else 'to'} the device")

    # --- what stands in for torch.cuda

    def _empty_cache(self) -> None:
        self.counts.emptied += 1

    @contextmanager
    def capture(self, *_: Any, **__: Any) -> Iterator[None]:
        """Stand in for `torch.cuda.graph`: nothing in it may wait."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False
        self.counts.captures += 1

    def _graph(self) -> "_Graph":
        return _Graph(self)

    def _event(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            record=lambda *_: None,
            synchronize=lambda: self.wait("an event"),
            query=lambda: True,
            wait=lambda *_: None,
        )


class _Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._recording: AbstractContextManager[None] | None = None

    def capture_begin(self, *_: Any, **__: Any) -> None:
        self._recording = self._cuda.capture()
        self._recording.__enter__()

    def capture_end(self) -> None:
        assert self._recording is not None
        self._recording.__exit__(None, None, None)

    def replay(self) -> None:
        self._cuda.counts.replays += 1

    def reset(self) -> None:
        """Nothing to give back."""


def _is_cuda(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "cuda"


def _numpy(tensor: Tensor, **_: Any) -> np.ndarray:
    """Stand in for `FakeTensor.numpy`: zeros."""
    assert not _is_cuda(tensor), "numpy() of a tensor on the device"
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _unknown(name: str, *_: Any, **__: Any) -> int:
    raise AssertionError(f"{name}: say how many kernels it launches")


@contextmanager
def fake_cuda(launches_of: LaunchesOf = _unknown) -> Iterator[FakeCuda]:
    """Pretend that there is a device ``cuda:0`` in the body, in this thread.

    `launches_of` says how many kernels an operation that is not PyTorch's launches, by its name (``namespace::name``)
    and its arguments. Skips the test where there is neither a CUDA device nor a compiler for the stand-in of its guard.
    """
    cuda, patch = FakeCuda(launches_of), pytest.MonkeyPatch()
    graph_stream = SimpleNamespace(
        wait_stream=lambda *_: None, synchronize=lambda: cuda.wait("a stream"), cuda_stream=0, device=DEVICE
    )
    stand_ins: dict[str, Any] = {
        "set_device": lambda *_: None,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "device": lambda *_: nullcontext(),
        "synchronize": lambda *_: cuda.wait("torch.cuda.synchronize"),
        "empty_cache": cuda._empty_cache,
        "Event": cuda._event,
        "CUDAGraph": cuda._graph,
        "graph": cuda.capture,
        "graph_pool_handle": lambda: (0, 0),
        "Stream": lambda *_, **__: graph_stream,
        "current_stream": lambda *_: graph_stream,
        "stream": lambda *_: nullcontext(),
        "is_initialized": lambda: True,
        "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
    }
    with patch.context() as changed, _guard(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # which page-locking asks for
        for name, stand_in in stand_ins.items():
            changed.setattr(torch.cuda, name, stand_in)
        # Otherwise small tensors keep their values, and are really moved.
        changed.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", -1)
        changed.setattr(FakeTensor, "numpy", _numpy, raising=False)
        if not torch.cuda.is_available():  # a build with CUDA would ask the driver which convolution suits the card
            changed.setattr(torch._C, "_select_conv_backend", lambda *_, **__: torch._C._ConvBackend.Cudnn)  # type: ignore[attr-defined]
            changed.setattr(torch._C, "_conv_determine_backend_memory_format", lambda *_: torch.channels_last)
        with cuda.fake, cuda:
            yield cuda


@contextmanager
def _guard() -> Iterator[None]:
    if torch.cuda.is_available():  # then the real guard works
        yield
        return
    library = _guard_library()
    library.set(ctypes.c_bool(True))
    try:
        yield
    finally:
        library.set(ctypes.c_bool(False))


@functools.cache
def _guard_library() -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is neither a CUDA device nor g++, which builds the stand-in for its guard")
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", str(source), "-o", str(built)]
        subprocess.run([*command, f"-L{home}/lib", "-lc10"], check=True, capture_output=True)
        return ctypes.CDLL(str(built))  # its file may go: it is mapped
