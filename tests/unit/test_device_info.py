"""A worker's device: one identity from torch's UUID, however NVML orders the cards."""

from types import SimpleNamespace

import pytest

from shared.device import info
from shared.device.info import CudaDevice, Device, Hardware, choose_device, figures
from shared.device.ledger import DeviceLedger
from shared.errors import ConfigError
from shared.settings import Settings

GIB = 2**30
# torch counts the fastest first, NVML by bus.
SLOW = CudaDevice("aaaa-1", "T4", 15 * GIB, fast_bf16=False)
FAST = CudaDevice("bbbb-2", "H100", 80 * GIB, fast_bf16=True, reserved=lambda: 7)
UNKNOWN = CudaDevice("eeee-5", "?", GIB, fast_bf16=True)
BOTH = Hardware(cuda=(FAST, SLOW))


class FakeNvmlError(Exception):
    """NVML's error."""


class FakeNvml:
    """NVML on a machine with two cards, of which some may be divided: a handle is a card's or a part's UUID."""

    NVMLError = FakeNvmlError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.memory = {"GPU-aaaa-1": (15 * GIB, GIB), "GPU-bbbb-2": (80 * GIB, 2 * GIB)}  # in NVML's order
        self.parts: dict[str, list[str | None]] = {}  # of divided cards, with empty places

    def nvmlInit(self) -> None:  # noqa: N802
        """Do nothing."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return list(self.memory)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.memory:
            raise FakeNvmlError("Not Found")
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        return handle

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:  # noqa: N802
        if handle == "GPU-aaaa-1":
            raise FakeNvmlError("Not Supported")
        return [int(handle in self.parts)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:  # noqa: N802
        return len(self.parts[handle])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:  # noqa: N802
        part = self.parts[handle][index]
        if part is None:
            raise FakeNvmlError("Not Found")
        return part

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        total, used = self.memory[handle]
        return SimpleNamespace(total=total, used=used)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=len(handle))

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:  # noqa: N802
        return 40


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setattr(info, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def chosen(device: str, hardware: Hardware = BOTH, **more: str) -> Device:
    return choose_device(Settings(device=device, **more), hardware)  # type: ignore[arg-type]


@pytest.mark.parametrize("visible", ["", "1,0", "GPU-bbbb-2,GPU-aaaa-1", "GPU-bbbb"])
def test_a_card_is_one_and_the_same_for_torch_nvml_and_the_lease(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str, tmp_path: object
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name, cuda in (("cuda", FAST), ("auto", FAST), ("cuda:0", FAST), ("cuda:1", SLOW)):
        device = chosen(name)
        assert device.gpu_id == f"GPU-{cuda.uuid}"
        assert (device.name, device.capacity, device.fast_bf16) == (cuda.name, cuda.capacity, cuda.fast_bf16)
        assert nvml.nvmlDeviceGetMemoryInfo(str(device.handle)).total == cuda.capacity
        assert device.reserved is cuda.reserved
    assert chosen("cuda:1").torch_name == "cuda:1"
    assert chosen("cuda", gpu_id="mine").gpu_id == "mine"


def test_figures_are_those_of_the_card(nvml: FakeNvml, tmp_path: object) -> None:
    found = figures(chosen("cuda:1"), DeviceLedger(tmp_path, "codec.me", 1))  # type: ignore[arg-type]
    assert (found.id, found.name, found.memory_total, found.memory_used) == ("GPU-aaaa-1", "T4", 15 * GIB, GIB)


@pytest.mark.parametrize("visible", ["", "MIG-cccc-3", "GPU-bbbb-2"])
@pytest.mark.parametrize("uuid", ["cccc-3", "bbbb-2"])
def test_a_part_of_a_divided_card_is_known_by_its_own_uuid(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str, uuid: str
) -> None:
    """torch may report the UUID of the part, or that of the card."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml.memory["MIG-cccc-3"] = (20 * GIB, 0)
    nvml.parts = {"GPU-bbbb-2": [None, "MIG-cccc-3", None]}
    device = chosen("cuda", Hardware(cuda=(CudaDevice(uuid, "H100 MIG 2g.20gb", 20 * GIB, fast_bf16=True),)))
    assert (device.gpu_id, device.handle, device.capacity) == ("MIG-cccc-3", "MIG-cccc-3", 20 * GIB)


def test_of_several_visible_parts_one_has_to_be_named(nvml: FakeNvml) -> None:
    nvml.parts = {"GPU-bbbb-2": ["MIG-cccc-3", "MIG-dddd-4"]}
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        chosen("cuda")


@pytest.mark.parametrize(
    ("device", "hardware", "said"),
    [
        ("cuda", Hardware(), "finds no CUDA device"),
        ("cuda:2", BOTH, "finds 2 CUDA devices"),
        ("cuda:1", Hardware(cuda=(FAST,)), "finds 1 CUDA device;"),
        (
            "cuda",
            Hardware(cuda=(UNKNOWN,)),
            "no device with UUID eeee-5: Not Found",
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(nvml: FakeNvml, device: str, hardware: Hardware, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        chosen(device, hardware)


def test_without_a_card_and_for_hybrid_modes_language_model_it_is_the_cpu(nvml: FakeNvml) -> None:
    assert chosen("auto", Hardware(cpu_fast_bf16=True)).fast_bf16
    assert chosen("auto", Hardware()).kind == "cpu"
    host = choose_device(Settings(gpu_id="card", cpu_device_mb=5), BOTH, force_cpu=True)
    assert (host.kind, host.gpu_id, host.capacity) == ("cpu", "card-host", 5 * 2**20)
