"""A worker's device: which one it is, its name in the lease, and its figures.

torch names the device and says how large it is; NVML, found by the UUID that torch gives, measures it. Nothing here
imports torch: `shared.device.torch_devices` asks it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pynvml

from shared.device.ledger import DeviceLedger
from shared.errors import ConfigError
from shared.schema.worker import GpuFigures
from shared.settings import Settings, host_name


@dataclass(frozen=True)
class CudaDevice:
    """A CUDA device as torch counts and describes them."""

    uuid: str  # without a prefix
    name: str
    capacity: int  # bytes
    fast_bf16: bool  # Ampere or newer
    reserved: Callable[[], int] = lambda: 0  # bytes that this process's allocator holds on it


@dataclass(frozen=True)
class Hardware:
    """The devices that torch can compute on."""

    cuda: tuple[CudaDevice, ...] = ()  # in torch's order
    cpu_fast_bf16: bool = False  # AMX


@dataclass(frozen=True)
class Device:
    """The device of a worker."""

    kind: str  # "cuda" or "cpu"
    torch_name: str  # what torch calls it
    gpu_id: str  # what the lease calls it
    name: str  # for people
    capacity: int  # bytes
    fast_bf16: bool = False  # bfloat16 is as fast as any type that it has
    handle: object = None  # NVML's
    reserved: Callable[[], int] = lambda: 0  # bytes that this process's allocator holds on it


def choose_device(settings: Settings, hardware: Hardware, *, force_cpu: bool = False) -> Device:
    """The device that the settings ask for.

    `force_cpu` is hybrid mode's language model. Raises `ConfigError` when a GPU is asked for and there is none.
    """
    wanted = "cpu" if force_cpu else settings.device
    if wanted == "auto":
        wanted = "cuda" if hardware.cuda else "cpu"
    if wanted == "cpu":
        gpu_id = settings.gpu_id or f"cpu-{host_name()}"
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        capacity = settings.cpu_device_mb * 2**20 or total
        # In hybrid mode this device must have another name than the codec's GPU.
        return Device("cpu", "cpu", f"{gpu_id}-host" if force_cpu else gpu_id, "CPU", capacity, hardware.cpu_fast_bf16)
    index, count = int(wanted.partition(":")[2] or 0), len(hardware.cuda)
    if index >= count:
        found = f"{count} CUDA device{'s' if count > 1 else ''}" if count else "no CUDA device"
        raise ConfigError(f"HEARTMULA_DEVICE={settings.device}, but PyTorch finds {found}; try auto or cpu")
    cuda = hardware.cuda[index]
    handle = _nvml_handle(cuda.uuid, index)
    return Device(
        "cuda",
        f"cuda:{index}",
        settings.gpu_id or str(pynvml.nvmlDeviceGetUUID(handle)),
        cuda.name,
        cuda.capacity,
        cuda.fast_bf16,
        handle,
        cuda.reserved,
    )


def _nvml_handle(uuid: str, index: int) -> object:
    """NVML's handle of the device with torch's `uuid`.

    NVML orders devices by bus, torch the fastest first unless CUDA_DEVICE_ORDER says otherwise: a number would not do.
    A part of a divided card (MIG) may come with a UUID of its own or with the card's.
    """
    try:
        pynvml.nvmlInit()
        visible = [item.strip() for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
        if index < len(visible) and visible[index].startswith("MIG-"):
            return pynvml.nvmlDeviceGetHandleByUUID(visible[index])
        try:
            card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError:
            return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        return _only_part(card) or card
    except pynvml.NVMLError as error:
        raise ConfigError(f"the NVIDIA driver knows no device with UUID {uuid}: {error}") from None


def _only_part(card: object) -> object:
    """The part of a divided card that this process sees; None where the card is not divided.

    Raises `ConfigError` when it sees several: torch uses one of them and does not say which.
    """
    parts = []
    try:
        if not pynvml.nvmlDeviceGetMigMode(card)[0]:
            return None
        for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(card)):
            try:
                parts.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(card, number))
            except pynvml.NVMLError:  # an empty place
                continue
    except pynvml.NVMLError:  # the card cannot be divided
        return None
    if len(parts) > 1:
        raise ConfigError("the GPU is divided (MIG): name one of its parts by UUID in CUDA_VISIBLE_DEVICES")
    return parts[0] if parts else None


def figures(device: Device, ledger: DeviceLedger) -> GpuFigures:
    """Current memory, load and temperature. On the CPU the memory is that of the accounting device."""
    if device.kind == "cpu":
        used = sum(resident.nbytes for resident in ledger.residents())
        return GpuFigures(
            id=device.gpu_id, name=device.name, kind="cpu", memory_total=device.capacity, memory_used=used
        )
    memory = pynvml.nvmlDeviceGetMemoryInfo(device.handle)
    utilization = temperature = None
    try:  # some drivers and virtual GPUs have neither
        utilization = int(pynvml.nvmlDeviceGetUtilizationRates(device.handle).gpu)
        temperature = int(pynvml.nvmlDeviceGetTemperature(device.handle, pynvml.NVML_TEMPERATURE_GPU))
    except pynvml.NVMLError:
        pass
    return GpuFigures(
        id=device.gpu_id,
        name=device.name,
        kind="cuda",
        memory_total=int(memory.total),
        memory_used=int(memory.used),
        utilization=utilization,
        temperature=temperature,
    )
