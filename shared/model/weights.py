"""A model's weights as one block of memory: always on the host, and on the device for as long as a turn lasts.

Moving them is one allocation and one copy at the full speed of the bus, instead of hundreds. Of all that is shared this
alone imports torch; only the workers may import it.
"""

import logging
import sys
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.errors import DeviceBroken, DeviceFull, PhaseError
from shared.model.sizes import ALIGNMENT as ALIGNMENT

log = logging.getLogger(__name__)

_CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
TRITON_ERROR = "Triton Error [CUDA]"
"""What the text of an error begins with that Triton's launcher raises, a plain RuntimeError."""


@dataclass(frozen=True)
class _Place:
    """The place of a parameter or buffer in a block."""

    owner: nn.Module
    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int  # bytes
    nbytes: int

    @property
    def end(self) -> int:
        """Offset in bytes at which the next one begins."""
        return -(-(self.offset + self.nbytes) // ALIGNMENT) * ALIGNMENT

    def view(self, block: Tensor) -> Tensor:
        """The tensor in a block, which is uint8 ``[bytes]``."""
        return block[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)

    def point_to(self, block: Tensor) -> None:
        """Make the model use the tensor in this block."""
        view, parameter = self.view(block), self.name in self.owner._parameters
        setattr(self.owner, self.name, nn.Parameter(view, requires_grad=False) if parameter else view)


class Weights:
    """All parameters and buffers of a model, as views of one block.

    `model` is on the meta device, but for buffers that it computes itself; those named in `host_only` never leave host
    memory. Host memory always keeps the block, since weights do not change: moving to CUDA copies it, moving back
    drops the copy. On the CPU neither copies anything.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, host_only: Collection[str] = ()) -> None:
        self._device = device
        self._copies = device.type != "cpu"  # whether the device has memory of its own
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._moving: list[_Place] = []
        self._staying: list[_Place] = []
        end = 0
        for path in sorted(tensors, key=lambda path: path in host_only):  # what moves comes first
            owner, _, name = path.rpartition(".")
            tensor, places = tensors[path], self._staying if path in host_only else self._moving
            place = _Place(model.get_submodule(owner), name, tensor.shape, tensor.dtype, end, tensor.nbytes)
            places.append(place)
            end = place.end
        self._host: Tensor | None = None  # uint8 [bytes]
        self._on_device: Tensor | None = None  # uint8 [nbytes]; on the CPU the host's
        self._page_locked = False

    @property
    def nbytes(self) -> int:
        """Bytes that `to_device` moves; known before `load`."""
        return self._moving[-1].end

    @property
    def on_device(self) -> bool:
        """Whether the weights are on the device, so that the model can compute."""
        return self._on_device is not None

    @torch.no_grad()
    def load(self, fill: Callable[[], None]) -> None:
        """Allocate host memory, and let `fill` write every parameter into its place there. Call it once."""
        places = [*self._moving, *self._staying]
        block = torch.empty(places[-1].end, dtype=torch.uint8)  # pages are taken as they are written
        for place in places:
            computed = place.owner._buffers.get(place.name)
            if computed is not None:
                place.view(block).copy_(computed)
            place.point_to(block)
        fill()
        self._host = block

    @torch.no_grad()
    def to_device(self) -> None:
        """Copy the weights to the device. Raises `PhaseError` before `load`, `DeviceFull` with nothing changed."""
        if self._host is None:
            raise PhaseError("the weights are not loaded")
        if self.on_device:
            return
        moving = self._host[: self.nbytes]
        if not self._copies:
            self._on_device = moving
            return
        if self._device.type == "cuda":
            self._page_lock(moving)
        with device_memory():
            block = moving.to(self._device, non_blocking=True, copy=True)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        for place in self._moving:
            place.point_to(block)
        self._on_device = block

    @torch.no_grad()
    def to_host(self) -> None:
        """Drop the device's block and give its memory back to the driver. May be called at any time."""
        if self._host is not None and self._copies:
            for place in self._moving:
                place.point_to(self._host)
        self._on_device = None
        free_unused(self._device)

    def _page_lock(self, block: Tensor) -> None:
        """Page-lock the block, once.

        Not before the first turn, because it opens a context on the device, which takes memory there.
        """
        if self._page_locked:
            return
        self._page_locked = True
        if error := page_lock(block, self, self._device):
            log.warning(
                "%d MB of host memory were not page-locked (CUDA error %d; see ulimit -l): weights will move slowly",
                block.nbytes // 2**20,
                error,
            )


def page_lock(block: Tensor, owner: object, device: torch.device) -> int:
    """Page-lock a block of host memory where it is, for as long as its `owner` lives; returns CUDA's error code, or 0.

    A pinned allocation would be rounded up to a power of two.
    """
    with torch.cuda.device(device):
        cuda, address = torch.cuda.cudart(), block.data_ptr()  # type: ignore[no-untyped-call]
        error = int(cuda.cudaHostRegister(address, block.nbytes, 0))
        if error == 0:
            weakref.finalize(owner, cuda.cudaHostUnregister, address).atexit = False
            return 0
        try:
            torch.ones(1, device=device)  # CUDA reports the error once more, at the next kernel: this one
        except RuntimeError:
            pass
        return error


@contextmanager
def device_memory() -> Iterator[None]:
    """Map torch's errors: `DeviceFull` when the body does not fit the device, `DeviceBroken` when its driver gives up.

    Whatever is raised, frames that were left on the way lose their variables: an error is kept until it has been
    handled, with it all frames of its traceback, and in those would be the tensors of a song that is gone.
    """
    try:
        yield
    except Exception as error:
        _clear_frames(error)
        if memory_ran_out(error):
            raise DeviceFull(f"the device's memory is full: {error}") from None
        if isinstance(error, torch.AcceleratorError) or TRITON_ERROR in str(
            error
        ):  # from then on every call fails; it may be an earlier one's error
            raise DeviceBroken(f"the device is broken for this process: {error}") from error
        raise


def free_unused(device: torch.device) -> None:
    """Give device memory that this process keeps, though no tensor uses it, back to the driver.

    Raises `DeviceBroken`; not while one is handled already, as in a ``finally``: that device takes no more requests,
    and the first error is the one that says why.
    """
    if device.type == "cuda" and not isinstance(sys.exception(), DeviceBroken):
        with device_memory():
            torch.cuda.empty_cache()


def memory_ran_out(error: Exception) -> bool:
    """Whether an error of torch says that the device's memory does not suffice."""
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY
    # cuBLAS, cuDNN and Triton have errors of their own, which reach Python as text.
    said = ("STATUS_ALLOC_FAILED", f"{TRITON_ERROR}: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in said)


def _clear_frames(error: BaseException | None) -> None:
    """Clear the frames of an error and of the errors that it came from."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
