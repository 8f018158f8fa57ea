"""What torch knows of this machine's devices. Imports torch, so only the workers may import it."""

import functools

import torch

from shared.device.info import CudaDevice, Hardware


def hardware() -> Hardware:
    """The devices that torch can compute on, in its order."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Hardware(tuple(_device(index) for index in range(count)), torch.cpu._is_amx_tile_supported())


def _device(index: int) -> CudaDevice:
    found = torch.cuda.get_device_properties(index)
    return CudaDevice(
        uuid=str(found.uuid),
        name=found.name,
        capacity=found.total_memory,
        fast_bf16=found.major >= 8,  # of this device; `torch.cuda.is_bf16_supported` asks the current one
        reserved=functools.partial(torch.cuda.memory_reserved, index),
    )
