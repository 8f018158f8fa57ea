"""A worker's device: which one it is, its name in the lease, and its figures. No torch: NVML is enough."""

import os
from dataclasses import dataclass

import pynvml

from shared.device.ledger import DeviceLedger
from shared.errors import ConfigError
from shared.schema.worker import GpuFigures
from shared.settings import Settings, host_name


@dataclass(frozen=True)
class Device:
    """The device of a worker."""

    kind: str  # "cuda" or "cpu"
    torch_name: str  # what torch calls it
    gpu_id: str  # what the lease calls it
    name: str  # for people
    capacity: int  # bytes
    handle: object = None  # NVML's


def choose_device(settings: Settings, *, cuda_available: bool, force_cpu: bool = False) -> Device:
    """The device that the settings ask for.

    `force_cpu` is hybrid mode's language model. Raises `ConfigError` when a GPU is asked for and there is none.
    """
    wanted = "cpu" if force_cpu else settings.device
    if wanted == "auto":
        wanted = "cuda" if cuda_available else "cpu"
    if wanted == "cpu":
        gpu_id = settings.gpu_id or f"cpu-{host_name()}"
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        capacity = settings.cpu_device_mb * 2**20 or total
        # In hybrid mode this device must have another name than the codec's GPU.
        return Device("cpu", "cpu", f"{gpu_id}-host" if force_cpu else gpu_id, "CPU", capacity)
    if not cuda_available:
        raise ConfigError(f"HEARTMULA_DEVICE={settings.device}, but PyTorch finds no CUDA device; try auto or cpu")
    index = int(wanted.partition(":")[2] or 0)
    handle = _nvml_handle(index)
    uuid = str(pynvml.nvmlDeviceGetUUID(handle))
    return Device(
        "cuda",
        f"cuda:{index}",
        settings.gpu_id or uuid,
        str(pynvml.nvmlDeviceGetName(handle)),
        int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        handle,
    )


def _nvml_handle(index: int) -> object:
    """NVML's handle for torch's device `index`, which counts within CUDA_VISIBLE_DEVICES."""
    try:
        pynvml.nvmlInit()
        visible = [item.strip() for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item.strip()]
        if not visible:
            return pynvml.nvmlDeviceGetHandleByIndex(index)
        item = visible[index]
        if item.isdigit():
            return pynvml.nvmlDeviceGetHandleByIndex(int(item))
        return pynvml.nvmlDeviceGetHandleByUUID(item)
    except (pynvml.NVMLError, IndexError) as error:
        raise ConfigError(f"the NVIDIA driver knows no device {index}: {error}") from None


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
