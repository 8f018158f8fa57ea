"""What torch is asked about the machine's devices."""

from types import SimpleNamespace

import pytest
import torch

from shared.device.torch_devices import hardware


def test_each_cuda_device_is_asked_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [
        SimpleNamespace(uuid="bbbb-2", name="H100", total_memory=80 * 2**30, major=9),
        SimpleNamespace(uuid="aaaa-1", name="T4", total_memory=15 * 2**30, major=7),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 100 + index)
    found = hardware().cuda
    assert [(card.uuid, card.name, card.capacity) for card in found] == [
        ("bbbb-2", "H100", 80 * 2**30),
        ("aaaa-1", "T4", 15 * 2**30),
    ]
    assert [card.fast_bf16 for card in found] == [True, False]
    assert [card.reserved() for card in found] == [100, 101]


def test_a_machine_without_cuda_has_no_such_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware().cuda == ()
